# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which parents are too large, crowded or damaged to be deblended; names and meaning are scarlet's."""

from __future__ import annotations

__all__ = ["LimitsConfig", "axis_ratio", "skip_reasons", "why_skipped", "with_skipped"]

from collections.abc import Mapping, Sequence

import numpy as np
from lsst.pex.config import Config, DictField, Field
from numpy.typing import NDArray

from ..ground.flags import PARENT_FLAGS, SKIP_FLAGS
from ..scene import Parent, Scene
from ..sources import ParentSummary


class LimitsConfig(Config):
    """Limits beyond which a parent is not deblended; a limit that is not positive is none.

    A parent with one given peak is one object, which needs no splitting: limits do not concern it.
    """

    maxNumberOfPeaks = Field[int](
        doc=(
            "Most given peaks of a parent; one with more is skipped. Where peaks are found, deblend.maxPeaks "
            "bounds their number."
        ),
        default=600,
    )
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
            "single pixel is too much. Names are those of afw or of lsst.images; planes that the coadds do "
            "not have are passed over."
        ),
        default={},
    )


def why_skipped(
    parent: Parent, n_peaks: int, masks: Mapping[str, NDArray[np.bool_]], config: LimitsConfig
) -> str | None:
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


def skip_reasons(
    scene: Scene, masks: Mapping[str, NDArray[np.bool_]], config: LimitsConfig
) -> dict[int, str]:
    """Find the parents of a scene that are not deblended.

    Parameters
    ----------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene with its parents.
    masks : mapping of `str` to `numpy.ndarray`, (H, W)
        Where each plane of ``config.maskLimits`` is set in any band.
    config : `LimitsConfig`
        The limits.

    Returns
    -------
    reasons : `dict` [`int`, `str`]
        Id of each such parent to the reason, a key of `~lsst.meas.vaedeblend.ground.flags.SKIP_FLAGS`: it is
        beyond a limit, or has no pixel that can be used.
    """
    usable = _usable(scene).any(axis=0)
    reasons = {}
    for parent in scene.parents:
        if len(parent.peaks) == 1:
            continue
        reason = why_skipped(parent, len(parent.peaks), masks, config)
        window, inside = parent.window(scene.shape)
        # Of a parent beside the image the deblender says so itself.
        if reason is None and inside.any() and not usable[window][inside].any():
            reason = "masked"
        if reason is not None:
            reasons[parent.id] = reason
    return reasons


def _usable(scene: Scene) -> NDArray[np.bool_]:
    """Pixels with data in bands with a PSF, (B, H, W)."""
    return scene.valid & scene.psf.valid.any(axis=0)[:, None, None]


def with_skipped(
    summary: ParentSummary,
    scene: Scene,
    parents: Sequence[Parent],
    reasons: Mapping[int, str],
    cutout_size: int,
) -> ParentSummary:
    """Add the parents that were not deblended to the summary of those that were.

    Parameters
    ----------
    summary : `lsst.meas.vaedeblend.sources.ParentSummary`
        What the deblender says.
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene.
    parents : sequence of `lsst.meas.vaedeblend.scene.Parent`
        All parents, in order.
    reasons : mapping of `int` to `str`
        Ids of the parents that were skipped and why, see `skip_reasons`.
    cutout_size : `int`
        Width of the network's cutout, pixel.

    Returns
    -------
    summary : `lsst.meas.vaedeblend.sources.ParentSummary`
        All of them. Besides the deblender's flags there is one for each reason, ``skipped_`` and its name.
    """
    n, done = len(parents), np.array([parent.id not in reasons for parent in parents], bool)
    if int(done.sum()) != len(summary):
        raise ValueError(f"{len(summary)} parents were deblended, {int(done.sum())} should have been.")
    pixels, chi2 = np.zeros(n, np.int64), np.zeros(n)
    flags = {name: np.zeros(n, bool) for name in PARENT_FLAGS}
    usable = _usable(scene)
    for i in np.flatnonzero(~done).tolist():
        parent = parents[i]
        window, inside = parent.window(scene.shape)
        valid = usable[:, *window] & inside
        pixels[i] = np.count_nonzero(valid)
        square = scene.image[:, *window].astype(float) ** 2 * scene.weight[:, *window]
        chi2[i] = square[valid].sum()
        flags["masked"][i] = not valid.any()
        flags["incomplete_data"][i] = not valid[:, inside].all() or inside.sum() < parent.area
        flags["parent_too_big"][i] = max(parent.footprint.shape) > cutout_size
    flags |= {
        f"skipped_{name}": np.array([reasons.get(parent.id) == name for parent in parents], bool)
        for name in SKIP_FLAGS
    }
    for name, values in summary.flags.items():
        flags.setdefault(name, np.zeros(n, bool))[done] = values

    def merged(theirs: NDArray, mine: NDArray) -> NDArray:
        out = np.array(mine, dtype=theirs.dtype)
        out[done] = theirs
        return out

    return ParentSummary(
        origin=scene.origin,
        id=np.array([parent.id for parent in parents], np.int64),
        x0=np.array([parent.x0 for parent in parents], np.int64),
        y0=np.array([parent.y0 for parent in parents], np.int64),
        width=np.array([parent.footprint.shape[1] for parent in parents], np.int64),
        height=np.array([parent.footprint.shape[0] for parent in parents], np.int64),
        area=np.array([parent.area for parent in parents], np.int64),
        n_peaks=merged(summary.n_peaks, np.array([len(parent.peaks) for parent in parents], np.int64)),
        n_child=merged(summary.n_child, np.zeros(n, np.int64)),
        iterations=merged(summary.iterations, np.zeros(n, np.int64)),
        n_pixels=merged(summary.n_pixels, pixels),
        chi2_start=merged(summary.chi2_start, chi2),
        chi2=merged(summary.chi2, chi2),
        flags=flags,
    )


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
