# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Square cutouts of images, which may hang over the border: the geometry, and taking them out and in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["add_cutouts", "cut_out", "nearest_pixel", "overlaps"]

FARTHEST = 1 << 40
"""Pixels beyond which positions, which may be anywhere, are not told apart: integers that can be added to."""


def nearest_pixel(position: ArrayLike) -> NDArray[np.int64]:
    """Find the pixels that positions lie in.

    Parameters
    ----------
    position : array_like
        Positions, pixel. Pixel n covers n - 0.5 to n + 0.5.

    Returns
    -------
    pixel : `numpy.ndarray`
        Indices, at most `FARTHEST` from 0.
    """
    return np.clip(np.floor(np.asarray(position, float) + 0.5), -FARTHEST, FARTHEST).astype(np.int64)


def overlaps(
    corner_y: ArrayLike, corner_x: ArrayLike, size: int, shape: tuple[int, int]
) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """Match cutouts with an image.

    Parameters
    ----------
    corner_y, corner_x : array_like, (N,)
        The pixel of the image on which pixel [0, 0] of each cutout lies.
    size : `int`
        Width of the cutouts, pixel.
    shape : `tuple` [`int`]
        (H, W) of the image.

    Yields
    ------
    index : `int`
        Number of a cutout that has a pixel on the image.
    outer, inner : `tuple` [`slice`]
        The common window in the image and in the cutout.
    """
    for i, (y, x) in enumerate(
        zip(np.asarray(corner_y).tolist(), np.asarray(corner_x).tolist(), strict=True)
    ):
        y1, y2 = max(y, 0), min(y + size, shape[0])
        x1, x2 = max(x, 0), min(x + size, shape[1])
        if y1 < y2 and x1 < x2:
            yield i, (slice(y1, y2), slice(x1, x2)), (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))


def add_cutouts(total: NDArray, cutouts: NDArray, corner_y: ArrayLike, corner_x: ArrayLike) -> None:
    """Add cutouts to an image, in place.

    Parameters
    ----------
    total : `numpy.ndarray`, (B, H, W)
        The image.
    cutouts : `numpy.ndarray`, (N, B, S, S)
        What to add; parts beyond the image's border are left out.
    corner_y, corner_x : array_like, (N,)
        The pixel of the image on which pixel [0, 0] of each cutout lies.
    """
    for i, outer, inner in overlaps(corner_y, corner_x, cutouts.shape[-1], total.shape[-2:]):
        total[:, *outer] += cutouts[i][:, *inner]


def cut_out(image: NDArray, corner_y: ArrayLike, corner_x: ArrayLike, size: int) -> NDArray:
    """Cut squares out of an image.

    Parameters
    ----------
    image : `numpy.ndarray`, (B, H, W)
        The image.
    corner_y, corner_x : array_like, (N,)
        The pixel of the image for pixel [0, 0] of each cutout.
    size : `int`
        Width S of the cutouts, pixel.

    Returns
    -------
    cutouts : `numpy.ndarray`, (N, B, S, S)
        The cutouts, 0 beyond the image's border.
    """
    out = np.zeros((len(np.asarray(corner_y)), len(image), size, size), image.dtype)
    for i, outer, inner in overlaps(corner_y, corner_x, size, image.shape[-2:]):
        out[i][:, *inner] = image[:, *outer]
    return out
