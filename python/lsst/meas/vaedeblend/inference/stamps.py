# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of sources, each on a square of its own width."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stamps"]


class Stamps:
    """A list of images (B, W, W) whose widths differ; images of one width lie side by side.

    Parameters
    ----------
    bands : `int`
        Number of bands B.

    Attributes
    ----------
    width : `numpy.ndarray`, (N,)
        Width of each image, pixel; 0 where there is none.
    slot : `numpy.ndarray`, (N,)
        Place of each one among the images of its width.
    """

    def __init__(self, bands: int) -> None:
        self._bands = bands
        self._pools: dict[int, NDArray[np.float32]] = {}
        self._used: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self.width: NDArray[np.int64] = np.empty(0, np.int64)
        self.slot: NDArray[np.int64] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.width)

    def extend(self, n: int) -> None:
        """Add n rows without an image."""
        self.width = np.concatenate([self.width, np.zeros(n, np.int64)])
        self.slot = np.concatenate([self.slot, np.zeros(n, np.int64)])

    def pool(self, width: int) -> NDArray[np.float32]:
        """All images of one width, (M, B, width, width); ``slot`` tells whose is where."""
        return self._pools[width]

    def by_width(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Sort rows that have an image by their widths.

        Yields
        ------
        width : `int`
            A width.
        index : `numpy.ndarray`
            Indices into ``rows`` of those that have it.
        """
        widths = self.width[rows]
        for width in np.unique(widths).tolist():
            if width > 0:
                yield width, np.flatnonzero(widths == width)

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copies of the images of rows that have one width, (K, B, width, width)."""
        return self._pools[int(self.width[rows[0]])][self.slot[rows]]

    def set(self, rows: NDArray[np.int64], images: NDArray[np.float32]) -> None:
        """Give rows images of one width; the old ones are forgotten."""
        if not len(rows):
            return
        width = images.shape[-1]
        moved = rows[self.width[rows] != width]
        if len(moved):
            self.clear(moved)
            self.slot[moved] = self._take(width, len(moved))
            self.width[moved] = width
        self._pools[width][self.slot[rows]] = images

    def clear(self, rows: NDArray[np.int64]) -> None:
        """Forget the images of rows."""
        for width, index in self.by_width(rows):
            self._free[width].extend(self.slot[rows[index]].tolist())
        self.width[rows] = 0

    def _take(self, width: int, n: int) -> NDArray[np.int64]:
        """Find places for n images."""
        if width not in self._pools:
            self._pools[width] = np.empty((0, self._bands, width, width), np.float32)
            self._used[width], self._free[width] = 0, []
        free = self._free[width]
        old = [free.pop() for _ in range(min(n, len(free)))]
        start = self._used[width]
        stop = start + n - len(old)
        pool = self._pools[width]
        if stop > len(pool):
            # Half as much again each time, so that growth costs little altogether.
            grown = np.empty((max(stop, len(pool) * 3 // 2), *pool.shape[1:]), np.float32)
            grown[:start] = pool[:start]
            self._pools[width] = grown
        self._used[width] = stop
        return np.concatenate([np.array(old, np.int64), np.arange(start, stop)])
