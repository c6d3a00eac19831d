# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The PipelineTask that deblends merged detections in the stack, under the label of scarlet's."""

from __future__ import annotations

__all__ = [
    "VaeDeblendFootprintsConfig",
    "VaeDeblendFootprintsConnections",
    "VaeDeblendFootprintsTask",
]

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import astropy.units as u
import lsst.pipe.base.connectionTypes as cT
from lsst.meas.base import SkyMapIdGeneratorConfig
from lsst.pex.config import ChoiceField, ConfigurableField, Field, FieldValidationError
from lsst.pipe.base import (
    AnnotatedPartialOutputsError,
    NoWorkFound,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    Struct,
)

from ..adapters.afw_catalog import copy_mapper, empty_catalog
from ..adapters.afw_scene import (
    calibration,
    exposure_from_cells,
)
from ..adapters.cell_coadd import scene_from_cell_coadds, union_planes
from .common import PATCH, PATCH_BAND, NoFiniteModelError, check_bands, check_quantum, network_metadata
from .multiband import VaeMultibandDeblendTask

if TYPE_CHECKING:
    from lsst.afw.image import ExposureF
    from lsst.afw.table import IdFactory, SourceCatalog
    from lsst.daf.butler import DataCoordinate, DatasetRef
    from lsst.images.cells import CellCoadd
    from lsst.pipe.base import InputQuantizedConnection, OutputQuantizedConnection, QuantumContext
    from lsst.pipe.base.connectionTypes import BaseInput, Output


class VaeDeblendFootprintsConnections(
    PipelineTaskConnections,
    dimensions=PATCH,
    defaultTemplates={"inputCoaddName": "deep", "outputCoaddName": "deep"},
):
    """Inputs and outputs of `VaeDeblendFootprintsTask`: by name those of the task that runs scarlet."""

    inputSchema = cT.InitInput(
        doc="Schema of the merged detections.",
        name="{inputCoaddName}Coadd_mergeDet_schema",
        storageClass="SourceCatalog",
    )
    peakSchema = cT.InitInput(
        doc="Schema of the peaks in their footprints.",
        name="{inputCoaddName}Coadd_peak_schema",
        storageClass="PeakCatalog",
    )
    mergedDetections = cT.Input(
        doc="Detections, merged over bands, with their footprints.",
        name="{inputCoaddName}Coadd_mergeDet",
        storageClass="SourceCatalog",
        dimensions=PATCH,
    )
    coadds = cT.Input(
        doc="Coadds of the patch, background subtracted.",
        name="{inputCoaddName}Coadd_calexp",
        storageClass="ExposureF",
        multiple=True,
        dimensions=PATCH_BAND,
    )
    coadds_cell = cT.Input(
        doc="Coadds of the patch made of cells, background not subtracted.",
        name="{inputCoaddName}CoaddCell",
        storageClass="MultipleCellCoadd",
        multiple=True,
        dimensions=PATCH_BAND,
    )
    backgrounds = cT.Input(
        doc="Backgrounds of the coadds made of cells.",
        name="{inputCoaddName}Coadd_calexp_background",
        storageClass="Background",
        multiple=True,
        dimensions=PATCH_BAND,
    )
    coadds_future = cT.Input(
        doc="Coadds of the patch made of cells, background subtracted.",
        name="{inputCoaddName}_coadd",
        storageClass="CellCoadd",
        multiple=True,
        dimensions=PATCH_BAND,
    )
    outputSchema = cT.InitOutput(
        doc="Schema of the objects.",
        name="{outputCoaddName}Coadd_deblendedFlux_schema",
        storageClass="SourceCatalog",
    )
    deblendedCatalog = cT.Output(
        doc="Objects: isolated sources, and what blends were split into.",
        name="{outputCoaddName}Coadd_deblendedCatalog",
        storageClass="SourceCatalog",
        dimensions=PATCH,
    )
    scarletModelData = cT.Output(
        doc="Models of the objects from blends.",
        name="{outputCoaddName}Coadd_scarletModelData",
        storageClass="LsstScarletModelData",
        dimensions=PATCH,
    )
    objectParents = cT.Output(
        doc="The merged detections, and what became of them.",
        name="object_parent_patch",
        storageClass="SourceCatalog",
        dimensions=PATCH,
    )

    config: VaeDeblendFootprintsConfig

    def __init__(self, *, config: VaeDeblendFootprintsConfig | None = None) -> None:
        super().__init__(config=config)
        if config is None:
            return
        used = config.image_connections()
        for name in ("coadds", "coadds_cell", "backgrounds", "coadds_future"):
            if name not in used:
                delattr(self, name)

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
        # Docstring inherited. Coadds in bands that the network does not know, or without the background that
        # goes with them, are not read; without any that is there is no work.
        config = self.config.multibandDeblend.value
        bands = network_metadata(config.network).bands
        used = [name for name in self.config.image_connections() if name in inputs]
        present = set(bands)
        for name in used:
            present &= {ref.dataId["band"] for ref in inputs[name][1]}
        check_quantum(present, config, f"{label} at {data_id}")
        adjusted = {}
        for name in used:
            connection, refs = inputs[name]
            adjusted[name] = (connection, [ref for ref in refs if ref.dataId["band"] in present])
        inputs.update(adjusted)
        super().adjustQuantum(inputs, outputs, label, data_id)
        return adjusted, {}


class VaeDeblendFootprintsConfig(PipelineTaskConfig, pipelineConnections=VaeDeblendFootprintsConnections):
    """Configuration of `VaeDeblendFootprintsTask`."""

    useCellCoadds = Field[bool](
        doc="Read coadds made of cells and their backgrounds, rather than stitched ones?", default=False
    )
    imageType = ChoiceField[str](
        doc="Form of the coadds.",
        allowed={
            "legacy": "ExposureF, or MultipleCellCoadd and Background with useCellCoadds",
            "future": "CellCoadd, background subtracted",
        },
        default="legacy",
    )
    multibandDeblend: ConfigurableField[Any] = ConfigurableField(
        target=VaeMultibandDeblendTask, doc="Deblends the patch."
    )
    idGenerator = SkyMapIdGeneratorConfig.make_field()

    def image_connections(self) -> tuple[str, ...]:
        """Give the names of the connections that images come by (`tuple` [`str`])."""
        if self.imageType == "future":
            return ("coadds_future",)
        return ("coadds_cell", "backgrounds") if self.useCellCoadds else ("coadds",)

    def validate(self) -> None:
        super().validate()
        target = self.multibandDeblend.target
        if not issubclass(target, VaeMultibandDeblendTask):
            raise FieldValidationError(
                self.__class__.multibandDeblend,
                self,
                f"{target.__name__} is no VaeMultibandDeblendTask; for others there is "
                "DeblendCoaddSourcesMultiTask.",
            )


class VaeDeblendFootprintsTask(PipelineTask):
    """Split merged detections into objects, and write what measurement reads.

    The task takes the place of ``DeblendCoaddSourcesMultiTask`` in a pipeline, under the same label, and
    reads no deconvolved coadds. All of the work is that of its subtask, which that task accepts as well.

    Parameters
    ----------
    initInputs : `dict`
        Catalogues ``inputSchema`` and ``peakSchema``, for their schemas.
    **kwargs
        Passed to `lsst.pipe.base.PipelineTask`.
    """

    ConfigClass: ClassVar[type[VaeDeblendFootprintsConfig]] = VaeDeblendFootprintsConfig
    _DefaultName: ClassVar[str] = "vaeDeblendFootprints"

    config: VaeDeblendFootprintsConfig
    multibandDeblend: VaeMultibandDeblendTask

    def __init__(self, initInputs: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(initInputs=initInputs, **kwargs)
        self._mapper = copy_mapper(initInputs["inputSchema"].schema)
        self.schema = self._mapper.getOutputSchema()
        self.makeSubtask("multibandDeblend", schema=self.schema, peakSchema=initInputs["peakSchema"].schema)
        self.outputSchema = empty_catalog(self.schema)

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        # Docstring inherited.
        images = {
            name: {ref.dataId["band"]: butlerQC.get(ref) for ref in getattr(inputRefs, name)}
            for name in self.config.image_connections()
        }
        merged = butlerQC.get(inputRefs.mergedDetections)
        id_factory = self.config.idGenerator.apply(butlerQC.quantum.dataId).make_table_id_factory()
        outputs = self.run(mergedDetections=merged, idFactory=id_factory, **images)
        butlerQC.put(outputs, outputRefs)
        # Everything is written and flagged, but a patch without a single model is not a success.
        if outputs.n_objects and outputs.n_not_finite == outputs.n_objects:
            name = network_metadata(self.config.multibandDeblend.network).name
            error = NoFiniteModelError(name, outputs.n_objects)
            raise AnnotatedPartialOutputsError.annotate(error, self, log=self.log) from error

    def run(
        self,
        mergedDetections: SourceCatalog,
        idFactory: IdFactory,
        coadds: Mapping[str, ExposureF] | None = None,
        coadds_cell: Mapping[str, Any] | None = None,
        backgrounds: Mapping[str, Any] | None = None,
        coadds_future: Mapping[str, CellCoadd] | None = None,
    ) -> Struct:
        """Deblend one patch.

        Parameters
        ----------
        mergedDetections : `lsst.afw.table.SourceCatalog`
            Merged detections with their footprints.
        idFactory : `lsst.afw.table.IdFactory`
            Gives the objects their ids.
        coadds : mapping of `str` to `lsst.afw.image.ExposureF`, optional
            Coadds by band.
        coadds_cell, backgrounds : mapping, optional
            Instead, coadds made of cells (`lsst.cell_coadds.MultipleCellCoadd`) and their backgrounds.
        coadds_future : mapping of `str` to `lsst.images.cells.CellCoadd`, optional
            Instead, coadds of this form.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            See `VaeMultibandDeblendTask.deblend_scene`.

        Raises
        ------
        NetworkError
            Raised when the network does not go with the coadds.
        lsst.pipe.base.NoWorkFound
            Raised when there is no merged detection, or a band is missing.
        """
        if not len(mergedDetections):
            raise NoWorkFound("There is no merged detection in the patch.")
        sources = empty_catalog(self.schema, idFactory)
        sources.extend(mergedDetections, self._mapper)
        config = self.multibandDeblend.config
        bands = network_metadata(config.network).bands
        given = coadds_future or coadds_cell or coadds or {}
        check_bands(set(given), bands, config, "the patch", self.log)
        known = [band for band in bands if band in given]
        if coadds_future:
            return self._run_future({band: coadds_future[band] for band in known}, sources)
        cell = origin = None
        if coadds_cell:
            assert backgrounds is not None, "cells come with their backgrounds"
            exposures = {band: exposure_from_cells(coadds_cell[band], backgrounds[band]) for band in known}
            grid = coadds_cell[known[0]].grid
            cell = (grid.cell_size.getY(), grid.cell_size.getX())
            origin = (grid.bbox.getMinY(), grid.bbox.getMinX())
        else:
            assert coadds is not None, "check_bands has found some"
            exposures = {band: coadds[band] for band in known}
        scales = {band: calibration(exposure) for band, exposure in exposures.items()}
        return self.multibandDeblend.deblend_exposures(
            exposures, scales, sources, psf_cell=cell, psf_origin=origin
        )

    def _run_future(self, coadds: Mapping[str, CellCoadd], sources: SourceCatalog) -> Struct:
        """Deblend coadds that are `lsst.images.cells.CellCoadd`."""
        config = self.multibandDeblend.config
        scene = scene_from_cell_coadds(
            coadds,
            network_metadata(config.network).bands,
            bad_planes=list(config.badMaskPlanes),
            detected_plane=None,
        )
        planes = union_planes(coadds, config.maskLimits)
        scales = {band: float(coadd.unit.to(u.nJy)) for band, coadd in coadds.items()}
        return self.multibandDeblend.deblend_scene(scene, scales, sources, planes)
