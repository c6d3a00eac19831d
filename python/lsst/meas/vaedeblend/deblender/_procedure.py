# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of the procedure's steps, with and without refinement."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ..network import Network
from ..scene import Scene
from ._config import DeblendConfig
from ._drawing import GridDrawing
from ._fluxes import measure
from ._passes import ask, first_answers, improve, try_by_passes
from ._points import choose_points, refit_points
from ._pruning import drop, worth_beside_others
from ._refinement import refine, refine_rows, set_posterior, try_by_refinement, unsettled, visible, wake
from ._result import DeblendResult, assemble
from ._start import place_first
from ._state import State
from ._trials import try_peaks

__all__ = ["deblend"]

_FIRST_STEPS = 1
"""Steps of refinement before the first search for new peaks."""

_TURNS = 3
"""Most times that galaxies and points next to each other are fitted in turn."""

_BEYOND_DOUBT = 50.0
"""Log odds of a point source before galaxies have been fitted to the end."""

_STEPS_BESIDE_POINTS = 2
"""Steps of refinement before it is asked which further sources are points beyond doubt."""

_LATE_ROUNDS = 1
"""Times that sources go on which have not settled after all."""

_LOG = logging.getLogger("lsst.meas.vaedeblend.deblender")

Progress = Callable[[float, str], object]
"""Takes the part of the rounds that is over, 0 to 1, and what goes on."""


def deblend(
    scene: Scene,
    network: Network,
    config: DeblendConfig | None = None,
    progress: Progress | None = None,
) -> DeblendResult:
    """Deblend all parents of a scene.

    Parameters
    ----------
    scene : `Scene`
        The scene; its bands are brought into the network's order, and those the network does not know left
        out.
    network : `Network`
        The network.
    config : `DeblendConfig`, optional
        Configuration.
    progress : callable, optional
        Called after each round with the part of the rounds that is over, 0 to 1, and what goes on (`str`).
        Rounds differ in length, and there may be fewer of them than allowed.

    Returns
    -------
    result : `DeblendResult`
        Sources, parents and residual.

    Raises
    ------
    NetworkError
        Raised if the pixel scales differ (unless allowed), or if onnxruntime fails.
    ValueError
        Raised if the scene lacks bands of the network (unless allowed), or has no PSF at all.
    """
    config = DeblendConfig() if config is None else config
    bands = network.metadata.bands
    if not set(bands) & set(scene.bands):
        raise ValueError(
            f"The scene has bands {list(scene.bands)}, the network {list(bands)}: none in common."
        )
    scene = scene.reordered(bands, allow_missing=config.allowMissingBands)
    if not config.allowOtherPixelScale:
        network.check(pixel_scale=scene.pixel_scale)
    if not scene.psf.valid.any():
        raise ValueError("The scene has no PSF in any cell and band.")
    # Many small matrices: threads of linear algebra would only get in each other's way, and in that of
    # others.
    with threadpool_limits(limits=1, user_api="blas"):
        return _deblend(State(scene, network, config), progress)


def _deblend(state: State, progress: Progress | None) -> DeblendResult:
    scene, config = state.scene, state.config
    place_first(state)
    parents = [p for p in range(len(scene.parents)) if len(state.members(p))]
    first_answers(state, parents)
    _report(state, progress, 0, parents, parents)
    if config.refinementSteps > 0 and isinstance(state.drawing, GridDrawing):
        _go_on_with_refinement(state, parents, progress)
    else:
        _go_on_with_passes(state, parents, progress)
    return assemble(state)


def _go_on_with_refinement(state: State, parents: list[int], progress: Progress | None) -> None:
    """Refine the sources, then try new peaks and refine those parents that have not settled."""
    open_ = _to_search(state, parents)
    # What a model may still become, it becomes only after the search: it would take in what has no peak yet.
    refine(state, parents, _FIRST_STEPS if open_ else None)
    for _ in range(_TURNS):
        points = _decide_points(state, parents, _BEYOND_DOUBT)
        if not len(points):
            break
        # What was drawn beside a star that was no star yet is no place to go on from.
        near = visible(state, state.members_of(parents), points)
        ask(state, near[~state.rows.point[near]])
        refit_points(state, points)
        refine(state, parents, _STEPS_BESIDE_POINTS)
    for iteration in range(1, state.config.maxIterations + 1):
        moving = unsettled(state, parents)
        if not moving and not open_:
            break
        open_ = try_peaks(state, open_, iteration, try_by_refinement)
        _settle(state, _either(moving, open_))
        _report(state, progress, iteration, moving, open_)
    _drop(state, parents)
    _decide_points(state, parents)
    _settle(state, parents)
    _measure(state, parents)
    # With the errors that catalogues tell some are nothing after all.
    if _drop(state, parents):
        _measure(state, parents)


def _drop(state: State, parents: list[int]) -> bool:
    """Drop new sources that errors of models explain as well; return whether there were any."""
    gone = np.concatenate([drop(state, p, worth_beside_others) for p in parents] or [np.empty(0, np.int64)])
    if len(gone):
        wake(state, state.members_of(parents), gone)
        refine(state, parents)
    return len(gone) > 0


def _measure(state: State, parents: list[int]) -> None:
    """Set posteriors and fluxes. Sources settle one by one: those that neighbours have disturbed go on."""
    late = set_posterior(state, state.members_of(parents))
    for _ in range(_LATE_ROUNDS):
        if not len(late):
            break
        late = set_posterior(state, refine_rows(state, late))
    measure(state, state.members_of(parents))


def _decide_points(state: State, parents: list[int], least_log_odds: float = 0.0) -> NDArray[np.int64]:
    """Make those sources points that are probably so, and return them; what sees them goes on."""
    rows = state.members_of(parents)
    points = choose_points(state, rows, least_log_odds)
    wake(state, rows, points)
    return points


def _settle(state: State, parents: list[int]) -> None:
    """Refine galaxies and fit points in turn, until neither moves the other."""
    for _ in range(_TURNS):
        refine(state, parents)
        rows = state.members_of(parents)
        moved = refit_points(state, rows)
        if not len(moved):
            break
        wake(state, rows, moved)


def _go_on_with_passes(state: State, parents: list[int], progress: Progress | None) -> None:
    """Take another pass with those parents that have not settled, then try new peaks."""
    moving, open_ = parents, _to_search(state, parents)
    for iteration in range(1, state.config.maxIterations + 1):
        if not moving and not open_:
            break
        moving = improve(state, moving)
        open_ = try_peaks(state, open_, iteration, try_by_passes)
        moving = _either(moving, open_)
        _report(state, progress, iteration, moving, open_)
    rows = state.members_of(parents)
    state.rows.settled[rows] = ~np.isin(state.rows.parent[rows], moving)
    for p in parents:
        drop(state, p)


def _to_search(state: State, parents: list[int]) -> list[int]:
    """The parents in which to look for new peaks: all at first, then only those that got some."""
    return parents if state.config.findNewPeaks else []


def _either(some: list[int], others: list[int]) -> list[int]:
    return sorted(set(some) | set(others))


def _report(
    state: State, progress: Progress | None, iteration: int, moving: list[int], open_: list[int]
) -> None:
    if progress is not None:
        # The rounds are framed by the first answers and the last refinement.
        text = f"round {iteration}: {len(moving)} of {len(state.scene.parents)} parents go on"
        progress((1 + iteration) / (2 + state.config.maxIterations), text)
    _LOG.debug("Iteration %d: %d parents gained sources, %d not settled.", iteration, len(open_), len(moving))
