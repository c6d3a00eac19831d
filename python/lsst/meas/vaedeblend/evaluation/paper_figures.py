# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The figures of Arcelin et al. (2020), with its axes."""

from __future__ import annotations

__all__ = [
    "Axis",
    "AXES",
    "calibration",
    "distributions",
    "error_panels",
    "examples",
    "latent_corner",
    "posterior",
    "prior_shapes",
    "shear_bias_curves",
    "transfer_examples",
]

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..simulation.config import BETA
from .figures import new_figure
from .metrics import ShearBias, sigma_percentiles
from .paper_sample import PaperSample

COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple")
MIN_COUNT = 20
"""Objects that a bin must have to be shown or to count."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A quantity of `PaperSample` against which errors are shown: its name, label, bin edges and scale."""

    name: str
    label: str
    edges: NDArray
    log: bool = False

    def __hash__(self) -> int:
        return hash(self.name)


AXES = {
    axis.name: axis
    for axis in (
        Axis("snr", "S/N", np.geomspace(10, 3000, 11), log=True),
        Axis("mag", "r magnitude", np.linspace(20, 27, 11)),
        Axis("mag_difference", "magnitude difference with the closest galaxy", np.linspace(0, 5, 11)),
        Axis("b_closest", "blendedness with the closest neighbour", np.linspace(0, 1, 11)),
        Axis("b_total", "total blendedness", np.linspace(0, 1, 11)),
        Axis("ellipticity", "|e|", np.linspace(0, 0.8, 11)),
    )
}

_ERRORS = {"shape": "error of |e|", "mag": "error of r magnitude"}


def _error(sample: PaperSample, network: str, kind: str) -> NDArray:
    return sample.shape_error(network) if kind == "shape" else sample.mag_error(network)


def _boxes(axes, axis: Axis, curves: Sequence[tuple[NDArray, NDArray]], medians) -> None:
    """Boxes of 1 sigma and whiskers of 2 sigma of each curve side by side, and the medians below."""
    width = 0.8 / len(curves)
    slots = np.arange(len(axis.edges) - 1)
    for i, (x, y) in enumerate(curves):
        _, p = sigma_percentiles(x, y, axis.edges, MIN_COUNT)
        left = slots + 0.1 + (i + 0.5) * width
        colour = COLOURS[i % len(COLOURS)]
        axes.bar(left, p[:, 3] - p[:, 1], 0.9 * width, p[:, 1], color=colour, alpha=0.5)
        axes.vlines(left, p[:, 0], p[:, 4], color=colour, linewidth=0.8)
        axes.scatter(left, p[:, 2], marker="_", color="black", s=20, zorder=3)
        medians.plot(left, p[:, 2], ".-", color=colour, markersize=4)
    for a in (axes, medians):
        a.axhline(0.0, color="grey", linewidth=0.6)
        a.set_xlim(0, len(slots))
        a.set_xticks(np.arange(len(axis.edges)), [f"{e:.3g}" for e in axis.edges], fontsize=6)


def error_panels(curves: Mapping[str, tuple[PaperSample, str]], names: Mapping[str, Sequence[str]]) -> Figure:
    """Draw errors against other quantities: distribution of the quantity, of the errors, median (figs. 5-7).

    Parameters
    ----------
    curves : mapping [`str`, `tuple`]
        By label: the sample and the network in it.
    names : mapping [`str`, sequence of `str`]
        For each kind of error, "shape" and "mag", the names of the `AXES` it is drawn against.
    """
    rows = max(len(v) for v in names.values())
    figure = new_figure(6.0 * len(names), 4.6 * rows)
    grid = figure.subplots(3 * rows, len(names), squeeze=False, height_ratios=[1, 2.2, 1.2] * rows)
    for column, (kind, quantities) in enumerate(names.items()):
        for row, quantity in enumerate(quantities):
            axis = AXES[quantity]
            top, middle, bottom = grid[3 * row : 3 * row + 3, column]
            data = [(getattr(s, axis.name), _error(s, n, kind)) for s, n in curves.values()]
            for (x, _), colour, label in zip(data, COLOURS, curves, strict=False):
                top.hist(x, bins=axis.edges, histtype="step", color=colour, label=label)
            if axis.log:
                top.set_xscale("log")
            top.set_yscale("symlog", linthresh=1)
            top.set_ylabel("number")
            top.legend(fontsize=7)
            _boxes(middle, axis, data, bottom)
            middle.set_ylabel(_ERRORS[kind])
            bottom.set_ylabel("median")
            bottom.set_xlabel(axis.label)
    return figure


def distributions(sample: PaperSample) -> Figure:
    """Draw the targets' ellipticities, magnitudes and redshifts (fig. 1)."""
    figure = new_figure(10, 3.2)
    axes = figure.subplots(1, 3)
    for a, values, label in zip(
        axes,
        (sample.ellipticity, sample.mag, sample.redshift),
        ("observed ellipticity |e|", "r magnitude", "redshift"),
        strict=True,
    ):
        a.hist(values[np.isfinite(values)], bins=40, histtype="stepfilled", alpha=0.6)
        a.set_xlabel(label)
        a.set_ylabel("number")
    return figure


def latent_corner(latent: NDArray, dimensions: int = 5) -> Figure:
    """Draw the distributions of the first latent variables and of their pairs (fig. 3)."""
    k = min(dimensions, latent.shape[1])
    figure = new_figure(8, 8)
    axes = figure.subplots(k, k, squeeze=False)
    line = np.linspace(-4, 4, 101)
    for i in range(k):
        for j in range(k):
            a = axes[i, j]
            if j > i:
                a.axis("off")
                continue
            if i == j:
                a.hist(latent[:, i], bins=line[::4], density=True, histtype="step")
                a.plot(line, np.exp(-0.5 * line**2) / np.sqrt(2 * np.pi), color="black", linewidth=0.8)
            else:
                a.hist2d(latent[:, j], latent[:, i], bins=[line[::4]] * 2, cmap="Blues")
            if i == k - 1:
                a.set_xlabel(f"z{j + 1}")
            if j == 0 and i > 0:
                a.set_ylabel(f"z{i + 1}")
    return figure


def prior_shapes(curves: Mapping[str, tuple[PaperSample, str]]) -> Figure:
    """Draw output shapes against targets, and mean errors in the (e1, e2) plane (fig. 4)."""
    figure = new_figure(15, 3.8 * len(curves))
    grid = figure.subplots(len(curves), 4, squeeze=False)
    for row, (label, (sample, network)) in zip(grid, curves.items(), strict=True):
        true, out = sample.shape, sample.outputs[network].shape
        pairs = [
            (true[:, 0], out[:, 0], "e1", (-0.6, 0.6)),
            (true[:, 1], out[:, 1], "e2", (-0.6, 0.6)),
            (sample.ellipticity, np.hypot(*out.T), "|e|", (0.0, 0.8)),
        ]
        for a, (x, y, name, limits) in zip(row, pairs, strict=False):
            edges = np.linspace(*limits, 13)
            _, p = sigma_percentiles(x, y, edges, MIN_COUNT)
            centre = 0.5 * (edges[1:] + edges[:-1])
            a.fill_between(centre, p[:, 0], p[:, 4], alpha=0.2, color="tab:blue")
            a.fill_between(centre, p[:, 1], p[:, 3], alpha=0.4, color="tab:blue")
            a.plot(centre, p[:, 2], ".-", color="tab:blue")
            a.plot(limits, limits, color="black", linewidth=0.6)
            a.set_xlabel(f"{name} of the target")
            a.set_ylabel(f"{name} of the output")
        row[0].set_title(label)
        edges = np.linspace(-0.6, 0.6, 9)
        i, j = (np.searchsorted(edges, true[:, k]) - 1 for k in (0, 1))
        for u in range(8):
            for v in range(8):
                cell = (i == u) & (j == v) & np.isfinite(out).all(axis=1)
                if cell.sum() >= MIN_COUNT:
                    start, step = true[cell].mean(axis=0), (out - true)[cell].mean(axis=0)
                    row[3].quiver(*start, *step, angles="xy", scale_units="xy", scale=1, width=0.005)
        row[3].set(xlim=(-0.6, 0.6), ylim=(-0.6, 0.6), xlabel="e1", ylabel="e2", aspect="equal")
    return figure


def shear_bias_curves(curves: Mapping[str, Sequence[ShearBias]], axis: Axis) -> Figure:
    """Draw the multiplicative bias, mean of both components, in bins of S/N (figs. 8 and 9)."""
    figure = new_figure(7, 4.5)
    a = figure.subplots()
    centre = np.sqrt(axis.edges[1:] * axis.edges[:-1])
    for k, (label, biases) in enumerate(curves.items()):
        mean, err = (np.array([getattr(b, f) for b in biases]) for f in ("mean", "mean_err"))
        a.errorbar(centre * 1.02**k, mean, err, fmt="o-", markersize=3, label=label, color=COLOURS[k])
    a.axhline(0.0, color="grey", linewidth=0.6)
    a.set_xscale("log")
    a.set_xlabel(axis.label)
    a.set_ylabel("multiplicative shear bias m")
    a.legend()
    return figure


def _rgb(image: NDArray, bands: Sequence[str], scale: NDArray) -> NDArray:
    """Bands i, r, g as the paper normalises them (eq. 4), half of the width, (S/2, S/2, 3) in 0..1."""
    rows = [list(bands).index(b) for b in "irg"]
    y = BETA * image[rows] / scale[rows][:, None, None]
    x = np.clip(y / np.sqrt(1 + y**2), 0, 1)
    quarter = image.shape[-1] // 4
    return np.moveaxis(x[:, quarter:-quarter, quarter:-quarter], 0, -1)


def _scale(sample: PaperSample) -> NDArray:
    return np.mean([b.image.max(axis=(1, 2)) for b, _ in sample.examples], axis=0)


def _show(axes, rgb: NDArray, title: str) -> None:
    half = rgb.shape[0] / 2
    axes.imshow(rgb, origin="lower", extent=(-half, half, -half, half))
    axes.set_title(title, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])


def examples(sample: PaperSample, network: str, bands: Sequence[str], pixel_scale: float) -> Figure:
    """Draw blends, two per row: input, output and target, with the centres of the galaxies (fig. A1)."""
    scale = _scale(sample)
    count = len(sample.examples)
    rows = -(-count // 2)
    figure = new_figure(9, 1.6 * rows)
    grid = figure.subplots(rows, 6, squeeze=False).reshape(-1, 3)
    for triple in grid[count:]:
        for a in triple:
            a.axis("off")
    for triple, (blend, models) in zip(grid, sample.examples, strict=False):
        pictures = {"input": blend.image, "output": models[network], "target": blend.target}
        for a, (title, image) in zip(triple, pictures.items(), strict=True):
            _show(a, _rgb(image, bands, scale), title)
            x, y = (blend.position / pixel_scale).T
            a.plot(x[1:], y[1:], "+", color="red", markersize=5)
            a.plot(x[:1], y[:1], "+", color="deepskyblue", markersize=6)
    return figure


def transfer_examples(sample: PaperSample, networks: Mapping[str, str], bands: Sequence[str]) -> Figure:
    """Draw real galaxies: input, outputs, target (fig. B1); ``networks`` maps titles to names."""
    scale = _scale(sample)
    columns = 2 + len(networks)
    figure = new_figure(1.8 * columns, 1.8 * len(sample.examples))
    grid = figure.subplots(len(sample.examples), columns, squeeze=False)
    for row, (blend, models) in zip(grid, sample.examples, strict=True):
        pictures = [("input", blend.image), *((t, models[n]) for t, n in networks.items())]
        for a, (title, image) in zip(row, [*pictures, ("target", blend.target)], strict=True):
            _show(a, _rgb(image, bands, scale), title)
    return figure


def posterior(blend_rgb: Sequence[NDArray], draws: Sequence[Mapping[str, tuple[NDArray, NDArray]]]) -> Figure:
    """Draw the errors of ellipticity and magnitude over many draws of single images (fig. C1).

    Parameters
    ----------
    blend_rgb : sequence of `numpy.ndarray`, (S, S, 3)
        The images.
    draws : sequence of mapping [`str`, `tuple`]
        For each image and network label: errors of ellipticity and of r magnitude, one per draw.
    """
    figure = new_figure(10, 3.0 * len(draws))
    grid = figure.subplots(len(draws), 3, squeeze=False)
    for row, rgb, curves in zip(grid, blend_rgb, draws, strict=True):
        _show(row[0], rgb, "")
        for (label, errors), colour in zip(curves.items(), COLOURS, strict=False):
            for a, values, name in zip(row[1:], errors, _ERRORS.values(), strict=True):
                values = values[np.isfinite(values)]
                a.hist(values, bins=60, density=len(values) > 0, histtype="step", color=colour, label=label)
                a.set_xlabel(name)
        for a in row[1:]:
            a.axvline(0.0, color="black", linewidth=0.6)
            a.locator_params(axis="x", nbins=5)
            # Room for the legend above the curves.
            a.set_ylim(top=1.25 * a.get_ylim()[1])
            a.legend(fontsize=7)
    return figure


def calibration(curves: Mapping[str, NDArray]) -> Figure:
    """Draw how often the truth lies inside of central intervals of the posterior.

    Parameters
    ----------
    curves : mapping [`str`, `numpy.ndarray`, (N,)]
        By quantity: the fraction of the posterior's draws below the truth, for each object.
    """
    figure = new_figure(5.5, 5)
    a = figure.subplots()
    level = np.linspace(0.02, 0.99, 50)
    for (label, rank), colour in zip(curves.items(), COLOURS, strict=False):
        rank = rank[np.isfinite(rank)]
        inside = [(np.abs(2 * rank - 1) <= p).mean() if len(rank) else np.nan for p in level]
        a.plot(level, inside, color=colour, label=label)
    a.plot([0, 1], [0, 1], color="black", linewidth=0.6)
    for p in (0.68, 0.95):
        a.axvline(p, color="grey", linewidth=0.6, linestyle=":")
    a.set_xlabel("probability of the interval")
    a.set_ylabel("fraction of objects inside")
    a.legend()
    return figure
