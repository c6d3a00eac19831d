# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The PipelineTask that compares this deblender's objects of a patch with those of others."""

from __future__ import annotations

__all__ = [
    "CompareDeblendersConfig",
    "CompareDeblendersConnections",
    "CompareDeblendersTask",
    "MatchConfig",
]

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Config, Field, FieldValidationError, RangeField
from lsst.pipe.base import NoWorkFound, PipelineTask, PipelineTaskConfig, PipelineTaskConnections, Struct
from lsst.utils.timer import timeMethod

from ..adapters.cell_coadd import scene_from_cell_coadds
from ..evaluation.comparison.entrants import Entrant, from_scarlet
from ..evaluation.comparison.patches import Patch
from ..evaluation.comparison.repository import models_entrant
from ..evaluation.comparison.result import compare_entrants
from .common import network_metadata

if TYPE_CHECKING:
    from astropy.table import Table
    from lsst.images.cells import CellCoadd
    from lsst.pipe.base import InputQuantizedConnection, OutputQuantizedConnection, QuantumContext

    from ..adapters.scarlet_file import ScarletModels


class CompareDeblendersConnections(
    PipelineTaskConnections,
    dimensions=("skymap", "tract", "patch"),
    defaultTemplates={"coaddName": "deep"},
):
    """Inputs and outputs of `CompareDeblendersTask`."""

    coadds = cT.Input(
        doc="Coadds of the patch that the deblenders worked on.",
        name="{coaddName}_coadd",
        storageClass="CellCoadd",
        dimensions=("skymap", "tract", "patch", "band"),
        multiple=True,
    )
    objectCatalog = cT.Input(
        doc="Catalogue of this deblender's objects.",
        name="object_vae_deblend",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    models = cT.Input(
        doc="This deblender's models.",
        name="object_vae_models",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    scarletModels = cT.Input(
        doc="Scarlet's models of the same coadds.",
        name="object_scarlet_models",
        storageClass="LsstScarletModelData",
        dimensions=("skymap", "tract", "patch"),
    )
    metrics = cT.Output(
        doc="Numbers that say how the deblenders' objects differ, with errors.",
        name="object_vae_compare_metrics",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    comparedObjects = cT.Output(
        doc="Objects of all deblenders, measured alike.",
        name="object_vae_compare_objects",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )

    config: CompareDeblendersConfig

    def __init__(self, *, config: CompareDeblendersConfig | None = None) -> None:
        super().__init__(config=config)
        if config is not None and not config.useScarlet:
            del self.scarletModels


class MatchConfig(Config):
    """How objects of two deblenders are matched."""

    radius = RangeField(
        dtype=float,
        doc="Largest distance of matched objects, pixel.",
        default=3.0,
        min=0.0,
        inclusiveMin=False,
    )


class CompareDeblendersConfig(
    PipelineTaskConfig, MatchConfig, pipelineConnections=CompareDeblendersConnections
):
    """Configuration of `CompareDeblendersTask`."""

    network = Field[str](
        doc="Name or path of the network that made the models; by default the one that they name.",
        default=None,
        optional=True,
    )
    useScarlet = Field[bool](
        doc="Compare with scarlet's models, which only the stack can read from a repository.", default=False
    )
    runSep = Field[bool](
        doc="Compare with SExtractor's detection and deblending, which sep is run for.", default=True
    )

    def validate(self) -> None:
        # Docstring inherited.
        super().validate()
        if not (self.useScarlet or self.runSep):
            raise FieldValidationError(
                type(self).runSep, self, "There is nobody to compare with: set runSep or useScarlet."
            )


class CompareDeblendersTask(PipelineTask):
    """Compare deblenders on one patch, where nobody knows the truth.

    Objects are matched one to one; what is measured of them and of their differences is that of
    ``vaedeblend compare``, which makes the report of a repository.
    """

    ConfigClass: ClassVar[type[CompareDeblendersConfig]] = CompareDeblendersConfig
    _DefaultName: ClassVar[str] = "compareDeblenders"

    config: CompareDeblendersConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        # Docstring inherited.
        models = butlerQC.get(inputRefs.models)
        if not len(models):
            raise NoWorkFound("This deblender has no object on the patch.")
        bands = network_metadata(self._network(models)).bands
        coadds = {
            ref.dataId["band"]: butlerQC.get(ref) for ref in inputRefs.coadds if ref.dataId["band"] in bands
        }
        scarlet = None
        if self.config.useScarlet:
            from ..adapters.afw_scarlet import from_model_data

            scarlet = from_model_data(butlerQC.get(inputRefs.scarletModels))
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "the quanta of a task with dimensions have data IDs"
        name = f"{data_id['tract']}_{data_id['patch']}"
        outputs = self.run(coadds, butlerQC.get(inputRefs.objectCatalog), models, scarlet=scarlet, name=name)
        butlerQC.put(outputs.metrics, outputRefs.metrics)
        butlerQC.put(outputs.comparedObjects, outputRefs.comparedObjects)

    def _network(self, models: Table) -> str:
        return self.config.network or str(models["network"][0])

    @timeMethod
    def run(
        self,
        coadds: Mapping[str, CellCoadd],
        objects: Table,
        models: Table,
        *,
        scarlet: ScarletModels | None = None,
        name: str = "patch",
    ) -> Struct:
        """Compare the objects of one patch.

        Parameters
        ----------
        coadds : mapping of `str` to `lsst.images.cells.CellCoadd`
            Coadds by band, all of them in bands of the network.
        objects, models : `astropy.table.Table`
            This deblender's tables ``object_vae_deblend`` and ``object_vae_models``.
        scarlet : `lsst.meas.vaedeblend.adapters.scarlet_file.ScarletModels`, optional
            Scarlet's models, for ``config.useScarlet``.
        name : `str`, optional
            Name of the patch in the tables.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            With

            - ``metrics``: the numbers (`astropy.table.Table`), columns ``entrant``, ``versus``, ``sample``,
              ``metric``, ``value``, ``error``, ``n``;
            - ``comparedObjects``: all objects (`astropy.table.Table`).

        Raises
        ------
        ValueError
            Raised when tables and coadds do not go together.
        """
        bands = tuple(band for band in network_metadata(self._network(models)).bands if band in coadds)
        patch = Patch(name, scene_from_cell_coadds(coadds, bands))
        entrants: list[Entrant] = [
            models_entrant("vaedeblend", models, objects, patch, self._network(models))
        ]
        if scarlet is not None:
            entrants.append(from_scarlet("scarlet", scarlet, patch.scene, patch.scene.origin))
        if self.config.runSep:
            from ..evaluation.comparison.sextractor import run_sep

            entrants.append(run_sep(patch.scene))
        comparison = compare_entrants([patch], [[entrant] for entrant in entrants], self.config.radius)
        counts: dict[str, Any] = comparison.pairs[0].counts
        self.log.info(
            "%s and %s have %d objects in common; %d are merged and %d missed, %d split and %d added.",
            *comparison.names[:2],
            *(counts[key] for key in ("matched", "merged", "missed", "split", "added")),
        )
        return Struct(
            metrics=comparison.metrics_table(),
            comparedObjects=comparison.object_table(),
        )
