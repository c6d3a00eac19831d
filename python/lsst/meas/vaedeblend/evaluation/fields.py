# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Deblend simulated fields with known truth, and write each object's image for scoring."""

from __future__ import annotations

__all__ = ["FieldFile", "evaluate_fields"]

import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.footprints import parents_from_peaks
from ..deblender import DeblendConfig, deblend
from ..ground.bands import reference_band
from ..ground.detection import detect as detect_sources
from ..ground.psf import FWHM_PER_SIGMA, psf_sigma
from ..ground.statistics import stamp_snr
from ..network import Network, load_network
from ..scene import PsfGrid, Scene, find_parents
from ..sources import SourceModels
from .coverage import flux_inside, shape_inside
from .metrics import MATCH_RADIUS, SNR_LIMIT, match

_LOG = logging.getLogger("lsst.meas.vaedeblend.evaluation.fields")


@dataclasses.dataclass
class FieldFile:
    """One simulated field.

    Attributes
    ----------
    bands : `tuple` [`str`]
        Bands.
    image, variance : `numpy.ndarray`, (B, H, W)
        nJy and nJy^2.
    psf : `numpy.ndarray`, (B, h, w)
        PSF images.
    x, y : `numpy.ndarray`, (N,)
        True centres, pixel.
    stamp : `numpy.ndarray`, (N, B, S, S)
        The noiseless isolated objects as observed, nJy.
    stamp_x0, stamp_y0 : `numpy.ndarray`, (N,)
        Their corners in the field, pixel.
    """

    bands: tuple[str, ...]
    image: NDArray
    variance: NDArray
    psf: NDArray
    x: NDArray
    y: NDArray
    stamp: NDArray
    stamp_x0: NDArray
    stamp_y0: NDArray

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> FieldFile:
        """Read an npz file; nothing in it is unpickled.

        Raises
        ------
        ValueError
            Raised when the file lacks an array.
        """
        with np.load(path, allow_pickle=False) as data:
            names = [field.name for field in dataclasses.fields(cls)]
            if lacking := sorted(set(names) - set(data.files)):
                raise ValueError(f"{path} has no {', '.join(lacking)}: this is no field file.")
            values = {name: data[name] for name in names}
        values["bands"] = tuple(str(band) for band in values["bands"])
        return cls(**values)

    def scene(self, pixel_scale: float, detect: bool) -> Scene:
        """Make a scene: one parent per connected region of our own detection.

        Parameters
        ----------
        pixel_scale : `float`
            Width of a pixel, arcsec; the file does not say.
        detect : `bool`
            Leave the peaks to the deblender, instead of giving it the true centres.

        Returns
        -------
        scene : `lsst.meas.vaedeblend.scene.Scene`
            With given centres every centre is a peak of some parent, whether it is detected or not.
        """
        valid = np.isfinite(self.image) & (self.variance > 0)
        found = detect_sources(self.image, self.variance, valid, psf_sigma(self.psf))
        detected = found.detected.any(axis=0)
        if detect:
            parents = find_parents(detected)
        else:
            parents = parents_from_peaks(detected, np.column_stack([self.x, self.y]))
        return Scene(
            self.bands,
            self.image,
            self.variance,
            valid,
            psf=PsfGrid.constant(self.psf),
            pixel_scale=pixel_scale,
            parents=parents,
        )


def evaluate_fields(
    fields_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    network: str = "lsst_ugrizy",
    detect: bool = False,
    threads: int = 1,
    config: DeblendConfig | None = None,
) -> dict[str, Any]:
    """Deblend all ``field_*.npz`` of a directory.

    Writes one npz per field, ``model`` (N, B, S, S) float32 in nJy, observed frame, on the truth's stamps
    with NaN for objects that were not found, ``flux`` and ``flux_err`` (N, B), the fluxes of the catalogue
    and their standard deviations, nJy, and ``seconds``, the wall time of the deblending; and
    ``summary.json``.

    Parameters
    ----------
    fields_dir, out_dir : path-like
        Directories; the second is made.
    network : `str`, optional
        Name or path of the network.
    detect : `bool`, optional
        Let the deblender find the peaks, and match them with the true centres within `MATCH_RADIUS`.
    threads : `int`, optional
        Threads of onnxruntime.
    config : `lsst.meas.vaedeblend.deblender.DeblendConfig`, optional
        Configuration of the procedure.

    Returns
    -------
    summary : `dict`
        What ``summary.json`` holds: numbers of true objects, of deblended objects and of matches, recall of
        the objects with S/N above `SNR_LIMIT` in the reference band, and seconds per deblended object; how
        often the true flux and ellipticity of such objects lie inside of the 68 percent interval of the
        posterior, in the reference band. In detection mode also purity (the part of the deblended objects
        that match a true one of any brightness), recall of the objects with twice that S/N that are farther
        than the FWHM of the PSF from any brighter one, and the part of the objects above the limit missing
        among the first peaks that later iterations found.

    Raises
    ------
    FileNotFoundError
        Raised when there is no field.
    lsst.meas.vaedeblend.network.NetworkError
        Raised when the network cannot be used or has other bands than the fields.
    """
    files = sorted(Path(fields_dir).glob("field_*.npz"))
    if not files:
        raise FileNotFoundError(f"No field_*.npz in {os.fspath(fields_dir)}.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    loaded = load_network(network, threads=threads)

    fields = []
    for path in files:
        field = FieldFile.read(path)
        loaded.check(bands=field.bands)
        arrays, row = _evaluate_field(field, loaded, detect, config)
        arrays["seconds"] = np.array(row["seconds"])
        # Written out by name, as savez has arguments of its own.
        np.savez_compressed(out_dir / path.name, **arrays)  # type: ignore[arg-type]
        fields.append({"field": path.name, **row})
        _LOG.info(
            "%s: %d of %d found, %d deblended, %.2f s.",
            path.name,
            row["n_matched"],
            row["n_true"],
            row["n_objects"],
            row["seconds"],
        )

    total = {k: sum(f[k] for f in fields) for k in fields[0] if k != "field"}

    def ratio(part: str, whole: str) -> float | None:
        return total[part] / total[whole] if total[whole] else None

    summary: dict[str, Any] = {
        "network": loaded.metadata.name,
        "network_sha256": loaded.metadata.weights_sha256,
        "mode": "detect" if detect else "given centres",
        "n_fields": len(fields),
        **total,
        "recall": ratio("n_matched_bright", "n_true_bright"),
        "flux_coverage": ratio("n_flux_inside", "n_flux_intervals"),
        "shape_coverage": ratio("n_shape_inside", "n_shape_intervals"),
        "seconds_per_object": ratio("seconds", "n_objects"),
    }
    if detect:
        summary["purity"] = ratio("n_matched", "n_objects")
        summary["recall_separate"] = ratio("n_matched_separate", "n_true_separate")
        summary["recovered_neighbours"] = ratio("n_recovered", "n_missed_first")
    summary["fields"] = fields
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _evaluate_field(
    field: FieldFile, network: Network, detect: bool, config: DeblendConfig | None
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Deblend one field: images on the truth's stamps and fluxes, and what the summary counts."""
    scene = field.scene(network.metadata.pixel_scale, detect)
    start = time.perf_counter()
    sources = deblend(scene, network, config).sources
    seconds = time.perf_counter() - start

    truth_xy = np.column_stack([field.x, field.y])
    failed = sources.flags["peak_outside"] | sources.flags["masked"]
    usable = np.flatnonzero(~failed)
    if detect:
        position, radius = np.column_stack([sources.x, sources.y]), MATCH_RADIUS
    else:
        # Given peaks come back as they were given; objects added by the deblender match none.
        position, radius = np.column_stack([sources.peak_x, sources.peak_y]), 1e-6
    index, truth_index = match(position[usable], truth_xy, radius)
    index = usable[index]

    model = np.full(field.stamp.shape, np.nan, np.float32)
    flux, flux_err = np.full((2, *field.stamp.shape[:2]), np.nan)
    flux[truth_index], flux_err[truth_index] = sources.flux[index], sources.flux_err[index]
    for i, t in zip(index, truth_index, strict=True):
        model[t] = _on_stamp(sources, i, field.stamp_y0[t], field.stamp_x0[t], field.stamp.shape[-1])

    band = field.bands.index(reference_band(field.bands))
    size = field.stamp.shape[-1]
    variance = np.stack(
        [
            field.variance[band, y0 : y0 + size, x0 : x0 + size]
            for y0, x0 in zip(field.stamp_y0, field.stamp_x0, strict=True)
        ]
    )
    snr = stamp_snr(field.stamp[:, band], variance)
    bright = snr > SNR_LIMIT
    row = {
        "n_true": len(field.x),
        "n_true_bright": int(bright.sum()),
        "n_objects": len(sources),
        "n_matched": len(index),
        "n_matched_bright": int(bright[truth_index].sum()),
        "seconds": seconds,
    }
    use = bright[truth_index]
    fluxes = flux_inside(sources, index[use], field.stamp[truth_index[use]].sum(axis=(2, 3)))[:, band]
    shapes = shape_inside(sources, index[use], field.stamp[truth_index[use], band], scene, network, band)
    row |= {
        "n_flux_inside": int(fluxes.sum()),
        "n_flux_intervals": fluxes.size,
        "n_shape_inside": int(shapes.sum()),
        "n_shape_intervals": shapes.size,
    }
    if detect:
        found = np.zeros(len(field.x), bool)
        found[truth_index] = True
        first = usable[sources.iteration[usable] == 0]
        missed = bright.copy()
        missed[match(position[first], truth_xy, radius)[1]] = False
        fwhm = FWHM_PER_SIGMA * float(psf_sigma(field.psf[band]))
        distance = np.hypot(field.x[:, None] - field.x, field.y[:, None] - field.y)
        beside_brighter = ((distance < fwhm) & (snr > snr[:, None])).any(axis=1)
        separate = (snr > 2 * SNR_LIMIT) & ~beside_brighter
        row |= {
            "n_missed_first": int(missed.sum()),
            "n_recovered": int((missed & found).sum()),
            "n_true_separate": int(separate.sum()),
            "n_matched_separate": int((separate & found).sum()),
        }
    return {"model": model, "flux": flux, "flux_err": flux_err}, row


def _on_stamp(sources: SourceModels, i: int, y0: int, x0: int, size: int) -> NDArray[np.float32]:
    """Put the observed model of source i on a square whose first pixel is (y0, x0)."""
    stamp = np.zeros((len(sources.bands), size, size), np.float32)
    dy, dx = int(sources.corner_y[i]) - int(y0), int(sources.corner_x[i]) - int(x0)
    model = sources.images.observed([i])[0]
    height, width = model.shape[1:]
    ys, xs = slice(max(dy, 0), min(dy + height, size)), slice(max(dx, 0), min(dx + width, size))
    if ys.start < ys.stop and xs.start < xs.stop:
        stamp[:, ys, xs] = model[:, ys.start - dy : ys.stop - dy, xs.start - dx : xs.stop - dx]
    return stamp
