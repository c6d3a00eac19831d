# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""Arcelin et al. (2020), LSST, the paper's loss: `arcelin2020_lsst` starts from it."""

config.name = "arcelin2020_lsst_first"
config.survey = "LSST"
config.bands = ["u", "g", "r", "i", "z", "y"]
config.composition = "blends"
config.network.architecture = "convolutional"
# Galaxies as in the COSMOS sample: complete to F814W = 25.2, one colour each, no stars, r < 27.5.
config.population.n_train = 30_000
config.population.n_validation = 3_000
config.population.n_test = 5_000
config.population.mag_range = [18.0, 25.2]
config.population.count_slope = 0.3
config.population.faintest = {"r": 27.5}
config.population.colour_gradients = False
config.population.knot_fraction = 0.0
config.population.star_fraction = 0.0
config.population.stamp_size = 64
config.scene.cutout_size = 64
for step in (config.prior, config.deblender):
    step.samples = 102_400
    step.batch_size = 32
    step.validation_batches = 32
    step.validation_every = 1000
    step.optimizer = "muon"
    step.learning_rate = 1e-3
    step.weight_decay = 0.0
    step.loss_knee = 30.0
    step.kl_weight = 0.01
    step.gradient_clip = 1000.0
