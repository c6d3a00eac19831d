# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Survey parameters, taken from the `surveycodex` and `speclite` packages."""

from __future__ import annotations

__all__ = ["AB_ZEROPOINT_NJY", "BandInfo", "SurveyInfo", "get_survey_info"]

import dataclasses
import functools

import astropy.units as u
import numpy as np
import speclite.filters
import surveycodex
from surveycodex.utilities import mean_sky_level

AB_ZEROPOINT_NJY = 31.4
"""AB magnitude of 1 nJy, to the three digits the pipelines use."""

_FILTER_GROUPS = {"LSST": "lsst2023", "HSC": "hsc2017", "Euclid_VIS": "euclid", "Euclid_NISP": "euclid"}


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
    wavelength, response : `numpy.ndarray`
        Filter curve: wavelength in nm and dimensionless transmission.
    """

    name: str
    noise: float
    psf_fwhm: float
    counts_per_njy: float
    wavelength: np.ndarray = dataclasses.field(repr=False, compare=False)
    response: np.ndarray = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class SurveyInfo:
    """A survey: its pixel scale (arcsec per pixel) and its bands, in order."""

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


@functools.cache
def get_survey_info(name: str, bands: tuple[str, ...] | None = None) -> SurveyInfo:
    """Collect what simulations need to know of a survey.

    Parameters
    ----------
    name : `str`
        A survey of `surveycodex` with filter curves in `speclite`: "LSST",
        "HSC", "Euclid_VIS" or "Euclid_NISP".
    bands : `tuple` [`str`], optional
        Bands in the order wanted; all of the survey's by default.

    Returns
    -------
    info : `SurveyInfo`

    Raises
    ------
    ValueError
        If the survey is unknown, or lacks one of the bands.

    Notes
    -----
    The background noise is the Poisson noise of the mean sky level,
    ``sqrt(sky)`` electrons, over the electrons that 1 nJy yields.
    """
    if name not in _FILTER_GROUPS:
        raise ValueError(f"Unknown survey {name!r}; known are {', '.join(sorted(_FILTER_GROUPS))}.")
    survey = surveycodex.get_survey(name)
    wanted = tuple(survey.available_filters) if bands is None else bands
    if missing := [b for b in wanted if b not in survey.available_filters]:
        raise ValueError(
            f"Survey {name} has no band {', '.join(missing)}; it has {survey.available_filters}."
        )
    infos = []
    for band in wanted:
        filt = survey.get_filter(band)
        curve = speclite.filters.load_filter(f"{_FILTER_GROUPS[name]}-{band}")
        # surveycodex's zeropoint is the magnitude that gives 1 electron/s.
        per_second = 10 ** (-0.4 * (AB_ZEROPOINT_NJY - filt.zeropoint.value))
        counts_per_njy = per_second * filt.full_exposure_time.to_value(u.s)
        sky = mean_sky_level(survey, filt).value
        infos.append(
            BandInfo(
                name=band,
                noise=float(np.sqrt(sky) / counts_per_njy),
                psf_fwhm=float(filt.psf_fwhm.to_value(u.arcsec)),
                counts_per_njy=float(counts_per_njy),
                wavelength=np.asarray(curve.wavelength) / 10.0,
                response=np.asarray(curve.response),
            )
        )
    return SurveyInfo(name=name, pixel_scale=float(survey.pixel_scale.to_value(u.arcsec)), bands=tuple(infos))
