# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""Arcelin et al. (2020), section 2.1.3 (i): targets anywhere in a square of one LSST pixel."""

import os

config.load(os.path.join(os.path.dirname(__file__), "arcelin2020_lsst.py"))
config.name = "arcelin2020_decentred_uniform"
config.prior.base = config.deblender.base = "arcelin2020_lsst"
config.blend.decentring = "uniform"
# Shifts are made in Fourier space: what leaves a stamp comes back on the other side, not in the cutout.
config.population.stamp_size = 96
config.population.n_train = 12_000
config.population.n_validation = config.population.n_test = 1500
config.prior.samples = 19_200
# What ships saw two exposures in the first 96 000 (doc/experiments/010).
config.deblender.samples = 128_000
config.deblender.exposures = 4
config.prior.learning_rate = config.deblender.learning_rate = 5e-4
