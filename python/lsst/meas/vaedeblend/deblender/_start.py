# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The peaks to start from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..ground.cutouts import nearest_pixel
from ..ground.peaks import find_peaks
from ._state import State

__all__ = ["place_first"]


def place_first(state: State) -> None:
    """Make the rows of the first peaks, those given and those found in parents that come without any."""
    config, parent_flags = state.config, state.parent_flags
    peaks, parents, given, keep = [], [], [], []
    for p, parent in enumerate(state.scene.parents):
        window, inside = state.windows[p]
        data = state.valid[:, *window] & inside
        parent_flags["masked"][p] = not data.any()
        parent_flags["incomplete_data"][p] = not data[:, inside].all() or inside.sum() < parent.area
        parent_flags["parent_too_big"][p] = max(parent.footprint.shape) > state.size
        first = parent.peaks if len(parent.peaks) else _find(state, p)
        chosen = np.ones(len(first), bool)
        if len(first) > config.maxPeaks:
            parent_flags["too_many_peaks"][p] = True
            chosen[:] = False
            chosen[_brightest(state, p, first)] = True
        state.n_peaks[p] = max(len(parent.peaks), len(first))
        peaks.append(first)
        parents.append(np.full(len(first), p))
        given.append(np.full(len(first), len(parent.peaks) > 0))
        keep.append(chosen)
    if not peaks:
        return
    rows = state.new_rows(
        np.concatenate(peaks), np.concatenate(parents), given=np.concatenate(given), iteration=0
    )
    rows.crowded = ~np.concatenate(keep)
    rows.active = ~rows.crowded & ~state.outside(rows.peak) & ~parent_flags["masked"][rows.parent]
    state.add(rows)


def _brightest(state: State, p: int, peaks: NDArray) -> NDArray[np.int64]:
    """The brightest peaks that a parent may have, in their given order."""
    significance, y0, x0 = state.significance(p)
    x, y = (nearest_pixel(peaks) - [x0, y0]).T
    inside = (x >= 0) & (y >= 0) & (x < significance.shape[1]) & (y < significance.shape[0])
    brightness = np.full(len(peaks), -np.inf)
    brightness[inside] = significance[y[inside], x[inside]]
    return np.sort(np.argsort(-brightness, kind="stable")[: state.config.maxPeaks])


def _find(state: State, p: int) -> NDArray[np.float64]:
    """Find the peaks of a parent that came without any; there is always one."""
    parent, config = state.scene.parents[p], state.config
    if not state.parent_flags["masked"][p]:
        significance, y, x = state.significance(p)
        inside = state.footprint(p, significance.shape, y, x)
        found = find_peaks(significance, config.peakThreshold, inside, config.minSeparation)
        if len(found) > config.maxPeaks:
            state.parent_flags["too_many_peaks"][p] = True
            found = found[: config.maxPeaks]
        if len(found):
            return found + [x, y]
        row, column = np.unravel_index(np.argmax(np.where(inside, significance, -np.inf)), inside.shape)
        found = np.array([[column + x, row + y]], dtype=float)
    else:
        # Nothing to see: the footprint's pixel closest to its centre stands for the object.
        ys, xs = np.nonzero(parent.footprint)
        nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        found = np.array([[parent.x0 + xs[nearest], parent.y0 + ys[nearest]]], dtype=float)
    state.parent_flags["no_peak"][p] = True
    return found
