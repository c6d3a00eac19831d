# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which sources earn their place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..ground.cutouts import cut_out
from ._fluxes import solve
from ._state import State

__all__ = ["drop", "weed", "worth"]


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
    if weight is not None:
        (ys, xs), _ = state.windows[p]
        corner = r.corner[rows] - [ys.start, xs.start]
        soft = cut_out(weight.astype(np.float32), corner[:, 0], corner[:, 1], state.size)
        out = np.minimum(out, r.flux[rows] ** 2 * np.einsum("kbyx,kbyx->kb", r.image[rows] ** 2, soft))
    return np.nan_to_num(out).sum(axis=1)


def weed(state: State, p: int, new: NDArray[np.int64], weight: NDArray) -> None:
    """Take back the new sources of a parent that do not earn their place, the least useful first."""
    r = state.rows
    while True:
        # Sources may have died without their light having been put back.
        dead = new[~r.alive[new] & (r.flux[new] != 0).any(axis=1)]
        if len(dead):
            state.set_fluxes(dead, 0.0)
            solve(state, state.members([p])[0])
        live = new[r.alive[new]]
        if not len(live):
            return
        gain = worth(state, live, p, weight)
        if gain.min() >= state.cost:
            return
        r.alive[live[np.argmin(gain)]] = False


def drop(state: State, p: int) -> None:
    """Drop members of a parent that no longer earn their place, the least useful first."""
    r = state.rows
    while True:
        members = state.members([p])[0]
        free = members if state.config.dropGivenPeaks else members[~r.given[members]]
        # A parent keeps a source.
        if not len(free) or len(members) < 2:
            return
        gain = worth(state, free)
        weakest = free[np.argmin(gain)]
        if gain.min() >= state.cost:
            return
        r.alive[weakest] = False
        state.set_fluxes(np.array([weakest]), 0.0)
        solve(state, members[members != weakest])
        state.rejected[p].append(r.peak[weakest])
