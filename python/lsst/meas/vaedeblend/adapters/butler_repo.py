# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""A Butler repository of coadds made from numpy arrays, and `pipetask` on it.

Everything that does not start from Rubin data (the demo, the HSC blends, the tests) goes through here, so
that it runs exactly the path a production repository runs. Neither ``lsst.skymap`` nor ``afw`` is needed: the
few dimension records are written by hand and the coadds are `lsst.images.cells.CellCoadd`.
"""

from __future__ import annotations

__all__ = ["CoaddRepository", "PatchLayout", "PipetaskError", "pipeline_path", "run_pipetask"]

import contextlib
import copy
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from lsst.daf.butler import Butler, DatasetType, MissingCollectionError, MissingDatasetTypeError
from lsst.images import YX, Box, Image, Mask, MaskPlane, MaskSchema, SkyProjection, TractFrame
from lsst.images import get_legacy_deep_coadd_mask_planes as deep_coadd_mask_planes
from lsst.images.cells import (
    CellCoadd,
    CellGrid,
    CellGridBounds,
    CellIJ,
    CellPointSpreadFunction,
    PatchDefinition,
)
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

from ..ground.files import shipped_file
from ..ground.identifiers import PatchIds

INSTRUMENT = "VaeDeblendCam"
PEAKS_DATASET = "object_vae_peaks"


class PipetaskError(RuntimeError):
    """A `pipetask` subprocess failed.

    Parameters
    ----------
    status : `int`
        Its exit status.
    log : `str`
        Its whole log, kept as ``log``; the message has only what the log says of the cause.
    """

    def __init__(self, status: int, log: str) -> None:
        self.status, self.log = status, log
        super().__init__(status, log)

    def __str__(self) -> str:
        return f"pipetask run ended with exit status {self.status}:\n{_cause(self.log)}"


def _cause(log: str) -> str:
    """What a log of pipetask says of the cause: the errors of quanta, or else those that ended it."""
    lines = log.splitlines()
    found = [line.partition(" failed. Exception ")[2] for line in lines if " failed. Exception " in line]
    # An exception's own line stands at the margin under its traceback; several may be chained.
    found = found or [line for line in lines if re.match(r"[\w.]*(Error|Exception|NoWorkFound)\b", line)]
    return "\n".join(dict.fromkeys(found)) or "\n".join(lines[-30:])


@dataclasses.dataclass(frozen=True)
class PatchLayout:
    """Where a patch and its cells lie in the tract.

    Parameters
    ----------
    y0, x0 : `int`
        Tract pixel of the patch's first pixel.
    cells : `tuple` [`int`, `int`]
        Number of cells along y and x.
    cell_shape : `tuple` [`int`, `int`]
        Cell height and width, pixel.
    border : `tuple` [`int`, `int`, `int`, `int`], optional
        Pixels at the low and high end of y and of x that belong to the inner region of a neighbour: patches
        overlap, their inner regions do not.
    """

    y0: int
    x0: int
    cells: tuple[int, int]
    cell_shape: tuple[int, int]
    border: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def box(self) -> Box:
        """Bounding box of the patch in tract pixels (`lsst.images.Box`)."""
        shape = (self.cells[0] * self.cell_shape[0], self.cells[1] * self.cell_shape[1])
        return Box.from_shape(shape, start=(self.y0, self.x0))

    @property
    def inner_box(self) -> Box:
        """Bounding box of what no other patch of the tract has in its own (`lsst.images.Box`)."""
        box, (low_y, high_y, low_x, high_x) = self.box, self.border
        return Box.factory[
            box.y.start + low_y : box.y.stop - high_y, box.x.start + low_x : box.x.stop - high_x
        ]

    @property
    def grid(self) -> CellGrid:
        """Cell grid of the patch (`lsst.images.cells.CellGrid`)."""
        return CellGrid(bbox=self.box, cell_shape=YX(y=self.cell_shape[0], x=self.cell_shape[1]))


class CoaddRepository:
    """A new Butler repository (SQLite) for coadds given as arrays.

    It has one tract; `another_tract` adds more.

    Parameters
    ----------
    root : path-like
        Directory to create; it must not hold a repository yet.
    bands : sequence of `str`
        Bands that coadds may be stored for.
    patches : mapping of `int` to `PatchLayout`
        The patches by id.
    pixel_scale : `float`
        Pixel scale of the tract, arcsec.
    skymap : `str`, optional
        Name of the sky map.
    tract : `int`, optional
        Tract id.
    centre : `tuple` [`float`, `float`], optional
        Right ascension and declination of the tract's centre, degree.
    coadd_name : `str`, optional
        Prefix of the coadd's dataset type, ``{coadd_name}_coadd``.

    Raises
    ------
    FileExistsError
        Raised when ``root`` already is a Butler repository.
    """

    inputs = "vaedeblend/inputs"

    def __init__(
        self,
        root: str | os.PathLike[str],
        bands: Sequence[str],
        patches: Mapping[int, PatchLayout],
        pixel_scale: float,
        *,
        skymap: str = "vaedeblend",
        tract: int = 0,
        centre: tuple[float, float] = (150.0, 2.0),
        coadd_name: str = "deep",
    ) -> None:
        self.root = Path(root)
        if (self.root / "butler.yaml").exists():
            raise FileExistsError(f"{self.root} already holds a Butler repository.")
        self.bands = tuple(bands)
        self.skymap = skymap
        self.coadd_dataset = f"{coadd_name}_coadd"
        self.pixel_scale = pixel_scale
        self._create()
        self._add_tract(tract, patches, centre)

    def another_tract(
        self, tract: int, patches: Mapping[int, PatchLayout], centre: tuple[float, float]
    ) -> CoaddRepository:
        """Add a tract.

        Parameters
        ----------
        tract : `int`
            Tract id.
        patches : mapping of `int` to `PatchLayout`
            Its patches by id.
        centre : `tuple` [`float`, `float`]
            Right ascension and declination of its centre, degree.

        Returns
        -------
        repository : `CoaddRepository`
            The same repository, for the patches of this tract.
        """
        other = copy.copy(self)
        other._add_tract(tract, patches, centre)
        return other

    def _add_tract(self, tract: int, patches: Mapping[int, PatchLayout], centre: tuple[float, float]) -> None:
        """Choose a projection and write the records of a tract and its patches."""
        self.patches, self.tract = dict(patches), tract
        skymap, pixel_scale = self.skymap, self.pixel_scale
        # A margin of one pixel keeps the patches' regions inside the tract's, whatever rounding does.
        y_stop = max(p.box.y.stop for p in self.patches.values()) + 1
        x_stop = max(p.box.x.stop for p in self.patches.values()) + 1
        y_start = min(p.y0 for p in self.patches.values()) - 1
        x_start = min(p.x0 for p in self.patches.values()) - 1
        tract_box = Box.factory[y_start:y_stop, x_start:x_stop]
        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.cunit = ["deg", "deg"]
        wcs.wcs.crval = list(centre)
        # FITS counts pixels from one, and the header below starts at the tract box's first pixel.
        wcs.wcs.crpix = [0.5 * (x_stop - x_start) + 0.5, 0.5 * (y_stop - y_start) + 0.5]
        wcs.wcs.cdelt = [-pixel_scale / 3600.0, pixel_scale / 3600.0]
        self.projection = SkyProjection.from_fits_wcs(
            wcs,
            TractFrame(skymap=skymap, tract=tract, bbox=tract_box),
            pixel_bounds=tract_box,
            x0=x_start,
            y0=y_start,
        )
        with Butler.from_config(str(self.root), run=self.inputs) as butler:
            registry = butler.registry
            registry.insertDimensionData(
                "tract", {"skymap": self.skymap, "id": self.tract, "region": self._region(tract_box)}
            )
            for patch, layout in self.patches.items():
                registry.insertDimensionData(
                    "patch",
                    {
                        "skymap": self.skymap,
                        "tract": self.tract,
                        "id": patch,
                        "cell_x": patch,
                        "cell_y": 0,
                        "region": self._region(layout.box),
                    },
                )

    def _create(self) -> None:
        """Make the repository and write the dimension records and dataset types that tracts share."""
        Butler.makeRepo(str(self.root))
        with Butler.from_config(str(self.root), run=self.inputs) as butler:
            registry = butler.registry
            registry.insertDimensionData(
                "skymap",
                {
                    "name": self.skymap,
                    # The record wants 20 bytes that identify the geometry; what is here is no sky map's.
                    "hash": hashlib.sha1(self.skymap.encode()).digest(),
                    "tract_max": 1 << PatchIds.TRACT_BITS,
                    "patch_nx_max": 1 << PatchIds.PATCH_BITS,
                    "patch_ny_max": 1,
                },
            )
            # band is a view of physical_filter, which in turn belongs to an instrument.
            registry.insertDimensionData(
                "instrument",
                {
                    "name": INSTRUMENT,
                    "visit_max": 1,
                    "exposure_max": 1,
                    "detector_max": 1,
                    "visit_system": 0,
                    "class_name": "lsst.pipe.base.Instrument",
                },
            )
            for band in self.bands:
                registry.insertDimensionData(
                    "physical_filter", {"instrument": INSTRUMENT, "name": f"vae_{band}", "band": band}
                )
            patch_dims = butler.dimensions.conform(["skymap", "tract", "patch"])
            band_dims = butler.dimensions.conform(["skymap", "tract", "patch", "band"])
            registry.registerDatasetType(DatasetType(self.coadd_dataset, band_dims, "CellCoadd"))
            registry.registerDatasetType(DatasetType(PEAKS_DATASET, patch_dims, "ArrowAstropy"))

    def _region(self, box: Box) -> ConvexPolygon:
        """Return the sky region of a box of tract pixels (outer pixel edges)."""
        x = np.array([box.x.start, box.x.stop, box.x.stop, box.x.start]) - 0.5
        y = np.array([box.y.start, box.y.start, box.y.stop, box.y.stop]) - 0.5
        sky = self.projection.pixel_to_sky(x=x, y=y)
        corners = zip(sky.ra.deg, sky.dec.deg, strict=True)
        return ConvexPolygon.convexHull([UnitVector3d(LonLat.fromDegrees(ra, dec)) for ra, dec in corners])

    def data_id(self, patch: int, **extra: Any) -> dict[str, Any]:
        """Return the data ID of a patch, with ``extra`` keys such as ``band``."""
        return {"skymap": self.skymap, "tract": self.tract, "patch": patch, **extra}

    def make_coadd(
        self,
        patch: int,
        band: str,
        image: np.ndarray,
        variance: np.ndarray,
        psf: np.ndarray,
        planes: Mapping[str, np.ndarray] | None = None,
        *,
        unit: u.UnitBase = u.nJy,
    ) -> CellCoadd:
        """Build the coadd of one patch and band.

        Parameters
        ----------
        patch : `int`
            Patch id.
        band : `str`
            Band name.
        image, variance : `numpy.ndarray`, (H, W)
            Pixels in ``unit`` and ``unit`` squared.
        psf : `numpy.ndarray`, (ny, nx, h, w) or (h, w)
            PSF kernel image per cell, odd sides; a cell of NaN is missing, as it is in a real coadd that no
            input reached. One kernel alone serves all cells.
        planes : mapping of `str` to `numpy.ndarray`, (H, W) bool, optional
            Mask planes to set; those of deep coadds exist, and others are added.
        unit : `astropy.units.UnitBase`, optional
            Unit of the image.

        Returns
        -------
        coadd : `lsst.images.cells.CellCoadd`

        Raises
        ------
        ValueError
            Raised when an array does not have the patch's shape.
        """
        layout = self.patches[patch]
        box, grid = layout.box, layout.grid
        for name, array in {"image": image, "variance": variance, **(planes or {})}.items():
            if array.shape != tuple(box.shape):
                raise ValueError(f"{name} has shape {array.shape}; patch {patch} has {tuple(box.shape)}.")
        kernels = np.array(psf if psf.ndim == 4 else np.broadcast_to(psf, (*layout.cells, *psf.shape)), float)
        if kernels.shape[:2] != layout.cells:
            raise ValueError(f"psf has {kernels.shape[:2]} cells; patch {patch} has {layout.cells}.")
        absent = ~np.isfinite(kernels).all(axis=(2, 3))
        kernels[absent] = np.nan
        missing = frozenset(CellIJ(i=int(i), j=int(j)) for i, j in np.argwhere(absent))

        schema_planes = list(deep_coadd_mask_planes().values())
        known = {plane.name for plane in schema_planes}
        extra = [name for name in planes or {} if name not in known]
        if extra:
            schema_planes += [MaskPlane(name, "Set by the caller of CoaddRepository.") for name in extra]
        mask = Mask(0, schema=MaskSchema(schema_planes), bbox=box)
        planes = dict(planes or {})
        no_data = planes.get("NO_DATA", np.zeros(box.shape, bool)).copy()
        for index in missing:
            cell = grid.bbox_of(index)
            no_data[
                cell.y.start - box.y.start : cell.y.stop - box.y.start,
                cell.x.start - box.x.start : cell.x.stop - box.x.start,
            ] = True
        planes["NO_DATA"] = no_data
        for name, array in planes.items():
            mask.set(name, array.astype(bool))
        return CellCoadd(
            Image(np.ascontiguousarray(image, np.float32), bbox=box, unit=unit),
            mask=mask,
            variance=Image(np.ascontiguousarray(variance, np.float32), bbox=box, unit=unit**2),
            sky_projection=self.projection,
            band=band,
            psf=CellPointSpreadFunction(kernels, CellGridBounds(grid=grid, bbox=box, missing=missing)),
            patch=PatchDefinition(id=patch, index=YX(y=0, x=patch), inner_bbox=layout.inner_box, cells=grid),
        )

    def put_coadds(
        self,
        patch: int,
        image: np.ndarray,
        variance: np.ndarray,
        psf: np.ndarray,
        planes: Mapping[str, np.ndarray] | None = None,
        *,
        bands: Sequence[str] | None = None,
        unit: u.UnitBase = u.nJy,
    ) -> None:
        """Store the coadds of one patch.

        Parameters
        ----------
        patch : `int`
            Patch id.
        image, variance : `numpy.ndarray`, (B, H, W)
            Pixels in ``unit`` and ``unit`` squared.
        psf : `numpy.ndarray`, (B, ny, nx, h, w) or (B, h, w)
            PSF kernel images; see `make_coadd`.
        planes : mapping of `str` to `numpy.ndarray`, (B, H, W) or (H, W) bool, optional
            Mask planes to set; a plane without band axis is set in all bands.
        bands : sequence of `str`, optional
            The bands of the arrays, by default those of the repository.
        unit : `astropy.units.UnitBase`, optional
            Unit of the images.
        """
        bands = self.bands if bands is None else tuple(bands)
        if not len(bands) == len(image) == len(variance) == len(psf):
            raise ValueError(f"Arrays of {len(image)}, {len(variance)} and {len(psf)} bands for {bands}.")
        with Butler.from_config(str(self.root), run=self.inputs) as butler:
            for b, band in enumerate(bands):
                own = {name: p[b] if p.ndim == 3 else p for name, p in (planes or {}).items()}
                coadd = self.make_coadd(patch, band, image[b], variance[b], psf[b], own, unit=unit)
                butler.put(coadd, self.coadd_dataset, self.data_id(patch, band=band))

    def put_peaks(self, patch: int, x: np.ndarray, y: np.ndarray, parent: np.ndarray | None = None) -> None:
        """Store the optional peak table of one patch.

        Parameters
        ----------
        patch : `int`
            Patch id.
        x, y : `numpy.ndarray`, (N,)
            Peak positions, tract pixel.
        parent : `numpy.ndarray`, (N,), optional
            Identifier of the blend each peak belongs to.
        """
        table = Table({"x": np.asarray(x, float) * u.pix, "y": np.asarray(y, float) * u.pix})
        if parent is not None:
            table["parent"] = np.asarray(parent, np.int64)
        with Butler.from_config(str(self.root), run=self.inputs) as butler:
            butler.put(table, PEAKS_DATASET, self.data_id(patch))

    def get(self, dataset: str, patch: int, collection: str, **extra: Any) -> Any:
        """Read one dataset back.

        Parameters
        ----------
        dataset : `str`
            Name of the dataset type.
        patch : `int`
            Patch id.
        collection : `str`
            Collection to search.
        **extra
            Further data ID keys, such as ``band``.

        Raises
        ------
        lsst.daf.butler.DatasetNotFoundError
            Raised when there is no such dataset.
        """
        with self.reader(collection) as get:
            return get(dataset, patch, **extra)

    @contextlib.contextmanager
    def reader(self, collection: str) -> Iterator[Callable[..., Any]]:
        """Open the repository once for many reads.

        Yields a function of dataset, patch and further data ID keys, as `get` without its collection.
        """
        with Butler.from_config(str(self.root), collections=collection) as butler:
            yield lambda dataset, patch, **extra: butler.get(dataset, self.data_id(patch, **extra))

    def exists(self, dataset: str, patch: int, collection: str, **extra: Any) -> bool:
        """Tell whether a dataset is there; arguments as for `get`. Collection and type may be unknown."""
        with Butler.from_config(str(self.root), collections=collection) as butler:
            try:
                ref = butler.find_dataset(dataset, self.data_id(patch, **extra))
            except (MissingCollectionError, MissingDatasetTypeError):
                return False
            return ref is not None and butler.stored(ref)


def pipeline_path(name: str = "deblend.yaml") -> Path:
    """Return the path of a pipeline definition of this package.

    The stack finds it as ``$MEAS_VAEDEBLEND_DIR/pipelines``; otherwise it is that of the installed package.

    Raises
    ------
    FileNotFoundError
        Raised when it is in neither.
    """
    if stack := os.environ.get("MEAS_VAEDEBLEND_DIR"):
        path = Path(stack) / "pipelines" / name
        if path.is_file():
            return path
    return shipped_file(f"pipelines/{name}")


def run_pipetask(
    root: str | os.PathLike[str],
    output: str,
    *,
    config: Mapping[str, Any] | None = None,
    inputs: str = CoaddRepository.inputs,
    pipeline: str | os.PathLike[str] | None = None,
    label: str = "vaeDeblend",
    query: str | None = None,
    processes: int = 1,
    check: bool = True,
    log: str | os.PathLike[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``pipetask run`` on a repository, as a subprocess like any user's.

    Parameters
    ----------
    root : path-like
        Butler repository.
    output : `str`
        Output collection.
    config : mapping, optional
        Overrides of the task's configuration, for example ``{"network": "hsc_grizy"}``.
    inputs : `str`, optional
        Input collections, comma-separated.
    pipeline : path-like, optional
        Pipeline definition, by default ``deblend.yaml`` of this package.
    label : `str`, optional
        Label of the task the overrides are for.
    query : `str`, optional
        Data query, for example ``"tract = 0 AND patch = 1"``.
    processes : `int`, optional
        Number of processes.
    check : `bool`, optional
        Raise when pipetask fails.
    log : path-like, optional
        File for the log, which is written whether pipetask fails or not.

    Returns
    -------
    process : `subprocess.CompletedProcess`
        Exit code, and standard output with the log merged into it.

    Raises
    ------
    PipetaskError
        Raised when pipetask fails and ``check`` is set; it holds the log.
    """
    command = [sys.executable, "-c", "from lsst.ctrl.mpexec.cli.pipetask import main; main()", "run"]
    command += ["-b", os.fspath(root), "-p", os.fspath(pipeline or pipeline_path())]
    command += ["-i", inputs, "-o", output, "--register-dataset-types", "-j", str(processes)]
    for key, value in (config or {}).items():
        command += ["-c", f"{label}:{key}={value}"]
    if query:
        command += ["-d", query]
    process = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if log is not None:
        Path(log).write_text(process.stdout)
    if check and process.returncode:
        raise PipetaskError(process.returncode, process.stdout)
    return process
