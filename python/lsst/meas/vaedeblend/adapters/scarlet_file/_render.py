# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of scarlet models, in their own frame and as the coadd shows them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...ground.psf import convolve_to_observed, fft_size, matching_kernel_ft
from ...scene import PsfGrid
from ._records import ScarletModels, ScarletSource

__all__ = ["render"]


def render(
    models: ScarletModels,
    source: ScarletSource,
    *,
    observed: bool = False,
    psf: ArrayLike | None = None,
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Render a source.

    Parameters
    ----------
    models : `ScarletModels`
        The file's content, for the bands and PSFs.
    source : `ScarletSource`
        One of its sources.
    observed : `bool`, optional
        Whether to render the source as the coadd shows it, rather than in the model frame.
    psf : array_like, (B, h, w), optional
        The observed PSF, instead of the file's own at the source's peak. Bands without one in the file's
        cells render as 0.

    Returns
    -------
    image : `numpy.ndarray`, (B, h, w)
        The source, nJy, float32. As observed its box is the model's, grown by the radius of the PSF.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the image's pixel [0, 0].

    Raises
    ------
    ValueError
        Raised if the source has no component, or the PSF is not one per band with odd sides.
    """
    if not source.components:
        raise ValueError(f"Source {source.id} has no component to render.")
    y0, x0, y1, x1 = source.box()
    image = np.zeros((len(models.bands), y1 - y0, x1 - x0), np.float32)
    for component in source.components:
        (y, x), (h, w) = component.origin, component.shape
        image[:, y - y0 : y - y0 + h, x - x0 : x - x0 + w] += component.image()
    if not observed:
        return image, (y0, x0)
    if psf is not None:
        stamps = np.asarray(psf, np.float64)
    elif isinstance(models.psf, PsfGrid):
        peak_y, peak_x = source.components[0].peak
        stamps = np.nan_to_num(models.psf.filled().stamps[int(models.psf.index(peak_x, peak_y))])
    else:
        stamps = models.psf.astype(np.float64)
    if stamps.ndim != 3 or len(stamps) != len(models.bands):
        raise ValueError(f"PSFs of {stamps.shape} do not go with the bands {list(models.bands)}.")
    grow_y, grow_x = stamps.shape[1] // 2, stamps.shape[2] // 2
    image = np.pad(image, ((0, 0), (grow_y, grow_y), (grow_x, grow_x)))
    largest = max(*stamps.shape[1:], *models.model_psf.shape)
    kernels = matching_kernel_ft(stamps, models.model_psf[None], fft_size(max(image.shape[1:]), largest))
    kernels[~stamps.any(axis=(1, 2))] = 0.0
    return convolve_to_observed(image[None], kernels)[0], (y0 - grow_y, x0 - grow_x)
