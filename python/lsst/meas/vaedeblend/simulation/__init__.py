# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is simulated: galaxies, and images in which they blend. Needs GalSim, neither torch nor a network.

The data flows one way through the modules: `surveys` (what the telescope does), `population` (what galaxies
there are), `galaxies` (their images, the bank of rendered components). From there `scenes` (crowded fields,
for training) and `blends` (single blends as in Arcelin et al. 2020) compose samples of a bank, which `banks`
makes as a configuration (`config`) says; `patch`, `fields` and `sky_fields` draw images with a truth to
measure the deblender on. `ksb` measures shapes.
"""
