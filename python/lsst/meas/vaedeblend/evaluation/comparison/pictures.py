# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plots of a comparison, and colour cut-outs of single objects, as PNG files in memory."""

from __future__ import annotations

__all__ = ["COLOURS", "Cutouts", "Plot", "plots"]

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..figures import colour, new_figure, residual_map
from ..metrics import SNR_LIMIT, sigma_percentiles
from .entrants import Entrant, Stamp
from .patches import Patch
from .result import Comparison, _pick
from .statistics import completeness

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colours of the entrants, to be told apart whatever one's eyes (Okabe & Ito 2008)."""

_MARKERS = "osD^v*"
_STYLES = ("-", "--", "-.", ":", "-", "--")

HALF = 32
"""Half the width of cut-outs, pixel."""

_MIN_COUNT = 5
"""Objects that a bin of a running median must have."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture with its title, a sentence that says what it shows, and the bytes of a PNG file."""

    title: str
    text: str
    png: bytes


def _plain(name: str) -> str:
    """A name that matplotlib neither hides nor takes for mathematics."""
    return name.replace("\\", "/").replace("$", r"\$").lstrip("_") or "?"


def _draw(title: str, text: str, draw: Callable[[Axes], None]) -> Plot:
    figure = new_figure(4.8, 3.7)
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.25, linewidth=0.5)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120)
    return Plot(title, text, stream.getvalue())


def plots(comparison: Comparison) -> list[Plot]:
    """Draw the plots that a comparison allows: against the truth, where it is known, and of the first two
    entrants against each other."""
    out = []
    if comparison.true is not None:
        out += _truth_plots(comparison)
    return out + _pair_plots(comparison)


def _legend(axes: Axes, left: bool = False) -> None:
    """A legend, where there is anything to name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="upper left" if left else "best")


def _log_axis(axes: Axes, edges: NDArray) -> None:
    """A logarithmic x axis over some bins, with plain numbers, few enough not to touch."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(0.9 * edges[0], 1.1 * edges[-1])
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _edges(values: NDArray, count: int, log: bool) -> NDArray:
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return np.array([0.1, 1.0])
    low, high = np.percentile(values, [1, 99])
    high = max(high, low + 1e-6 + 1e-6 * abs(low))
    return np.geomspace(low, high, count + 1) if log else np.linspace(low, high, count + 1)


def _running(axes: Axes, x: NDArray, y: NDArray, edges: NDArray, k: int, name: str) -> None:
    """A running median with the band that holds 68 percent."""
    _, percentiles = sigma_percentiles(x, y, edges, _MIN_COUNT)
    centre = 0.5 * (edges[1:] + edges[:-1])
    tone = COLOURS[k % len(COLOURS)]
    axes.plot(
        centre,
        percentiles[:, 2],
        color=tone,
        linestyle=_STYLES[k % len(_STYLES)],
        marker=_MARKERS[k % len(_MARKERS)],
        markersize=4,
        label=_plain(name),
    )
    axes.fill_between(centre, percentiles[:, 1], percentiles[:, 3], color=tone, alpha=0.15, linewidth=0)


def _truth_plots(comparison: Comparison) -> list[Plot]:
    true, band, names = comparison.true, comparison.band, comparison.names
    assert true is not None
    bright = true["snr"] > SNR_LIMIT
    axes_of: dict[str, tuple[str, bool]] = {
        "snr": (f"true S/N in {band}", True),
        "mag": (f"true {band} magnitude", False),
        "blendedness": ("true blendedness", False),
        "separation": ("distance to the nearest true object [pixel]", True),
    }
    out = []
    for key, what in (
        ("flux", "flux of the model"),
        ("redistributed", "aperture flux of the redistributed image"),
    ):
        for by in ("snr", "blendedness"):
            label, log = axes_of[by]
            use = np.ones(len(bright), bool) if by == "snr" else bright

            def running(axes: Axes, key=key, by=by, label=label, log=log, use=use) -> None:
                edges = _edges(true[by][use], 6, log)
                for k, (name, error) in enumerate(zip(names, comparison.errors, strict=True)):
                    _running(axes, true[by][use], error[key][use], edges, k, name)
                axes.axhline(0, color="0.3", linewidth=0.8)
                axes.set(xlabel=label, ylabel="measured / true - 1", ylim=(-1, 1.5))
                if log:
                    _log_axis(axes, edges)
                _legend(axes)

            sample = "all objects found" if by == "snr" else f"objects found, S/N above {SNR_LIMIT:g}"
            out.append(
                _draw(
                    f"Error of the {what}, {band}",
                    f"Running median and the band that holds 68 percent, by {label}; {sample}.",
                    running,
                )
            )
    for by, (label, log) in axes_of.items():

        def complete(axes: Axes, by=by, label=label, log=log) -> None:
            edges = _edges(true[by], 6, log)
            # Objects beyond the edges belong to the outermost bins.
            values = np.clip(true[by], edges[0], edges[-1] * (1 - 1e-9))
            centre = np.sqrt(edges[1:] * edges[:-1]) if log else 0.5 * (edges[1:] + edges[:-1])
            for k, (name, error) in enumerate(zip(names, comparison.errors, strict=True)):
                _bars(axes, centre, values, error["row"] >= 0, edges, k, name)
            axes.set(xlabel=label, ylabel="completeness", ylim=(-0.03, 1.05))
            if log:
                _log_axis(axes, edges)
            _legend(axes)

        out.append(
            _draw(
                f"Completeness by {label}",
                f"Share of all true objects that have a match within {comparison.radius:g} pixels, with its "
                "68 percent interval. Who started from the true centres finds all by construction.",
                complete,
            )
        )
    out += _purity_plots(comparison)
    for key, label, lower, upper in (
        ("colour", f"error of {comparison.colour} [mag]", -1.0, 1.0),
        ("e", "error of the ellipticity, both components", -0.6, 0.6),
        ("cosine", "cosine with the true image", 0.7, 1.0),
    ):

        def histogram(axes: Axes, key=key, label=label, lower=lower, upper=upper) -> None:
            for k, (name, error) in enumerate(zip(names, comparison.errors, strict=True)):
                values = error[key][bright].ravel()
                values = np.clip(values[np.isfinite(values)], lower, upper)
                if not len(values):
                    continue
                axes.hist(
                    values,
                    np.linspace(lower, upper, 41).tolist(),
                    histtype="step",
                    linewidth=1.4,
                    density=True,
                    color=COLOURS[k % len(COLOURS)],
                    linestyle=_STYLES[k % len(_STYLES)],
                    label=_plain(name),
                )
            axes.set(xlabel=label, ylabel="density")
            _legend(axes, left=True)

        text = f"Objects found with S/N above {SNR_LIMIT:g}; the outermost bins hold what lies beyond."
        out.append(_draw(f"Distribution: {label}", text, histogram))
    with_pulls = [
        (k, name) for k, name in enumerate(names) if np.isfinite(comparison.errors[k]["pull"][bright]).any()
    ]
    if with_pulls:

        def pulls(axes: Axes) -> None:
            grid = np.linspace(-5, 5, 201)
            axes.plot(grid, np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi), color="0.3", label="Gaussian")
            for k, name in with_pulls:
                values = comparison.errors[k]["pull"][bright].ravel()
                values = np.clip(values[np.isfinite(values)], -5, 5)
                axes.hist(
                    values,
                    np.linspace(-5, 5, 41).tolist(),
                    histtype="step",
                    linewidth=1.4,
                    density=True,
                    color=COLOURS[k % len(COLOURS)],
                    label=_plain(name),
                )
            axes.set(xlabel="(flux - true flux) / its error", ylabel="density")
            _legend(axes, left=True)

        text = f"All bands, S/N above {SNR_LIMIT:g}; the outermost bins hold what lies beyond."
        out.append(_draw("Pulls of the fluxes", text, pulls))
    return out


def _bars(
    axes: Axes, centre: NDArray, values: NDArray, hit: NDArray, edges: NDArray, k: int, name: str
) -> None:
    _, share, interval = completeness(values, hit, edges)
    good = np.isfinite(share)
    # Side by side, as those that find everything would hide each other.
    beside = centre + 0.06 * k * np.diff(edges)
    axes.errorbar(
        beside[good],
        share[good],
        np.maximum(np.abs(interval[:, good] - share[good]), 0),
        color=COLOURS[k % len(COLOURS)],
        marker=_MARKERS[k % len(_MARKERS)],
        linestyle=_STYLES[k % len(_STYLES)],
        markersize=4,
        capsize=2,
        label=_plain(name),
    )


def _purity_plots(comparison: Comparison) -> list[Plot]:
    """Share of an entrant's objects that are true ones, by what the entrant itself measured."""
    band = comparison.band
    judged = [k for k, fate in enumerate(comparison.fates) if fate["added"] is not None]
    out = []
    for by, label, log in (
        ("mag", f"measured {band} magnitude", False),
        ("snr", f"measured S/N in {band}", True),
        ("deblend_blendedness", "measured blendedness", False),
        ("separation", "distance to its nearest other object [pixel]", True),
    ):
        if not judged:
            break

        def purity(axes: Axes, by=by, label=label, log=log) -> None:
            every = np.concatenate([comparison.objects[k][by] for k in judged])
            edges = _edges(every, 6, log)
            centre = np.sqrt(edges[1:] * edges[:-1]) if log else 0.5 * (edges[1:] + edges[:-1])
            for k in judged:
                columns, hit = comparison.objects[k], _is_true(comparison, k)
                known = np.isfinite(columns[by])
                values = np.clip(columns[by][known], edges[0], edges[-1] * (1 - 1e-9))
                _bars(axes, centre, values, hit[known], edges, k, comparison.names[k])
            axes.set(xlabel=label, ylabel="purity", ylim=(-0.03, 1.05))
            if log:
                _log_axis(axes, edges)
            _legend(axes)

        out.append(
            _draw(
                f"Purity by {label}",
                "Share of a deblender's objects that match a true one of any brightness, with its 68 percent "
                "interval. Who started from the true centres is not shown.",
                purity,
            )
        )
    return out


def _is_true(comparison: Comparison, k: int) -> NDArray[np.bool_]:
    """Whether each object of an entrant matches a true one."""
    assert comparison.true is not None
    columns, rows = comparison.objects[k], comparison.errors[k]["row"]
    hit = np.zeros(len(columns["x"]), bool)
    found = rows >= 0
    start = np.searchsorted(columns["patch"], comparison.true["patch"][found])
    hit[start + rows[found]] = True
    return hit


def _pair_plots(comparison: Comparison) -> list[Plot]:
    """The first two entrants, object by object."""
    pair = comparison.pairs[0]
    c, band = pair.columns, comparison.band
    b = comparison.bands.index(band)
    first, second = (_plain(comparison.names[k]) for k in (pair.first, pair.second))
    n = len(c["snr"])
    if not n:
        return []
    mag, tone = c["mag"], COLOURS[0]
    plain = [comparison.names[k] for k in (pair.first, pair.second)]

    def scatter(axes: Axes, x: NDArray, y: NDArray, limits: tuple[float, float]) -> None:
        inside = np.clip(y, *limits)
        axes.plot(x, inside, ".", color="0.55", markersize=3)
        _running(axes, x, y, _edges(x, 7, False), 0, "median")
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_ylim(limits[0] * 1.04, limits[1] * 1.04)

    def fluxes(axes: Axes) -> None:
        scatter(axes, mag, c["flux"][:, b], (-1.0, 2.0))
        axes.set(xlabel=f"{band} magnitude of {first}", ylabel=f"flux of {second} / {first} - 1")

    def shared(axes: Axes) -> None:
        scatter(axes, mag, c["redistributed"][:, b], (-1.0, 2.0))
        axes.set(xlabel=f"{band} magnitude of {first}", ylabel=f"aperture flux of {second} / {first} - 1")

    def colours(axes: Axes) -> None:
        scatter(axes, mag, c["colour"], (-1.5, 1.5))
        axes.set(xlabel=f"{band} magnitude of {first}", ylabel=f"{comparison.colour}, {second} minus {first}")

    def overlaps(axes: Axes) -> None:
        blended = _pick(comparison.objects[pair.first], c["patch"], c["first"], "deblend_blendedness")
        axes.plot(blended, c["overlap"], ".", color=tone, markersize=4)
        axes.set(xlabel=f"blendedness by {first}", ylabel="overlap of the two images")

    def residuals(axes: Axes) -> None:
        chi2 = [
            _pick(comparison.objects[k], c["patch"], c[side], "chi2")
            for k, side in ((pair.first, "first"), (pair.second, "second"))
        ]
        axes.loglog(*chi2, ".", color=tone, markersize=4)
        low, high = np.nanmin(chi2), np.nanmax(chi2)
        axes.plot([low, high], [low, high], color="0.3", linewidth=0.8)
        axes.set(xlabel=f"mean chi-square, {first}", ylabel=f"mean chi-square, {second}")

    text = f"{n} objects that both have; points beyond the axes are drawn at their ends."
    drawn = [
        _draw(f"Fluxes of {plain[1]} and {plain[0]}, {band}", text, fluxes),
        _draw(f"Aperture fluxes of the redistributed image, {band}", text, shared),
        _draw("Colours", text, colours),
        _draw("Overlap of the images", f"{n} objects that both have, cosine of their images.", overlaps),
    ]
    both = np.isfinite(_pick(comparison.objects[pair.first], c["patch"], c["first"], "chi2"))
    both &= np.isfinite(_pick(comparison.objects[pair.second], c["patch"], c["second"], "chi2"))
    if both.any():
        text = "Mean of squared residual over variance in the aperture of each object; the line is equality."
        drawn.append(_draw("Residuals", text, residuals))
    return drawn


class Cutouts:
    """Colour cut-outs of objects on one square.

    Parameters
    ----------
    patches : sequence of `Patch`
        The patches.
    entrants : sequence of sequences of `Entrant`
        Of each deblender one for every patch.
    """

    def __init__(self, patches: Sequence[Patch], entrants: Sequence[Sequence[Entrant]]) -> None:
        self._patches, self._entrants = patches, entrants
        self._totals: dict[tuple[int, int], NDArray[np.float32]] = {}

    def _total(self, k: int, patch: int) -> NDArray[np.float32]:
        if (k, patch) not in self._totals:
            self._totals[k, patch] = self._entrants[k][patch].total(self._patches[patch].scene.shape)
        return self._totals[k, patch]

    def panels(
        self, patch: int, x: float, y: float, rows: Sequence[int], truth_row: int
    ) -> list[tuple[str, bytes]]:
        """Draw one object.

        Parameters
        ----------
        patch : `int`
            Number of the patch.
        x, y : `float`
            Middle of the square, scene coordinates.
        rows : sequence of `int`
            The object's row of each entrant, -1 for one that does not have it.
        truth_row : `int`
            Its row of the truth, or -1.

        Returns
        -------
        panels : `list` [`tuple` [`str`, `bytes`]]
            Titles and PNG files: the coadd, the same faded to put marks on, the truth, each entrant's image
            of the object, and each entrant's residual, the coadd minus all its objects.
        """
        place = self._patches[patch]
        scene = place.scene
        box = (round(y) - HALF, round(x) - HALF, 2 * HALF + 1, 2 * HALF + 1)

        # A band without a valid pixel has no noise and shows nothing.
        known = scene.noise[np.isfinite(scene.noise)]
        noise = np.nan_to_num(scene.noise, nan=float(known.mean()) if len(known) else 1.0)

        def rgb(pixels: NDArray) -> bytes:
            return _png(colour(pixels, scene.bands, noise))

        image = Stamp(scene.image, 0, 0).on(*box)
        faded = (0.6 * colour(image, scene.bands, noise)).astype(np.uint8)
        panels = [("coadd", rgb(image)), ("objects", _png(faded))]
        if truth_row >= 0 and place.truth is not None:
            t = place.truth
            stamp = Stamp(t.stamp[truth_row], int(t.stamp_y0[truth_row]), int(t.stamp_x0[truth_row]))
            panels.append(("truth", rgb(stamp.on(*box))))
        for own, row in zip(self._entrants, rows, strict=True):
            if row >= 0:
                panels.append((own[patch].name, rgb(own[patch].stamp(row).on(*box))))
            else:
                panels.append((f"{own[patch].name}: none", rgb(np.zeros_like(image))))
        variance = Stamp(scene.variance, 0, 0).on(*box)
        valid = Stamp(scene.weight, 0, 0).on(*box) > 0
        for k, own in enumerate(self._entrants):
            left = image - Stamp(self._total(k, patch), 0, 0).on(*box)
            panels.append((f"residual of {own[patch].name}", _sigma_png(left, variance, valid)))
        return panels

    def marks(self, patch: int, x: float, y: float) -> list[tuple[int, NDArray]]:
        """Positions on the square (pixels from its upper left corner, y down), (K, 2), of the objects of each
        entrant by its number, and of the true ones as number -1."""
        place = self._patches[patch]
        lists: list[tuple[int, Any, Any]] = [
            (k, own[patch].x, own[patch].y) for k, own in enumerate(self._entrants)
        ]
        if place.truth is not None:
            lists.append((-1, place.truth.x, place.truth.y))
        out = []
        for k, px, py in lists:
            at = np.column_stack([px - round(x) + HALF + 0.5, HALF + 0.5 - (py - round(y))])
            inside = ((at >= 0) & (at <= 2 * HALF + 1)).all(axis=1)
            out.append((k, at[inside]))
        return out


def _png(rgb: NDArray[np.uint8]) -> bytes:
    """A PNG file with y upwards."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, np.ascontiguousarray(rgb[::-1]), format="png")
    return stream.getvalue()


def _sigma_png(residual: NDArray, variance: NDArray, valid: NDArray) -> bytes:
    from matplotlib import colormaps

    sigma = residual_map(residual, np.where(valid, variance, 1.0), valid)
    tone = colormaps["RdBu_r"](np.nan_to_num(np.clip(sigma / 10 + 0.5, 0, 1), nan=0.5))[..., :3]
    tone[~np.isfinite(sigma)] = 0.6
    return _png((255 * tone).astype(np.uint8))
