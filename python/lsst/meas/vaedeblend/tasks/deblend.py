# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The PipelineTask that deblends the coadds of one patch."""

from __future__ import annotations

__all__ = [
    "NoFiniteModelError",
    "VaeDeblendConfig",
    "VaeDeblendConnections",
    "VaeDeblendTask",
]

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar

import lsst.pipe.base.connectionTypes as cT
import numpy as np
from lsst.pex.config import Field
from lsst.pipe.base import (
    AnnotatedPartialOutputsError,
    NoWorkFound,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    Struct,
)
from lsst.utils.timer import timeMethod

from ..adapters.cell_coadd import masked_image, scene_from_cell_coadds, union_planes
from ..adapters.stored_network import DATASET, load_stored_network
from ..catalog import models_table, object_table, parent_table
from ..ground.identifiers import PatchIds
from ..network import Network, NetworkError
from ..sources import ParentSummary, SourceModels
from .common import (
    DeblendTaskConfig,
    NoFiniteModelError,
    check_bands,
    check_quantum,
    configured_network,
    deblend_patch,
    network_metadata,
)

if TYPE_CHECKING:
    import pyarrow
    from astropy.table import Table
    from lsst.daf.butler import DataCoordinate, DatasetRef
    from lsst.images.cells import CellCoadd
    from lsst.pipe.base import InputQuantizedConnection, OutputQuantizedConnection, QuantumContext
    from lsst.pipe.base.connectionTypes import BaseInput, Output


class VaeDeblendConnections(
    PipelineTaskConnections,
    dimensions=("skymap", "tract", "patch"),
    defaultTemplates={"coaddName": "deep"},
):
    """Inputs and outputs of `VaeDeblendTask`."""

    coadds = cT.Input(
        doc="Coadds of the patch with their DETECTED mask plane, in the bands of the network.",
        name="{coaddName}_coadd",
        storageClass="CellCoadd",
        dimensions=("skymap", "tract", "patch", "band"),
        multiple=True,
    )
    peaks = cT.Input(
        doc=(
            "Peaks to start from: x and y in tract pixels and, optionally, parent, an identifier of the "
            "blend that each peak belongs to."
        ),
        name="object_vae_peaks",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    network = cT.PrerequisiteInput(
        doc="The network, as `lsst.meas.vaedeblend.adapters.stored_network` stores it.",
        name=DATASET,
        storageClass="ArrowTable",
        dimensions=(),
    )
    objects = cT.Output(
        doc="Catalogue of deblended objects.",
        name="object_vae_deblend",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    parents = cT.Output(
        doc="Catalogue of parents, the connected regions of detected pixels.",
        name="object_vae_parent",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    models = cT.Output(
        doc="What the network's decoder needs to render the model of each object.",
        name="object_vae_models",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    residual = cT.Output(
        doc="Coadds minus the models of all objects, with the coadds' mask and variance.",
        name="{coaddName}_coadd_vae_residual",
        storageClass="MaskedImageV2",
        dimensions=("skymap", "tract", "patch", "band"),
        multiple=True,
    )

    config: VaeDeblendConfig

    def __init__(self, *, config: VaeDeblendConfig | None = None) -> None:
        super().__init__(config=config)
        if config is None:
            return
        if not config.usePeaks:
            del self.peaks
        if not config.useStoredNetwork:
            del self.network
        if not config.doWriteResidual:
            del self.residual

    def adjustQuantum(
        self,
        inputs: dict[str, tuple[BaseInput, Collection[DatasetRef]]],
        outputs: dict[str, tuple[Output, Collection[DatasetRef]]],
        label: str,
        data_id: DataCoordinate,
    ) -> tuple[
        Mapping[str, tuple[BaseInput, Collection[DatasetRef]]],
        Mapping[str, tuple[Output, Collection[DatasetRef]]],
    ]:
        # Docstring inherited. The bands are the network's: others are not read, and without all of them there
        # is no work, which is better known when the graph is built than when it runs. Of a network that is a
        # dataset nothing is known before.
        connection, refs = inputs["coadds"]
        if self.config.useStoredNetwork:
            super().adjustQuantum(inputs, outputs, label, data_id)
            return {}, {}
        bands = network_metadata(self.config.network).bands
        kept = [ref for ref in refs if ref.dataId["band"] in bands]
        present = {str(ref.dataId["band"]) for ref in kept}
        check_quantum(present, self.config, f"{label} at {data_id}")
        adjusted_inputs = {"coadds": (connection, kept)}
        adjusted_outputs = {}
        if "residual" in outputs:
            residual, residual_refs = outputs["residual"]
            kept_outputs = [ref for ref in residual_refs if ref.dataId["band"] in present]
            adjusted_outputs["residual"] = (residual, kept_outputs)
        inputs.update(adjusted_inputs)
        outputs.update(adjusted_outputs)
        super().adjustQuantum(inputs, outputs, label, data_id)
        return adjusted_inputs, adjusted_outputs


class VaeDeblendConfig(PipelineTaskConfig, DeblendTaskConfig, pipelineConnections=VaeDeblendConnections):
    """Configuration of `VaeDeblendTask`.

    What it has beyond `~lsst.meas.vaedeblend.tasks.common.DeblendTaskConfig` is what only this task reads or
    writes: a table of peaks, which the stack has in its merged detections, and residual images, which
    measurement in the stack makes of the models.
    """

    usePeaks = Field[bool](doc="Start from a table of peaks, instead of finding them.", default=False)
    useStoredNetwork = Field[bool](
        doc="Take the network from the repository (vaedeblend_network), instead of the one named by network.",
        default=False,
    )
    doWriteResidual = Field[bool](doc="Write the residual images.", default=False)


class VaeDeblendTask(PipelineTask):
    """Separate the blended objects of a patch with a variational autoencoder.

    The connected regions of the DETECTED mask plane, united over bands, are the parents. Their objects are
    modelled one by one by the network, all bands at once, fluxes are solved for jointly, and objects that
    show up in the residual are added.

    Notes
    -----
    The network is loaded once per process. A file that is not what it claims to be, or that does not go with
    the coadds, makes the quantum fail with `lsst.meas.vaedeblend.network.NetworkError`.
    """

    ConfigClass: ClassVar[type[VaeDeblendConfig]] = VaeDeblendConfig
    _DefaultName: ClassVar[str] = "vaeDeblend"

    config: VaeDeblendConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        # Docstring inherited.
        network = self._network(butlerQC.get(inputRefs.network) if self.config.useStoredNetwork else None)
        refs = {ref.dataId["band"]: ref for ref in inputRefs.coadds}
        bands = network.metadata.bands
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "the quanta of a task with dimensions have data IDs"
        coadds = {band: butlerQC.get(refs[band]) for band in bands if band in refs}
        peaks = butlerQC.get(inputRefs.peaks) if self.config.usePeaks else None

        outputs = self.run(coadds, PatchIds(int(data_id["tract"]), int(data_id["patch"])), peaks, network)
        butlerQC.put(outputs.objects, outputRefs.objects)
        butlerQC.put(outputs.parents, outputRefs.parents)
        butlerQC.put(outputs.models, outputRefs.models)
        if self.config.doWriteResidual:
            for ref in outputRefs.residual:
                if ref.dataId["band"] not in outputs.residual:
                    continue
                butlerQC.put(outputs.residual[ref.dataId["band"]], ref)

        # Everything is written and flagged, but a patch without a single model is not a success.
        if outputs.n_objects and outputs.n_not_finite == outputs.n_objects:
            error = NoFiniteModelError(network.metadata.name, outputs.n_objects)
            raise AnnotatedPartialOutputsError.annotate(error, self, log=self.log) from error

    def _network(self, table: pyarrow.Table | None) -> Network:
        """Load the network of the repository, or the configured one."""
        if table is None:
            return configured_network(self.config)
        config = self.config
        return load_stored_network(
            table, tuple(config.executionProviders), config.requireProvider, config.threads
        )

    @timeMethod
    def run(
        self,
        coadds: Mapping[str, CellCoadd],
        ids: PatchIds,
        peaks: Table | None = None,
        network: Network | None = None,
    ) -> Struct:
        """Deblend one patch.

        Parameters
        ----------
        coadds : mapping of `str` to `lsst.images.cells.CellCoadd`
            Coadds by band, in any order.
        ids : `lsst.meas.vaedeblend.ground.identifiers.PatchIds`
            Gives objects and parents their identifiers.
        peaks : `astropy.table.Table`, optional
            Peaks to start from, with columns ``x`` and ``y`` (tract pixel) and optionally ``parent``.
        network : `lsst.meas.vaedeblend.network.Network`, optional
            The network, by default the configured one.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            With

            - ``objects``, ``parents``, ``models``: the tables (`astropy.table.Table`);
            - ``residual``: coadd minus models by band (`dict` of `lsst.images.MaskedImage`), empty unless
              configured;
            - ``n_objects``, ``n_not_finite``: number of objects, and of those that the network has no finite
              model for.

        Raises
        ------
        NetworkError
            Raised when the network does not go with the coadds' bands or pixel scale.
        lsst.pipe.base.NoWorkFound
            Raised when a band is missing, or no pixel is detected and no peak given.
        """
        network = configured_network(self.config) if network is None else network
        bands = network.metadata.bands
        if others := sorted(set(coadds) - set(bands)):
            raise NetworkError(
                f"Network {network.metadata.name} has bands {list(bands)}; there are coadds in {others} too."
            )
        where = f"patch {ids.patch} of tract {ids.tract}"
        check_bands(set(coadds), bands, self.config, where, self.log)
        scene = scene_from_cell_coadds(
            coadds, bands, bad_planes=tuple(self.config.badMaskPlanes), peaks=peaks
        )
        if not scene.parents:
            message = f"No DETECTED pixel in {where}, and no peak given."
            self.log.warning("%s", message)
            raise NoWorkFound(message)

        masks = union_planes(coadds, self.config.maskLimits)
        patch = deblend_patch(scene, network, self.config, self.log, self.metadata, masks)
        result, parents = patch.result, patch.parents
        self._identify(result.sources, parents, ids)
        first = next(iter(coadds.values()))
        projection = first.sky_projection
        box = first.patch.inner_bbox
        inner = (box.y.start, box.y.stop, box.x.start, box.x.stop)

        def sky(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if not len(x):  # AST knows no empty set of points
                return np.empty(0), np.empty(0)
            coord = projection.pixel_to_sky(x=x, y=y)
            return coord.ra.deg, coord.dec.deg

        n_objects = len(result.sources)
        not_finite = int(result.sources.flags["not_finite"].sum())
        self.log.info(
            "%d parents gave %d objects; %d parents were skipped.",
            len(parents),
            n_objects,
            len(patch.skipped),
        )
        residual = {}
        if self.config.doWriteResidual:
            for b, band in enumerate(bands):
                if band in coadds:
                    residual[band] = masked_image(coadds[band], result.residual[b], scene.origin)
        return Struct(
            objects=object_table(result.sources, parents, sky, posterior=patch.posterior, inner=inner),
            parents=parent_table(parents, sky),
            models=models_table(result.sources),
            residual=residual,
            n_objects=n_objects,
            n_not_finite=not_finite,
        )

    @staticmethod
    def _identify(sources: SourceModels, parents: ParentSummary, ids: PatchIds) -> None:
        """Replace the scene's own numbers by identifiers that are unique over the sky map."""
        numbers = ids.parents(len(parents))
        lookup = dict(zip(parents.id.tolist(), numbers.tolist(), strict=True))
        sources.parent = np.array([lookup[parent] for parent in sources.parent.tolist()], np.int64)
        sources.id = ids.objects(len(sources))
        parents.id = numbers
