# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Joint fluxes of overlapping sources at given shapes: the mathematics."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

__all__ = ["MIN_COVERAGE", "joint_fluxes"]

MIN_COVERAGE = 0.01
"""Part of a model's squared shape that must lie on valid pixels for its flux to count as measured: where
only far wings are valid, it would be a wild extrapolation."""


def joint_fluxes(
    normal: NDArray[np.float64],
    rhs: NDArray[np.float64],
    prior: NDArray[np.float64],
    prior_weight: float,
    *,
    negative: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve for the fluxes of overlapping sources.

    Minimises f^T N f - 2 b^T f + w sum_i N_ii (f_i - p_i)^2, over f >= 0 by default, in each band, N and b
    being the normal matrix and right-hand side of weighted linear least squares, p the prior and w its
    weight.

    Parameters
    ----------
    normal : `numpy.ndarray`, (B, K, K)
        Sums over pixels of products of two shapes over the variance.
    rhs : `numpy.ndarray`, (B, K)
        Sums over pixels of shape times image over the variance.
    prior : `numpy.ndarray`, (B, K)
        Fluxes to fall back on where the data do not tell, nJy; NaN for none.
    prior_weight : `float`
        Weight of the prior relative to that of the data.
    negative : `bool`, optional
        Whether fluxes may be negative.

    Returns
    -------
    flux, error : `numpy.ndarray`, (B, K)
        Fluxes and standard deviations, nJy. Those of a source at zero are conditional on its neighbours. Both
        are NaN for a source without data, or whose sums are not finite.
    """
    diagonal = np.diagonal(normal, axis1=1, axis2=2)
    data = (diagonal > 0) & np.isfinite(diagonal) & np.isfinite(rhs)
    # In units of each source's own error the matrix has a unit diagonal. A source without data is one by
    # itself.
    scale = 1.0 / np.sqrt(np.where(data, diagonal, 1.0))
    known = np.isfinite(prior)
    weight = np.where(known, prior_weight, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        matrix = normal * scale[:, :, None] * scale[:, None, :]
        vector = rhs * scale + weight * np.where(known, prior, 0.0) / scale
    matrix = np.where(data[:, :, None] & data[:, None, :] & np.isfinite(matrix), matrix, 0.0)
    vector = np.where(data, vector, 0.0)
    # A source without a prior still needs a ridge, lest a coincident one makes the matrix singular.
    index = np.arange(normal.shape[1])
    matrix[:, index, index] = 1.0 + np.maximum(weight, 1e-9)
    deviation = np.ones(matrix.shape[:2])
    try:
        inverse = np.linalg.inv(matrix)
        solution = np.einsum("bij,bj->bi", inverse, vector)
        spread = np.diagonal(inverse, axis1=1, axis2=2)
        # Where the plain solution has no negative flux it is the non-negative one.
        plain = ((solution >= 0).all(axis=1) | negative) & (spread > 0).all(axis=1)
        deviation[plain] = np.sqrt(spread[plain])
    except np.linalg.LinAlgError:
        solution, plain = np.zeros_like(vector), np.zeros(len(vector), bool)
    for band in np.flatnonzero(~plain):
        solution[band], deviation[band] = _nonnegative(matrix[band], vector[band])
    return np.where(data, solution * scale, np.nan), np.where(data, deviation * scale, np.nan)


def _nonnegative(matrix: NDArray, vector: NDArray) -> tuple[NDArray, NDArray]:
    """Minimise x^T M x / 2 - v^T x over x >= 0, M with unit diagonal; return x and standard deviations."""
    try:
        factor = scipy.linalg.cholesky(matrix, check_finite=False)
    except np.linalg.LinAlgError:
        # Rounding in the sums over pixels can leave an eigenvalue of a near-coincident pair below zero.
        values, vectors = np.linalg.eigh(matrix)
        matrix = (vectors * np.maximum(values, 1e-6)) @ vectors.T
        factor = scipy.linalg.cholesky(matrix, check_finite=False)
    half = scipy.linalg.solve_triangular(factor, vector, trans=1, check_finite=False)
    solution, _ = scipy.optimize.nnls(factor, half, maxiter=10 * len(vector) + 100)
    deviation = np.ones(len(vector))
    positive = solution > 0
    inverse = np.linalg.inv(matrix[np.ix_(positive, positive)])
    deviation[positive] = np.sqrt(np.diagonal(inverse))
    return solution, deviation
