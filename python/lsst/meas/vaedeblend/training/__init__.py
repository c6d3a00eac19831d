# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Training of deblending networks: simulated galaxies, networks, losses, fitting and export.

The data flows one way through the modules: `surveys` (what the telescope
does), `population` (what galaxies there are), `galaxies` (their images, the
bank), `scenes` (blends composed from the bank), `networks` and `losses`
(torch), `fit` (lightning), `export` (ONNX).
"""
