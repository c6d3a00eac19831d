# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the deblender works on: the bands, variances, masks, PSFs, parents and peaks of one patch.

Arrays are (y, x), pixel centres are at integers. *Scene coordinates* count from the array's pixel [0, 0];
`Scene.origin` takes them to tract pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .ground.cutouts import nearest_pixel
from .ground.psf import adaptive_moments

__all__ = ["Parent", "PsfGrid", "Scene", "assign_peaks", "find_parents"]

# 8-connectivity, as the detection of the pipelines has it.
_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def _unmasked(values: ArrayLike) -> NDArray[np.float64]:
    """A copy in double precision, NaN where a `numpy.ma.MaskedArray` is masked."""
    return np.array(np.ma.filled(np.ma.asarray(values, np.float64), np.nan))


def _positions(peaks: ArrayLike) -> NDArray[np.float64]:
    """Positions as (K, 2); masked ones are NaN, which nobody accepts."""
    return _unmasked(peaks).reshape(-1, 2)


@dataclasses.dataclass(eq=False)
class Parent:
    """A connected region of detected pixels with the peaks in it.

    Parameters
    ----------
    id : `int`
        Identifier, unique in the scene.
    y0, x0 : `int`
        Scene coordinates of the footprint's pixel [0, 0].
    footprint : `numpy.ndarray`, (h, w)
        Whether a pixel of the bounding box belongs to the parent.
    peaks : `numpy.ndarray`, (K, 2)
        (x, y) of the peaks in scene coordinates, float. Without any, peaks are found.

    Raises
    ------
    ValueError
        Raised if an array has the wrong shape, the footprint is empty, or a peak is not finite.
    """

    id: int
    y0: int
    x0: int
    footprint: NDArray[np.bool_]
    peaks: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.empty((0, 2)))

    def __post_init__(self) -> None:
        self.footprint = np.asarray(np.ma.filled(self.footprint, False), dtype=bool)
        if self.footprint.ndim != 2 or not self.footprint.any():
            raise ValueError(
                f"Parent {self.id}: the footprint should be (h, w) with at least one pixel set, "
                f"it has shape {self.footprint.shape} and {int(self.footprint.sum())} pixels."
            )
        self.peaks = _positions(self.peaks)
        if not np.isfinite(self.peaks).all():
            raise ValueError(f"Parent {self.id}: a peak's position is not finite.")

    @property
    def area(self) -> int:
        """Number of pixels of the footprint (`int`)."""
        return int(self.footprint.sum())

    def window(self, shape: tuple[int, int]) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
        """Give the part of the footprint that lies on an array.

        Parameters
        ----------
        shape : `tuple` [`int`]
            (H, W) of the scene.

        Returns
        -------
        window : `tuple` [`slice`]
            Slices of the scene's arrays, possibly empty.
        footprint : `numpy.ndarray`
            The footprint in that window.
        """
        (h, w), (height, width) = self.footprint.shape, shape
        y1, y2 = np.clip([self.y0, self.y0 + h], 0, height)
        x1, x2 = np.clip([self.x0, self.x0 + w], 0, width)
        inside = self.footprint[y1 - self.y0 : y2 - self.y0, x1 - self.x0 : x2 - self.x0]
        return (slice(int(y1), int(y2)), slice(int(x1), int(x2))), inside


def find_parents(detected: ArrayLike, peaks: ArrayLike | None = None) -> list[Parent]:
    """Find the connected regions of detected pixels.

    Parameters
    ----------
    detected : array_like, (H, W)
        Whether a pixel is detected, in any band.
    peaks : array_like, (K, 2), optional
        (x, y) of peaks in scene coordinates, given to the parents by `assign_peaks`.

    Returns
    -------
    parents : `list` [`Parent`]
        The 8-connected regions, ids from 1, in the order of their first pixels.

    Raises
    ------
    ValueError
        Raised if ``detected`` is not an image.
    """
    detected = np.asarray(np.ma.filled(detected, False), dtype=bool)
    if detected.ndim != 2:
        raise ValueError(f"detected should be (H, W), it has shape {detected.shape}.")
    labels, _ = ndimage.label(detected, structure=_NEIGHBOURS)
    parents = [
        Parent(number, window[0].start, window[1].start, labels[window] == number)
        for number, window in enumerate(ndimage.find_objects(labels), start=1)
    ]
    return parents if peaks is None else assign_peaks(parents, peaks, detected.shape)


def assign_peaks(
    parents: Sequence[Parent], peaks: ArrayLike, shape: tuple[int, int], radius: int = 5
) -> list[Parent]:
    """Give peaks to the parents on whose footprints they lie.

    No peak is lost: one that lies on no footprint becomes a parent of its own, a square around it.

    Parameters
    ----------
    parents : `~collections.abc.Sequence` [`Parent`]
        Parents, whose footprints do not overlap.
    peaks : array_like, (K, 2)
        (x, y) in scene coordinates.
    shape : `tuple` [`int`]
        (H, W) of the scene.
    radius : `int`, optional
        Half the width of the square of a peak without a footprint, pixel.

    Returns
    -------
    parents : `list` [`Parent`]
        New parents with their peaks, those of lonely peaks at the end.

    Raises
    ------
    ValueError
        Raised if a peak is not finite.
    """
    peaks = _positions(peaks)
    if not np.isfinite(peaks).all():
        raise ValueError("A peak's position is not finite.")
    owner = np.full(shape, -1, dtype=np.int64)
    for i, parent in enumerate(parents):
        window, inside = parent.window(shape)
        owner[window][inside] = i
    x, y = nearest_pixel(peaks).T
    on_scene = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    index = np.full(len(peaks), -1)
    index[on_scene] = owner[y[on_scene], x[on_scene]]
    out = [
        dataclasses.replace(p, peaks=np.concatenate([p.peaks, peaks[index == i]]))
        for i, p in enumerate(parents)
    ]
    number = max((p.id for p in parents), default=0)
    square = np.ones((2 * radius + 1, 2 * radius + 1), dtype=bool)
    for k in np.flatnonzero(index < 0):
        number += 1
        out.append(Parent(number, int(y[k]) - radius, int(x[k]) - radius, square, peaks[k : k + 1]))
    return out


class PsfGrid:
    """The PSFs of a scene, constant within the cells of a regular grid.

    Parameters
    ----------
    stamps : array_like, (P, B, h, w)
        PSF images of odd sizes, centred on their middle pixels, row by row of the grid. They are scaled to
        sum 1. Stamps that hold anything not finite, or do not have a positive sum, count as missing and
        become NaN.
    cell_shape : `tuple` [`int`]
        (y, x) size of a cell, pixel.
    grid_shape : `tuple` [`int`]
        (ny, nx), with P = ny * nx.
    origin : `tuple` [`int`], optional
        Scene coordinates (y, x) of the first pixel of cell 0.

    Attributes
    ----------
    valid : `numpy.ndarray`, (P, B)
        Whether a stamp is there.

    Raises
    ------
    ValueError
        Raised if shapes do not agree or a size is even.
    """

    def __init__(
        self,
        stamps: ArrayLike,
        cell_shape: tuple[int, int],
        grid_shape: tuple[int, int],
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        stamps = _unmasked(stamps)
        if stamps.ndim != 4 or stamps.shape[2] % 2 != 1 or stamps.shape[3] % 2 != 1:
            raise ValueError(f"PSF stamps should be (P, B, h, w) with h and w odd, not {stamps.shape}.")
        if len(stamps) != grid_shape[0] * grid_shape[1] or len(stamps) == 0:
            raise ValueError(
                f"{len(stamps)} sets of PSF stamps do not make a grid of {tuple(grid_shape)} cells."
            )
        if min(cell_shape) < 1:
            raise ValueError(f"PSF cells should have a positive size, not {tuple(cell_shape)}.")
        total = stamps.sum(axis=(2, 3))
        self.valid: NDArray[np.bool_] = np.isfinite(total) & (total > 0)
        stamps[~self.valid] = np.nan
        stamps /= np.where(self.valid, total, 1.0)[:, :, None, None]
        self.stamps: NDArray[np.float64] = stamps
        self.cell_shape = (int(cell_shape[0]), int(cell_shape[1]))
        self.grid_shape = (int(grid_shape[0]), int(grid_shape[1]))
        self.origin = (int(origin[0]), int(origin[1]))

    @classmethod
    def constant(cls, stamps: ArrayLike) -> PsfGrid:
        """Make the grid of a PSF that is the same everywhere.

        Parameters
        ----------
        stamps : array_like, (B, h, w)
            One PSF image per band.

        Returns
        -------
        grid : `PsfGrid`
            A grid of one cell.
        """
        # Positions beyond the grid belong to its nearest cell, so the size of the only cell does not matter.
        return cls(np.asanyarray(stamps)[None], cell_shape=(1, 1), grid_shape=(1, 1))

    def index(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.int64]:
        """Find the cells that positions lie in.

        Parameters
        ----------
        x, y : array_like
            Scene coordinates.

        Returns
        -------
        index : `numpy.ndarray`
            Rows of ``stamps``; positions outside belong to the nearest cell.
        """
        # Pixel n covers n - 0.5 to n + 0.5.
        row = np.floor((np.asarray(y, dtype=float) + 0.5 - self.origin[0]) / self.cell_shape[0])
        column = np.floor((np.asarray(x, dtype=float) + 0.5 - self.origin[1]) / self.cell_shape[1])
        row = np.clip(row, 0, self.grid_shape[0] - 1).astype(np.int64)
        column = np.clip(column, 0, self.grid_shape[1] - 1).astype(np.int64)
        return row * self.grid_shape[1] + column

    @cached_property
    def nearest_valid(self) -> NDArray[np.int64]:
        """The cell whose stamp stands in for each one, (P, B): itself, the nearest that has one, or -1."""
        ny, nx = self.grid_shape
        cy, cx = np.divmod(np.arange(ny * nx), nx)
        out = np.tile(np.arange(ny * nx)[:, None], (1, self.valid.shape[1]))
        for band in range(self.valid.shape[1]):
            good = np.flatnonzero(self.valid[:, band])
            for cell in np.flatnonzero(~self.valid[:, band]):
                if len(good):
                    distance = ((cy[good] - cy[cell]) * self.cell_shape[0]) ** 2
                    distance += ((cx[good] - cx[cell]) * self.cell_shape[1]) ** 2
                    out[cell, band] = good[np.argmin(distance)]
                else:
                    out[cell, band] = -1
        return out

    def filled(self) -> PsfGrid:
        """Replace missing stamps by those of the nearest cells that have one.

        Returns
        -------
        grid : `PsfGrid`
            The same grid; what is still missing, is missing in the whole band.
        """
        if self.valid.all():
            return self
        nearest = self.nearest_valid
        stamps = self.stamps[np.maximum(nearest, 0), np.arange(nearest.shape[1])[None, :]]
        return PsfGrid(stamps, self.cell_shape, self.grid_shape, self.origin)

    @cached_property
    def moments(self) -> NDArray[np.float64]:
        """Adaptive moments Ixx, Iyy, Ixy of the stamps, (P, B, 3), pixel^2; NaN where there are none."""
        return adaptive_moments(self.stamps)

    def select(self, bands: Sequence[int]) -> PsfGrid:
        """Pick bands.

        Parameters
        ----------
        bands : `~collections.abc.Sequence` [`int`]
            Indices of the bands in their new order; -1 stands for a band without PSFs.

        Returns
        -------
        grid : `PsfGrid`
            The grid with these bands.
        """
        stamps = self.stamps[:, list(bands)].copy()
        stamps[:, [i for i, band in enumerate(bands) if band < 0]] = np.nan
        return PsfGrid(stamps, self.cell_shape, self.grid_shape, self.origin)


class Scene:
    """One patch in all its bands, with the parents on it.

    Pixels that are not finite, or whose variance is not finite and positive, become invalid, and so do those
    that are masked in a `numpy.ma.MaskedArray`. The image is 0 in invalid pixels and the variance infinite
    where it was no good.

    Parameters
    ----------
    bands : `~collections.abc.Sequence` [`str`]
        Names of the bands, in the order of the arrays.
    image : array_like, (B, H, W)
        Coadds, background subtracted, nJy.
    variance : array_like, (B, H, W)
        Their variances, nJy^2.
    valid : array_like, (B, H, W), optional
        Whether a pixel may be used; all that are finite by default.
    psf : `PsfGrid`
        PSFs in the same bands.
    pixel_scale : `float`
        Width of a pixel, arcsec.
    parents : `~collections.abc.Sequence` [`Parent`], optional
        Parents with their peaks.
    others : `~collections.abc.Sequence` [`Parent`], optional
        Parents that are not deblended: their pixels hold light, and say nothing of noise and sky.
    edge : array_like, (H, W), optional
        Whether a pixel is too close to the edge of the data for detection.
    origin : `tuple` [`int`], optional
        Tract pixel (y, x) of the arrays' pixel [0, 0].

    Raises
    ------
    ValueError
        Raised if shapes do not agree, a band appears twice, two parents have one id, or the pixel scale is
        not positive.
    """

    def __init__(
        self,
        bands: Sequence[str],
        image: ArrayLike,
        variance: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        psf: PsfGrid,
        pixel_scale: float,
        parents: Sequence[Parent] = (),
        others: Sequence[Parent] = (),
        edge: ArrayLike | None = None,
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        self.bands = tuple(bands)
        if not self.bands or len(set(self.bands)) != len(self.bands):
            raise ValueError(f"A scene needs different bands, not {list(self.bands)}.")
        # Masks of masked arrays and of lists of them, which the conversions below drop.
        masked = [np.ma.getmask(np.ma.asarray(a)) for a in (image, variance, valid) if a is not None]
        image = np.array(image, dtype=np.float32)
        variance = np.array(variance, dtype=np.float32)
        valid = np.ones(image.shape, dtype=bool) if valid is None else np.array(valid, dtype=bool)
        if image.ndim != 3 or len(image) != len(self.bands) or 0 in image.shape:
            raise ValueError(f"The image should be ({len(self.bands)}, H, W), it has shape {image.shape}.")
        for name, array in (("variance", variance), ("valid", valid)):
            if array.shape != image.shape:
                raise ValueError(f"The image has shape {image.shape}, {name} has {array.shape}.")
        if edge is not None:
            edge = np.array(np.ma.filled(edge, True), dtype=bool)
            if edge.shape != image.shape[1:]:
                raise ValueError(f"The image has shape {image.shape}, edge has {edge.shape}.")
        if psf.stamps.shape[1] != len(self.bands):
            raise ValueError(
                f"The scene has bands {list(self.bands)}, the PSF {psf.stamps.shape[1]} of them."
            )
        if not (np.isfinite(pixel_scale) and pixel_scale > 0):
            raise ValueError(f"The pixel scale should be a positive number of arcsec, not {pixel_scale}.")
        self.parents, self.others = list(parents), list(others)
        if len({p.id for p in self.parents}) != len(self.parents):
            raise ValueError("Two parents have the same id.")
        with np.errstate(invalid="ignore"):
            sound = np.isfinite(variance) & (variance > 0)
        valid &= np.isfinite(image) & sound
        for mask in masked:
            valid &= ~mask
        variance[~sound] = np.inf
        image[~valid] = 0.0
        self.image: NDArray[np.float32] = image
        self.variance: NDArray[np.float32] = variance
        self.valid: NDArray[np.bool_] = valid
        self.edge: NDArray[np.bool_] | None = edge
        self.psf = psf
        self.pixel_scale = float(pixel_scale)
        self.origin = (int(origin[0]), int(origin[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the arrays (`tuple` [`int`])."""
        return self.image.shape[1:]

    @cached_property
    def weight(self) -> NDArray[np.float32]:
        """Inverse variance, 0 in invalid pixels, (B, H, W), nJy^-2."""
        return np.where(self.valid, 1.0 / self.variance, 0.0).astype(np.float32)

    @cached_property
    def noise(self) -> NDArray[np.float64]:
        """Background standard deviation per band: median of the valid pixels, (B,), nJy; NaN without any."""
        return np.array(
            [
                np.sqrt(np.median(variance[valid])) if valid.any() else np.nan
                for variance, valid in zip(self.variance, self.valid, strict=True)
            ]
        )

    def reordered(self, bands: Sequence[str], allow_missing: bool = False) -> Scene:
        """Bring the bands into another order.

        Parameters
        ----------
        bands : `~collections.abc.Sequence` [`str`]
            The bands wanted, in order; bands of the scene that are not among them are left out.
        allow_missing : `bool`, optional
            Whether a band that the scene does not have becomes one without a valid pixel and without a PSF.

        Returns
        -------
        scene : `Scene`
            The scene with these bands; itself if they are the same.

        Raises
        ------
        ValueError
            Raised if the scene lacks a band.
        """
        if tuple(bands) == self.bands:
            return self
        missing = [band for band in bands if band not in self.bands]
        if missing and not allow_missing:
            raise ValueError(
                f"The bands {missing} of {list(bands)} are missing: the scene has {list(self.bands)}."
            )
        order = [self.bands.index(band) if band in self.bands else -1 for band in bands]
        image, variance, valid = self.image[order], self.variance[order], self.valid[order]
        for i, source in enumerate(order):
            if source < 0:
                image[i], variance[i], valid[i] = 0.0, np.inf, False
        return Scene(
            bands,
            image,
            variance,
            valid,
            psf=self.psf.select(order),
            pixel_scale=self.pixel_scale,
            parents=self.parents,
            others=self.others,
            edge=self.edge,
            origin=self.origin,
        )
