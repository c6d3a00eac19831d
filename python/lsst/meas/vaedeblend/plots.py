# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pictures of a deblended scene, and of one blend taken apart. Nothing here opens a window."""

from __future__ import annotations

__all__ = ["plot_blend", "plot_scene"]

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .deblender import DeblendResult
from .evaluation.figures import (
    colour,
    colour_key,
    new_figure,
    residual_map,
    rgb_bands,
    scale_bar,
    show_colour,
    show_sigma,
)
from .ground.bands import reference_band
from .redistribution import redistribute
from .scene import Scene
from .sources import SourceModels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_IDS = 200
"""Objects beyond which their identifiers would hide the picture."""

_GREY = 90
"""Shade of pixels that were not used."""

_MARGIN = 8
"""Pixels around a parent's footprint."""


def plot_scene(scene: Scene, result: DeblendResult) -> Figure:
    """Draw a scene: coadds with the objects on them, models, and what is left.

    Parameters
    ----------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene.
    result : `lsst.meas.vaedeblend.deblender.DeblendResult`
        What `lsst.meas.vaedeblend.deblender.deblend` made of it.

    Returns
    -------
    figure : `matplotlib.figure.Figure`
        Save it with ``figure.savefig``.
    """
    view = _View(scene, result, (0, 0), scene.shape)
    height, width = scene.shape
    figure = new_figure(21.0, 0.9 + 6.2 * min(max(height / width, 0.3), 2.0))
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    _draw_row(figure, axes, view, np.arange(len(result.sources)))
    for a in axes:
        a.set_xlabel("x [pixel]")
    axes[0].set_ylabel("y [pixel]")
    return figure


def plot_blend(scene: Scene, result: DeblendResult, parent_id: int, n_objects: int = 8) -> Figure:
    """Draw one blend: coadds with its objects, models, what is left, and its brightest objects deblended.

    Parameters
    ----------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene.
    result : `lsst.meas.vaedeblend.deblender.DeblendResult`
        What `lsst.meas.vaedeblend.deblender.deblend` made of it.
    parent_id : `int`
        Identifier of the parent.
    n_objects : `int`, optional
        Objects that are shown alone.

    Returns
    -------
    figure : `matplotlib.figure.Figure`
        Save it with ``figure.savefig``.

    Raises
    ------
    ValueError
        Raised if the scene has no such parent, or it has no objects.
    """
    parent = next((p for p in scene.parents if p.id == parent_id), None)
    if parent is None:
        raise ValueError(f"The scene has no parent {parent_id}.")
    rows = np.flatnonzero(result.sources.parent == parent_id)
    if not len(rows):
        raise ValueError(f"Parent {parent_id} has no objects.")
    (ys, xs), _ = parent.window(scene.shape)
    y1, x1 = max(ys.start - _MARGIN, 0), max(xs.start - _MARGIN, 0)
    y2, x2 = min(ys.stop + _MARGIN, scene.shape[0]), min(xs.stop + _MARGIN, scene.shape[1])
    view = _View(scene, result, (y1, x1), (y2 - y1, x2 - x1))
    flux = np.nan_to_num(result.sources.flux[rows, result.sources.bands.index(view.band)])
    bright = rows[np.argsort(-flux, kind="stable")][:n_objects]
    columns = min(max(len(bright), 1), 4)
    lines = -(-len(bright) // columns)
    aspect = min(max((y2 - y1) / (x2 - x1), 0.4), 1.6)
    figure = new_figure(15.0, 0.9 + 4.6 * aspect + lines * (0.4 + 14.0 / columns * aspect))
    parts: Any = figure.subfigures(
        2, 1, height_ratios=(0.9 + 4.6 * aspect, lines * (0.4 + 14.0 / columns * aspect))
    )
    top = parts[0].subplots(1, 3, sharex=True, sharey=True)
    _draw_row(parts[0], top, view, rows)
    top[0].set_title(f"parent {parent_id}, {len(rows)} objects, {view.legend}", fontsize="medium")
    panels = parts[1].subplots(lines, columns, squeeze=False).ravel()
    images = view.deblended(bright)
    for a, row, image in zip(panels, bright, images, strict=False):
        show_colour(a, view.colours(image), _label(result.sources, row, view.band), view.origin)
        a.plot(result.sources.x[row], result.sources.y[row], "+", color="white", markersize=8)
    for a in panels[len(bright) :]:
        a.set_visible(False)
    return figure


class _View:
    """A window of a scene in the bands that have pixels there."""

    def __init__(
        self, scene: Scene, result: DeblendResult, origin: tuple[int, int], shape: tuple[int, int]
    ) -> None:
        self.models = result.sources
        self.scene = scene.reordered(self.models.bands, allow_missing=True)
        self.origin, self.shape = origin, shape
        self.window = tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))
        used = np.flatnonzero(self.scene.valid.any(axis=(1, 2)))
        self.used, self.bands = used, [self.models.bands[b] for b in used]
        self.band = reference_band(self.bands)
        self.noise = self.scene.noise[used]
        self.image = self.scene.image[used][:, *self.window]
        self.residual = result.residual[used][:, *self.window]
        # Shown where there is data: elsewhere no model has been compared with anything.
        self.model = np.where(self.scene.valid[used][:, *self.window], self.image - self.residual, 0.0)
        variance, valid = self.scene.variance[used][:, *self.window], self.scene.valid[used][:, *self.window]
        self.sigma = residual_map(self.residual, variance, valid)
        self.legend = colour_key(self.bands)
        self.seen = valid[[b for b, _ in rgb_bands(self.bands)]].all(axis=0)

    def colours(self, image: NDArray) -> NDArray[np.uint8]:
        """Colour composite of an image in the bands in use, grey where it lacks one of the colours."""
        rgb = colour(image, self.bands, self.noise)
        rgb[~self.seen] = _GREY
        return rgb

    def deblended(self, rows: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """The images of objects as they were shared out, on the window."""
        corner = np.column_stack(self.models.corners(rows)) - self.origin
        shares = redistribute(self.scene, self.models, rows=rows)
        out, size = [], shares.shape[-1]
        for (dy, dx), share in zip(corner, shares[:, self.used], strict=True):
            whole = np.zeros(self.image.shape, np.float32)
            y1, y2 = max(dy, 0), min(dy + size, self.shape[0])
            x1, x2 = max(dx, 0), min(dx + size, self.shape[1])
            whole[:, y1:y2, x1:x2] = share[:, y1 - dy : y2 - dy, x1 - dx : x2 - dx]
            out.append(whole)
        return out


def _draw_row(figure: Any, axes: Any, view: _View, rows: NDArray[np.int64]) -> None:
    """Draw image with objects, models and residual."""
    sources = view.models
    show_colour(axes[0], view.colours(view.image), f"{len(rows)} objects, {view.legend}", view.origin)
    show_colour(axes[1], view.colours(view.model), "models", view.origin)
    title = "image minus models, all bands, standard deviations"
    shown = show_sigma(axes[2], view.sigma, title, view.origin)
    axes[2].set_facecolor("0.85")
    figure.colorbar(shown, ax=axes[2], location="right", shrink=0.8, aspect=40)
    x, y = sources.x[rows], sources.y[rows]
    for a, tint in ((axes[0], "white"), (axes[2], "black")):
        a.plot(x, y, "+", color=tint, markersize=6, markeredgewidth=0.8, linestyle="none")
    if len(rows) <= _MOST_IDS:
        from matplotlib.patheffects import withStroke

        # Legible on bright galaxies too.
        outline = [withStroke(linewidth=1.0, foreground="black")]
        for row in rows:
            axes[0].annotate(
                str(sources.id[row]),
                (sources.x[row], sources.y[row]),
                xytext=(3, 3),
                textcoords="offset points",
                color="yellow",
                fontsize=7.5 if len(rows) < 60 else 6,
                clip_on=True,
                path_effects=outline,
            )
    width = view.shape[1] * view.scene.pixel_scale
    # A round number of arcsec, a fifth of the width at most.
    lengths = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
    length = max((arcsec for arcsec in lengths if arcsec <= width / 5.0), default=width / 5.0)
    scale_bar(axes[0], length, view.scene.pixel_scale)


def _label(sources: SourceModels, row: int, band: str) -> str:
    """Identifier and AB magnitude of an object."""
    flux = sources.flux[row, sources.bands.index(band)]
    # 31.4 is the AB magnitude of 1 nJy.
    magnitude = f"{31.4 - 2.5 * np.log10(flux):.2f}" if flux > 0 else "not detected"
    return f"object {sources.id[row]}, {band} {magnitude}"
