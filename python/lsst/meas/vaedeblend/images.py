# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files in, files out: from anybody's images to catalogues, stamps, residuals and pictures."""

from __future__ import annotations

__all__ = ["deblend_images"]

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray

from .adapters.fits_images import Images
from .catalog import models_table, object_table, parent_table
from .deblender import DeblendConfig, DeblendResult, deblend
from .ground.flags import SOURCE_FLAGS
from .ground.psf import FWHM_PER_SIGMA, psf_sigma
from .network import Network, NetworkError, load_network
from .posterior import sample_posterior
from .redistribution import redistribute
from .scene import Scene

_LOG = logging.getLogger("lsst.meas.vaedeblend.images")

_RESULTS = ("objects.fits", "objects.parquet")
_DRAWS = 8
# Parts of the work, for the progress bar: until the scene is there, and until it is deblended.
_SCENE, _DEBLENDED = 0.05, 0.85


def deblend_images(
    images: Images,
    out: str | os.PathLike[str],
    *,
    network: str = "lsst_ugrizy",
    config: DeblendConfig | None = None,
    threads: int = 1,
    stamps: bool = True,
    n_blends: int = 4,
    overwrite: bool = False,
    progress: Callable[[float, str], object] | None = None,
) -> dict[str, Any]:
    """Deblend images and write all that comes of it.

    Parameters
    ----------
    images : `lsst.meas.vaedeblend.adapters.fits_images.Images`
        The images.
    out : path-like
        Directory of the results, made if need be. ``objects`` and ``parents`` are tables in FITS and in
        parquet, ``latents.parquet`` is what the decoder renders models from; ``models.fits`` and
        ``residual.fits`` have one extension per band, ``stamps.fits`` one row per object; ``scene.png`` and
        ``blend_ID.png`` are pictures, ``summary.json`` says what went in.
    network : `str`, optional
        Name or path of the network.
    config : `lsst.meas.vaedeblend.deblender.DeblendConfig`, optional
        Configuration of the procedure. By default a missing band is refused, and new peaks are looked for
        unless some are given.
    threads : `int`, optional
        Threads of onnxruntime; 0 leaves the number to it.
    stamps : `bool`, optional
        Whether ``stamps.fits`` is written, 8 B S^2 bytes per object.
    n_blends : `int`, optional
        Blends that get a picture of their own, those with most objects.
    overwrite : `bool`, optional
        Replace the results of an earlier run.
    progress : callable, optional
        Takes the part of the work that is done, 0 to 1, and what is being done.

    Returns
    -------
    summary : `dict`
        What ``summary.json`` holds.

    Raises
    ------
    FileExistsError
        Raised if there are results already.
    ValueError
        Raised if bands, pixel scale or sky do not suit.
    NetworkError
        Raised if the network cannot be used.
    """
    out = Path(out)
    if not overwrite and (there := [name for name in _RESULTS if (out / name).exists()]):
        raise FileExistsError(f"{out} already holds {', '.join(there)}; --overwrite replaces them.")
    if config is None:
        config = DeblendConfig()
        config.allowMissingBands = False
        config.findNewPeaks = images.peaks is None
    report = progress or (lambda part, what: None)
    report(0.0, "finding sources")
    loaded = load_network(network, threads=threads)
    _check(images, loaded, config)
    scene = images.scene().reordered(loaded.metadata.bands, allow_missing=True)
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    report(_SCENE, f"{len(scene.parents)} parents")
    result = deblend(
        scene, loaded, config, lambda part, what: report(_SCENE + (_DEBLENDED - _SCENE) * part, what)
    )
    seconds = time.perf_counter() - start
    report(_DEBLENDED, "writing tables and images")
    objects = _write_tables(out, images, scene, result, loaded)
    _write_images(out, images, scene, result)
    if stamps:
        report(0.9, f"writing stamps of {len(objects)} objects")
        _write_stamps(out / "stamps.fits", scene, result)
    report(0.95, "drawing")
    pictures = _draw(out, scene, result, n_blends)
    summary = _summarise(images, scene, result, loaded, seconds) | {"pictures": pictures}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report(1.0, "done")
    return summary


def _check(images: Images, network: Network, config: DeblendConfig) -> None:
    """Refuse images that do not go with the network, and say how they might.

    Raises
    ------
    ValueError
        Raised with all that does not suit, one line each.
    """
    mine, problems = network.metadata, []
    named = f"network {mine.name} has {' '.join(mine.bands)}"
    for band in images.bands:
        if band not in mine.bands:
            problems.append(
                f"{images.files[band]}: there is no band {band}, {named}. Name bands as the network does, or "
                "leave the file out."
            )
    missing = [band for band in mine.bands if band not in images.bands]
    if missing and not config.allowMissingBands:
        problems.append(
            f"No image in band {', '.join(missing)}: {named}. Give --image {missing[0]}=FILE, choose another "
            "network (vaedeblend info lists them), or go without: -c allowMissingBands=True."
        )
    if not config.allowOtherPixelScale:
        try:
            network.check(pixel_scale=images.pixel_scale)
        except NetworkError:
            problems.append(
                f"{images.files[images.bands[0]]}: its pixels are {images.pixel_scale:.4g} arcsec wide, "
                f"those of network {mine.name} {mine.pixel_scale:.4g}. Resample the images, choose another "
                "network, or go on with sizes wrong by the ratio: -c allowOtherPixelScale=True."
            )
    if problems:
        raise ValueError("\n".join(problems))
    ranges = mine.training_range.get("noise") or {}
    low, high = mine.training_range.get("psf_fwhm") or (0.0, np.inf)
    widths = FWHM_PER_SIGMA * psf_sigma(images.psf) * images.pixel_scale
    for band, width in zip(images.bands, widths, strict=True):
        if not low <= width <= high:
            _LOG.warning(
                "%s (band %s): the PSF is %.3g arcsec wide (FWHM), network %s was trained on %.3g to %.3g. "
                "Has it the pixels of the images? Objects are flagged outside_training_range.",
                images.files[band],
                band,
                width,
                mine.name,
                low,
                high,
            )
    for band, variance, valid in zip(images.bands, images.variance, images.valid, strict=True):
        noise = float(np.sqrt(np.median(variance[valid])))
        low, high = ranges.get(band, (0.0, np.inf))
        if not low <= noise <= high:
            _LOG.warning(
                "%s (band %s): the noise is %.3g nJy per pixel, network %s was trained on %.3g to %.3g. Is "
                "the zero point right? Objects are flagged outside_training_range.",
                images.files[band],
                band,
                noise,
                mine.name,
                low,
                high,
            )


def _write_tables(out: Path, images: Images, scene: Scene, result: DeblendResult, network: Network) -> Table:
    """Write the catalogues; returns that of the objects."""
    sky = images.coordinates if images.wcs is not None else None
    try:
        posterior = sample_posterior(result.sources, network, scene.psf, _DRAWS)
    except NetworkError as error:
        _LOG.warning("Shapes have no errors: %s", error)
        posterior = None
    objects = object_table(result.sources, result.parents, sky, posterior=posterior)
    for name, table in (("objects", objects), ("parents", parent_table(result.parents, sky))):
        table.meta["NETWORK"] = network.metadata.name
        table.write(out / f"{name}.fits", overwrite=True)
        table.write(out / f"{name}.parquet", overwrite=True)
    models_table(result.sources).write(out / "latents.parquet", overwrite=True)
    return objects


def _write_images(out: Path, images: Images, scene: Scene, result: DeblendResult) -> None:
    """Write models and residual, one extension per band, NaN where there was nothing to compare with."""
    model = np.where(scene.valid, scene.image - result.residual, np.float32(np.nan))
    left = np.where(scene.valid, result.residual, np.float32(np.nan))
    for name, arrays in (("models", model), ("residual", left)):
        hdus = fits.HDUList([fits.PrimaryHDU()])
        for band, array in zip(scene.bands, arrays, strict=True):
            if band in images.bands:
                header = _wcs_header(images)
                header["BUNIT"], header["MAGZERO"] = "nJy", (31.4, "AB magnitude of 1 nJy")
                # FITS knows capital letters only in the names of extensions.
                header["BAND"] = band
                hdus.append(fits.ImageHDU(array, header, name=band))
        hdus.writeto(out / f"{name}.fits", overwrite=True)


def _wcs_header(images: Images) -> fits.Header:
    return fits.Header() if images.wcs is None else images.wcs.to_header(relax=True)


def _write_stamps(path: Path, scene: Scene, result: DeblendResult) -> None:
    """Write the image of every object as shared out, and its model, one row per object."""
    sources = result.sources
    corner_y, corner_x = sources.corners()
    table = Table(
        {
            "id": sources.id,
            "parent": sources.parent,
            "corner_x": corner_x,
            "corner_y": corner_y,
            "deblended": redistribute(scene, sources),
            "model": sources.observed,
        }
    )
    descriptions = {
        "id": "Identifier of the object",
        "parent": "Identifier of its parent",
        "corner_x": "Column, from 0, of the stamp's pixel [0, 0] in the images",
        "corner_y": "Row, from 0, of the stamp's pixel [0, 0] in the images",
        "deblended": "The images shared out as the models are (band, y, x)",
        "model": "The object's model as the images show it (band, y, x)",
    }
    for name, text in descriptions.items():
        table[name].description = text
    table["deblended"].unit = table["model"].unit = u.nJy
    table.meta["BANDS"] = " ".join(sources.bands)
    table.write(path, overwrite=True)


def _draw(out: Path, scene: Scene, result: DeblendResult, n_blends: int) -> list[str]:
    """Draw the scene, and the blends with most objects; returns the pictures' names."""
    try:
        from .plots import plot_blend, plot_scene

        pictures = {"scene.png": plot_scene(scene, result)}
    except ModuleNotFoundError as error:
        _LOG.warning(
            "No pictures: %s is not installed (pip install 'meas_vaedeblend[evaluate]').", error.name
        )
        return []
    number, count = np.unique(result.sources.parent, return_counts=True)
    most = np.argsort(-count, kind="stable")[:n_blends]
    for parent in number[most[count[most] > 1]].tolist():
        pictures[f"blend_{parent}.png"] = plot_blend(scene, result, parent)
    for name, figure in pictures.items():
        figure.savefig(out / name, dpi=110)
    return list(pictures)


def _summarise(
    images: Images, scene: Scene, result: DeblendResult, network: Network, seconds: float
) -> dict[str, Any]:
    """Say what went in and what came out."""

    def plain(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    sources = result.sources
    used = scene.valid & _footprints(scene)
    noise = dict(zip(scene.bands, scene.noise, strict=True))
    return {
        "network": network.metadata.name,
        "network_sha256": network.metadata.weights_sha256,
        "pixel_scale": images.pixel_scale,
        "bands": {
            band: {
                "file": images.files[band],
                "njy_per_unit": images.nanojansky[band],
                "noise_njy": plain(noise[band]),
                "sky_njy": plain(images.sky.get(band, np.nan)),
            }
            for band in images.bands
        },
        "given_peaks": 0 if images.peaks is None else len(images.peaks),
        "n_parents": len(result.parents),
        "n_blends": int((result.parents.n_child > 1).sum()),
        "n_objects": len(sources),
        "reduced_chi2_before": plain(float((scene.image[used] ** 2 / scene.variance[used]).mean())),
        "reduced_chi2": plain(float((result.residual[used] ** 2 / scene.variance[used]).mean())),
        "flags": {name: n for name in SOURCE_FLAGS if (n := int(sources.flags[name].sum()))},
        "seconds": seconds,
    }


def _footprints(scene: Scene) -> NDArray[np.bool_]:
    """Pixels of all parents, (H, W)."""
    out = np.zeros(scene.shape, bool)
    for parent in scene.parents:
        window, inside = parent.window(scene.shape)
        out[window] |= inside
    return out
