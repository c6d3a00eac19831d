# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading and writing of LsstScarletModelData zip files, without afw and without scarlet.

A file of extension ``.scarlet`` holds the models of one patch. What they share is in the JSON members
``version`` and ``metadata``; each parent and each isolated source has a member named by its id. Positions and
boxes are (y, x) in absolute tract pixels. Models live in a frame of their own, whose PSF is in the file;
measurement convolves them with the kernel between it and the observed PSF.

What is read: schema 1.0.0 and 1.0.1 (scarlet models with the parents' footprints in their metadata), 1.0.2
(footprints as packed bits) and 1.0.3 (PSFs as documents of their own, one image or one for each cell). What
is written: 1.0.1, from which later readers migrate.

Notes
-----
From the bottom to the top, each module importing only from those above it in this list:

``_records``
    What a file holds.
``_read``, ``_write``
    Files to records and back.
``_factorize``
    A model as few products of a spectrum and an image; `models_to_scarlet` writes them.
``_convert``
    Deblended sources to records.
``_render``
    Records to images.
"""

from __future__ import annotations

from ._convert import isolated_to_scarlet, models_to_scarlet
from ._factorize import factorize
from ._read import read
from ._records import (
    CubeComponent,
    FactorizedComponent,
    IsolatedSource,
    ScarletBlend,
    ScarletFileError,
    ScarletModels,
    ScarletParent,
    ScarletSource,
)
from ._render import render
from ._write import write

__all__ = [
    "CubeComponent",
    "FactorizedComponent",
    "IsolatedSource",
    "ScarletBlend",
    "ScarletFileError",
    "ScarletModels",
    "ScarletParent",
    "ScarletSource",
    "factorize",
    "isolated_to_scarlet",
    "models_to_scarlet",
    "read",
    "render",
    "write",
]
