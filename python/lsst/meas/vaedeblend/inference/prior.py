# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The prior of the latents: normal, with a wall around what the decoder has seen.

Latents are whitened, so that galaxies of the training lie about the square root of the number of latents
from the origin, and hardly any twice as far. Data of a high signal-to-noise ratio would drag them many times
as far, for details that no decoder draws, and what is drawn out there is no galaxy any more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["prior_derivatives", "prior_penalty"]

_STEEPNESS = 20.0
"""Penalty of a latent one standard deviation beyond the wall, squared for those farther out."""


def _radius(latent: NDArray, wall: float) -> NDArray[np.float64]:
    """Where the wall stands: so many times as far out as latents typically are."""
    return wall * np.sqrt(latent.shape[-1])


def prior_penalty(latent: NDArray, precision: float, wall: float) -> NDArray[np.float64]:
    """Compute minus twice the log prior of latents, up to constants.

    Parameters
    ----------
    latent : `numpy.ndarray`, (K, L)
        Latents.
    precision : `float`
        Precision of the normal distribution.
    wall : `float`
        Distance from the origin at which the wall begins, in units of the root of L.

    Returns
    -------
    penalty : `numpy.ndarray`, (K,)
        The sum of precision times |z|^2 and, beyond the wall at R, of 20 (|z| - R)^2.
    """
    norm = np.sqrt((latent**2).sum(axis=-1))
    return precision * norm**2 + _STEEPNESS * np.maximum(norm - _radius(latent, wall), 0.0) ** 2


def prior_derivatives(
    latent: NDArray, precision: float, wall: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Differentiate half of `prior_penalty`.

    Parameters
    ----------
    latent, precision, wall
        See `prior_penalty`.

    Returns
    -------
    slope : `numpy.ndarray`, (K, L)
        First derivatives.
    curvature : `numpy.ndarray`, (K, L, L)
        Second derivatives.
    """
    k, length = latent.shape
    norm = np.sqrt((latent**2).sum(axis=-1))
    beyond = np.maximum(norm - _radius(latent, wall), 0.0)
    unit = latent / np.maximum(norm, 1e-12)[:, None]
    slope = precision * latent + _STEEPNESS * beyond[:, None] * unit
    curvature = np.tile(precision * np.eye(length), (k, 1, 1))
    outside = beyond > 0
    curvature[outside] += _STEEPNESS * unit[outside, :, None] * unit[outside, None, :]
    # Across the radius the wall bends with the distance beyond it.
    across = np.eye(length) - unit[outside, :, None] * unit[outside, None, :]
    curvature[outside] += (_STEEPNESS * beyond[outside] / norm[outside])[:, None, None] * across
    return slope, curvature
