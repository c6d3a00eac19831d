# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measuring the deblender: on simulations with their truth, and on real data without one."""
