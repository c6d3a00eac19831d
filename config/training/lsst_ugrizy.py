# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The first network for LSST coadds: ugrizy, 0.2 arcsec per pixel."""

config.name = "lsst_ugrizy"  # noqa: F821
config.survey = "LSST"  # noqa: F821
config.bands = ["u", "g", "r", "i", "z", "y"]  # noqa: F821
config.prior.samples = 140_000  # noqa: F821
config.deblender.samples = 450_000  # noqa: F821
