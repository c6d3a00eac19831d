# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real blends of the Hyper Suprime-Cam through the pipeline.

Each npz file holds one blend: ``images`` and ``weights`` (B, H, W), the weights being inverse variances that
are zero outside the blend's footprint, ``psfs`` (B, h, w) and ``peaks`` (K, 2) as (x, y); the bands are grizy
and the pixels 0.168 arcsec wide. Every blend becomes a patch of one cell in a Butler repository, and
`pipetask run` does the rest. There is no truth: what is measured is how much of the light the models account
for.
"""

from __future__ import annotations

__all__ = ["BANDS", "PIXEL_SCALE", "HscBlend", "calibration_factor", "evaluate_hsc"]

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.butler_repo import CoaddRepository, PatchLayout, run_pipetask
from ..network import NetworkError, NetworkMetadata, read_metadata
from .figures import colour, new_figure, residual_map, show_colour, show_sigma
from .metrics import reduced_chi2, run_seconds

_LOG = logging.getLogger("lsst.meas.vaedeblend.evaluation.hsc")

BANDS = ("g", "r", "i", "z", "y")
"""Bands of the files."""

PIXEL_SCALE = 0.168
"""Width of a pixel of the files, arcsec."""

_COLUMNS = 10
_OUTPUT = "vaedeblend/hsc"
_LABEL = "vaeDeblend"


@dataclasses.dataclass
class HscBlend:
    """One blend in the files' arbitrary unit of flux.

    Attributes
    ----------
    name : `str`
        The file's stem.
    image, weight : `numpy.ndarray`, (B, H, W)
        Flux, and inverse variance with zero outside the footprint.
    psf : `numpy.ndarray`, (B, h, w)
        PSF images.
    peaks : `numpy.ndarray`, (K, 2)
        Peaks (x, y), pixel.
    """

    name: str
    image: NDArray[np.float32]
    weight: NDArray[np.float32]
    psf: NDArray[np.float32]
    peaks: NDArray[np.float64]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> HscBlend:
        """Read an npz file; nothing in it is unpickled.

        Raises
        ------
        ValueError
            Raised when the file lacks an array or the arrays have other shapes.
        """
        path = Path(path)
        with np.load(path, allow_pickle=False) as data:
            if lacking := sorted({"images", "weights", "psfs", "peaks"} - set(data.files)):
                raise ValueError(f"{path} has no {', '.join(lacking)}: this is no blend.")
            blend = cls(path.stem, data["images"], data["weights"], data["psfs"], data["peaks"])
        if len(blend.image) != len(BANDS) or blend.image.shape != blend.weight.shape:
            raise ValueError(
                f"{path}: images {blend.image.shape} and weights {blend.weight.shape} should have one shape "
                f"with {len(BANDS)} bands."
            )
        return blend

    @property
    def noise(self) -> NDArray[np.float64]:
        """Median standard deviation per band over the footprint, (B,)."""
        return np.array([np.median(1 / np.sqrt(w[w > 0])) if (w > 0).any() else np.nan for w in self.weight])


def calibration_factor(blends: list[HscBlend], metadata: NetworkMetadata) -> float:
    """Choose one factor from the files' unit to nJy.

    The unit is arbitrary, and a network works at the depths it was trained at. So all files are multiplied by
    the factor that takes the median r-band noise over the blends to the middle (the geometric mean) of the
    noise range the network's metadata give for r. Colours and relative fluxes stay as they are.

    Parameters
    ----------
    blends : `list` [`HscBlend`]
        All the blends.
    metadata : `lsst.meas.vaedeblend.network.NetworkMetadata`
        Metadata of the network.

    Returns
    -------
    factor : `float`
        nJy per unit of the files.

    Raises
    ------
    lsst.meas.vaedeblend.network.NetworkError
        Raised when the metadata give no noise range for r.
    """
    noise_range = metadata.training_range.get("noise", {}).get("r")
    if noise_range is None:
        raise NetworkError(f"Network {metadata.name} gives no training range of the noise in r.")
    noise = np.nanmedian([blend.noise[BANDS.index("r")] for blend in blends])
    return float(np.sqrt(noise_range[0] * noise_range[1]) / noise)


def evaluate_hsc(
    blends_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    network: str = "hsc_grizy",
    processes: int = 1,
    figure_blends: int = 10,
) -> dict[str, Any]:
    """Deblend all blends of a directory at their given peaks, and measure what is left.

    Writes ``repo`` (the Butler repository), ``hsc.json`` and ``hsc.png`` to ``out_dir``.

    Parameters
    ----------
    blends_dir, out_dir : path-like
        Directories; the second is made.
    network : `str`, optional
        Name or path of the network.
    processes : `int`, optional
        Processes of `pipetask run`.
    figure_blends : `int`, optional
        Number of blends in the figure, evenly spaced in the sorted list of files.

    Returns
    -------
    summary : `dict`
        What ``hsc.json`` holds. Reduced chi-square is the mean of squared residual times weight over the
        pixels and bands with weight; ``before`` stands for the image itself. ``median_chi2``, ``p90_chi2``
        and ``median_chi2_before`` are over blends.

    Raises
    ------
    FileNotFoundError
        Raised when there is no blend.
    FileExistsError
        Raised when ``out_dir`` holds a repository already.
    lsst.meas.vaedeblend.adapters.butler_repo.PipetaskError
        Raised when pipetask fails.
    """
    files = sorted(Path(blends_dir).glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"No *.npz in {os.fspath(blends_dir)}.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    blends = [HscBlend.read(path) for path in files]
    metadata = read_metadata(network)
    factor = calibration_factor(blends, metadata)

    repository = _fill_repository(out_dir / "repo", blends, factor)
    # The blends' peaks are scarlet's; how many objects this deblender adds is part of what is measured.
    config = {
        "network": network,
        "usePeaks": True,
        "doWriteResidual": True,
        "deblend.findNewPeaks": True,
    }
    log = out_dir / "pipetask.log"
    run_pipetask(repository.root, _OUTPUT, config=config, processes=processes, log=log)

    rows, residuals = [], []
    with repository.reader(_OUTPUT) as get:
        for patch, blend in enumerate(blends):
            row, residual = _measure(get, patch, blend, factor)
            rows.append(row)
            residuals.append(residual)
    chi2 = np.array([row["chi2"] for row in rows])
    n_objects = sum(row["n_objects"] for row in rows)
    summary = {
        "network": metadata.name,
        "network_sha256": metadata.weights_sha256,
        "n_blends": len(blends),
        "n_objects": n_objects,
        "n_peaks": sum(row["n_peaks"] for row in rows),
        "median_chi2": float(np.median(chi2)),
        "p90_chi2": float(np.percentile(chi2, 90)),
        "median_chi2_before": float(np.median([row["chi2_before"] for row in rows])),
        "seconds_per_object": sum(row["seconds"] for row in rows) / n_objects,
        "njy_per_unit": factor,
        "blends": rows,
    }
    (out_dir / "hsc.json").write_text(json.dumps(summary, indent=1) + "\n")
    chosen = np.unique(np.linspace(0, len(blends) - 1, min(figure_blends, len(blends))).round().astype(int))
    _draw(out_dir / "hsc.png", [(blends[i], residuals[i], rows[i]) for i in chosen])
    return summary


def _fill_repository(root: Path, blends: list[HscBlend], factor: float) -> CoaddRepository:
    """Put every blend into a new repository as a patch of one cell."""
    # The blends lie side by side in one tract, with a gap between them: where they really are is not known.
    pitch = max(max(blend.image.shape[1:]) for blend in blends) + 10
    layouts = {}
    for patch, blend in enumerate(blends):
        row, column = divmod(patch, _COLUMNS)
        layouts[patch] = PatchLayout(row * pitch, column * pitch, (1, 1), blend.image.shape[1:])
    repository = CoaddRepository(root, BANDS, layouts, PIXEL_SCALE, skymap="hsc_blends")
    for patch, blend in enumerate(blends):
        used = blend.weight > 0
        variance = np.divide(factor**2, blend.weight, out=np.full(blend.weight.shape, np.inf), where=used)
        planes = {"DETECTED": used, "NO_DATA": ~used}
        repository.put_coadds(patch, blend.image * factor, variance, blend.psf, planes)
        layout = layouts[patch]
        x, y = blend.peaks.T
        repository.put_peaks(patch, x + layout.x0, y + layout.y0, np.ones(len(x), np.int64))
    return repository


def _measure(
    get: Callable[..., Any], patch: int, blend: HscBlend, factor: float
) -> tuple[dict[str, Any], NDArray]:
    """Read one blend's outputs back: its row of the summary, and its residual in the file's unit."""
    objects = get("object_vae_deblend", patch)
    metadata = get(f"{_LABEL}_metadata", patch)[_LABEL]
    residual = np.stack([get("deep_coadd_vae_residual", patch, band=b).image.array for b in BANDS]) / factor
    flags = {
        name.removeprefix("deblend_flag_"): int(np.sum(objects[name]))
        for name in objects.colnames
        if name.startswith("deblend_flag_") and np.any(objects[name])
    }
    return {
        "blend": blend.name,
        "n_peaks": len(blend.peaks),
        "n_objects": len(objects),
        "n_pixels": int((blend.weight > 0).sum()),
        "chi2_before": reduced_chi2(blend.image, blend.weight),
        "chi2": reduced_chi2(residual, blend.weight),
        "seconds": run_seconds(metadata),
        "flags": flags,
    }, residual


def _draw(path: Path, panels: list[tuple[HscBlend, NDArray, dict[str, Any]]]) -> None:
    """Draw image, models and residual of each blend, two blends to a row."""
    rows = -(-len(panels) // 2)
    figure = new_figure(15.0, 2.6 * rows + 0.4)
    axes = figure.subplots(rows, 6, squeeze=False)
    shown = None
    for k in range(2 * rows):
        image_axes, model_axes, residual_axes = axes[k // 2, 3 * (k % 2) : 3 * (k % 2) + 3]
        for a in (image_axes, model_axes, residual_axes):
            a.set_xticks([])
            a.set_yticks([])
            a.set_visible(k < len(panels))
        if k >= len(panels):
            continue
        blend, residual, row = panels[k]
        used = blend.weight > 0
        image = np.where(used, blend.image, 0.0)
        model = np.where(used, blend.image - residual, 0.0)
        show_colour(image_axes, colour(image, BANDS, blend.noise), f"{blend.name}\n{row['n_peaks']} peaks")
        image_axes.plot(*blend.peaks.T, "+", color="white", markersize=7, markeredgewidth=1)
        show_colour(model_axes, colour(model, BANDS, blend.noise), f"models\n{row['n_objects']} objects")
        variance = np.divide(1.0, blend.weight, out=np.ones(blend.weight.shape), where=used)
        sigma = residual_map(residual, variance, used)
        title = f"residual / sigma\n$\\chi^2$/n {row['chi2_before']:.3g} to {row['chi2']:.3g}"
        shown = show_sigma(residual_axes, sigma, title)
        residual_axes.set_facecolor("0.85")
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes, location="bottom", shrink=0.3, aspect=40, pad=0.02)
        bar.set_label("residual of all bands, standard deviations")
    figure.savefig(path, dpi=110)
