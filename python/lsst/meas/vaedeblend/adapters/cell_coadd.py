# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""`lsst.images.cells.CellCoadd` to `Scene`, and results to `lsst.images.MaskedImage`. No afw."""

from __future__ import annotations

__all__ = ["masked_image", "scene_from_cell_coadds", "union_planes"]

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence

import astropy.units as u
import numpy as np
from astropy.table import Column, Table
from lsst.images import Box, Image, Interval, MaskedImage
from lsst.images.cells import CellCoadd

from ..ground.identifiers import PatchIds
from ..scene import PsfGrid, Scene, find_parents
from .footprints import parents_from_peaks
from .mask_planes import BAD_PLANES, check_planes, names_in

_LOG = logging.getLogger("lsst.meas.vaedeblend.adapters")


def scene_from_cell_coadds(
    coadds: Mapping[str, CellCoadd],
    bands: Sequence[str] | None = None,
    *,
    bad_planes: Sequence[str] = BAD_PLANES,
    detected_plane: str | None = "DETECTED",
    edge_plane: str = "EDGE",
    peaks: Table | None = None,
) -> Scene:
    """Make the deblender's scene from the coadds of one patch.

    Images are converted to nJy. The parents are the connected regions of the detection plane, united over
    bands. Where the coadds cover different parts of the patch the scene covers all of them, and what a band
    lacks is invalid there.

    Parameters
    ----------
    coadds : mapping of `str` to `lsst.images.cells.CellCoadd`
        Coadds by band, on one cell grid.
    bands : sequence of `str`, optional
        Bands of the scene in order, by default those of ``coadds``. A band without coadd is wholly invalid
        and has no PSF.
    bad_planes : sequence of `str`, optional
        Mask planes whose pixels may not be used, by their names in lsst.images or in afw (see
        `lsst.meas.vaedeblend.adapters.mask_planes`); those that a coadd does not have are passed over.
    detected_plane, edge_plane : `str`, optional
        Mask planes of detected pixels, and of pixels that detection could not reach. Without the name of the
        former the scene has no parents but those of given peaks. A coadd that does not have it is warned
        about, and if none has it there must be peaks.
    peaks : `astropy.table.Table`, optional
        Columns ``x`` and ``y`` (tract pixel) and optionally ``parent``, see `parents_from_peaks`. Without it
        the parents have no peaks and the deblender finds them.

    Returns
    -------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        Its origin is the tract pixel (y, x) of array pixel [0, 0], and its parents have the identifiers of
        the patch (`~lsst.meas.vaedeblend.ground.identifiers.PatchIds`).

    Raises
    ------
    ValueError
        Raised when there is no coadd, coadds differ in their cell grid or tract, nobody knows a mask plane,
        all lack the plane of detected pixels and no peaks are given, a unit is not a flux density per pixel,
        or the peak table lacks a column.
    """
    if not coadds:
        raise ValueError("No coadd to make a scene of.")
    bands = tuple(coadds) if bands is None else tuple(bands)
    if unused := set(coadds) - set(bands):
        raise ValueError(f"Coadds of bands {sorted(unused)} are not among the scene's bands {bands}.")
    first = next(iter(coadds.values()))
    for band, coadd in coadds.items():
        if coadd.grid != first.grid:
            raise ValueError(f"The cell grid of band {band}, {coadd.grid}, is not the others', {first.grid}.")
        if (coadd.skymap, coadd.tract) != (first.skymap, first.tract):
            raise ValueError(f"Band {band} is of tract {coadd.tract}, the others of {first.tract}.")
    check_planes(bad_planes, {name for coadd in coadds.values() for name in coadd.mask.schema.names})
    if detected_plane is not None:
        bare = [b for b, coadd in coadds.items() if detected_plane not in coadd.mask.schema.names]
        if len(bare) == len(coadds) and peaks is None:
            raise ValueError(
                f"No coadd has the mask plane {detected_plane}, so that nothing says where the sources are: "
                "run detection first, or give peaks (usePeaks)."
            )
        if bare:
            _LOG.warning(
                "The coadds of band %s have no mask plane %s: nothing counts as detected there.",
                ", ".join(bare),
                detected_plane,
            )

    box = _hull(coadds)
    shape = (len(bands), box.y.size, box.x.size)
    image = np.zeros(shape, np.float32)
    variance = np.ones(shape, np.float32)
    valid = np.zeros(shape, bool)
    detected = np.zeros(shape[1:], bool)
    edge = np.zeros(shape[1:], bool)
    for b, band in enumerate(bands):
        if band not in coadds:
            continue
        coadd = coadds[band]
        to_njy = _nanojansky(coadd, band)
        part = (coadd.bbox.y.slice_within(box.y), coadd.bbox.x.slice_within(box.x))
        image[b][part] = coadd.image.array * to_njy
        variance[b][part] = coadd.variance.array * to_njy**2
        bad = np.zeros(coadd.image.array.shape, bool)
        present = coadd.mask.schema.names
        for plane in bad_planes:
            for name in names_in(plane, present):
                bad |= coadd.mask.get(name)
        valid[b][part] = ~bad
        if detected_plane is not None and detected_plane in present:
            detected[part] |= coadd.mask.get(detected_plane)
        for name in names_in(edge_plane, present):
            edge[part] |= coadd.mask.get(name)

    if peaks is None:
        parents = find_parents(detected)
    else:
        if absent := {"x", "y"} - set(peaks.colnames):
            raise ValueError(f"The peak table has no column {', '.join(sorted(absent))}.")
        xy = np.column_stack([_pixels(peaks["x"]) - box.x.start, _pixels(peaks["y"]) - box.y.start])
        groups = np.asarray(peaks["parent"]) if "parent" in peaks.colnames else None
        parents = parents_from_peaks(detected, xy, groups)
    # The identifiers that the outputs have, so that what is stored goes with the scene made anew.
    ids = PatchIds(first.tract, first.patch.id).parents(len(parents)).tolist()
    parents = [dataclasses.replace(p, id=number) for p, number in zip(parents, ids, strict=True)]
    return Scene(
        bands,
        image,
        variance,
        valid,
        psf=_psf_grid(coadds, bands, box),
        pixel_scale=_pixel_scale(first, box),
        parents=parents,
        edge=edge,
        origin=(box.y.start, box.x.start),
    )


def union_planes(coadds: Mapping[str, CellCoadd], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Where mask planes are set in any band.

    Parameters
    ----------
    coadds : mapping of `str` to `lsst.images.cells.CellCoadd`
        Coadds by band.
    names : iterable of `str`
        Names of the planes, in lsst.images or in afw.

    Returns
    -------
    planes : `dict` [`str`, `numpy.ndarray`], (H, W)
        The union of each plane, on the box of `scene_from_cell_coadds`.

    Raises
    ------
    ValueError
        Raised if nobody knows a mask plane.
    """
    names, box = list(names), _hull(coadds)
    check_planes(names, {name for coadd in coadds.values() for name in coadd.mask.schema.names})
    planes = {name: np.zeros((box.y.size, box.x.size), bool) for name in names}
    for coadd in coadds.values():
        part = (coadd.bbox.y.slice_within(box.y), coadd.bbox.x.slice_within(box.x))
        for name, union in planes.items():
            for own in names_in(name, coadd.mask.schema.names):
                union[part] |= coadd.mask.get(own)
    return planes


def _hull(coadds: Mapping[str, CellCoadd]) -> Box:
    """Smallest box that holds all coadds."""
    return Box(
        y=Interval.hull(*(i for c in coadds.values() for i in (c.bbox.y.min, c.bbox.y.max))),
        x=Interval.hull(*(i for c in coadds.values() for i in (c.bbox.x.min, c.bbox.x.max))),
    )


def _nanojansky(coadd: CellCoadd, band: str) -> float:
    """nJy per unit of a coadd."""
    unit = coadd.unit
    try:
        return float(unit.to(u.nJy))
    except (AttributeError, u.UnitConversionError) as error:
        raise ValueError(
            f"The coadd of band {band} has units uncalibrated: its unit, {unit or 'none'}, does not convert "
            "to nJy."
        ) from error


def masked_image(
    coadd: CellCoadd, array: np.ndarray, origin: tuple[int, int], *, unit: u.UnitBase = u.nJy
) -> MaskedImage:
    """Give an image the mask, variance and projection of the coadd it was made from.

    Parameters
    ----------
    coadd : `lsst.images.cells.CellCoadd`
        Coadd of the same band.
    array : `numpy.ndarray`, (H, W)
        Scene image, for example the residual, in ``unit``.
    origin : `tuple` [`int`, `int`]
        Tract pixel (y, x) of ``array[0, 0]``.
    unit : `astropy.units.UnitBase`, optional
        Unit of ``array``.

    Returns
    -------
    image : `lsst.images.MaskedImage`
        On the bounding box of the coadd, in ``unit``.
    """
    box = coadd.bbox
    y0, x0 = box.y.start - origin[0], box.x.start - origin[1]
    part = array[y0 : y0 + box.y.size, x0 : x0 + box.x.size]
    scale = (coadd.unit**2).to(unit**2)
    return MaskedImage(
        Image(np.ascontiguousarray(part, np.float32), bbox=box, unit=unit),
        mask=coadd.mask.copy(),
        variance=Image((coadd.variance.array * scale).astype(np.float32), bbox=box, unit=unit**2),
        sky_projection=coadd.sky_projection,
    )


def _pixels(column: Column) -> np.ndarray:
    """Return a position column as plain float64, whether it carries a unit or not."""
    return np.asarray(u.Quantity(column, u.pix).value if column.unit is not None else column, float)


def _pixel_scale(coadd: CellCoadd, box: Box) -> float:
    """Return the pixel scale at the patch's centre, arcsec: the root of the area of one pixel on the sky."""
    x = 0.5 * (box.x.min + box.x.max) + np.array([0.0, 1.0, 0.0])
    y = 0.5 * (box.y.min + box.y.max) + np.array([0.0, 0.0, 1.0])
    sky = coadd.sky_projection.pixel_to_sky(x=x, y=y)
    east, north = sky[0].spherical_offsets_to(sky[1:])
    (e1, e2), (n1, n2) = east.to_value(u.arcsec), north.to_value(u.arcsec)
    return float(np.sqrt(abs(e1 * n2 - e2 * n1)))


def _psf_grid(coadds: Mapping[str, CellCoadd], bands: Sequence[str], box: Box) -> PsfGrid:
    """Collect the PSF kernels of all cells that the box covers, NaN where a band has none."""
    grid = next(iter(coadds.values())).grid
    start = grid.index_of(y=box.y.start, x=box.x.start)
    last = grid.index_of(y=box.y.stop - 1, x=box.x.stop - 1)
    ny, nx = last.i - start.i + 1, last.j - start.j + 1
    # Bands may bring kernels of different size: the largest holds them all.
    height = max(c.psf.kernel_bbox.y.size for c in coadds.values())
    width = max(c.psf.kernel_bbox.x.size for c in coadds.values())
    stamps = np.full((ny, nx, len(bands), height, width), np.nan)
    for b, band in enumerate(bands):
        if band not in coadds:
            continue
        psf = coadds[band].psf
        kernel_box = psf.kernel_bbox
        top, left = (height - kernel_box.y.size) // 2, (width - kernel_box.x.size) // 2
        for index in psf.bounds.cell_indices():
            cell = index - start
            if not (0 <= cell.i < ny and 0 <= cell.j < nx):
                continue
            stamp = stamps[cell.i, cell.j, b]
            stamp[:] = 0.0
            stamp[top : top + kernel_box.y.size, left : left + kernel_box.x.size] = psf[index].array
    return PsfGrid(
        stamps=stamps.reshape(ny * nx, len(bands), height, width),
        cell_shape=(grid.cell_shape.y, grid.cell_shape.x),
        grid_shape=(ny, nx),
        origin=(
            grid.bbox.y.start + start.i * grid.cell_shape.y - box.y.start,
            grid.bbox.x.start + start.j * grid.cell_shape.x - box.x.start,
        ),
    )
