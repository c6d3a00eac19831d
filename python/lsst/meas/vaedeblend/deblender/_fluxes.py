# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The joint solution for the fluxes of sources that overlap, in step with the residual."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..inference import joint_fluxes, kernels, overlapping_pairs
from ..inference.fluxes import MIN_COVERAGE
from ..inference.groups import connected_groups
from ._state import State

__all__ = ["measure", "solve"]

_POINT_COVERAGE = 1e-6
"""What `MIN_COVERAGE` is for galaxies, for point sources."""

_POINT_SYSTEMATIC = 0.003
"""Relative error of the fluxes of point sources that is added in quadrature: PSF models are no better."""


def solve(state: State, rows: NDArray[np.int64], *, negative: bool = False) -> None:
    """Solve jointly for the fluxes of living sources, all other models subtracted.

    Fluxes may be ``negative`` in the end, when they are measurements: that of a band without light scatters
    about zero. As long as models are sought, no model is.
    """
    rows = rows[state.rows.stamps.width[rows] > 0]
    if not len(rows):
        return
    r = state.rows
    own, seen, data, squares = _sums(state, rows)
    # The PSF is known as far as its stamp reaches, so that its wings tell the flux of a star without a core.
    least = np.where(r.point[rows], _POINT_COVERAGE, MIN_COVERAGE)[:, None]
    measured = (seen > least * squares) & (own > 0)
    pairs = overlapping_pairs(state.starts(rows), r.stamps.width[rows])
    shared = _products(state, rows, pairs)
    groups = connected_groups(len(rows), pairs)
    order = np.argsort(groups, kind="stable")
    of_pair = groups[pairs[:, 0]] if len(pairs) else np.empty(0, np.int64)
    pair_order = np.argsort(of_pair, kind="stable")
    counts = np.bincount(groups)
    stops, pair_stops = np.cumsum(counts), np.cumsum(np.bincount(of_pair, minlength=len(counts)))
    flux, error = np.zeros(own.shape), np.full(own.shape, np.nan)
    single = counts[groups] == 1
    if single.any():
        flux[single], error[single] = _alone(
            state, rows[single], own[single], data[single], measured[single], negative
        )
    for group in np.flatnonzero(counts > 1).tolist():
        members = order[stops[group] - counts[group] : stops[group]]
        first = pair_stops[group - 1] if group else 0
        inside = pair_order[first : pair_stops[group]]
        local = np.searchsorted(members, pairs[inside])
        normal = np.zeros((own.shape[1], len(members), len(members)))
        index = np.arange(len(members))
        normal[:, index, index] = own[members].T
        normal[:, local[:, 0], local[:, 1]] = shared[inside].T
        normal[:, local[:, 1], local[:, 0]] = shared[inside].T
        # The data are the residual plus the sources' own models: b = <w s, residual> + N f.
        rhs = data[members].T + np.einsum("bij,bj->bi", normal, r.flux[rows[members]].T)
        good = measured[members].T
        normal = np.where(good[:, :, None] & good[:, None, :], normal, 0.0)
        prior_flux = r.network_flux[rows[members]].T
        found, deviation = joint_fluxes(normal, rhs, prior_flux, state.config.fluxPrior, negative=negative)
        flux[members], error[members] = found.T, deviation.T
    state.set_fluxes(rows, np.nan_to_num(flux))
    r.error[rows], r.measured[rows] = error, measured


def measure(state: State, rows: NDArray[np.int64]) -> None:
    """Measure the fluxes of sources on their final shapes.

    A linear joint solution on the data, without bias in a band without light, where the flux that goes with
    the latents is what galaxies of such colours usually have. Its error is that of the data at given shapes,
    or that of the posterior where not knowing the shape costs more.
    """
    r = state.rows
    known = r.error[rows].copy()
    solve(state, rows, negative=True)
    galaxy = ~r.point[rows] & ~r.failed[rows]
    r.error[rows] = np.where(galaxy[:, None], np.fmax(r.error[rows], known), r.error[rows])
    point = rows[r.point[rows]]
    r.error[point] = np.hypot(r.error[point], _POINT_SYSTEMATIC * np.abs(r.flux[point]))


def _alone(
    state: State, rows: NDArray, own: NDArray, data: NDArray, measured: NDArray, negative: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same solution for sources that overlap with none."""
    prior = state.rows.network_flux[rows]
    weight = np.where(np.isfinite(prior), state.config.fluxPrior, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        flux = (data + own * state.rows.flux[rows] + weight * own * np.nan_to_num(prior)) / (
            own * (1 + weight)
        )
        error = 1.0 / np.sqrt(own * (1 + weight))
    flux = np.where(measured, flux if negative else np.maximum(flux, 0.0), np.nan)
    return flux, np.where(measured, error, np.nan)


def _sums(state: State, rows: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Sums over pixels that concern one source each, (K, B)."""
    stamps = state.rows.stamps
    own, seen, data, squares = np.zeros((4, len(rows), len(state.metadata.bands)))
    for width, index in stamps.by_width(rows):
        y, x = np.ascontiguousarray(state.start(rows[index], width).T)
        pool, slot = stamps.pool(width), stamps.slot[rows[index]]
        own[index], seen[index], data[index] = kernels.moments_of_products(
            state.residual, state.weight, pool, slot, y, x
        )
        squares[index] = np.einsum("kbyx,kbyx->kb", pool[slot], pool[slot])
    return own, seen, data, squares


def _products(state: State, rows: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums over pixels of products of the images of pairs, (P, B)."""
    stamps = state.rows.stamps
    out = np.zeros((len(pairs), len(state.metadata.bands)))
    if not len(pairs):
        return out
    start, width = state.starts(rows), stamps.width[rows]
    kind = width[pairs]
    for a, b in np.unique(kind, axis=0).tolist():
        index = np.flatnonzero((kind == [a, b]).all(axis=1))
        i, j = pairs[index].T
        out[index] = kernels.products(
            state.weight,
            stamps.pool(a),
            stamps.slot[rows[i]],
            np.ascontiguousarray(start[i, 0]),
            np.ascontiguousarray(start[i, 1]),
            stamps.pool(b),
            stamps.slot[rows[j]],
            np.ascontiguousarray(start[j, 0]),
            np.ascontiguousarray(start[j, 1]),
        )
    return out
