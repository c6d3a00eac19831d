# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who takes part: any deblender's objects with their images, whatever file they come in."""

from __future__ import annotations

__all__ = [
    "Entrant",
    "Stamp",
    "from_models",
    "from_scarlet",
    "from_stamps",
    "load_entrants",
    "parse_entrant",
]

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...adapters.scarlet_file import ScarletModels, read, render
from ...scene import Scene
from ...sources import SourceModels
from .patches import Patch, load_npz

if TYPE_CHECKING:
    from astropy.table import Table

_CACHED = 1024
"""Images of an entrant that are kept, once drawn."""

MAX_JSON = 2**24
"""Bytes of a file beside a scarlet file that are read."""


class Stamp(NamedTuple):
    """An object's image as observed, (B, h, w), nJy, and the scene coordinates of its first pixel."""

    pixels: NDArray[np.floating]
    y0: int
    x0: int

    def on(self, y0: int, x0: int, height: int, width: int) -> NDArray[np.floating]:
        """Give the image on the rectangle (B, height, width) that begins at (y0, x0), 0 beyond the stamp."""
        out = np.zeros((len(self.pixels), height, width), self.pixels.dtype)
        dy, dx = self.y0 - y0, self.x0 - x0
        h, w = self.pixels.shape[1:]
        ys, xs = slice(max(dy, 0), min(dy + h, height)), slice(max(dx, 0), min(dx + w, width))
        if ys.start < ys.stop and xs.start < xs.stop:
            out[:, ys, xs] = self.pixels[:, ys.start - dy : ys.stop - dy, xs.start - dx : xs.stop - dx]
        return out


@dataclasses.dataclass(eq=False)
class Entrant:
    """One deblender's objects on one patch.

    Parameters
    ----------
    name : `str`
        Its name in the report.
    bands : `tuple` [`str`]
        Bands of all arrays.
    id : `numpy.ndarray`, (N,)
        Identifiers.
    x, y : `numpy.ndarray`, (N,)
        Positions, scene coordinates.
    draw : callable
        Takes a row, gives its `Stamp`.
    is_model : `numpy.ndarray`, (N,)
        Whether the image is a model, rather than the coadd's own pixels, which leave no residual.
    flux, flux_err : `numpy.ndarray`, (N, B), optional
        Fluxes of its catalogue and their standard deviations, nJy. Without them the flux is the image's sum.
    truth_row : `numpy.ndarray`, (N,), optional
        Rows of the truth that its objects belong to, for one that started from the true centres or was
        matched by others. Without it objects are matched by their positions, and those that match none count.
    seconds, n_bytes : `float`, optional
        Time that deblending took, and bytes that its models take where they are stored; NaN if unknown.
    """

    name: str
    bands: tuple[str, ...]
    id: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    draw: Callable[[int], Stamp]
    is_model: NDArray[np.bool_]
    flux: NDArray[np.float64] | None = None
    flux_err: NDArray[np.float64] | None = None
    truth_row: NDArray[np.int64] | None = None
    seconds: float = np.nan
    n_bytes: float = np.nan

    def __post_init__(self) -> None:
        self.stamp = lru_cache(_CACHED)(self.draw)

    def __len__(self) -> int:
        return len(self.x)

    def total(self, shape: tuple[int, int], positive: bool = False) -> NDArray[np.float32]:
        """Give the sum of all images, or of their positive parts, on a scene of (H, W), (B, H, W), nJy."""
        out = np.zeros((len(self.bands), *shape), np.float32)
        for i in range(len(self)):
            pixels, y0, x0 = self.stamp(i)
            h, w = pixels.shape[1:]
            ys, xs = slice(max(y0, 0), min(y0 + h, shape[0])), slice(max(x0, 0), min(x0 + w, shape[1]))
            if ys.start < ys.stop and xs.start < xs.stop:
                part = pixels[:, ys.start - y0 : ys.stop - y0, xs.start - x0 : xs.stop - x0]
                out[:, ys, xs] += np.maximum(part, 0) if positive else part
        return out

    @cached_property
    def image_flux(self) -> NDArray[np.float64]:
        """Sum of each image, (N, B), nJy."""
        sums = [self.stamp(i).pixels.sum(axis=(1, 2), dtype=float) for i in range(len(self))]
        return np.array(sums).reshape(len(self), len(self.bands))

    @property
    def own_flux(self) -> NDArray[np.float64]:
        """Fluxes of its catalogue, or else of its images, (N, B), nJy."""
        return self.image_flux if self.flux is None else self.flux


def from_stamps(name: str, data: dict[str, NDArray], patch: Patch, where: str) -> Entrant:
    """Make an entrant of stamps: on the true objects' own, or with positions of its own.

    Parameters
    ----------
    name : `str`
        Name of the entrant.
    data : `dict` [`str`, `numpy.ndarray`]
        ``model`` (N, B, S, S) in nJy as observed, NaN for objects that were not found; optionally
        ``seconds``. Without ``x`` and ``y`` rows and stamps are those of the truth. With them (scene
        coordinates) there are ``stamp_x0`` and ``stamp_y0`` too. Optionally ``flux`` and ``flux_err`` (N, B),
        nJy.
    patch : `Patch`
        The patch.
    where : `str`
        What to call the file in error messages.

    Returns
    -------
    entrant : `Entrant`

    Raises
    ------
    ValueError
        Raised if an array is missing or has the wrong shape.
    """
    if "model" not in data:
        raise ValueError(f"{where} has no array 'model': these are no stamps.")
    model, bands, truth = data["model"], patch.scene.bands, patch.truth
    if model.ndim != 4 or model.shape[1] != len(bands) or model.dtype.kind != "f":
        raise ValueError(f"{where}: model should be (N, {len(bands)}, S, S) floats, it is {model.shape}.")
    n = len(model)
    found = np.flatnonzero(np.isfinite(model).all(axis=(1, 2, 3)))
    own = {"x", "y", "stamp_x0", "stamp_y0"} & set(data)
    if own and len(own) < 4:
        raise ValueError(f"{where}: own positions need x, y, stamp_x0 and stamp_y0; there are {sorted(own)}.")
    if own:
        x, y, x0, y0 = (np.asarray(data[key], float) for key in ("x", "y", "stamp_x0", "stamp_y0"))
    elif truth is None:
        raise ValueError(f"{where} has no positions, and there is no truth whose rows it could go by.")
    else:
        x, y, x0, y0 = truth.x, truth.y, truth.stamp_x0.astype(float), truth.stamp_y0.astype(float)
        if model.shape != truth.stamp.shape:
            raise ValueError(f"{where}: model has shape {model.shape}, the truth {truth.stamp.shape}.")
    for key, value in (("x", x), ("y", y), ("stamp_x0", x0), ("stamp_y0", y0)):
        if value.shape != (n,) or not np.isfinite(value).all() or (np.abs(value) > 1e7).any():
            raise ValueError(f"{where}: {key} should hold {n} positions.")
    fluxes: dict[str, NDArray[np.float64]] = {}
    for key in ("flux", "flux_err"):
        if key in data:
            if data[key].shape != model.shape[:2]:
                raise ValueError(f"{where}: {key} should be {model.shape[:2]}, it is {data[key].shape}.")
            fluxes[key] = np.asarray(data[key], float)[found]
    seconds = data.get("seconds", np.array(np.nan))

    def draw(i: int) -> Stamp:
        row = found[i]
        return Stamp(model[row], int(y0[row]), int(x0[row]))

    return Entrant(
        name,
        bands,
        id=found.astype(np.int64),
        x=x[found],
        y=y[found],
        draw=draw,
        is_model=np.ones(len(found), bool),
        truth_row=None if own else found.astype(np.int64),
        seconds=float(seconds) if seconds.shape == () else np.nan,
        flux=fluxes.get("flux"),
        flux_err=fluxes.get("flux_err"),
    )


def from_models(
    name: str,
    sources: SourceModels,
    scene: Scene,
    objects: Table | None = None,
    *,
    seconds: float = np.nan,
    n_bytes: float = np.nan,
) -> Entrant:
    """Make an entrant of this deblender's models and, for their errors, its table of objects.

    Parameters
    ----------
    name : `str`
        Name of the entrant.
    sources : `lsst.meas.vaedeblend.sources.SourceModels`
        The models, in the scene's coordinates.
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene.
    objects : `astropy.table.Table`, optional
        Table ``object_vae_deblend`` of the same objects, rows in the same order.
    seconds, n_bytes : `float`, optional
        See `Entrant`.

    Returns
    -------
    entrant : `Entrant`
        Sources without a finite flux are left out.

    Raises
    ------
    ValueError
        Raised if a band of the scene is lacking, or the table is of other objects.
    """
    if lacking := sorted(set(scene.bands) - set(sources.bands)):
        raise ValueError(f"{name} has no models in the bands {lacking}.")
    order = [sources.bands.index(band) for band in scene.bands]
    flux, flux_err = sources.flux[:, order], sources.flux_err[:, order]
    if objects is not None:
        if not np.array_equal(np.asarray(objects["id"]), sources.id):
            raise ValueError(f"{name}: the tables of objects and of models have other identifiers.")
        flux = np.column_stack([np.asarray(objects[f"{band}_flux"], float) for band in scene.bands])
        flux_err = np.column_stack([np.asarray(objects[f"{band}_fluxErr"], float) for band in scene.bands])
    rows = np.flatnonzero(np.isfinite(sources.flux[:, order]).any(axis=1))

    def draw(i: int) -> Stamp:
        row = int(rows[i])
        pixels = np.nan_to_num(sources.images.observed([row])[0][order])
        return Stamp(pixels, int(sources.corner_y[row]), int(sources.corner_x[row]))

    return Entrant(
        name,
        scene.bands,
        id=sources.id[rows],
        x=sources.x[rows],
        y=sources.y[rows],
        draw=draw,
        is_model=np.ones(len(rows), bool),
        flux=flux[rows],
        flux_err=flux_err[rows] if np.isfinite(flux_err).any() else None,
        seconds=seconds,
        n_bytes=n_bytes,
    )


def from_scarlet(
    name: str,
    models: ScarletModels,
    scene: Scene,
    origin: tuple[int, int],
    *,
    seconds: float = np.nan,
    n_bytes: float = np.nan,
) -> Entrant:
    """Make an entrant of scarlet models.

    Deblended sources are rendered as observed; isolated ones keep the image in their footprint, as in the
    pipelines. Sources without components are left out.

    Parameters
    ----------
    name : `str`
        Name of the entrant.
    models : `lsst.meas.vaedeblend.adapters.scarlet_file.ScarletModels`
        The models, in tract pixels.
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's first pixel.
    seconds, n_bytes : `float`, optional
        See `Entrant`.

    Returns
    -------
    entrant : `Entrant`

    Raises
    ------
    ValueError
        Raised if a band of the scene is lacking.
    """
    if lacking := sorted(set(scene.bands) - set(models.bands)):
        raise ValueError(f"{name} has no models in the bands {lacking}.")
    order = [models.bands.index(band) for band in scene.bands]
    y0, x0 = origin
    sources = [source for source in models.sources().values() if source.components]
    isolated = list(models.isolated.items())
    peaks = [source.components[0].peak for source in sources] + [source.peak for _, source in isolated]
    y, x = np.array(peaks, float).reshape(-1, 2).T

    def draw(i: int) -> Stamp:
        if i < len(sources):
            pixels, (top, left) = render(models, sources[i], observed=True)
            return Stamp(pixels[order], top - y0, left - x0)
        lone = isolated[i - len(sources)][1]
        top, left = lone.origin[0] - y0, lone.origin[1] - x0
        whole = Stamp(scene.image, 0, 0).on(top, left, *lone.footprint.shape)
        return Stamp(whole * lone.footprint, top, left)

    return Entrant(
        name,
        scene.bands,
        id=np.array([s.id for s in sources] + [number for number, _ in isolated], np.int64),
        x=x - x0,
        y=y - y0,
        draw=draw,
        is_model=np.arange(len(peaks)) < len(sources),
        seconds=seconds,
        n_bytes=n_bytes,
    )


def parse_entrant(text: str) -> tuple[str, str]:
    """Take ``NAME=WHAT`` or ``WHAT`` apart, a name being made up of what it is."""
    name, found, what = text.partition("=")
    if found and name and os.sep not in name:
        return name, what
    return Path(text).stem or text, text


def load_entrants(what: str, name: str, patches: Sequence[Patch]) -> list[Entrant]:
    """Load one deblender's objects on all patches.

    Parameters
    ----------
    what : `str`
        ``sep``, to run it; a ``.scarlet`` file or an npz file of stamps, or a directory with one for each
        patch, of its name. Beside a scarlet file, a JSON file of the same name may give the tract pixel of
        the scene's first pixel as ``x0`` and ``y0``, and times as ``seconds_...``; it is the scene's origin
        otherwise.
    name : `str`
        Name of the entrant.
    patches : sequence of `Patch`
        The patches.

    Returns
    -------
    entrants : `list` [`Entrant`]
        One for each patch.

    Raises
    ------
    FileNotFoundError
        Raised when a file is lacking.
    ValueError
        Raised when a file is not sound or of another kind.
    """
    if what == "sep":
        from .sextractor import run_sep

        return [run_sep(patch.scene, name) for patch in patches]
    path = Path(what)
    out = []
    for patch in patches:
        if path.is_dir():
            candidates = [path / f"{patch.name}{suffix}" for suffix in (".npz", ".scarlet")]
            file = next((c for c in candidates if c.is_file()), None)
            if file is None:
                raise FileNotFoundError(f"{path} has no {candidates[0].name} and no {candidates[1].name}.")
        elif len(patches) > 1:
            raise ValueError(f"{path} is not a directory, but there are {len(patches)} patches.")
        else:
            file = path
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}.")
        if file.suffix == ".scarlet":
            out.append(_scarlet_file(name, file, patch))
        elif file.suffix == ".npz":
            out.append(from_stamps(name, load_npz(file), patch, str(file)))
        else:
            raise ValueError(f"{file} is neither .npz nor .scarlet.")
    return out


def _scarlet_file(name: str, file: Path, patch: Patch) -> Entrant:
    notes: dict[str, Any] = {}
    beside = file.with_suffix(".json")
    if beside.is_file():
        if beside.stat().st_size > MAX_JSON:
            raise ValueError(f"{beside} has more than {MAX_JSON} bytes.")
        notes = json.loads(beside.read_text())
        if not isinstance(notes, dict):
            raise ValueError(f"{beside} should hold an object.")
    origin = (notes.get("y0", patch.scene.origin[0]), notes.get("x0", patch.scene.origin[1]))
    times = [value for key, value in notes.items() if key.startswith("seconds_")]
    for value in (*origin, *times):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise ValueError(f"{beside}: {str(value)[:40]!r} is not a number of this kind.")
    return from_scarlet(
        name,
        read(file),
        patch.scene,
        (int(origin[0]), int(origin[1])),
        seconds=float(sum(times)) if times else np.nan,
        n_bytes=float(file.stat().st_size),
    )
