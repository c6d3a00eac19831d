# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The PipelineTask that compares, in the stack, this deblender and scarlet on the same detections."""

from __future__ import annotations

__all__ = [
    "CompareFootprintDeblendersConfig",
    "CompareFootprintDeblendersConnections",
    "CompareFootprintDeblendersTask",
]

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Field
from lsst.pipe.base import NoWorkFound, PipelineTask, PipelineTaskConfig, PipelineTaskConnections, Struct
from lsst.utils.timer import timeMethod

from ..adapters.afw_scarlet import from_model_data
from ..adapters.afw_scene import scene_from_exposures
from ..adapters.metric_bundle import to_bundle
from ..evaluation.comparison.entrants import from_scarlet
from ..evaluation.comparison.measured import with_measured
from ..evaluation.comparison.patches import Patch
from ..evaluation.comparison.result import compare_entrants
from .common import PATCH, PATCH_BAND
from .compare import MatchConfig

if TYPE_CHECKING:
    from lsst.afw.image import ExposureF
    from lsst.afw.table import SourceCatalog
    from lsst.pipe.base import InputQuantizedConnection, OutputQuantizedConnection, QuantumContext

NAMES = ("vaedeblend", "scarlet")


class CompareFootprintDeblendersConnections(
    PipelineTaskConnections,
    dimensions=PATCH,
    defaultTemplates={"coaddName": "deep", "vaeName": "vae", "scarletName": "scarlet"},
):
    """Inputs and outputs of `CompareFootprintDeblendersTask`."""

    coadds = cT.Input(
        doc="Coadds of the patch that the deblenders worked on.",
        name="{coaddName}Coadd_calexp",
        storageClass="ExposureF",
        dimensions=PATCH_BAND,
        multiple=True,
    )
    vaeModels = cT.Input(
        doc="This deblender's models.",
        name="{vaeName}Coadd_scarletModelData",
        storageClass="LsstScarletModelData",
        dimensions=PATCH,
    )
    scarletModels = cT.Input(
        doc="Scarlet's models.",
        name="{scarletName}Coadd_scarletModelData",
        storageClass="LsstScarletModelData",
        dimensions=PATCH,
    )
    vaeMeasured = cT.Input(
        doc="Measurements of this deblender's objects.",
        name="{vaeName}Coadd_meas",
        storageClass="SourceCatalog",
        dimensions=PATCH_BAND,
        multiple=True,
        minimum=0,
    )
    scarletMeasured = cT.Input(
        doc="Measurements of scarlet's objects.",
        name="{scarletName}Coadd_meas",
        storageClass="SourceCatalog",
        dimensions=PATCH_BAND,
        multiple=True,
        minimum=0,
    )
    metrics = cT.Output(
        doc="Numbers that say how the deblenders' objects differ, with errors.",
        name="object_vae_compare_metrics",
        storageClass="ArrowAstropy",
        dimensions=PATCH,
    )
    comparedObjects = cT.Output(
        doc="Objects of both deblenders, measured alike.",
        name="object_vae_compare_objects",
        storageClass="ArrowAstropy",
        dimensions=PATCH,
    )
    metricBundle = cT.Output(
        doc="The numbers as measurements that dashboards read.",
        name="object_vae_compare_bundle",
        storageClass="MetricMeasurementBundle",
        dimensions=PATCH,
    )

    config: CompareFootprintDeblendersConfig

    def __init__(self, *, config: CompareFootprintDeblendersConfig | None = None) -> None:
        super().__init__(config=config)
        if config is not None and not config.writeBundle:
            del self.metricBundle


class CompareFootprintDeblendersConfig(
    PipelineTaskConfig, MatchConfig, pipelineConnections=CompareFootprintDeblendersConnections
):
    """Configuration of `CompareFootprintDeblendersTask`."""

    writeBundle = Field[bool](
        doc="Write the numbers as a MetricMeasurementBundle as well, which needs analysis_tools.",
        default=False,
    )


class CompareFootprintDeblendersTask(PipelineTask):
    """Compare this deblender and scarlet on one patch, where nobody knows the truth.

    Both have split the same merged detections. Models are compared as by
    `lsst.meas.vaedeblend.tasks.compare.CompareDeblendersTask`; where the pipelines' measurement ran on both,
    its fluxes and shapes are compared too. Fluxes are in the units of the coadds.
    """

    ConfigClass: ClassVar[type[CompareFootprintDeblendersConfig]] = CompareFootprintDeblendersConfig
    _DefaultName: ClassVar[str] = "compareFootprintDeblenders"

    config: CompareFootprintDeblendersConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        # Docstring inherited.
        coadds, vae, scarlet = (
            {ref.dataId["band"]: butlerQC.get(ref) for ref in getattr(inputRefs, name)}
            for name in ("coadds", "vaeMeasured", "scarletMeasured")
        )
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "the quanta of a task with dimensions have data IDs"
        outputs = self.run(
            coadds,
            butlerQC.get(inputRefs.vaeModels),
            butlerQC.get(inputRefs.scarletModels),
            vaeMeasured=vae,
            scarletMeasured=scarlet,
            name=f"{data_id['tract']}_{data_id['patch']}",
        )
        butlerQC.put(outputs, outputRefs)

    @timeMethod
    def run(
        self,
        coadds: Mapping[str, ExposureF],
        vaeModels: Any,
        scarletModels: Any,
        *,
        vaeMeasured: Mapping[str, SourceCatalog] | None = None,
        scarletMeasured: Mapping[str, SourceCatalog] | None = None,
        name: str = "patch",
    ) -> Struct:
        """Compare the objects of one patch.

        Parameters
        ----------
        coadds : mapping of `str` to `lsst.afw.image.ExposureF`
            Coadds by band.
        vaeModels, scarletModels : `lsst.meas.extensions.scarlet.io.LsstScarletModelData`
            Models of both deblenders.
        vaeMeasured, scarletMeasured : mapping of `str` to `lsst.afw.table.SourceCatalog`, optional
            Measurements by band.
        name : `str`, optional
            Name of the patch in the tables.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            With

            - ``metrics``, ``comparedObjects``: as those of
              `lsst.meas.vaedeblend.tasks.compare.CompareDeblendersTask.run`;
            - ``metricBundle``: the numbers once more, with ``config.writeBundle``.

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised when a deblender has no object on the patch, or they have no band in common.
        """
        models = [from_model_data(data) for data in (vaeModels, scarletModels)]
        bands = [b for b in models[0].bands if b in coadds and b in models[1].bands]
        if not bands or not all(m.isolated or m.sources() for m in models):
            raise NoWorkFound("A deblender has no object on the patch.")
        # Both have models in the coadds' units.
        scene = scene_from_exposures(
            {band: coadds[band] for band in bands}, bands, scales=dict.fromkeys(bands, 1.0)
        )
        patch = Patch(name, scene)
        entrants = [from_scarlet(n, m, scene, scene.origin) for n, m in zip(NAMES, models, strict=True)]
        comparison = compare_entrants([patch], [[entrant] for entrant in entrants], self.config.radius)
        given = (vaeMeasured or {}, scarletMeasured or {})
        tables = {
            n: {band: catalog.asAstropy() for band, catalog in own.items()}
            for n, own in zip(NAMES, given, strict=True)
        }
        metrics = with_measured(comparison, tables, *NAMES)
        counts: dict[str, Any] = comparison.pairs[0].counts
        self.log.info("%s and %s have %d objects in common.", *NAMES, counts["matched"])
        result = Struct(metrics=metrics, comparedObjects=comparison.object_table())
        if self.config.writeBundle:
            result.metricBundle = to_bundle(metrics)
        return result
