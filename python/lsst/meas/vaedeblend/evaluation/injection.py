# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Simulated galaxies injected into real blends: fluxes among real neighbours, with a truth to compare."""

from __future__ import annotations

__all__ = ["evaluate_injection"]

import json
import logging
import os
from pathlib import Path
from typing import Any

import galsim
import numpy as np
from numpy.typing import NDArray

from ..adapters.footprints import parents_from_peaks
from ..deblender import deblend
from ..ground.statistics import nmad, stamp_snr
from ..network import Network, load_network
from ..scene import PsfGrid, Scene
from ..simulation.galaxies import galaxy_profile
from ..simulation.patch import simulate_patch
from ..simulation.population import Population, draw_population
from ..simulation.surveys import get_survey_info
from .hsc import BANDS, PIXEL_SCALE, HscBlend, calibration_factor
from .metrics import SNR_LIMIT

_LOG = logging.getLogger("lsst.meas.vaedeblend.evaluation.injection")

_R = BANDS.index("r")
_DISTANCE = (1.0, 2.5)
"""Distance of an injected galaxy from the peak it is put beside, arcsec."""

_MIN_DISTANCE = 0.8
"""Least distance from any other peak, arcsec."""

_TRIES = 200


def evaluate_injection(
    blends_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    network: str = "hsc_grizy",
    per_blend: int = 3,
    patches: int = 3,
    seed: int = 1,
) -> dict[str, Any]:
    """Inject galaxies beside the real ones of HSC blends, one at a time, and measure them.

    The blend's image stays as it is; the galaxy, convolved with its PSF, is added without photon noise of its
    own, and its position to the peaks. For comparison the same network deblends simulated patches of the
    survey at true centres. Writes ``injection.json`` to ``out_dir``.

    Parameters
    ----------
    blends_dir, out_dir : path-like
        Directories; the second is made.
    network : `str`, optional
        Name or path of the network.
    per_blend : `int`, optional
        Galaxies for each blend, each in a copy of its own.
    patches : `int`, optional
        Simulated patches of 120 galaxies.
    seed : `int`, optional
        Seed of galaxies and positions.

    Returns
    -------
    summary : `dict`
        ``injected`` and ``simulated``: number of galaxies with S/N above `SNR_LIMIT` in r, and mean absolute
        value (cut at 5), NMAD and median of their flux errors F / F_true - 1; ``ratio_meanabs`` and
        ``ratio_nmad`` of the two.

    Raises
    ------
    FileNotFoundError
        Raised when there is no blend.
    """
    files = sorted(Path(blends_dir).glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"No *.npz in {os.fspath(blends_dir)}.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    loaded = load_network(network, threads=1, bands=BANDS)
    blends = [HscBlend.read(path) for path in files]
    factor = calibration_factor(blends, loaded.metadata)
    rng = np.random.default_rng(seed)
    survey = get_survey_info("HSC", BANDS)
    population = draw_population(per_blend * len(blends), survey, rng, mag_range=(19.0, 25.0))
    rows = []
    for i, blend in enumerate(blends):
        for k in range(per_blend):
            row = _inject(blend, factor, population, i * per_blend + k, loaded, rng)
            if row is not None:
                rows.append({"blend": blend.name, **row})
    injected = _statistics(rows)
    simulated = _statistics(_simulated(loaded, patches, seed))
    summary = {
        "network": loaded.metadata.name,
        "network_sha256": loaded.metadata.weights_sha256,
        "injected": injected,
        "simulated": simulated,
        "ratio_meanabs": injected["flux_meanabs"] / simulated["flux_meanabs"],
        "ratio_nmad": injected["flux_nmad"] / simulated["flux_nmad"],
        "galaxies": rows,
    }
    (out_dir / "injection.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    error = np.array([row["error"] for row in rows if row["snr"] > SNR_LIMIT])
    return {
        "n": len(error),
        "flux_meanabs": float(np.minimum(np.abs(error), 5).mean()),
        "flux_nmad": nmad(error),
        "flux_median": float(np.median(error)),
    }


def _place(blend: HscBlend, rng: np.random.Generator) -> NDArray[np.float64] | None:
    """Choose a position (x, y) beside a peak, on the footprint; `None` if there is no room."""
    used = (blend.weight > 0).any(axis=0)
    for _ in range(_TRIES):
        distance, angle = rng.uniform(*_DISTANCE) / PIXEL_SCALE, rng.uniform(0, 2 * np.pi)
        beside = blend.peaks[rng.integers(len(blend.peaks))]
        position = beside + distance * np.array([np.cos(angle), np.sin(angle)])
        x, y = np.rint(position).astype(int)
        if not (0 <= y < used.shape[0] and 0 <= x < used.shape[1] and used[y, x]):
            continue
        if np.hypot(*(blend.peaks - position).T).min() > _MIN_DISTANCE / PIXEL_SCALE:
            return position
    return None


def _inject(
    blend: HscBlend,
    factor: float,
    population: Population,
    index: int,
    network: Network,
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    """Inject one galaxy, deblend, and compare; `None` where there is no room or no light on the footprint."""
    position = _place(blend, rng)
    if position is None:
        return None
    height, width = blend.image.shape[1:]
    added = np.zeros(blend.image.shape)
    for b, band in enumerate(BANDS):
        psf = galsim.InterpolatedImage(
            galsim.Image(np.ascontiguousarray(blend.psf[b], dtype=np.float64), scale=PIXEL_SCALE), flux=1.0
        )
        profile = galsim.Convolve(galaxy_profile(population, index, band), psf)
        image = galsim.ImageD(galsim.BoundsI(0, width - 1, 0, height - 1), scale=PIXEL_SCALE)
        # The PSF's image holds the pixel already.
        profile.drawImage(image, center=galsim.PositionD(*position), method="no_pixel")
        added[b] = np.maximum(image.array, 0.0)
    used = blend.weight > 0
    variance = np.divide(factor**2, blend.weight, out=np.full(blend.weight.shape, np.inf), where=used)
    snr = float(stamp_snr(added[_R], variance[_R]))
    peaks = np.concatenate([blend.peaks, position[None]])
    parents = parents_from_peaks(used.any(axis=0), peaks, np.ones(len(peaks), int))
    scene = Scene(
        BANDS,
        (blend.image * factor + added).astype(np.float32),
        variance.astype(np.float32),
        used,
        psf=PsfGrid.constant(blend.psf),
        pixel_scale=PIXEL_SCALE,
        parents=parents,
    )
    sources = deblend(scene, network).sources
    own = np.argmin(np.hypot(sources.peak_x - position[0], sources.peak_y - position[1]))
    flux = float(np.nan_to_num(sources.flux[own, _R]))
    true = float(population.total_flux[index, _R])
    return {"snr": snr, "flux": true, "error": flux / true - 1}


def _simulated(network: Network, patches: int, seed: int) -> list[dict[str, Any]]:
    """Errors on simulated patches of the survey, deblended at true centres."""
    rows = []
    for k in range(patches):
        patch = simulate_patch(
            1000 * seed + k, survey="HSC", bands=BANDS, n_galaxies=120, cells=(2, 2), mag_range=(19.0, 25.5)
        )
        xy = np.column_stack([patch.x, patch.y])
        detected = np.ones(patch.image.shape[1:], bool)
        sources = deblend(patch.scene(parents_from_peaks(detected, xy)), network).sources
        given = np.array(
            [np.argmin(np.hypot(sources.peak_x - x, sources.peak_y - y)) for x, y in xy], np.int64
        )
        error = np.nan_to_num(sources.flux[given, _R]) / patch.flux[:, _R] - 1
        rows += [{"snr": float(s), "error": float(e)} for s, e in zip(patch.snr[:, _R], error, strict=True)]
    return rows
