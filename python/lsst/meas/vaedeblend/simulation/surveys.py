# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Survey parameters, taken from the `surveycodex` and `speclite` packages."""

from __future__ import annotations

__all__ = ["AB_ZEROPOINT_NJY", "BandInfo", "SurveyInfo", "get_survey_info", "survey_of"]

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import astropy.units as u
import numpy as np
import speclite.filters
import surveycodex
from surveycodex.utilities import mean_sky_level

AB_ZEROPOINT_NJY = 31.4
"""AB magnitude of 1 nJy, to the three digits the pipelines use."""

_FILTER_GROUPS = {"LSST": "lsst2023", "HSC": "hsc2017", "Euclid_VIS": "Euclid", "Euclid_NISP": "Euclid"}
_FILTER_NAMES = {"IE": "VIS", "YE": "Y", "JE": "J", "HE": "H"}
"""Where speclite's name of a filter is not surveycodex's."""


@dataclasses.dataclass(frozen=True)
class BandInfo:
    """One band of a survey.

    Attributes
    ----------
    name : `str`
        Band name, e.g. "r".
    noise : `float`
        Background standard deviation per pixel at the survey's full
        exposure, nJy.
    psf_fwhm : `float`
        Typical full width at half maximum of the PSF, arcsec.
    counts_per_njy : `float`
        Electrons collected per nJy in the full exposure.
    sky_counts : `float`
        Electrons per pixel that the sky gives in the full exposure.
    pixel_scale : `float`
        arcsec per pixel.
    wavelength, response : `numpy.ndarray`
        Filter curve: wavelength in nm and dimensionless transmission.
    """

    name: str
    noise: float
    psf_fwhm: float
    counts_per_njy: float
    sky_counts: float
    pixel_scale: float
    wavelength: np.ndarray = dataclasses.field(repr=False, compare=False)
    response: np.ndarray = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class SurveyInfo:
    """A survey, or several together: bands in order, and the pixel scale (arcsec per pixel) of the first."""

    name: str
    pixel_scale: float
    bands: tuple[BandInfo, ...]

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(b.name for b in self.bands)

    @property
    def noise(self) -> np.ndarray:
        """Background standard deviation per band, nJy, shape (B,)."""
        return np.array([b.noise for b in self.bands])

    @property
    def instruments(self) -> tuple[SurveyInfo, ...]:
        """The runs of bands that have the same pixels, each a survey of its own; one for a single survey."""
        runs = itertools.groupby(self.bands, key=lambda b: b.pixel_scale)
        return tuple(SurveyInfo(self.name, scale, tuple(bands)) for scale, bands in runs)


@functools.cache
def get_survey_info(
    name: str, bands: tuple[str, ...] | None = None, exposure: tuple[tuple[str, float], ...] = ()
) -> SurveyInfo:
    """Collect what simulations need to know of a survey.

    Parameters
    ----------
    name : `str`
        A survey of `surveycodex` with filter curves in `speclite`: "LSST",
        "HSC", "Euclid_VIS" or "Euclid_NISP"; or several joined by "+".
    bands : `tuple` [`str`], optional
        Bands in the order wanted; all of the survey's by default.
    exposure : `tuple` [`tuple` [`str`, `float`]], optional
        Bands and their exposure times, s, where these are not surveycodex's.

    Returns
    -------
    info : `SurveyInfo`

    Raises
    ------
    ValueError
        If a survey is unknown, or lacks one of the bands.

    Notes
    -----
    The background noise is the Poisson noise of the mean sky level,
    ``sqrt(sky)`` electrons, over the electrons that 1 nJy yields.
    """
    known: dict[str, str] = {}
    for part in name.split("+"):
        if part not in _FILTER_GROUPS:
            raise ValueError(f"Unknown survey {part!r}; known are {', '.join(sorted(_FILTER_GROUPS))}.")
        known |= dict.fromkeys(surveycodex.get_survey(part).available_filters, part)
    wanted = tuple(known) if bands is None else bands
    if missing := [b for b in wanted if b not in known]:
        raise ValueError(f"Survey {name} has no band {', '.join(missing)}; it has {list(known)}.")
    infos = tuple(_band_info(known[b], b, dict(exposure).get(b)) for b in wanted)
    return SurveyInfo(name=name, pixel_scale=infos[0].pixel_scale, bands=infos)


def survey_of(bands: Sequence[str], pixel_scale: float) -> str:
    """Find the survey that has given bands and pixels.

    Parameters
    ----------
    bands : sequence of `str`
        Bands.
    pixel_scale : `float`
        arcsec per pixel, to a hundredth.

    Returns
    -------
    name : `str`
        The first of those that `get_survey_info` knows.

    Raises
    ------
    ValueError
        Raised if none has them.
    """
    for name in _FILTER_GROUPS:
        survey = surveycodex.get_survey(name)
        scale = survey.pixel_scale.to_value(u.arcsec)
        if set(bands) <= set(survey.available_filters) and abs(scale / pixel_scale - 1) < 0.01:
            return name
    raise ValueError(
        f"No survey of {', '.join(_FILTER_GROUPS)} has the bands {', '.join(bands)} in pixels of "
        f"{pixel_scale} arcsec."
    )


def _band_info(name: str, band: str, exposure: float | None) -> BandInfo:
    survey = surveycodex.get_survey(name)
    filt = survey.get_filter(band)
    curve = speclite.filters.load_filter(f"{_FILTER_GROUPS[name]}-{_FILTER_NAMES.get(band, band)}")
    seconds = filt.full_exposure_time.to_value(u.s) if exposure is None else exposure
    # surveycodex's zeropoint is the magnitude that gives 1 electron/s.
    per_second = 10 ** (-0.4 * (AB_ZEROPOINT_NJY - filt.zeropoint.value))
    sky = mean_sky_level(survey, filt).value * seconds / filt.full_exposure_time.to_value(u.s)
    return BandInfo(
        name=band,
        noise=float(np.sqrt(sky) / (per_second * seconds)),
        psf_fwhm=float(filt.psf_fwhm.to_value(u.arcsec)),
        counts_per_njy=float(per_second * seconds),
        sky_counts=float(sky),
        pixel_scale=float(survey.pixel_scale.to_value(u.arcsec)),
        wavelength=np.asarray(curve.wavelength) / 10.0,
        response=np.asarray(curve.response),
    )
