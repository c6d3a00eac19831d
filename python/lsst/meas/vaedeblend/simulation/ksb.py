# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shapes of noiseless images, as shear catalogues measure them."""

from __future__ import annotations

__all__ = ["ksb_shape"]

import galsim
import numpy as np
from numpy.typing import ArrayLike


def ksb_shape(image: ArrayLike, psf: ArrayLike) -> tuple[float, float]:
    """Measure a source's shape with the KSB method of `galsim.hsm` (Kaiser, Squires & Broadhurst 1995).

    Parameters
    ----------
    image, psf : array_like, (h, w)
        Noiseless image of the source, any unit, and the PSF it was seen through.

    Returns
    -------
    g1, g2 : `float`
        Reduced-shear ellipticity, corrected for the PSF; NaN where the measurement fails.
    """
    result = galsim.hsm.EstimateShear(
        galsim.Image(np.ascontiguousarray(image, np.float32)),
        galsim.Image(np.ascontiguousarray(psf, np.float32)),
        shear_est="KSB",
        strict=False,
    )
    # hsm marks a failed correction with -10.
    if result.error_message or result.corrected_g1 < -5:
        return np.nan, np.nan
    return result.corrected_g1, result.corrected_g2
