# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where pixels lie on the sky, and what their values mean."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area, proj_plane_pixel_scales

from ._files import Plane

__all__ = ["ZERO_POINT_KEYWORDS", "calibration", "common_frame"]

_LOG = logging.getLogger("lsst.meas.vaedeblend.adapters")

ZERO_POINT_KEYWORDS = ("MAGZERO", "MAGZPT", "PHOTZP", "ZEROPNT", "MAGZP", "ZP")
"""Header keywords of the AB magnitude of one unit of the pixels."""

PIXEL_SCALES = (0.01, 5.0)
"""Widths of a pixel, arcsec, beyond which they are taken for mistakes."""

LARGEST_SHIFT = 0.1
"""Distance of the same pixel in two bands, pixel, beyond which they are not on one grid."""


def common_frame(
    planes: dict[str, dict[str, Plane]],
    bands: Sequence[str],
    wcs: str | os.PathLike[str] | None,
    pixel_scale: float | None,
    problems: list[str],
) -> tuple[WCS | None, float]:
    """Find the WCS that all bands share, and the pixel scale, arcsec."""
    images = planes["image"]
    own: dict[str, WCS] = {}
    if wcs is not None:
        path = os.fspath(wcs)
        # A header in text form begins like one in a FITS file, but ends in lines.
        with open(path, "rb") as stream:
            text = b"\n" in stream.read(2880)
        header = fits.Header.fromtextfile(path) if text else _header(path)
        frame = _celestial(header)
        if frame is None:
            problems.append(f"{path}: there is no celestial WCS.")
    else:
        for band in bands:
            try:
                found = _celestial(images[band].header)
            except ValueError as error:
                problems.append(f"{images[band].name} (band {band}): {error}")
                continue
            if found is not None:
                own[band] = found
        frame = next(iter(own.values()), None)
        _check_grids(images, own, problems)
    scale = pixel_scale
    where = images[bands[0]].name
    if frame is not None:
        measured = float(np.sqrt(proj_plane_pixel_area(frame)) * 3600.0)
        sides = proj_plane_pixel_scales(frame)
        if max(sides) > 1.01 * min(sides):
            problems.append(
                f"{where}: its pixels are {sides[0] * 3600:.4g} x {sides[1] * 3600:.4g} arcsec by the WCS; "
                "the networks know square ones only. Resample the images."
            )
        if scale is None:
            scale = measured
        elif not 0.99 < scale / measured < 1.01:
            problems.append(
                f"{where}: --pixel-scale is {scale:.4g} arcsec, the WCS says {measured:.4g}; leave it out, "
                "or correct the WCS (--wcs)."
            )
    if scale is None:
        problems.append(f"{where} has no WCS: give the width of a pixel in arcsec (--pixel-scale), or --wcs.")
        scale = np.nan
    elif not PIXEL_SCALES[0] <= scale <= PIXEL_SCALES[1]:
        problems.append(
            f"{where}: pixels {scale:.4g} arcsec wide are absurd ({PIXEL_SCALES[0]} to {PIXEL_SCALES[1]} are "
            "not). Is the WCS in degrees, and complete? --pixel-scale and --wcs replace it."
        )
    return frame, float(scale)


def _celestial(header: fits.Header) -> WCS | None:
    """The celestial part of a header's WCS, if it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wcs = WCS(header)
        except Exception as error:
            raise ValueError(f"The WCS cannot be read: {error}") from error
        return wcs.celestial if wcs.has_celestial else None


def _header(path: str) -> fits.Header:
    """Header of the first part of a FITS file that has a WCS."""
    try:
        with fits.open(path) as hdus:
            for hdu in hdus:
                if "CTYPE1" in hdu.header:
                    return hdu.header.copy()
    except OSError as error:
        raise ValueError(f"{path} cannot be read as FITS or text header: {error}") from error
    raise ValueError(f"{path}: there is no WCS.")


def _check_grids(images: dict[str, Plane], own: dict[str, WCS], problems: list[str]) -> None:
    """Compare where the bands' pixels lie on the sky."""
    if not own:
        return
    if bare := [images[band].name for band in images if band not in own]:
        _LOG.warning("%s: no WCS; taken to be on the grid of the other bands.", ", ".join(bare))
    (first, frame), *others = own.items()
    height, width = images[first].array.shape
    x = np.array([0, width - 1, 0, width - 1, (width - 1) / 2.0])
    y = np.array([0, 0, height - 1, height - 1, (height - 1) / 2.0])
    sky = frame.pixel_to_world(x, y)
    for band, other in others:
        try:
            there = np.array(other.world_to_pixel(sky))
        except Exception:
            there = np.full((2, 5), np.inf)
        dx, dy = there - [x, y]
        shift = np.hypot(dx, dy)
        if not shift.max() <= LARGEST_SHIFT:
            problems.append(
                f"{images[band].name} (band {band}) lies {dx[4]:+.2f}, {dy[4]:+.2f} pixels (x, y) off "
                f"{images[first].name} (band {first}) by their WCS, up to {shift.max():.2f} at the corners. "
                "Bring all bands onto one grid (SWarp, or reproject.reproject_interp)."
            )


def calibration(
    images: dict[str, Plane],
    bands: Sequence[str],
    zeropoint: float | Mapping[str, float] | None,
    stored: dict[str, Any],
    pixel_scale: float,
    problems: list[str],
) -> dict[str, float]:
    """nJy per unit of each band, by what is said, stored or in the header, in this order."""
    if zeropoint is None and "zeropoint" in stored:
        points = np.broadcast_to(np.asarray(stored["zeropoint"], float), len(bands))
        zeropoint = dict(zip(bands, points.tolist(), strict=True))
    if isinstance(zeropoint, Mapping) and (unknown := sorted(set(zeropoint) - set(bands))):
        problems.append(f"There is a zero point of band {', '.join(unknown)}, which has no image.")
    out = {}
    for band in bands:
        plane = images[band]
        said = zeropoint.get(band) if isinstance(zeropoint, Mapping) else zeropoint
        if said is not None:
            found = {"--zeropoint": _of_magnitude(said)}
        else:
            found = _header_calibration(plane.header, pixel_scale)
        where = f"{plane.name} (band {band})"
        system = str(plane.header.get("MAGSYS", plane.header.get("PHOTSYS", "AB")))
        values = list(found.values())
        if not found or not np.isfinite(values).all() or min(values) <= 0:
            problems.append(
                f"{where} is uncalibrated: the header has no zero point ({', '.join(ZERO_POINT_KEYWORDS)}, "
                f"FLUXMAG0) and its unit, {plane.header.get('BUNIT') or 'none'}, does not convert to nJy. "
                f"Give the AB magnitude of one unit: --zeropoint {band}=MAG (31.4 if the pixels are nJy)."
            )
        elif max(values) > 1.01 * min(values):
            what = ", ".join(f"{value:.5g} by {name}" for name, value in found.items())
            problems.append(
                f"{where}: the header contradicts itself about nJy per unit: {what}. Say which is right: "
                f"--zeropoint {band}=MAG."
            )
        elif said is None and "vega" in system.lower():
            problems.append(
                f"{where}: the header's zero point is in Vega magnitudes; give that in AB: --zeropoint "
                f"{band}=MAG."
            )
        else:
            out[band] = values[0]
    return out


def _of_magnitude(zeropoint: float) -> float:
    """nJy of the AB magnitude ``zeropoint`` (Oke & Gunn 1983, ApJ 266, 713)."""
    return float((float(zeropoint) * u.ABmag).to_value(u.nJy))


def _header_calibration(header: fits.Header, pixel_scale: float) -> dict[str, float]:
    """nJy per unit by each keyword of a header that says it."""
    found = {}
    for name in ZERO_POINT_KEYWORDS:
        value = header.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = _of_magnitude(value)
    if isinstance(value := header.get("FLUXMAG0"), int | float) and value > 0:
        found["FLUXMAG0"] = _of_magnitude(0.0) / float(value)
    try:
        unit = u.Unit(str(header.get("BUNIT", "")))
    except ValueError:
        return found
    # Surface brightness counts per pixel.
    for whole in (unit, unit * (pixel_scale * u.arcsec) ** 2):
        try:
            found["BUNIT"] = float((1.0 * whole).to_value(u.nJy))
        except u.UnitConversionError:
            continue
    return found
