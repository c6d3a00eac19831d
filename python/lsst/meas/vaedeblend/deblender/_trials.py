# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The search for new peaks in the residual, and their trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ..ground.peaks import find_peaks
from ._pruning import drop, weed
from ._rows import Saved
from ._state import State

__all__ = ["try_peaks"]


class _Trial(NamedTuple):
    """New peaks of a parent."""

    parent: int
    saved: Saved  # its sources so far
    found: NDArray[np.float64]  # (K, 2), x and y
    weight: NDArray[np.float32]  # on the parent's window, softened by the errors of the models
    chi2: float  # before the trial, with these weights


def try_peaks(
    state: State,
    parents: list[int],
    iteration: int,
    fit: Callable[[State, list[int], NDArray[np.int64]], None],
) -> list[int]:
    """Look for peaks in the residuals, try them, keep those that earn it; return parents that got any.

    `fit` is given the parents that have new sources, and the rows of these.
    """
    trials = _find(state, parents)
    if not trials:
        return []
    r = state.rows
    peaks = np.concatenate([trial.found for trial in trials])
    parent = np.concatenate([np.full(len(trial.found), trial.parent) for trial in trials])
    added = state.add(state.new_rows(peaks, parent, given=False, iteration=iteration))
    fit(state, [trial.parent for trial in trials], added)
    accepted, first = [], 0
    for p, saved, found, weight, chi2 in trials:
        new = added[first : first + len(found)]
        first += len(found)
        state.kill(new[r.failed[new]])
        weed(state, p, new, weight)
        kept = new[r.alive[new]]
        if len(kept) and chi2 - state.chi2(p, weight) > state.cost * len(kept):
            accepted.append(p)
        else:
            state.kill(kept)
            state.put_back(saved)
        state.rejected[p].extend(r.peak[new[~r.alive[new]]])
    state.refresh()
    for p in accepted:
        drop(state, p)
    return accepted


def _find(state: State, parents: list[int]) -> list[_Trial]:
    """Find what is worth a trial."""
    r = state.rows
    live = np.flatnonzero(r.alive & r.active)
    if not parents or not len(live):
        return []
    tree = cKDTree(np.concatenate([r.peak[live], r.centroid[live]]))
    trials = []
    for p in parents:
        own = state.members(p)
        found = _candidates(state, p, len(own), tree)
        if len(found):
            window, _ = state.windows[p]
            weight = state.softened_weight(window, state.config.modelError)
            trials.append(_Trial(p, r.save(own), found, weight, state.chi2(p, weight)))
    return trials


def _candidates(state: State, p: int, n_members: int, tree: cKDTree) -> NDArray[np.float64]:
    """Peaks in the residual of a parent that are away from all sources in a tree."""
    config = state.config
    room = min(config.maxNewPeaks, config.maxPeaks - n_members)
    if room <= 0:
        return np.empty((0, 2))
    significance, y, x = state.significance(p, config.modelError)
    inside = state.footprint(p, significance.shape, y, x)
    # A maximum where no band has data is the work of the filter.
    height, width = inside.shape
    inside &= state.valid[:, y : y + height, x : x + width].any(axis=0)
    found = find_peaks(significance, config.newPeakThreshold, inside, config.minSeparation) + [x, y]
    if len(found):
        near = tree.query(found)[0] < config.minSeparation
        if state.rejected[p]:
            old = cKDTree(np.array(state.rejected[p])).query(found)[0]
            near |= old < max(config.minSeparation, 1.0)
        found = found[~near]
    return found[:room]
