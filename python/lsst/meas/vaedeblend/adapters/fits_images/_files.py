# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bands of FITS and npz files."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

__all__ = ["Given", "Plane", "name_of", "planes_of", "read_npz"]

Given = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
"""One file for all bands, or files by band. ``FILE[NAME]`` or ``FILE[2]`` says which extension."""

MOST_PIXELS = 20_000**2
"""Pixels of one band beyond which images are refused: they belong into patches."""

_NPZ_NAMES = {
    "image": ("image", "images"),
    "variance": ("variance", "variances"),
    "weight": ("weight", "weights"),
    "psf": ("psf", "psfs"),
    "mask": ("mask", "masks"),
}
"""Kinds of planes to the names that arrays have in npz files."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """One band of a file."""

    array: NDArray
    header: fits.Header
    name: str


def name_of(given: Any) -> str:
    return ", ".join(map(str, given.values())) if isinstance(given, Mapping) else str(given)


def planes_of(kind: str, given: Any, bands: Sequence[str]) -> dict[str, Plane]:
    """Read what is given of one kind: bands to planes."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(bands)):
            raise ValueError(f"There is a {kind} of band {', '.join(unknown)}, which has no image.")
        out = {}
        for band, path in given.items():
            plane = _read_fits(os.fspath(path), f"band {band}")
            if plane.array.ndim != 2:
                raise ValueError(
                    f"{plane.name} (band {band}): the {kind} should have two axes, it has shape "
                    f"{plane.array.shape}. A cube is given without a band, with --bands in order."
                )
            out[band] = plane
        return out
    plane = given if isinstance(given, Plane) else _read_fits(os.fspath(given), f"bands {' '.join(bands)}")
    array = plane.array
    if array.ndim == 3 and len(array) == len(bands):
        return {band: Plane(part, plane.header, plane.name) for band, part in zip(bands, array, strict=True)}
    if array.ndim == 2 and (kind != "image" or len(bands) == 1):
        return {band: plane for band in bands}
    raise ValueError(
        f"{plane.name}: the {kind} has shape {array.shape}; the {len(bands)} bands {' '.join(bands)} need "
        f"({len(bands)}, height, width)."
    )


def _read_fits(path: str, what: str) -> Plane:
    """Read an image of a FITS file, in native byte order."""
    match = None if os.path.exists(path) else re.fullmatch(r"(.+)\[([^\[\]]+)\]", path)
    file, extension = (match[1], match[2]) if match else (path, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fits.verify.VerifyWarning)
            with fits.open(file, memmap=False, lazy_load_hdus=True) as hdus:
                if extension is None:
                    index: Any = next((i for i, hdu in enumerate(hdus) if hdu.is_image and hdu.shape), None)
                    if index is None:
                        raise ValueError(f"{file} ({what}) holds no image.")
                else:
                    index = int(extension) if extension.isdigit() else extension
                hdu = hdus[index]
                shape = tuple(hdu.shape) if hdu.is_image else ()
                if math.prod(shape[-2:]) > MOST_PIXELS:
                    raise ValueError(f"{path} ({what}): {shape} pixels are too many; cut it into patches.")
                if len(shape) < 2 or math.prod(shape) == 0:
                    raise ValueError(f"{path} ({what}): extension {index!r} holds no image.")
                header = hdus[0].header.copy()
                header.update(hdu.header)
                array = np.asarray(hdu.data)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file} ({what}) has no extension {extension!r}.") from error
    except FileNotFoundError:
        raise
    except (OSError, TypeError) as error:
        raise ValueError(f"{file} ({what}) cannot be read as FITS: {error}") from error
    while array.ndim > 2 and len(array) == 1:
        array = array[0]
    return Plane(array.astype(array.dtype.newbyteorder("=")), header, path)


def read_npz(path: str) -> dict[str, Any]:
    """Read the arrays of an npz file, planes by their kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        # Three images of 8 bytes per pixel in ten bands.
        if size > 240 * MOST_PIXELS:
            raise ValueError(f"{path}: {size} bytes are too many; cut it into patches.")
        with np.load(path, allow_pickle=False) as data:
            out: dict[str, Any] = {
                kind: Plane(data[name], fits.Header(), path)
                for kind, names in _NPZ_NAMES.items()
                for name in names
                if name in data.files
            }
            for name in ("bands", "peaks", "zeropoint", "pixel_scale"):
                if name in data.files:
                    out[name] = data[name]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no npz file.") from error
    if "image" not in out:
        raise ValueError(f"{path} has no array image.")
    return out
