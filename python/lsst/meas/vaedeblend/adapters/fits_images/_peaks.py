# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables of given peaks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

__all__ = ["given_peaks"]


def given_peaks(
    given: Any, wcs: WCS | None, shape: tuple[int, int]
) -> tuple[NDArray[np.float64] | None, NDArray | None]:
    """Read given peaks (x, y) in pixels from 0, and the blends they belong to."""
    if given is None:
        return None, None
    if isinstance(given, np.ndarray):
        where, groups, name = np.asarray(given, float).reshape(-1, 2), None, "The array peaks"
    else:
        if isinstance(given, Table):
            table, name = given, "The peak table"
        else:
            name = os.fspath(given)
            if not Path(name).is_file():
                raise FileNotFoundError(f"There is no file {name}.")
            try:
                table = Table.read(name)
            except Exception:
                try:
                    table = Table.read(name, format="ascii")
                except Exception as error:
                    raise ValueError(f"{name} cannot be read as a table: {error}") from error
        where = _positions(table, wcs, name)
        groups = np.asarray(table["parent"]) if "parent" in table.colnames else None
    if not len(where) or not np.isfinite(where).all():
        raise ValueError(f"{name}: {len(where)} peaks, of which not all have a finite position.")
    x, y = where.T
    on = (x > -0.5) & (y > -0.5) & (x < shape[1] - 0.5) & (y < shape[0] - 0.5)
    if on.mean() < 0.5:
        raise ValueError(
            f"{name}: {int((~on).sum())} of {len(on)} peaks lie outside of the {shape[1]} x {shape[0]} "
            "pixels. x and y are columns and rows of these images, counted from 0."
        )
    return where, groups


def _positions(table: Table, wcs: WCS | None, name: str) -> NDArray[np.float64]:
    """Positions (x, y) of a table by the first pair of columns that it has."""
    for x, y, first in (("x", "y", 0), ("X_IMAGE", "Y_IMAGE", 1)):
        if x in table.colnames and y in table.colnames:
            return np.column_stack([np.asarray(table[x], float), np.asarray(table[y], float)]) - first
    pairs = (("ra", "dec"), ("coord_ra", "coord_dec"), ("ALPHA_J2000", "DELTA_J2000"))
    for ra, dec in pairs:
        if ra in table.colnames and dec in table.colnames:
            if wcs is None:
                raise ValueError(f"{name} has {ra} and {dec}, but the images have no WCS (--wcs).")
            sky = SkyCoord(np.asarray(table[ra], float), np.asarray(table[dec], float), unit="deg")
            return np.column_stack(wcs.world_to_pixel(sky))
    raise ValueError(
        f"{name} has the columns {', '.join(table.colnames)}; peaks need x and y, X_IMAGE and Y_IMAGE, or "
        f"{', or '.join(' and '.join(pair) for pair in pairs)}."
    )
