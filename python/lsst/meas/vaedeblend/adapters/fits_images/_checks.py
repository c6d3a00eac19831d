# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the pixels say about the files that go with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from astropy.stats import mad_std, sigma_clipped_stats
from numpy.typing import NDArray

from ...ground.detection import detect
from ...ground.psf import psf_sigma
from ._files import Plane

__all__ = ["check_shapes", "detected_pixels", "noise_doubts", "psf_problems", "sky_doubts", "sky_levels"]

_LOG = logging.getLogger("lsst.meas.vaedeblend.adapters")

NOISE_FACTOR = 3.0
"""Ratio of given to measured variance beyond which a map is no variance of these pixels. Resampling leaves
ratios of 0.7 to 1.4 (coadds of simulated and of real surveys), a weight map one of ten to a million."""

SKY_LIMIT, SKY_WARNING = 1.0, 0.25
"""Median of the source-free pixels, in standard deviations of a pixel, that is refused, and warned about."""

_FREE_PIXELS = 100
"""Source-free pixels below which nothing is said about the sky."""


def detected_pixels(image: NDArray, variance: NDArray, valid: NDArray, psf: NDArray) -> NDArray[np.bool_]:
    """Pixels that belong to a source in any band, (H, W): the only place that knows how they are found."""
    return detect(image, variance, valid, psf_sigma(psf)).detected.any(axis=0)


def check_shapes(planes: dict[str, dict[str, Plane]], bands: Sequence[str], problems: list[str]) -> None:
    """Compare the shapes of all planes with that of the first image."""
    first = planes["image"][bands[0]]
    for kind in ("image", "variance", "weight", "mask"):
        for band, plane in planes[kind].items():
            if plane.array.shape != first.array.shape:
                problems.append(
                    f"{plane.name} (band {band}): the {kind} has shape {plane.array.shape}, {first.name} "
                    f"(band {bands[0]}) has {first.array.shape}. Bring all files onto one grid (SWarp, or "
                    "reproject.reproject_interp)."
                )


def psf_problems(plane: Plane, band: str) -> list[str]:
    """Say what is wrong with a PSF."""
    psf, where = plane.array, f"{plane.name} (band {band})"
    height, width = psf.shape
    with np.errstate(invalid="ignore"):
        if not np.isfinite(psf).all() or not psf.sum() > 0:
            return [f"{where}: the PSF should be finite with a positive sum; its sum is {psf.sum()}."]
    y, x = np.unravel_index(psf.argmax(), psf.shape)
    if not (height % 2 and width % 2):
        cut = f"[{int(y == height // 2 and not height % 2)}:, {int(x == width // 2 and not width % 2)}:]"
        remedy = (
            f"Its maximum lies on pixel ({y}, {x}) from 0: psf{cut} has it in the middle"
            if (y in (height // 2, (height - 1) // 2) and x in (width // 2, (width - 1) // 2) and "1" in cut)
            else "Resample it"
        )
        return [
            f"{where}: the PSF kernel has {height} x {width} pixels; its centre must be the middle of a "
            f"pixel, which even sides do not have. {remedy}."
        ]
    # Squared, so that noise in the wings does not shift it.
    light = np.clip(psf, 0.0, None).astype(float) ** 2
    centre = np.array([(light.sum(axis=1 - a) * np.arange(psf.shape[a])).sum() for a in (0, 1)]) / light.sum()
    off = centre - [(height - 1) / 2, (width - 1) / 2]
    if np.abs(off).max() > 0.5:
        return [
            f"{where}: the PSF is centred {off[1]:+.1f}, {off[0]:+.1f} pixels (x, y) from the middle of its "
            "image; shift it there."
        ]
    return []


def _scatter(image: NDArray, valid: NDArray) -> tuple[float, float]:
    """Bounds of a band's standard deviation per pixel, whatever sources there are.

    The lower is that of second differences along rows, var(a - 2 b + c) = 6 var for independent pixels: the
    light of sources is smooth, but so is correlated noise. The upper is that of the clipped pixels
    themselves, which faint sources widen.
    """
    x = np.where(valid, image, np.nan).astype(float)
    second = x[:, 2:] - 2.0 * x[:, 1:-1] + x[:, :-2]
    second = second[np.isfinite(second)]
    low = float(mad_std(second)) / np.sqrt(6.0) if len(second) else np.nan
    _, _, high = sigma_clipped_stats(x[valid], sigma=3.0, maxiters=10, stdfunc="mad_std")
    return low, max(float(high), low)


def noise_doubts(
    planes: dict[str, dict[str, Plane]],
    bands: Sequence[str],
    pixels: NDArray,
    noise: NDArray,
    valid: NDArray,
    factors: NDArray[np.float64],
) -> list[str]:
    """Compare the given variances with the scatter of the pixels; numbers told are in units of the files."""
    doubts = []
    for b, band in enumerate(bands):
        low, high = np.array(_scatter(pixels[b], valid[b])) / factors[b]
        given = float(np.median(noise[b][valid[b]])) / factors[b] ** 2
        if not (low > 0 and np.isfinite(high)):
            continue
        bounds = (low**2 / NOISE_FACTOR, high**2 * NOISE_FACTOR)

        def fits_(value: float, bounds: tuple[float, float] = bounds) -> bool:
            return bounds[0] <= value <= bounds[1]

        if fits_(given):
            continue
        kind = "variance" if band in planes["variance"] else "weight"
        stated = given if kind == "variance" else 1.0 / given
        if fits_(1.0 / given):
            other = "weight" if kind == "variance" else "variance"
            what = "a weight map (inverse variance)" if kind == "variance" else "a variance"
            remedy = f"It looks like {what}: give it as --{other} {band}=FILE"
        elif fits_(stated**2):
            remedy = "It looks like a standard deviation (rms): square it, and give it as --variance"
        elif fits_(stated**-2):
            remedy = "It looks like an inverse standard deviation: square it, and give it as --weight"
        else:
            factor = (low * high if low > 0 else high**2) / given
            remedy = (
                "Is it a relative weight, or in other units? The pixels ask for a variance "
                f"{factor:.3g} times as large"
            )
        ratio = given / (low * high)
        doubts.append(
            f"{planes[kind][band].name} (band {band}): the median variance is {given:.3g}, but the pixels "
            f"of {planes['image'][band].name} scatter with {low**2:.3g} to {high**2:.3g} (ratio "
            f"{ratio:.3g}). {remedy}."
        )
    return doubts


def sky_levels(pixels: NDArray, noise: NDArray, valid: NDArray, kernels: NDArray) -> NDArray[np.float64]:
    """Median of each band's source-free pixels, nJy; NaN where they are too few."""
    level, flat = np.zeros(len(pixels)), np.ones(noise.shape, np.float32)
    for b in range(len(pixels)):
        # A first guess, without which a sky of some standard deviations would all be detected.
        _, level[b], spread = sigma_clipped_stats(
            pixels[b][valid[b]], sigma=3.0, maxiters=10, stdfunc="mad_std"
        )
        flat[b] = max(float(spread), 1e-30) ** 2
    raised = pixels - level.astype(np.float32)[:, None, None]
    free = ~detected_pixels(raised, flat, valid, kernels)
    return np.array(
        [
            np.median(image[use]) if (use := free & ok).sum() >= _FREE_PIXELS else np.nan
            for image, ok in zip(pixels, valid, strict=True)
        ]
    )


def sky_doubts(
    images: dict[str, Plane], bands: Sequence[str], noise: NDArray, valid: NDArray, sky: NDArray
) -> list[str]:
    """Say where sky was left in, in units of the standard deviation of a pixel."""
    doubts = []
    for b, band in enumerate(bands):
        level = sky[b] / float(np.sqrt(np.median(noise[b][valid[b]])))
        where = f"{images[band].name} (band {band})"
        if abs(level) > SKY_LIMIT:
            doubts.append(
                f"{where}: the source-free pixels have a median of {sky[b]:.4g} nJy, {level:+.1f} standard "
                "deviations: sky was left in. Subtract the background (SExtractor, or "
                "photutils.background.Background2D)."
            )
        elif abs(level) > SKY_WARNING:
            _LOG.warning(
                "%s: the source-free pixels have a median of %+.2f standard deviations: sky was left in, or "
                "light of sources.",
                where,
                level,
            )
    return doubts
