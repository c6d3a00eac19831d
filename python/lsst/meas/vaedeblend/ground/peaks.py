# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The detection image of all bands, and the peaks on it."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

__all__ = ["detection_image", "find_peaks", "significance_map", "smooth"]

# Width at which the Gaussian matched filter is cut off, in its standard deviations.
_TRUNCATE = 4.0


def _sigmas(psf_sigma: ArrayLike, bands: int) -> NDArray[np.float64]:
    sigma = np.broadcast_to(np.asarray(psf_sigma, dtype=float), (bands,))
    if not (np.isfinite(sigma) & (sigma > 0)).all():
        raise ValueError(f"The PSF's sigma should be positive in every band, not {sigma}.")
    return sigma


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz"}, nogil=True)
def smooth(image: NDArray, kernel: NDArray) -> NDArray:
    """Correlate an image (H, W) with a symmetric kernel (2 R + 1,) along both axes, 0 beyond the border."""
    height, width = image.shape
    reach = len(kernel) // 2
    along = np.zeros((height, width), np.float32)
    out = np.zeros((height, width), np.float32)
    for y in range(height):
        for j in range(-reach, reach + 1):
            if 0 <= y + j < height:
                factor = kernel[j + reach]
                for x in range(width):
                    along[y, x] += factor * image[y + j, x]
    for y in range(height):
        for i in range(-reach, reach + 1):
            factor = kernel[i + reach]
            for x in range(max(0, -i), min(width, width - i)):
                out[y, x] += factor * along[y, x + i]
    return out


def _gaussian(sigma: float) -> NDArray[np.float32]:
    """A Gaussian of sum 1, cut off at `_TRUNCATE` standard deviations."""
    reach = int(_TRUNCATE * sigma + 0.5)
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return (line / line.sum()).astype(np.float32)


def significance_map(image: ArrayLike, weight: ArrayLike, psf_sigma: ArrayLike) -> NDArray[np.float32]:
    """Compute the significance of a point source at every pixel, from all bands.

    The matched filter of a point source with the same flux in every band and Gaussian PSFs: the sum over
    bands and pixels of PSF x image / variance, over the square root of the sum of PSF^2 / variance (Kaiser et
    al. 2010, Proc. SPIE 7733; Bosch et al. 2018, PASJ 70, S5, section 4.7.1).

    Parameters
    ----------
    image : array_like, (B, H, W)
        Images or residuals, nJy.
    weight : array_like, (B, H, W)
        Their inverse variances, nJy^-2; 0 where a pixel may not be used.
    psf_sigma : array_like, (B,) or scalar
        Standard deviation of the Gaussian that stands for the PSF, pixel.

    Returns
    -------
    significance : `numpy.ndarray`, (H, W)
        Flux of the best point source over its standard deviation; 0 where there is no valid pixel around.

    Raises
    ------
    ValueError
        Raised if a ``psf_sigma`` is not positive.
    """
    image, weight = np.asarray(image, np.float32), np.asarray(weight, np.float32)
    total, norm = np.zeros((2, *image.shape[1:]), np.float32)
    for im, w, sigma in zip(image, weight, _sigmas(psf_sigma, len(image)), strict=True):
        if w.any():
            weighted = np.where(w > 0, im, np.float32(0.0)) * w
            total += smooth(weighted, _gaussian(sigma))
            # The square of a Gaussian is one of width sigma / sqrt(2) and sum 1 / (4 pi sigma^2).
            norm += smooth(w, _gaussian(sigma / np.sqrt(2))) / np.float32(4.0 * np.pi * sigma**2)
    # Where the filter sees only its own far wings there is nothing to detect on.
    seen = norm > 1e-3 * norm.max(initial=0.0)
    return np.divide(total, np.sqrt(norm), out=np.zeros_like(total), where=seen & (norm > 0))


def detection_image(
    image: ArrayLike, variance: ArrayLike, valid: ArrayLike, psf_sigma: ArrayLike
) -> NDArray[np.float32]:
    """Compute the significance of a point source at every pixel, given variances.

    Parameters
    ----------
    image : array_like, (B, H, W)
        Images, nJy.
    variance : array_like, (B, H, W)
        Their variances, nJy^2.
    valid : array_like, (B, H, W)
        Whether a pixel may be used.
    psf_sigma : array_like, (B,) or scalar
        Standard deviation of the Gaussian that stands for the PSF, pixel.

    Returns
    -------
    significance : `numpy.ndarray`, (H, W)
        See `significance_map`.

    Raises
    ------
    ValueError
        Raised if a ``psf_sigma`` is not positive.
    """
    variance, valid = np.asarray(variance), np.asarray(valid, bool)
    return significance_map(image, np.where(valid, 1.0 / np.where(valid, variance, 1.0), 0.0), psf_sigma)


def find_peaks(
    significance: ArrayLike,
    threshold: float,
    footprint: ArrayLike | None = None,
    min_separation: float = 0.0,
    existing: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Find the local maxima of a significance map.

    Parameters
    ----------
    significance : array_like, (H, W)
        The map.
    threshold : `float`
        What a maximum has to exceed.
    footprint : array_like, (H, W), optional
        Where maxima may lie.
    min_separation : `float`, optional
        Distance that peaks keep from brighter ones and from existing ones, pixel.
    existing : array_like, (M, 2), optional
        (x, y) of peaks that are known already.

    Returns
    -------
    peaks : `numpy.ndarray`, (K, 2)
        (x, y), refined with a parabola through the neighbouring pixels along each axis, brightest first.
    """
    significance = np.asarray(significance, dtype=np.float64)
    candidates = significance > threshold
    if footprint is not None:
        candidates &= np.asarray(footprint, dtype=bool)
    if not candidates.any():
        return np.empty((0, 2))
    highest = ndimage.maximum_filter(significance, size=3, mode="constant", cval=-np.inf)
    y, x = np.nonzero(candidates & (significance == highest))
    # Brightest first; the position breaks ties, so that the order never depends on the sort.
    order = np.lexsort((x, y, -significance[y, x]))
    y, x = y[order], x[order]
    peaks = np.stack([x + _parabola(significance, y, x, 1), y + _parabola(significance, y, x, 0)], axis=1)
    keep = np.ones(len(peaks), dtype=bool)
    taken = np.zeros((0, 2)) if existing is None else np.asarray(existing, dtype=float)
    if len(taken):
        distance, _ = cKDTree(taken).query(peaks)
        keep &= distance >= min_separation
    # The closed side of this condition also drops all but one pixel of a plateau.
    for i, near in enumerate(cKDTree(peaks).query_ball_point(peaks, max(min_separation, 1.5))):
        if keep[i]:
            later = [j for j in near if j > i]
            keep[later] = False
    return peaks[keep]


def _parabola(image: NDArray, y: NDArray, x: NDArray, axis: int) -> NDArray[np.float64]:
    """Offset of the maximum of the parabola through three pixels along an axis, within half a pixel."""
    length = image.shape[axis]
    position = (y, x)[axis]
    inside = (position > 0) & (position < length - 1)
    step = np.where(inside, 1, 0)
    before = image[y - step, x] if axis == 0 else image[y, x - step]
    after = image[y + step, x] if axis == 0 else image[y, x + step]
    curvature = before - 2.0 * image[y, x] + after
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = 0.5 * (before - after) / curvature
    return np.where(inside & (curvature < 0), np.clip(np.nan_to_num(offset), -0.5, 0.5), 0.0)
