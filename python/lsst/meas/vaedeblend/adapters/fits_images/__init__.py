# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Anybody's images to `Scene`: FITS files per band, a FITS cube, or arrays in an npz file.

Files come from others and are believed only after a look at the pixels: what cannot be right (a weight map in
the place of a variance, sky left in, no zero point, bands on different grids, kernels of even size) is
refused with the file, the band and a remedy, all complaints at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from ...scene import PsfGrid, Scene, find_parents
from ..footprints import parents_from_peaks
from ._calibration import ZERO_POINT_KEYWORDS, calibration, common_frame
from ._checks import check_shapes, detected_pixels, noise_doubts, psf_problems, sky_doubts, sky_levels
from ._files import Given, Plane, name_of, planes_of, read_npz
from ._peaks import given_peaks

__all__ = ["ZERO_POINT_KEYWORDS", "Images", "read_images"]

_LOG = logging.getLogger("lsst.meas.vaedeblend.adapters")


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images of one piece of sky in all bands, calibrated and checked.

    Parameters
    ----------
    bands : `tuple` [`str`]
        Bands in the order of the arrays.
    image, variance : `numpy.ndarray`, (B, H, W)
        Pixels, nJy, and their variances, nJy^2.
    valid : `numpy.ndarray`, (B, H, W)
        Pixels that may be used.
    psf : `numpy.ndarray`, (B, h, w)
        PSF images with odd sides.
    pixel_scale : `float`
        Width of a pixel, arcsec.
    wcs : `astropy.wcs.WCS` or `None`
        Celestial coordinates, if they are known.
    files : `dict` [`str`, `str`]
        Name of each band's image file, for messages.
    nanojansky : `dict` [`str`, `float`]
        nJy per unit of each band's image file.
    sky : `dict` [`str`, `float`]
        Median of each band's source-free pixels, nJy; NaN where there are too few.
    peaks : `numpy.ndarray`, (K, 2), or `None`
        Given peaks (x, y), pixels from 0.
    groups : `numpy.ndarray`, (K,), or `None`
        Blend that each peak belongs to.
    """

    bands: tuple[str, ...]
    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    valid: NDArray[np.bool_]
    psf: NDArray[np.float64]
    pixel_scale: float
    wcs: WCS | None
    files: dict[str, str]
    nanojansky: dict[str, float]
    sky: dict[str, float] = dataclasses.field(default_factory=dict)
    peaks: NDArray[np.float64] | None = None
    groups: NDArray | None = None

    def detected(self) -> NDArray[np.bool_]:
        """Detected pixels, united over bands, (H, W)."""
        return detected_pixels(self.image, self.variance, self.valid, self.psf)

    def scene(self) -> Scene:
        """Make the scene: given peaks, or the connected regions of what is detected, for the deblender to
        find peaks in.

        Returns
        -------
        scene : `lsst.meas.vaedeblend.scene.Scene`
            Its coordinates are pixels of the files, counted from 0.

        Raises
        ------
        ValueError
            Raised if nothing is detected and no peak is given.
        """
        detected = self.detected()
        parents = (
            find_parents(detected)
            if self.peaks is None
            else parents_from_peaks(detected, self.peaks, self.groups)
        )
        if not parents:
            raise ValueError(
                "No pixel of the images is 5 standard deviations above the sky in any band, and no peaks "
                "were given: there is nothing to deblend."
            )
        return Scene(
            self.bands,
            self.image,
            self.variance,
            self.valid,
            psf=PsfGrid.constant(self.psf),
            pixel_scale=self.pixel_scale,
            parents=parents,
        )

    def coordinates(self, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        """Right ascension and declination (ICRS, degree) of pixels, as the catalogues take them.

        Raises
        ------
        ValueError
            Raised if the images have no WCS.
        """
        if self.wcs is None:
            raise ValueError("The images have no WCS.")
        sky = self.wcs.pixel_to_world(x, y).icrs
        return sky.ra.deg, sky.dec.deg


def read_images(
    image: Given,
    *,
    psf: Given | None = None,
    variance: Given | None = None,
    weight: Given | None = None,
    mask: Given | None = None,
    bands: Sequence[str] | None = None,
    zeropoint: float | Mapping[str, float] | None = None,
    pixel_scale: float | None = None,
    wcs: str | os.PathLike[str] | None = None,
    peaks: str | os.PathLike[str] | Table | None = None,
    bad_bits: int | None = None,
    check: bool = True,
) -> Images:
    """Read and check the images of one piece of sky.

    Every argument that holds pixels is one file for all bands (a FITS cube with one plane per band, an image
    that serves all of them, or an npz file) or a mapping of bands to FITS images. ``FILE[NAME]`` or
    ``FILE[2]`` says which extension of a FITS file; without it the first one with an image is taken. An npz
    file given as ``image`` may hold all else as well: ``image``, ``variance`` or ``weight``, ``psf``,
    ``mask`` (B, H, W), ``bands`` (B,), ``peaks`` (K, 2); nothing in it is unpickled.

    Parameters
    ----------
    image : path-like or mapping
        The images, background subtracted.
    psf : path-like or mapping
        PSF images with odd sides, centred on their middle pixel.
    variance, weight : path-like or mapping
        Variances, or weight maps, i.e. inverse variances, in units of the images; one of them per band.
    mask : path-like or mapping, optional
        Masks; pixels that are not 0 are not used.
    bands : sequence of `str`, optional
        Bands in the order of a cube's planes.
    zeropoint : `float` or mapping, optional
        AB magnitude of one unit of the images, for all bands or by band. Without it the header says it: a
        keyword of `ZERO_POINT_KEYWORDS`, ``FLUXMAG0``, or a ``BUNIT`` that converts to nJy.
    pixel_scale : `float`, optional
        Width of a pixel, arcsec; without it the WCS says it.
    wcs : path-like, optional
        FITS or text header with the WCS, instead of the images' own.
    peaks : path-like or `astropy.table.Table`, optional
        Peaks: ``x``, ``y`` (pixels from 0), ``X_IMAGE``, ``Y_IMAGE`` (from 1, as SExtractor has them),
        ``ra``, ``dec``, ``coord_ra``, ``coord_dec`` or ``ALPHA_J2000``, ``DELTA_J2000`` (degree), and
        optionally ``parent``.
    bad_bits : `int`, optional
        Bits of the masks that mean a bad pixel, all by default.
    check : `bool`, optional
        Whether noise and sky that the pixels contradict are refused, rather than warned about.

    Returns
    -------
    images : `Images`
        The images in nJy.

    Raises
    ------
    FileNotFoundError
        Raised if a file is not there.
    ValueError
        Raised with all that is wrong with the input, one line each.
    """
    stored: dict[str, Any] = {}
    if not isinstance(image, Mapping) and os.fspath(image).endswith(".npz"):
        stored = read_npz(os.fspath(image))
        bands = tuple(str(band) for band in stored["bands"]) if bands is None and "bands" in stored else bands
    if isinstance(image, Mapping):
        bands = tuple(image) if bands is None else tuple(bands)
    if not bands or len(set(bands)) != len(bands):
        raise ValueError(
            f"{name_of(image)} holds several bands: say which, in order (--bands, or the array bands in "
            f"an npz file), each once; there are {list(bands or ())}."
        )
    bands = tuple(bands)
    given: dict[str, Any] = {"variance": variance, "weight": weight, "psf": psf, "mask": mask}
    # What is said beats what is stored; of the two ways to give noise, too.
    said = {kind for kind, value in given.items() if value is not None}
    hidden = {"variance", "weight"} if said & {"variance", "weight"} else set()
    planes = {"image": planes_of("image", stored.get("image", image), bands)}
    for kind, value in given.items():
        value = stored.get(kind) if value is None and kind not in hidden else value
        planes[kind] = planes_of(kind, value, bands)

    problems: list[str] = []
    check_shapes(planes, bands, problems)
    if not planes["psf"]:
        problems.append("No PSF is given: one image per band (--psf BAND=FILE) is needed.")
    for band in bands:
        name = planes["image"][band].name
        if band in planes["variance"] and band in planes["weight"]:
            problems.append(f"{name} (band {band}): give a variance or a weight map, not both.")
        if band not in planes["variance"] and band not in planes["weight"]:
            problems.append(
                f"{name} (band {band}) has no variance: give --variance {band}=FILE, or --weight {band}=FILE "
                "if it is an inverse variance."
            )
        if planes["psf"]:
            if band in planes["psf"]:
                problems += psf_problems(planes["psf"][band], band)
            else:
                problems.append(f"{name} (band {band}) has no PSF: give --psf {band}=FILE.")
    frame, scale = common_frame(planes, bands, wcs, pixel_scale, problems)
    nanojansky = calibration(planes["image"], bands, zeropoint, stored, scale, problems)
    if problems:
        raise ValueError("\n".join(problems))

    factors = np.array([nanojansky[band] for band in bands])
    pixels, noise, valid = _arrays(planes, bands, factors, bad_bits, problems)
    if problems:
        raise ValueError("\n".join(problems))
    kernels = common_kernels([planes["psf"][band].array for band in bands])
    doubts = noise_doubts(planes, bands, pixels, noise, valid, factors)
    sky = sky_levels(pixels, noise, valid, kernels)
    doubts += sky_doubts(planes["image"], bands, noise, valid, sky)
    if doubts and check:
        raise ValueError("\n".join([*doubts, "If all this is as it should be, --force goes on."]))
    for doubt in doubts:
        _LOG.warning("%s", doubt)

    where, groups = given_peaks(stored.get("peaks") if peaks is None else peaks, frame, pixels.shape[1:])
    return Images(
        bands=bands,
        image=pixels,
        variance=noise,
        valid=valid,
        psf=kernels,
        pixel_scale=scale,
        wcs=frame,
        files={band: planes["image"][band].name for band in bands},
        nanojansky=nanojansky,
        sky=dict(zip(bands, sky.tolist(), strict=True)),
        peaks=where,
        groups=groups,
    )


def common_kernels(psfs: list[NDArray]) -> NDArray[np.float64]:
    """Put PSFs of different odd sizes onto one, (B, h, w), each with sum 1."""
    height, width = (max(p.shape[a] for p in psfs) for a in (0, 1))
    out = np.zeros((len(psfs), height, width))
    for stamp, psf in zip(out, psfs, strict=True):
        top, left = (height - psf.shape[0]) // 2, (width - psf.shape[1]) // 2
        stamp[top : top + psf.shape[0], left : left + psf.shape[1]] = psf / psf.sum(dtype=float)
    return out


def _arrays(
    planes: dict[str, dict[str, Plane]],
    bands: Sequence[str],
    factors: NDArray[np.float64],
    bad_bits: int | None,
    problems: list[str],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels, nJy, variances, nJy^2, and pixels to use, (B, H, W) each."""
    shape = (len(bands), *planes["image"][bands[0]].array.shape)
    pixels, noise, valid = (
        np.zeros(shape, np.float32),
        np.full(shape, np.inf, np.float32),
        np.zeros(shape, bool),
    )
    for b, (band, factor) in enumerate(zip(bands, factors, strict=True)):
        # In single precision variances in Jy^2 or smaller units would vanish.
        pixels[b] = planes["image"][band].array.astype(float) * factor
        if band in planes["variance"]:
            noise[b] = planes["variance"][band].array.astype(float) * factor**2
        else:
            weight = planes["weight"][band].array.astype(float)
            with np.errstate(invalid="ignore"):
                noise[b] = np.divide(factor**2, weight, out=np.full(weight.shape, np.inf), where=weight > 0)
        valid[b] = np.isfinite(pixels[b])
        with np.errstate(invalid="ignore"):
            valid[b] &= np.isfinite(noise[b]) & (noise[b] > 0)
        name = planes["image"][band].name
        if not valid[b].any():
            problems.append(f"{name} (band {band}): no pixel is finite with a positive, finite variance.")
            continue
        if band in planes["mask"]:
            mask = planes["mask"][band]
            bits = mask.array
            if bad_bits is not None:
                if bits.dtype.kind not in "iub":
                    problems.append(f"{mask.name} (band {band}): bad bits need a mask of integers.")
                    continue
                bits = bits.astype(np.int64) & bad_bits
            valid[b] &= bits == 0
            if not valid[b].any():
                problems.append(
                    f"{mask.name} (band {band}): the mask leaves no pixel. Pixels that are not 0 are not "
                    "used; if it has bits of several meanings, say which are bad (--bad-bits)."
                )
    pixels[~valid] = 0.0
    return pixels, noise, valid
