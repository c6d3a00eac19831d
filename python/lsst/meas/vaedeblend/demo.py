# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The demonstration: a simulated patch through `pipetask run`, and what came out of it."""

from __future__ import annotations

__all__ = ["format_table", "run_demo"]

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import astropy.units as u
import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from .adapters.butler_repo import CoaddRepository, PatchLayout, run_pipetask
from .adapters.cell_coadd import scene_from_cell_coadds
from .evaluation.figures import (
    colour,
    colour_key,
    new_figure,
    residual_map,
    scale_bar,
    show_colour,
    show_sigma,
)
from .evaluation.metrics import MATCH_RADIUS, SNR_LIMIT, match, run_seconds
from .ground.bands import reference_band
from .ground.cutouts import cut_out
from .ground.detection import detect
from .ground.psf import psf_sigma
from .ground.statistics import nmad
from .network import load_network
from .rendering import render
from .scene import Scene
from .simulation.patch import SimulatedPatch, simulate_patch
from .simulation.surveys import get_survey_info, survey_of
from .sources import SourceModels

if TYPE_CHECKING:
    from astropy.table import Row
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_LOG = logging.getLogger("lsst.meas.vaedeblend.demo")

_OUTPUT = "vaedeblend/demo"
_LABEL = "vaeDeblend"
_PATCH = 0

_BLENDS, _MOST_MEMBERS = 4, 8
"""Blends that are drawn in rows of their own, and members that such a row has room for."""


def run_demo(
    out_dir: str | os.PathLike[str],
    *,
    network: str = "lsst_ugrizy",
    survey: str | None = None,
    seed: int = 1,
    n_galaxies: int = 150,
    cells: tuple[int, int] = (4, 4),
    cell_size: int = 150,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Simulate a patch, deblend it with `pipetask run`, and compare with the truth.

    Writes ``repo`` (a Butler repository), ``pipetask.log``, ``demo.json`` and ``demo.png`` to ``out_dir``.

    Parameters
    ----------
    out_dir : path-like
        Directory, made if need be.
    network : `str`, optional
        Name or path of the network; the patch is simulated in its bands.
    survey : `str`, optional
        Survey to simulate, by default the one whose bands and pixels the network has.
    seed : `int`, optional
        Seed of the simulation.
    n_galaxies : `int`, optional
        Number of galaxies.
    cells : `tuple` [`int`], optional
        Number of cells along y and x.
    cell_size : `int`, optional
        Width of a cell, pixel.
    overwrite : `bool`, optional
        Replace the repository of an earlier demonstration.

    Returns
    -------
    summary : `dict`
        The numbers that `format_table` prints.

    Raises
    ------
    FileExistsError
        Raised when there is a repository already and ``overwrite`` is not set.
    lsst.meas.vaedeblend.network.NetworkError
        Raised when the network cannot be used, has no decoder, or has other pixels than the survey.
    ValueError
        Raised when no survey has the network's bands and pixels, or there is nothing to simulate.
    lsst.meas.vaedeblend.adapters.butler_repo.PipetaskError
        Raised when pipetask fails.
    """
    out_dir = Path(out_dir)
    loaded = load_network(network, threads=1)
    _ = loaded.decoder  # the models are drawn in the end
    bands = loaded.metadata.bands
    survey = survey_of(bands, loaded.metadata.pixel_scale) if survey is None else survey
    loaded.check(pixel_scale=get_survey_info(survey, bands).pixel_scale)
    root = out_dir / "repo"
    if (root / "butler.yaml").exists():
        if not overwrite:
            raise FileExistsError(f"{root} already holds a Butler repository; --overwrite replaces it.")
        shutil.rmtree(root)

    start = time.perf_counter()
    patch = simulate_patch(
        seed, survey=survey, bands=bands, n_galaxies=n_galaxies, cells=cells, cell_size=cell_size
    )
    _LOG.info("Simulated %d galaxies of %s in %.1f s.", n_galaxies, survey, time.perf_counter() - start)
    out_dir.mkdir(parents=True, exist_ok=True)
    valid = np.ones(patch.image.shape, bool)
    # One filter serves the whole patch: a matched filter is not sensitive to a few percent of its width.
    width = np.median(psf_sigma(patch.psf).reshape(len(bands), -1), axis=1)
    detected = detect(patch.image, patch.variance, valid, width).detected

    layout = PatchLayout(2000, 3000, cells, patch.cell_shape)
    repository = CoaddRepository(root, bands, {_PATCH: layout}, patch.pixel_scale)
    repository.put_coadds(_PATCH, patch.image, patch.variance, patch.psf, {"DETECTED": detected})
    start = time.perf_counter()
    config = {"network": network, "doWriteResidual": True}
    run_pipetask(root, _OUTPUT, config=config, log=out_dir / "pipetask.log")
    _LOG.info("pipetask run took %.1f s.", time.perf_counter() - start)

    objects = repository.get("object_vae_deblend", _PATCH, _OUTPUT)
    parents = repository.get("object_vae_parent", _PATCH, _OUTPUT)
    metadata = repository.get(f"{_LABEL}_metadata", _PATCH, _OUTPUT)[_LABEL]
    summary, truth = _compare(patch, objects, layout)
    n_objects = len(objects)
    summary = {
        "network": loaded.metadata.name,
        "network_sha256": loaded.metadata.weights_sha256,
        "seed": seed,
        "n_parents": len(parents),
        "n_blends": int(np.sum(np.asarray(parents["deblend_nChild"]) > 1)),
        "n_objects": n_objects,
        **summary,
        "seconds_per_object": run_seconds(metadata) / n_objects if n_objects else None,
    }
    (out_dir / "demo.json").write_text(json.dumps(summary, indent=1) + "\n")

    coadds = {b: repository.get("deep_coadd", _PATCH, repository.inputs, band=b) for b in bands}
    scene = scene_from_cell_coadds(coadds, bands)
    residual = np.stack(
        [repository.get("deep_coadd_vae_residual", _PATCH, _OUTPUT, band=b).image.array for b in bands]
    )
    table = repository.get("object_vae_models", _PATCH, _OUTPUT)
    models = SourceModels.from_table(table, loaded, scene.psf, scene.origin)
    _draw(out_dir / "demo.png", scene, models, residual, parents, truth)
    return summary


def _compare(patch: SimulatedPatch, objects: Table, layout: PatchLayout) -> tuple[dict[str, Any], _Marks]:
    """Match objects with the truth: the summary's numbers, and what there is to mark in a picture."""
    band = reference_band(patch.bands)
    b = patch.bands.index(band)
    xy = np.column_stack([objects["x"] - layout.x0, objects["y"] - layout.y0])
    index, truth = match(xy, np.column_stack([patch.x, patch.y]), MATCH_RADIUS)
    found, matched = np.zeros(len(patch.x), bool), np.zeros(len(objects), bool)
    found[truth] = matched[index] = True
    bright = patch.snr[:, b] > SNR_LIMIT
    use = bright[truth]
    error = np.asarray(objects[f"{band}_flux"], float)[index[use]] / patch.flux[truth[use], b] - 1
    error = error[np.isfinite(error)]
    return {
        "band": band,
        "n_true": len(patch.x),
        "n_true_bright": int(bright.sum()),
        "n_found": int((found & bright).sum()),
        "n_missed": int((~found & bright).sum()),
        "n_found_any": int(found.sum()),
        "n_unmatched": len(objects) - len(index),
        "flux_error_median_abs": float(np.median(np.abs(error))) if len(error) else None,
        "flux_error_nmad": nmad(error) if len(error) else None,
    }, _Marks(
        objects=xy + [layout.x0, layout.y0],
        matched=matched,
        galaxies=np.column_stack([patch.x + layout.x0, patch.y + layout.y0])[bright],
        found=found[bright],
    )


def format_table(summary: dict[str, Any]) -> str:
    """Lay the numbers of a demonstration out as a table.

    Parameters
    ----------
    summary : `dict`
        What `run_demo` returned.
    """

    def percent(value: float | None) -> str:
        return "none" if value is None else f"{100 * value:.1f} %"

    s = summary
    seconds = s["seconds_per_object"]
    rows = [
        ("network", s["network"]),
        ("parents", f"{s['n_parents']}, {s['n_blends']} of them blends"),
        ("objects", f"{s['n_objects']}"),
        (f"true galaxies with S/N > {SNR_LIMIT:g} in {s['band']}", f"{s['n_true_bright']} of {s['n_true']}"),
        (f"  found within {MATCH_RADIUS:g} pixels", f"{s['n_found']}"),
        ("  missed", f"{s['n_missed']}"),
        ("objects that match no true galaxy", f"{s['n_unmatched']}"),
        (f"flux error in {s['band']}, median of absolute", percent(s["flux_error_median_abs"])),
        (f"flux error in {s['band']}, NMAD", percent(s["flux_error_nmad"])),
        ("seconds per object", "none" if seconds is None else f"{seconds:.3f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _draw(
    path: Path,
    scene: Scene,
    models: SourceModels,
    residual: NDArray,
    parents: Table,
    truth: _Marks,
) -> None:
    """Draw the patch as a whole, and some of its blends taken apart."""
    # Blends whose members all fit into a row, those with most of them first, and none that is larger than a
    # panel.
    extent = np.maximum(parents["bbox_width"], parents["bbox_height"])
    n_child = np.asarray(parents["deblend_nChild"])
    members = np.where((extent <= models.images.size) & (n_child <= _MOST_MEMBERS), n_child, 0)
    rows = [i for i in np.argsort(-members, kind="stable")[:_BLENDS] if members[i] > 1]
    top_height, row_height = 7.5, 2.6
    figure = new_figure(22.0, top_height + row_height * len(rows))
    heights = (top_height, row_height * len(rows)) if rows else (top_height,)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    top = parts[0, 0]
    noise, origin = scene.noise, scene.origin
    sigma = residual_map(residual, scene.variance, scene.valid)
    total = render(models, scene.shape)

    axes = top.subplots(1, 4)
    image_rgb = colour(scene.image, scene.bands, noise)
    show_colour(axes[0], image_rgb, "coadds", origin)
    show_colour(axes[1], colour(total, scene.bands, noise), "models", origin)
    shown = show_sigma(axes[2], sigma, "coadds minus models, all bands, in standard deviations", origin)
    top.colorbar(shown, cax=axes[2].inset_axes((0.1, -0.17, 0.8, 0.025)), orientation="horizontal")
    # Markers are easier to see on a faded picture.
    show_colour(axes[3], (0.6 * image_rgb).astype(np.uint8), "objects and true galaxies", origin)
    truth.plot(axes[3])
    # Below the picture, where it hides nothing.
    axes[3].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize="small")
    for a in axes:
        a.set_xlabel("x [pixel]")
        scale_bar(a, 10.0, scene.pixel_scale, "black" if a is axes[2] else "white")
    axes[0].set_ylabel("y [pixel]")
    top.suptitle(f"Colours are asinh-stretched f_nu: {colour_key(scene.bands)}")
    if rows:
        _draw_blends(parts[1, 0], [parents[i] for i in rows], scene, models, total, sigma, truth)
    figure.savefig(path, dpi=110)


@dataclasses.dataclass
class _Marks:
    """Where objects and true galaxies are, tract pixels (x, y), and which of them go together."""

    objects: NDArray[np.float64]
    matched: NDArray[np.bool_]
    galaxies: NDArray[np.float64]
    found: NDArray[np.bool_]
    """Only galaxies above the limit of `SNR_LIMIT`."""

    def plot(self, axes: Axes, size: float = 6.0) -> None:
        """Mark all of them."""
        bright = f"true galaxies with S/N > {SNR_LIMIT:g}"
        for xy, marker, colour_, width, what in (
            (self.galaxies[self.found], "o", "lime", 1.5, f"{bright}, found"),
            (self.galaxies[~self.found], "o", "red", 1.5, f"{bright}, missed"),
            (self.objects[self.matched], "+", "cyan", 1.0, "objects that match a true galaxy"),
            (self.objects[~self.matched], "x", "magenta", 1.0, "objects that match none"),
        ):
            (line,) = axes.plot(*xy.T, marker, color=colour_, label=f"{len(xy)} {what}")
            line.set(markerfacecolor="none", markersize=size * width)


def _draw_blends(
    figure: SubFigure,
    blends: Sequence[Row],
    scene: Scene,
    models: SourceModels,
    total: NDArray,
    sigma: NDArray,
    truth: _Marks,
) -> None:
    """Draw one row per blend: image, models, residual, and each member alone, brightest first."""
    noise, (oy, ox) = scene.noise, scene.origin
    size = models.images.size
    most = max(int(parent["deblend_nChild"]) for parent in blends)
    axes = figure.subplots(len(blends), 3 + most, squeeze=False)
    band = reference_band(scene.bands)
    b = scene.bands.index(band)
    for row, parent in zip(axes, blends, strict=True):
        corner_y = [round(float(parent["y"])) - size // 2 - oy]
        corner_x = [round(float(parent["x"])) - size // 2 - ox]
        origin = (corner_y[0] + oy, corner_x[0] + ox)
        members = np.flatnonzero(models.parent == parent["id"])
        for a in row:
            a.set_xticks([])
            a.set_yticks([])
        image = cut_out(scene.image, corner_y, corner_x, size)[0]
        title = f"parent {parent['id']}: coadds"
        show_colour(row[0], colour(image, scene.bands, noise), title, origin)
        truth.plot(row[0])
        scale_bar(row[0], 2.0, scene.pixel_scale)
        model = cut_out(total, corner_y, corner_x, size)[0]
        show_colour(row[1], colour(model, scene.bands, noise), f"{len(members)} models", origin)
        left = cut_out(sigma[None], corner_y, corner_x, size)[0, 0]
        show_sigma(row[2], left, "residual", origin)
        brightest = members[np.argsort(-np.nan_to_num(models.flux[members, b]), kind="stable")]
        for a, i in zip(row[3:], brightest, strict=False):
            alone = np.zeros_like(total)
            # Onto the same square as the blend, so that it is seen where it lies.
            y0, x0 = int(models.corner_y[i]), int(models.corner_x[i])
            own = models.images.observed([i])[0]
            ys, xs = slice(max(y0, 0), y0 + own.shape[1]), slice(max(x0, 0), x0 + own.shape[2])
            part = own[:, ys.start - y0 :, xs.start - x0 :]
            target = alone[:, ys, xs]
            target += part[:, : target.shape[1], : target.shape[2]]
            alone = cut_out(alone, corner_y, corner_x, size)[0]
            title = f"object {models.id[i]}\n{_magnitude(models.flux[i, b], band)}"
            show_colour(a, colour(alone, scene.bands, noise), title, origin)
        for a in row[3 + len(members) :]:
            a.set_visible(False)


def _magnitude(flux: float, band: str) -> str:
    """A flux in nJy as an AB magnitude in words; fluxes need not be positive."""
    return f"{band} = {(flux * u.nJy).to_value(u.ABmag):.2f}" if flux > 0 else f"{flux:.0f} nJy in {band}"
