# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deblending of galaxies on multi-band coadds with variational autoencoders."""
