# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The mathematics of the deblender: arrays in, arrays out, no knowledge of the procedure.

Notes
-----
From the bottom to the top:

``kernels``
    Compiled loops over pixels.
``grids``
    Squares of pixels on which sources are drawn and linearised, and what the graphs need to do so.
``stamps``
    Images of sources, each on a square of its own width.
``groups``
    Sources that see each other, and linear systems of their latents.
``fluxes``
    Joint fluxes at given shapes.
"""

from __future__ import annotations

from . import kernels
from .fluxes import joint_fluxes
from .grids import WIDTHS, Grids
from .groups import GaussNewton, overlapping_pairs
from .stamps import Stamps

__all__ = [
    "WIDTHS",
    "GaussNewton",
    "Grids",
    "Stamps",
    "joint_fluxes",
    "kernels",
    "overlapping_pairs",
]
