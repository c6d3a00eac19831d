# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""Arcelin et al. (2020), LSST and Euclid, the paper's loss: `arcelin2020_lsst_euclid` starts from it."""

import os

config.load(os.path.join(os.path.dirname(__file__), "arcelin2020_lsst_first.py"))
config.name = "arcelin2020_lsst_euclid_first"
config.survey = "LSST+Euclid_VIS+Euclid_NISP"
# IE is VIS; YE, JE and HE are NISP's.
config.bands = ["u", "g", "r", "i", "z", "y", "IE", "YE", "JE", "HE"]
