# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Training of deblending networks on simulated galaxies.

Samples come from `lsst.meas.vaedeblend.simulation`; here are `networks`, `convolutional` and `losses`
(torch), `fit` (lightning) and `export` (ONNX).
"""

from __future__ import annotations

import sys

from ..simulation import config

# Configurations that were saved when their classes were here, as in the metadata of networks, import these.
for _name in ("blends", "config", "scenes"):
    sys.modules[f"{__name__}.{_name}"] = config
