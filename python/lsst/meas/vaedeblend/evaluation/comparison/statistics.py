# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers over many objects, with errors, and the verdicts that they allow."""

from __future__ import annotations

__all__ = [
    "CLASSES",
    "QUANTITIES",
    "Quantity",
    "Verdict",
    "completeness",
    "coverage",
    "difference_table",
    "median",
    "spread",
    "truth_verdicts",
]

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import SNR_LIMIT

CAP = 5.0
"""Relative errors count as no larger than this in means, lest one object be all that a mean says."""

MIN_COUNT = 10
"""Objects that a class must have for statistics about it, and two entrants in common for a verdict."""

SIGNIFICANT = 2.0
"""Differences larger than this many standard errors are called differences."""

REPEATS = 200
SEED = 1


def median(values: NDArray) -> float:
    """Median of a one-dimensional array, much faster on short ones than `numpy.median`; NaN of none, or
    where there is one."""
    n = len(values)
    if not n:
        return np.nan
    ordered = np.sort(values)
    return np.nan if np.isnan(ordered[-1]) else float(0.5 * (ordered[(n - 1) // 2] + ordered[n // 2]))


def spread(values: NDArray) -> float:
    """NMAD as `lsst.meas.vaedeblend.ground.statistics.nmad`, with the median above."""
    return 1.4826 * median(np.abs(values - median(values)))


def _capped(values: NDArray) -> float:
    return float(np.mean(np.minimum(np.abs(values), CAP)))


def _shapes(rows: Mapping[str, NDArray]) -> tuple[NDArray, NDArray, NDArray]:
    """True ellipticities and errors of usable shapes, one component after the other, and which are usable."""
    true, error = rows["true_e"], rows["e"]
    usable = np.isfinite(error).all(axis=1) & np.isfinite(true).all(axis=1)
    usable &= (np.hypot(*true.T) < 0.9) & (np.hypot(*error.T) < 1)
    return true[usable].T.ravel(), error[usable].T.ravel(), usable


def _m(rows: Mapping[str, NDArray]) -> float:
    true, error = rows["shape_true"], rows["shape_error"]
    if len(true) < 4:
        return np.nan
    x = true - true.mean()
    return float((x * error).sum() / (x**2).sum())


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number about a sample of found objects.

    Parameters
    ----------
    name : `str`
        Its name in files.
    label : `str`
        Its name in the report.
    value : callable
        Takes the columns of `measure_truth` of found objects, and ``shape_true``, ``shape_error`` and
        ``shape_usable`` (see `_shapes`), gives the number.
    larger : `bool`, optional
        Whether larger is better; otherwise what is nearer to 0 is.
    """

    name: str
    label: str
    value: Callable[[Mapping[str, NDArray]], float]
    larger: bool = False

    def badness(self, value: float) -> float:
        """Give a number that is smaller where the value is better."""
        return -value if self.larger else abs(value)


QUANTITIES = (
    Quantity("flux_meanabs", "flux error, mean of absolute", lambda r: _capped(r["flux"])),
    Quantity("flux_median", "flux error, median", lambda r: median(r["flux"])),
    Quantity("flux_nmad", "flux error, NMAD", lambda r: spread(r["flux"])),
    Quantity(
        "flux_off_by_half", "flux off by more than a half", lambda r: float(np.mean(np.abs(r["flux"]) > 0.5))
    ),
    Quantity("ap_meanabs", "aperture flux, model, mean of absolute", lambda r: _capped(r["aperture"])),
    Quantity("ap_median", "aperture flux, model, median", lambda r: median(r["aperture"])),
    Quantity("ap_nmad", "aperture flux, model, NMAD", lambda r: spread(r["aperture"])),
    Quantity(
        "redistributed_meanabs",
        "aperture flux, redistributed, mean of absolute",
        lambda r: _capped(r["redistributed"]),
    ),
    Quantity(
        "redistributed_median",
        "aperture flux, redistributed, median",
        lambda r: median(r["redistributed"]),
    ),
    Quantity(
        "redistributed_nmad",
        "aperture flux, redistributed, NMAD",
        lambda r: spread(r["redistributed"]),
    ),
    Quantity("gr_nmad", "colour error, NMAD [mag]", lambda r: spread(r["colour"])),
    Quantity("cos_mean", "cosine with the true image, mean", lambda r: float(np.mean(r["cosine"])), True),
    Quantity(
        "cos_p10",
        "cosine with the true image, tenth percentile",
        lambda r: float(np.percentile(r["cosine"], 10)),
        True,
    ),
    Quantity("shift_median", "shift of the centroid, median [pixel]", lambda r: _finite_median(r["shift"])),
    Quantity("de_median", "ellipticity error, median", lambda r: _finite_median(r["shape_error"])),
    Quantity("de_nmad", "ellipticity error, NMAD", lambda r: spread(r["shape_error"])),
    Quantity("m", "multiplicative bias m of ellipticity", _m),
    Quantity("shape_ok", "share with a usable shape", lambda r: float(r["shape_usable"].mean()), True),
)
"""Definitions are those of the fields' benchmark: relative errors in the reference band, on true stamps."""


def _finite_median(values: NDArray) -> float:
    values = values[np.isfinite(values)]
    return median(values)


CLASSES: dict[str, tuple[str, Callable[[Mapping[str, NDArray]], NDArray[np.bool_]]]] = {
    "all": (f"S/N above {SNR_LIMIT:g}", lambda t: t["snr"] > SNR_LIMIT),
    "blended": (
        "S/N above 10, blendedness above 0.01",
        lambda t: (t["snr"] > SNR_LIMIT) & (t["blendedness"] > 0.01),
    ),
    "heavy": (
        "S/N above 10, blendedness above 0.2",
        lambda t: (t["snr"] > SNR_LIMIT) & (t["blendedness"] > 0.2),
    ),
    "faint": ("S/N between 5 and 10", lambda t: (t["snr"] > 5) & (t["snr"] <= SNR_LIMIT)),
    "stars": ("stars, S/N above 10", lambda t: (t["snr"] > SNR_LIMIT) & t["star"]),
    "galaxies": ("galaxies, S/N above 10", lambda t: (t["snr"] > SNR_LIMIT) & ~t["star"]),
    "large": (
        "half-light radius above 1 arcsec, S/N above 10",
        lambda t: (t["snr"] > SNR_LIMIT) & t["large"],
    ),
}
"""Name to label and selection of true objects, S/N for an optimal filter in the reference band."""


@dataclasses.dataclass
class Verdict:
    """One quantity of all entrants over one class.

    Parameters
    ----------
    quantity, label : `str`
        Name and label of the quantity.
    value, error : `list` [`float`]
        Of each entrant, over the objects that it found, with the standard error.
    pairs : `list` [`dict`]
        Of each pair of entrants: rows ``first`` and ``second``, number ``n`` of objects that both found, and
        over these by how much the second is worse, ``difference``, with its standard error ``error`` from
        the same bootstrap samples; ``better`` is ``first``, ``second``, or empty where the difference is not
        significant, or not known.
    """

    quantity: str
    label: str
    value: list[float]
    error: list[float]
    pairs: list[dict[str, Any]]


def decide(difference: float, error: float) -> str:
    """Say which of two is better from how much the second is worse, and its error."""
    if not (np.isfinite(difference) and np.isfinite(error)) or abs(difference) <= SIGNIFICANT * error:
        return ""
    return "first" if difference > 0 else "second"


def entrant_pairs(count: int) -> list[tuple[int, int]]:
    """All pairs of up to four entrants; of more, those with the first."""
    if count <= 4:
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    return [(0, j) for j in range(1, count)]


def truth_verdicts(
    true: Mapping[str, NDArray], entrants: Sequence[Mapping[str, NDArray]], repeats: int = REPEATS
) -> dict[str, tuple[int, list[Verdict]]]:
    """Compare entrants by their errors against the truth.

    Parameters
    ----------
    true : mapping of `str` to `numpy.ndarray`
        Columns of `true_properties` of all patches.
    entrants : sequence of mappings
        Columns of `measure_truth` of each entrant, rows as in ``true``.
    repeats : `int`, optional
        Bootstrap samples.

    Returns
    -------
    verdicts : `dict` [`str`, `tuple`]
        By class: the number of true objects, and the verdicts. Classes of fewer than `MIN_COUNT` are absent.

    Notes
    -----
    Errors are standard deviations over bootstrap samples of the true objects. Objects count as independent,
    which members of one blend are not quite.
    """
    columns = [{**rows, "true_e": true["e"]} for rows in entrants]
    pairs = entrant_pairs(len(entrants))
    out = {}
    for name, (_, select) in CLASSES.items():
        rows = np.flatnonzero(select(true))
        if len(rows) < MIN_COUNT:
            continue

        def values(sample: NDArray) -> NDArray[np.float64]:
            found = [c["found"][sample] for c in columns]
            parts = [_quantities(c, sample[f]) for c, f in zip(columns, found, strict=True)]
            vector = [np.r_[f.mean(), part] for f, part in zip(found, parts, strict=True)]
            for i, j in pairs:
                both = sample[found[i] & found[j]]
                a, b = _quantities(columns[i], both), _quantities(columns[j], both)
                worse = [q.badness(y) - q.badness(x) for q, x, y in zip(QUANTITIES, a, b, strict=True)]
                vector.append(np.r_[found[i].mean() - found[j].mean(), worse])
            return np.array(vector)

        rng = np.random.default_rng(SEED)
        best = values(rows)
        draws = np.array([values(rng.choice(rows, len(rows))) for _ in range(repeats)])
        error = draws.std(axis=0, ddof=1)
        verdicts = []
        labels = [("found", "found"), *((q.name, q.label) for q in QUANTITIES)]
        k = len(entrants)
        for column, (quantity, label) in enumerate(labels):
            made = []
            for p, (i, j) in enumerate(pairs):
                both = int((columns[i]["found"] & columns[j]["found"])[rows].sum())
                n = len(rows) if quantity == "found" else both
                difference, sigma = float(best[k + p, column]), float(error[k + p, column])
                made.append(
                    {
                        "first": i,
                        "second": j,
                        "n": n,
                        "difference": difference,
                        "error": sigma,
                        "better": decide(difference, sigma) if n >= MIN_COUNT else "",
                    }
                )
            verdicts.append(
                Verdict(quantity, label, best[:k, column].tolist(), error[:k, column].tolist(), made)
            )
        out[name] = (len(rows), verdicts)
    return out


def _quantities(columns: Mapping[str, NDArray], rows: NDArray) -> NDArray[np.float64]:
    if len(rows) < 2:
        return np.full(len(QUANTITIES), np.nan)
    picked = {key: columns[key][rows] for key in _USED}
    picked["shape_true"], picked["shape_error"], picked["shape_usable"] = _shapes(picked)
    return np.array([quantity.value(picked) for quantity in QUANTITIES])


_USED = ("flux", "aperture", "redistributed", "colour", "cosine", "shift", "e", "true_e")


def with_error(
    value: Callable[[NDArray], float], values: NDArray, repeats: int = REPEATS
) -> tuple[float, float]:
    """Give a statistic of finite values with its bootstrap error; NaN of fewer than two."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(value(values)) if len(values) else np.nan), np.nan
    rng = np.random.default_rng(SEED)
    draws = [value(values[rng.integers(0, len(values), len(values))]) for _ in range(repeats)]
    return float(value(values)), float(np.std(draws, ddof=1))


def difference_table(pairs: Mapping[str, NDArray], bands: Sequence[str], colour: str) -> list[dict[str, Any]]:
    """Sum up how two entrants' matched objects differ.

    Parameters
    ----------
    pairs : mapping of `str` to `numpy.ndarray`
        Columns of `measure_pairs` of all patches, of the objects in question.
    bands : sequence of `str`
        Bands.
    colour : `str`
        Name of the colour compared.

    Returns
    -------
    rows : `list` [`dict`]
        With ``what``, ``n``, and ``median``, ``nmad`` and, for relative differences, ``off_by_half``, each a
        value with its bootstrap error.
    """
    rows: list[dict[str, Any]] = []

    def add(what: str, values: NDArray, relative: bool) -> None:
        finite = values[np.isfinite(values)]
        row = {
            "what": what,
            "n": len(finite),
            "median": with_error(median, finite),
            "nmad": with_error(spread, finite),
        }
        if relative:
            row["off_by_half"] = with_error(lambda v: float(np.mean(np.abs(v) > 0.5)), finite)
        rows.append(row)

    for key, what in (
        ("flux", "flux"),
        ("aperture", "aperture flux of the images"),
        ("redistributed", "aperture flux of the redistributed coadd"),
    ):
        for i, band in enumerate(bands):
            add(f"{what} in {band}, ratio - 1", pairs[key][:, i], True)
    add(f"{colour}, difference [mag]", pairs["colour"], False)
    add("overlap (cosine) of the images", pairs["overlap"], False)
    add("shift of the position [pixel]", pairs["shift"], False)
    return rows


def completeness(
    values: NDArray, hit: NDArray[np.bool_], edges: NDArray
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Share of hits in bins.

    Parameters
    ----------
    values : `numpy.ndarray`, (N,)
        What to bin by.
    hit : `numpy.ndarray`, (N,)
        Whether an object is found (completeness), or is a true one (purity).
    edges : `numpy.ndarray`, (K + 1,)
        Edges of the bins, ascending; the lower ones belong to their bins.

    Returns
    -------
    count : `numpy.ndarray`, (K,)
        Objects in each bin.
    share : `numpy.ndarray`, (K,)
        The share; NaN in empty bins.
    interval : `numpy.ndarray`, (2, K)
        Its 68 percent interval (Wilson 1927, JASA 22, 209).
    """
    from astropy.stats import binom_conf_interval

    place = np.digitize(values, edges) - 1
    count = np.array([(place == k).sum() for k in range(len(edges) - 1)])
    hits = np.array([hit[place == k].sum() for k in range(len(edges) - 1)])
    share, interval = np.full(len(count), np.nan), np.full((2, len(count)), np.nan)
    full = count > 0
    share[full] = hits[full] / count[full]
    if full.any():
        interval[:, full] = binom_conf_interval(hits[full], count[full], interval="wilson")
    return count, share, interval


def coverage(pull: NDArray) -> dict[str, Any]:
    """Say whether errors mean what they say: ``n``, median and NMAD of the pulls, and the share within one
    standard deviation, which should be 0 and 1, and 0.68; each with its bootstrap error."""
    finite = pull[np.isfinite(pull)]
    return {
        "n": len(finite),
        "median": with_error(median, finite),
        "nmad": with_error(spread, finite),
        "inside": with_error(lambda v: float(np.mean(np.abs(v) < 1)), finite),
    }
