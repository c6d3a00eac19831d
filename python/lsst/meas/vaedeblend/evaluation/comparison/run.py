# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``vaedeblend compare``."""

from __future__ import annotations

__all__ = ["compare", "format_verdict", "score_stamps"]

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics import MATCH_RADIUS
from .entrants import Entrant, load_entrants, parse_entrant
from .patches import Patch, read_patches
from .report import write_report
from .repository import is_repository, is_tables, load_repository, load_tables, repository_patches
from .result import Comparison, compare_entrants, score_entrant

_LOG = logging.getLogger("lsst.meas.vaedeblend.evaluation.comparison")


def compare(
    entrants: Sequence[str],
    out_dir: str | os.PathLike[str],
    *,
    images: str | None = None,
    truth: str | None = None,
    pixel_scale: float = 0.2,
    radius: float = MATCH_RADIUS,
    network: str | None = None,
) -> Comparison:
    """Compare deblenders on their files.

    Writes ``compare.html``, the report, ``metrics.ecsv``, all numbers, and ``objects.ecsv``, all objects, to
    ``out_dir``.

    Parameters
    ----------
    entrants : sequence of `str`
        ``NAME=WHAT`` or ``WHAT``: ``REPO@COLLECTION``, a Butler repository with this deblender's outputs; a
        directory with its tables, see `load_tables`; or what `load_entrants` takes.
    out_dir : path-like
        Directory, made if need be.
    images : `str`, optional
        Field files to compare on, or ``REPO@COLLECTION`` with the coadds; by default those of ``truth``, or
        of the first entrant that is a repository.
    truth : `str`, optional
        Field files with truth.
    pixel_scale : `float`, optional
        Width of a pixel of field files, arcsec.
    radius : `float`, optional
        Largest distance of matched objects, pixel.
    network : `str`, optional
        Name or path of the network of models in repositories, by default the one that they name.

    Returns
    -------
    comparison : `Comparison`

    Raises
    ------
    OSError, ValueError
        Raised when a file is lacking, not sound, or does not go with the others.
    """
    named = [parse_entrant(text) for text in entrants]
    if len(named) < 2:
        raise ValueError("A comparison needs two or more deblenders.")
    patches = _patches([what for _, what in named], images, truth, pixel_scale, network)
    loaded: list[list[Entrant]] = []
    for name, what in named:
        if is_repository(what):
            loaded.append(load_repository(what, name, patches, network))
        elif is_tables(what):
            loaded.append(load_tables(what, name, patches, network))
        else:
            loaded.append(load_entrants(what, name, patches))
        _LOG.info("%s: %d objects on %d patches.", name, sum(map(len, loaded[-1])), len(patches))
    comparison = compare_entrants(patches, loaded, radius)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    comparison.metrics_table().write(out / "metrics.ecsv", overwrite=True)
    comparison.object_table().write(out / "objects.ecsv", overwrite=True)
    write_report(out / "compare.html", comparison, patches, loaded)
    return comparison


def _patches(
    whats: Sequence[str],
    images: str | None,
    truth: str | None,
    pixel_scale: float,
    network: str | None,
) -> list[Patch]:
    if truth is not None and images is not None and images != truth:
        raise ValueError("Field files with truth hold the images too: give either images or truth.")
    if truth is not None:
        patches = read_patches(truth, pixel_scale)
        if bare := [patch.name for patch in patches if patch.truth is None]:
            raise ValueError(f"{truth} has no truth for {', '.join(bare)}.")
        return patches
    source = images or next((what for what in whats if is_repository(what)), None)
    if source is None:
        raise ValueError("Say what images to compare on: --images, or --truth for fields with truth.")
    if is_repository(source):
        return repository_patches(source, network)
    return read_patches(source, pixel_scale, truth=False)


def score_stamps(
    fields_dir: str | os.PathLike[str],
    stamps: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    pixel_scale: float = 0.2,
    radius: float = MATCH_RADIUS,
) -> dict[str, Any]:
    """Score one deblender's images of the objects in field files: the benchmark.

    Parameters
    ----------
    fields_dir : path-like
        Directory of field files with truth.
    stamps : path-like
        Directory with the deblender's file for each field, see `load_entrants`.
    out_dir : path-like
        Directory, made if need be, for ``score.json``.
    pixel_scale : `float`, optional
        Width of a pixel, arcsec.
    radius : `float`, optional
        Largest distance of a match, for files with positions of their own.

    Returns
    -------
    score : `dict`
        What ``score.json`` holds: ``fields``, ``n_true``, ``seconds_per_object`` (`None` if unknown), counts
        of matched, merged, missed, split and added objects, and ``classes``: for each class of true objects
        their number ``n`` and, by name, ``[value, standard error]``; `None` for what is not known.

    Raises
    ------
    OSError, ValueError
        Raised when a file is lacking or not sound.
    """
    patches = read_patches(fields_dir, pixel_scale)
    if bare := [patch.name for patch in patches if patch.truth is None]:
        raise ValueError(f"{os.fspath(fields_dir)} has no truth for {', '.join(bare)}.")
    comparison = score_entrant(patches, load_entrants(os.fspath(stamps), "entrant", patches), radius)
    assert comparison.true is not None

    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    classes: dict[str, Any] = {}
    for name, (n, verdicts) in comparison.verdicts.items():
        numbers = {v.quantity: [known(v.value[0]), known(v.error[0])] for v in verdicts}
        classes[name] = {"n": n, **numbers}
    score = {
        "fields": comparison.patches,
        "n_true": len(comparison.true["x"]),
        "seconds_per_object": known(comparison.costs[0]["seconds"]),
        **comparison.fates[0],
        "pulls": {
            cover["band"]: {key: [known(v) for v in cover[key]] for key in ("median", "nmad", "inside")}
            for cover in comparison.coverages
        },
        "all": classes.get("all"),
        "classes": classes,
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "score.json").write_text(json.dumps(score, indent=1, allow_nan=False) + "\n")
    return score


def format_verdict(comparison: Comparison) -> str:
    """Lay the first verdict out as text."""
    lines = []
    names = comparison.names
    if "all" in comparison.verdicts:
        n, verdicts = comparison.verdicts["all"]
        lines.append(f"{n} true objects with S/N above 10: {', '.join(names)}")
        for v in verdicts:
            values = "  ".join(f"{x:8.4f} +- {e:.4f}" for x, e in zip(v.value, v.error, strict=True))
            best = [names[p[p["better"]]] if p["better"] else "no difference" for p in v.pairs]
            lines.append(f"{v.quantity:<22} {values}   {'; '.join(best)}")
    for row in comparison.residual_verdicts():
        if row["n"]:
            winner = names[row[row["better"]]] if row["better"] else "no difference"
            (a, da), (b, db) = row["values"]
            pair = f"{names[row['first']]}, {names[row['second']]}"
            values = f"{a:.3f} +- {da:.3f}, {b:.3f} +- {db:.3f}"
            lines.append(f"median chi2 of {row['n']} objects, {pair}: {values}; {winner}")
    return "\n".join(lines)
