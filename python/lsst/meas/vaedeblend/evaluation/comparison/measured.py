# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the pipelines' measurement says of two deblenders' objects, beside what is measured here."""

from __future__ import annotations

__all__ = ["with_measured"]

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import SNR_LIMIT
from .result import Comparison
from .statistics import median, spread, with_error

if TYPE_CHECKING:
    from astropy.table import Table

FLUXES = (
    "base_PsfFlux_instFlux",
    "base_GaussianFlux_instFlux",
    "base_CircularApertureFlux_9_0_instFlux",
    "base_CircularApertureFlux_12_0_instFlux",
    "modelfit_CModel_instFlux",
)
"""Fluxes that are compared if both tables have them."""

SHAPE = "base_SdssShape"

Row = tuple[str, str, str, str, float, float, int]


def with_measured(
    comparison: Comparison, tables: Mapping[str, Mapping[str, Any]], first: str, second: str
) -> Table:
    """Sum up how measurements of matched objects differ, below the numbers of `Comparison.metrics_table`.

    Parameters
    ----------
    comparison : `Comparison`
        The comparison of one patch, which says what objects belong together.
    tables : mapping of `str` to mapping of `str` to table
        Measurements by deblender and band, with the column ``id``; anything whose columns are found by their
        names and listed in ``colnames``.
    first, second : `str`
        The deblenders.

    Returns
    -------
    metrics : `astropy.table.Table`
        All numbers, those of measurements in the bands that both were measured in. Objects that a plugin
        flagged in either table are left out.
    """
    from astropy.table import Table, vstack

    metrics = comparison.metrics_table()
    rows = _rows(comparison, tables, first, second)
    if not rows:
        return metrics
    kinds = ("U", "U", "U", "U", float, float, int)
    return vstack([metrics, Table(rows=rows, names=metrics.colnames, dtype=kinds)])


def _rows(
    comparison: Comparison, tables: Mapping[str, Mapping[str, Any]], first: str, second: str
) -> list[Row]:
    names = comparison.names
    pair = next(p for p in comparison.pairs if (names[p.first], names[p.second]) == (first, second))
    bright = pair.columns["snr"] > SNR_LIMIT
    ids = [
        comparison.objects[k]["id"][pair.columns[side][bright]]
        for k, side in ((pair.first, "first"), (pair.second, "second"))
    ]
    rows: list[Row] = []

    def add(what: str, values: NDArray[np.float64], relative: bool) -> None:
        finite = values[np.isfinite(values)]
        numbers = {"median": with_error(median, finite), "nmad": with_error(spread, finite)}
        if relative:
            numbers["off_by_half"] = with_error(lambda v: float(np.mean(np.abs(v) > 0.5)), finite)
        for key, (value, error) in numbers.items():
            rows.append((first, second, "bright", f"{what}, {key}", value, error, len(finite)))

    for band in comparison.bands:
        if not all(band in tables[name] for name in (first, second)):
            continue
        both = [_rows_of(tables[name][band], own) for name, own in zip((first, second), ids, strict=True)]
        for name in FLUXES:
            one, two = (_column(table, where, name) for table, where in both)
            if one is not None and two is not None:
                with np.errstate(divide="ignore", invalid="ignore"):
                    add(f"{name} in {band}, ratio - 1", two / one - 1, True)
        one, two = (_shape(table, where) for table, where in both)
        if one is not None and two is not None:
            for k, what in enumerate(("e1", "e2")):
                add(f"{SHAPE} {what} in {band}, difference", two[:, k] - one[:, k], False)
            with np.errstate(divide="ignore", invalid="ignore"):
                add(f"{SHAPE} size in {band}, ratio - 1", two[:, 2] / one[:, 2] - 1, True)
    return rows


def _rows_of(table: Any, ids: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
    """Rows of objects in a table, -1 for those that it does not have."""
    own = np.asarray(table["id"])
    order = np.argsort(own)
    place = np.searchsorted(own, ids, sorter=order)
    row = order[np.minimum(place, len(own) - 1)] if len(own) else np.full(len(ids), -1)
    return table, np.where(own[row] == ids, row, -1) if len(own) else row


def _column(
    table: Any, row: NDArray[np.int64], name: str, flag: str | None = None
) -> NDArray[np.float64] | None:
    if name not in table.colnames:
        return None
    values = np.asarray(table[name], float)[row]
    flag = name.replace("_instFlux", "_flag") if flag is None else flag
    bad = np.asarray(table[flag], bool)[row] if flag in table.colnames else np.zeros(len(row), bool)
    return np.where(bad | (row < 0), np.nan, values)


def _shape(table: Any, row: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Ellipticity and size, (N, 3)."""
    moments = [_column(table, row, f"{SHAPE}_{key}", f"{SHAPE}_flag") for key in ("xx", "yy", "xy")]
    if any(m is None for m in moments):
        return None
    xx, yy, xy = np.asarray(moments, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([(xx - yy) / (xx + yy), 2 * xy / (xx + yy), np.sqrt((xx + yy) / 2)], axis=1)
