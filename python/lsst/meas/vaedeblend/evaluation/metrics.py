# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Numbers that say how well deblending went."""

from __future__ import annotations

__all__ = ["ksb_shape", "match", "nmad", "reduced_chi2", "run_seconds", "stamp_snr"]

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import galsim
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment


def nmad(values: ArrayLike) -> float:
    """Return 1.4826 times the median absolute deviation from the median, which for a Gaussian is its sigma.

    NaN without any value.
    """
    values = np.asarray(values, float)
    if not values.size:
        return np.nan
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


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


def stamp_snr(stamps: ArrayLike, variance: ArrayLike) -> NDArray[np.float64]:
    """Return the signal-to-noise ratio of stamps for an optimal filter, sqrt(sum(stamp^2 / variance)).

    Parameters
    ----------
    stamps, variance : array_like, (..., h, w)
        Noiseless images, nJy, and variances, nJy^2.

    Returns
    -------
    snr : `numpy.ndarray`, (...)
    """
    return np.sqrt((np.asarray(stamps, float) ** 2 / variance).sum(axis=(-2, -1)))


def ksb_shape(image: ArrayLike, psf: ArrayLike) -> tuple[float, float]:
    """Measure a source's shape with the KSB method of `galsim.hsm` (Kaiser, Squires & Broadhurst 1995).

    Parameters
    ----------
    image, psf : array_like, (h, w)
        Noiseless image of the source, any unit, and the PSF it was seen through.

    Returns
    -------
    g1, g2 : `float`
        Reduced-shear ellipticity, corrected for the PSF; NaN where the measurement fails.
    """
    result = galsim.hsm.EstimateShear(
        galsim.Image(np.ascontiguousarray(image, np.float32)),
        galsim.Image(np.ascontiguousarray(psf, np.float32)),
        shear_est="KSB",
        strict=False,
    )
    # hsm marks a failed correction with -10.
    if result.error_message or result.corrected_g1 < -5:
        return np.nan, np.nan
    return result.corrected_g1, result.corrected_g2


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
