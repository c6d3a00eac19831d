# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers about samples and images that simulation, training and evaluation share."""

from __future__ import annotations

__all__ = ["nmad", "stamp_snr"]

import numpy as np
from numpy.typing import ArrayLike, NDArray


def nmad(values: ArrayLike) -> float:
    """Return 1.4826 times the median absolute deviation from the median, which for a Gaussian is its sigma.

    NaN without any value.
    """
    values = np.asarray(values, float)
    if not values.size:
        return np.nan
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


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
