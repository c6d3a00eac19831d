# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Detection of sources on coadds that come without a DETECTED mask plane."""

from __future__ import annotations

__all__ = ["Detection", "detect"]

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .noise import noise_correlation, noise_factor
from .peaks import find_peaks, significance_map
from .sky import BIN, binned, local_sky

# Rounds of noise and sky on the pixels that are free. In the last one what is faint and wide is not free
# either, sought with a filter so many times as wide; before, a sky that is not known yet would be that.
_WIDE = (None, None, 4.0)
# Limit for that, standard deviations: a false one costs some free pixels, a missed one is taken for sky.
_FAINT = 3.0
# Growth of what is not free, in units of the PSF's width.
_MARGIN = 4.0


@dataclasses.dataclass
class Detection:
    """What was detected, and on what ground.

    Attributes
    ----------
    detected : `numpy.ndarray`, (B, H, W)
        Detected pixels per band.
    peaks : `numpy.ndarray`, (K, 2)
        (x, y) of the peaks of all bands together on detected pixels, most significant first.
    sky, sky_error : `numpy.ndarray`, (B, H, W) float32
        The local sky that was subtracted, and its standard deviation, nJy.
    correlation : `numpy.ndarray`, (B, n, n)
        Correlation of the noise at lags (y, x).
    measured : `numpy.ndarray`, (B,)
        Whether it was measured; white noise is assumed otherwise.
    factor : `numpy.ndarray`, (B,)
        By how much it raises the variance of a point source's flux.
    """

    detected: NDArray[np.bool_]
    peaks: NDArray[np.float64]
    sky: NDArray[np.float32]
    sky_error: NDArray[np.float32]
    correlation: NDArray[np.float64]
    measured: NDArray[np.bool_]
    factor: NDArray[np.float64]


def detect(
    image: ArrayLike,
    variance: ArrayLike,
    valid: ArrayLike,
    psf_sigma: ArrayLike,
    *,
    threshold: float = 5.0,
    grow: float = 2.4,
    min_separation: float = 3.0,
) -> Detection:
    """Detect sources in every band by itself.

    As the pipelines do it (Bosch et al. 2018, PASJ 70, S5, section 4.7): the image is filtered with a
    Gaussian as wide as the PSF, pixels whose filtered value exceeds ``threshold`` standard deviations are
    kept, and the regions they form are grown by ``grow`` times the PSF's width. Before, the local sky is
    subtracted, and the standard deviation is that of noise which correlates as on the pixels without sources
    (`lsst.meas.vaedeblend.ground.noise`, `lsst.meas.vaedeblend.ground.sky`). These are found by a detection
    with a fainter limit for what is wide, in all bands together, and again with what was learnt from them.

    Parameters
    ----------
    image, variance : array_like, (B, H, W)
        Images, nJy, and variances of single pixels, nJy^2.
    valid : array_like, (B, H, W)
        Pixels that may be used.
    psf_sigma : array_like, (B,) or scalar
        Width of the PSF, pixel: `lsst.meas.vaedeblend.ground.psf.psf_sigma`.
    threshold : `float`, optional
        Detection threshold, standard deviations.
    grow : `float`, optional
        Growth of the regions, in units of the PSF's width.
    min_separation : `float`, optional
        Distance that peaks keep from brighter ones, pixel.

    Returns
    -------
    detection : `Detection`

    Raises
    ------
    ValueError
        Raised if shapes do not agree or a ``psf_sigma`` is not positive.
    """
    image, variance = np.asarray(image, np.float32), np.asarray(variance, np.float32)
    if image.ndim != 3 or variance.shape != image.shape or np.shape(valid) != image.shape:
        raise ValueError(
            f"Image, variance and valid should be (B, H, W), they are {image.shape}, {variance.shape} and "
            f"{np.shape(valid)}."
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        sound = np.asarray(valid, bool) & np.isfinite(image) & np.isfinite(variance) & (variance > 0)
        weight = np.where(sound, 1 / variance, np.float32(0)).astype(np.float32)
    image = np.where(sound, image, np.float32(0))
    sigma = np.broadcast_to(np.asarray(psf_sigma, float), len(image))
    correlation, measured = noise_correlation(image, weight, np.zeros(image.shape[1:], bool))
    sky = error = np.zeros_like(image)
    for wide in _WIDE:
        free = ~_occupied(image - sky, weight, sigma, correlation, threshold, wide)
        correlation, measured = noise_correlation(image, weight, free)
        sky, error = local_sky(image, weight, free, noise_factor(correlation, np.inf))
    factor = noise_factor(correlation, sigma)
    image -= sky
    # A weight that is less by the factor makes every error larger by its root.
    weight /= factor[:, None, None].astype(np.float32)
    detected = np.zeros(image.shape, bool)
    for b in range(len(image)):
        one = slice(b, b + 1)
        significant = significance_map(image[one], weight[one], sigma[one]) > threshold
        detected[b] = _grown(significant, grow * sigma[b])
    significance = significance_map(image, weight, sigma)
    peaks = find_peaks(significance, threshold, detected.any(axis=0), min_separation)
    return Detection(detected, peaks, sky, error, correlation, measured, factor)


def _occupied(
    image: NDArray,
    weight: NDArray,
    sigma: NDArray,
    correlation: NDArray,
    threshold: float,
    wide: float | None,
) -> NDArray[np.bool_]:
    """Pixels on or close to a source in any band, (H, W), with its faint outskirts if they are sought."""
    height, width = image.shape[1:]
    occupied = np.zeros((height, width), bool)
    for b in range(len(image)):
        near = noise_factor(correlation[b : b + 1], sigma[b])
        occupied |= significance_map(image[b : b + 1], weight[b : b + 1] / near, sigma[b]) > threshold
        if wide is None:
            continue
        far = noise_factor(correlation[b : b + 1], np.inf)
        # Of squares of pixels: their mean in units of the inverse variance, and the variance of that.
        w = binned(weight[b])
        mean = np.divide(binned(image[b] * weight[b]), w, out=np.zeros_like(w), where=w > 0)
        faint = significance_map(mean[None], BIN**2 * w[None] / far, wide * sigma[b] / BIN) > _FAINT
        occupied |= faint.repeat(BIN, 0).repeat(BIN, 1)[:height, :width]
    return _grown(occupied, _MARGIN * sigma.max())


def _grown(mask: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """Pixels within a distance of those of a mask."""
    # Without any the transform would count from the border.
    return ndimage.distance_transform_edt(~mask) <= distance if mask.any() else mask.copy()
