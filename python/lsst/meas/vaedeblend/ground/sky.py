# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sky that a coadd's background subtraction left over, from the pixels around."""

from __future__ import annotations

__all__ = ["BIN", "SKY_PRIOR", "SKY_WIDTH", "binned", "local_sky"]

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .peaks import smooth

SKY_WIDTH = 64
"""Width of the window of pixels that a sky value is measured from, pixel."""

SKY_PRIOR = 0.1
"""How large a sky to expect, in standard deviations of a pixel's noise."""

# Means are taken of squares of so many pixels first: a sky varies little over a few pixels.
BIN = 4
# First wide enough for a sky of some standard deviations, then as narrow as leaves noise nearly whole.
_CLIPS = (5.0, 3.0, 3.0)


def local_sky(
    image: ArrayLike,
    weight: ArrayLike,
    free: ArrayLike,
    factor: ArrayLike = 1.0,
    width: int = SKY_WIDTH,
    prior: float = SKY_PRIOR,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Measure the local sky in every band: a weighted mean of the pixels without sources around each pixel.

    The mean is sum(k w x) / sum(k w) over free pixels, with the inverse variances w and a window k that falls
    linearly to zero along each axis, as two passes of a box filter give it. Pixels farther than three
    standard deviations from the sky do not count. The mean's variance is f sum(k^2 w) / sum(k w)^2, with the
    factor f by which correlated noise raises that of a mean; sum(k^2 w) is taken as sum(k w) sum(k^2) /
    sum(k), which is exact where free pixels are spread evenly. With a Gaussian prior of zero mean and of
    standard deviation ``prior`` times a pixel's noise, sky and error are those of the posterior, so that
    where nothing is free the sky is 0 with the prior's error.

    The window moves in steps of 4 pixels, between which sky and error are interpolated. Each of the three
    rounds of clipping looks half a window around: nothing farther than one and a half windows and some pixels
    changes a pixel's sky, not even its rounding.

    Parameters
    ----------
    image : array_like, (B, H, W)
        Images, nJy.
    weight : array_like, (B, H, W)
        Inverse variances of single pixels, nJy^-2; 0 where a pixel may not be used.
    free : array_like, (B, H, W) or (H, W)
        Pixels without sources, that is not detected nor close to what is.
    factor : array_like, (B,) or scalar, optional
        `lsst.meas.vaedeblend.ground.noise.noise_factor` for an infinite width.
    width : `int`, optional
        Width of the window, pixel, rounded to a multiple of 8.
    prior : `float`, optional
        Standard deviation of the sky left over, in units of a pixel's.

    Returns
    -------
    sky, error : `numpy.ndarray`, (B, H, W)
        The sky and its standard deviation, nJy. The error is 0 where a window has no valid pixel at all.

    Raises
    ------
    ValueError
        Raised if shapes do not agree, the width is less than 8, or the prior is not positive.
    """
    image, weight = np.asarray(image, np.float32), np.asarray(weight, np.float32)
    if image.ndim != 3 or weight.shape != image.shape:
        raise ValueError(f"Image and weight should be (B, H, W), they are {image.shape} and {weight.shape}.")
    if width < 2 * BIN or not prior > 0:
        raise ValueError(f"A sky needs a width of {2 * BIN} or more and a prior, not {width} and {prior}.")
    free = np.broadcast_to(np.asarray(free, bool), image.shape)
    factor = np.broadcast_to(np.asarray(factor, float), len(image)).astype(np.float32)
    half = max(round(width / (2 * BIN)), 1)
    kernel = (half - np.abs(np.arange(1 - half, half))).astype(np.float32) / half**2
    # Sum of the squares of the window's values in pixels.
    square = np.float32(((kernel.astype(float) ** 2).sum() / BIN) ** 2)
    sky, error = np.empty_like(image), np.empty_like(image)
    # Band by band: a whole patch has ten million pixels in each.
    for b in range(len(image)):
        valid = (weight[b] > 0) & np.isfinite(image[b]) & np.isfinite(weight[b])
        x, w = np.where(valid, image[b], np.float32(0)), np.where(valid, weight[b], np.float32(0))
        deviation = np.sqrt(w)
        sum_w = coarse = smooth(binned(np.zeros_like(w)), kernel)
        for clip in _CLIPS:
            here = coarse.repeat(BIN, 0).repeat(BIN, 1)[: x.shape[0], : x.shape[1]]
            used = np.where(free[b] & (np.abs(x - here) * deviation < clip), w, np.float32(0))
            sum_w = smooth(binned(used), kernel)
            used *= x
            total = smooth(binned(used), kernel)
            coarse = np.divide(total, sum_w, out=np.zeros_like(total), where=sum_w > 0)
        seen = smooth(binned(valid.astype(np.float32)), kernel)
        mean_w = np.divide(smooth(binned(w), kernel), seen, out=np.zeros_like(seen), where=seen > 0)
        # Precisions of the measurement and of the prior; where there is no valid pixel there is nothing.
        measured, expected = sum_w / (factor[b] * square), mean_w / np.float32(prior**2)
        both = np.where(seen > 0, measured + expected, np.float32(np.inf))
        sky[b] = _fine(coarse * measured / both, x.shape)
        error[b] = _fine(1 / np.sqrt(both), x.shape)
    return sky, error


def binned(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over squares of `BIN` pixels, those beyond the border 0."""
    height, width = (-(-size // BIN) for size in image.shape)
    missing = [(0, n * BIN - size) for n, size in zip((height, width), image.shape, strict=True)]
    padded = np.pad(image, missing) if any(after for _, after in missing) else image
    return padded.reshape(height, BIN, width, BIN).mean(axis=(1, 3))


def _fine(image: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.floating]:
    """Interpolate linearly from squares to pixels, (H, W)."""
    fine = ndimage.zoom(image, BIN, order=1, mode="nearest", grid_mode=True)
    return fine[: shape[0], : shape[1]]
