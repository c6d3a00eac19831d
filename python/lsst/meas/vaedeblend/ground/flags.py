# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every flag that the outputs have, and what it means."""

from __future__ import annotations

__all__ = ["FLAGS", "PARENT_FLAGS", "SKIP_FLAGS", "SOURCE_FLAGS"]

SOURCE_FLAGS: dict[str, str] = {
    "edge": "The peak is close to the border of the image or to pixels too close to the edge for detection",
    "masked_centre": "The pixel of the peak is masked in a band",
    "peak_outside": "The peak lies outside the image; there is no model",
    "masked": "The parent has no valid pixel; there is no model",
    "too_many_peaks": "Not among the brightest peaks of a parent with more than allowed; there is no model",
    "not_finite": "The network's output was not finite, or empty",
    "fallback": "No model from the network: a point source and its share of what the image holds instead",
    "point_source": "The PSF explains the pixels better than a galaxy of the network: it is the model",
    "bright_neighbour": "Errors of the neighbours' models may make up a quarter of its flux or more",
    "poor_fit": "The model misses the pixels under it: deblend_chi2 is above 2",
    "no_psf": "A PSF is missing here and that of the nearest cell was used, or its band has none",
    "missing_band": "A band has no valid pixel under the model, or no PSF; its flux is NaN",
    "outside_training_range": "Noise or seeing is outside the range the network was trained on",
    "insignificant": "Removing the source would raise chi-square by less than its parameters cost",
    "no_convergence": "Its fit still moved, or was stuck, when the procedure ended",
}
"""Flags of sources: name to meaning."""

PARENT_FLAGS: dict[str, str] = {
    "masked": "No pixel of the footprint is valid; nothing was deblended",
    "parent_too_big": "The footprint's bounding box is larger than the network's cutout",
    "too_many_peaks": "There are more peaks than allowed; only the brightest were deblended",
    "no_convergence": "The iteration limit came before the fluxes settled or new peaks ran out",
    "incomplete_data": "Some pixels of the footprint are not valid in every band",
    "failed_source": "A source has no model from the network",
    "no_peak": "No peak was given and none was significant: the maximum was taken",
}
"""Flags of parents: name to meaning."""

FLAGS: dict[str, str] = {**PARENT_FLAGS, **SOURCE_FLAGS}
"""All flags: name to meaning. Columns are called ``deblend_flag_`` and the name."""

SKIP_FLAGS: dict[str, str] = {
    "parentTooBig": "Parent footprint is larger or more elongated than the limits allow",
    "masked": "Parent footprint has too many masked pixels",
    "tooManyPeaks": "Parent has more peaks than the limit allows",
}
"""Reasons to skip a parent: end of the flag's name to meaning; both are scarlet's."""
