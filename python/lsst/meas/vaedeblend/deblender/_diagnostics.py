# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""How well sources are known: fit, neighbours' light, and what both add to errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..inference import kernels
from ..rendering import square
from ._state import State

__all__ = ["Diagnostics", "borrowed_light", "diagnose", "total_error"]


class Diagnostics(NamedTuple):
    """What the residual tells of sources, (N,) each; NaN without a model.

    ``foreign`` is the light of others under them, in units of their own fluxes, (N, B).
    """

    blendedness: NDArray[np.float64]
    coverage: NDArray[np.float64]
    chi2: NDArray[np.float64]
    foreign: NDArray[np.float64]


def borrowed_light(state: State, foreign: NDArray, flux: NDArray) -> NDArray[np.float64]:
    """Light under sources that may be wrong, nJy, (N, B): what is wrong with neighbours' models is theirs."""
    return np.nan_to_num(state.config.neighbourError * np.abs(foreign * flux))


def total_error(error: NDArray, chi2: NDArray, borrowed: NDArray) -> NDArray[np.float64]:
    """Errors of fluxes, (N, B), with those of models.

    Errors hold for models that fit. Of others they grow by how much these miss (Birge 1932, Physical Review
    40, 207).
    """
    return np.hypot(error * np.sqrt(np.fmax(chi2, 1.0))[:, None], borrowed)


def diagnose(
    state: State, rows: NDArray[np.int64], templates: dict[int, tuple[NDArray, NDArray]] | None = None
) -> Diagnostics:
    """Diagnose sources; ``templates`` are images, in nJy, of those that have more than their stamps."""
    templates = templates or {}
    r = state.rows
    foreign = np.zeros((len(rows), len(state.metadata.bands)))
    blendedness, coverage, chi2 = np.full((3, len(rows)), np.nan)
    total = state.image - state.residual
    for width, index in r.stamps.by_width(rows):
        own = rows[index]
        y, x = np.ascontiguousarray(state.start(own, width).T)
        pool, slot, scale = r.stamps.pool(width), r.stamps.slot[own], np.nan_to_num(r.flux[own])
        for i in np.flatnonzero(np.isin(index, list(templates))):
            # With what was left over there is more to a source than its stamp.
            pool = np.concatenate([pool, square(templates[int(index[i])][1], width)[None]])
            slot[i], scale[i] = len(pool) - 1, 1.0
        inverse = r.noise[own].astype(float) ** -2
        alone, mixed, whole, seen, squares, foreign[index] = kernels.diagnostics(
            state.residual, state.weight, state.valid, total, pool, slot, y, x, scale, inverse
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            blendedness[index] = np.where(mixed > 0, np.maximum(1.0 - alone / mixed, 0.0), np.nan)
            part = np.where(whole > 0, seen / whole, np.nan)
            there = (whole > 0).any(axis=1)
            coverage[index[there]] = np.nanmean(part[there], axis=1)
            light = seen.sum(axis=1)
            chi2[index] = np.where(light > 0, squares / light, np.nan)
    return Diagnostics(blendedness, coverage, chi2, foreign)
