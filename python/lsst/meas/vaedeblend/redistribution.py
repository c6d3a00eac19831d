# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The image shared out among the sources."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .ground.cutouts import add_cutouts, cut_out
from .scene import Scene
from .sources import SourceModels

__all__ = ["redistribute"]


def redistribute(
    scene: Scene, models: SourceModels, footprints: bool = True, rows: ArrayLike | None = None
) -> NDArray[np.float32]:
    """Share out the image among the sources in proportion to their models.

    Each pixel's value is divided as the positive parts of the models there are, so that no flux is lost where
    any model has some; what measurement sees of scarlet's models is made the same way (Melchior et al. 2018,
    Astronomy and Computing 24, 129).

    Parameters
    ----------
    scene : `Scene`
        The scene; it must have the models' bands.
    models : `SourceModels`
        The sources.
    footprints : `bool`, optional
        Whether a source's image ends at its parent's footprint. Beyond it the models are faint and would
        share out noise.
    rows : array_like, (N,), optional
        Rows of the sources whose images are wanted, all by default.

    Returns
    -------
    images : `numpy.ndarray`, (N, B, S, S)
        Images of the sources as observed, nJy, on the models' cutouts; 0 in invalid pixels.

    Raises
    ------
    ValueError
        Raised if the scene lacks a band of the models, or a parent.
    """
    scene = scene.reordered(models.bands)
    size, corner = models.images.size, np.column_stack([models.corner_y, models.corner_x])
    wanted = np.arange(len(models)) if rows is None else np.atleast_1d(np.asarray(rows, np.int64))
    around = np.arange(len(models))
    if rows is not None:
        # Only what lies on the same pixels has a share of them.
        apart = np.abs(corner[:, None] - corner[wanted]).max(axis=2)
        around = np.flatnonzero((apart < size).any(axis=1))
    share = np.maximum(models.images.observed(around), 0.0)
    (y, x), parent = corner[around].T, models.parent[around]
    if footprints:
        parents = {parent.id: parent for parent in scene.parents}
        inside = np.zeros((1, *scene.shape), bool)
        for number in np.unique(parent):
            own = np.flatnonzero(parent == number)
            if int(number) not in parents:
                raise ValueError(f"The models have a parent {number} that the scene does not have.")
            window, footprint = parents[int(number)].window(scene.shape)
            inside[0][window] = footprint
            share[own] *= cut_out(inside, y[own], x[own], size)
            inside[0][window] = False
    total = np.zeros(scene.image.shape, np.float32)
    add_cutouts(total, share, y, x)
    ratio = np.divide(scene.image, total, out=np.zeros_like(total), where=total > 0)
    place = np.searchsorted(around, wanted)
    return share[place] * cut_out(ratio, y[place], x[place], size)
