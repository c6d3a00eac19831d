# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks of Arcelin et al. (2020), each with its card; meas_vaedeblend finds them by an entry point."""
