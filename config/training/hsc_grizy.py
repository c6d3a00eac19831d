# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""The network for HSC coadds: grizy, 0.168 arcsec per pixel."""

config.name = "hsc_grizy"
config.survey = "HSC"
config.bands = ["g", "r", "i", "z", "y"]
config.scene.psf_fwhm_range = [0.45, 1.1]
# surveycodex has the Wide survey's exposures; Deep and UltraDeep coadds reach several times fainter.
config.scene.noise_range = [0.15, 1.5]
config.scene.noise_band_scatter = 0.35
config.network.widths = [32, 64, 128]
config.network.latent_size = 24
config.network.rungs = 6
config.network.free_gaussians = 6
config.prior.samples = 400_000
config.deblender.samples = 850_000
# A population as wide as coadds (doc/experiments/013): brighter, larger, more concentrated; stars to r = 15.
config.population.mag_range = [17.0, 27.0]
config.population.size_scatter = 0.3
config.population.sersic_range = [0.5, 6.0]
config.population.star_fraction = 0.15
config.population.star_mag_range = [15.0, 26.0]
config.scene.psf_size = 121
config.scene.noise_correlation = [0.0, 0.3]
config.scene.sky_error = 0.1
config.scene.saturated_fraction = 0.5
config.scene.boosted_fraction = 0.03
config.scene.odd_colour_fraction = 0.06
config.scene.subtraction_spread = 1.3
config.scene.subtraction_shift = 0.1
