# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Flags of the sources."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..ground.cutouts import nearest_pixel
from ..ground.flags import SOURCE_FLAGS
from ..ground.psf import FWHM_PER_SIGMA
from ._pruning import worth
from ._state import State

__all__ = ["source_flags"]

# Relative excess over the training range that is not flagged: noise and seeing are estimates themselves.
_RANGE_TOLERANCE = 0.1


def source_flags(state: State, rows: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Flags of sources by name, (K,) each."""
    r, scene = state.rows, state.scene
    active, parent = r.active[rows], r.parent[rows]
    x, y = nearest_pixel(r.peak[rows]).T
    outside = state.outside(r.peak[rows])
    masked_centre = np.zeros(len(rows), bool)
    masked_centre[~outside] = ~state.valid[state.usable][:, y[~outside], x[~outside]].all(axis=0)
    has_data = scene.valid.any(axis=(1, 2))
    flags = {name: np.zeros(len(rows), bool) for name in SOURCE_FLAGS}
    flags["edge"] = _edge(state, x, y)
    flags["masked_centre"] = masked_centre
    flags["peak_outside"] = outside
    flags["masked"] = state.parent_flags["masked"][parent]
    flags["too_many_peaks"] = r.crowded[rows]
    flags["not_finite"] = r.unsound[rows] & active
    flags["point_source"] = r.point[rows] & active
    flags["fallback"] = r.failed[rows] & active
    flags["no_psf"] = ~scene.psf.valid[r.cell[rows]][:, has_data].all(axis=1)
    flags["missing_band"] = active & ~r.measured[rows].all(axis=1)
    flags["outside_training_range"] = _outside_range(state, rows)
    flags["insignificant"] = active & (worth(state, rows) < state.cost)
    flags["no_convergence"] = active & r.tried[rows] & ~r.failed[rows] & ~r.settled[rows]
    np.logical_or.at(state.parent_flags["no_convergence"], parent, flags["no_convergence"])
    return flags


def _edge(state: State, x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether pixels are close to the border or to pixels marked as edge."""
    d, (height, width) = state.config.edgeDistance, state.scene.shape
    out = (x < d) | (y < d) | (x >= width - d) | (y >= height - d)
    if state.scene.edge is not None:
        for i in np.flatnonzero(~out):
            out[i] = state.scene.edge[y[i] - d : y[i] + d + 1, x[i] - d : x[i] + d + 1].any()
    return out


def _outside_range(state: State, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether noise or seeing are outside what the network was trained on, in any band that has data."""
    r, ranges, out = state.rows, state.metadata.training_range, np.zeros(len(rows), bool)

    def beyond(values: NDArray, low: float, high: float) -> NDArray[np.bool_]:
        return (values < low * (1 - _RANGE_TOLERANCE)) | (values > high * (1 + _RANGE_TOLERANCE))

    for i, band in enumerate(state.metadata.bands):
        if state.usable[i]:
            if ranges.get("noise") is not None:
                out |= beyond(r.noise[rows, i], *ranges["noise"][band])
            if ranges.get("psf_fwhm") is not None:
                fwhm = FWHM_PER_SIGMA * state.psf_sigma[r.cell[rows], i] * state.scene.pixel_scale
                out |= beyond(fwhm, *ranges["psf_fwhm"])
    return out
