# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The subtask that takes scarlet's place in the stack: merged detections in, scarlet's outputs out."""

from __future__ import annotations

__all__ = ["VaeMultibandDeblendConfig", "VaeMultibandDeblendTask"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from lsst.pex.config import Field, ListField, RangeField
from lsst.pipe.base import NoWorkFound, Struct, Task
from lsst.utils.timer import timeMethod
from numpy.typing import NDArray

from ..adapters.afw_catalog import (
    CatalogSchemas,
    MergedParent,
    read_parents,
    write_objects,
    write_parents,
)
from ..adapters.afw_scarlet import to_model_data
from ..adapters.afw_scene import scene_from_exposures, set_plane, union_planes
from ..adapters.scarlet_file import (
    FactorizedComponent,
    ScarletModels,
    isolated_to_scarlet,
    models_to_scarlet,
)
from ..deblender import DeblendResult
from ..ground.bands import reference_band
from ..network import Network, NetworkError
from ..rendering import SelectedImages
from ..scene import Scene
from .common import (
    DeblendTaskConfig,
    check_bands,
    configured_network,
    deblend_patch,
    network_metadata,
)

if TYPE_CHECKING:
    from lsst.afw.detection import Footprint, PeakRecord
    from lsst.afw.image import ExposureF, MultibandExposure
    from lsst.afw.table import Schema, SourceCatalog


class VaeMultibandDeblendConfig(DeblendTaskConfig):
    """Configuration of `VaeMultibandDeblendTask`.

    What it has beyond `~lsst.meas.vaedeblend.tasks.common.DeblendTaskConfig` is what only the stack has:
    pseudo sources among the detections, a mask to mark what was skipped, PSFs without cells, stored models of
    scarlet's kind, and a caller that drops calibration and WCS.
    """

    pseudoColumns = ListField[str](
        doc="Flags of detections that are never deblended, such as sky objects.",
        default=["merge_peak_sky", "sky_source"],
    )
    notDeblendedMask = Field[str](
        doc="Mask plane that is set in the footprints of skipped parents, or None.",
        default="NOT_DEBLENDED",
        optional=True,
    )
    psfCellSize = RangeField(
        dtype=int,
        doc=(
            "Width of the cells in which the PSF counts as constant, pixel. Cell-based coadds have cells of "
            "their own."
        ),
        default=300,
        min=1,
    )
    modelTolerance = RangeField(
        dtype=float,
        doc=(
            "Error of a pixel of the stored models, and of the flux in circles around the object, as a part "
            "of its flux in a band. Faint objects are stored less exactly, but always far below their noise; "
            "total fluxes are exact."
        ),
        default=1e-3,
        min=1e-6,
    )
    nanojanskyPerUnit = RangeField(
        dtype=float,
        doc=(
            "Flux density of one unit of the images, nJy. Only read where the task is a subtask of another, "
            "because the multiband image it is given then has lost its calibration. Coadds of the LSST are "
            "in nJy; those with zero-point 27 have 57.54."
        ),
        default=1.0,
        min=0.0,
        inclusiveMin=False,
    )
    pixelScale = RangeField(
        dtype=float,
        doc="Width of a pixel, arcsec, for the same case; by default that of the network.",
        default=None,
        optional=True,
        min=0.0,
        inclusiveMin=False,
    )


class VaeMultibandDeblendTask(Task):
    """Split merged detections into objects with a variational autoencoder.

    The task takes the place of ``ScarletDeblendTask``: wherever that is a subtask,
    ``config.multibandDeblend.retarget(VaeMultibandDeblendTask)`` swaps it.

    Parameters
    ----------
    schema : `lsst.afw.table.Schema`
        Schema of the merged detections. It becomes the one of the objects: columns are added in place.
    peakSchema : `lsst.afw.table.Schema`, optional
        Schema of their peaks, whose columns objects get as well.
    **kwargs
        Passed to `lsst.pipe.base.Task`.
    """

    ConfigClass: ClassVar[type[VaeMultibandDeblendConfig]] = VaeMultibandDeblendConfig
    _DefaultName: ClassVar[str] = "vaeMultibandDeblend"

    config: VaeMultibandDeblendConfig

    def __init__(self, schema: Schema, peakSchema: Schema | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        metadata = network_metadata(self.config.network)
        if metadata.frame["type"] != "gaussian":
            raise NetworkError(
                f"Network {metadata.name} makes models in the observed frame; scarlet's files need those of "
                "a narrow Gaussian PSF."
            )
        self.shape_band = reference_band(metadata.bands)
        self.schemas = CatalogSchemas(schema, peakSchema, metadata.bands, self.shape_band)

    def run(
        self,
        mExposure: MultibandExposure,
        mDeconvolved: MultibandExposure | None,
        mergedSources: SourceCatalog,
    ) -> Struct:
        """Deblend one patch, called as scarlet's task is.

        Parameters
        ----------
        mExposure : `lsst.afw.image.MultibandExposure`
            Coadds of the patch. The mask plane ``config.notDeblendedMask`` is set in them where parents are
            skipped.
        mDeconvolved : `lsst.afw.image.MultibandExposure` or `None`
            Not used: the network needs no deconvolved coadds.
        mergedSources : `lsst.afw.table.SourceCatalog`
            Merged detections; its table's id factory gives the objects their ids.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            See `deblend_scene`.

        Raises
        ------
        NetworkError
            Raised when the network does not go with the coadds.
        lsst.pipe.base.NoWorkFound
            Raised when there is no merged detection, or no coadd in a band of the network.
        """
        exposures = dict(zip(mExposure.bands, mExposure.singles, strict=True))
        bands = network_metadata(self.config.network).bands
        exposures = {band: exposure for band, exposure in exposures.items() if band in bands}
        scales = dict.fromkeys(exposures, self.config.nanojanskyPerUnit)
        check_bands(exposures, bands, self.config, "the patch", self.log)
        scale = self.config.pixelScale
        return self.deblend_exposures(
            exposures,
            scales,
            mergedSources,
            pixel_scale=network_metadata(self.config.network).pixel_scale if scale is None else scale,
        )

    def deblend_exposures(
        self,
        exposures: Mapping[str, ExposureF],
        scales: Mapping[str, float],
        mergedSources: SourceCatalog,
        *,
        psf_cell: tuple[int, int] | None = None,
        psf_origin: tuple[int, int] | None = None,
        pixel_scale: float | None = None,
    ) -> Struct:
        """Deblend the coadds of one patch, and mark in them what was skipped.

        Parameters
        ----------
        exposures : mapping of `str` to `lsst.afw.image.ExposureF`
            Coadds by band, all of them in bands of the network. The mask plane ``config.notDeblendedMask`` is
            set in them where parents are skipped.
        scales : mapping of `str` to `float`
            nJy per unit of the coadds, by band.
        mergedSources : `lsst.afw.table.SourceCatalog`
            Merged detections; its table's id factory gives the objects their ids.
        psf_cell : `tuple` [`int`], optional
            (y, x) size of the cells in which the PSF counts as constant; by default ``config.psfCellSize``.
        psf_origin, pixel_scale
            See `lsst.meas.vaedeblend.adapters.afw_scene.scene_from_exposures`.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            See `deblend_scene`.
        """
        config = self.config
        scene = scene_from_exposures(
            exposures,
            network_metadata(config.network).bands,
            bad_planes=list(config.badMaskPlanes),
            psf_cell=(config.psfCellSize, config.psfCellSize) if psf_cell is None else psf_cell,
            psf_origin=psf_origin,
            scales=scales,
            pixel_scale=pixel_scale,
        )
        masks = [exposure.mask for exposure in exposures.values()]
        planes = union_planes(masks, config.maskLimits)
        result = self.deblend_scene(scene, scales, mergedSources, planes)
        if config.notDeblendedMask:
            for mask in masks:
                set_plane(mask, config.notDeblendedMask, result.skipped)
        return result

    @timeMethod
    def deblend_scene(
        self,
        scene: Scene,
        scales: Mapping[str, float],
        mergedSources: SourceCatalog,
        planes: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> Struct:
        """Deblend one patch.

        Parameters
        ----------
        scene : `lsst.meas.vaedeblend.scene.Scene`
            The patch in the network's bands, without parents.
        scales : mapping of `str` to `float`
            nJy per unit of the coadds that measurement is going to read, by band.
        mergedSources : `lsst.afw.table.SourceCatalog`
            Merged detections; its table's id factory gives the objects their ids.
        planes : mapping of `str` to `numpy.ndarray`, (H, W), optional
            Where each mask plane of ``config.maskLimits`` is set in any band.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            With

            - ``deblendedCatalog``: the objects (`lsst.afw.table.SourceCatalog`);
            - ``scarletModelData``: their models (``LsstScarletModelData``);
            - ``objectParents``: the parents (`lsst.afw.table.SourceCatalog`);
            - ``skipped``: footprints of skipped parents (`list` [`lsst.afw.detection.Footprint`]);
            - ``n_objects``, ``n_not_finite``: number of sources that went through the network, and of those
              that it has no finite model for.

        Raises
        ------
        NetworkError
            Raised when the network does not go with the scene.
        lsst.pipe.base.NoWorkFound
            Raised when there is no merged detection, or no coadd has a PSF.
        """
        if not len(mergedSources):
            raise NoWorkFound("There is no merged detection in the patch.")
        if not scene.psf.valid.any():
            raise NoWorkFound("No coadd of the patch has a PSF.")
        network = configured_network(self.config)
        families = read_parents(mergedSources, scene.origin, self.config.pseudoColumns)
        real = [family for family in families if family.peaks and not family.pseudo]
        result = posterior = None
        peaks: list[PeakRecord | None] = []
        peak_ids = np.empty(0, np.int64)
        if real:
            scene.parents = [family.parent for family in real]
            patch = deblend_patch(scene, network, self.config, self.log, self.metadata, planes or {})
            for family in real:
                family.skipped = patch.skipped.get(family.id)
            active = [family for family in real if family.skipped is None]
            if active:
                result, posterior = patch.result, patch.posterior
                _adopt(active, result, mergedSources)
                peaks, peak_ids = _assign_peaks(families, result)
        models = self._models(scene, scales, families, result, peak_ids, network)
        components = {number: len(source.components) for number, source in models.sources().items()}
        missing_psf = not scene.psf.valid[:, scene.valid.any(axis=(1, 2))].any(axis=0).all()
        parents = write_parents(self.schemas, mergedSources, families, result, components, missing_psf)
        objects = write_objects(
            self.schemas, mergedSources, families, result, posterior, peaks, components, peak_ids
        )
        skipped: list[Footprint] = [f.footprint for f in families if f.skipped is not None]
        self.metadata["n_skipped"] = len(skipped)
        n_pseudo = sum(family.pseudo for family in families)
        self.log.info(
            "%d merged detections gave %d objects, %d of them from %d blends; %d blends were skipped, and %d "
            "pseudo sources passed through.",
            len(families) - n_pseudo,
            len(objects) - n_pseudo,
            int((np.asarray(objects["parent"]) != 0).sum()),
            sum(family.blend for family in families),
            len(skipped),
            n_pseudo,
        )
        return Struct(
            deblendedCatalog=objects,
            scarletModelData=to_model_data(models),
            objectParents=parents,
            skipped=skipped,
            n_objects=0 if result is None else len(result.sources),
            n_not_finite=0 if result is None else int(result.sources.flags["not_finite"].sum()),
        )

    def _models(
        self,
        scene: Scene,
        scales: Mapping[str, float],
        families: Sequence[MergedParent],
        result: DeblendResult | None,
        peak_ids: NDArray[np.int64],
        network: Network,
    ) -> ScarletModels:
        """Make scarlet models in the bands that measurement can use, in the units of its images."""
        # Measurement of a band needs its PSF, so that the file has no band without.
        keep = np.flatnonzero(scene.psf.valid.any(axis=0) & scene.valid.any(axis=(1, 2)))
        bands = tuple(scene.bands[i] for i in keep)
        psf = _central_psf(scene)[keep]
        isolated = [f.parent for f in families if f.isolated and not f.pseudo and f.peaks]
        sigma = network.metadata.frame["sigma"]
        if result is None:
            return isolated_to_scarlet(bands, psf, isolated, scene.origin, model_sigma=sigma)
        sources = result.sources
        models = dataclasses.replace(
            sources,
            bands=bands,
            flux=sources.flux[:, keep],
            flux_err=sources.flux_err[:, keep],
            images=SelectedImages(sources.images, keep),
        )
        scarlet = models_to_scarlet(
            models,
            psf,
            [f.parent for f in families if f.blend],
            isolated,
            peak_ids=peak_ids,
            model_sigma=sigma,
            tolerance=self.config.modelTolerance,
        )
        unit = np.array([scales[band] for band in bands], np.float32)
        for source in scarlet.sources().values():
            for component in source.components:
                assert isinstance(component, FactorizedComponent), "written by models_to_scarlet"
                component.spectrum /= unit
        return scarlet


def _adopt(active: Sequence[MergedParent], result: DeblendResult, merged: SourceCatalog) -> None:
    """Give sources to their parents, and ids to those that become children."""
    sources = result.sources
    factory = merged.getIdFactory()
    factory.notify(int(max(record.getId() for record in merged)))
    for row, family in enumerate(active):
        family.row = row
        family.sources = np.flatnonzero(sources.parent == family.id)
        if family.blend:
            sources.id[family.sources] = [factory() for _ in family.sources]
        else:
            sources.id[family.sources] = family.id


def _central_psf(scene: Scene) -> NDArray[np.float64]:
    """PSF of each band in the scene's middle, or where the nearest is; NaN for a band without any."""
    height, width = scene.shape
    return scene.psf.filled().stamps[int(scene.psf.index(width / 2, height / 2))]


def _assign_peaks(
    families: Sequence[MergedParent], result: DeblendResult
) -> tuple[list[PeakRecord | None], NDArray[np.int64]]:
    """Find the peak that each source comes from; those that the deblender found get ids of their own."""
    sources = result.sources
    peaks: list[PeakRecord | None] = [None] * len(sources)
    for family in families:
        # The deblender keeps the peaks that it is given exactly.
        place = {xy: peak for xy, peak in zip(map(tuple, family.parent.peaks), family.peaks, strict=True)}
        for i in family.sources.tolist():
            if sources.iteration[i] == 0:
                peaks[i] = place.get((sources.peak_x[i], sources.peak_y[i]))
    highest = max((peak.getId() for family in families for peak in family.peaks), default=0)
    ids = np.array([0 if peak is None else peak.getId() for peak in peaks], np.int64)
    found = np.array([peak is None for peak in peaks], bool)
    ids[found] = highest + 1 + np.arange(found.sum())
    return peaks, ids
