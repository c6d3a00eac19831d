# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""A simple source detection for images that come without a DETECTED mask plane."""

from __future__ import annotations

__all__ = ["detection_mask", "psf_sigma"]

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from ..ground.peaks import detection_image
from ..ground.psf import adaptive_moments, moments_sigma


def psf_sigma(stamps: ArrayLike) -> NDArray[np.float64]:
    """Return the width of PSFs, the fourth root of the determinant of their adaptive moments, pixel.

    Parameters
    ----------
    stamps : array_like, (..., h, w)
        PSF images.

    Returns
    -------
    sigma : `numpy.ndarray`, (...)
    """
    return moments_sigma(adaptive_moments(stamps))


def detection_mask(
    image: NDArray,
    variance: NDArray,
    valid: NDArray[np.bool_],
    sigma: ArrayLike,
    *,
    threshold: float = 5.0,
    grow: float = 2.4,
) -> NDArray[np.bool_]:
    """Detect sources in every band by itself.

    As the pipelines do it: the image is filtered with a Gaussian as wide as the PSF, pixels whose filtered
    value exceeds ``threshold`` standard deviations are kept, and the regions they form are grown by ``grow``
    times the PSF's width. There is no deblending and no background estimate.

    Parameters
    ----------
    image, variance : `numpy.ndarray`, (B, H, W)
        Images, nJy, and variances, nJy^2.
    valid : `numpy.ndarray`, (B, H, W)
        Pixels that may be used.
    sigma : array_like, (B,)
        Width of the PSF, pixel.
    threshold : `float`, optional
        Detection threshold, standard deviations.
    grow : `float`, optional
        Growth of the regions, in units of the PSF's width.

    Returns
    -------
    detected : `numpy.ndarray`, (B, H, W)
        Detected pixels per band.
    """
    sigma = np.broadcast_to(np.asarray(sigma, float), len(image))
    detected = np.zeros(image.shape, bool)
    for b in range(len(image)):
        one = slice(b, b + 1)
        significant = detection_image(image[one], variance[one], valid[one], sigma[one]) > threshold
        # Pixels within the distance of a significant one; without any the transform would count from the
        # border.
        if significant.any():
            detected[b] = ndimage.distance_transform_edt(~significant) <= grow * sigma[b]
    return detected
