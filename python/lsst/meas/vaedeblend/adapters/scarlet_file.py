# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reading and writing of LsstScarletModelData zip files, without afw and without scarlet.

A file of extension ``.scarlet`` holds the models of one patch. What they share is in the JSON members
``version`` and ``metadata``; each parent and each isolated source has a member named by its id. Positions and
boxes are (y, x) in absolute tract pixels. Models live in a frame of their own, whose PSF is in the file;
measurement convolves them with the kernel between it and the observed PSF.

What is read: schema 1.0.0 and 1.0.1 (scarlet models with the parents' footprints in their metadata), 1.0.2
(footprints as packed bits) and 1.0.3 (PSFs as documents of their own, one image or one for each cell). What
is written: 1.0.1, from which later readers migrate.
"""

from __future__ import annotations

__all__ = [
    "CubeComponent",
    "FactorizedComponent",
    "IsolatedSource",
    "ScarletBlend",
    "ScarletFileError",
    "ScarletModels",
    "ScarletParent",
    "ScarletSource",
    "factorize",
    "isolated_to_scarlet",
    "models_to_scarlet",
    "read",
    "render",
    "write",
]

import base64
import dataclasses
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..models import SourceModels
from ..psf import convolve_to_observed, fft_size, gaussian_psf, matching_kernel_ft
from ..scene import Parent, PsfGrid

WRITTEN_VERSION = "1.0.1"
"""Schema version of the files that `write` makes."""

READABLE_VERSIONS = ("1.0.0", "1.0.1", "1.0.2", "1.0.3")
"""Schema versions that `read` knows."""

MAX_MEMBER_BYTES = 1 << 28
"""Largest member of a file that is read, bytes; a large blend of a crowded patch has some ten million."""

MAX_TOTAL_BYTES = 1 << 33
"""Largest total of all members of a file that is read, bytes."""

MAX_AREA = 1 << 25
"""Largest box that is read, pixel; a patch has 2^24."""

MAX_BANDS = 64
"""Most bands that are read."""

_MODEL_PSF_SIZE = 15

# Positions beyond this cannot be tract pixels, and would overflow sums of int32.
_MAX_COORDINATE = 1 << 30

# The names that scarlet has had for a parent with blends in it.
_OLD_PARENTS = ("hierarchical", "hierarchical_blend")

# Zip members carry a time. A fixed one, the earliest there is, makes equal models equal files.
_TIME = (1980, 1, 1, 0, 0, 0)


class ScarletFileError(ValueError):
    """A file is not a sound file of scarlet models."""


@dataclasses.dataclass(eq=False)
class FactorizedComponent:
    """A component whose image is the same in all bands, but for a factor.

    Parameters
    ----------
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the image's pixel [0, 0].
    peak : `tuple` [`float`]
        Position (y, x) of the source's peak, tract pixel.
    spectrum : `numpy.ndarray`, (B,)
        Factor of each band, float32; times ``morph`` it gives nJy.
    morph : `numpy.ndarray`, (h, w)
        Image in the model frame, float32.
    """

    origin: tuple[int, int]
    peak: tuple[float, float]
    spectrum: NDArray[np.float32]
    morph: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the component's box (`tuple` [`int`])."""
        return self.morph.shape

    @property
    def n_bands(self) -> int:
        """Number of bands (`int`)."""
        return len(self.spectrum)

    def image(self) -> NDArray[np.float32]:
        """Give the component's image in all bands, (B, h, w), nJy."""
        return self.spectrum[:, None, None] * self.morph


@dataclasses.dataclass(eq=False)
class CubeComponent:
    """A component with an image of its own in each band.

    The pipelines' measurement of early 2026 fails on components of this kind: `models_to_scarlet` makes none.

    Parameters
    ----------
    origin, peak : `tuple`
        As in `FactorizedComponent`.
    model : `numpy.ndarray`, (B, h, w)
        Image in the model frame, nJy, float32.
    """

    origin: tuple[int, int]
    peak: tuple[float, float]
    model: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the component's box (`tuple` [`int`])."""
        return self.model.shape[1:]

    @property
    def n_bands(self) -> int:
        """Number of bands (`int`)."""
        return len(self.model)

    def image(self) -> NDArray[np.float32]:
        """Give the component's image in all bands, (B, h, w), nJy."""
        return self.model


@dataclasses.dataclass(eq=False)
class ScarletSource:
    """A deblended source.

    Parameters
    ----------
    id : `int`
        Identifier of the object.
    peak_id : `int` or `None`
        Identifier of the merged detection's peak that it comes from.
    components : `list`
        What its model is the sum of. Scarlet leaves it empty for a source that it could not model.
    """

    id: int
    peak_id: int | None
    components: list[FactorizedComponent | CubeComponent]

    def box(self) -> tuple[int, int, int, int]:
        """Give the box (y0, x0, y1, x1) around all components, the end excluded; all 0 without any."""
        return _union((c.origin, c.shape) for c in self.components)


@dataclasses.dataclass(eq=False)
class ScarletBlend:
    """Sources that were deblended together.

    Parameters
    ----------
    origin, shape : `tuple` [`int`]
        The blend's box: tract pixel (y, x) of its first pixel, and (h, w).
    sources : `dict` [`int`, `ScarletSource`]
        The sources by id.
    """

    origin: tuple[int, int]
    shape: tuple[int, int]
    sources: dict[int, ScarletSource]


@dataclasses.dataclass(eq=False)
class ScarletParent:
    """A detected footprint with the blends in it.

    Parameters
    ----------
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the footprint's pixel [0, 0].
    footprint : `numpy.ndarray`, (h, w)
        Whether a pixel belongs to the parent. Schema 1.0.0 has none: the box around the blends stands in.
    blends : `dict` [`int`, `ScarletBlend`]
        The blends by id.
    """

    origin: tuple[int, int]
    footprint: NDArray[np.bool_]
    blends: dict[int, ScarletBlend]


@dataclasses.dataclass(eq=False)
class IsolatedSource:
    """A source that was not deblended: it keeps the whole of its footprint.

    Parameters
    ----------
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the footprint's pixel [0, 0].
    peak : `tuple` [`float`]
        Position (y, x) of its peak, tract pixel.
    footprint : `numpy.ndarray`, (h, w)
        Whether a pixel belongs to it.
    """

    origin: tuple[int, int]
    peak: tuple[float, float]
    footprint: NDArray[np.bool_]


@dataclasses.dataclass(eq=False)
class ScarletModels:
    """The models of one patch.

    Parameters
    ----------
    bands : `tuple` [`str`]
        Bands in the order of all arrays.
    model_psf : `numpy.ndarray`, (h, w)
        PSF of the frame that the models live in, float32.
    psf : `numpy.ndarray`, (B, h, w), or `lsst.meas.vaedeblend.scene.PsfGrid`
        Observed PSFs: one image per band, float32, or those of cells, whose positions are tract pixels.
    parents : `dict` [`int`, `ScarletParent`]
        Parents by id.
    isolated : `dict` [`int`, `IsolatedSource`]
        Isolated sources by id.
    """

    bands: tuple[str, ...]
    model_psf: NDArray[np.float32]
    psf: NDArray[np.float32] | PsfGrid
    parents: dict[int, ScarletParent] = dataclasses.field(default_factory=dict)
    isolated: dict[int, IsolatedSource] = dataclasses.field(default_factory=dict)

    def sources(self) -> dict[int, ScarletSource]:
        """Give the deblended sources of all parents by id."""
        return {
            source.id: source
            for parent in self.parents.values()
            for blend in parent.blends.values()
            for source in blend.sources.values()
        }


def _union(boxes: Iterable[tuple[tuple[int, int], tuple[int, int]]]) -> tuple[int, int, int, int]:
    """The box (y0, x0, y1, x1) around boxes that are given as (origin, shape)."""
    corners = [(y, x, y + h, x + w) for (y, x), (h, w) in boxes]
    if not corners:
        return 0, 0, 0, 0
    y0, x0, y1, x1 = zip(*corners, strict=True)
    return min(y0), min(x0), max(y1), max(x1)


# Reading. Files come from others: every value is checked before it is used, and what is wrong is said with
# the place where it is.


def read(path_or_stream: str | os.PathLike[str] | BinaryIO) -> ScarletModels:
    """Read a file of scarlet models.

    Parameters
    ----------
    path_or_stream : path or binary stream
        The file; a stream has to be seekable.

    Returns
    -------
    models : `ScarletModels`
        What it holds.

    Raises
    ------
    OSError
        Raised if the file cannot be opened.
    ScarletFileError
        Raised if it is damaged, something else, of an unknown schema version, larger than the limits of this
        module, or contradicts itself.
    """
    name = getattr(path_or_stream, "name", None) if hasattr(path_or_stream, "read") else path_or_stream
    try:
        with zipfile.ZipFile(path_or_stream) as archive:
            return _read_archive(archive)
    except ScarletFileError as error:
        raise ScarletFileError(f"{name or 'The stream'}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError) as error:
        raise ScarletFileError(f"{name or 'The stream'} is damaged or no zip file: {error}") from error


def _read_archive(archive: zipfile.ZipFile) -> ScarletModels:
    members = archive.infolist()
    names = {member.filename for member in members}
    if len(names) != len(members):
        raise ScarletFileError("two members have the same name.")
    if sum(member.file_size for member in members) > MAX_TOTAL_BYTES:
        raise ScarletFileError(f"the members have more than {MAX_TOTAL_BYTES} bytes.")
    if "metadata" not in names or "version" not in names:
        raise ScarletFileError(
            "'metadata' or 'version' is missing: these are no scarlet models, or ones from before 1.0.0."
        )
    version = _load(archive, "version")
    if version not in READABLE_VERSIONS:
        raise ScarletFileError(
            f"schema version {version!r} is none of those known, {', '.join(READABLE_VERSIONS)}."
        )
    models = _parse_metadata(_load(archive, "metadata"))
    seen: set[int] = set()
    for name in names - {"metadata", "version"}:
        _identifier(name, "the archive")
    for member in members:
        name = member.filename
        if name in ("metadata", "version"):
            continue
        number, where = int(name), f"member {name}"
        record = _load(archive, name)
        if "blend_type" in _mapping(record, where):
            parent = _parse_parent(record, len(models.bands), where)
            for blend in parent.blends.values():
                if repeated := seen & blend.sources.keys():
                    raise ScarletFileError(f"{where}: source {min(repeated)} appears twice.")
                seen |= blend.sources.keys()
            models.parents[number] = parent
        elif record.get("source_type") == "isolated":
            models.isolated[number] = _parse_isolated(record, where)
        else:
            raise ScarletFileError(f"{where} is neither a blend nor an isolated source.")
    return models


def _load(archive: zipfile.ZipFile, name: str) -> Any:
    member = archive.getinfo(name)
    if member.file_size > MAX_MEMBER_BYTES:
        raise ScarletFileError(f"member {name} has more than {MAX_MEMBER_BYTES} bytes.")
    if member.flag_bits & 1:
        raise ScarletFileError(f"member {name} is encrypted.")
    try:
        return json.loads(archive.read(member))
    except (ValueError, RecursionError) as error:
        raise ScarletFileError(f"member {name} is not JSON: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ScarletFileError(f"{where} should be an object, not {_short(value)}.")
    return value


def _take(record: dict[str, Any], key: str, where: str) -> Any:
    try:
        return record[key]
    except KeyError:
        raise ScarletFileError(f"{where} lacks {key!r}.") from None


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) < 60 else text[:60] + "..."


def _identifier(name: str, where: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 20 and str(int(name)) == name):
        raise ScarletFileError(f"{where} has {_short(name)} where an identifier should be.")
    return int(name)


def _integers(value: Any, count: int, where: str) -> tuple[int, ...]:
    """A list of ``count`` integers, none larger than a position may be."""
    if not isinstance(value, list) or len(value) != count:
        raise ScarletFileError(f"{where} should be a list of {count} integers, not {_short(value)}.")
    for item in value:
        sound = isinstance(item, int | float) and not isinstance(item, bool)
        if not sound or not abs(item) < _MAX_COORDINATE or item != int(item):
            raise ScarletFileError(f"{where} should hold integers of the size of positions: {_short(item)}.")
    return tuple(int(item) for item in value)


def _shape(value: Any, count: int, where: str) -> tuple[int, ...]:
    shape = _integers(value, count, where)
    if min(shape) < 1 or shape[-1] * shape[-2] > MAX_AREA or max(shape[:-2], default=1) > MAX_BANDS:
        raise ScarletFileError(f"{where}: {list(shape)} is not positive, or larger than what is read.")
    return shape


def _position(value: Any, where: str) -> tuple[float, float]:
    y, x = _numbers(value, (2,), where, np.float64).tolist()
    if not max(abs(y), abs(x)) < _MAX_COORDINATE:
        raise ScarletFileError(f"{where}: {value} is not a position.")
    return y, x


def _numbers(value: Any, shape: tuple[int, ...], where: str, dtype: type = np.float32) -> NDArray:
    """Make an array of a flat list of finite numbers."""
    count = int(np.prod(shape, dtype=np.int64))
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)}" if isinstance(value, list) else _short(value)
        raise ScarletFileError(f"{where} should be a list of {count} numbers for {list(shape)}, not {found}.")
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf" or array.ndim != 1:
        raise ScarletFileError(f"{where} should hold nothing but numbers.")
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ScarletFileError(f"{where} holds numbers that are not finite.")
    return array.reshape(shape)


def _mask(value: Any, shape: tuple[int, ...], where: str) -> NDArray[np.bool_]:
    """A mask is a flat list of 0 and 1, or packed bits in base64."""
    if not isinstance(value, str):
        array = _numbers(value, shape, where)
        if not np.isin(array, (0, 1)).all():
            raise ScarletFileError(f"{where} should hold 0 and 1 only.")
        return array.astype(bool)
    count = int(np.prod(shape, dtype=np.int64))
    try:
        packed = np.frombuffer(base64.b64decode(value, validate=True), np.uint8)
    except ValueError as error:
        raise ScarletFileError(f"{where} is not base64: {error}") from error
    if len(packed) != (count + 7) // 8:
        raise ScarletFileError(f"{where} should hold {count} bits for {list(shape)}, not {8 * len(packed)}.")
    return np.unpackbits(packed, count=count).astype(bool).reshape(shape)


def _array(record: dict[str, Any], key: str, where: str) -> NDArray[np.float32]:
    """An array of the metadata: a flat list with its shape in another key, or from 1.0.3 on a document."""
    value, where = _take(record, key, where), f"{where}, {key}"
    if isinstance(value, dict):
        shape, dtype, value = _take(value, "shape", where), value.get("dtype"), _take(value, "data", where)
    else:
        shape = record.get(f"{key}_shape", record.get(f"{key}Shape"))
        dtype = record.get(f"{key}_dtype", "float32")
    if dtype not in ("float32", "float64"):
        raise ScarletFileError(f"{where} should be of floating point type, not {_short(dtype)}.")
    if not isinstance(shape, list) or len(shape) not in (2, 3):
        raise ScarletFileError(f"{where} should have two or three dimensions, not {shape}.")
    return _numbers(value, _shape(shape, len(shape), f"{where}, shape"), where)


def _parse_metadata(metadata: Any) -> ScarletModels:
    where = "metadata"
    bands = _take(_mapping(metadata, where), "bands", where)
    if not isinstance(bands, list) or not all(isinstance(band, str) for band in bands):
        raise ScarletFileError(f"{where}: the bands should be a list of names, not {_short(bands)}.")
    if not 0 < len(set(bands)) == len(bands) <= MAX_BANDS:
        raise ScarletFileError(f"{where}: the bands should be different, and at most {MAX_BANDS}: {bands}.")
    model_psf = _array(metadata, "model_psf", where)
    if model_psf.ndim == 3 and len(model_psf) == 1:
        model_psf = model_psf[0]
    _check_stamps(model_psf, 2, f"{where}, model_psf")
    record = _take(metadata, "psf", where)
    if isinstance(record, dict) and record.get("psf_type") == "stitched":
        psf: NDArray | PsfGrid = _parse_cells(record, bands, f"{where}, psf")
    else:
        psf = _parse_psf(metadata, "psf", bands, where)
    return ScarletModels(tuple(bands), model_psf, psf)


def _check_stamps(stamps: NDArray, dimensions: int, where: str) -> None:
    if stamps.ndim != dimensions or stamps.shape[-1] % 2 != 1 or stamps.shape[-2] % 2 != 1:
        raise ScarletFileError(f"{where} should have {dimensions} dimensions and odd sides: {stamps.shape}.")
    if not (stamps.sum(axis=(-2, -1)) > 0).all():
        raise ScarletFileError(f"{where}: a PSF has no positive sum.")


def _parse_psf(record: dict[str, Any], key: str, bands: list[str], where: str) -> NDArray[np.float32]:
    value = _take(record, key, where)
    if isinstance(value, dict):
        if value.get("psf_type") != "image":
            raise ScarletFileError(f"{where}, {key}: unknown kind of PSF {_short(value.get('psf_type'))}.")
        if value.get("bands") not in (None, [], bands):
            raise ScarletFileError(f"{where}, {key}: its bands are not {bands}.")
    stamps = _array(record, key, where)
    _check_stamps(stamps, 3, f"{where}, {key}")
    if len(stamps) != len(bands):
        raise ScarletFileError(f"{where}, {key}: {len(stamps)} PSFs for the bands {bands}.")
    return stamps


def _parse_cells(record: dict[str, Any], bands: list[str], where: str) -> PsfGrid:
    """PSFs of the cells of a coadd; their document counts (x, y), and a cell may be missing."""
    grid = _mapping(_take(record, "grid", where), f"{where}, grid")
    cells = _take(_mapping(_take(record, "container", where), f"{where}, container"), "cells", where)
    if not isinstance(cells, list) or not cells:
        raise ScarletFileError(f"{where}: there are no cells.")
    cell_shape = _shape(grid.get("cell_size"), 2, f"{where}, cell_size")[::-1]
    grid_shape = _shape(grid.get("shape"), 2, f"{where}, grid shape")[::-1]
    origin = _integers(grid.get("min"), 2, f"{where}, grid min")[::-1]
    stamps: dict[int, NDArray] = {}
    for number, cell in enumerate(cells):
        place = f"{where}, cell {number}"
        x, y = _integers(_mapping(cell, place).get("index"), 2, f"{place}, index")
        if not (0 <= y < grid_shape[0] and 0 <= x < grid_shape[1]):
            raise ScarletFileError(f"{place} lies at {[x, y]}, outside the grid.")
        stamps[y * grid_shape[1] + x] = _parse_psf(cell, "psf", bands, place)
    shapes = {stamp.shape for stamp in stamps.values()}
    if len(shapes) != 1:
        raise ScarletFileError(f"{where}: the cells' PSFs have different shapes: {sorted(shapes)}.")
    shape = (grid_shape[0] * grid_shape[1], *shapes.pop())
    if np.prod(shape, dtype=np.int64) > MAX_AREA * 4:
        raise ScarletFileError(f"{where}: PSFs of {list(shape)} are larger than what is read.")
    filled = np.full(shape, np.nan)
    filled[list(stamps)] = list(stamps.values())
    return PsfGrid(filled, cell_shape, grid_shape, origin)


def _parse_parent(record: dict[str, Any], n_bands: int, where: str) -> ScarletParent:
    kind = record["blend_type"]
    if kind != "lsst_hierarchical" and kind not in _OLD_PARENTS:
        raise ScarletFileError(f"{where}: a parent should be of hierarchical type, not {_short(kind)}.")
    blends: dict[int, ScarletBlend] = {}
    for name, child in _mapping(_take(record, "children", where), f"{where}, children").items():
        blends[_identifier(name, where)] = _parse_blend(child, n_bands, f"{where}, blend {name}")
    metadata = _mapping(record.get("metadata") or {}, f"{where}, metadata")
    if kind == "lsst_hierarchical":
        shape = _shape(_take(record, "shape", where), 2, f"{where}, shape")
        origin, footprint = _take(record, "origin", where), _take(record, "span_array", where)
    elif "spans" in metadata:
        shape = _shape(_take(metadata, "spans_shape", where), 2, f"{where}, spans_shape")
        origin, footprint = _take(metadata, "origin", where), metadata["spans"]
    else:
        y0, x0, y1, x1 = _union((blend.origin, blend.shape) for blend in blends.values())
        shape = _shape([y1 - y0, x1 - x0], 2, f"{where}, box of its blends")
        return ScarletParent((y0, x0), np.ones(shape, bool), blends)
    origin = _integers(origin, 2, f"{where}, origin")
    return ScarletParent(origin, _mask(footprint, shape, f"{where}, footprint"), blends)


def _parse_blend(record: Any, n_bands: int, where: str) -> ScarletBlend:
    kind = _mapping(record, where).get("blend_type", "blend")
    if kind != "blend":
        raise ScarletFileError(f"{where} should be of type 'blend', not {_short(kind)}.")
    sources: dict[int, ScarletSource] = {}
    for name, source in _mapping(_take(record, "sources", where), f"{where}, sources").items():
        number = _identifier(name, where)
        sources[number] = _parse_source(source, number, n_bands, f"{where}, source {name}")
    return ScarletBlend(
        _integers(_take(record, "origin", where), 2, f"{where}, origin"),
        _shape(_take(record, "shape", where), 2, f"{where}, shape"),
        sources,
    )


def _parse_source(record: Any, number: int, n_bands: int, where: str) -> ScarletSource:
    metadata = _mapping(_mapping(record, where).get("metadata") or {}, f"{where}, metadata")
    for key, value in metadata.items():
        if key in ("id", "peak_id") and (not isinstance(value, int) or isinstance(value, bool)):
            raise ScarletFileError(f"{where}: {key} should be an integer, not {_short(value)}.")
    if metadata.get("id", number) != number:
        raise ScarletFileError(f"{where} has the identifier {metadata['id']} in its metadata.")
    components = _take(record, "components", where)
    if not isinstance(components, list):
        raise ScarletFileError(f"{where}: the components should be a list.")
    source = ScarletSource(
        number,
        metadata.get("peak_id"),
        [_parse_component(c, n_bands, f"{where}, component {i}") for i, c in enumerate(components)],
    )
    y0, x0, y1, x1 = source.box()
    if (y1 - y0) * (x1 - x0) > MAX_AREA:
        raise ScarletFileError(f"{where}: its components are too far apart.")
    return source


def _parse_component(record: Any, n_bands: int, where: str) -> FactorizedComponent | CubeComponent:
    kind = _mapping(record, where).get("component_type", "factorized")
    if record.get("version", "1.0.0") != "1.0.0":
        raise ScarletFileError(f"{where} has the unknown version {_short(record['version'])}.")
    origin = _integers(_take(record, "origin", where), 2, f"{where}, origin")
    peak = _position(_take(record, "peak", where), f"{where}, peak")
    shape = _take(record, "shape", where)
    if kind == "factorized":
        shape = _shape(shape, 2, f"{where}, shape")
        morph = _numbers(_take(record, "morph", where), shape, f"{where}, morph")
        spectrum = _numbers(_take(record, "spectrum", where), (n_bands,), f"{where}, spectrum")
        return FactorizedComponent(origin, peak, spectrum, morph)
    if kind in ("component", "cube"):
        shape = _shape(shape, 3, f"{where}, shape")
        model = _numbers(_take(record, "model", where), shape, f"{where}, model")
        if len(model) != n_bands:
            raise ScarletFileError(f"{where} has {len(model)} bands instead of {n_bands}.")
        return CubeComponent(origin, peak, model)
    raise ScarletFileError(f"{where} is of the unknown type {_short(kind)}.")


def _parse_isolated(record: dict[str, Any], where: str) -> IsolatedSource:
    shape = _shape(_take(record, "shape", where), 2, f"{where}, shape")
    return IsolatedSource(
        _integers(_take(record, "origin", where), 2, f"{where}, origin"),
        _position(_take(record, "peak", where), f"{where}, peak"),
        _mask(_take(record, "span_array", where), shape, f"{where}, span_array"),
    )


# Writing.


def write(path_or_stream: str | os.PathLike[str] | BinaryIO, models: ScarletModels) -> None:
    """Write a file of scarlet models in the layout of schema 1.0.1.

    Equal models give equal bytes. Numbers are written with the digits that single precision needs, so that
    what is read back is the same.

    Parameters
    ----------
    path_or_stream : path or binary stream
        Where to write to.
    models : `ScarletModels`
        What to write.

    Raises
    ------
    ValueError
        Raised if the pipelines could not read or not measure what would be written: PSFs of cells, arrays of
        other bands, a number that is not finite, a source without a component, a blend that reaches beyond
        its parent, or an id that appears twice.
    """
    _check(models)
    members = {str(key): _encode_parent(parent) for key, parent in models.parents.items()}
    members |= {str(key): _encode_isolated(source) for key, source in models.isolated.items()}
    members["metadata"] = _encode_metadata(models)
    members["version"] = WRITTEN_VERSION
    # All of it is encoded before the file is touched: an error leaves no half of a file.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system, info.external_attr = 3, 0o600 << 16
            archive.writestr(info, json.dumps(content, separators=(",", ":"), allow_nan=False))
    if hasattr(path_or_stream, "write"):
        path_or_stream.write(buffer.getvalue())
    else:
        with open(path_or_stream, "wb") as stream:
            stream.write(buffer.getvalue())


def _check(models: ScarletModels) -> None:
    n_bands = len(models.bands)
    if isinstance(models.psf, PsfGrid):
        raise ValueError(f"Schema {WRITTEN_VERSION} has one PSF per band, not those of cells.")
    if models.psf.ndim != 3 or len(models.psf) != n_bands:
        raise ValueError(f"PSFs of {models.psf.shape} do not go with the bands {list(models.bands)}.")
    if both := models.parents.keys() & models.isolated.keys():
        raise ValueError(f"{min(both)} is a parent and an isolated source.")
    seen: set[int] = set()
    for key, parent in models.parents.items():
        outer = _union([(parent.origin, parent.footprint.shape)])
        for blend in parent.blends.values():
            # The pipelines cut the blend's box out of the parent's.
            if _union([(parent.origin, parent.footprint.shape), (blend.origin, blend.shape)]) != outer:
                raise ValueError(f"A blend of parent {key} reaches beyond its box.")
            for number, source in blend.sources.items():
                if number != source.id or number in seen:
                    raise ValueError(f"Source {number} of parent {key} appears twice or under another id.")
                seen.add(number)
                if not source.components:
                    raise ValueError(f"Source {number} has no component.")
                if any(c.n_bands != n_bands for c in source.components):
                    raise ValueError(f"Source {number} has a component that is not of {n_bands} bands.")


def _encode_parent(parent: ScarletParent) -> dict[str, Any]:
    return {
        "blend_type": "hierarchical",
        "children": {str(key): _encode_blend(blend) for key, blend in parent.blends.items()},
        "version": "1.0.0",
        "metadata": {
            # As numbers rather than words: they are read as bool all the same, and take a third of the space.
            "spans": parent.footprint.ravel().astype(int).tolist(),
            "spans_shape": list(parent.footprint.shape),
            "spans_dtype": "bool",
            "origin": list(parent.origin),
            "array_keys": ["spans"],
        },
    }


def _encode_blend(blend: ScarletBlend) -> dict[str, Any]:
    return {
        "blend_type": "blend",
        "origin": list(blend.origin),
        "shape": list(blend.shape),
        "sources": {str(key): _encode_source(source) for key, source in blend.sources.items()},
        "version": "1.0.0",
    }


def _encode_source(source: ScarletSource) -> dict[str, Any]:
    metadata = {} if source.peak_id is None else {"peak_id": int(source.peak_id)}
    return {
        "source_type": "source",
        "components": [_encode_component(component) for component in source.components],
        "version": "1.0.0",
        "metadata": metadata | {"id": int(source.id)},
    }


def _encode_component(component: FactorizedComponent | CubeComponent) -> dict[str, Any]:
    record: dict[str, Any] = {"origin": list(component.origin)}
    if isinstance(component, FactorizedComponent):
        record |= {
            "shape": list(component.morph.shape),
            "spectrum": _plain(component.spectrum),
            "morph": _plain(component.morph),
            "component_type": "factorized",
        }
    else:
        record |= {
            "shape": list(component.model.shape),
            "model": _plain(component.model),
            "component_type": "component",
        }
    return record | {"peak": _plain(component.peak, np.float64), "version": "1.0.0"}


def _encode_isolated(source: IsolatedSource) -> dict[str, Any]:
    return {
        "source_type": "isolated",
        "origin": list(source.origin),
        "shape": list(source.footprint.shape),
        "peak": _plain(source.peak, np.float64),
        "span_array": source.footprint.ravel().astype(int).tolist(),
        "version": "1.0.0",
    }


def _encode_metadata(models: ScarletModels) -> dict[str, Any]:
    record: dict[str, Any] = {"bands": list(models.bands)}
    for key, array in (("model_psf", models.model_psf), ("psf", models.psf)):
        record |= {key: _plain(array), f"{key}_shape": list(array.shape), f"{key}_dtype": "float32"}
    return record | {"array_keys": ["model_psf", "psf"]}


def _plain(values: ArrayLike, dtype: type = np.float32) -> list[int | float]:
    """Make the numbers of an array ones that JSON writes with as few digits as their type needs."""
    values = np.asarray(values, dtype).ravel()
    if not np.isfinite(values).all():
        raise ValueError("A model or PSF holds numbers that are not finite.")
    whole = (values == np.rint(values)) & (np.abs(values) < 1 << 24)
    if whole.all():
        return values.astype(np.int64).tolist()
    return [int(v) if w else float(str(v)) for v, w in zip(values, whole.tolist(), strict=True)]


# Models.


def isolated_to_scarlet(
    bands: Sequence[str],
    psf: ArrayLike,
    isolated: Sequence[Parent],
    origin: tuple[int, int],
    *,
    model_sigma: float = 0.8,
) -> ScarletModels:
    """Make scarlet models of a patch where nothing was deblended.

    Parameters
    ----------
    bands : sequence of `str`
        Bands.
    psf : array_like, (B, h, w)
        Observed PSF of the patch in each band.
    isolated : sequence of `lsst.meas.vaedeblend.scene.Parent`
        The isolated sources, with their first peak.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].
    model_sigma : `float`, optional
        Standard deviation of the model frame's Gaussian before the integration over pixels, pixel.

    Returns
    -------
    scarlet : `ScarletModels`
        The models.

    Raises
    ------
    ValueError
        Raised if an isolated source has no peak.
    """
    y0, x0 = origin
    model_psf = gaussian_psf(model_sigma, _MODEL_PSF_SIZE).astype(np.float32)
    out = ScarletModels(tuple(bands), model_psf, np.asarray(psf, np.float32))
    for parent in isolated:
        if not len(parent.peaks):
            raise ValueError(f"The isolated source {parent.id} has no peak.")
        peak = (float(np.rint(parent.peaks[0, 1])) + y0, float(np.rint(parent.peaks[0, 0])) + x0)
        corner = (int(parent.y0 + y0), int(parent.x0 + x0))
        out.isolated[int(parent.id)] = IsolatedSource(corner, peak, parent.footprint)
    return out


def models_to_scarlet(
    models: SourceModels,
    psf: ArrayLike,
    parents: Sequence[Parent],
    isolated: Sequence[Parent] = (),
    *,
    peak_ids: ArrayLike | None = None,
    model_sigma: float = 0.8,
    tolerance: float = 1e-3,
) -> ScarletModels:
    """Turn deblended sources into scarlet models.

    Parameters
    ----------
    models : `lsst.meas.vaedeblend.models.SourceModels`
        The sources, whose model frame has to be a Gaussian's. Ids and parents are those of the catalogues
        that go with the file.
    psf : array_like, (B, h, w)
        Observed PSF of the patch in each band; the file holds no more.
    parents : sequence of `lsst.meas.vaedeblend.scene.Parent`
        Parents of the sources; those without any are left out.
    isolated : sequence of `lsst.meas.vaedeblend.scene.Parent`, optional
        Those to be stored as isolated sources, with their first peak: single sources, sky objects, and
        whatever else was not deblended. What ``models`` has in them is left out.
    peak_ids : array_like, (N,), optional
        Identifiers of the merged detections' peaks that the sources come from; by default their own.
    model_sigma : `float`, optional
        Standard deviation of the model frame's Gaussian before the integration over pixels, pixel.
    tolerance : `float`, optional
        Error of a pixel, and of the flux in a circle, over the flux of its band, see `factorize`; the total
        flux is exact. Where the standard deviation of the flux is larger, circles may be off by a fifth of
        it, but by no more than a hundred times the tolerance, and pixels by a twentieth of it, but by no more
        than twenty times the tolerance.

    Returns
    -------
    scarlet : `ScarletModels`
        The models. A source without flux has one pixel of 0 at its peak, because measurement needs one
        component at least.

    Raises
    ------
    ValueError
        Raised if a source belongs to none of the parents, an id appears twice, a model is not finite, an
        isolated source has no peak, or the PSFs do not go with the models.
    """
    psf = np.asarray(psf, np.float32)
    y0, x0 = models.origin
    peak_ids = models.id if peak_ids is None else np.asarray(peak_ids)
    if len(peak_ids) != len(models):
        raise ValueError(f"{len(peak_ids)} peaks for {len(models)} sources.")
    # Most sources of a patch are faint: what lies far below their noise would only make the file large.
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = models.flux_err / models.flux
    relative = np.where(relative >= 0, relative, np.inf)
    circle = np.clip(0.2 * relative, tolerance, 100.0 * tolerance)
    pixel = np.clip(0.05 * relative, tolerance, 20.0 * tolerance)
    out = isolated_to_scarlet(models.bands, psf, isolated, models.origin, model_sigma=model_sigma)
    known = {int(parent.id): parent for parent in parents}
    blends: dict[int, ScarletBlend] = {}
    for i, (number, parent_id) in enumerate(zip(models.id.tolist(), models.parent.tolist(), strict=True)):
        if parent_id in out.isolated:
            continue
        if parent_id not in known:
            raise ValueError(f"Source {number} belongs to parent {parent_id}, which is not given.")
        if parent_id not in blends:
            parent = known[parent_id]
            origin = (int(parent.y0 + y0), int(parent.x0 + x0))
            blends[parent_id] = ScarletBlend(origin, parent.footprint.shape, {})
            out.parents[parent_id] = ScarletParent(origin, parent.footprint, {parent_id: blends[parent_id]})
        if number in blends[parent_id].sources:
            raise ValueError(f"Two sources have the id {number}.")
        # Models that come from their table do not know their peaks.
        at = (models.peak_y[i], models.peak_x[i])
        at = at if np.isfinite(at).all() else (models.y[i], models.x[i])
        peak = (float(np.rint(at[0])) + y0, float(np.rint(at[1])) + x0)
        corner = (int(models.corner_y[i]) + y0, int(models.corner_x[i]) + x0)
        components = [
            FactorizedComponent((corner[0] + y, corner[1] + x), peak, spectrum, morph)
            for spectrum, morph, (y, x) in factorize(models.model_frame[i], pixel[i], circle[i])
        ]
        if not components:
            nothing = np.zeros(len(models.bands), np.float32)
            place = (int(peak[0]), int(peak[1]))
            components = [FactorizedComponent(place, peak, nothing, np.ones((1, 1), np.float32))]
        blends[parent_id].sources[number] = ScarletSource(number, int(peak_ids[i]), components)
    _check(out)
    return out


def factorize(
    model: ArrayLike, tolerance: ArrayLike = 1e-3, circle_tolerance: ArrayLike | None = None
) -> list[tuple[NDArray[np.float32], NDArray[np.float32], tuple[int, int]]]:
    """Write a model as a sum of a few products of a spectrum and an image.

    In each band, and in units of the band's flux: the total is kept, and no pixel changes by more than
    ``tolerance``. The flux in any circle around the source, and so under any weight that falls with the
    radius, changes by at most ``circle_tolerance``, and the sum of the pixels' absolute errors is at most ten
    times that.

    The images are those of a singular value decomposition of the model, each band scaled to unit tolerance,
    on the smallest box that suffices. They are rounded to whole numbers, which takes the least space in a
    text file, as coarsely as the tolerances allow; the spectra, solved for last by least squares with the
    total as a constraint, hold the scale. All but the first image have both signs, as their spectra have.

    Parameters
    ----------
    model : array_like, (B, S, S)
        Image of one source in each band, nJy. A band whose sum is not above a tenth of the sum of its
        absolute values, as that of noise, counts as empty.
    tolerance : array_like, (B,), optional
        Error of a pixel over the band's flux.
    circle_tolerance : array_like, (B,), optional
        Error of the flux in circles over the band's flux; by default ``tolerance``.

    Returns
    -------
    components : `list` [`tuple`]
        Spectrum (B,), image (h, w), and pixel (y, x) of the model where the image begins; float32. Empty if
        no band has flux.

    Raises
    ------
    ValueError
        Raised if the model is not finite, or a tolerance not positive.
    """
    model = np.asarray(model, np.float64)
    tolerance = np.broadcast_to(tolerance, len(model))
    circle = tolerance if circle_tolerance is None else np.broadcast_to(circle_tolerance, len(model))
    if not np.isfinite(model).all():
        raise ValueError("The model is not finite.")
    if not ((tolerance > 0).all() and (circle > 0).all()):
        raise ValueError(f"Tolerances should be positive, not {tolerance} and {circle}.")
    flux = model.sum(axis=(1, 2))
    bright = flux > 0.1 * np.abs(model).sum(axis=(1, 2))
    if not bright.any():
        return []
    # From here on the unit of each band is its tolerance, and that of pixels the ratio of the two.
    unit = (circle * flux)[bright]
    pixel = (tolerance / circle)[bright, None]
    shapes = model[bright] / unit[:, None, None]
    # What is cut off counts against the tolerance, and something has to be left for the other errors.
    y1, y2, x1, x2 = _trim(shapes, 0.5)
    inside = np.zeros(shapes.shape[1:], bool)
    inside[y1:y2, x1:x2] = True
    # Pixels in the order of their distance from the centre: running sums are the fluxes in circles.
    weight = np.where(inside, np.maximum(shapes.sum(axis=0), 0.0), 0.0)
    y, x = (grid - np.average(grid, weights=weight) for grid in np.indices(inside.shape))
    order = np.argsort((y**2 + x**2).ravel(), kind="stable")
    flat = shapes.reshape(len(shapes), -1)[:, order]
    used = inside.ravel()[order]
    # The left singular vectors, largest first; the matrix is tiny, as there are few bands.
    left = np.linalg.eigh(flat @ flat.T)[1][:, ::-1]
    # An image times the largest entry of its vector is its part in the band where it matters most: one step
    # of rounding means the same error in all images.
    images = (left.T @ flat) * used * np.abs(left).max(axis=0)[:, None]
    images *= np.where(images.sum(axis=1) < 0, -1.0, 1.0)[:, None]
    for rank in range(1, len(images) + 1):
        # Rounding needs a part of the tolerance as well.
        if rank == len(images) or _fit(images[:rank], flat, pixel)[1] <= 0.7:
            break
    step = np.abs(images[0]).max()
    while True:
        rounded = np.rint(images[:rank] / step)
        rounded = rounded[rounded.any(axis=1)]
        spectra, error = _fit(rounded, flat, pixel)
        if error <= 1.0:
            break
        step /= np.sqrt(2.0)
    pictures = np.zeros(rounded.shape)
    pictures[:, order] = rounded
    out = []
    for j, image in enumerate(pictures.reshape(-1, *inside.shape)):
        spectrum = np.zeros(len(flux), np.float32)
        spectrum[bright] = spectra[:, j] * unit
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        part = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
        out.append((spectrum, part, (int(rows[0]), int(columns[0]))))
    return out


def _trim(shapes: NDArray, budget: float) -> tuple[int, int, int, int]:
    """The box (y1, y2, x1, x2) outside which no shape, (B, h, w), has more than the budget."""
    weight = np.abs(shapes)
    y1, y2, x1, x2 = 0, weight.shape[1], 0, weight.shape[2]
    rows, columns = weight.sum(axis=2), weight.sum(axis=1)
    spent = np.zeros(len(weight))
    while y2 - y1 > 1 and x2 - x1 > 1:
        edges = np.stack([rows[:, y1], rows[:, y2 - 1], columns[:, x1], columns[:, x2 - 1]])
        fits = (spent + edges).max(axis=1) <= budget
        if not fits.any():
            break
        length = np.array([x2 - x1, x2 - x1, y2 - y1, y2 - y1])
        which = int(np.argmin(np.where(fits, edges.max(axis=1) / length, np.inf)))
        spent += edges[which]
        if which < 2:
            columns -= weight[:, y1 if which == 0 else y2 - 1, :]
            y1, y2 = (y1 + 1, y2) if which == 0 else (y1, y2 - 1)
        else:
            rows -= weight[:, :, x1 if which == 2 else x2 - 1]
            x1, x2 = (x1 + 1, x2) if which == 2 else (x1, x2 - 1)
    return y1, y2, x1, x2


def _fit(images: NDArray, shapes: NDArray, pixel: NDArray) -> tuple[NDArray, float]:
    """Fit shapes (B, P) by images (k, P), sums being kept; return coefficients (B, k) and the error.

    Least squares under one linear constraint: with G the images' normal matrix and v their sums the solution
    is the free one plus a multiple of G^-1 v. The error is that of `factorize` in units of the tolerance, for
    pixels in the order of their distance from the centre.
    """
    total = images.sum(axis=1)
    if not total.any():
        return np.zeros((len(shapes), len(images))), np.inf
    inverse = np.linalg.pinv(images @ images.T, hermitian=True)
    free = shapes @ images.T @ inverse
    direction = inverse @ total
    excess = shapes.sum(axis=1) - free @ total
    coefficients = free + (excess / (total @ direction))[:, None] * direction
    error = coefficients @ images - shapes
    circles, size = np.abs(np.cumsum(error, axis=1)), np.abs(error)
    return coefficients, max(circles.max(), 0.1 * size.sum(axis=1).max(), (size / pixel).max())


def render(
    models: ScarletModels,
    source: ScarletSource,
    *,
    observed: bool = False,
    psf: ArrayLike | None = None,
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Render a source.

    Parameters
    ----------
    models : `ScarletModels`
        The file's content, for the bands and PSFs.
    source : `ScarletSource`
        One of its sources.
    observed : `bool`, optional
        Whether to render the source as the coadd shows it, rather than in the model frame.
    psf : array_like, (B, h, w), optional
        The observed PSF, instead of the file's own at the source's peak. Bands without one in the file's
        cells render as 0.

    Returns
    -------
    image : `numpy.ndarray`, (B, h, w)
        The source, nJy, float32. As observed its box is the model's, grown by the radius of the PSF.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the image's pixel [0, 0].

    Raises
    ------
    ValueError
        Raised if the source has no component, or the PSF is not one per band with odd sides.
    """
    if not source.components:
        raise ValueError(f"Source {source.id} has no component to render.")
    y0, x0, y1, x1 = source.box()
    image = np.zeros((len(models.bands), y1 - y0, x1 - x0), np.float32)
    for component in source.components:
        (y, x), (h, w) = component.origin, component.shape
        image[:, y - y0 : y - y0 + h, x - x0 : x - x0 + w] += component.image()
    if not observed:
        return image, (y0, x0)
    if psf is not None:
        stamps = np.asarray(psf, np.float64)
    elif isinstance(models.psf, PsfGrid):
        y, x = source.components[0].peak
        stamps = np.nan_to_num(models.psf.filled().stamps[int(models.psf.index(x, y))])
    else:
        stamps = models.psf.astype(np.float64)
    if stamps.ndim != 3 or len(stamps) != len(models.bands):
        raise ValueError(f"PSFs of {stamps.shape} do not go with the bands {list(models.bands)}.")
    grow_y, grow_x = stamps.shape[1] // 2, stamps.shape[2] // 2
    image = np.pad(image, ((0, 0), (grow_y, grow_y), (grow_x, grow_x)))
    largest = max(*stamps.shape[1:], *models.model_psf.shape)
    kernels = matching_kernel_ft(stamps, models.model_psf[None], fft_size(max(image.shape[1:]), largest))
    kernels[~stamps.any(axis=(1, 2))] = 0.0
    return convolve_to_observed(image[None], kernels)[0], (y0 - grow_y, x0 - grow_x)
