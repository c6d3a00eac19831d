# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Scenes for `bench.py`: written to files, so that all checkouts deblend the same pixels."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import galsim
import numpy as np
from lsst.meas.vaedeblend.ground.detection import detect
from lsst.meas.vaedeblend.ground.psf import psf_sigma
from lsst.meas.vaedeblend.simulation.galaxies import galaxy_profile
from lsst.meas.vaedeblend.simulation.patch import simulate_patch
from lsst.meas.vaedeblend.simulation.population import draw_population
from lsst.meas.vaedeblend.simulation.surveys import get_survey_info
from numpy.typing import NDArray

PATCH, PATCH_OBJECTS = 3300, 10_000
"""Width of a patch, pixel, and the objects on it: their density is that of all scenes of `uniform`."""

CELL = 150
"""Width of the cells with a PSF of their own, pixel."""

SPACING = 12
"""Mean distance of neighbours in `crowded`, pixel."""

_STAMP, _PSF, _MARGIN = 129, 41, 12


@dataclasses.dataclass
class Stamps:
    """Noiseless galaxies to make scenes of.

    Attributes
    ----------
    image : `numpy.ndarray`, (N, B, S, S)
        Observed images, nJy; the middle pixel is the target's.
    offset : `numpy.ndarray`, (N, 2)
        Centres (x, y) from there, pixel.
    psf : `numpy.ndarray`, (B, h, w)
        The PSF they are seen through.
    """

    image: NDArray[np.float32]
    offset: NDArray[np.float64]
    psf: NDArray[np.float64]


@cache
def stamps(count: int = 200, seed: int = 21) -> Stamps:
    """Render galaxies once, to be placed many times."""
    rng = np.random.default_rng(seed)
    info = get_survey_info("LSST")
    population = draw_population(count, info, rng, mag_range=(20.0, 26.0))
    offset = rng.uniform(-0.5, 0.5, (count, 2))
    image = np.zeros((count, len(info.bands), _STAMP, _STAMP), np.float32)
    psf = np.empty((len(info.bands), _PSF, _PSF))
    for b, band in enumerate(info.bands):
        seeing = galsim.Kolmogorov(fwhm=band.psf_fwhm)
        kernel = seeing.drawImage(nx=_PSF, ny=_PSF, scale=info.pixel_scale).array.astype(float)
        psf[b] = kernel / kernel.sum()
        for i in range(count):
            profile = galsim.Convolve(galaxy_profile(population, i, band.name), seeing)
            size = min(profile.getGoodImageSize(info.pixel_scale) | 1, _STAMP)
            square = profile.drawImage(
                nx=size, ny=size, scale=info.pixel_scale, offset=galsim.PositionD(*offset[i])
            )
            rim = (_STAMP - size) // 2
            image[i, b, rim : rim + size, rim : rim + size] = np.maximum(square.array, 0)
    return Stamps(image, offset, psf)


def demonstration(out: Path) -> None:
    """The demonstration's patch, without peaks."""
    patch = simulate_patch(1)
    bands, rows, columns = patch.psf.shape[:3]
    psf = np.moveaxis(patch.psf, 0, 2).reshape(rows * columns, bands, *patch.psf.shape[3:])
    width = np.median(psf_sigma(patch.psf).reshape(bands, -1), axis=1)
    detected = detect(patch.image, patch.variance, np.ones(patch.image.shape, bool), width).detected
    write(
        out, patch.image, patch.variance, detected.any(axis=0), psf, patch.cell_shape, (rows, columns), None
    )


def uniform(out: Path, objects: int, number: int, seed: int = 22) -> None:
    """Part of a patch, as wide as its number of objects asks for, with given peaks.

    Half of the galaxies are 0.8" to 3" from another, as in the demonstration's patch.
    """
    rng = np.random.default_rng([seed, objects, number])
    width = round(PATCH * np.sqrt(objects / PATCH_OBJECTS))
    scale = get_survey_info("LSST").pixel_scale
    xy = rng.uniform(_MARGIN, width - 1 - _MARGIN, (objects, 2))
    first = objects - objects // 2
    distance, angle = rng.uniform(0.8, 3.0, objects) / scale, rng.uniform(0, 2 * np.pi, objects)
    step = np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)
    xy[first:] = xy[rng.integers(0, first, objects - first)] + step[first:]
    _place(out, np.clip(np.rint(xy), _MARGIN, width - 1 - _MARGIN).astype(int), width, rng, one=False)


def crowded(out: Path, objects: int, number: int, seed: int = 23) -> None:
    """One parent with many given peaks, each in its own square of `SPACING` pixels."""
    rng = np.random.default_rng([seed, objects, number])
    across = int(np.ceil(np.sqrt(objects)))
    rim = 32
    square = np.stack(np.divmod(np.arange(objects), across)[::-1], 1)
    # Four pixels from each other at the least.
    xy = rim + SPACING * square + rng.integers(2, SPACING - 1, square.shape)
    _place(out, xy, across * SPACING + 2 * rim, rng, one=True)


def _place(out: Path, pixel: NDArray[np.int64], width: int, rng: np.random.Generator, one: bool) -> None:
    """Put galaxies at pixels (x, y), and write the scene; all of it may be one parent."""
    info, library = get_survey_info("LSST"), stamps()
    chosen = rng.integers(0, len(library.image), len(pixel))
    image = np.zeros((len(info.bands), width, width), np.float32)
    half = _STAMP // 2
    for (x, y), galaxy in zip(pixel, chosen, strict=True):
        y0, x0, y1, x1 = (
            max(y - half, 0),
            max(x - half, 0),
            min(y + half + 1, width),
            min(x + half + 1, width),
        )
        rows, columns = slice(y0 - y + half, y1 - y + half), slice(x0 - x + half, x1 - x + half)
        image[:, y0:y1, x0:x1] += library.image[galaxy][:, rows, columns]
    variance = np.empty_like(image)
    for b, band in enumerate(info.bands):
        variance[b] = band.noise**2 + image[b] / band.counts_per_njy
        image[b] += np.sqrt(variance[b]) * rng.standard_normal(image[b].shape, np.float32)
    if one:
        detected = np.ones((width, width), bool)
    else:
        valid = np.ones(image.shape, bool)
        detected = detect(image, variance, valid, psf_sigma(library.psf)).detected.any(axis=0)
    cells = -(-width // CELL)
    psf = np.tile(library.psf, (cells * cells, 1, 1, 1))
    peaks = pixel + library.offset[chosen]
    write(out, image, variance, detected, psf, (CELL, CELL), (cells, cells), peaks)


def write(
    out: Path,
    image: NDArray,
    variance: NDArray,
    detected: NDArray[np.bool_],
    psf: NDArray,
    cell_shape: tuple[int, int],
    grid_shape: tuple[int, int],
    peaks: NDArray | None,
) -> None:
    """Write what makes up a scene.

    Parameters
    ----------
    out : `pathlib.Path`
        Directory, made.
    image, variance : `numpy.ndarray`, (B, H, W)
        nJy and nJy^2, in the bands of LSST.
    detected : `numpy.ndarray`, (H, W)
        Detected pixels.
    psf, cell_shape, grid_shape
        See `lsst.meas.vaedeblend.scene.PsfGrid`.
    peaks : `numpy.ndarray`, (N, 2)
        Given peaks (x, y), or `None` if they have to be found.
    """
    out.mkdir(parents=True)
    info = get_survey_info("LSST")
    np.save(out / "image.npy", image)
    np.save(out / "variance.npy", variance)
    np.save(out / "detected.npy", detected)
    np.savez(
        out / "scene.npz",
        bands=np.array(info.band_names),
        pixel_scale=info.pixel_scale,
        psf=psf,
        cell_shape=cell_shape,
        grid_shape=grid_shape,
        given=peaks is not None,
        peaks=np.empty((0, 2)) if peaks is None else peaks,
    )
