# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names of mask planes: afw and lsst.images call some of the same planes differently."""

from __future__ import annotations

__all__ = ["BAD_PLANES", "EQUIVALENTS", "check_planes", "names_in"]

from collections.abc import Collection, Iterable

EQUIVALENTS: dict[str, str] = {
    "CR": "COSMIC_RAY",
    "EDGE": "DETECTION_EDGE",
    "INTRP": "INTERPOLATED",
    "SAT": "SATURATED",
    "UNMASKEDNAN": "UNMASKED_NAN",
}
"""Name in afw to name in lsst.images, where the two differ."""

_SAME = (
    "BAD",
    "CELL_EDGE",
    "CLIPPED",
    "CROSSTALK",
    "DETECTED",
    "DETECTED_NEGATIVE",
    "HIGH_VARIANCE",
    "INEXACT_PSF",
    "INJECTED",
    "INJECTED_CORE",
    "INJECTED_CORE_TEMPLATE",
    "INJECTED_TEMPLATE",
    "ITL_DIP",
    "NOT_DEBLENDED",
    "NO_DATA",
    "PARTLY_VIGNETTED",
    "REJECTED",
    "SAT_TEMPLATE",
    "SENSOR_EDGE",
    "SPIKE",
    "STREAK",
    "SUSPECT",
    "VIGNETTED",
)

_KNOWN = frozenset((*EQUIVALENTS, *EQUIVALENTS.values(), *_SAME))

BAD_PLANES: tuple[str, ...] = ("BAD", "NO_DATA", "SAT", "SUSPECT", "EDGE")
"""Planes whose pixels are not used unless configured otherwise; they are scarlet's."""


def names_in(name: str, present: Collection[str]) -> list[str]:
    """Find the names that a mask has for a plane.

    Parameters
    ----------
    name : `str`
        Name of the plane, in afw or in lsst.images.
    present : collection of `str`
        Planes of the mask.

    Returns
    -------
    names : `list` [`str`]
        What the mask calls it; empty if it does not have the plane.
    """
    same = {name, EQUIVALENTS.get(name, name), *(old for old, new in EQUIVALENTS.items() if new == name)}
    return sorted(same & set(present))


def check_planes(names: Iterable[str], present: Collection[str]) -> None:
    """Refuse names that are misspelt.

    A plane that the pipelines know may be absent: not all kinds of coadds have all of them.

    Parameters
    ----------
    names : iterable of `str`
        Names of planes, in afw or in lsst.images.
    present : collection of `str`
        Planes that any of the masks has.

    Raises
    ------
    ValueError
        Raised if a name is neither that of a plane that is there nor of one that the pipelines know.
    """
    for name in names:
        if name not in _KNOWN and name not in present:
            raise ValueError(f"There is no mask plane {name}; the coadds have {', '.join(sorted(present))}.")
