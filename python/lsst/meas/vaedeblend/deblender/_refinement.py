# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Refinement of the sources' latents on the pixels, and the posterior that follows from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ..inference import GaussNewton, kernels, overlapping_pairs
from ..inference.groups import connected_groups
from ..inference.prior import prior_derivatives, prior_penalty
from ._drawing import GridDrawing
from ._fluxes import solve
from ._passes import apply_network
from ._state import State

__all__ = [
    "log_occam",
    "refine",
    "refine_rows",
    "set_posterior",
    "try_by_refinement",
    "unsettled",
    "visible",
    "wake",
]

_MAX_STEP = 2.0
"""Longest step of one source, in standard deviations of the prior: the models are linear no farther."""

_FIRST_DAMPING, _MORE, _LESS = 0.1, 10.0, 0.1
"""Damping after the first step that failed, and by how much it grows and shrinks."""

_STUCK = 1e3
"""Damping at which a group counts as stuck."""

_TRIES = 3
"""Steps that are tried after one linearisation, each shorter than the one before."""

_FLUX_TOLERANCE = 0.01
"""Part of its flux to which a source is fitted in any case: bright ones need not be fitted to what is a
small part of their noise."""

_TRIAL_STEPS = 2
"""Steps of refinement before new peaks are judged."""

_LEAST_OVERLAP = 4
"""Pixels on both axes that squares must share to be treated jointly."""


def refine(state: State, parents: list[int], steps: int | None = None) -> None:
    """Refine the members of some parents until they settle, are stuck, or the steps are over."""
    rows = state.members_of(parents)
    _take_steps(state, rows, state.config.refinementSteps if steps is None else steps)


def refine_rows(state: State, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Refine some sources once more; return them and those that see them."""
    r = state.rows
    r.settled[rows] = r.point[rows]
    r.stuck[rows] = False
    _take_steps(state, rows, state.config.refinementSteps)
    everything = np.flatnonzero(r.alive & r.active & r.tried)
    return everything[_sees(state, everything, rows)]


def unsettled(state: State, parents: list[int]) -> list[int]:
    """Those of some parents that have a member which still moves."""
    r, rows = state.rows, state.members_of(parents)
    return np.unique(r.parent[rows[~r.settled[rows] & ~r.stuck[rows] & ~r.failed[rows]]]).tolist()


def try_by_refinement(state: State, parents: list[int], new: NDArray[np.int64]) -> None:
    """Fit parents that have new sources."""
    apply_network(state, new)
    rows = state.members_of(parents)
    solve(state, rows)
    wake(state, rows, new)
    _take_steps(state, rows, _TRIAL_STEPS)


def wake(state: State, rows: NDArray[np.int64], moved: NDArray[np.int64]) -> None:
    """Let those of some sources move again that see one of the sources that moved."""
    r = state.rows
    if not len(moved):
        return
    near = rows[_sees(state, rows, moved)]
    r.settled[near] = r.point[near]
    r.stuck[near] = False
    r.damping[near] = 0.0


def visible(state: State, rows: NDArray[np.int64], moved: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of some sources whose squares overlap with others', and these themselves."""
    return rows[_sees(state, rows, moved)]


def _sees(state: State, rows: NDArray[np.int64], moved: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of some sources are among others, or have squares that overlap with theirs, (K,)."""
    stamps, near = state.rows.stamps, np.isin(rows, moved)
    own, other = state.starts(rows), state.starts(moved)
    tree = cKDTree(own + 0.5 * stamps.width[rows][:, None])
    reach = 0.5 * (stamps.width[moved] + stamps.width[rows].max(initial=0))
    nearby = tree.query_ball_point(other + 0.5 * stamps.width[moved][:, None], reach, p=np.inf)
    for i, found in enumerate(nearby):
        last = np.minimum(own[found] + stamps.width[rows[found]][:, None], other[i] + stamps.width[moved[i]])
        near[found] |= (last - np.maximum(own[found], other[i]) >= _LEAST_OVERLAP).all(axis=1)
    return near


def _galaxies(state: State, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of some sources that have latents to fit."""
    r = state.rows
    return rows[~r.failed[rows] & ~r.point[rows] & (r.stamps.width[rows] > 0)]


def log_occam(state: State, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log of the part of the latents' prior that the data leave of sources, neighbours held fixed, (K,).

    Laplace's approximation: prior density at the best latents times the volume (2 pi)^(L/2) |H|^(-1/2) of
    the posterior about them.
    """
    r, precision = state.rows, state.config.refinementPrior
    system, _ = _linearise(state, rows)
    _, determinant = np.linalg.slogdet(system.block)
    latent = r.mean[rows].astype(float)
    penalty = prior_penalty(latent, precision, state.config.refinementWall)
    return 0.5 * (latent.shape[1] * np.log(precision) - penalty - determinant)


def _take_steps(state: State, rows: NDArray[np.int64], steps: int) -> None:
    """Fit the latents of sources to the pixels by Gauss-Newton steps.

    Overlapping sources whose posterior gets less probable go back to where they were, and take shorter steps.
    """
    r = state.rows
    rows = _galaxies(state, rows)
    # From here on the fluxes are those of the latents.
    latent_flux = np.where(r.measured[rows], r.network_flux[rows], 0.0)
    state.set_fluxes(rows, latent_flux)
    for batch in _batches(state, rows):
        for _ in range(steps):
            active = batch[~r.settled[batch] & ~r.stuck[batch]]
            if not len(active):
                break
            _step(state, active)
    state.refresh()


def _step(state: State, rows: NDArray[np.int64]) -> None:
    """One step of all sources of a batch that have not settled."""
    r = state.rows
    system, tolerance = _linearise(state, rows)
    promise = system.promise
    groups, count = system.groups, int(system.groups.max()) + 1
    lost = ~np.isfinite(promise)
    bad = np.bincount(groups, weights=lost, minlength=count)[groups] > 0
    # What cannot be solved stays as it is.
    r.stuck[rows[bad]] = True
    r.promise[rows] = np.where(lost, np.inf, promise) / tolerance
    # Next to one that moves none has settled: what is good for it now need not be so afterwards. A step that
    # promises little is taken all the same, and is the last one.
    unfinished = ~(r.promise[rows] < 1.0)
    one, other = system.pairs.T
    near = unfinished.copy()
    np.logical_or.at(near, one, unfinished[other])
    np.logical_or.at(near, other, unfinished[one])
    settled = ~bad & ~near
    r.settled[rows[settled]] = True
    moving = np.flatnonzero(~bad)
    for _ in range(_TRIES):
        if not len(moving):
            return
        moving = moving[_try_step(state, rows, system, moving)]
    # No step made these any better.
    r.stuck[rows[moving]] = r.damping[rows[moving]] > _STUCK


def _try_step(
    state: State, rows: NDArray[np.int64], system: GaussNewton, moving: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Take a step with those sources of a batch that are moving; return which of them have to try a shorter
    one."""
    r, config = state.rows, state.config
    groups, count = system.groups, int(system.groups.max()) + 1
    own = rows[moving]
    damping = np.zeros(len(rows))
    damping[moving] = r.damping[own]
    change, _ = system.step(_of_group(damping, groups, count), _MAX_STEP)
    latent = r.mean[own] + change[moving]
    before = prior_penalty(r.mean[own].astype(float), config.refinementPrior, config.refinementWall)
    drawn = state.drawing.draw(latent.astype(np.float32), r.noise[own], r.cell[own], r.wanted[own])
    saved = r.save(own)
    flux = np.where(r.measured[own], np.nan_to_num(drawn.flux), 0.0)
    difference = state.replace(own, drawn, flux)
    r.mean[own[drawn.good]] = latent[drawn.good]
    after = prior_penalty(r.mean[own].astype(float), config.refinementPrior, config.refinementWall)
    difference += after - before
    total = np.bincount(groups[moving], weights=difference, minlength=count)
    undrawn = np.bincount(groups[moving], weights=~drawn.good, minlength=count) > 0
    worse = (~(total <= 0.0) | undrawn)[groups[moving]]
    state.put_back(saved, worse)
    less, more = own[~worse], own[worse]
    r.damping[less] = np.where(r.damping[less] < 1e-2, 0.0, _LESS * r.damping[less])
    r.damping[more] = np.maximum(_MORE * r.damping[more], _FIRST_DAMPING)
    return worse


def _of_group(damping: NDArray, groups: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """The largest damping of each group's members, for all of them."""
    most = np.zeros(count)
    np.maximum.at(most, groups, damping)
    return most[groups]


def _batches(state: State, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows that are refined at once: whole groups of overlapping sources, as many as fit."""
    size = state.config.refinementBatch
    if len(rows) <= size:
        return [rows] if len(rows) else []
    groups = connected_groups(len(rows), overlapping_pairs(state.starts(rows), state.rows.stamps.width[rows]))
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order], append=groups.max() + 1)) + 1
    pieces, start = [], 0
    while start < len(order):
        fitting = ends[(ends > start) & (ends <= start + size)]
        # A group that does not fit is taken whole all the same.
        stop = int(fitting[-1]) if len(fitting) else int(ends[ends > start][0])
        pieces.append(rows[np.sort(order[start:stop])])
        start = stop
    return pieces


def _linearise(state: State, rows: NDArray[np.int64]) -> tuple[GaussNewton, NDArray[np.float64]]:
    """The quadratic approximation of the posterior about where sources are.

    Also by how much less chi-square may be promised for a source to count as settled, (K,).
    """
    assert isinstance(state.drawing, GridDrawing)
    r, grids, prior = state.rows, state.drawing.grids, state.config.refinementPrior
    state.soften(rows)
    k, length = r.mean[rows].shape
    gradient, block = np.empty((k, length)), np.empty((k, length, length))
    parts: dict[int, list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = {}
    place = np.empty((k, 2), np.int64)
    width = r.stamps.width[rows]
    inner, signal = _informative(state, rows)
    inner = np.minimum(inner, width)
    tolerance = np.maximum(state.config.refinementTolerance, _FLUX_TOLERANCE**2 * signal)
    for w, v in np.unique(np.stack([width, inner], 1), axis=0).tolist():
        index = np.flatnonzero((width == w) & (inner == v))
        own = rows[index]
        y, x = np.ascontiguousarray(state.start(own, w).T)
        weighted = kernels.weighted_residual(state.residual, state.soft_weight, y, x, w)
        # Coarse pixels of all sources lie on one lattice, so that their derivatives can be multiplied.
        start = state.start(own, v)
        coarse = start // grids.stride
        y, x = np.ascontiguousarray((coarse * grids.stride).T)
        weight = kernels.coarse_weights(state.soft_weight, y, x, v // grids.stride, grids.stride)
        offset = start - coarse * grids.stride
        found = grids.linearise(r.mean[own], r.cell[own], weighted, weight, v, offset, w)
        gradient[index], block[index] = found.gradient, found.block
        place[index] = coarse
        parts.setdefault(v, []).append((index, found.tangent))
    wall = state.config.refinementWall
    slope, curvature = prior_derivatives(r.mean[rows].astype(float), prior, wall)
    gradient -= slope
    block += curvature
    # A band in which a source is not measured has no say, and latents that overflow do not spoil others.
    lost = ~(np.isfinite(gradient).all(axis=1) & np.isfinite(block).all(axis=(1, 2)))
    block[lost], gradient[lost] = np.nan, np.nan
    first = r.corner[rows] + (state.size // 2 - inner // 2)[:, None]
    pairs = overlapping_pairs(first, inner, _LEAST_OVERLAP)
    return GaussNewton(gradient, block, pairs, _cross(parts, place, inner, pairs, length)), tolerance


def _informative(state: State, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Widths of the squares that hold what the pixels tell of sources, and squared signal-to-noise ratios,
    (K,).

    Less than 4 (two sigma), or less than a hundredth, of the squared signal-to-noise ratio lies outside.
    """
    r = state.rows
    assert isinstance(state.drawing, GridDrawing)
    out, whole = np.empty(len(rows), np.int64), np.empty(len(rows))
    possible = state.drawing.grids.widths
    for width, index in r.stamps.by_width(rows):
        own = rows[index]
        y, x = np.ascontiguousarray(state.start(own, width).T)
        stamps = r.stamps
        signal = kernels.signal_inside(
            state.soft_weight, stamps.pool(width), stamps.slot[own], y, x, r.flux[own], np.array(possible)
        )
        outside = signal[:, -1:] - signal
        enough = outside < np.maximum(4.0, 0.01 * signal[:, -1:])
        out[index] = np.array(possible)[np.argmax(enough, axis=1)]
        whole[index] = signal[:, -1]
    return out, whole


def _cross(
    found: dict, place: NDArray, width: NDArray, pairs: NDArray[np.int64], length: int
) -> NDArray[np.float64]:
    """Blocks of pairs of sources, (P, L, L)."""
    out = np.zeros((len(pairs), length, length))
    if not len(pairs):
        return out
    # Number of each source among those of its width.
    number = np.empty(len(width), np.int64)
    parts = {}
    for v, pieces in found.items():
        number[np.concatenate([index for index, _ in pieces])] = np.arange(sum(len(i) for i, _ in pieces))
        parts[v] = pieces[0][1] if len(pieces) == 1 else np.concatenate([t for _, t in pieces])
    kind = width[pairs]
    for a, b in np.unique(kind, axis=0).tolist():
        chosen = np.flatnonzero((kind == [a, b]).all(axis=1))
        i, j = pairs[chosen].T
        out[chosen] = kernels.cross_blocks(
            parts[a],
            number[i],
            np.ascontiguousarray(place[i, 0]),
            np.ascontiguousarray(place[i, 1]),
            parts[b],
            number[j],
            np.ascontiguousarray(place[j, 0]),
            np.ascontiguousarray(place[j, 1]),
        )
    return out


def set_posterior(state: State, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Set the widths of the posterior of sources, and what follows from them for fluxes and second moments.

    Return those whose step still promises more than the tolerance: they have not settled after all.
    """
    assert isinstance(state.drawing, GridDrawing)
    r, config = state.rows, state.config
    rows = _galaxies(state, rows)
    for part in _batches(state, rows):
        system, tolerance = _linearise(state, part)
        r.covariance[part] = config.posteriorScale**2 * system.covariances()
        gain = system.promise
        r.promise[part] = np.where(np.isfinite(gain), gain, np.inf) / tolerance
    r.settled[rows] = r.promise[rows] < 1.0
    if len(rows):
        covariance = r.covariance[rows]
        with np.errstate(invalid="ignore"):
            r.sigma[rows] = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        values, slope = state.drawing.grids.parameters(r.mean[rows])
        half = np.matmul(slope.reshape(len(rows), -1, slope.shape[-1]), covariance).reshape(slope.shape)
        deviation = np.sqrt(np.maximum((half * slope).sum(axis=3), 0.0))
        relative = np.hypot(deviation[:, :, 0], config.fluxSystematic)
        r.error[rows] = relative * r.network_flux[rows]
        r.moments[rows], r.moments_error[rows] = values[:, :, 3:], deviation[:, :, 3:]
    return rows[~r.settled[rows]]
