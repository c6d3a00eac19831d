# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The first network for HSC coadds: grizy, 0.168 arcsec per pixel."""

config.name = "hsc_grizy"  # noqa: F821
config.survey = "HSC"  # noqa: F821
config.bands = ["g", "r", "i", "z", "y"]  # noqa: F821
config.scene.psf_fwhm_range = [0.45, 1.1]  # noqa: F821
# surveycodex has the Wide survey's exposures; Deep and UltraDeep coadds reach several times fainter.
config.scene.noise_range = [0.15, 1.5]  # noqa: F821
config.prior.samples = 120_000  # noqa: F821
config.deblender.samples = 380_000  # noqa: F821
config.scene.noise_band_scatter = 0.35  # noqa: F821
