# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bridges between the pipelines' data types and the arrays the deblender works on."""
