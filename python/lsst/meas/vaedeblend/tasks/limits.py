# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which parents are too large, crowded or damaged to be deblended; names and meaning are scarlet's."""

from __future__ import annotations

__all__ = ["LimitsConfig", "axis_ratio", "why_skipped"]

from collections.abc import Mapping

import numpy as np
from lsst.pex.config import Config, DictField, Field
from numpy.typing import NDArray

from ..scene import Parent


class LimitsConfig(Config):
    """Limits beyond which a parent is not deblended; a limit that is not positive is none."""

    maxNumberOfPeaks = Field[int](doc="Most peaks of a parent; one with more is skipped.", default=600)
    maxFootprintArea = Field[int](doc="Largest area of a footprint's bounding box, pixel.", default=2_000_000)
    maxAreaTimesPeaks = Field[int](
        doc="Largest product of the bounding box's area in pixels and the number of peaks.",
        default=1_000_000_000,
    )
    maxFootprintSize = Field[int](doc="Largest width or height of a footprint, pixel.", default=0)
    minFootprintAxisRatio = Field[float](
        doc="Smallest ratio of the axes of a footprint's second moments.", default=0.0
    )
    maskLimits = DictField[str, float](
        doc=(
            "Mask plane to the part of a footprint's pixels that may have it set in any band. With 0 a "
            "single pixel is too much. Planes that the coadds do not have are passed over."
        ),
        default={},
    )


def why_skipped(parent: Parent, n_peaks: int, masks: Mapping[str, NDArray[np.bool_]], config: LimitsConfig):
    """Find the limit that a parent is beyond.

    Parameters
    ----------
    parent : `lsst.meas.vaedeblend.scene.Parent`
        The parent.
    n_peaks : `int`
        Number of its peaks.
    masks : mapping of `str` to `numpy.ndarray`, (H, W)
        Where each plane of ``config.maskLimits`` is set in any band.
    config : `LimitsConfig`
        The limits.

    Returns
    -------
    reason : `str` or `None`
        Key of `~lsst.meas.vaedeblend.ground.flags.SKIP_FLAGS`, or nothing if the parent is within all limits.
    """
    height, width = parent.footprint.shape
    area = height * width
    if (
        0 < config.maxFootprintArea < area
        or 0 < config.maxFootprintSize < max(height, width)
        or 0 < config.maxAreaTimesPeaks < area * n_peaks
        or (config.minFootprintAxisRatio > 0 and axis_ratio(parent.footprint) < config.minFootprintAxisRatio)
    ):
        return "parentTooBig"
    for plane, limit in config.maskLimits.items():
        if plane in masks:
            window, inside = parent.window(masks[plane].shape)
            if (masks[plane][window] & inside).sum() > limit * parent.area:
                return "masked"
    if 0 < config.maxNumberOfPeaks < n_peaks:
        return "tooManyPeaks"
    return None


def axis_ratio(footprint: NDArray[np.bool_]) -> float:
    """Ratio of the minor to the major axis of a footprint's second moments.

    Parameters
    ----------
    footprint : `numpy.ndarray`, (h, w)
        Pixels that belong to it.

    Returns
    -------
    ratio : `float`
        Between 0 and 1; pixels count as squares, so that a line has a width.
    """
    y, x = np.nonzero(footprint)
    # The second moment of a square of width 1 about its centre is 1/12.
    covariance = np.cov(np.stack([y, x]), bias=True) + np.eye(2) / 12
    low, high = np.linalg.eigvalsh(covariance)
    return float(np.sqrt(low / high))
