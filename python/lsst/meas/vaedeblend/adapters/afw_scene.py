# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Coadds and merged detections of the LSST stack to `Scene`. Needs afw."""

from __future__ import annotations

__all__ = [
    "calibration",
    "exposure_from_cells",
    "parent_from_footprint",
    "plane",
    "psf_grid",
    "scene_from_exposures",
    "set_plane",
    "uncalibrated_unit",
    "union_planes",
]

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import astropy.units as u
import numpy as np
from lsst.geom import Box2I, Point2D
from lsst.pex.exceptions import Exception as StackException
from numpy.typing import NDArray

from ..scene import Parent, PsfGrid, Scene
from .mask_planes import BAD_PLANES, check_planes, names_in

if TYPE_CHECKING:
    from lsst.afw.detection import Footprint, Psf
    from lsst.afw.image import ExposureF, Mask
    from lsst.afw.math import BackgroundList
    from lsst.cell_coadds import MultipleCellCoadd


_LOG = logging.getLogger("lsst.meas.vaedeblend.adapters")


def exposure_from_cells(coadd: MultipleCellCoadd, background: BackgroundList) -> ExposureF:
    """Stitch the cells of a coadd and subtract its background, as measurement does.

    Parameters
    ----------
    coadd : `lsst.cell_coadds.MultipleCellCoadd`
        The coadd.
    background : `lsst.afw.math.BackgroundList`
        Background that detection found on it.

    Returns
    -------
    exposure : `lsst.afw.image.ExposureF`
        The coadd as one image.
    """
    exposure = coadd.stitch().asExposure()
    exposure.image -= background.getImage()
    return exposure


def calibration(exposure: ExposureF, default: float | None = None) -> float:
    """Give the flux density that one unit of an image stands for.

    Parameters
    ----------
    exposure : `lsst.afw.image.ExposureF`
        The coadd.
    default : `float`, optional
        Value for an image without a photometric calibration, nJy.

    Returns
    -------
    scale : `float`
        nJy per unit of the image.

    Raises
    ------
    ValueError
        Raised if there is no calibration and no default, or it varies over the image.
    """
    calib = exposure.getPhotoCalib()
    if calib is None:
        if default is None:
            raise ValueError("The coadd has units uncalibrated: it has no photometric calibration.")
        return default
    if not calib._isConstant:
        raise ValueError(f"The coadd's calibration varies over the image: {calib}.")
    return float(calib.getCalibrationMean())


def uncalibrated_unit(exposure: ExposureF, scale: float) -> str | None:
    """Tell whether a coadd's header contradicts a scale of 1 nJy.

    Parameters
    ----------
    exposure : `lsst.afw.image.ExposureF`
        The coadd.
    scale : `float`
        nJy per unit of the image, as its calibration or the configuration has it.

    Returns
    -------
    unit : `str` or `None`
        What ``BUNIT`` says, if that is no unit that converts to nJy although the scale is that of calibrated
        images.
    """
    metadata = exposure.getMetadata()
    if scale != 1.0 or metadata is None or "BUNIT" not in metadata:
        return None
    text = str(metadata.getScalar("BUNIT"))
    return None if u.Unit(text, parse_strict="silent").is_equivalent(u.nJy) else text


def plane(mask: Mask, name: str) -> NDArray[np.bool_]:
    """Where a mask plane is set; nowhere, if the mask does not have it.

    Parameters
    ----------
    mask : `lsst.afw.image.Mask`
        The mask.
    name : `str`
        Name of the plane, in afw or in lsst.images.

    Returns
    -------
    image : `numpy.ndarray`, (H, W)
        True where it is set.
    """
    names = names_in(name, mask.getMaskPlaneDict())
    if not names:
        return np.zeros(mask.array.shape, bool)
    return (mask.array & mask.getPlaneBitMask(names)) != 0


def union_planes(masks: Sequence[Mask], names: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
    """Where mask planes are set in any band.

    Parameters
    ----------
    masks : sequence of `lsst.afw.image.Mask`
        Masks of the bands.
    names : iterable of `str`
        Names of the planes, in afw or in lsst.images.

    Returns
    -------
    planes : `dict` [`str`, `numpy.ndarray`], (H, W)
        The union of each plane.

    Raises
    ------
    ValueError
        Raised if nobody knows a mask plane.
    """
    names = list(names)
    check_planes(names, {name for mask in masks for name in mask.getMaskPlaneDict()})
    return {name: np.logical_or.reduce([plane(mask, name) for mask in masks]) for name in names}


def set_plane(mask: Mask, name: str, footprints: Sequence[Footprint]) -> None:
    """Set a mask plane, which is added if need be, in footprints.

    Parameters
    ----------
    mask : `lsst.afw.image.Mask`
        The mask, changed in place.
    name : `str`
        Name of the plane.
    footprints : sequence of `lsst.afw.detection.Footprint`
        Where to set it; parts beyond the mask are left out.
    """
    mask.addMaskPlane(name)
    bit = mask.getPlaneBitMask(name)
    for footprint in footprints:
        footprint.spans.clippedTo(mask.getBBox()).setMask(mask, bit)


def parent_from_footprint(
    number: int, footprint: Footprint, peaks: NDArray[np.float64], origin: tuple[int, int]
) -> Parent:
    """Make a parent of a footprint.

    Parameters
    ----------
    number : `int`
        Identifier.
    footprint : `lsst.afw.detection.Footprint`
        The footprint, in tract pixels.
    peaks : `numpy.ndarray`, (K, 2)
        (x, y) of its peaks, tract pixel.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].

    Returns
    -------
    parent : `lsst.meas.vaedeblend.scene.Parent`
        The parent, in scene coordinates.
    """
    box = footprint.spans.getBBox()
    y0, x0 = origin
    return Parent(
        number,
        box.getMinY() - y0,
        box.getMinX() - x0,
        footprint.spans.asArray().astype(bool),
        np.asarray(peaks, float).reshape(-1, 2) - [x0, y0],
    )


def scene_from_exposures(
    exposures: Mapping[str, ExposureF],
    bands: Sequence[str],
    *,
    bad_planes: Sequence[str] = BAD_PLANES,
    edge_plane: str = "EDGE",
    psf_cell: tuple[int, int] = (300, 300),
    psf_origin: tuple[int, int] | None = None,
    scales: Mapping[str, float] | None = None,
    pixel_scale: float | None = None,
) -> Scene:
    """Make a scene, without parents, of the coadds of one patch.

    Parameters
    ----------
    exposures : mapping of `str` to `lsst.afw.image.ExposureF`
        Coadds by band, on one bounding box.
    bands : sequence of `str`
        Bands of the scene in order. One without a coadd is wholly invalid and has no PSF.
    bad_planes : sequence of `str`, optional
        Mask planes whose pixels may not be used, by their names in afw or in lsst.images (see
        `lsst.meas.vaedeblend.adapters.mask_planes`); those that a coadd does not have are passed over.
    edge_plane : `str`, optional
        Mask plane of pixels that detection could not reach.
    psf_cell : `tuple` [`int`], optional
        (y, x) size of the cells in which the PSF counts as constant, pixel.
    psf_origin : `tuple` [`int`], optional
        Tract pixel (y, x) of the corner of a cell; by default that of the coadds.
    scales : mapping of `str` to `float`, optional
        nJy per unit of the images; by default what `calibration` finds.
    pixel_scale : `float`, optional
        Width of a pixel, arcsec; by default that of the first coadd's WCS.

    Returns
    -------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene; its origin is the tract pixel (y, x) of array pixel [0, 0].

    Raises
    ------
    ValueError
        Raised if there is no coadd, their boxes differ, nobody knows a mask plane, or a calibration or the
        WCS is missing.
    """
    if not exposures:
        raise ValueError("No coadd to make a scene of.")
    first = next(iter(exposures.values()))
    box = first.getBBox()
    if other := [band for band, exposure in exposures.items() if exposure.getBBox() != box]:
        raise ValueError(f"The coadds of {other} are on other boxes than {box}.")
    check_planes(bad_planes, {name for e in exposures.values() for name in e.mask.getMaskPlaneDict()})
    shape = (len(bands), box.getHeight(), box.getWidth())
    image, variance = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    valid, edge = np.zeros(shape, bool), np.zeros(shape[1:], bool)
    for b, band in enumerate(bands):
        if band not in exposures:
            continue
        exposure = exposures[band]
        scale = calibration(exposure) if scales is None else scales[band]
        if unit := uncalibrated_unit(exposure, scale):
            _LOG.warning(
                "The coadd of band %s has units uncalibrated: BUNIT is %r, which does not convert to nJy, "
                "and its calibration is 1 nJy.",
                band,
                unit,
            )
        image[b] = exposure.image.array * scale
        variance[b] = exposure.variance.array * scale**2
        valid[b] = ~np.logical_or.reduce(
            [plane(exposure.mask, name) for name in bad_planes], initial=False, axis=0
        )
        edge |= plane(exposure.mask, edge_plane)
    if pixel_scale is None:
        wcs = first.getWcs()
        if wcs is None:
            raise ValueError("The coadd has no WCS.")
        pixel_scale = wcs.getPixelScale(Point2D(box.getCenter())).asArcseconds()
    psfs = [exposures[band].getPsf() if band in exposures else None for band in bands]
    return Scene(
        bands,
        image,
        variance,
        valid,
        psf=psf_grid(psfs, box, psf_cell, psf_origin),
        pixel_scale=pixel_scale,
        edge=edge,
        origin=(box.getMinY(), box.getMinX()),
    )


def psf_grid(
    psfs: Sequence[Psf | None],
    box: Box2I,
    cell_shape: tuple[int, int],
    cell_origin: tuple[int, int] | None = None,
) -> PsfGrid:
    """Evaluate PSFs in the middle of each cell of a grid.

    Parameters
    ----------
    psfs : sequence of `lsst.afw.detection.Psf` or `None`
        PSF of each band, if it has one.
    box : `lsst.geom.Box2I`
        Box of the coadds; cells at its border may reach beyond it.
    cell_shape : `tuple` [`int`]
        (y, x) size of the cells, pixel.
    cell_origin : `tuple` [`int`], optional
        Tract pixel (y, x) of the corner of some cell; by default that of the box.

    Returns
    -------
    grid : `lsst.meas.vaedeblend.scene.PsfGrid`
        Stamps on the largest of the kernel images' sizes; missing where a PSF cannot be computed, as where no
        visit contributes.
    """
    minimum = (box.getMinY(), box.getMinX())
    size = (box.getHeight(), box.getWidth())
    origin = minimum if cell_origin is None else cell_origin
    # Corner of the cell that holds the box's first pixel, and number of cells from there to its last.
    corner = [o + (m - o) // c * c for o, m, c in zip(origin, minimum, cell_shape, strict=True)]
    ny, nx = (
        math.ceil((m + s - k) / c) for m, s, k, c in zip(minimum, size, corner, cell_shape, strict=True)
    )
    kernels: list[list[NDArray | None]] = []
    for row in range(ny):
        for column in range(nx):
            # Of a cell at the border the middle of what lies on the box, where there are data.
            y, x = (
                0.5 * (max(k + n * c, m) + min(k + (n + 1) * c, m + s) - 1)
                for k, n, c, m, s in zip(corner, (row, column), cell_shape, minimum, size, strict=True)
            )
            kernels.append([_kernel(psf, Point2D(x, y)) for psf in psfs])
    known = [k for kernel in kernels for k in kernel if k is not None]
    height = max((k.shape[0] for k in known), default=1)
    width = max((k.shape[1] for k in known), default=1)
    stamps = np.full((ny * nx, len(psfs), height, width), np.nan)
    for i, kernel in enumerate(kernels):
        for b, k in enumerate(kernel):
            if k is not None:
                top, left = (height - k.shape[0]) // 2, (width - k.shape[1]) // 2
                stamps[i, b] = 0.0
                stamps[i, b, top : top + k.shape[0], left : left + k.shape[1]] = k
    return PsfGrid(stamps, cell_shape, (ny, nx), (corner[0] - minimum[0], corner[1] - minimum[1]))


def _kernel(psf: Psf | None, position: Point2D) -> NDArray[np.float64] | None:
    """Kernel image of a PSF, its centre in the middle; nothing if it cannot be computed."""
    if psf is None:
        return None
    try:
        image = psf.computeKernelImage(position)
    except StackException:
        return None
    box = image.getBBox()
    # The centre is the pixel (0, 0); should the box not be symmetric about it, what is missing is padded.
    ry, rx = max(-box.getMinY(), box.getMaxY()), max(-box.getMinX(), box.getMaxX())
    out = np.zeros((2 * ry + 1, 2 * rx + 1))
    y, x = ry + box.getMinY(), rx + box.getMinX()
    out[y : y + box.getHeight(), x : x + box.getWidth()] = image.array
    return out
