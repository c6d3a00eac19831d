# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Moments of sums of Gaussians, without drawing them."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["adaptive_moments_of_gaussians"]


def adaptive_moments_of_gaussians(
    weight: ArrayLike,
    position: ArrayLike,
    covariance: ArrayLike,
    extra: float,
    max_iterations: int = 200,
    tolerance: float = 1e-7,
) -> NDArray[np.float64]:
    """Measure adaptive second moments of sums of Gaussians, many at once.

    What `lsst.meas.vaedeblend.ground.psf.adaptive_moments` measures on pixels, by the integrals of products
    of Gaussians: a Gaussian of mean m and covariance C times a weight of mean c and covariance M is one of
    covariance C (C + M)^-1 M and mean c + M (C + M)^-1 (m - c), with the integral exp(-(m - c)^T (C + M)^-1
    (m - c) / 2) sqrt(det M / det(C + M)).

    Parameters
    ----------
    weight : array_like, (N, G)
        Fluxes of the Gaussians, any unit.
    position : array_like, (N, G, 2)
        Their centres (x, y), pixel.
    covariance : array_like, (N, G, 3)
        Their second moments xx, xy, yy, pixel^2.
    extra : `float`
        Variance of a round Gaussian that all are seen through, pixel^2.
    max_iterations, tolerance
        See `lsst.meas.vaedeblend.ground.psf.adaptive_moments`.

    Returns
    -------
    moments : `numpy.ndarray`, (N, 3)
        Ixx, Iyy and Ixy, pixel^2. NaN where the iteration fails.
    """
    weight, position, covariance = (np.asarray(a, np.float64) for a in (weight, position, covariance))
    return _moments(weight, position, covariance, extra, max_iterations, tolerance)


@numba.njit(cache=True, nogil=True)
def _moments(
    weight: NDArray,
    position: NDArray,
    covariance: NDArray,
    extra: float,
    max_iterations: int,
    tolerance: float,
) -> NDArray:
    n, gaussians = weight.shape
    out = np.full((n, 3), np.nan)
    for k in range(n):
        mxx, myy, mxy, cx, cy = 4.0, 4.0, 0.0, 0.0, 0.0
        for _ in range(max_iterations):
            norm, sx, sy, sxx, sxy, syy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for g in range(gaussians):
                axx = covariance[k, g, 0] + extra
                axy = covariance[k, g, 1]
                ayy = covariance[k, g, 2] + extra
                txx, txy, tyy = axx + mxx, axy + mxy, ayy + myy
                det = txx * tyy - txy * txy
                dx, dy = position[k, g, 0] - cx, position[k, g, 1] - cy
                ux, uy = (tyy * dx - txy * dy) / det, (txx * dy - txy * dx) / det
                light = weight[k, g] * np.exp(-0.5 * (dx * ux + dy * uy)) / np.sqrt(det)
                x, y = mxx * ux + mxy * uy, mxy * ux + myy * uy
                # M - M (C + M)^-1 M
                vx, vy = (tyy * mxx - txy * mxy) / det, (txx * mxy - txy * mxx) / det
                wx, wy = (tyy * mxy - txy * myy) / det, (txx * myy - txy * mxy) / det
                norm += light
                sx += light * x
                sy += light * y
                sxx += light * (mxx - mxx * vx - mxy * vy + x * x)
                sxy += light * (mxy - mxx * wx - mxy * wy + x * y)
                syy += light * (myy - mxy * wx - myy * wy + y * y)
            if not norm > 0:
                break
            sx, sy = sx / norm, sy / norm
            oxx, oxy, oyy = sxx / norm - sx * sx, sxy / norm - sx * sy, syy / norm - sy * sy
            odet, mdet = oxx * oyy - oxy * oxy, mxx * myy - mxy * mxy
            jxx, jyy, jxy = oyy / odet - myy / mdet, oxx / odet - mxx / mdet, -oxy / odet + mxy / mdet
            jdet = jxx * jyy - jxy * jxy
            trace = mxx + myy
            nxx, nyy, nxy = 2.0 * oxx, 2.0 * oyy, 2.0 * oxy
            # Far from the fixed point the implied covariance may not exist, or overshoot.
            if jdet > 0 and jxx + jyy > 0 and (jxx + jyy) / jdet < 4.0 * trace:
                nxx, nyy, nxy = jyy / jdet, jxx / jdet, -jxy / jdet
            change = max(abs(nxx - mxx), abs(nyy - myy), abs(nxy - mxy)) / trace
            shift = np.sqrt((sx * sx + sy * sy) / trace)
            mxx, myy, mxy, cx, cy = nxx, nyy, nxy, cx + 2.0 * sx, cy + 2.0 * sy
            if not (mxx > 0 and mxx * myy > mxy * mxy):
                break
            if change < tolerance and shift < tolerance:
                out[k, 0], out[k, 1], out[k, 2] = mxx, myy, mxy
                break
    return out
