# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Refinement of the sources' latents on the pixels, and the posterior that follows from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ..ground.cutouts import cut_out
from ..refine import WIDTHS, LinearisedModels, choose_widths
from ..rendering import unit_shapes
from ._fluxes import solve
from ._passes import apply_network
from ._rows import FIRST_DAMPING
from ._state import State

__all__ = ["refine", "set_posterior", "try_by_refinement"]

# Steps of refinement before new peaks are judged.
_TRIAL_STEPS = 2


def refine(state: State, parents: list[int]) -> list[int]:
    """Refine the members of some parents; return the parents that have not settled."""
    members = state.members(parents)
    if not members:
        return []
    r, rows = state.rows, np.concatenate(members)
    _take_steps(state, rows, state.config.refinementSteps)
    return np.unique(r.parent[rows[~r.settled[rows] & ~r.failed[rows]]]).tolist()


def try_by_refinement(state: State, parents: list[int], new: NDArray[np.int64]) -> None:
    """Fit parents that have new sources."""
    apply_network(state, new)
    members = state.members(parents)
    for own in members:
        solve(state, own)
    # Only those that can see a new source have a reason to change.
    r, rows = state.rows, np.concatenate(members)
    near = cKDTree(r.corner[new]).query(r.corner[rows], p=np.inf)[0] < WIDTHS[0]
    r.settled[rows[near]], r.damping[rows[near]] = False, FIRST_DAMPING
    _take_steps(state, rows, _TRIAL_STEPS)


def _take_steps(state: State, rows: NDArray[np.int64], steps: int) -> None:
    """Fit the latents of sources to the pixels, see `lsst.meas.vaedeblend.refine`, until they settle.

    Overlapping sources whose posterior gets less probable go back to where they were, and take shorter
    steps.
    """
    r = state.rows
    rows = rows[~r.failed[rows]]
    # From here on the fluxes are those of the latents.
    state.set_fluxes(rows, np.where(r.measured[rows], r.network_flux[rows], 0.0))
    for batch in _batches(state, rows):
        for _ in range(steps):
            active = batch[~r.settled[batch]]
            if not len(active):
                break
            saved = r.save(active)
            models = _linearise(state, active)
            groups = models.groups()
            before = _objective(state, active, models, groups)
            latent, gain = models.step(r.damping[active])
            _draw(state, active, latent)
            worse = _objective(state, active, models, groups) > before
            back, damping = worse[groups], r.damping[active]
            state.change(active[back], -r.flux[active[back]])
            r.restore(active[back], saved, back)
            state.change(active[back], r.flux[active[back]])
            r.damping[active] = np.where(back, np.maximum(10.0 * damping, 0.1), 0.2 * damping)
            r.settled[active] = (gain < state.config.refinementTolerance) & ~back


def _batches(state: State, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows that are refined at once: whole parents as long as they fit."""
    size, pieces = state.config.refinementBatch, []
    rows = rows[np.argsort(state.rows.parent[rows], kind="stable")]
    while len(rows):
        stop = min(size, len(rows))
        if stop < len(rows):
            parent = state.rows.parent[rows]
            first = int(np.searchsorted(parent, parent[stop]))
            stop = first if first > 0 else stop
        pieces.append(rows[:stop])
        rows = rows[stop:]
    return pieces


def _linearise(state: State, rows: NDArray[np.int64]) -> LinearisedModels:
    r = state.rows
    state.soften(rows)
    corner = r.corner[rows]
    models = r.image[rows] * r.flux[rows].astype(np.float32)[:, :, None, None]
    widths = choose_widths(models, cut_out(state.soft_weight, corner[:, 0], corner[:, 1], state.size))
    return LinearisedModels(
        state.network.jacobian,
        r.mean[rows],
        state.moments[r.cell[rows]],
        corner,
        widths,
        state.residual,
        state.soft_weight,
        state.config.refinementPrior,
    )


def _objective(
    state: State, rows: NDArray[np.int64], models: LinearisedModels, groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Minus twice the log posterior of groups of overlapping sources, up to constants."""
    (y0, x0), (y1, x1) = models.starts.min(axis=0), models.stops.max(axis=0)
    owner = np.full((y1 - y0, x1 - x0), groups.max() + 1)
    for group, start, stop in zip(groups, models.starts - [y0, x0], models.stops - [y0, x0], strict=True):
        owner[start[0] : stop[0], start[1] : stop[1]] = group
    residual, weight = state.residual[:, y0:y1, x0:x1], state.soft_weight[:, y0:y1, x0:x1]
    chi2 = np.einsum("byx,byx,byx->yx", residual, residual, weight)
    n = int(groups.max()) + 2
    out = np.bincount(owner.ravel(), weights=chi2.ravel(), minlength=n)[: n - 1]
    prior = state.config.refinementPrior * (state.rows.mean[rows].astype(float) ** 2).sum(axis=1)
    return out + np.bincount(groups, weights=prior, minlength=n - 1)


def _draw(state: State, rows: NDArray[np.int64], latent: NDArray[np.float64]) -> None:
    """Give sources new latents, and the models and fluxes that go with them."""
    r = state.rows
    sky, flux, good = unit_shapes(state.network.decoder.render(latent))
    good &= np.isfinite(flux).all(axis=1)
    rows, sky, flux = rows[good], sky[good], flux[good]
    state.change(rows, -r.flux[rows])
    r.mean[rows], r.sky[rows], r.network_flux[rows] = latent[good], sky, flux
    r.image[rows] = state.renderer.observed(sky, r.cell[rows])
    r.flux[rows] = np.where(r.measured[rows], flux, 0.0)
    state.change(rows, r.flux[rows])


def set_posterior(state: State) -> None:
    """Set the widths of the posterior, and what follows from them for fluxes and second moments."""
    r, config = state.rows, state.config
    rows = np.flatnonzero(r.alive & r.active & r.tried & ~r.failed)
    for part in _batches(state, rows):
        r.covariance[part] = config.posteriorScale**2 * _linearise(state, part).covariances()
    if len(rows):
        covariance = r.covariance[rows]
        r.sigma[rows] = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        values, slope = state.network.jacobian.parameters(r.mean[rows])
        variance = np.einsum("kbpi,kij,kbpj->kbp", slope, covariance, slope, optimize=True)
        deviation = np.sqrt(np.maximum(variance, 0.0))
        relative = np.hypot(deviation[:, :, 0], config.fluxSystematic)
        r.error[rows] = relative * r.network_flux[rows]
        r.moments[rows], r.moments_error[rows] = values[:, :, 3:], deviation[:, :, 3:]
