# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""A simulated patch made of cells, with its truth."""

from __future__ import annotations

__all__ = ["SimulatedPatch", "simulate_patch"]

import dataclasses
from collections.abc import Sequence

import galsim
import numpy as np
from numpy.typing import NDArray

from ..ground.statistics import stamp_snr
from ..scene import Parent, PsfGrid, Scene
from .galaxies import galaxy_profile
from .population import draw_population
from .surveys import get_survey_info


@dataclasses.dataclass
class SimulatedPatch:
    """Images of a patch and what is on them.

    Attributes
    ----------
    bands : `tuple` [`str`]
        Band names.
    pixel_scale : `float`
        Width of a pixel, arcsec.
    cell_shape : `tuple` [`int`]
        Height and width of the cells, pixel.
    image, variance : `numpy.ndarray`, (B, H, W) float32
        Noisy image, nJy, and its variance, nJy^2: sky and the sources' own photons.
    psf : `numpy.ndarray`, (B, ny, nx, h, w)
        PSF of each cell, sum 1.
    x, y : `numpy.ndarray`, (N,)
        True centres, pixel of the patch.
    flux : `numpy.ndarray`, (N, B)
        True total fluxes, nJy.
    snr : `numpy.ndarray`, (N, B)
        Signal-to-noise ratio of each galaxy alone, see `lsst.meas.vaedeblend.ground.statistics.stamp_snr`.
    """

    bands: tuple[str, ...]
    pixel_scale: float
    cell_shape: tuple[int, int]
    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    psf: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    snr: NDArray[np.float64]

    def scene(self, parents: Sequence[Parent]) -> Scene:
        """Make a scene of the patch, without the way through a repository."""
        bands, rows, columns = self.psf.shape[:3]
        stamps = np.moveaxis(self.psf, 0, 2).reshape(rows * columns, bands, *self.psf.shape[3:])
        return Scene(
            self.bands,
            self.image,
            self.variance,
            psf=PsfGrid(stamps, self.cell_shape, (rows, columns)),
            pixel_scale=self.pixel_scale,
            parents=parents,
        )


def simulate_patch(
    seed: int,
    *,
    survey: str = "LSST",
    bands: tuple[str, ...] = ("u", "g", "r", "i", "z", "y"),
    n_galaxies: int = 150,
    cells: tuple[int, int] = (4, 4),
    cell_size: int = 150,
    clustered: float = 0.5,
    mag_range: tuple[float, float] = (19.0, 26.0),
    psf_size: int = 41,
    margin: int = 12,
    max_stamp: int = 161,
) -> SimulatedPatch:
    """Simulate a patch at the survey's full depth.

    Parameters
    ----------
    seed : `int`
        Seed of the random numbers; the same seed gives the same patch.
    survey : `str`, optional
        Survey whose pixel scale, exposure, sky and typical seeing are used, as `surveycodex` knows it.
    bands : `tuple` [`str`], optional
        Bands.
    n_galaxies : `int`, optional
        Number of galaxies N.
    cells : `tuple` [`int`], optional
        Number of cells along y and x.
    cell_size : `int`, optional
        Width of a cell, pixel.
    clustered : `float`, optional
        Fraction of the galaxies that are put 0.8" to 3" from another one, so that there is something to
        deblend.
    mag_range : `tuple` [`float`], optional
        Magnitude limits in i.
    psf_size : `int`, optional
        Width of the PSF images, pixel, odd.
    margin : `int`, optional
        Least distance of centres from the patch's border, pixel.
    max_stamp : `int`, optional
        Width beyond which a galaxy's image is cut off, pixel.

    Returns
    -------
    patch : `SimulatedPatch`

    Raises
    ------
    ValueError
        Raised if there is no galaxy, no cell, or no place between the margins.

    Notes
    -----
    A coadd's PSF is that of the cell a pixel lies in, and jumps at the border of a cell; a galaxy that
    reaches over the border is drawn with both. The PSFs are Kolmogorov profiles whose width varies by 4
    percent (standard deviation) from cell to cell about the band's typical one, with an ellipticity up to
    0.04.
    """
    if n_galaxies < 1:
        raise ValueError(f"A patch needs at least one galaxy, not {n_galaxies}.")
    if min(cells) < 1 or min(cells) * cell_size <= 2 * margin + 1:
        raise ValueError(
            f"{cells[0]} x {cells[1]} cells of {cell_size} pixels leave no place for galaxies, which keep "
            f"{margin} pixels from the border."
        )
    rng = np.random.default_rng(seed)
    info = get_survey_info(survey, tuple(bands))
    scale = info.pixel_scale
    shape = (cells[0] * cell_size, cells[1] * cell_size)
    population = draw_population(n_galaxies, info, rng, mag_range=mag_range)
    x, y = _place(rng, n_galaxies, shape, margin, clustered, scale)

    psf = np.empty((len(bands), *cells, psf_size, psf_size))
    image = np.zeros((len(bands), *shape))
    variance = np.empty_like(image)
    signal = np.zeros((n_galaxies, len(bands)))
    for b, band in enumerate(info.bands):
        profiles = [galaxy_profile(population, i, band.name) for i in range(n_galaxies)]
        typical = galsim.Kolmogorov(fwhm=band.psf_fwhm)
        # GalSim's own measure of the square that holds all but half a percent of the light.
        sizes = [galsim.Convolve(p, typical).getGoodImageSize(scale) for p in profiles]
        halves = [min(size, max_stamp) // 2 for size in sizes]
        for row in range(cells[0]):
            for column in range(cells[1]):
                seeing = galsim.Kolmogorov(fwhm=band.psf_fwhm * (1 + 0.04 * rng.standard_normal()))
                seeing = seeing.shear(
                    g=0.04 * np.sqrt(rng.random()), beta=rng.random() * np.pi * galsim.radians
                )
                kernel = seeing.drawImage(nx=psf_size, ny=psf_size, scale=scale).array.astype(float)
                psf[b, row, column] = kernel / kernel.sum()
                y0, x0 = row * cell_size, column * cell_size
                cell = galsim.BoundsI(x0, x0 + cell_size - 1, y0, y0 + cell_size - 1)
                canvas = galsim.ImageD(cell, scale=scale, init_value=0.0)
                for i, half in enumerate(halves):
                    ix, iy = round(x[i]), round(y[i])
                    square = galsim.BoundsI(ix - half, ix + half, iy - half, iy + half)
                    common = square & cell
                    if not common.isDefined():
                        continue
                    stamp = galsim.ImageD(square, scale=scale)
                    galsim.Convolve(profiles[i], seeing).drawImage(stamp, center=galsim.PositionD(x[i], y[i]))
                    part = np.maximum(stamp[common].array, 0)
                    canvas[common].array[:] += part
                    noise2 = band.noise**2 + part / band.counts_per_njy
                    signal[i, b] += stamp_snr(part, noise2) ** 2
                image[b, y0 : y0 + cell_size, x0 : x0 + cell_size] = canvas.array
        # Photons of the sky and of the sources; in nJy, Poisson noise of a flux f has variance f / (counts
        # per nJy).
        variance[b] = band.noise**2 + image[b] / band.counts_per_njy
        image[b] += np.sqrt(variance[b]) * rng.standard_normal(shape)
    return SimulatedPatch(
        bands=tuple(bands),
        pixel_scale=scale,
        cell_shape=(cell_size, cell_size),
        image=image.astype(np.float32),
        variance=variance.astype(np.float32),
        psf=psf,
        x=x,
        y=y,
        flux=population.total_flux,
        snr=np.sqrt(signal),
    )


def _place(
    rng: np.random.Generator, n: int, shape: tuple[int, int], margin: int, clustered: float, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw centres: uniform ones, and companions of those at a distance of 0.8" to 3"."""
    low, high = np.array([margin, margin]), np.array([shape[1], shape[0]]) - 1.0 - margin
    xy = rng.uniform(low, high, (n, 2))
    first = n - int(clustered * n)
    for i in range(max(first, 1), n):
        distance, angle = rng.uniform(0.8, 3.0) / scale, rng.uniform(0, 2 * np.pi)
        beside = xy[rng.integers(first)] + distance * np.array([np.cos(angle), np.sin(angle)])
        xy[i] = np.clip(beside, low, high)
    return xy[:, 0], xy[:, 1]
