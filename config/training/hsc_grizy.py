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
