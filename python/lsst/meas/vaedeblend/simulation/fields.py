# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Crowded fields as other people simulate them: one PSF per band, every object's image as the truth."""

from __future__ import annotations

__all__ = ["PSF", "draw_at", "draw_psf", "psf_stamp", "simulate_field"]

import galsim
import numpy as np
from numpy.typing import NDArray

from .galaxies import galaxy_profile
from .population import draw_population
from .surveys import get_survey_info

SIZE, STAMP, EDGE, PSF = 205, 64, 36, 41
"""Widths of field and stamps, least distance of galaxies from the border, width of the PSF images, pixel."""

MAX_RADIUS = 80
"""Half-width at which a galaxy's image is cut off, pixel."""


def draw_psf(rng: np.random.Generator) -> galsim.GSObject:
    """Draw a PSF of 0.55" to 1.05", half of them Kolmogorov, half Moffat profiles, up to 0.06 in shear."""
    fwhm = rng.uniform(0.55, 1.05)
    if rng.random() < 0.5:
        psf = galsim.Kolmogorov(fwhm=fwhm)
    else:
        psf = galsim.Moffat(beta=rng.uniform(2.5, 4.5), fwhm=fwhm)
    return psf.shear(g=0.06 * np.sqrt(rng.random()), beta=rng.random() * np.pi * galsim.radians)


def psf_stamp(psf: galsim.GSObject, scale: float) -> NDArray[np.float64]:
    """Image of a PSF, `PSF` pixels wide and sum 1; what lies beyond is cut off."""
    kernel = psf.drawImage(nx=PSF, ny=PSF, scale=scale).array.astype(float)
    return kernel / kernel.sum()


def draw_at(
    profile: galsim.GSObject, position: NDArray, radius: int, size: int, scale: float
) -> NDArray[np.float64]:
    """Draw a profile at a place of a field, out to a radius.

    Parameters
    ----------
    profile : `galsim.GSObject`
        Profile as observed, distances in arcsec.
    position : `numpy.ndarray`, (2,)
        x and y, pixel of the field.
    radius : `int`
        Half-width of the square beyond which there is no light, pixel.
    size : `int`
        Width of the field, pixel.
    scale : `float`
        Width of a pixel, arcsec.

    Returns
    -------
    image : `numpy.ndarray`, (size + 4 radius, size + 4 radius)
        The field with a margin of twice the radius, so that light may hang over the border.
    """
    margin = 2 * radius
    x, y = np.floor(position + 0.5).astype(int)
    square = galsim.ImageD(galsim.BoundsI(x - radius, x + radius, y - radius, y + radius), scale=scale)
    profile.drawImage(square, center=galsim.PositionD(*position))
    whole = np.zeros((size + 2 * margin, size + 2 * margin))
    rows = slice(y - radius + margin, y + radius + 1 + margin)
    whole[rows, x - radius + margin : x + radius + 1 + margin] = np.maximum(square.array, 0)
    return whole


def simulate_field(
    seed: int, number: int, brightest: float = 20.0, distances: tuple[float, float] = (0.6, 3.0)
) -> dict[str, NDArray]:
    """Simulate one crowded field with its truth.

    Galaxies of the embedded population, a third at random places and the others at a distance from one of
    those; in every band a PSF of another width, profile and shape; LSST's full depth.

    Parameters
    ----------
    seed, number : `int`
        The same two numbers give the same field.
    brightest : `float`, optional
        Magnitude limit in i; the faint one is 26.
    distances : `tuple` [`float`], optional
        Distances of neighbours, arcsec.

    Returns
    -------
    field : `dict` [`str`, `numpy.ndarray`]
        What `lsst.meas.vaedeblend.evaluation.fields.FieldFile` reads from an npz file.
    """
    info = get_survey_info("LSST")
    scale, bands = info.pixel_scale, info.bands
    rng = np.random.default_rng([seed, number])
    n = int(rng.integers(9, 18))
    population = draw_population(n, info, rng, mag_range=(brightest, 26.0))
    xy = rng.uniform(45, SIZE - 45, (n, 2))
    for i in range(n // 3, n):
        distance, angle = rng.uniform(*distances) / scale, rng.uniform(0, 2 * np.pi)
        beside = xy[rng.integers(n // 3)] + distance * np.array([np.cos(angle), np.sin(angle)])
        xy[i] = np.clip(beside, EDGE, SIZE - 1 - EDGE)
    corner = np.floor(xy + 0.5).astype(int) - STAMP // 2
    stamps = np.zeros((n, len(bands), STAMP, STAMP))
    psfs = np.zeros((len(bands), PSF, PSF))
    image, variance = np.zeros((2, len(bands), SIZE, SIZE))
    for b, band in enumerate(bands):
        psf = draw_psf(rng)
        psfs[b] = psf_stamp(psf, scale)
        for i in range(n):
            profile = galsim.Convolve(galaxy_profile(population, i, band.name), psf)
            radius = min(max(profile.getGoodImageSize(scale), STAMP), 2 * MAX_RADIUS) // 2
            whole = draw_at(profile, xy[i], radius, SIZE, scale)
            margin = 2 * radius
            image[b] += whole[margin:-margin, margin:-margin]
            x0, y0 = corner[i] + margin
            stamps[i, b] = whole[y0 : y0 + STAMP, x0 : x0 + STAMP]
        variance[b] = band.noise**2 + image[b] / band.counts_per_njy
        image[b] += np.sqrt(variance[b]) * rng.standard_normal(image[b].shape)
    return {
        "bands": np.array(info.band_names),
        "image": image.astype(np.float32),
        "variance": variance.astype(np.float32),
        "psf": psfs.astype(np.float32),
        "x": xy[:, 0],
        "y": xy[:, 1],
        "flux": population.total_flux,
        "stamp": stamps.astype(np.float32),
        "stamp_x0": corner[:, 0],
        "stamp_y0": corner[:, 1],
    }
