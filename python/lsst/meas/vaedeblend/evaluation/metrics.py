# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Numbers that say how well deblending went."""

from __future__ import annotations

__all__ = [
    "ShearBias",
    "blendedness_closest",
    "blendedness_total",
    "bootstrap",
    "magnitude",
    "match",
    "poisson_variance",
    "reduced_chi2",
    "run_seconds",
    "shear_bias",
    "sigma_percentiles",
]

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm

MATCH_RADIUS = 3.0
"""Largest distance at which an object counts as a true one, pixel."""

SNR_LIMIT = 10.0
"""Objects with a true signal-to-noise ratio above this in the reference band should be found."""


def match(xy: ArrayLike, truth_xy: ArrayLike, radius: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match two lists of positions one to one.

    Of all matchings within the radius this is one with the most pairs and, among those, the smallest sum of
    squared distances.

    Parameters
    ----------
    xy : array_like, (N, 2)
        Positions, pixel.
    truth_xy : array_like, (M, 2)
        Positions to match them with, pixel.
    radius : `float`
        Largest distance of a pair, pixel.

    Returns
    -------
    index, truth_index : `numpy.ndarray`, (K,)
        The pairs, as rows of ``xy`` and of ``truth_xy``, the latter ascending.
    """
    xy, truth_xy = np.asarray(xy, float).reshape(-1, 2), np.asarray(truth_xy, float).reshape(-1, 2)
    distance2 = ((xy[:, None] - truth_xy[None]) ** 2).sum(axis=2)
    close = distance2 <= radius**2
    # A pair that is too far costs more than all good pairs together could, so it is taken only as the last
    # resort.
    far = radius**2 * (min(close.shape) + 1) + 1.0
    rows, columns = linear_sum_assignment(np.where(close, distance2, far))
    good = close[rows, columns]
    rows, columns = rows[good], columns[good]
    order = np.argsort(columns)
    return rows[order], columns[order]


def poisson_variance(signal: ArrayLike, counts_per_njy: float, sky_counts: float) -> NDArray[np.float64]:
    """Return the variance of pixels with the noise of source and sky, nJy^2 (Arcelin et al. 2020, eq. 7).

    Parameters
    ----------
    signal : array_like
        Noiseless pixels, nJy.
    counts_per_njy, sky_counts : `float`
        Electrons that 1 nJy yields, and electrons per pixel from the sky.
    """
    expected = np.maximum(np.asarray(signal, float), 0) * counts_per_njy + sky_counts
    return expected / counts_per_njy**2


def magnitude(flux: ArrayLike) -> NDArray[np.float64]:
    """Return AB magnitudes of fluxes in nJy; NaN where a flux is not positive."""
    flux = np.asarray(flux, float)
    return 31.4 - 2.5 * np.log10(np.where(flux > 0, flux, np.nan))


def blendedness_closest(target: ArrayLike, closest: ArrayLike) -> float:
    """Return the blending rate with the closest neighbour (Arcelin et al. 2020, eqs. 1 and 2).

    Parameters
    ----------
    target, closest : array_like, (h, w)
        Noiseless images of the two galaxies, any unit.
    """
    target, closest = np.asarray(target, float), np.asarray(closest, float)
    return float((target * closest).sum() / np.sqrt((target**2).sum() * (closest**2).sum()))


def blendedness_total(target: ArrayLike, total: ArrayLike) -> float:
    """Return the total blending rate (Arcelin et al. 2020, eq. 3; Melchior et al. 2018).

    Parameters
    ----------
    target, total : array_like, (h, w)
        Noiseless images of the galaxy and of all galaxies, itself included, any unit.
    """
    target = np.asarray(target, float)
    return float(1 - (target**2).sum() / (target * np.asarray(total, float)).sum())


class ShearBias(NamedTuple):
    """Biases of both components, (2,), and of their mean, with bootstrap errors; see `shear_bias`."""

    m: NDArray[np.float64]
    m_err: NDArray[np.float64]
    c: NDArray[np.float64]
    c_err: NDArray[np.float64]
    mean: float
    mean_err: float


def shear_bias(
    true: ArrayLike, measured: ArrayLike, rng: np.random.Generator, repeats: int = 200
) -> ShearBias:
    """Fit multiplicative and additive bias, measured = (1 + m) true + c, by least squares per component.

    Parameters
    ----------
    true, measured : array_like, (N, 2)
        Ellipticities. Rows that are not finite are left out.
    rng : `numpy.random.Generator`
        Draws the bootstrap samples.
    repeats : `int`
        Number of bootstrap samples.

    Returns
    -------
    bias : `ShearBias`
        NaN where fewer than three rows are left.
    """
    true, measured = np.asarray(true, float), np.asarray(measured, float)
    good = np.isfinite(true).all(axis=1) & np.isfinite(measured).all(axis=1)
    true, error = true[good], (measured - true)[good]

    def fit(rows) -> NDArray[np.float64]:
        x, y = true[rows], error[rows]
        x0, y0 = x.mean(axis=0), y.mean(axis=0)
        m = ((x - x0) * (y - y0)).sum(axis=0) / ((x - x0) ** 2).sum(axis=0)
        return np.array([*m, *(y0 - m * x0), m.mean()])

    if len(true) < 3:
        best = err = np.full(5, np.nan)
    else:
        best, err = fit(slice(None)), bootstrap(fit, len(true), rng, repeats)
    return ShearBias(best[:2], err[:2], best[2:4], err[2:4], float(best[4]), float(err[4]))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], ArrayLike], n: int, rng: np.random.Generator, repeats: int = 200
) -> NDArray[np.float64]:
    """Return the standard deviation of a statistic over samples drawn with repetition.

    Parameters
    ----------
    statistic : callable
        Takes row numbers, gives a number or an array.
    n : `int`
        Number of rows.
    rng : `numpy.random.Generator`
    repeats : `int`
        Number of samples.
    """
    return np.std([statistic(rng.integers(0, n, n)) for _ in range(repeats)], axis=0, ddof=1)


def sigma_percentiles(
    x: ArrayLike, y: ArrayLike, edges: ArrayLike, min_count: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the distribution of y in bins of x: median and the percentiles of 1 and 2 sigma of a Gaussian.

    Parameters
    ----------
    x, y : array_like, (N,)
        Values; pairs that are not finite are left out.
    edges : array_like, (K + 1,)
        Edges of the bins, ascending; each bin has its lower edge, the last one both.
    min_count : `int`
        Smallest number of values that a bin must have.

    Returns
    -------
    count : `numpy.ndarray`, (K,)
        Values in each bin.
    percentiles : `numpy.ndarray`, (K, 5)
        At -2, -1, 0, 1 and 2 sigma; NaN in bins with too few values.
    """
    x, y, edges = np.asarray(x, float), np.asarray(y, float), np.asarray(edges, float)
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    bin_of = np.searchsorted(edges, x, side="right") - 1
    bin_of[x == edges[-1]] = len(edges) - 2
    count = np.array([(bin_of == k).sum() for k in range(len(edges) - 1)])
    out = np.full((len(count), 5), np.nan)
    for k in np.flatnonzero(count >= max(1, min_count)):
        out[k] = np.percentile(y[bin_of == k], 100 * norm.cdf([-2, -1, 0, 1, 2]))
    return count, out


def reduced_chi2(image: ArrayLike, weight: ArrayLike) -> float:
    """Return the mean of image^2 * weight over the pixels whose weight is positive; NaN without any.

    Parameters
    ----------
    image, weight : array_like
        Residual (or image) and inverse variance in reciprocal units, of one shape.
    """
    image, weight = np.asarray(image, float), np.asarray(weight, float)
    used = weight > 0
    return float(np.mean(image[used] ** 2 * weight[used])) if used.any() else np.nan


def run_seconds(metadata: Mapping[str, Any]) -> float:
    """Return the wall time of a task's ``run`` method, s, from the metadata that ``timeMethod`` wrote.

    Parameters
    ----------
    metadata : mapping
        Metadata of the task itself, for example ``butler.get("vaeDeblend_metadata", ...)["vaeDeblend"]``.
    """

    def last(key: str) -> datetime:
        value = metadata[key]
        return datetime.fromisoformat(value if isinstance(value, str) else list(value)[-1])

    return (last("runEndUtc") - last("runStartUtc")).total_seconds()
