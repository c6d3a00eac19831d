# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a file of scarlet models holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...scene import PsfGrid

__all__ = [
    "CubeComponent",
    "FactorizedComponent",
    "IsolatedSource",
    "ScarletBlend",
    "ScarletFileError",
    "ScarletModels",
    "ScarletParent",
    "ScarletSource",
    "bounding_box",
]


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
        return bounding_box((c.origin, c.shape) for c in self.components)


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


def bounding_box(boxes: Iterable[tuple[tuple[int, int], tuple[int, int]]]) -> tuple[int, int, int, int]:
    """The box (y0, x0, y1, x1) around boxes that are given as (origin, shape)."""
    corners = [(y, x, y + h, x + w) for (y, x), (h, w) in boxes]
    if not corners:
        return 0, 0, 0, 0
    y0, x0, y1, x1 = zip(*corners, strict=True)
    return min(y0), min(x0), max(y1), max(x1)
