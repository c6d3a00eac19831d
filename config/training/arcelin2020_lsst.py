# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""The deblender of Arcelin et al. (2020) for LSST: ugrizy, targets in the middle of the cutout."""

import os

config.load(os.path.join(os.path.dirname(__file__), "arcelin2020_lsst_first.py"))
config.name = "arcelin2020_lsst"
config.deblender.base = "arcelin2020_lsst_first"
# The prior is the first one's.
config.deblender.samples = 497_600
config.deblender.batch_size = 64
config.deblender.validation_batches = 16
config.deblender.validation_every = 400
config.deblender.learning_rate = 5e-4
# Less bias for more scatter: faint galaxies keep their shapes (doc/experiments/010).
config.deblender.exposures = 2
