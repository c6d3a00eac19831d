# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which sources earn their place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..ground.cutouts import cut_out
from ._diagnostics import borrowed_light, diagnose, total_error
from ._fluxes import solve
from ._state import State

__all__ = ["drop", "weed", "worth", "worth_beside_others"]

Worth = Callable[[State, NDArray[np.int64]], NDArray[np.float64]]


def worth(
    state: State, rows: NDArray[np.int64], p: int | None = None, weight: NDArray | None = None
) -> NDArray[np.float64]:
    """By how much chi-square would rise if a source were removed and the others solved for again.

    In linear least squares that is exactly the square of flux over standard deviation. With softened weights
    on a parent's window, what the source can bring there bounds it.
    """
    r = state.rows
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.where(r.measured[rows], (r.flux[rows] / r.error[rows]) ** 2, 0.0)
    if weight is not None and p is not None:
        (ys, xs), _ = state.windows[p]
        for width, index in r.stamps.by_width(rows):
            start = state.start(rows[index], width) - [ys.start, xs.start]
            soft = cut_out(weight.astype(np.float32), start[:, 0], start[:, 1], width)
            squares = np.einsum("kbyx,kbyx->kb", r.stamps.images(rows[index]) ** 2, soft)
            out[index] = np.minimum(out[index], r.flux[rows[index]] ** 2 * squares)
    return np.nan_to_num(out).sum(axis=1)


def worth_beside_others(state: State, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same with errors that know of models which do not fit, the source's own and its neighbours'.

    What bright sources leave of their structure is worth much by the noise alone.
    """
    r = state.rows
    found = diagnose(state, rows)
    borrowed = borrowed_light(state, found.foreign, r.flux[rows])
    with np.errstate(invalid="ignore", divide="ignore"):
        significance = r.flux[rows] / total_error(r.error[rows], found.chi2, borrowed)
    return np.nan_to_num(np.where(r.measured[rows], significance, 0.0) ** 2).sum(axis=1)


def weed(state: State, p: int, new: NDArray[np.int64], weight: NDArray) -> None:
    """Take back the new sources of a parent that do not earn their place, the least useful first."""
    r = state.rows
    while True:
        live = new[r.alive[new]]
        if not len(live):
            return
        gain = worth(state, live, p, weight)
        if gain.min() >= state.cost:
            return
        weakest = live[np.argmin(gain)]
        state.kill(np.array([weakest]))
        solve(state, _around(state, p, weakest))


def drop(state: State, p: int, worth: Worth = worth) -> NDArray[np.int64]:
    """Drop members of a parent that no longer earn their place, the least useful first; return their rows."""
    r, gone = state.rows, []
    while True:
        members = state.members(p)
        free = members if state.config.dropGivenPeaks else members[~r.given[members]]
        # A parent keeps a source.
        if not len(free) or len(members) < 2:
            break
        gain = worth(state, free)
        weakest = free[np.argmin(gain)]
        if gain.min() >= state.cost:
            break
        state.kill(np.array([weakest]))
        solve(state, _around(state, p, weakest))
        state.rejected[p].append(r.peak[weakest])
        gone.append(weakest)
    return np.array(gone, np.int64)


def _around(state: State, p: int, row: int) -> NDArray[np.int64]:
    """Members of a parent whose squares overlap with that of a source."""
    members = state.members(p)
    start, width = state.starts(members), state.rows.stamps.width[members]
    own, size = state.starts(np.array([row]))[0], state.rows.stamps.width[row]
    near = (np.minimum(start + width[:, None], own + size) > np.maximum(start, own)).all(axis=1)
    return members[near]
