# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blends of a few galaxies as Arcelin et al. (2020) simulate them (sections 2.1 and 2.2).

Every cutout is composed by itself, in the observed frame: the PSF is fixed, so
it is in the bank already, and a blend is a sum of stamps. Every galaxy is in
the bank twice, as a target in the middle of its stamp and as a neighbour
somewhere in the annulus, drawn by GalSim for each instrument; nothing is
interpolated, which Euclid's coarse pixels would not allow.
"""

from __future__ import annotations

__all__ = [
    "ROLES",
    "Blend",
    "BlendBanks",
    "BlendComposer",
    "brightest_peak",
    "draw_centring_error",
    "fit_centring_error",
    "fixed_psf",
    "poisson_noise",
    "psf_moments",
    "psf_stamp",
    "render_blend_banks",
]

import dataclasses
import functools
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import galsim
import numpy as np
import scipy.fft
import scipy.stats
from photutils.centroids import centroid_quadratic
from photutils.detection import find_peaks

from ..ground.psf import adaptive_moments
from .config import BlendConfig
from .galaxies import GalaxyBank, render_bank
from .population import Population
from .scenes import Cutouts, quarter_turn, turn_offset
from .surveys import BandInfo, SurveyInfo

ROLES = ("target", "neighbour")

REFERENCE_BAND = "r"
"""Band in which the brightest galaxy is chosen, peaks are found and blendedness is measured."""

_POISSON_LIMIT = 400.0
"""Expected electrons above which a Gaussian of equal variance stands for the Poisson distribution, whose
skewness is then below 0.05; exact draws of such numbers would cost more than the network."""


def fixed_psf(config: BlendConfig, band: str) -> galsim.GSObject:
    """The PSF of one band, distances in arcsec."""
    fwhm = config.psf_fwhm[band]
    if band in config.moffat_beta:
        return galsim.Moffat(beta=config.moffat_beta[band], fwhm=fwhm)
    return galsim.Kolmogorov(fwhm=fwhm)


def poisson_noise(signal: np.ndarray, band: BandInfo, rng: np.random.Generator) -> np.ndarray:
    """Expose an image: Poisson noise of source and sky, the mean sky then removed.

    Parameters
    ----------
    signal : `numpy.ndarray`, (..., H, W)
        Noiseless image, nJy.
    band : `BandInfo`
        Gives electrons per nJy and the sky's electrons per pixel.
    rng : `numpy.random.Generator`

    Returns
    -------
    image : `numpy.ndarray`, (..., H, W) float32
        nJy.
    """
    # FFT rendering may leave tiny negative values.
    expected = np.maximum(signal, 0) * band.counts_per_njy + band.sky_counts
    if band.sky_counts > _POISSON_LIMIT:
        counts = expected + np.sqrt(expected) * rng.standard_normal(expected.shape, np.float32)
    else:
        counts = rng.poisson(expected)
    return ((counts - band.sky_counts) / band.counts_per_njy).astype(np.float32)


def brightest_peak(image: np.ndarray, threshold: float, box: int) -> np.ndarray | None:
    """Find the brightest peak of an image with photutils.

    Parameters
    ----------
    image : `numpy.ndarray`, (H, W)
    threshold : `float`
        In the unit of the image.
    box : `int`
        Width of the box in which a peak is the maximum, and in which its centroid is measured, pixel.

    Returns
    -------
    xy : `numpy.ndarray`, (2,), or `None`
        Centroid, pixel; `None` if nothing is above the threshold.
    """
    # No peak, or no maximum of a parabola, is an answer here, not a thing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _brightest_peak(image, threshold, box)


def _brightest_peak(image: np.ndarray, threshold: float, box: int) -> np.ndarray | None:
    peaks = find_peaks(image, threshold, box_size=box)
    if peaks is None or not len(peaks):
        return None
    best = int(np.argmax(peaks["peak_value"]))
    peak = np.array([peaks[f"{a}_peak"][best] for a in "xy"], float)
    half = box // 2
    x, y = peak.astype(int)
    cut = image[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1]
    if cut.shape != (box, box):
        return peak
    centroid = np.array(centroid_quadratic(cut.astype(float))) - half
    # A parabola that has no maximum in the box says nothing of where the peak is.
    return peak + centroid if np.isfinite(centroid).all() and np.abs(centroid).max() <= 1 else peak


def fit_centring_error(errors: np.ndarray) -> dict[str, float]:
    """Fit a beta-prime distribution to centring errors (Johnson et al. 1995; the paper's section 2.1.3).

    Parameters
    ----------
    errors : `numpy.ndarray`, (N,)
        Distances of centroids from the true centres, arcsec, positive.

    Returns
    -------
    parameters : `dict`
        ``a``, ``b`` and ``scale`` of `scipy.stats.betaprime`, whose ``loc`` is 0.
    """
    a, b, _, scale = scipy.stats.betaprime.fit(np.maximum(errors, 1e-6), floc=0.0)
    return {"a": float(a), "b": float(b), "scale": float(scale)}


def draw_centring_error(
    parameters: dict[str, float], rng: np.random.Generator, limit: float = 2.0
) -> np.ndarray:
    """Draw a centring error (x, y), arcsec, in a random direction, its length beta-prime up to ``limit``."""
    length = np.inf
    # The tail reaches as far as one likes; a peak cannot be further away than the neighbours are.
    while length > limit:
        length = scipy.stats.betaprime.rvs(random_state=rng, **parameters)
    angle = 2 * np.pi * rng.random()
    return length * np.array([np.cos(angle), np.sin(angle)])


@dataclasses.dataclass
class BlendBanks:
    """The galaxies of one sample: one bank per instrument and role, with the same galaxies in the same rows.

    Attributes
    ----------
    banks : `dict` [`str`, `list` [`GalaxyBank`]]
        For each of `ROLES`, one bank per instrument.
    centring : `dict` or `None`
        Beta-prime distribution of centring errors, from `fit_centring_error`.
    """

    banks: dict[str, list[GalaxyBank]]
    centring: dict[str, float] | None = None

    def __len__(self) -> int:
        return len(self.banks["target"][0])

    @property
    def source_id(self) -> np.ndarray:
        return self.banks["target"][0].source_id

    @property
    def total_flux(self) -> np.ndarray:
        """Flux of each galaxy, nJy, shape (N, B)."""
        return np.concatenate([b.total_flux for b in self.banks["target"]], axis=1)

    @staticmethod
    def paths(directory: Path, sample: str, instruments: int) -> dict[str, list[Path]]:
        """Files of one sample."""
        return {role: [directory / f"{sample}_{role}_{i}.npz" for i in range(instruments)] for role in ROLES}

    def save(self, directory: str | os.PathLike, sample: str) -> None:
        directory = Path(directory)
        for role, paths in self.paths(directory, sample, len(self.banks["target"])).items():
            for path, bank in zip(paths, self.banks[role], strict=True):
                bank.save(path)

    @classmethod
    def load(
        cls, directory: str | os.PathLike, sample: str, survey: SurveyInfo, made_with: str | None = None
    ) -> BlendBanks:
        """Read the banks of `save`, and the fit of the centring error if there is one.

        ``made_with`` as for `GalaxyBank.load`.
        """
        directory = Path(directory)
        paths = cls.paths(directory, sample, len(survey.instruments))
        fit = directory / "centring.json"
        centring = json.loads(fit.read_text()) if fit.exists() else None
        return cls(
            {role: [GalaxyBank.load(p, made_with) for p in ps] for role, ps in paths.items()}, centring
        )


def render_blend_banks(
    population: Population,
    survey: SurveyInfo,
    config: BlendConfig,
    rng: np.random.Generator,
    stamp_size: int,
    merge: bool,
    progress=None,
    processes: int = 1,
) -> BlendBanks:
    """Render a population as target and as neighbour, for each instrument of a survey.

    Parameters
    ----------
    population : `Population`
    survey : `SurveyInfo`
    config : `BlendConfig`
    rng : `numpy.random.Generator`
        Draws the neighbours' places.
    stamp_size : `int`
        Width of the stamps, pixel, even: the middle is a pixel corner.
    merge : `bool`
        As in `render_bank`.
    progress : callable, optional
        As in `render_bank`; not called by several processes.
    processes : `int`, optional
        Processes that share the work; the banks are the same.

    Returns
    -------
    banks : `BlendBanks`

    Raises
    ------
    ValueError
        If the stamp size is odd.
    """
    if stamp_size % 2:
        raise ValueError(f"The target sits at a pixel corner: stamps need an even size, not {stamp_size}.")
    n = len(population)
    inner, outer = config.annulus
    distance = np.sqrt(rng.uniform(inner**2, outer**2, n))
    angle = 2 * np.pi * rng.random(n)
    place = {
        "target": np.zeros((n, 2)),
        "neighbour": distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1),
    }
    calls = []
    for instrument in survey.instruments:
        psfs = [fixed_psf(config, b) for b in instrument.band_names]
        if any(psf != psfs[0] for psf in psfs):
            raise ValueError(f"The bands {instrument.band_names} share one bank, but not one PSF.")
        scale, bands = instrument.pixel_scale, population.in_bands(instrument.band_names)
        options = {"stamp_size": stamp_size, "psf": psfs[0], "merge": merge}
        # Offsets are given: none of the renderings draws random numbers.
        calls += [
            functools.partial(render_bank, bands, scale, rng, offset=place[role] / scale, **options)
            for role in ROLES
        ]
    if processes > 1:
        # Not forked: the caller may have threads.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            rendered = [future.result() for future in [pool.submit(call) for call in calls]]
    else:
        rendered = [call(progress=progress) for call in calls]
    # In the order of the calls, roles take turns.
    banks = {role: rendered[i :: len(ROLES)] for i, role in enumerate(ROLES)}
    return BlendBanks(banks)


@dataclasses.dataclass
class Blend:
    """One simulated blend with its truth.

    Attributes
    ----------
    image : `numpy.ndarray`, (B, S, S) float32
        What the telescopes see, nJy.
    signal : `numpy.ndarray`, (B, S, S) float32
        The same without noise, nJy.
    target : `numpy.ndarray`, (B, S, S) float32
        The target alone, noiseless, nJy.
    members : `numpy.ndarray`, (K, S, S) float32
        The galaxies alone in the reference band, noiseless, nJy; the target first.
    rows : `numpy.ndarray`, (K,) int
        Their rows in the bank.
    position : `numpy.ndarray`, (K, 2)
        Their centres (x, y) from the middle of the cutout, arcsec.
    centroid : `numpy.ndarray`, (2,)
        Detected centroid of the target, arcsec from the middle of the cutout; its true centre without
        detection.
    """

    image: np.ndarray
    signal: np.ndarray
    target: np.ndarray
    members: np.ndarray
    rows: np.ndarray
    position: np.ndarray
    centroid: np.ndarray

    @property
    def closest(self) -> int | None:
        """Index of the galaxy closest to the target, centre to centre; `None` if there is no other."""
        if len(self.rows) < 2:
            return None
        return 1 + int(np.argmin(np.hypot(*(self.position[1:] - self.position[0]).T)))


class BlendComposer:
    """Compose blends, or isolated galaxies, from a bank.

    Parameters
    ----------
    banks : `BlendBanks`
    survey : `SurveyInfo`
    config : `BlendConfig`
    cutout_size : `int`
        Width S of the cutouts, pixel of each instrument.
    rng : `numpy.random.Generator`
    isolated : `bool`, optional
        Compose isolated galaxies, for the training of the prior.
    exposures : `int`, optional
        Samples in succession that show one blend, each with noise of its own.

    Raises
    ------
    ValueError
        If the bank has other bands than the survey, too few galaxies or stamps smaller than the cutouts, if
        decentring is asked for with several instruments, or if the centring error of isolated galaxies has
        not been fitted.
    """

    def __init__(
        self,
        banks: BlendBanks,
        survey: SurveyInfo,
        config: BlendConfig,
        cutout_size: int,
        rng: np.random.Generator,
        isolated: bool = False,
        exposures: int = 1,
    ):
        found = tuple(b for bank in banks.banks["target"] for b in bank.bands)
        if found != survey.band_names:
            raise ValueError(f"The bank has bands {found}, the survey {survey.band_names}.")
        self._width = banks.banks["target"][0].stamps.shape[-1]
        if len(banks) < config.max_galaxies:
            raise ValueError(f"Blends of {config.max_galaxies} cannot be made of {len(banks)} galaxies.")
        if self._width < cutout_size:
            raise ValueError(f"The bank's stamps have {self._width} pixels, cutouts need {cutout_size}.")
        # A shift by part of a pixel is exact only where the pixels sample the PSF well, as LSST's do.
        if config.decentring != "none" and len(survey.instruments) > 1:
            raise ValueError("Decentred blends are composed for one instrument only.")
        if config.decentring == "peaks" and isolated and banks.centring is None:
            raise ValueError("Isolated galaxies need the fit of the centring error, centring.json.")
        self.banks, self.survey, self.config, self.size = banks, survey, config, cutout_size
        self.rng, self.isolated, self.exposures = rng, isolated, exposures
        self.reference = survey.band_names.index(REFERENCE_BAND)
        self.pixel_scale = survey.bands[self.reference].pixel_scale
        self._flux = banks.total_flux
        self._noise = survey.noise.astype(np.float32)
        self._moments = psf_moments(config, survey)

    def batches(self, size: int) -> Iterator[Cutouts]:
        """Yield batches of ``size`` samples, a multiple of the exposures, without end."""
        while True:
            yield self.cutouts([b for _ in range(size // self.exposures) for b in self.exposed(self.blend())])

    def exposed(self, blend: Blend) -> list[Blend]:
        """A blend and as many more exposures of it as a scene has.

        A target at a peak stays where the peak of the first exposure put it.
        """
        again = (self._noisy(blend.signal) for _ in range(self.exposures - 1))
        return [blend, *(dataclasses.replace(blend, image=np.stack(image)) for image in again)]

    def cutouts(self, blends: list[Blend]) -> Cutouts:
        """Join blends into what the training reads."""
        image = np.stack([b.image for b in blends])
        n, bands = image.shape[:2]
        return Cutouts(
            image=image,
            valid=np.ones(image.shape, bool),
            noise=np.tile(self._noise, (n, 1)),
            psf_moments=np.tile(self._moments, (n, 1, 1)),
            psf_index=np.zeros((n, bands), int),
            target=np.stack([b.target for b in blends]),
            target_flux=self._flux[[b.rows[0] for b in blends]].astype(np.float32),
        )

    def blend(self) -> Blend:
        """Compose one blend."""
        while True:
            blend = self._compose()
            if blend is not None:
                return blend

    def _compose(self) -> Blend | None:
        rng, c = self.rng, self.config
        k = 1 if self.isolated else int(rng.integers(1, c.max_galaxies + 1))
        rows = rng.choice(len(self.banks), k, replace=False)
        rows = rows[np.argsort(-self._flux[rows, self.reference], kind="stable")]
        shift = np.zeros(2)
        if c.decentring != "none":
            shift = c.decentring_width * (rng.random(2) - 0.5)
            if c.decentring == "peaks" and self.isolated:
                assert self.banks.centring is not None
                shift = shift + draw_centring_error(self.banks.centring, rng)
        drawn = [self._draw(row, ROLES[i > 0], shift) for i, row in enumerate(rows)]
        images, position = (np.stack(a) for a in zip(*drawn, strict=True))
        if c.decentring == "peaks" and not self.isolated:
            return self._detected(images, position, rows)
        images = self._crop(images, self._width // 2, self._width // 2)
        return self._expose(images, position, rows, centroid=position[0])

    def _draw(self, row: int, role: str, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One galaxy in all bands, (B, P, P) nJy, and its place (x, y), arcsec."""
        turn = int(self.rng.integers(8))
        parts = []
        for bank in self.banks.banks[role]:
            own = slice(bank.first[row], bank.first[row] + bank.count[row])
            stamps = quarter_turn(bank.stamps[own], turn)
            if shift.any():
                stamps = _shifted(stamps, shift / bank.pixel_scale)
            parts.append(np.tensordot(bank.flux[own].T, stamps, axes=1))
        place = turn_offset(bank.offset[row], turn) * bank.pixel_scale + shift
        return np.concatenate(parts).astype(np.float32), place

    def _detected(self, images: np.ndarray, position: np.ndarray, rows: np.ndarray) -> Blend | None:
        """Find the brightest peak, and cut out around it; nothing if there is none, or near the edge."""
        c, band = self.config, self.survey.bands[self.reference]
        noisy = poisson_noise(images[:, self.reference].sum(axis=0), band, self.rng)
        peak = brightest_peak(noisy, c.peak_threshold * band.noise, c.peak_box)
        if peak is None:
            return None
        # Pixel centres are at integers: the corner before pixel i is at i - 1/2.
        corner = np.floor(peak + 0.5 + 0.5).astype(int)
        half = self.size // 2
        if (corner < half).any() or (corner > self._width - half).any():
            return None
        middle = (corner - self._width // 2) * self.pixel_scale
        centroid = (peak + 0.5 - corner) * self.pixel_scale
        position = position - middle
        order = np.argsort(np.hypot(*(position - centroid).T), kind="stable")[:1]
        order = np.concatenate([order, np.delete(np.arange(len(rows)), order)])
        x, y = corner
        images = self._crop(images, y, x)
        noisy = self._crop(noisy, y, x)
        return self._expose(images[order], position[order], rows[order], centroid, noisy)

    def _crop(self, images: np.ndarray, y: int, x: int) -> np.ndarray:
        """Cut out S x S pixels about the corner before pixel (y, x)."""
        half = self.size // 2
        return images[..., y - half : y + half, x - half : x + half]

    def _expose(self, images, position, rows, centroid, reference=None) -> Blend:
        signal = images.sum(axis=0)
        noisy = self._noisy(signal)
        if reference is not None:
            noisy[self.reference] = reference
        return Blend(np.stack(noisy), signal, images[0], images[:, self.reference], rows, position, centroid)

    def _noisy(self, signal: np.ndarray) -> list[np.ndarray]:
        """One exposure in every band."""
        return [poisson_noise(s, b, self.rng) for s, b in zip(signal, self.survey.bands, strict=True)]


def psf_stamp(config: BlendConfig, band: BandInfo, size: int = 41) -> np.ndarray:
    """Image of a band's PSF in its own pixels, (size, size), sum 1 but for what falls off."""
    image = fixed_psf(config, band.name).drawImage(nx=size, ny=size, scale=band.pixel_scale)
    return image.array.astype(float)


def psf_moments(config: BlendConfig, survey: SurveyInfo) -> np.ndarray:
    """Adaptive moments Ixx, Iyy, Ixy of the bands' PSFs, pixel^2, (B, 3) float32."""
    return adaptive_moments(np.stack([psf_stamp(config, b) for b in survey.bands])).astype(np.float32)


def _shifted(stamps: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Shift well-sampled images (..., P, P) by (x, y) pixels, in Fourier space."""
    size = stamps.shape[-1]
    phase = scipy.fft.fftfreq(size)[:, None] * shift[1] + scipy.fft.rfftfreq(size) * shift[0]
    kernel = np.exp(-2j * np.pi * phase).astype(np.complex64)
    return scipy.fft.irfft2(scipy.fft.rfft2(stamps) * kernel, s=(size, size))
