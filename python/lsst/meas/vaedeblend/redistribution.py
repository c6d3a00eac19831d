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
    images : `numpy.ndarray`, (N, B, W, W)
        Images of the sources as observed, nJy, on the models' squares (`SourceModels.corners`); 0 in invalid
        pixels.

    Raises
    ------
    ValueError
        Raised if the scene lacks a band of the models, or a parent.
    """
    scene = scene.reordered(models.bands)
    wanted = np.arange(len(models)) if rows is None else np.atleast_1d(np.asarray(rows, np.int64))
    around = np.arange(len(models))
    if rows is not None:
        # Only what lies on the same pixels has a share of them.
        width = models.images.width
        middle = np.column_stack([models.corner_y, models.corner_x]) + width[:, None] // 2
        apart = np.abs(middle[:, None] - middle[wanted]).max(axis=2)
        reach = (width[:, None] + width[wanted]) // 2 + 1
        around = np.flatnonzero((apart < reach).any(axis=1))
    own, place = np.unique(wanted, return_inverse=True)
    others = np.setdiff1d(around, own)
    share = _shares(scene, models, own, footprints)
    total = np.zeros(scene.image.shape, np.float32)
    add_cutouts(total, share, *models.corners(own))
    add_cutouts(total, _shares(scene, models, others, footprints), *models.corners(others))
    ratio = np.divide(scene.image, total, out=np.zeros_like(total), where=total > 0)
    share *= cut_out(ratio, *models.corners(own), share.shape[-1])
    return share if rows is None else share[place]


def _shares(
    scene: Scene, models: SourceModels, rows: NDArray[np.int64], footprints: bool
) -> NDArray[np.float32]:
    """Positive parts of models, by which they share, (K, B, W, W)."""
    share = np.maximum(models.images.observed(rows), 0.0)
    if not footprints:
        return share
    (y, x), parent = models.corners(rows), models.parent[rows]
    parents = {parent.id: parent for parent in scene.parents}
    inside = np.zeros((1, *scene.shape), bool)
    for number in np.unique(parent):
        own = np.flatnonzero(parent == number)
        if int(number) not in parents:
            raise ValueError(f"The models have a parent {number} that the scene does not have.")
        window, footprint = parents[int(number)].window(scene.shape)
        inside[0][window] = footprint
        share[own] *= cut_out(inside, y[own], x[own], share.shape[-1])
        inside[0][window] = False
    return share
