# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Passes of cutouts through the network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..ground.cutouts import cut_out, nearest_pixel
from ..inference import kernels
from ._drawing import Drawn
from ._fluxes import solve
from ._state import State

__all__ = ["apply_network", "ask", "first_answers", "improve", "take_pass", "try_by_passes"]

_CHANGED = 1.0
"""Squared signal-to-noise ratio, per band, of neighbours' light in the middle of a cutout above which the
network is asked again without it."""

_MIDDLE = 16
"""Width of that middle, pixel."""


def first_answers(state: State, parents: list[int]) -> None:
    """Take all members of some parents through the network, and those again that had much else in view."""
    rows = state.members_of(parents)
    ask(state, rows)
    state.iterations[parents] += 1
    for _ in range(state.config.minPasses - 1):
        again = rows[_neighbours_light(state, rows) > _CHANGED * int(state.usable.sum())]
        if not len(again):
            break
        ask(state, again)
        state.iterations[np.unique(state.rows.parent[again])] += 1


def _neighbours_light(state: State, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Squared signal-to-noise ratio of all other models in the middle of each cutout, (K,)."""
    width = min(_MIDDLE, state.size)
    y, x = np.ascontiguousarray(state.start(rows, width).T)
    others = kernels.cut(state.image, y, x, width) - kernels.cut(state.residual, y, x, width)
    weight = kernels.cut(state.weight, y, x, width)
    others -= state.models(rows, width)
    return np.einsum("kbyx,kbyx,kbyx->k", others, others, weight)


def take_pass(state: State, parents: list[int]) -> None:
    """Take all members of some parents through the network, then solve for their fluxes."""
    ask(state, state.members_of(parents))
    state.iterations[parents] += 1


def ask(state: State, rows: NDArray[np.int64]) -> None:
    """Take some sources through the network, all other models subtracted, then solve for their fluxes."""
    # Bounded pieces, so that the cutouts of a rich patch need not all exist at once.
    piece = 4 * state.config.batchSize
    # All see the same residual: what a source's neighbours look like must not depend on its piece.
    residual = state.residual.copy() if len(rows) > piece else state.residual
    for start in range(0, len(rows), piece):
        apply_network(state, rows[start : start + piece], residual)
    solve(state, rows)


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
    r, rows = state.rows, state.members_of(parents)
    saved, flux = r.save(rows), r.flux[rows].copy()
    before = [state.chi2(p) for p in parents]
    take_pass(state, parents)
    after = [state.chi2(p) for p in parents]
    moving = []
    back = np.zeros(len(rows), bool)
    for p, old, new in zip(parents, before, after, strict=True):
        own = np.flatnonzero(r.parent[rows] == p)
        if new > old:
            back[own] = True
            continue
        error = np.nan_to_num(r.error[rows[own]])
        allowed = state.config.fluxTolerance * np.maximum(error, 0.1 * r.flux[rows[own]])
        if (np.abs(r.flux[rows[own]] - flux[own]) > allowed).any():
            moving.append(p)
    state.put_back(saved, back)
    return moving


def apply_network(state: State, rows: NDArray[np.int64], residual: NDArray | None = None) -> None:
    """Deblend cutouts: what is left of the image, by default now, plus the source's own model."""
    if not len(rows):
        return
    r = state.rows
    y, x = np.ascontiguousarray(r.corner[rows].T)
    valid = kernels.cut(state.valid, y, x, state.size)
    image = kernels.cut(state.residual if residual is None else residual, y, x, state.size)
    image += state.models(rows, state.size)
    image *= valid
    noise, cell = r.noise[rows], r.cell[rows]
    mean, sigma, drawn = state.drawing.answer(image, valid, noise, cell, state.config.batchSize)
    new = ~r.tried[rows]
    # Once the network has given a sound model, a later failure leaves that one in place.
    r.unsound[rows] = ~drawn.good
    failed = np.flatnonzero(~drawn.good & (new | r.failed[rows]))
    change = drawn.good.copy()
    change[failed] = True
    # Until it has been solved for, a new source's flux is the network's, so that other parents see it.
    flux = np.where(new[:, None], np.maximum(np.nan_to_num(drawn.flux), 0.0), r.flux[rows])
    target = rows[change]
    r.mean[target], r.sigma[target] = mean[change], sigma[change]
    r.failed[target] = ~drawn.good[change]
    r.tried[target] = True
    state.replace(rows, drawn, flux)
    if len(failed):
        _fall_back(state, rows[failed], image[failed])


def _fall_back(state: State, rows: NDArray[np.int64], image: NDArray) -> None:
    """Give sources that the network fails on a shape: what is symmetric about them, or a point source."""
    r = state.rows
    centre = np.array(state.metadata.centre)
    sky, shapes = state.draw_points(rows, r.peak[rows])
    templates = _templates(state, rows, image)
    shapes = np.where(templates.any(axis=(2, 3))[:, :, None, None], templates, shapes)
    for row, own_sky, own in zip(rows.tolist(), sky, shapes, strict=True):
        state.templates[row] = own_sky, own
    middle = np.floor(centre + 0.5)
    offset = (r.peak[rows, ::-1] - r.corner[rows] - middle)[:, ::-1]
    n, everything = len(rows), np.arange(len(rows))
    drawn = Drawn(
        [(everything, shapes)],
        np.full((n, len(state.metadata.bands)), np.nan),
        offset,
        np.full(n, state.size),
        np.ones(n, bool),
    )
    state.replace(rows, drawn, r.flux[rows])


def _templates(state: State, rows: NDArray[np.int64], image: NDArray) -> NDArray[np.float32]:
    """Shapes of sources that the network fails on, from the image alone, (K, B, S, S); 0 if it shows none.

    The lesser of each pixel and the one opposite to it across the peak: neighbours are rarely symmetric about
    a source, which keeps their light out of its template (Lupton's deblender of the SDSS; Bosch et al. 2018,
    PASJ 70, S5, section 4.8.1).
    """
    r, s = state.rows, state.size
    out = np.zeros(image.shape, np.float32)
    for i, row in enumerate(rows):
        across = nearest_pixel(2 * (r.peak[row, ::-1] - r.corner[row]))
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
