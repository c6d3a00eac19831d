# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading. Files come from others: every value is checked before it is used, and what is wrong is said with
the place where it is.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...scene import PsfGrid
from ._records import (
    CubeComponent,
    FactorizedComponent,
    IsolatedSource,
    ScarletBlend,
    ScarletFileError,
    ScarletModels,
    ScarletParent,
    ScarletSource,
    bounding_box,
)

__all__ = ["read"]

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

# Positions beyond this cannot be tract pixels, and would overflow sums of int32.
_MAX_COORDINATE = 1 << 30

# The names that scarlet has had for a parent with blends in it.
_OLD_PARENTS = ("hierarchical", "hierarchical_blend")


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


def _pair(value: Any, where: str) -> tuple[int, int]:
    y, x = _integers(value, 2, where)
    return y, x


def _box(value: Any, where: str) -> tuple[int, int]:
    height, width = _shape(value, 2, where)
    return height, width


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
    cell_shape = _box(grid.get("cell_size"), f"{where}, cell_size")[::-1]
    grid_shape = _box(grid.get("shape"), f"{where}, grid shape")[::-1]
    origin = _pair(grid.get("min"), f"{where}, grid min")[::-1]
    stamps: dict[int, NDArray] = {}
    for number, cell in enumerate(cells):
        place = f"{where}, cell {number}"
        x, y = _pair(_mapping(cell, place).get("index"), f"{place}, index")
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
        shape = _box(_take(record, "shape", where), f"{where}, shape")
        origin, footprint = _take(record, "origin", where), _take(record, "span_array", where)
    elif "spans" in metadata:
        shape = _box(_take(metadata, "spans_shape", where), f"{where}, spans_shape")
        origin, footprint = _take(metadata, "origin", where), metadata["spans"]
    else:
        y0, x0, y1, x1 = bounding_box((blend.origin, blend.shape) for blend in blends.values())
        shape = _box([y1 - y0, x1 - x0], f"{where}, box of its blends")
        return ScarletParent((y0, x0), np.ones(shape, bool), blends)
    corner = _pair(origin, f"{where}, origin")
    return ScarletParent(corner, _mask(footprint, shape, f"{where}, footprint"), blends)


def _parse_blend(record: Any, n_bands: int, where: str) -> ScarletBlend:
    kind = _mapping(record, where).get("blend_type", "blend")
    if kind != "blend":
        raise ScarletFileError(f"{where} should be of type 'blend', not {_short(kind)}.")
    sources: dict[int, ScarletSource] = {}
    for name, source in _mapping(_take(record, "sources", where), f"{where}, sources").items():
        number = _identifier(name, where)
        sources[number] = _parse_source(source, number, n_bands, f"{where}, source {name}")
    return ScarletBlend(
        _pair(_take(record, "origin", where), f"{where}, origin"),
        _box(_take(record, "shape", where), f"{where}, shape"),
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
    origin = _pair(_take(record, "origin", where), f"{where}, origin")
    peak = _position(_take(record, "peak", where), f"{where}, peak")
    shape = _take(record, "shape", where)
    if kind == "factorized":
        shape = _box(shape, f"{where}, shape")
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
    shape = _box(_take(record, "shape", where), f"{where}, shape")
    return IsolatedSource(
        _pair(_take(record, "origin", where), f"{where}, origin"),
        _position(_take(record, "peak", where), f"{where}, peak"),
        _mask(_take(record, "span_array", where), shape, f"{where}, span_array"),
    )
