# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The measurement plugin ``ext_vaedeblend_Posterior``. Importing this module registers it. Needs meas_base.

Measurement on the deblended pixels knows nothing of the network's posterior. It does not have to: the object
catalogue has it in columns of its own, which ``MeasureMergedCoaddSourcesTask`` copies into the catalogue that
it measures, and ``MergeMeasurementsTask`` into the reference catalogue of forced photometry. The plugin takes
what concerns the band of the image and puts it, in the image's units, under the names that fluxes and shapes
have in the stack.
"""

from __future__ import annotations

__all__ = [
    "ForcedPosteriorConfig",
    "ForcedPosteriorPlugin",
    "PosteriorConfig",
    "SingleFramePosteriorConfig",
    "SingleFramePosteriorPlugin",
]

import math
from typing import TYPE_CHECKING, Any

from lsst.afw.table import SourceRecord
from lsst.meas.base import (
    BasePlugin,
    ForcedPlugin,
    ForcedPluginConfig,
    SingleFramePlugin,
    SingleFramePluginConfig,
)
from lsst.meas.base.pluginRegistry import register
from lsst.pex.config import Config, ListField

from ..ground.flags import SOURCE_FLAGS
from .afw_catalog import posterior_column

if TYPE_CHECKING:
    from lsst.afw.image import ExposureF
    from lsst.afw.table import Schema, SchemaMapper

NAME = "ext_vaedeblend_Posterior"
"""Name of the plugin."""

_MOMENTS = ("xx", "yy", "xy")


class PosteriorConfig(Config):
    """Configuration of both plugins."""

    unreliableFlags = ListField[str](
        doc="Flags of the deblender that set flag_unreliable: what follows ``deblend_posterior_flag_``.",
        default=["masked_centre", "no_convergence", "no_psf", "not_finite", "outside_training_range"],
    )

    def validate(self) -> None:
        super().validate()
        if unknown := sorted(set(self.unreliableFlags) - set(SOURCE_FLAGS)):
            raise ValueError(f"The deblender has no flags {unknown}; it has {sorted(SOURCE_FLAGS)}.")


class SingleFramePosteriorConfig(SingleFramePluginConfig, PosteriorConfig):
    """Configuration of the plugin for single-frame measurement."""


class ForcedPosteriorConfig(ForcedPluginConfig, PosteriorConfig):
    """Configuration of the plugin for forced measurement."""


class _Posterior:
    """What both plugins do: read one schema's columns, write another's."""

    def __init__(self, source: Schema, target: Schema, name: str, config: PosteriorConfig) -> None:
        self.prefix = posterior_column("flux") + "_"
        names = source.getNames()
        self.bands = [n.removeprefix(self.prefix) for n in names if n.startswith(self.prefix)]
        if not self.bands:
            raise ValueError(
                f"{name} needs objects that VaeDeblendFootprintsTask or VaeMultibandDeblendTask deblended: "
                f"the input schema has no column {self.prefix}*."
            )
        self.config = config
        where = "in the frame of the network, pixel-integrated Gaussian of 0.8 pixel for those that ship"

        def add(suffix: str, kind: str, doc: str, units: str = "") -> Any:
            return target.addField(f"{name}_{suffix}", type=kind, doc=doc, units=units)

        self.flux = add("instFlux", "D", "Flux of the deblender's model, solved with its neighbours", "count")
        self.flux_err = add("instFluxErr", "D", "Standard deviation of the flux, data and posterior", "count")
        self.moments = [add(m, "D", f"Second moment I{m} of the model {where}", "pixel^2") for m in _MOMENTS]
        self.errors = [
            add(f"{m}Err", "D", f"Standard deviation of I{m} over the posterior", "pixel^2") for m in _MOMENTS
        ]
        self.flag = add("flag", "Flag", "No flux: one of the other flags, but flag_unreliable, says why")
        self.no_band = add("flag_noBand", "Flag", "The network does not know the band, or it had no data")
        self.no_model = add("flag_noModel", "Flag", "The source has no model from the network")
        self.no_calib = add("flag_noCalib", "Flag", "The image has no photometric calibration")
        self.no_shape = add("flag_noShape", "Flag", "The model has no second moments")
        self.unreliable = add("flag_unreliable", "Flag", "The deblender has doubts about the source")

    def measure(self, source: SourceRecord, target: SourceRecord, exposure: ExposureF) -> None:
        """Bring one source's posterior into the measurement catalogue."""
        band = None if exposure.getFilter() is None else exposure.getFilter().bandLabel
        calib = exposure.getPhotoCalib()
        moments = [source[posterior_column("shape", m)] for m in _MOMENTS]
        errors = [source[posterior_column("shapeErr", m)] for m in _MOMENTS]
        for key, value in zip(self.moments + self.errors, moments + errors, strict=True):
            target.set(key, value)
        target.set(self.no_shape, not all(map(math.isfinite, moments)))
        reasons = self.config.unreliableFlags
        target.set(self.unreliable, any(source[posterior_column("flag", flag)] for flag in reasons))
        no_model = bool(source[posterior_column("flag", "fallback")]) or not any(
            math.isfinite(source[self.prefix + b]) for b in self.bands
        )
        known = band if band in self.bands else None
        flux = math.nan if known is None else source[self.prefix + known]
        target.set(self.no_model, no_model)
        target.set(self.no_band, not no_model and not math.isfinite(flux))
        target.set(self.no_calib, calib is None)
        target.set(self.flag, no_model or calib is None or not math.isfinite(flux))
        if calib is not None and known is not None and math.isfinite(flux):
            unit = calib.nanojanskyToInstFlux(1.0, target.getCentroid())
            target.set(self.flux, flux * unit)
            target.set(self.flux_err, source[posterior_column("fluxErr", known)] * unit)

    def fail(self, target: SourceRecord) -> None:
        """Note that something unforeseen went wrong."""
        target.set(self.flag, True)


@register(NAME)
class SingleFramePosteriorPlugin(SingleFramePlugin):
    """Flux and shape of the deblender's posterior, in single-frame measurement.

    Parameters
    ----------
    config : `SingleFramePosteriorConfig`
        Configuration.
    name : `str`
        Name of the plugin.
    schema : `lsst.afw.table.Schema`
        Schema of the catalogue; it has to have the columns of the posterior, and gets those of the plugin.
    metadata : `lsst.daf.base.PropertySet`
        Metadata of the catalogue.

    Raises
    ------
    ValueError
        Raised if the schema lacks the columns of the posterior.
    """

    ConfigClass = SingleFramePosteriorConfig

    @classmethod
    def getExecutionOrder(cls) -> float:
        return BasePlugin.FLUX_ORDER

    def __init__(self, config: SingleFramePosteriorConfig, name: str, schema: Schema, metadata: Any) -> None:
        super().__init__(config, name, schema, metadata)
        self._posterior = _Posterior(schema, schema, name, config)

    def measure(self, measRecord: SourceRecord, exposure: ExposureF) -> None:
        # Docstring inherited.
        self._posterior.measure(measRecord, measRecord, exposure)

    def fail(self, measRecord: SourceRecord, error: Exception | None = None) -> None:
        # Docstring inherited.
        self._posterior.fail(measRecord)


@register(NAME)
class ForcedPosteriorPlugin(ForcedPlugin):
    """Flux and shape of the deblender's posterior, in forced measurement.

    Parameters
    ----------
    config : `ForcedPosteriorConfig`
        Configuration.
    name : `str`
        Name of the plugin.
    schemaMapper : `lsst.afw.table.SchemaMapper`
        From the reference catalogue, which has to have the columns of the posterior, to the output.
    metadata : `lsst.daf.base.PropertySet`
        Metadata of the catalogue.

    Raises
    ------
    ValueError
        Raised if the reference catalogue lacks the columns of the posterior.
    """

    ConfigClass = ForcedPosteriorConfig

    @classmethod
    def getExecutionOrder(cls) -> float:
        return BasePlugin.FLUX_ORDER

    def __init__(
        self, config: ForcedPosteriorConfig, name: str, schemaMapper: SchemaMapper, metadata: Any
    ) -> None:
        super().__init__(config, name, schemaMapper, metadata)
        self._posterior = _Posterior(
            schemaMapper.getInputSchema(), schemaMapper.editOutputSchema(), name, config
        )

    def measure(
        self, measRecord: SourceRecord, exposure: ExposureF, refRecord: SourceRecord, refWcs: Any
    ) -> None:
        # Docstring inherited.
        self._posterior.measure(refRecord, measRecord, exposure)

    def fail(self, measRecord: SourceRecord, error: Exception | None = None) -> None:
        # Docstring inherited.
        self._posterior.fail(measRecord)
