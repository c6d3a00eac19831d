# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The images that deblenders are compared on, with the truth where it is known."""

from __future__ import annotations

__all__ = ["Patch", "Truth", "load_npz", "read_patches"]

import dataclasses
import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...scene import PsfGrid, Scene

MAX_BYTES = 4 * 2**30
"""Size of the arrays of one npz file above which it is refused."""

_IMAGES = ("bands", "image", "variance", "psf")
_TRUTH = ("x", "y", "stamp", "stamp_x0", "stamp_y0")


@dataclasses.dataclass(eq=False)
class Truth:
    """The true objects of a patch.

    Parameters
    ----------
    x, y : `numpy.ndarray`, (N,)
        Centres, scene coordinates.
    stamp : `numpy.ndarray`, (N, B, S, S)
        Each object alone as observed, without noise, nJy.
    stamp_x0, stamp_y0 : `numpy.ndarray`, (N,)
        Scene coordinates of the stamps' first pixels.
    star : `numpy.ndarray`, (N,)
        Whether an object is a star.
    radius : `numpy.ndarray`, (N,)
        Half-light radius, arcsec; NaN where the file does not say.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    stamp: NDArray[np.float32]
    stamp_x0: NDArray[np.int64]
    stamp_y0: NDArray[np.int64]
    star: NDArray[np.bool_]
    radius: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(eq=False)
class Patch:
    """Images of one patch.

    Parameters
    ----------
    name : `str`
        What entrants name their files of this patch by.
    scene : `lsst.meas.vaedeblend.scene.Scene`
        Images, variances, masks and PSFs; parents are not used.
    truth : `Truth`, optional
        The true objects.
    """

    name: str
    scene: Scene
    truth: Truth | None = None


def load_npz(path: str | os.PathLike[str]) -> dict[str, NDArray]:
    """Read all arrays of an npz file; nothing in it is unpickled.

    Raises
    ------
    ValueError
        Raised if the file is none, or its arrays would take more than `MAX_BYTES`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{os.fspath(path)} is no npz file: {error}.") from error
    if size > MAX_BYTES:
        raise ValueError(f"{os.fspath(path)} holds {size} bytes, more than the {MAX_BYTES} that are read.")
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def read_patches(path: str | os.PathLike[str], pixel_scale: float, truth: bool = True) -> list[Patch]:
    """Read field files.

    Parameters
    ----------
    path : path-like
        An npz file or a directory with ``field_*.npz``: ``bands`` (B,), ``image`` and ``variance``
        (B, H, W) in nJy and nJy^2, ``psf`` (B, h, w), and with truth ``x``, ``y``, ``stamp``, ``stamp_x0``,
        ``stamp_y0``, optionally ``kind`` (``star`` marks stars) and ``hlr``.
    pixel_scale : `float`
        Width of a pixel, arcsec; the files do not say.
    truth : `bool`, optional
        Whether to read the true objects, where there are any.

    Returns
    -------
    patches : `list` [`Patch`]
        One for each file, in the order of their names.

    Raises
    ------
    FileNotFoundError
        Raised when there is no file.
    ValueError
        Raised when a file lacks an array or its arrays do not go together.
    """
    path = Path(path)
    files = sorted(path.glob("field_*.npz")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"No field_*.npz in {path}.")
    return [_read(file, pixel_scale, truth) for file in files]


def _read(path: Path, pixel_scale: float, with_truth: bool) -> Patch:
    data = load_npz(path)
    if lacking := sorted(set(_IMAGES) - set(data)):
        raise ValueError(f"{path} has no {', '.join(lacking)}: this is no field file.")
    try:
        scene = Scene(
            [str(band) for band in data["bands"]],
            data["image"],
            data["variance"],
            psf=PsfGrid.constant(data["psf"]),
            pixel_scale=pixel_scale,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not with_truth or not set(_TRUTH) <= set(data):
        return Patch(path.stem, scene)
    n, shape = len(data["x"]), data["stamp"].shape
    if len(shape) != 4 or shape[:2] != (n, len(scene.bands)) or shape[2] != shape[3]:
        raise ValueError(f"{path}: stamps {shape} for {n} objects in the bands {list(scene.bands)}.")
    for name in _TRUTH:
        if len(data[name]) != n or not np.isfinite(data[name]).all():
            raise ValueError(f"{path}: {name} should hold {n} finite values.")
    truth = Truth(
        np.asarray(data["x"], float),
        np.asarray(data["y"], float),
        np.asarray(data["stamp"], np.float32),
        np.asarray(data["stamp_x0"], np.int64),
        np.asarray(data["stamp_y0"], np.int64),
        np.asarray(data["kind"]) == "star" if "kind" in data else np.zeros(n, bool),
        np.asarray(data["hlr"], float) if "hlr" in data else np.full(n, np.nan),
    )
    return Patch(path.stem, scene, truth)
