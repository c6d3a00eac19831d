# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Parents from a detection mask and a list of given peaks."""

from __future__ import annotations

__all__ = ["parents_from_peaks"]

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..scene import Parent, assign_peaks, find_parents


def parents_from_peaks(
    detected: NDArray[np.bool_], peaks: ArrayLike, groups: ArrayLike | None = None, *, radius: float = 5.0
) -> list[Parent]:
    """Make parents such that every given peak belongs to exactly one.

    A peak on a pixel that is not detected brings a disk of its own, so that it becomes a parent or, where the
    disk touches a detected region, a member of that one, and is solved for together with it. Regions without
    any given peak keep none.

    Parameters
    ----------
    detected : `numpy.ndarray`, (H, W)
        Detected pixels, united over bands.
    peaks : array_like, (N, 2)
        Peak positions (x, y) in scene coordinates, pixel. One outside the scene gets a parent of its own.
    groups : array_like, (N,), optional
        Blend identifier of each peak: regions that hold peaks of one group become one parent.
    radius : `float`, optional
        Radius of the disk around a peak that is not detected, pixel.

    Returns
    -------
    parents : `list` [`lsst.meas.vaedeblend.scene.Parent`]
        Parents whose footprints do not overlap, with their peaks.

    Raises
    ------
    ValueError
        Raised when a peak position is not finite, or ``groups`` has another length than ``peaks``.
    """
    peaks = np.asarray(peaks, float).reshape(-1, 2)
    if not np.isfinite(peaks).all():
        raise ValueError(f"{(~np.isfinite(peaks).all(axis=1)).sum()} given peaks have no finite position.")
    height, width = detected.shape
    column, row = np.rint(peaks).astype(int).T
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)

    mask = detected.copy()
    reach = int(np.ceil(radius))
    for i in np.flatnonzero(inside):
        if detected[row[i], column[i]]:
            continue
        y0, x0 = max(row[i] - reach, 0), max(column[i] - reach, 0)
        box = mask[y0 : row[i] + reach + 1, x0 : column[i] + reach + 1]
        yy, xx = np.ogrid[y0 : y0 + box.shape[0], x0 : x0 + box.shape[1]]
        box |= (yy - row[i]) ** 2 + (xx - column[i]) ** 2 <= radius**2

    parents = find_parents(mask)
    if groups is not None:
        groups = np.asarray(groups)
        if len(groups) != len(peaks):
            raise ValueError(f"{len(groups)} parent identifiers for {len(peaks)} peaks.")
        parents = _merge(parents, mask.shape, row[inside], column[inside], groups[inside])
    return assign_peaks(parents, peaks, mask.shape)


def _merge(parents: list[Parent], shape: tuple[int, int], row: NDArray, column: NDArray, groups: NDArray):
    """Unite parents that hold peaks of one group; all peaks lie on a footprint."""
    if not len(groups):
        return parents
    labels = np.zeros(shape, int)
    for number, parent in enumerate(parents):
        window, footprint = parent.window(shape)
        labels[window][footprint] = number
    # Parents and groups are the nodes of a graph, peaks its edges: what is connected is one blend.
    owner = labels[row, column]
    _, group = np.unique(groups, return_inverse=True)
    size = len(parents) + group.max() + 1
    graph = coo_array((np.ones(len(owner)), (owner, len(parents) + group)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    _, united = np.unique(component[: len(parents)], return_inverse=True)
    for number, parent in enumerate(parents):
        window, footprint = parent.window(shape)
        labels[window][footprint] = united[number] + 1
    return [
        Parent(number, box[0].start, box[1].start, labels[box] == number)
        for number, box in enumerate(ndimage.find_objects(labels), start=1)
    ]
