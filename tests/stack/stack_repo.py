# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Butler repository of the LSST stack with simulated patches, and pipelines that run on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lsst.afw.geom as afwGeom
import lsst.afw.image as afwImage
import lsst.afw.math as afwMath
import numpy as np
from lsst.afw.table import ExposureTable
from lsst.cell_coadds import (
    CellIdentifiers,
    CoaddInputs,
    CoaddUnits,
    CommonComponents,
    MultipleCellCoadd,
    ObservationIdentifiers,
    OwnedImagePlanes,
    PatchIdentifiers,
    SingleCellCoadd,
    UniformGrid,
)
from lsst.daf.butler import Butler, DatasetType
from lsst.geom import Box2D, Box2I, Extent2I, Point2I
from lsst.meas.algorithms import KernelPsf
from lsst.meas.vaedeblend.adapters.butler_repo import run_pipetask
from lsst.meas.vaedeblend.simulation.patch import SimulatedPatch
from lsst.skymap import DiscreteSkyMap, Index2D

BANDS = ("u", "g", "r", "i", "z", "y")
SIZE = 400
SKYMAP = "simulated"
INSTRUMENT = "Simulated"
INPUTS = "inputs"

COMMON = """
description: Detection, deblending and measurement of simulated coadds.
tasks:
"""

DETECT = """
  detect:
    class: lsst.pipe.tasks.multiBand.DetectCoaddSourcesTask
    config:
      doScaleVariance: false
      python: |
        from lsst.meas.algorithms import SourceDetectionTask
        config.detection.retarget(SourceDetectionTask)
        config.detection.thresholdType = "pixel_stdev"
        config.detection.isotropicGrow = True
        config.detection.reEstimateBackground = True
        config.detection.background.binSize = 200
        config.detection.background.useApprox = False
        config.detection.background.undersampleStyle = "REDUCE_INTERP_ORDER"
        config.detection.doTempLocalBackground = False
  merge:
    class: lsst.pipe.tasks.mergeDetections.MergeDetectionsTask
    config:
      priorityList: [i, r, z, y, g, u]
      skyObjects.nSources: 10
"""

VAE = """
  deblend:
    class: lsst.meas.vaedeblend.tasks.footprints.VaeDeblendFootprintsTask
"""

SCARLET = """
  deconvolve:
    class: lsst.meas.extensions.scarlet.deconvolveExposureTask.DeconvolveExposureTask
  deblend:
    class: lsst.pipe.tasks.deblendCoaddSourcesPipeline.DeblendCoaddSourcesMultiTask
"""

RETARGETED = """
  deconvolve:
    class: lsst.meas.extensions.scarlet.deconvolveExposureTask.DeconvolveExposureTask
  deblend:
    class: lsst.pipe.tasks.deblendCoaddSourcesPipeline.DeblendCoaddSourcesMultiTask
    config:
      python: |
        from lsst.meas.vaedeblend.tasks.multiband import VaeMultibandDeblendTask
        config.multibandDeblend.retarget(VaeMultibandDeblendTask)
"""

MEASURE = """
  measure:
    class: lsst.pipe.tasks.multiBand.MeasureMergedCoaddSourcesTask
    config:
      doPropagateFlags: false
      doApCorr: false
      measurement.undeblended.names: [base_PsfFlux, base_CircularApertureFlux]
      {measure}
  mergeMeasurements:
    class: lsst.pipe.tasks.mergeMeasurements.MergeMeasurementsTask
    config:
      priorityList: [i, r, z, y, g, u]
  forced:
    class: lsst.drp.tasks.forcedPhotCoadd.ForcedPhotCoaddTask
    config:
      doApCorr: false
      connections.refWcs: deepCoadd_calexp.wcs
      {measure}
"""

PLUGIN = """python: |
        import lsst.meas.vaedeblend.adapters.afw_measurement
        config.measurement.plugins.names |= ["ext_vaedeblend_Posterior"]"""


def make_exposure(
    image: np.ndarray,
    variance: np.ndarray,
    psf: np.ndarray | None,
    wcs: Any,
    corner: tuple[int, int],
    band: str,
    planes: Mapping[str, np.ndarray] | None = None,
    scale: float = 1.0,
) -> afwImage.ExposureF:
    """Make a coadd of arrays in nJy; ``scale`` is what one unit of its image stands for, nJy."""
    masked = afwImage.MaskedImageF(Box2I(Point2I(*corner[::-1]), Extent2I(*image.shape[::-1])))
    masked.image.array[:] = image / scale
    masked.variance.array[:] = variance / scale**2
    # Planes that assembly makes, and that measurement looks for.
    for name in ("CLIPPED", "SENSOR_EDGE", "INEXACT_PSF", "REJECTED"):
        masked.mask.addMaskPlane(name)
    for name, where in (planes or {}).items():
        masked.mask.addMaskPlane(name)
        masked.mask.array[where] |= masked.mask.getPlaneBitMask(name)
    exposure = afwImage.ExposureF(masked)
    exposure.setWcs(wcs)
    exposure.setPhotoCalib(afwImage.PhotoCalib(scale))
    exposure.setFilter(afwImage.FilterLabel(band=band, physical=f"sim_{band}"))
    if psf is not None:
        kernel = afwMath.FixedKernel(afwImage.ImageD(np.ascontiguousarray(psf, float)))
        exposure.setPsf(KernelPsf(kernel))
    schema = ExposureTable.makeMinimalSchema()
    exposure.getInfo().setCoaddInputs(afwImage.CoaddInputs(schema, schema))
    return exposure


def make_cell_coadd(exposure: afwImage.ExposureF, data_id: Mapping[str, Any], cell: int) -> MultipleCellCoadd:
    """Cut a coadd into cells without borders."""
    box, band = exposure.getBBox(), data_id["band"]
    shape = Index2D(x=box.getWidth() // cell, y=box.getHeight() // cell)
    grid = UniformGrid.from_bbox_shape(box, shape)
    identifiers = PatchIdentifiers(
        skymap=data_id["skymap"], tract=data_id["tract"], patch=Index2D(x=0, y=0), band=band
    )
    # The file format wants an input.
    visit = ObservationIdentifiers(
        instrument=INSTRUMENT, physical_filter=f"sim_{band}", visit=1, detector=1, day_obs=20000101
    )
    common = CommonComponents(
        units=CoaddUnits.nJy,
        wcs=exposure.getWcs(),
        band=band,
        identifiers=identifiers,
        visit_polygons={visit: afwGeom.Polygon(Box2D(box))},
    )
    kernel = exposure.getPsf().computeKernelImage(box.getCenter())
    cells = []
    for x in range(shape.x):
        for y in range(shape.y):
            index = Index2D(x=x, y=y)
            part = exposure[grid.bbox_of(index)].maskedImage
            cells.append(
                SingleCellCoadd(
                    outer=OwnedImagePlanes(
                        image=part.image,
                        mask=part.mask,
                        variance=part.variance,
                        noise_realizations=[],
                        mask_fractions=None,
                    ),
                    psf=kernel,
                    inner_bbox=grid.bbox_of(index),
                    inputs={visit: CoaddInputs(True, 1.0, 1.0, afwGeom.Quadrupole(2.0, 2.0), False)},
                    common=common,
                    identifiers=CellIdentifiers(
                        skymap=identifiers.skymap,
                        tract=identifiers.tract,
                        patch=identifiers.patch,
                        band=band,
                        cell=index,
                    ),
                )
            )
    return MultipleCellCoadd(
        cells,
        grid=grid,
        outer_cell_size=Extent2I(cell, cell),
        psf_image_size=kernel.getDimensions(),
        inner_bbox=None,
        common=common,
    )


@dataclasses.dataclass
class StackRepository:
    """A repository with one tract, by default of 3 x 3 patches.

    Parameters
    ----------
    root : `pathlib.Path`
        Directory of the repository; it is made.
    size : `int`, optional
        Width of the patches, pixel; of small ones there are more.
    """

    root: Path
    size: int = SIZE

    def __post_init__(self) -> None:
        config = DiscreteSkyMap.ConfigClass()
        config.raList, config.decList, config.radiusList = [150.0], [2.0], [0.03]
        config.projection = "TAN"
        config.pixelScale = 0.2
        config.tractBuilder["legacy"].patchInnerDimensions = [self.size, self.size]
        config.tractBuilder["legacy"].patchBorder = 0
        config.tractOverlap = 0.0
        self.skymap = DiscreteSkyMap(config)
        self.tract = self.skymap[0]
        Butler.makeRepo(str(self.root))
        with Butler.from_config(str(self.root), writeable=True) as butler:
            self.skymap.register(SKYMAP, butler)
            butler.registry.insertDimensionData(
                "instrument",
                {
                    "name": INSTRUMENT,
                    "visit_max": 1,
                    "exposure_max": 1,
                    "detector_max": 1,
                    "visit_system": 0,
                    "class_name": "lsst.pipe.base.Instrument",
                },
            )
            for band in BANDS:
                butler.registry.insertDimensionData(
                    "physical_filter", {"instrument": INSTRUMENT, "name": f"sim_{band}", "band": band}
                )
            dimensions = butler.dimensions.conform(["skymap", "tract", "patch", "band"])
            for name, kind in (
                ("deepCoadd", "ExposureF"),
                ("deepCoaddCell", "MultipleCellCoadd"),
                ("deepCoadd_calexp", "ExposureF"),
            ):
                butler.registry.registerDatasetType(DatasetType(name, dimensions, kind))

    @property
    def wcs(self) -> afwGeom.SkyWcs:
        return self.tract.getWcs()

    def corner(self, patch: int) -> tuple[int, int]:
        """Tract pixel (y, x) of a patch's first pixel."""
        box = self.tract[patch].getOuterBBox()
        assert (box.getWidth(), box.getHeight()) == (self.size, self.size)
        return box.getMinY(), box.getMinX()

    def data_id(self, patch: int, **extra: Any) -> dict[str, Any]:
        return {"skymap": SKYMAP, "tract": 0, "patch": patch, **extra}

    def put_patch(self, patch: int, simulated: SimulatedPatch, cell: int = 100) -> None:
        """Store the coadds of a patch, whole and made of cells."""
        with Butler.from_config(str(self.root), run=INPUTS) as butler:
            for b, band in enumerate(simulated.bands):
                exposure = make_exposure(
                    simulated.image[b],
                    simulated.variance[b],
                    simulated.psf[b, 0, 0],
                    self.wcs,
                    self.corner(patch),
                    band,
                )
                data_id = self.data_id(patch, band=band)
                butler.put(exposure, "deepCoadd", data_id)
                butler.put(make_cell_coadd(exposure, data_id, cell), "deepCoaddCell", data_id)

    def run(
        self,
        tasks: str,
        inputs: Sequence[str],
        output: str,
        patches: Sequence[int],
        bands: Sequence[str] | None = None,
    ) -> str:
        """Run a pipeline with pipetask, in some bands or all, and give its log."""
        path = self.root / f"{output.replace('/', '_')}.yaml"
        path.write_text(COMMON + tasks)
        query = f"skymap = '{SKYMAP}' AND tract = 0 AND patch IN ({', '.join(map(str, patches))})"
        if bands is not None:
            query += f" AND band IN ({', '.join(map(repr, bands))})"
        return run_pipetask(
            self.root,
            output,
            inputs=",".join([*inputs, INPUTS, "skymaps"]),
            pipeline=path,
            query=query,
        ).stdout

    def get(self, dataset: str, collection: str, patch: int | None = None, **extra: Any) -> Any:
        """Read a dataset; without a patch one that has no data ID."""
        with Butler.from_config(str(self.root), collections=[collection, INPUTS]) as butler:
            return butler.get(dataset, {} if patch is None else self.data_id(patch, **extra))

    def exists(self, dataset: str, collection: str, patch: int, **extra: Any) -> bool:
        with Butler.from_config(str(self.root), collections=[collection]) as butler:
            return bool(butler.exists(dataset, self.data_id(patch, **extra)))

    def uri(self, dataset: str, collection: str, patch: int) -> Path:
        """Path of a stored dataset."""
        with Butler.from_config(str(self.root), collections=[collection]) as butler:
            return Path(butler.getURI(dataset, self.data_id(patch)).ospath)
