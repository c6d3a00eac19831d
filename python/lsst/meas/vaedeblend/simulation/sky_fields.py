# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fields that look like coadds: stars, saturated cores, large galaxies, correlated noise, sky left over."""

from __future__ import annotations

__all__ = ["SKY_SIZE", "SKY_STAMP", "correlated_noise", "simulate_sky_field"]

import dataclasses

import galsim
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .fields import PSF, draw_at, draw_psf, psf_stamp
from .galaxies import galaxy_profile
from .population import KNOTS, NONE, SERSIC, STAR, Population, concatenate, draw_population, draw_stars
from .surveys import AB_ZEROPOINT_NJY, SurveyInfo, get_survey_info

SKY_SIZE, SKY_STAMP = 384, 96
"""Widths of field and stamps, pixel."""

MAX_RADIUS = 192
"""Half-width at which an object's image is cut off, pixel."""

KINDS = {SERSIC: "galaxy", KNOTS: "knots", STAR: "star"}


def correlated_noise(
    shape: tuple[int, int], correlation: tuple[float, float], tail: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """White noise smoothed as resampling does it, with variance 1.

    Along each axis the kernel is (tail, a, 1, a, tail), normalised to unit sum of squares. Without a tail
    neighbours correlate by rho = 2 a / (1 + 2 a^2), which is solved for a.

    Parameters
    ----------
    shape : `tuple` [`int`]
        Height and width.
    correlation : `tuple` [`float`]
        Wanted correlation with the next pixel in y and x, below 0.7.
    tail : `float`
        The kernel two pixels out; that of a Lanczos kernel is negative.
    rng : `numpy.random.Generator`

    Returns
    -------
    noise : `numpy.ndarray`, ``shape``
    """
    margin = 4
    noise = rng.standard_normal([s + 2 * margin for s in shape])
    for axis, rho in enumerate(correlation):
        a = (1 - np.sqrt(1 - 2 * rho**2)) / (2 * rho) if rho else 0.0
        kernel = np.array([tail, a, 1, a, tail])
        noise = ndimage.convolve1d(noise, kernel / np.sqrt((kernel**2).sum()), axis=axis)
    return noise[margin:-margin, margin:-margin]


def simulate_sky_field(seed: int, number: int) -> dict[str, NDArray]:
    """Simulate one field that looks like a coadd, with its truth.

    Stars of magnitude 15 to 25 whose wings reach far beyond the PSF's stamp, their cores and bleeds NaN
    where they saturate; galaxies of i = 17.5 to 26, some of them several arcsec large, with knots or with
    colours that no spectrum has; many of all these beside bright ones. Noise correlates between
    neighbouring pixels (the variance plane is a pixel's own variance), and a little sky is left over. In
    every band PSF, correlation and sky are others. LSST's full depth, within a factor.

    Parameters
    ----------
    seed, number : `int`
        The same two numbers give the same field.

    Returns
    -------
    field : `dict` [`str`, `numpy.ndarray`]
        As `lsst.meas.vaedeblend.simulation.fields.simulate_field` gives it, with 96 pixel wide stamps, and

        ``kind``
            "star", "galaxy" or "knots".
        ``hlr``, ``g1``, ``g2``, ``redshift``
            Half-light radius (arcsec) and ellipticity, means of the components weighted with their light in
            r; zeros for stars.
        ``correlation``, ``sky``
            Correlation wanted between neighbours in y and x, (B, 2), and the sky left over, nJy (B, H, W).
    """
    info = get_survey_info("LSST")
    scale, bands = info.pixel_scale, info.bands
    rng = np.random.default_rng([seed, number])
    population = _sources(info, rng)
    n, nb = len(population), len(bands)
    xy = _positions(population, scale, rng)
    corner = np.floor(xy + 0.5).astype(int) - SKY_STAMP // 2

    stamps = np.zeros((n, nb, SKY_STAMP, SKY_STAMP), np.float32)
    psfs = np.zeros((nb, PSF, PSF))
    image, variance, sky = np.zeros((3, nb, SKY_SIZE, SKY_SIZE))
    correlation, tail = rng.uniform(0.05, 0.3, (nb, 2)), rng.uniform(-0.06, 0.03, nb)
    # Magnitude of a star that just saturates the pixel it is centred on; each band has its own, near it.
    saturation = rng.uniform(16.8, 18.5) + rng.normal(0, 0.4, nb)
    bleed_axis = int(rng.integers(2))
    for b, band in enumerate(bands):
        psf = _with_wings(draw_psf(rng), rng)
        psfs[b] = psf_stamp(psf, scale)
        for i in range(n):
            profile = galsim.Convolve(galaxy_profile(population, i, band.name), psf)
            whole = draw_at(profile, xy[i], _radius(profile, band.noise, scale), SKY_SIZE, scale)
            margin = (len(whole) - SKY_SIZE) // 2
            image[b] += whole[margin : margin + SKY_SIZE, margin : margin + SKY_SIZE]
            x0, y0 = corner[i] + margin
            stamps[i, b] = whole[y0 : y0 + SKY_STAMP, x0 : x0 + SKY_STAMP]
        limit = psfs[b].max() * 10 ** (0.4 * (AB_ZEROPOINT_NJY - saturation[b]))
        lost = _saturated(image[b], limit, bleed_axis, rng)
        noise = band.noise * rng.uniform(0.8, 1.25)
        variance[b] = noise**2 + image[b] / band.counts_per_njy
        sky[b] = noise * _sky_left_over(rng)
        own = correlated_noise(image[b].shape, tuple(correlation[b]), tail[b], rng)
        image[b] += sky[b] + np.sqrt(variance[b]) * own
        image[b][lost] = np.nan
    light = population.flux[..., info.band_names.index("r")] * (population.kind != NONE)
    light = light / np.maximum(light.sum(axis=1, keepdims=True), 1e-30)
    names = [STAR if STAR in kinds else KNOTS if KNOTS in kinds else SERSIC for kinds in population.kind]
    return {
        "bands": np.array(info.band_names),
        "image": image.astype(np.float32),
        "variance": variance.astype(np.float32),
        "psf": psfs.astype(np.float32),
        "x": xy[:, 0],
        "y": xy[:, 1],
        "flux": population.total_flux,
        "g1": (light * population.g1).sum(axis=1),
        "g2": (light * population.g2).sum(axis=1),
        "hlr": (light * population.hlr).sum(axis=1),
        "redshift": population.redshift,
        "kind": np.array([KINDS[k] for k in names]),
        "stamp": stamps,
        "stamp_x0": corner[:, 0],
        "stamp_y0": corner[:, 1],
        "correlation": correlation,
        "sky": sky.astype(np.float32),
    }


def _sources(info: SurveyInfo, rng: np.random.Generator) -> Population:
    """Stars first, then large galaxies, then the others, a tenth of them with odd colours."""
    n = int(rng.integers(40, 61))
    n_stars, n_large = int(rng.integers(5, 17)), int(rng.integers(1, 5))
    stars = draw_stars(n_stars, info, rng, mag_range=(14.8, 25.0))
    large = draw_population(n_large, info, rng, mag_range=(17.5, 21.5), count_slope=0.1, knot_fraction=0.6)
    wanted = np.exp(rng.uniform(np.log(1.0), np.log(5.0), n_large))
    large.hlr *= (wanted / large.hlr[:, 0])[:, None]
    slope = rng.uniform(0.1, 0.25)
    small = draw_population(n - n_stars - n_large, info, rng, mag_range=(17.5, 26.0), count_slope=slope)
    galaxies = concatenate([large, small])
    galaxies.source_id[:] = rng.integers(0, 2**31 - 2, len(galaxies))
    # The whole range of single profiles, on GalSim's grid of indices as in the population.
    single = (galaxies.kind != NONE).sum(axis=1) == 1
    redrawn = single & (rng.random(len(galaxies)) < 0.3)
    galaxies.sersic[redrawn, 0] = np.round(rng.uniform(0.5, 6.0, redrawn.sum()), 1)
    galaxies.g1[:], galaxies.g2[:] = np.clip(galaxies.g1, -0.7, 0.7), np.clip(galaxies.g2, -0.7, 0.7)
    factor = np.ones((len(galaxies), len(info.bands)))
    for row in np.flatnonzero(rng.random(len(galaxies)) < 0.1):
        if (odd := rng.integers(4)) < 2:
            factor[row, : odd + 1] = 0.0  # u or u and g dropouts
        else:
            tilt = rng.uniform(0.15, 0.35) * (1 if odd == 2 else -1)
            factor[row] = 10 ** (tilt * (np.arange(len(info.bands)) - info.band_names.index("i")))
    return concatenate([stars, dataclasses.replace(galaxies, flux=galaxies.flux * factor[:, None])])


def _positions(population: Population, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Places (x, y): a third anywhere, others near one of those, and some near the brightest."""
    n, edge = len(population), SKY_STAMP // 2 + 2
    total = population.total_flux.sum(axis=1)
    xy = rng.uniform(edge, SKY_SIZE - edge, (n, 2))
    order = rng.permutation(n)
    free, beside = order[: n // 3], order[n // 3 :]
    bright = free[np.argsort(-total[free])[:5]]
    for i in beside:
        if (choice := rng.random()) < 0.2:
            continue
        host, reach = (rng.choice(bright), 8.0) if choice < 0.5 else (rng.choice(free), 3.0)
        distance, angle = rng.uniform(0.6, reach) / scale, rng.uniform(0, 2 * np.pi)
        place = xy[host] + distance * np.array([np.cos(angle), np.sin(angle)])
        # One that would lie outside stays where it is, or the edge would be crowded.
        if (place > edge).all() and (place < SKY_SIZE - edge).all():
            xy[i] = place
    return xy


def _with_wings(psf: galsim.GSObject, rng: np.random.Generator) -> galsim.GSObject:
    """Add an aureole: a few percent of the light in a wide Moffat profile, as scattering leaves it."""
    share = 10 ** rng.uniform(-2.5, -1.2)
    aureole = galsim.Moffat(beta=rng.uniform(1.6, 2.5), fwhm=rng.uniform(1.5, 4.0), trunc=60.0)
    return (1 - share) * psf + share * aureole


def _radius(profile: galsim.GSObject, noise: float, scale: float) -> int:
    """Half-width at which to cut an image, pixel: the brighter an object, the farther it is seen."""
    usual = max(profile.getGoodImageSize(scale), SKY_STAMP + 2) // 2
    # 3000 sigma of light spread over the stamp's area is a tenth of sigma per pixel there.
    return min(MAX_RADIUS if profile.flux > 3000 * noise else usual, MAX_RADIUS)


def _saturated(image: NDArray, limit: float, axis: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Pixels of saturated cores, a little grown, and of bleeds along one axis from those far above."""
    core = image > limit
    lost = ndimage.binary_dilation(core, iterations=int(rng.integers(1, 3))) if core.any() else core
    labels, count = ndimage.label(core)
    for k in range(1, count + 1):
        inside = labels == k
        excess = image[inside].sum() / limit
        if excess < 60 or rng.random() < 0.3:
            continue
        centre = np.rint(ndimage.center_of_mass(inside)).astype(int)
        half = np.array([1, 1]) * int(rng.integers(0, 2))
        half[axis] = int(min(2 + np.sqrt(excess), 60))
        ys, xs = (slice(max(c - h, 0), c + h + 1) for c, h in zip(centre, half, strict=True))
        lost[ys, xs] = True
    return lost


def _sky_left_over(rng: np.random.Generator) -> NDArray[np.float64]:
    """A smooth sky in units of a pixel's noise: an offset, a gradient and a wave, together up to 0.1."""
    y, x = np.mgrid[:SKY_SIZE, :SKY_SIZE] / SKY_SIZE - 0.5
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    gradient = x * np.cos(angle) + y * np.sin(angle)
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(0.5, 2.5) * gradient + phase)
    shape = rng.uniform(-1, 1) + rng.uniform(0, 1) * gradient + wave
    return rng.uniform(0.01, 0.1) * shape / np.abs(shape).max()
