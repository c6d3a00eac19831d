# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Passes of cutouts through the network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..ground.cutouts import cut_out
from ..rendering import unit_shapes
from ._fluxes import solve
from ._state import State

__all__ = ["apply_network", "improve", "take_pass", "try_by_passes"]


def take_pass(state: State, parents: list[int]) -> None:
    """Take all members of some parents through the network, then solve for their fluxes."""
    members = state.members(parents)
    rows = np.concatenate(members) if members else np.empty(0, np.int64)
    # Bounded pieces, so that the cutouts of a rich patch need not all exist at once.
    piece = 8 * state.config.batchSize
    for start in range(0, len(rows), piece):
        apply_network(state, rows[start : start + piece])
    for own in members:
        solve(state, own)
    state.iterations[parents] += 1


def try_by_passes(state: State, parents: list[int], new: NDArray[np.int64]) -> None:
    """Fit parents that have new sources."""
    for _ in range(state.config.minPasses):
        take_pass(state, parents)


def improve(state: State, parents: list[int]) -> list[int]:
    """Another pass for some parents; return those that got better and have not settled.

    A parent whose chi-square rises goes back to where it was.
    """
    if not parents:
        return []
    r, members = state.rows, state.members(parents)
    rows = np.concatenate(members)
    saved, flux = r.save(rows), r.flux[rows].copy()
    state.subtract()
    before = [state.chi2(p) for p in parents]
    take_pass(state, parents)
    after = [state.chi2(p) for p in parents]
    moving, start = [], 0
    for p, own, old, new in zip(parents, members, before, after, strict=True):
        part = slice(start, start + len(own))
        start += len(own)
        if new > old:
            # The residual follows with the next subtraction.
            r.restore(own, saved, part)
            continue
        allowed = state.config.fluxTolerance * np.maximum(np.nan_to_num(r.error[own]), 0.1 * r.flux[own])
        if (np.abs(r.flux[own] - flux[part]) > allowed).any():
            moving.append(p)
    return moving


def apply_network(state: State, rows: NDArray[np.int64]) -> None:
    """Deblend cutouts: what is left of the image plus the source's own model."""
    r = state.rows
    corner_y, corner_x = r.corner[rows].T
    valid = cut_out(state.valid, corner_y, corner_x, state.size)
    image = cut_out(state.residual, corner_y, corner_x, state.size)
    image += r.image[rows] * r.flux[rows, :, None, None].astype(np.float32)
    image *= valid
    output = state.network.deblend(
        image, valid, r.noise[rows], state.moments[r.cell[rows]], batch_size=state.config.batchSize
    )
    sky, flux, sound = unit_shapes(output.model)
    good = output.finite & sound
    new = ~r.tried[rows]
    # Once the network has given a sound model, a later failure leaves that one in place.
    failed = np.flatnonzero(~good & (new | r.failed[rows]))
    if len(failed):
        centre = np.array(state.metadata.centre)
        dy, dx = (r.peak[rows[failed], ::-1] - r.corner[rows[failed]] - centre).T
        sky[failed] = state.renderer.point_sources(dx, dy)
        templates = _templates(state, rows[failed], image[failed])
    flux = np.where(good[:, None], flux, np.nan)
    change = good.copy()
    change[failed] = True
    target = rows[change]
    state.change(target, -r.flux[target])
    r.sky[target] = sky[change]
    r.image[target] = state.renderer.observed(sky[change], r.cell[target])
    if len(failed):
        found = templates.any(axis=(2, 3))[:, :, None, None]
        r.image[rows[failed]] = np.where(found, templates, r.image[rows[failed]])
    r.mean[target], r.sigma[target] = output.latent_mean[change], output.latent_sigma[change]
    r.network_flux[target] = flux[change]
    r.failed[target] = ~good[change]
    r.unsound[rows] = ~good
    # Until it has been solved for, a new source's flux is the network's, so that other parents see it.
    first = change & new
    r.flux[rows[first]] = np.maximum(np.nan_to_num(flux[first]), 0.0)
    r.tried[target] = True
    state.change(target, r.flux[target])


def _templates(state: State, rows: NDArray[np.int64], image: NDArray) -> NDArray[np.float32]:
    """Shapes of sources that the network fails on, from the image alone, (K, B, S, S); 0 if it shows none.

    The lesser of each pixel and the one opposite to it across the peak: neighbours are rarely symmetric about
    a source, which keeps their light out of its template (Lupton's deblender of the SDSS; Bosch et al. 2018,
    PASJ 70, S5, section 4.8.1).
    """
    r, s = state.rows, state.size
    out = np.zeros(image.shape, np.float32)
    for i, row in enumerate(rows):
        across = np.rint(2 * (r.peak[row, ::-1] - r.corner[row])).astype(np.int64)
        opposite = across[:, None] - np.arange(s)
        on = (opposite >= 0) & (opposite < s)
        turned = image[i][:, np.clip(opposite[0], 0, s - 1)][:, :, np.clip(opposite[1], 0, s - 1)]
        least = np.minimum(image[i], turned * (on[0][:, None] & on[1]))
        (ys, xs), inside = state.windows[r.parent[row]]
        least *= cut_out(inside[None], r.corner[row, :1] - ys.start, r.corner[row, 1:] - xs.start, s)[0]
        # Of noise alone hardly a pixel in two thousand and its opposite are both above two sigma; fewer
        # pixels than a point source covers say nothing about the shape.
        least *= least > 2 * r.noise[row][:, None, None]
        least *= (np.count_nonzero(least, axis=(1, 2)) >= 9)[:, None, None]
        total = least.sum(axis=(1, 2))
        out[i] = least / np.where(total > 0, total, 1.0)[:, None, None]
    return out
