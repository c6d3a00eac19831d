# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""The network for LSST coadds: ugrizy, 0.2 arcsec per pixel."""

config.name = "lsst_ugrizy"
config.survey = "LSST"
config.bands = ["u", "g", "r", "i", "z", "y"]
# The runtime refines the latent variables on the pixels: the encoder only has to come close, and its cost
# and that of the decoder's derivatives are what a source costs (doc/experiments/004).
config.network.widths = [32, 64, 128]
config.network.latent_size = 24
config.network.rungs = 6
config.network.free_gaussians = 6
config.prior.samples = 400_000
config.deblender.samples = 850_000
