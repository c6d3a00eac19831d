# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The joint solution for the fluxes of a parent's sources, in step with the residual."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from ..fluxes import joint_fluxes, normal_equations
from ..ground.cutouts import cut_out
from ._state import State

__all__ = ["solve"]


def solve(state: State, rows: NDArray[np.int64]) -> None:
    """Solve jointly for the fluxes of a parent's members, all other models subtracted."""
    if not len(rows):
        return
    corner = state.rows.corner[rows]
    near = np.abs(corner[:, None, :] - corner[None, :, :]).max(axis=2) < state.size
    if near.all():
        _solve_group(state, rows)
        return
    count, group = connected_components(near, directed=False)
    for number in range(count):
        _solve_group(state, rows[group == number])


def _solve_group(state: State, rows: NDArray[np.int64]) -> None:
    """Solve for sources that are connected by overlaps."""
    r = state.rows
    corner = r.corner[rows]
    weight = cut_out(state.weight, corner[:, 0], corner[:, 1], state.size)
    left = cut_out(state.residual, corner[:, 0], corner[:, 1], state.size)
    normal, rhs, measured = normal_equations(r.image[rows], corner, weight, left, r.flux[rows])
    flux, error = joint_fluxes(normal, rhs, r.network_flux[rows].T, state.config.fluxPrior)
    state.set_fluxes(rows, np.nan_to_num(flux.T))
    r.error[rows], r.measured[rows] = error.T, measured.T
