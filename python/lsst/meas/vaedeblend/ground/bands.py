# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Choices among the bands there are."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["reference_band"]


def reference_band(bands: Sequence[str]) -> str:
    """Choose the band in which shapes are measured and trainings judged.

    Parameters
    ----------
    bands : `~collections.abc.Sequence` [`str`]
        Bands there are.

    Returns
    -------
    band : `str`
        r or i, where galaxies are measured best from the ground, or else the middle one.
    """
    return next((band for band in ("r", "i") if band in bands), bands[len(bands) // 2])
