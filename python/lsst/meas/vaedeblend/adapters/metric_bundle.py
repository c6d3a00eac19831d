# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Numbers as the measurements that the stack's dashboards read. Needs analysis_tools."""

from __future__ import annotations

__all__ = ["to_bundle"]

import re
from typing import Any

import numpy as np
from astropy import units as u


def to_bundle(metrics: Any, prefix: str = "vaedeblend") -> Any:
    """Convert a table of numbers.

    Parameters
    ----------
    metrics : `astropy.table.Table`
        Columns ``entrant``, ``versus``, ``sample``, ``metric``, ``value``, ``error``, ``n``.
    prefix : `str`, optional
        What the names of all measurements begin with.

    Returns
    -------
    bundle : `lsst.analysis.tools.interfaces.MetricMeasurementBundle`
        By entrant, or entrants with ``_vs_`` between them; numbers that are not finite are left out. Errors
        and counts are notes of the measurements.
    """
    from lsst.analysis.tools.interfaces import MetricMeasurementBundle
    from lsst.verify import Measurement

    bundle = MetricMeasurementBundle(metricNamePrefix=prefix)
    for row in metrics:
        if not np.isfinite(row["value"]):
            continue
        parts = [_word(str(row[key])) for key in ("sample", "metric")]
        name = "_".join(part for part in parts if part)
        key = "_vs_".join(_word(str(row[key])) for key in ("entrant", "versus") if row[key])
        value = float(row["value"]) * u.dimensionless_unscaled
        measurement = Measurement(name, value, notes={"n": int(row["n"])})
        if np.isfinite(row["error"]):
            measurement.notes["error"] = float(row["error"])
        bundle.setdefault(key, []).append(measurement)
    return bundle


def _word(text: str) -> str:
    """A name without spaces and signs, which those of measurements may not have."""
    return re.sub(r"\W+", "_", text).strip("_")
