# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""The first network for LSST coadds: ugrizy, 0.2 arcsec per pixel."""

config.name = "lsst_ugrizy"
config.survey = "LSST"
config.bands = ["u", "g", "r", "i", "z", "y"]
config.prior.samples = 140_000
config.deblender.samples = 450_000
