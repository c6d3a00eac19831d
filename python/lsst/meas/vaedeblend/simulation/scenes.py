# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blends for training, composed on the fly from a bank of rendered galaxies.

A small field is composed, not one cutout: its sources are added at random
places in the model frame, the field is convolved once per band with that
field's PSF, and cutouts are taken around many of its sources. Blends then have
the statistics of the sky that the runtime cuts out, and the cost of the
convolution is shared.
"""

from __future__ import annotations

__all__ = [
    "Cutouts",
    "PsfBank",
    "SceneComposer",
    "quarter_turn",
    "squared_snr",
    "turn_offset",
]

import dataclasses
from collections.abc import Iterator

import galsim
import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from ..ground.psf import adaptive_moments, difference_kernel_ft, moments_sigma
from .config import SceneConfig
from .galaxies import MODEL_SIGMA, GalaxyBank
from .surveys import AB_ZEROPOINT_NJY, SurveyInfo

_BRIGHTEST = 10 ** (-0.4 * (15.0 - AB_ZEROPOINT_NJY))
"""Flux beyond which no source is made brighter, nJy: 15 mag."""


def squared_snr(flux: NDArray, noise: NDArray, area: NDArray, psf_moments: NDArray) -> NDArray:
    """Squared signal-to-noise ratio of an optimal measurement in background noise, F^2 / (sigma^2 A).

    Parameters
    ----------
    flux : `numpy.ndarray`, (...)
        Fluxes, nJy.
    noise : `numpy.ndarray`, (...)
        Background standard deviation per pixel, nJy.
    area : `numpy.ndarray`, (...)
        Effective areas before the PSF, (sum I)^2 / sum I^2, pixel^2.
    psf_moments : `numpy.ndarray`, (..., 3)
        Ixx, Iyy, Ixy of the PSF, pixel^2; it widens the area by its own, 4 pi sqrt(det I) for a Gaussian.

    Returns
    -------
    squared_snr : `numpy.ndarray`, (...)
        To be summed over bands.
    """
    psf_area = 4 * np.pi * moments_sigma(psf_moments.astype(float)) ** 2
    return (flux / noise) ** 2 / (area + psf_area)


class PsfBank:
    """PSFs drawn from a range of widths, shapes and profiles.

    Parameters
    ----------
    config : `SceneConfig`
    pixel_scale : `float`
        arcsec per pixel.
    rng : `numpy.random.Generator`
    size : `int`, optional
        Width of the stamps, pixel.

    Attributes
    ----------
    stamps : `numpy.ndarray`, (P, size, size)
        PSF images, sum 1. Half are Kolmogorov, half Moffat (beta 2.5 to 4.5) profiles, with the pixel.
    moments : `numpy.ndarray`, (P, 3) float32
        Adaptive moments Ixx, Iyy, Ixy, pixel^2.
    wide : `numpy.ndarray`, (P, W, W)
        The same with the wings, ``config.psf_size`` pixels wide.
    """

    def __init__(self, config: SceneConfig, pixel_scale: float, rng: np.random.Generator, size: int = 41):
        n, (low, high) = config.psf_bank_size, config.psf_fwhm_range
        width = max(size, config.psf_size)
        wide = np.empty((n, width, width))
        for i in range(n):
            fwhm = rng.uniform(low, high)
            if rng.random() < 0.5:
                profile = galsim.Kolmogorov(fwhm=fwhm)
            else:
                profile = galsim.Moffat(beta=rng.uniform(2.5, 4.5), fwhm=fwhm)
            g = config.psf_max_ellipticity * np.sqrt(rng.random())
            profile = profile.shear(g=g, beta=rng.random() * np.pi * galsim.radians)
            wide[i] = profile.drawImage(nx=width, ny=width, scale=pixel_scale, method="auto").array
        inner = slice((width - size) // 2, (width + size) // 2)
        wide /= wide[:, inner, inner].sum(axis=(1, 2), keepdims=True)
        self.stamps, self.wide = wide[:, inner, inner], wide
        self.moments = adaptive_moments(self.stamps).astype(np.float32)

    def kernels(self, size: int) -> np.ndarray:
        """Transforms of the difference kernels from the model frame, (P, size, size // 2 + 1) complex64.

        With the wings where they fit on the grid.
        """
        stamps = self.wide if self.wide.shape[-1] <= size else self.stamps
        return difference_kernel_ft(stamps, MODEL_SIGMA, size).astype(np.complex64)


@dataclasses.dataclass
class Cutouts:
    """Training samples: what the network is given, and what it should draw.

    Attributes
    ----------
    image : `numpy.ndarray`, (N, B, S, S) float32
        Noisy blends, nJy, masked pixels 0.
    valid : `numpy.ndarray`, (N, B, S, S) bool
    noise : `numpy.ndarray`, (N, B) float32
        Background standard deviation per pixel, nJy.
    psf_moments : `numpy.ndarray`, (N, B, 3) float32
    psf_index : `numpy.ndarray`, (N, B) int
        Rows of the `PsfBank`.
    target : `numpy.ndarray`, (N, B, S, S) float32
        The centred source alone, noiseless, in the model frame, nJy.
    target_flux : `numpy.ndarray`, (N, B) float32
        Total flux, also outside of the cutout, nJy.
    """

    image: np.ndarray
    valid: np.ndarray
    noise: np.ndarray
    psf_moments: np.ndarray
    psf_index: np.ndarray
    target: np.ndarray
    target_flux: np.ndarray

    def __len__(self) -> int:
        return len(self.image)

    def as_dict(self) -> dict[str, np.ndarray]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @staticmethod
    def join(parts: list[Cutouts]) -> Cutouts:
        return Cutouts(
            **{
                f.name: np.concatenate([getattr(p, f.name) for p in parts])
                for f in dataclasses.fields(Cutouts)
            }
        )

    def __getitem__(self, rows) -> Cutouts:
        return Cutouts(**{k: v[rows] for k, v in self.as_dict().items()})


def quarter_turn(stamps: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight symmetries of the square, on the last two axes: flip x if turn >= 4, then rotate."""
    if turn >= 4:
        stamps = stamps[..., ::-1]
    return np.rot90(stamps, turn % 4, axes=(-2, -1))


def turn_offset(offset: np.ndarray, turn: int) -> np.ndarray:
    """What `quarter_turn` does to an (x, y) offset from the middle pixel."""
    x, y = offset
    if turn >= 4:
        x = -x
    for _ in range(turn % 4):
        # numpy's rot90 takes the last axis' end to the first axis' start: (x, y) -> (y, -x).
        x, y = y, -x
    return np.array([x, y])


class SceneComposer:
    """Compose fields and cut training samples out of them.

    Parameters
    ----------
    bank : `GalaxyBank`
        Galaxies and stars.
    psfs : `PsfBank`
    survey : `SurveyInfo`
        Its bands must be the bank's.
    config : `SceneConfig`
    rng : `numpy.random.Generator`
    isolated : `bool`, optional
        Put one source in each cutout, for the training of the prior.

    Raises
    ------
    ValueError
        If bank and survey disagree on bands or pixel scale.
    """

    def __init__(
        self,
        bank: GalaxyBank,
        psfs: PsfBank,
        survey: SurveyInfo,
        config: SceneConfig,
        rng: np.random.Generator,
        isolated: bool = False,
    ):
        if bank.bands != survey.band_names:
            raise ValueError(f"The bank has bands {bank.bands}, the survey {survey.band_names}.")
        if not np.isclose(bank.pixel_scale, survey.pixel_scale):
            raise ValueError(
                f"The bank has {bank.pixel_scale} arcsec/pixel, the survey {survey.pixel_scale}."
            )
        self.bank, self.psfs, self.survey, self.config = bank, psfs, survey, config
        self.rng, self.isolated = rng, isolated
        self._kernels = psfs.kernels(config.field_size)
        self._total_flux = bank.total_flux
        self._counts_per_njy = np.array([b.counts_per_njy for b in survey.bands])

    def batches(self, size: int) -> Iterator[Cutouts]:
        """Yield batches of exactly ``size`` samples without end."""
        parts: list[Cutouts] = []
        have = 0
        while True:
            parts.append(self.field())
            have += len(parts[-1])
            if have >= size:
                joined = Cutouts.join(parts)
                yield joined[:size]
                parts, have = [joined[size:]], have - size

    def _place(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources of a field, as rows of the bank, and their pixels (x, y).

        Margins are included, so that light leaks in from outside.
        """
        rng, c = self.rng, self.config
        if self.isolated:
            step = c.cutout_size
            start = (c.field_size - (c.field_size // step - 1) * step) // 2
            line = start + step * np.arange(c.field_size // step)
            x, y = (a.ravel() for a in np.meshgrid(line, line))
            return rng.integers(0, len(self.bank), len(x)), x, y
        side = c.field_size + 16
        area = (side * self.survey.pixel_scale / 60) ** 2
        density = np.exp(rng.uniform(*np.log(c.density_range)))
        n = max(2, rng.poisson(density * area))
        rows = rng.integers(0, len(self.bank), n)
        x, y = rng.integers(-8, c.field_size + 8, (2, n))
        clustered = rng.random(n) < c.clustered_fraction
        # Hosts stay where they are, or what was put next to them would be left alone.
        near, hosts = np.flatnonzero(clustered), np.flatnonzero(~clustered)
        if not len(hosts):
            return rows, x, y
        preference = self._total_flux[rows[hosts]].sum(axis=1) ** c.host_flux_power
        host = rng.choice(hosts, len(near), p=preference / preference.sum())
        distance = rng.exponential(c.cluster_scale / self.survey.pixel_scale, len(near)) + 1.5
        angle = rng.random(len(near)) * 2 * np.pi
        x[near] = np.rint(x[host] + distance * np.cos(angle))
        y[near] = np.rint(y[host] + distance * np.sin(angle))
        return rows, x, y

    def field(self) -> Cutouts:
        """Compose one field and cut out its targets; may hold no sample at all."""
        rng, c, bank = self.rng, self.config, self.bank
        size, half, nb = c.field_size, c.cutout_size // 2, len(bank.bands)
        rows, x, y = self._place()
        n = len(x)
        gain, boosted = self._gains(rows)
        turns = rng.integers(0, 8, n)
        psf_index = rng.integers(0, len(self.psfs.moments), nb)
        depth = np.exp(rng.uniform(*np.log(c.noise_range)) + c.noise_band_scatter * rng.standard_normal(nb))
        noise = (self.survey.noise * depth).astype(np.float32)
        targets = self._choose_targets(x, y, rows, noise, psf_index, gain, boosted)
        subtracted = not self.isolated and rng.random() < c.subtracted_fraction

        canvas = np.zeros((nb, size, size), np.float32)
        truth = np.zeros((len(targets), nb, 2 * half, 2 * half), np.float32)
        corner = np.zeros((len(targets), 2), int)
        slot = {t: k for k, t in enumerate(targets)}
        for i in range(n):
            row = rows[i]
            parts = slice(bank.first[row], bank.first[row] + bank.count[row])
            flux = bank.flux[parts] * gain[i]
            if i in slot:
                k = slot[i]
                stamp = quarter_turn(np.tensordot(flux.T, bank.stamps[parts], axes=1), turns[i])
                offset = turn_offset(bank.offset[row], turns[i])
                error = c.centring_error * rng.standard_normal(2)
                # With an error the peak falls into another pixel than the source now and then.
                shift = np.clip(np.rint(offset + error), -3, 3).astype(int)
                corner[k] = np.array([y[i], x[i]]) + shift[::-1] - half
                middle = stamp.shape[-1] // 2
                low = middle + shift[::-1] - half
                truth[k] = stamp[:, low[0] : low[0] + 2 * half, low[1] : low[1] + 2 * half]
                radius = middle
            else:
                middle = bank.stamps.shape[-1] // 2
                # What is left out of the square around a bright source would still be seen.
                radius = middle if boosted[i] else bank.radius[row]
                cut = slice(middle - radius, middle + radius + 1)
                part_stamps = bank.stamps[parts, cut, cut]
                if subtracted:
                    stamp = self._residual(flux, part_stamps)
                else:
                    stamp = np.tensordot(flux.T, part_stamps, axes=1)
                stamp = quarter_turn(stamp, turns[i])
            y0, x0 = y[i] - radius, x[i] - radius
            ya, yb = max(y0, 0), min(y0 + 2 * radius + 1, size)
            xa, xb = max(x0, 0), min(x0 + 2 * radius + 1, size)
            if ya < yb and xa < xb:
                canvas[:, ya:yb, xa:xb] += stamp[:, ya - y0 : yb - y0, xa - x0 : xb - x0]

        spectrum = scipy.fft.rfft2(canvas) * self._kernels[psf_index]
        observed = scipy.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
        # Photon noise of the sources themselves, at the exposure that this depth stands for.
        counts = (self._counts_per_njy / depth**2).astype(np.float32)[:, None, None]
        sigma = np.sqrt(noise[:, None, None] ** 2 + np.maximum(observed, 0) / counts)
        saturated = None
        if rng.random() < c.saturated_fraction:
            saturated = self._saturated(observed, psf_index, x, y)
        observed += sigma * self._unit_noise(observed.shape)
        if c.sky_error:
            observed += (noise * rng.uniform(-c.sky_error, c.sky_error, nb).astype(np.float32))[:, None, None]

        image = np.empty_like(truth)
        valid = self._masks(len(targets), nb, 2 * half)
        for k, (cy, cx) in enumerate(corner):
            square = np.s_[:, cy : cy + 2 * half, cx : cx + 2 * half]
            image[k] = observed[square]
            if saturated is not None:
                valid[k] &= ~saturated[square]
        image *= valid
        return Cutouts(
            image=image,
            valid=valid,
            noise=np.tile(noise, (len(targets), 1)),
            psf_moments=np.tile(self.psfs.moments[psf_index], (len(targets), 1, 1)),
            psf_index=np.tile(psf_index, (len(targets), 1)),
            target=truth,
            target_flux=self._total_flux[rows[targets]] * gain[targets],
        )

    def _gains(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the fluxes of sources, (n, B) float32, and which sources are boosted, (n,) bool."""
        rng, c = self.rng, self.config
        n, nb = len(rows), len(self.bank.bands)
        gain, boosted = np.ones((n, nb)), np.zeros(n, bool)
        if c.odd_colour_fraction and not self.isolated:
            for i in np.flatnonzero(rng.random(n) < c.odd_colour_fraction):
                kind = rng.integers(3)
                if kind == 0:
                    gain[i, : rng.integers(1, nb)] = 0.0
                elif kind == 1:
                    gain[i, np.arange(nb) != rng.integers(nb)] = 0.0
                else:
                    gain[i] = np.exp(0.7 * rng.standard_normal(nb))
        if c.boosted_fraction and not self.isolated:
            boosted = rng.random(n) < c.boosted_fraction
            brightest = self._total_flux[rows].max(axis=1)
            boost = np.exp(rng.uniform(np.log(3.0), np.log(c.largest_boost), n))
            # Nothing is brighter than stars are.
            boost = np.minimum(boost, np.maximum(1.0, _BRIGHTEST / brightest))
            gain[boosted] *= boost[boosted, None]
        return gain.astype(np.float32), boosted

    def _residual(self, flux: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """What is left of a source, (B, P, P), after its components were subtracted with errors.

        Fluxes (K, B) and stamps (K, P, P) are the components'.
        """
        rng, c = self.rng, self.config
        scale = 10 ** -rng.uniform(0.0, c.subtraction_spread) if c.subtraction_spread else 1.0
        wrong = scale * c.subtraction_error * rng.standard_normal((len(flux), 1))
        stamp = np.tensordot((flux * np.clip(wrong, -0.5, 0.5).astype(np.float32)).T, stamps, axes=1)
        if c.subtraction_shift:
            # To first order, a model at another place differs by its gradient.
            dy, dx = (scale * c.subtraction_shift * rng.standard_normal(2)).astype(np.float32)
            whole = np.tensordot(flux.T, stamps, axes=1)
            stamp[:, 1:-1] += 0.5 * dy * (whole[:, 2:] - whole[:, :-2])
            stamp[:, :, 1:-1] += 0.5 * dx * (whole[:, :, 2:] - whole[:, :, :-2])
        return stamp

    def _unit_noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Gaussian noise (B, H, W) float32 of unit variance, neighbouring pixels correlated as configured.

        White noise through the filter (a, 1, a) along both axes has the correlation 2 a / (1 + 2 a^2) between
        neighbours.
        """
        noise = self.rng.standard_normal(shape, np.float32)
        low, high = self.config.noise_correlation
        if high > 0:
            rho = np.maximum(self.rng.uniform(low, high, shape[0]), 1e-6)
            a = ((1 - np.sqrt(1 - 2 * rho**2)) / (2 * rho)).astype(np.float32)[:, None, None]
            for axis in (1, 2):
                noise = noise + a * (np.roll(noise, 1, axis) + np.roll(noise, -1, axis))
            noise /= 1 + 2 * a**2
        return noise

    def _saturated(self, observed: np.ndarray, psf_index: np.ndarray, x, y) -> np.ndarray:
        """Pixels of a noiseless field (B, H, W) that are lost to bright cores and bleeds, bool.

        A core is what is brighter than the middle of the faintest saturated star, and a rim of a few pixels.
        Charge bleeds along columns, the farther the brighter the source is.
        """
        rng, (low, high) = self.rng, self.config.saturation_mag_range
        size = observed.shape[-1]
        flux = 10 ** (-0.4 * (rng.uniform(low, high, len(observed)) - AB_ZEROPOINT_NJY))
        level = flux * self.psfs.stamps[psf_index].max(axis=(1, 2))
        bad = observed > level[:, None, None]
        if not bad.any():
            return bad
        line = np.arange(-3, 4)
        rim = np.hypot(line[:, None], line) <= rng.uniform(1.0, 3.5)
        bad = scipy.ndimage.binary_dilation(bad, rim[None])
        for px, py in zip(x, y, strict=True):
            if not (0 <= px < size and 0 <= py < size):
                continue
            for band in np.flatnonzero(observed[:, py, px] > 3 * level):
                reach = int(4 * np.sqrt(observed[band, py, px] / level[band]) * rng.uniform(0.5, 2.0))
                width = rng.integers(0, 2)
                bad[band, max(0, py - reach) : py + reach + 1, max(0, px - width) : px + width + 1] = True
        # Coadds of some surveys share one mask.
        return np.broadcast_to(bad.any(axis=0), bad.shape) if rng.random() < 0.3 else bad

    def _choose_targets(self, x, y, rows, noise, psf_index, gain, boosted) -> np.ndarray:
        """Sources that a peak finder could have found, of any rank, in random order."""
        c, half = self.config, self.config.cutout_size // 2
        flux = self._total_flux[rows] * gain
        area = self.bank.area[rows][:, None]
        snr = np.sqrt(squared_snr(flux, noise, area, self.psfs.moments[psf_index]).sum(axis=1))
        # A peak that is off by some pixels must still leave the cutout inside of the field.
        edge = 0 if self.isolated else 4
        low, high = half + edge, c.field_size - half - edge
        inside = (x >= low) & (x <= high) & (y >= low) & (y <= high) & (snr > c.min_snr)
        if not self.isolated:
            # One peak is all that remains of sources within 1.5 pixels; it belongs to the brighter.
            near = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2 <= 1.5**2
            inside &= ~(near & (snr > snr[:, None])).any(axis=1)
        inside &= ~boosted
        return self.rng.permutation(np.flatnonzero(inside))[: c.targets_per_field]

    def _masks(self, n: int, nb: int, size: int) -> np.ndarray:
        """Masks like those of coadds: patch borders, bleed trails, disks around defects, absent bands."""
        rng = self.rng
        valid = np.ones((n, nb, size, size), bool)
        yy, xx = np.mgrid[:size, :size] - size // 2
        for k in np.flatnonzero(rng.random(n) < self.config.mask_fraction):
            choice = rng.integers(3)
            if choice == 0:
                angle = rng.integers(4) * np.pi / 2
                bad = xx * np.cos(angle) + yy * np.sin(angle) > rng.uniform(2, size // 2)
            elif choice == 1:
                across = xx if rng.random() < 0.5 else yy
                bad = np.abs(across - rng.integers(-size // 2, size // 2)) < rng.integers(1, 4)
            else:
                cy, cx = rng.integers(-size // 2, size // 2, 2)
                bad = np.hypot(yy - cy, xx - cx) < rng.uniform(2, 8)
            bands = slice(None) if choice == 0 or rng.random() < 0.5 else rng.integers(nb)
            valid[k, bands] &= ~bad
        for k in np.flatnonzero(rng.random(n) < self.config.band_dropout):
            absent = rng.permutation(nb)[: rng.integers(1, max(2, nb // 2))]
            valid[k, absent] = False
        return valid
