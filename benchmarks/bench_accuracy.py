# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Scores of models on fields with known truth, and their differences between checkouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lsst.meas.vaedeblend.evaluation.fields import FieldFile
from lsst.meas.vaedeblend.evaluation.metrics import SNR_LIMIT, bootstrap
from lsst.meas.vaedeblend.ground.bands import reference_band
from lsst.meas.vaedeblend.ground.statistics import nmad, stamp_snr
from lsst.meas.vaedeblend.simulation.ksb import ksb_shape
from numpy.typing import NDArray

STATISTICS = (
    "flux error, mean abs",
    "flux error, NMAD",
    "cosine",
    "e error, NMAD",
    "response m",
    "flux coverage",
    "shape coverage",
)

_ROUND, _CUT = 0.9, 5.0
"""Largest ellipticity that counts, and the largest error of a flux in the mean."""


@dataclasses.dataclass
class FieldScores:
    """Galaxies with S/N above `SNR_LIMIT` of one field, in the reference band.

    Attributes
    ----------
    flux, cosine : `numpy.ndarray`, (N,)
        Relative error of the flux, and cosine between model and truth; -1 and 0 without a model.
    true, found : `numpy.ndarray`, (N, 2)
        Ellipticities (KSB) of truth and model; NaN where they fail.
    flux_inside, flux_intervals, shape_inside, shape_intervals : `int`
        True values inside of 68 percent intervals, and intervals.
    """

    flux: NDArray[np.float64]
    cosine: NDArray[np.float64]
    true: NDArray[np.float64]
    found: NDArray[np.float64]
    flux_inside: int
    flux_intervals: int
    shape_inside: int
    shape_intervals: int


def score(field: FieldFile, model: NDArray, row: dict[str, Any]) -> FieldScores:
    """Score the models of one field; the row of the summary has the coverage."""
    band = field.bands.index(reference_band(field.bands))
    size = field.stamp.shape[-1]
    truth = field.stamp[:, band].astype(float)
    corners = zip(field.stamp_y0, field.stamp_x0, strict=True)
    variance = np.stack([field.variance[band, y : y + size, x : x + size] for y, x in corners])
    bright = stamp_snr(truth, variance) > SNR_LIMIT
    truth, model = truth[bright], np.nan_to_num(model[bright, band].astype(float))
    norm = np.sqrt((truth**2).sum(axis=(1, 2)) * (model**2).sum(axis=(1, 2)))
    return FieldScores(
        flux=model.sum(axis=(1, 2)) / truth.sum(axis=(1, 2)) - 1,
        cosine=(truth * model).sum(axis=(1, 2)) / np.where(norm > 0, norm, 1.0),
        true=_shapes(truth, field.psf[band]),
        found=_shapes(model, field.psf[band]),
        **{
            key: row[f"n_{key}"]
            for key in ("flux_inside", "flux_intervals", "shape_inside", "shape_intervals")
        },
    )


def score_all(fields: Path, models: Path, summary: dict[str, Any]) -> list[FieldScores]:
    """Score what `lsst.meas.vaedeblend.evaluation.fields.evaluate_fields` wrote."""
    scores = []
    for row in summary["fields"]:
        with np.load(models / row["field"]) as data:
            model = data["model"]
        scores.append(score(FieldFile.read(fields / row["field"]), model, row))
    return scores


def _shapes(images: NDArray, psf: NDArray) -> NDArray[np.float64]:
    return np.array([ksb_shape(image, psf) for image in images], float).reshape(-1, 2)


def statistics(checkouts: Sequence[list[FieldScores]], fields: Sequence[int]) -> NDArray[np.float64]:
    """Compute `STATISTICS` of each checkout over some of the fields.

    Shapes count where they can be measured in the models of all checkouts.
    """
    chosen = [[scores[i] for i in fields] for scores in checkouts]
    true = np.concatenate([s.true for s in chosen[0]])
    sound = np.hypot(*true.T) < _ROUND
    for scores in chosen:
        error = np.concatenate([s.found for s in scores]) - true
        sound &= np.isfinite(error).all(axis=1) & (np.hypot(*error.T) < 1)
    out = []
    for scores in chosen:
        flux = np.concatenate([s.flux for s in scores])
        found = np.concatenate([s.found for s in scores])
        error = found - true
        x, y = true[sound].ravel(), error[sound].ravel()
        total = {
            key: sum(getattr(s, key) for s in scores)
            for key in ("flux_inside", "flux_intervals", "shape_inside", "shape_intervals")
        }
        out.append(
            [
                np.minimum(np.abs(flux), _CUT).mean() if len(flux) else np.nan,
                nmad(flux),
                np.concatenate([s.cosine for s in scores]).mean() if len(flux) else np.nan,
                nmad(y),
                np.polyfit(x, y, 1)[0] if len(x) > 3 else np.nan,
                total["flux_inside"] / max(total["flux_intervals"], 1),
                total["shape_inside"] / max(total["shape_intervals"], 1),
            ]
        )
    return np.array(out)


def compare(checkouts: Sequence[list[FieldScores]], seed: int = 1) -> dict[str, Any]:
    """Compute `STATISTICS` with their errors, and paired differences from the first checkout.

    Errors are those of drawing fields anew, with all that is on them; both checkouts see the same ones.
    """

    def everything(fields: Sequence[int]) -> NDArray[np.float64]:
        values = statistics(checkouts, fields)
        return np.concatenate([values, values[:1] - values[1:]])

    n = len(checkouts[0])
    best = everything(range(n))
    error = bootstrap(everything, n, np.random.default_rng(seed)) if n > 1 else np.full(best.shape, np.nan)
    rows = [
        {name: {"value": v, "error": e} for name, v, e in zip(STATISTICS, values, errors, strict=True)}
        for values, errors in zip(best, error, strict=True)
    ]
    count = len(checkouts)
    return {
        "fields": n,
        "galaxies": sum(len(s.flux) for s in checkouts[0]),
        "checkouts": rows[:count],
        "difference": rows[count] if count > 1 else None,
    }
