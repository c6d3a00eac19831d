# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models as sums of few products of a spectrum and an image."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["factorize"]


_FINEST = 10
"""Power of the root of two, of steps below an image's largest pixel, up to which the search for the coarsest
goes first."""


def factorize(
    model: ArrayLike, tolerance: ArrayLike = 1e-3, circle_tolerance: ArrayLike | None = None
) -> list[tuple[NDArray[np.float32], NDArray[np.float32], tuple[int, int]]]:
    """Write a model as a sum of a few products of a spectrum and an image.

    In each band, and in units of the band's flux: the total is kept, and no pixel changes by more than
    ``tolerance``. The flux in any circle around the source, and so under any weight that falls with the
    radius, changes by at most ``circle_tolerance``, and the sum of the pixels' absolute errors is at most ten
    times that.

    The images are those of a singular value decomposition of the model, each band scaled to unit tolerance,
    on the smallest box that suffices. They are rounded to whole numbers, which takes the least space in a
    text file, as coarsely as the tolerances allow; the spectra, solved for last by least squares with the
    total as a constraint, hold the scale. All but the first image have both signs, as their spectra have.

    Parameters
    ----------
    model : array_like, (B, S, S)
        Image of one source in each band, nJy. A band whose sum is not above a tenth of the sum of its
        absolute values, as that of noise, counts as empty.
    tolerance : array_like, (B,), optional
        Error of a pixel over the band's flux.
    circle_tolerance : array_like, (B,), optional
        Error of the flux in circles over the band's flux; by default ``tolerance``.

    Returns
    -------
    components : `list` [`tuple`]
        Spectrum (B,), image (h, w), and pixel (y, x) of the model where the image begins; float32. Empty if
        no band has flux.

    Raises
    ------
    ValueError
        Raised if the model is not finite, or a tolerance not positive.
    """
    model = np.asarray(model, np.float64)
    tolerance = np.broadcast_to(tolerance, len(model))
    circle = tolerance if circle_tolerance is None else np.broadcast_to(circle_tolerance, len(model))
    if not np.isfinite(model).all():
        raise ValueError("The model is not finite.")
    if not ((tolerance > 0).all() and (circle > 0).all()):
        raise ValueError(f"Tolerances should be positive, not {tolerance} and {circle}.")
    flux = model.sum(axis=(1, 2))
    bright = flux > 0.1 * np.abs(model).sum(axis=(1, 2))
    if not bright.any():
        return []
    # From here on the unit of each band is its tolerance, and that of pixels the ratio of the two.
    unit = (circle * flux)[bright]
    pixel = (tolerance / circle)[bright, None]
    shapes = model[bright] / unit[:, None, None]
    total = shapes.sum(axis=(1, 2))
    # Most of the square is far beyond the light, and every step would cost as much as if it were not.
    top, bottom, first, last = _trim(shapes, 0.05)
    shapes = shapes[:, top:bottom, first:last]
    # What is cut off counts against the tolerance, and something has to be left for the other errors.
    y1, y2, x1, x2 = _trim(shapes, 0.5)
    inside = np.zeros(shapes.shape[1:], bool)
    inside[y1:y2, x1:x2] = True
    # Pixels in the order of their distance from the centre: running sums are the fluxes in circles.
    weight = np.where(inside, np.maximum(shapes.sum(axis=0), 0.0), 0.0)
    y, x = (grid - np.average(grid, weights=weight) for grid in np.indices(inside.shape))
    order = np.argsort((y**2 + x**2).ravel(), kind="stable")
    flat = shapes.reshape(len(shapes), -1)[:, order]
    used = inside.ravel()[order]
    # The left singular vectors, largest first; the matrix is tiny, as there are few bands.
    left = np.linalg.eigh(flat @ flat.T)[1][:, ::-1]
    # An image times the largest entry of its vector is its part in the band where it matters most: one step
    # of rounding means the same error in all images.
    images = (left.T @ flat) * used * np.abs(left).max(axis=0)[:, None]
    images *= np.where(images.sum(axis=1) < 0, -1.0, 1.0)[:, None]
    for rank in range(1, len(images) + 1):
        # Rounding needs a part of the tolerance as well.
        if rank == len(images) or _fit(images[:rank], flat, pixel, total)[1] <= 0.7:
            break
    # The coarsest step that the tolerances allow, to a root of two: found by halving an interval of powers,
    # of which the fine end always suffices.
    largest = np.abs(images[0]).max()
    coarse, fine, best = -1, _FINEST, None
    while fine - coarse > 1 or best is None:
        power = (coarse + fine) // 2 if fine - coarse > 1 else fine
        rounded = np.rint(images[:rank] * (np.sqrt(2.0) ** power / largest))
        rounded = rounded[rounded.any(axis=1)]
        spectra, error = _fit(rounded, flat, pixel, total)
        if error <= 1.0:
            fine, best = power, (rounded, spectra)
        elif power == fine:
            coarse, fine = fine, fine + 4
        else:
            coarse = power
    rounded, spectra = best
    pictures = np.zeros(rounded.shape)
    pictures[:, order] = rounded
    out = []
    for j, image in enumerate(pictures.reshape(-1, *inside.shape)):
        spectrum = np.zeros(len(flux), np.float32)
        spectrum[bright] = spectra[:, j] * unit
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        part = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
        out.append((spectrum, part, (int(rows[0]) + top, int(columns[0]) + first)))
    return out


def _trim(shapes: NDArray, budget: float) -> tuple[int, int, int, int]:
    """The box (y1, y2, x1, x2) outside which no shape, (B, h, w), has more than the budget."""
    return _trim_sides(np.abs(shapes), budget)


@numba.njit(cache=True)
def _trim_sides(weight, budget):
    """Take away the side that costs least for its length, as long as the budget allows."""
    bands, height, width = weight.shape
    y1, y2, x1, x2 = 0, height, 0, width
    rows, columns = weight.sum(axis=2), weight.sum(axis=1)
    spent = np.zeros(bands)
    while y2 - y1 > 1 and x2 - x1 > 1:
        which, most = -1, -1.0
        for side in range(4):
            edge = rows[:, y1] if side == 0 else rows[:, y2 - 1]
            if side >= 2:
                edge = columns[:, x1] if side == 2 else columns[:, x2 - 1]
            if (spent + edge).max() <= budget:
                score = edge.max() / (x2 - x1 if side < 2 else y2 - y1)
                # The side that costs least for its length.
                if which < 0 or score < most:
                    which, most = side, score
        if which < 0:
            break
        if which < 2:
            y = y1 if which == 0 else y2 - 1
            spent += rows[:, y]
            columns -= weight[:, y, :]
            y1, y2 = (y1 + 1, y2) if which == 0 else (y1, y2 - 1)
        else:
            x = x1 if which == 2 else x2 - 1
            spent += columns[:, x]
            rows -= weight[:, :, x]
            x1, x2 = (x1 + 1, x2) if which == 2 else (x1, x2 - 1)
    return y1, y2, x1, x2


def _fit(images: NDArray, shapes: NDArray, pixel: NDArray, sums: NDArray) -> tuple[NDArray, float]:
    """Fit shapes (B, P) by images (k, P), with given sums (B,); return coefficients (B, k) and the error.

    Least squares under one linear constraint: with G the images' normal matrix and v their sums the solution
    is the free one plus a multiple of G^-1 v. The error is that of `factorize` in units of the tolerance, for
    pixels in the order of their distance from the centre.
    """
    total = images.sum(axis=1)
    if not total.any():
        return np.zeros((len(shapes), len(images))), np.inf
    normal = images @ images.T
    try:
        inverse = np.linalg.inv(normal)
    except np.linalg.LinAlgError:
        inverse = np.linalg.pinv(normal, hermitian=True)
    free = shapes @ images.T @ inverse
    direction = inverse @ total
    excess = sums - free @ total
    coefficients = free + (excess / (total @ direction))[:, None] * direction
    error = coefficients @ images - shapes
    circles, size = np.abs(np.cumsum(error, axis=1)), np.abs(error)
    return coefficients, max(circles.max(), 0.1 * size.sum(axis=1).max(), (size / pixel).max())
