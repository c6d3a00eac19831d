# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""The deblender of Arcelin et al. (2020) for LSST and Euclid together: ten bands, three pixel scales."""

import os

config.load(os.path.join(os.path.dirname(__file__), "arcelin2020_lsst.py"))
config.name = "arcelin2020_lsst_euclid"
config.deblender.base = "arcelin2020_lsst_euclid_first"
config.survey = "LSST+Euclid_VIS+Euclid_NISP"
# IE is VIS; YE, JE and HE are NISP's.
config.bands = ["u", "g", "r", "i", "z", "y", "IE", "YE", "JE", "HE"]
