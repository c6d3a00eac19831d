# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F821
"""Arcelin et al. (2020), section 5.2: the LSST+Euclid deblender trained on, one galaxy in five being real.

The catalogue of real galaxies is $VAEDEBLEND_REAL_CATALOGUE, or real_galaxy_catalog_25.2.fits, as
galsim_download_cosmos names it, in the working directory.
"""

import os

config.load(os.path.join(os.path.dirname(__file__), "arcelin2020_lsst_euclid.py"))
config.name = "arcelin2020_transfer"
config.deblender.base = "arcelin2020_lsst_euclid"
config.population.real_catalogue = os.environ.get(
    "VAEDEBLEND_REAL_CATALOGUE", "real_galaxy_catalog_25.2.fits"
)
config.population.real_fraction = 0.2
config.population.real_shear = 0.3
# A catalogue of few galaxies has some left for a test that says something.
config.population.n_train = 5000
config.population.n_validation = 500
config.population.n_test = 2500
config.deblender.samples = 25_600
config.deblender.learning_rate = 3e-4
