# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Crowded fields of our own, in the format that `vaedeblend evaluate fields` reads, to develop on.

usage: python benchmarks/heldout_fields.py OUT [--fields 16] [--seed 77] [--brightest 20] [--distance 0.6 3]

Galaxies of the embedded population, drawn anew for each field, a third at random places and the others at
a distance from one of those; in every band of every field a PSF of another width, profile and shape; LSST's
full depth. What is tuned is tuned here, so that other benchmarks stay independent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import galsim
import numpy as np
from lsst.meas.vaedeblend.training.galaxies import galaxy_profile
from lsst.meas.vaedeblend.training.population import draw_population
from lsst.meas.vaedeblend.training.surveys import get_survey_info

SIZE, STAMP, EDGE, PSF = 205, 64, 36, 41
"""Widths of field and stamps, least distance of galaxies from the border, width of the PSF images, pixel."""

MAX_RADIUS = 80
"""Half-width at which a galaxy's image is cut off, pixel."""


def simulate(
    seed: int, number: int, brightest: float = 20.0, distances: tuple[float, float] = (0.6, 3.0)
) -> dict[str, np.ndarray]:
    """Simulate one field of galaxies down to i = 26; neighbours lie at ``distances``, arcsec."""
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
    # A margin, so that galaxies may hang over the border.
    margin = 2 * MAX_RADIUS
    stamps = np.zeros((n, len(bands), STAMP, STAMP))
    psfs = np.zeros((len(bands), PSF, PSF))
    image, variance = np.zeros((2, len(bands), SIZE, SIZE))
    for b, band in enumerate(bands):
        fwhm = rng.uniform(0.55, 1.05)
        if rng.random() < 0.5:
            psf = galsim.Kolmogorov(fwhm=fwhm)
        else:
            psf = galsim.Moffat(beta=rng.uniform(2.5, 4.5), fwhm=fwhm)
        psf = psf.shear(g=0.06 * np.sqrt(rng.random()), beta=rng.random() * np.pi * galsim.radians)
        kernel = psf.drawImage(nx=PSF, ny=PSF, scale=scale).array.astype(float)
        psfs[b] = kernel / kernel.sum()
        for i in range(n):
            profile = galsim.Convolve(galaxy_profile(population, i, band.name), psf)
            radius = min(max(profile.getGoodImageSize(scale), STAMP), 2 * MAX_RADIUS) // 2
            x, y = corner[i] + STAMP // 2
            square = galsim.ImageD(
                galsim.BoundsI(x - radius, x + radius, y - radius, y + radius), scale=scale
            )
            profile.drawImage(square, center=galsim.PositionD(*xy[i]))
            whole = np.zeros((SIZE + 2 * margin, SIZE + 2 * margin))
            rows = slice(y - radius + margin, y + radius + 1 + margin)
            columns = slice(x - radius + margin, x + radius + 1 + margin)
            whole[rows, columns] = np.maximum(square.array, 0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--fields", type=int, default=16)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--brightest", type=float, default=20.0, help="magnitude limit in i")
    parser.add_argument("--distance", type=float, nargs=2, default=(0.6, 3.0), help="of neighbours, arcsec")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.fields):
        path = arguments.out / f"field_{number:02d}.npz"
        field = simulate(arguments.seed, number, arguments.brightest, tuple(arguments.distance))
        np.savez_compressed(path, **field)


if __name__ == "__main__":
    main()
