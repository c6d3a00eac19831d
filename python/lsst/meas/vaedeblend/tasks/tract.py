# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The PipelineTask that joins the catalogues of a tract's patches."""

from __future__ import annotations

__all__ = ["JoinTractConfig", "JoinTractConnections", "JoinTractTask"]

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import DictField, FieldValidationError
from lsst.pipe.base import PipelineTask, PipelineTaskConfig, PipelineTaskConnections, Struct

from ..catalog import flag_tracts, join_patches

if TYPE_CHECKING:
    from astropy.table import Table
    from lsst.pipe.base import InputQuantizedConnection, OutputQuantizedConnection, QuantumContext


class JoinTractConnections(PipelineTaskConnections, dimensions=("skymap", "tract")):
    """Inputs and output of `JoinTractTask`."""

    catalogues = cT.Input(
        doc="Catalogues of the patches.",
        name="object_vae_deblend",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
    )
    joined = cT.Output(
        doc="Catalogue of the tract; detect_isPrimary leaves one entry of each object.",
        name="object_vae_tract",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )


class JoinTractConfig(PipelineTaskConfig, pipelineConnections=JoinTractConnections):
    """Configuration of `JoinTractTask`."""

    tractCentres = DictField[int, str](
        doc=(
            "Tract to right ascension and declination of its centre in degrees with a space between, for all "
            "tracts that overlap. Without any, overlaps of tracts are not looked for, and there is no column "
            "detect_isTractInner."
        ),
        default={},
    )

    def validate(self) -> None:
        super().validate()
        try:
            self.centres()
        except ValueError as error:
            raise FieldValidationError(self.__class__.tractCentres, self, str(error)) from error

    def centres(self) -> Mapping[int, tuple[float, float]]:
        """Read the centres of tracts, degree."""
        out = {}
        for tract, text in self.tractCentres.items():
            words = text.replace(",", " ").split()
            if len(words) != 2:
                raise ValueError(f"Tract {tract}: right ascension and declination, not {text!r}.")
            out[tract] = (float(words[0]), float(words[1]))
        return out


class JoinTractTask(PipelineTask):
    """Join the catalogues of a tract's patches, with the duplicates of overlaps flagged."""

    ConfigClass: ClassVar[type[JoinTractConfig]] = JoinTractConfig
    _DefaultName: ClassVar[str] = "vaeJoinTract"

    config: JoinTractConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        # Docstring inherited.
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "the quanta of a task with dimensions have data IDs"
        tables = [butlerQC.get(ref) for ref in inputRefs.catalogues]
        butlerQC.put(self.run(tables, int(data_id["tract"])).joined, outputRefs.joined)

    def run(self, tables: list[Table], tract: int) -> Struct:
        """Join catalogues.

        Parameters
        ----------
        tables : `list` [`astropy.table.Table`]
            Catalogues of the patches, in any order.
        tract : `int`
            The tract.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            With ``joined``, the catalogue (`astropy.table.Table`).

        Raises
        ------
        ValueError
            Raised if catalogues do not go together, or tracts have centres but this one.
        """
        joined = join_patches(tables)
        if self.config.tractCentres:
            joined = flag_tracts(joined, tract, self.config.centres())
        self.log.info(
            "Tract %d: %d patches gave %d rows, %d of them primary.",
            tract,
            len(tables),
            len(joined),
            int(joined["detect_isPrimary"].sum()),
        )
        return Struct(joined=joined)
