# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Point sources as a hypothesis of their own: the local PSF against the network's galaxy.

A decoder of galaxies draws a star as a very small one, with errors of its own that a bright star shows at
hundreds of standard deviations, and what it makes of a star whose core is masked is a guess. The PSF is
known. Both hypotheses are compared by their evidences in Laplace's approximation (e.g. MacKay 2003,
Information Theory, Inference, and Learning Algorithms, chapter 28).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ..ground.cutouts import nearest_pixel
from ..inference import kernels, overlapping_pairs
from ._drawing import Drawn, GridDrawing
from ._fluxes import solve
from ._refinement import log_occam
from ._state import State

__all__ = ["choose_points", "refit_points"]

_COMPACT = 0.35
"""Intrinsic variance of a galaxy, in units of the PSF's, above which it is no candidate."""

_CORE = 4.0
"""Radius, pixel, within which a masked pixel makes any source a candidate: nothing is known of its core."""

_FITS = 4.0
"""Chi-square, weighted with its light, below which a point fits; the weights know of errors of models."""

_STEPS = 4
"""Steps of the first fit of a position; later fits start from where it led, and take one."""

_FAR = 2.5
"""Distance from its peak, pixel, beyond which a point is not moved."""

_LOG_FLUX_RANGE = 9.2
"""Width of the prior of a star's log flux in one band: ten magnitudes."""

_COLOUR_RANGE = 3.0
"""Width of the prior of the log flux ratios of a star: a star has any colour within some three magnitudes."""

_EQUAL_FLUX, _COUNTS_RATIO = 2.3e4, 0.6
"""Flux, nJy, at which there are as many stars as galaxies, r = 20.5, and the power of the flux with which
their ratio grows: counts at high galactic latitude, of slopes near 0.1 and 0.34 per magnitude (Yasuda et al.
2001, AJ 122, 1104)."""


def choose_points(
    state: State, rows: NDArray[np.int64], least_log_odds: float = 0.0
) -> NDArray[np.int64]:
    """Weigh both hypotheses for some sources, make those points that are probably so; return these.

    Sources stay what they once became. As long as models still move, only those should that are beyond doubt
    (``least_log_odds`` above 0), and of those that overlap the one with the largest odds: next to a star that
    is drawn as a galaxy nothing looks like what it is.
    """
    r = state.rows
    assert isinstance(state.drawing, GridDrawing)
    rows = rows[~r.failed[rows] & ~r.point[rows] & (r.stamps.width[rows] > 0)]
    rows = rows[_candidates(state, rows)]
    if not len(rows):
        return rows
    data, weight = _data(state, rows)
    position, flux, error, images, spread = _fit(state, rows, data, weight)
    as_point = _chi2(data - images * flux[:, :, None, None].astype(np.float32), weight)
    as_galaxy = _chi2(data - state.models(rows, state.size), weight)
    log_odds = 0.5 * (as_galaxy - as_point) + _prior_log_odds(flux, error)
    log_odds += _occam_of_point(flux, error, spread) - log_occam(state, rows)
    sound = np.isfinite(log_odds) & np.isfinite(flux).all(axis=1) & (flux > 0).any(axis=1)
    if least_log_odds > 0:
        # A galaxy that has not found its shape yet is worse than anything: where the core is seen, the point
        # has to fit by itself.
        sound &= (_light_chi2(data, images, flux, weight) < _FITS) | _core_masked(state, rows)
    kept = np.flatnonzero(sound & (log_odds > least_log_odds))
    if least_log_odds > 0:
        kept = kept[_leading(state, rows[kept], log_odds[kept])]
    # Of the others the last word is said when models have come to rest.
    told = kept if least_log_odds > 0 else np.arange(len(rows))
    r.point_probability[rows[told]] = np.where(sound, expit(np.where(sound, log_odds, 0.0)), 0.0)[told]
    _put(state, rows[kept], position[kept], flux[kept], error[kept], images[kept])
    return rows[kept]


def refit_points(state: State, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fit positions and fluxes of points to what others leave of the image; return those that moved."""
    r = state.rows
    rows = rows[r.point[rows]]
    if not len(rows):
        return rows
    data, weight = _data(state, rows)
    before = _chi2(data - state.models(rows, state.size), weight)
    position, flux, error, images, _ = _fit(state, rows, data, weight, steps=1)
    after = _chi2(data - images * flux[:, :, None, None].astype(np.float32), weight)
    better = np.isfinite(after) & (after < before)
    _put(state, rows[better], position[better], flux[better], error[better], images[better])
    return rows[better & (before - after > state.config.refinementTolerance)]


def _leading(state: State, rows: NDArray[np.int64], log_odds: NDArray) -> NDArray[np.bool_]:
    """Which of some sources have larger odds than all others whose cutouts overlap with theirs, (K,)."""
    size = np.full(len(rows), state.size)
    one, other = overlapping_pairs(state.rows.corner[rows], size).T
    out = np.ones(len(rows), bool)
    first = log_odds[one] >= log_odds[other]
    out[other[first]] = False
    out[one[~first]] = False
    return out


def _candidates(state: State, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which sources may be points: those drawn as small, or with a core that nobody has seen, (K,)."""
    r = state.rows
    assert isinstance(state.drawing, GridDrawing)
    if not len(rows):
        return np.empty(0, bool)
    values, _ = state.drawing.grids.parameters(r.mean[rows])
    size = 0.5 * np.abs(values[:, :, 3] + values[:, :, 4])
    light = np.maximum(r.flux[rows] / r.noise[rows], 0.0)
    # Weighted with what the bands tell.
    size = (size * light).sum(axis=1) / np.maximum(light.sum(axis=1), 1e-30)
    seeing = (state.psf_sigma[r.cell[rows]] ** 2 * light).sum(axis=1) / np.maximum(light.sum(axis=1), 1e-30)
    return (size < _COMPACT * seeing) | _core_masked(state, rows)


def _core_masked(state: State, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a pixel close to the peak is masked in a band that has data, (K,)."""
    reach = int(np.ceil(_CORE))
    x, y = nearest_pixel(state.rows.peak[rows]).T
    size = 2 * reach + 1
    bad = ~kernels.cut(state.valid, y - reach, x - reach, size)[:, state.usable].all(axis=1)
    offset = np.arange(-reach, reach + 1)
    j, i = y[:, None] + offset, x[:, None] + offset
    height, width = state.scene.shape
    bad &= ((j >= 0) & (j < height))[:, :, None] & ((i >= 0) & (i < width))[:, None, :]
    return (bad & (np.hypot(offset[:, None], offset) <= _CORE)).any(axis=(1, 2))


def _data(state: State, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What others leave of the image on the cutouts of sources, and its weights, (K, B, S, S)."""
    state.soften(rows)
    y, x = np.ascontiguousarray(state.rows.corner[rows].T)
    data = kernels.cut(state.residual, y, x, state.size) + state.models(rows, state.size)
    return data, kernels.cut(state.soft_weight, y, x, state.size)


def _chi2(residual: NDArray, weight: NDArray) -> NDArray[np.float64]:
    return np.einsum("kbyx,kbyx,kbyx->k", residual, residual, weight, dtype=np.float64)


def _fit(
    state: State, rows: NDArray[np.int64], data: NDArray, weight: NDArray, steps: int = _STEPS
) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """Fit points by Gauss-Newton steps in position, fluxes solved for in each.

    Returns
    -------
    position : `numpy.ndarray`, (K, 2)
        (x, y), scene coordinates.
    flux, error : `numpy.ndarray`, (K, B)
        Fluxes and standard deviations, nJy; 0 and infinite in a band without data.
    images : `numpy.ndarray`, (K, B, S, S)
        Points of unit flux.
    spread : `numpy.ndarray`, (K,)
        Area of the position's error, the root of its covariance's determinant, pixel^2.
    """
    r = state.rows
    start = np.where(
        (np.hypot(*(r.centroid[rows] - r.peak[rows]).T) < _FAR)[:, None], r.centroid[rows], r.peak[rows]
    )
    position = start.copy()
    covariance = np.full((len(rows), 2, 2), np.nan)
    for _ in range(steps):
        _, images = state.draw_points(rows, position)
        flux, own = _fluxes(images, data, weight)
        scaled = images * flux[:, :, None, None].astype(np.float32)
        left = (data - scaled) * weight
        slopes = [-_slope(scaled, 3), -_slope(scaled, 2)]
        # Fluxes are left free: what of a slope looks like the point itself says nothing of the position.
        for i, slope in enumerate(slopes):
            along = np.einsum("kbyx,kbyx,kbyx->kb", slope, images, weight) / np.maximum(own, 1e-30)
            slopes[i] = slope - along[:, :, None, None].astype(np.float32) * images
        normal = np.empty((len(rows), 2, 2))
        gradient = np.empty((len(rows), 2))
        for i, one in enumerate(slopes):
            gradient[:, i] = np.einsum("kbyx,kbyx->k", one, left, dtype=np.float64)
            for j, other in enumerate(slopes[: i + 1]):
                normal[:, i, j] = normal[:, j, i] = np.einsum(
                    "kbyx,kbyx,kbyx->k", one, other, weight, dtype=np.float64
                )
        # The peak itself is known to a pixel.
        normal[:, [0, 1], [0, 1]] += 1.0
        gradient += start - position
        covariance = np.linalg.inv(normal)
        step = np.einsum("kij,kj->ki", covariance, gradient)
        length = np.hypot(*step.T)
        position = position + step * np.minimum(1.0, 1.0 / np.maximum(length, 1e-9))[:, None]
        offset = position - r.peak[rows]
        far = np.hypot(*offset.T)
        position = r.peak[rows] + offset * np.minimum(1.0, _FAR / np.maximum(far, 1e-9))[:, None]
        if length.max(initial=0.0) < 0.01:
            break
    _, images = state.draw_points(rows, position)
    flux, own = _fluxes(images, data, weight)
    with np.errstate(divide="ignore"):
        error = 1.0 / np.sqrt(own)
    return position, flux, error, images, np.sqrt(np.linalg.det(covariance))


def _light_chi2(data: NDArray, images: NDArray, flux: NDArray, weight: NDArray) -> NDArray[np.float64]:
    """Mean of squared residual over variance, weighted with a point's light, (K,)."""
    model = images * np.maximum(flux, 0.0)[:, :, None, None].astype(np.float32)
    light = np.einsum("kbyx,kbyx->k", model, (weight > 0).astype(np.float32), dtype=np.float64)
    squares = np.einsum("kbyx,kbyx,kbyx->k", model, (data - model) ** 2, weight, dtype=np.float64)
    return squares / np.maximum(light, 1e-30)


def _slope(images: NDArray, axis: int) -> NDArray[np.float32]:
    """Derivative along an axis, by central differences."""
    out = np.zeros_like(images)
    middle, after, before = (slice(1, -1), slice(2, None), slice(None, -2))
    at = [slice(None)] * images.ndim
    parts = []
    for part in (middle, after, before):
        at[axis] = part
        parts.append(tuple(at))
    out[parts[0]] = 0.5 * (images[parts[1]] - images[parts[2]])
    return out


def _fluxes(images: NDArray, data: NDArray, weight: NDArray) -> tuple[NDArray, NDArray]:
    """Least-squares fluxes of single sources, (K, B), and the inverses of their variances."""
    own = np.einsum("kbyx,kbyx,kbyx->kb", images, images, weight, dtype=np.float64)
    seen = np.einsum("kbyx,kbyx,kbyx->kb", images, data, weight, dtype=np.float64)
    return np.where(own > 0, seen / np.maximum(own, 1e-30), 0.0), own


def _best_band(flux: NDArray, error: NDArray) -> NDArray[np.int64]:
    """The band that tells most of each source, (K,)."""
    return np.argmax(np.where(np.isfinite(error), flux / error, -np.inf), axis=1)


def _prior_log_odds(flux: NDArray, error: NDArray) -> NDArray[np.float64]:
    """Log of how many stars there are for each galaxy of some flux, (K,)."""
    most = flux[np.arange(len(flux)), _best_band(flux, error)]
    return _COUNTS_RATIO * np.log(np.maximum(most, 1.0) / _EQUAL_FLUX)


def _occam_of_point(flux: NDArray, error: NDArray, spread: NDArray) -> NDArray[np.float64]:
    """Log of the part of a point's prior that its data leave, (K,).

    The prior is flat in log flux, over ten magnitudes in the band that tells most and over three for each
    ratio to it, and normal in position with a standard deviation of a pixel. In each band the data leave
    sqrt(2 pi) sigma / flux of it.
    """
    # A band without data leaves all of the prior: its error is infinite.
    relative = np.divide(error, np.maximum(flux, error), out=np.ones_like(error), where=np.isfinite(error))
    known = np.isfinite(error)
    width = np.full(flux.shape, _COLOUR_RANGE)
    width[np.arange(len(flux)), _best_band(flux, error)] = _LOG_FLUX_RANGE
    left = np.minimum(np.log(np.sqrt(2 * np.pi) * relative / width), 0.0)
    return np.where(known, left, 0.0).sum(axis=1) + np.minimum(np.log(spread), 0.0)


def _put(
    state: State,
    rows: NDArray[np.int64],
    position: NDArray,
    flux: NDArray,
    error: NDArray,
    images: NDArray,
) -> None:
    """Make sources points of given places and fluxes, and solve for their fluxes jointly."""
    if not len(rows):
        return
    r = state.rows
    n = len(rows)
    target = state.target(rows)
    width = state.renderer.point_widths(flux, r.noise[rows], r.cell[rows])
    groups = [(np.flatnonzero(width == state.size), images[width == state.size])]
    for wide in np.unique(width[width > state.size]).tolist():
        own = np.flatnonzero(width == wide)
        groups.append((own, state.draw_points(rows[own], position[own], wide)[1]))
    drawn = Drawn(
        [group for group in groups if len(group[0])],
        np.where(np.isfinite(error), flux, np.nan),
        position - target,
        width,
        np.ones(n, bool),
    )
    state.replace(rows, drawn, np.where(np.isfinite(error), flux, 0.0))
    r.point[rows] = r.settled[rows] = True
    r.stuck[rows] = False
    solve(state, rows)
