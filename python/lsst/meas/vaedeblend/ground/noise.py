# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Noise that correlates between pixels, as resampling leaves it on coadds: how much, and what it costs.

A coadd's variance plane holds each pixel's own variance. Sums over pixels have a larger variance than the
sum of those, by a factor that depends on the autocorrelation of the noise and on the weights of the sum.
"""

from __future__ import annotations

__all__ = ["MIN_FREE", "REACH", "noise_correlation", "noise_factor", "subtract_local_mean"]

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .peaks import smooth

REACH = 2
"""Largest lag that is measured, pixel: resampling hardly correlates pixels farther apart."""

MIN_FREE = 5000
"""Free pixels that a measurement needs: with fewer the factor's error exceeds 0.1."""

_CLIP = 4.0
_MEAN_REACH = 12
_LEAST_FACTOR = 0.2


def subtract_local_mean(
    image: NDArray[np.float32], free: NDArray[np.bool_], reach: int = _MEAN_REACH
) -> tuple[NDArray[np.float32], float]:
    """Subtract from each free pixel the mean of the free pixels in the square around it.

    Parameters
    ----------
    image : `numpy.ndarray`, (H, W)
        One band, anything in pixels that are not free but NaN.
    free : `numpy.ndarray`, (H, W)
        Which pixels count.
    reach : `int`, optional
        Half the width of the square, pixel.

    Returns
    -------
    difference : `numpy.ndarray`, (H, W)
        0 in pixels that are not free.
    share : `float`
        Mean over the free pixels of 1 / N, the number of pixels in each one's mean.
    """
    kernel = np.ones(2 * reach + 1, np.float32)
    count = smooth(free.astype(np.float32), kernel)
    mean = smooth(np.where(free, image, np.float32(0)), kernel) / np.maximum(count, 1)
    share = float((1 / np.maximum(count[free], 1)).mean()) if free.any() else 1.0
    return np.where(free, image - mean, np.float32(0)), share


def noise_correlation(
    image: ArrayLike,
    weight: ArrayLike,
    free: ArrayLike,
    reach: int = REACH,
    least: int = MIN_FREE,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Measure the autocorrelation of the noise on small lags from pixels without sources.

    With z the image in units of each pixel's own standard deviation, without its local mean, the correlation
    at lag d is the mean of z(p) z(p + d) over the pairs of free pixels, over the mean of z^2 (the usual
    estimator, Box, Jenkins & Reinsel 2008, *Time Series Analysis*, eq. 2.1.13, in two dimensions). A mean
    over N pixels takes away sum(C) / N from every covariance C(d), which is given back. Pixels beyond four
    standard deviations are left out; undetected sources are not known and count as noise, which for a
    detection they are.

    Parameters
    ----------
    image : array_like, (B, H, W)
        Images, nJy.
    weight : array_like, (B, H, W)
        Inverse variances of single pixels, nJy^-2; 0 where a pixel may not be used.
    free : array_like, (B, H, W) or (H, W)
        Pixels without sources.
    reach : `int`, optional
        Largest lag along each axis, pixel.
    least : `int`, optional
        Number of free pixels below which nothing is measured.

    Returns
    -------
    correlation : `numpy.ndarray`, (B, 2 reach + 1, 2 reach + 1)
        Correlation at lags (y, x), 1 in the middle. Where it is not measured, 0 elsewhere: white noise.
    measured : `numpy.ndarray`, (B,)
        Whether there were enough free pixels.

    Raises
    ------
    ValueError
        Raised if shapes do not agree.
    """
    image, weight = np.asarray(image, np.float32), np.asarray(weight, np.float32)
    if image.ndim != 3 or weight.shape != image.shape:
        raise ValueError(f"Image and weight should be (B, H, W), they are {image.shape} and {weight.shape}.")
    free = np.broadcast_to(np.asarray(free, bool), image.shape)
    width = 2 * reach + 1
    correlation = np.zeros((len(image), width, width))
    correlation[:, reach, reach] = 1.0
    measured = np.zeros(len(image), bool)
    for b in range(len(image)):
        usable = free[b] & (weight[b] > 0) & np.isfinite(image[b])
        if usable.sum() < least:
            continue
        z = np.where(usable, image[b], np.float32(0)) * np.sqrt(weight[b])
        # Once to know which pixels stand out, and again without them.
        usable &= np.abs(subtract_local_mean(z, usable)[0]) < _CLIP
        if usable.sum() < least:
            continue
        z, share = subtract_local_mean(z, usable)
        covariance = _covariance(z, usable, reach)
        covariance += share * covariance.sum() / (1 - share * covariance.size)
        correlation[b] = covariance / covariance[reach, reach]
        measured[b] = True
    return correlation, measured


def _covariance(z: NDArray, usable: NDArray[np.bool_], reach: int) -> NDArray[np.float64]:
    """Mean products of pairs of usable pixels, by lag (y, x); z is 0 where it is not usable."""
    height, width = z.shape
    out = np.zeros((2 * reach + 1, 2 * reach + 1))
    for dy in range(reach + 1):
        for dx in range(-reach, reach + 1):
            here = np.s_[: max(height - dy, 0), max(-dx, 0) : max(width - max(dx, 0), 0)]
            there = np.s_[dy:, max(dx, 0) : max(width + min(dx, 0), 0)]
            pairs = np.count_nonzero(usable[here] & usable[there])
            # Single precision is enough along a row, not for all of them.
            product = np.einsum("ij,ij->i", z[here], z[there]).sum(dtype=np.float64)
            out[reach + dy, reach + dx] = out[reach - dy, reach - dx] = product / max(pairs, 1)
    return out


def noise_factor(correlation: ArrayLike, psf_sigma: ArrayLike) -> NDArray[np.float64]:
    """By how much correlated noise raises the variance of a matched filter for a point source.

    The variance of sum(k(p) x(p)) is sigma^2 sum_d rho(d) A(d), with A the autocorrelation of k; white noise
    gives A(0). For a Gaussian filter A(d) / A(0) = exp(-d^2 / (4 s^2)), so that the factor is the sum over d
    of rho(d) exp(-d^2 / (4 s^2)).

    Parameters
    ----------
    correlation : array_like, (B, n, n)
        Correlation at lags (y, x), see `noise_correlation`; those not given are 0.
    psf_sigma : array_like, (B,) or scalar
        Standard deviation s of the Gaussian that stands for the PSF, pixel; ``inf`` gives the factor of a
        plain mean over many pixels.

    Returns
    -------
    factor : `numpy.ndarray`, (B,)
        1 for white noise. At least 0.2, which only a wrong measurement would be below.

    Raises
    ------
    ValueError
        Raised if the correlation has no middle, or a width is not positive.
    """
    correlation = np.asarray(correlation, float)
    if correlation.ndim != 3 or correlation.shape[1] % 2 == 0 or correlation.shape[2] % 2 == 0:
        raise ValueError(f"The correlation should be (B, n, n) with odd n, it is {correlation.shape}.")
    sigma = np.broadcast_to(np.asarray(psf_sigma, float), len(correlation))
    if not (sigma > 0).all():
        raise ValueError(f"The PSF's sigma should be positive in every band, not {sigma}.")
    y, x = (np.arange(n) - n // 2 for n in correlation.shape[1:])
    overlap = np.exp(-(y[:, None] ** 2 + x**2) / (4 * sigma[:, None, None] ** 2))
    return np.maximum((correlation * overlap).sum(axis=(1, 2)), _LEAST_FACTOR)
