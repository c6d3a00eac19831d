# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What everything stands on: flags, bands, cutouts, PSFs, noise, sky and peaks, as names, numbers and arrays.

Nothing here knows of networks, sources or the rest of the package; numpy, scipy and numba are enough.
"""
