# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""A whole comparison: entrants measured on all patches, and the tables that come of it."""

from __future__ import annotations

__all__ = ["Comparison", "Pair", "compare_entrants", "score_entrant"]

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...ground.bands import reference_band
from ..metrics import MATCH_RADIUS, SNR_LIMIT
from .entrants import Entrant
from .matching import Matches
from .measures import Light, colour_bands, measure_objects, measure_pairs, measure_truth, true_properties
from .patches import Patch
from .statistics import (
    Verdict,
    coverage,
    decide,
    difference_table,
    entrant_pairs,
    median,
    truth_verdicts,
    with_error,
)

if TYPE_CHECKING:
    from astropy.table import Table

Columns = dict[str, NDArray]


@dataclasses.dataclass(eq=False)
class Pair:
    """Two entrants on all patches.

    Parameters
    ----------
    first, second : `int`
        Which entrants.
    columns : `dict` [`str`, `numpy.ndarray`]
        Columns of `measure_pairs` of the matched objects, and ``patch``, ``first``, ``second``: the patch and
        the rows of the entrants there.
    lonely : `dict` [`str`, `numpy.ndarray`]
        Objects without a partner: ``patch``, ``row``, ``side`` (0 for the first entrant's), ``beside``
        (merged or split, rather than missed or added).
    counts : `dict` [`str`, `int`]
        ``matched``, ``merged``, ``missed``, ``split``, ``added``.
    differences : `list` [`dict`]
        See `difference_table`; of objects with a signal-to-noise ratio above `SNR_LIMIT`.
    """

    first: int
    second: int
    columns: Columns
    lonely: Columns
    counts: dict[str, int]
    differences: list[dict[str, Any]]


@dataclasses.dataclass(eq=False)
class Comparison:
    """What a comparison found.

    Parameters
    ----------
    names : `list` [`str`]
        The entrants.
    bands : `tuple` [`str`]
        Bands.
    patches : `list` [`str`]
        Names of the patches.
    objects : `list` [`dict`]
        Columns of `measure_objects` of each entrant, and ``patch``.
    pairs : `list` [`Pair`]
        Pairs of entrants.
    costs : `list` [`dict`]
        Of each entrant ``objects``, ``seconds`` and ``bytes`` per object (NaN if unknown), ``chi2`` (median
        of the objects brighter than `SNR_LIMIT`, with its error), ``n_models``.
    true : `dict` [`str`, `numpy.ndarray`] or `None`
        Columns of `true_properties`, and ``patch``, ``row``, ``x``, ``y``; `None` without truth, as the rest.
    errors : `list` [`dict`]
        Columns of `measure_truth` of each entrant, rows as in ``true``.
    fates : `list` [`dict`]
        Of each entrant the counts of true objects ``matched``, ``merged``, ``missed``, and of its own that
        are none, ``split`` and ``added``; the latter `None` where it started from the true centres.
    verdicts : `dict`
        See `truth_verdicts`.
    coverages : `list` [`dict`]
        Of each entrant with errors and each band, see `coverage`.
    radius : `float`
        Largest distance of matched objects, pixel.
    """

    names: list[str]
    bands: tuple[str, ...]
    patches: list[str]
    objects: list[Columns]
    pairs: list[Pair]
    costs: list[dict[str, Any]]
    true: Columns | None
    errors: list[Columns]
    fates: list[dict[str, int | None]]
    verdicts: dict[str, tuple[int, list[Verdict]]]
    coverages: list[dict[str, Any]]
    radius: float

    @property
    def band(self) -> str:
        """Band in which what is single is measured (`str`)."""
        return reference_band(self.bands)

    @property
    def colour(self) -> str:
        """Name of the colour that is compared (`str`)."""
        return " - ".join(self.bands[i] for i in colour_bands(self.bands))

    def residual_verdicts(self) -> list[dict[str, Any]]:
        """Which of two leaves less residual at the objects that both have; needs no truth.

        Returns
        -------
        rows : `list` [`dict`]
            Of each pair ``first``, ``second``, ``n``, the medians ``values`` over the same objects, by how
            much the second is worse, ``difference``, with its bootstrap error ``error``, and ``better``.
        """
        rows = []
        for pair in self.pairs:
            c = pair.columns
            chi2 = [_pick(self.objects[pair.first], c["patch"], c["first"], "chi2")]
            chi2.append(_pick(self.objects[pair.second], c["patch"], c["second"], "chi2"))
            both = np.isfinite(chi2[0]) & np.isfinite(chi2[1]) & (c["snr"] > SNR_LIMIT)
            # One index per object carries both values through the bootstrap.
            a, b = chi2[0][both], chi2[1][both]

            def worse(index: NDArray, a=a, b=b) -> float:
                i = index.astype(int)
                return median(b[i]) - median(a[i])

            difference, error = with_error(worse, np.arange(len(a)))
            rows.append(
                {
                    "first": pair.first,
                    "second": pair.second,
                    "n": len(a),
                    "values": [with_error(median, a), with_error(median, b)],
                    "difference": difference,
                    "error": error,
                    "better": decide(difference, error),
                }
            )
        return rows

    def object_table(self) -> Table:
        """Make a table of all objects of all entrants, one row each."""
        from astropy import units as u
        from astropy.table import Table, vstack

        tables = []
        for name, columns in zip(self.names, self.objects, strict=True):
            table = Table()
            table["entrant"] = np.full(len(columns["x"]), name)
            table["patch"] = np.array(self.patches)[columns["patch"]]
            for key in ("id", "x", "y", "centroid_x", "centroid_y", "separation"):
                table[key] = columns[key]
            for key in ("x", "y", "centroid_x", "centroid_y", "separation"):
                table[key].unit = u.pix
            for key in ("mag", "snr", "deblend_blendedness", "chi2"):
                table[key] = columns[key]
            kinds = (("flux", "flux"), ("flux_err", "fluxErr"), ("aperture", "apFlux"))
            for key, suffix in (*kinds, ("redistributed", "redistributedApFlux")):
                for i, band in enumerate(self.bands):
                    table[f"{band}_{suffix}"] = columns[key][:, i] * u.nJy
            tables.append(table)
        return vstack(tables, metadata_conflicts="silent")

    def metrics_table(self) -> Table:
        """Make a table of all numbers: ``entrant``, ``versus``, ``sample``, ``metric``, ``value``, ``error``,
        ``n``. Differences of two entrants have the second one in ``versus`` and say by how much it is worse,
        or, for ``ratio`` and ``difference``, larger."""
        from astropy.table import Table

        rows: list[tuple[str, str, str, str, float, float, int]] = []
        for name, cost in zip(self.names, self.costs, strict=True):
            rows.append((name, "", "", "n_objects", float(cost["objects"]), 0.0, cost["objects"]))
            for key in ("seconds", "bytes"):
                rows.append((name, "", "", f"{key}_per_object", cost[key], np.nan, cost["objects"]))
            rows.append((name, "", "bright", "chi2_median", *cost["chi2"], cost["n_models"]))
        for i, fate in enumerate(self.fates):
            for key, count in fate.items():
                if count is not None:
                    rows.append((self.names[i], "truth", "", f"n_{key}", float(count), 0.0, count))
        for sample, (n, verdicts) in self.verdicts.items():
            for v in verdicts:
                for name, value, error in zip(self.names, v.value, v.error, strict=True):
                    rows.append((name, "truth", sample, v.quantity, value, error, n))
                for p in v.pairs:
                    names = self.names[p["first"]], self.names[p["second"]]
                    metric = f"{v.quantity}_worse"
                    rows.append((*names, sample, metric, p["difference"], p["error"], p["n"]))
        for c in self.coverages:
            for key in ("median", "nmad", "inside"):
                metric = f"{c['band']}_pull_{key}"
                rows.append((self.names[c["entrant"]], "truth", "bright", metric, *c[key], c["n"]))
        for pair in self.pairs:
            names = self.names[pair.first], self.names[pair.second]
            for key, count in pair.counts.items():
                rows.append((*names, "", f"n_{key}", float(count), 0.0, count))
            for d in pair.differences:
                for key in ("median", "nmad", "off_by_half"):
                    if key in d:
                        rows.append((*names, "bright", f"{d['what']}, {key}", *d[key], d["n"]))
        header = ("entrant", "versus", "sample", "metric", "value", "error", "n")
        return Table(rows=rows, names=header, dtype=("U", "U", "U", "U", float, float, int))


def _pick(columns: Columns, patch: NDArray, row: NDArray, key: str) -> NDArray:
    """Values of objects named by their patch and their row in it; columns are sorted by patch."""
    start = np.searchsorted(columns["patch"], patch)
    return columns[key][start + row]


def _join(parts: Sequence[Columns]) -> Columns:
    """Columns of all patches, with ``patch``, the number of each row's patch."""
    keys = parts[0].keys()
    out = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    length = [len(next(iter(part.values()))) for part in parts]
    out["patch"] = np.repeat(np.arange(len(parts)), length)
    return out


def compare_entrants(
    patches: Sequence[Patch], entrants: Sequence[Sequence[Entrant]], radius: float = MATCH_RADIUS
) -> Comparison:
    """Compare deblenders.

    Parameters
    ----------
    patches : sequence of `Patch`
        The patches, all in the same bands, all with truth or none.
    entrants : sequence of sequences of `Entrant`
        Of each deblender one for every patch.
    radius : `float`, optional
        Largest distance of matched objects, pixel.

    Returns
    -------
    comparison : `Comparison`

    Raises
    ------
    ValueError
        Raised when there are fewer than two entrants or two of one name, or patches differ in their bands or
        in whether they have truth.
    """
    names = [own[0].name for own in entrants]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"A comparison needs two or more entrants with names of their own, not {names}.")
    return _measure(patches, entrants, radius)


def score_entrant(
    patches: Sequence[Patch], entrant: Sequence[Entrant], radius: float = MATCH_RADIUS
) -> Comparison:
    """Measure one deblender alone; arguments and errors as of `compare_entrants`, and there are no pairs."""
    return _measure(patches, [entrant], radius)


def _measure(patches: Sequence[Patch], entrants: Sequence[Sequence[Entrant]], radius: float) -> Comparison:
    names = [own[0].name for own in entrants]
    bands = patches[0].scene.bands
    if any(patch.scene.bands != bands for patch in patches):
        raise ValueError("The patches have different bands.")
    known = [patch.truth is not None for patch in patches]
    if any(known) and not all(known):
        raise ValueError("Some patches have truth and others have none.")

    # Patch by patch, so that the images of one patch at a time are in memory.
    count = len(entrants)
    measured: list[list[Columns]] = [[] for _ in range(count)]
    compared: list[list[tuple[Matches, Columns]]] = [[] for _ in entrant_pairs(count)]
    judged: list[list[tuple[Matches, Columns]]] = [[] for _ in range(count)]
    properties: list[Columns] = []
    for number, patch in enumerate(patches):
        lights = [Light(own[number], patch) for own in entrants]
        for k, light in enumerate(lights):
            measured[k].append(measure_objects(light))
        for p, (i, j) in enumerate(entrant_pairs(count)):
            compared[p].append(measure_pairs(lights[i], lights[j], radius))
        if patch.truth is not None:
            place = {"x": patch.truth.x, "y": patch.truth.y, "row": np.arange(len(patch.truth))}
            properties.append({**true_properties(patch, patch.truth), **place})
            for k, light in enumerate(lights):
                judged[k].append(measure_truth(light, patch.truth, properties[-1], radius))
    objects = [_join(parts) for parts in measured]
    costs = []
    for own, columns in zip(entrants, objects, strict=True):
        n_objects = len(columns["x"])
        bright = columns["chi2"][columns["snr"] > SNR_LIMIT]
        costs.append(
            {
                "objects": n_objects,
                "seconds": sum(e.seconds for e in own) / n_objects if n_objects else np.nan,
                "bytes": sum(e.n_bytes for e in own) / n_objects if n_objects else np.nan,
                "chi2": with_error(median, bright),
                "n_models": int(np.isfinite(bright).sum()),
            }
        )
    pairs = [_pair(i, j, found, bands) for (i, j), found in zip(entrant_pairs(count), compared, strict=True)]
    true: Columns | None = None
    errors: list[Columns] = []
    fates: list[dict[str, int | None]] = []
    coverages: list[dict[str, Any]] = []
    verdicts: dict[str, tuple[int, list[Verdict]]] = {}
    if all(known):
        true = _join(properties)
        for number, own in enumerate(entrants):
            columns = _join([c for _, c in judged[number]])
            counts: dict[str, int | None] = {**_counts([m for m, _ in judged[number]])}
            if own[0].truth_row is not None:
                counts |= {"split": None, "added": None}
            errors.append(columns)
            fates.append(counts)
            bright = true["snr"] > SNR_LIMIT
            for b, band in enumerate(bands):
                if np.isfinite(columns["pull"][bright, b]).any():
                    coverages.append(
                        {"entrant": number, "band": band, **coverage(columns["pull"][bright, b])}
                    )
        verdicts = truth_verdicts(true, errors)
    return Comparison(
        names,
        bands,
        [patch.name for patch in patches],
        objects,
        pairs,
        costs,
        true,
        errors,
        fates,
        verdicts,
        coverages,
        radius,
    )


def _counts(matches: Sequence[Matches]) -> dict[str, int]:
    counts = {"matched": sum(len(m.first) for m in matches)}
    for key in ("merged", "missed", "split", "added"):
        counts[key] = sum(len(getattr(m, key)) for m in matches)
    return counts


def _pair(i: int, j: int, measured: Sequence[tuple[Matches, Columns]], bands: Sequence[str]) -> Pair:
    parts, lonely = [], []
    for found, columns in measured:
        parts.append({**columns, "first": found.first, "second": found.second})
        rows = (found.merged, found.missed, found.split, found.added)
        sizes = [len(r) for r in rows]
        lonely.append(
            {
                "row": np.concatenate(rows),
                "side": np.repeat([0, 0, 1, 1], sizes),
                "beside": np.repeat([True, False, True, False], sizes),
            }
        )
    columns = _join(parts)
    bright = columns["snr"] > SNR_LIMIT
    colour = " - ".join(bands[k] for k in colour_bands(tuple(bands)))
    differences = difference_table({key: value[bright] for key, value in columns.items()}, bands, colour)
    return Pair(i, j, columns, _join(lonely), _counts([m for m, _ in measured]), differences)
