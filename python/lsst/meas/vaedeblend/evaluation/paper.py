# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The results of Arcelin et al. (2020), measured anew: figures, a table beside its numbers, one report."""

from __future__ import annotations

__all__ = ["CASES", "evaluate_paper"]

import base64
import dataclasses
import html
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..ground.files import shipped_file
from ..network import Network, NetworkError, resolve
from ..simulation.config import TrainingConfig, load_config, training_length
from . import paper_figures as draw
from .metrics import ShearBias, bootstrap, shear_bias, sigma_percentiles
from .paper_sample import PaperSample, SampleMaker, deblend_images, measure_image

_LOG = logging.getLogger("lsst.meas.vaedeblend.evaluation.paper")

FAINTEST_TRANSFER = 26.0
"""Magnitude limit in r of the paper's figure 9."""

MAX_REAL = 500
"""Real galaxies, in different orientations, of which the sample on them is made: they are slow to draw."""


REMARKS = "arcelin2020_remarks.md"
"""File beside the configurations that says why the networks that ship miss what they miss."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One deblender: the configuration of its sample, its label, the paper's numbers, and those wanted here.

    What is wanted are limits of absolute values.
    """

    config: str
    label: str
    paper: dict[str, float] = dataclasses.field(default_factory=dict)
    wanted: dict[str, float] = dataclasses.field(default_factory=dict)


CASES = {
    "lsst": Case(
        "arcelin2020_lsst_euclid",
        "LSST",
        {"m": -0.056, "e_median_max": 0.015, "mag_median_max": 0.08},
        {"m": 0.03, "e_median_max": 0.01, "mag_median_max": 0.04},
    ),
    "lsst_euclid": Case(
        "arcelin2020_lsst_euclid",
        "LSST + Euclid",
        {"m": -0.016, "e_median_max": 0.015, "mag_median_max": 0.08},
        {"m": 0.01, "e_median_max": 0.006},
    ),
    "decentred_uniform": Case(
        "arcelin2020_decentred_uniform",
        "LSST, decentred in a square",
        {"m": -0.081, "e_median_max": 0.03, "mag_median_max": 0.2},
        {"m": 0.05},
    ),
    "decentred_peaks": Case("arcelin2020_decentred_peaks", "LSST, at peaks", {"m": -0.084}, {"m": 0.06}),
    "transfer": Case("arcelin2020_transfer", "LSST + Euclid, trained on real galaxies"),
}

PRIORS = {"lsst": "arcelin2020_lsst_prior", "lsst_euclid": "arcelin2020_lsst_euclid_prior"}


@dataclasses.dataclass
class _Report:
    """Sections of the report, rows of its table, what is missing, and what there is to say."""

    sections: list[tuple[str, str, Figure]] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def row(
        self,
        name: str,
        paper: float | str | None,
        ours: float | None,
        error: float | None = None,
        within: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Enter a number; what is wanted of it is an absolute value at most or a value at least so large."""
        wanted, missed = None, 0.0
        value = np.nan if ours is None or not np.isfinite(ours) else ours
        if within is not None:
            wanted, missed = f"within {within:g}", abs(value) - within
        elif at_least is not None:
            wanted, missed = f"at least {at_least:g}", at_least - value
        row = {"name": name, "paper": paper, "ours": _number(ours), "error": _number(error)}
        self.rows.append(row | {"wanted": wanted, "missed_by": _number(missed) if missed > 0 else None})


def _number(value: float | None) -> float | None:
    """A number that JSON can hold; what could not be measured is null."""
    return None if value is None or not np.isfinite(value) else float(value)


def evaluate_paper(
    out: str | os.PathLike[str],
    *,
    configs: str | os.PathLike[str] | None = None,
    artefacts: str | os.PathLike[str] | None = None,
    real_catalogue: str | os.PathLike[str] | None = None,
    samples: int = 6000,
    galaxies: int | None = None,
    draws: int = 10_000,
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the paper's networks on its test samples, and write ``paper.html`` and ``paper.json``.

    Parameters
    ----------
    out : path-like
        Directory of the report; it is made.
    configs : path-like, optional
        Directory of the configurations ``arcelin2020_*.py``, if not those that ship.
    artefacts : path-like, optional
        Directory of networks, looked at before those that ship.
    real_catalogue : path-like, optional
        File of a `galsim.RealGalaxyCatalog`, for the figures on real galaxies.
    samples : `int`, optional
        Images of each test sample.
    galaxies : `int`, optional
        Galaxies of which they are made, if fewer than the configurations' ``n_test``; at most `MAX_REAL` of
        the real ones.
    draws : `int`, optional
        Draws from the posterior of one image (the paper's appendix C).
    threads : `int`, optional
        Threads of onnxruntime, and processes that render galaxies; 0 for as many as there are cores.
    seed : `int`, optional
        Seed of the test samples.

    Returns
    -------
    summary : `dict`
        What ``paper.json`` holds: for each of `CASES` the numbers, or `None` if its network is missing;
        ``table``, the rows of the report's table; ``missing``, what could not be measured and why.

    Raises
    ------
    FileNotFoundError
        If the configurations are not there.
    """
    configs = shipped_file("config/training") if configs is None else Path(configs)
    run = _Evaluation(configs, artefacts, real_catalogue, samples, galaxies, draws, threads, seed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # Written after every part: what a later one meets with does not take the earlier ones along.
    for part in (run.centred, run.decentred, run.transfer):
        part()
        report = run.report
        summary = {**run.summary, "table": report.rows, "missing": report.missing, "samples": samples}
        (out / "paper.json").write_text(json.dumps(summary, indent=1) + "\n")
        (out / "paper.html").write_text(_html(report, samples))
    return summary


class _Evaluation:
    """State of one evaluation: what is there, what was measured, and the report."""

    def __init__(self, configs, artefacts, real_catalogue, samples, galaxies, draws, threads, seed):
        self.configs, self.artefacts, self.real_catalogue = configs, artefacts, real_catalogue
        self.samples, self.galaxies, self.draws, self.threads, self.seed = (
            samples,
            galaxies,
            draws,
            threads or _cores(),
            seed,
        )
        self.report = _Report(remarks=_remarks(self.configs / REMARKS))
        self.summary: dict[str, dict[str, float | None] | None] = dict.fromkeys(CASES)
        self.rng = np.random.default_rng([seed, 9])
        self.bias: dict[str, list[ShearBias]] = {}
        self.blends: dict[str, tuple[PaperSample, str]] = {}

    def config(self, name: str) -> TrainingConfig:
        path = self.configs / f"{name}.py"
        if not path.is_file():
            raise FileNotFoundError(f"No configuration {path}; --configs says where they are.")
        return load_config(path)

    def maker(self, name: str) -> SampleMaker:
        return SampleMaker(self.config(name), self.galaxies, seed=self.seed, processes=self.threads)

    def networks(self, names: dict[str, str]) -> dict[str, Network]:
        """Load those of the networks that exist; note the others as missing. Keys are kept."""
        found = {}
        for key, name in names.items():
            beside = None if self.artefacts is None else Path(self.artefacts) / f"{name}.onnx"
            try:
                path = beside if beside is not None and beside.is_file() else resolve(name)
                found[key] = Network.load(path, threads=self.threads)
            except NetworkError as error:
                self.report.missing.append(f"{name}: {error}")
            else:
                metadata = found[key].metadata
                length = training_length(metadata.training)
                self.report.note(f"Samples in the training of {metadata.name}: {length}.")
        return found

    def add(self, title: str, text: str, figure: Figure) -> None:
        _LOG.info("%s", title)
        self.report.sections.append((title, text, figure))

    def measured(self, key: str, sample: PaperSample) -> None:
        """Enter the numbers of one deblender into summary and table."""
        case, numbers = CASES[key], _numbers(sample, key, self.rng)
        self.summary[key] = numbers
        for name, label in (
            ("m", "m"),
            ("e_median_max", "largest median error of |e| in bins of S/N"),
            ("mag_median_max", "largest median error of r in bins of S/N"),
        ):
            self.report.row(
                f"{label}, {case.label}",
                case.paper.get(name),
                numbers[name],
                numbers[f"{name}_err"],
                within=case.wanted.get(name),
            )
        self.bias[key] = _binned_bias(sample, key, self.rng)
        self.blends[case.label] = (sample, key)

    def centred(self) -> None:
        """Figures 1, 3 to 6, A1 and C1: isolated galaxies and blends with targets in the middle."""
        maker = self.maker("arcelin2020_lsst_euclid")
        priors = self.networks(PRIORS)
        isolated = maker.run(priors, self.samples, isolated=True)
        self.add(
            "Figure 1",
            "The test sample: observed ellipticity, r magnitude, redshift.",
            draw.distributions(isolated),
        )
        if "lsst" in priors:
            text = "Latent variables of the LSST prior, one draw for each galaxy; the line is the prior."
            self.add("Figure 3", text, draw.latent_corner(isolated.outputs["lsst"].latent))
        curves = {CASES[k].label: (isolated, k) for k in priors}
        if curves:
            self.add("Figure 4", "Shapes of the priors' outputs.", draw.prior_shapes(curves))
            panels = draw.error_panels(curves, {"shape": ["snr"], "mag": ["mag"]})
            self.add("Figure 5", "Errors of the priors.", panels)
            for key in priors:
                numbers = _numbers(isolated, key, self.rng)
                for kind in ("e", "mag"):
                    name = f"{kind}_median_max"
                    label = f"largest median error of {kind}, prior, {CASES[key].label}"
                    self.report.row(label, 0.025, numbers[name], numbers[f"{name}_err"])

        networks = self.networks({k: f"arcelin2020_{k}" for k in ("lsst", "lsst_euclid")})
        if not networks:
            return
        sample = maker.run(networks, self.samples, examples=12)
        for key in networks:
            self.measured(key, sample)
        curves = {CASES[k].label: (sample, k) for k in networks}
        quantities = ["snr", "mag_difference", "b_closest", "b_total"]
        panels = draw.error_panels(curves, {"shape": quantities, "mag": quantities})
        self.add("Figure 6", "Errors of the deblenders, output minus target.", panels)
        if len(networks) == 2:
            self._gains(sample)
        last = list(networks)[-1]
        figure = draw.examples(sample, last, maker.survey.band_names, maker.composer().pixel_scale)
        self.add("Figure A1", f"Blends in i, r, g as seen by {CASES[last].label}.", figure)
        self._posterior(maker, networks, sample)

    def _gains(self, sample: PaperSample) -> None:
        """What Euclid adds: mean relative decrease over the bins of S/N, in percent."""
        paper = {"shape": ("40 to 47", "33"), "mag": ("27 to 63", "17 to 33")}
        wanted = {("shape", "median"): 40, ("shape", "spread"): 33}
        for kind, (of_median, of_spread) in paper.items():
            edges = draw.AXES["snr"].edges
            p = {}
            for key in ("lsst", "lsst_euclid"):
                error = sample.shape_error(key) if kind == "shape" else sample.mag_error(key)
                p[key] = sigma_percentiles(sample.snr, error, edges, draw.MIN_COUNT)[1]
            medians = np.abs(p["lsst_euclid"][:, 2]), np.abs(p["lsst"][:, 2])
            spreads = [p[k][:, 3] - p[k][:, 1] for k in ("lsst_euclid", "lsst")]
            for name, (new, old), expected in (
                ("median", medians, of_median),
                ("spread", spreads, of_spread),
            ):
                gain = 100 * (1 - np.nansum(new) / np.nansum(old))
                label = f"decrease of the {name} error of {kind} by Euclid, percent"
                self.report.row(label, expected, gain, at_least=wanted.get((kind, name)))

    def _posterior(self, maker: SampleMaker, networks: dict[str, Network], sample: PaperSample) -> None:
        """Figure C1, and how well the posterior's width is calibrated."""
        blends = sample.examples[:2]
        curves = [
            {CASES[k].label: _draw_errors(n, b, maker, self.draws, self.rng) for k, n in networks.items()}
            for b, _ in blends
        ]
        scale = draw._scale(sample)
        pictures = [draw._rgb(b.image, maker.survey.band_names, scale) for b, _ in blends]
        text = f"Errors of {self.draws} draws from the posterior of single images."
        self.add("Figure C1", text, draw.posterior(pictures, curves))
        key, network = list(networks.items())[-1]
        count, each = max(10, min(150, self.samples // 20)), max(10, min(64, self.draws))
        ranks = _ranks(network, maker, count, each, self.rng)
        inside = {k: _inside(r) for k, r in ranks.items()}
        for name, (one, two) in inside.items():
            for probability, (fraction, error) in ((68, one), (95, two)):
                label = f"truth inside the {probability} percent interval of {name}, {CASES[key].label}"
                self.report.row(label, None, fraction, error)
        text = f"Not in the paper: {count} blends, {each} draws each; {CASES[key].label}."
        self.add("Calibration of the posterior", text, draw.calibration(ranks))

    def decentred(self) -> None:
        """Figures 7 and 8."""
        for key in ("decentred_uniform", "decentred_peaks"):
            networks = self.networks({key: CASES[key].config})
            if networks:
                maker = self.maker(CASES[key].config)
                self.measured(key, maker.run(networks, self.samples))
        keys = [k for k in ("lsst", "decentred_uniform", "decentred_peaks") if k in self.bias]
        if keys:
            curves = {CASES[k].label: self.blends[CASES[k].label] for k in keys}
            quantities = ["snr", "b_total"]
            panels = draw.error_panels(curves, {"shape": quantities, "mag": quantities})
            self.add("Figure 7", "Errors with targets off the centre.", panels)
        if self.bias:
            biases = {CASES[k].label: b for k, b in self.bias.items()}
            figure = draw.shear_bias_curves(biases, draw.AXES["snr"])
            self.add("Figure 8", "Multiplicative shear bias in bins of S/N.", figure)

    def transfer(self) -> None:
        """Figures 9 and B1: real galaxies."""
        config = self.config(CASES["transfer"].config)
        if self.real_catalogue is not None:
            config.population.real_catalogue = os.fspath(self.real_catalogue)
        if not Path(config.population.real_catalogue).is_file():
            self.report.missing.append(
                f"Real galaxies: there is no catalogue {config.population.real_catalogue} (--real-catalogue)."
            )
            return
        networks = self.networks(
            {"lsst_euclid": "arcelin2020_lsst_euclid", "transfer": "arcelin2020_transfer"}
        )
        if not networks:
            return
        galaxies = MAX_REAL if self.galaxies is None else min(self.galaxies, MAX_REAL)
        maker = SampleMaker(config, galaxies, real=True, seed=self.seed, processes=self.threads)
        self.report.note(
            f"The real test sample has {len(set(maker.population.source_id))} different galaxies."
        )
        sample = maker.run(networks, self.samples, examples=6)
        curves = {}
        if "lsst_euclid" in self.bias:
            curves["parametric, tested on parametric"] = _binned_bias(
                *_bright(*self.blends[CASES["lsst_euclid"].label]), self.rng
            )
        if "lsst_euclid" in networks:
            curves["parametric, tested on real"] = _binned_bias(*_bright(sample, "lsst_euclid"), self.rng)
            bias = shear_bias(sample.shape, sample.outputs["lsst_euclid"].shape, self.rng)
            self.report.row("m on real galaxies, before", None, bias.mean, bias.mean_err)
        if "transfer" in networks:
            curves["trained on real, tested on real"] = _binned_bias(*_bright(sample, "transfer"), self.rng)
            self.measured("transfer", sample)
        if len(networks) == 2:
            for paper, part in (("2", lambda s, k: (s, k)), ("4 (r < 26)", _bright)):
                before, after = (
                    shear_bias(s.shape, s.outputs[k].shape, self.rng)
                    for s, k in (part(sample, k) for k in ("lsst_euclid", "transfer"))
                )
                ratio = abs(before.mean / after.mean)
                error = ratio * np.hypot(before.mean_err / before.mean, after.mean_err / after.mean)
                label = "decrease of m by training on real galaxies, factor"
                self.report.row(label, paper, ratio, error, at_least=2)
        figure = draw.shear_bias_curves(curves, draw.AXES["snr"])
        self.add("Figure 9", f"Shear bias of real galaxies, r < {FAINTEST_TRANSFER:g}.", figure)
        titles = {"before": "lsst_euclid", "after": "transfer"}
        titles = {t: n for t, n in titles.items() if n in networks}
        figure = draw.transfer_examples(sample, titles, maker.survey.band_names)
        self.add("Figure B1", "Real galaxies, before and after training on some.", figure)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remarks(path: Path) -> list[str]:
    """The items of a Markdown list, each on one line; none without the file."""
    if not path.is_file():
        return []
    _, *items = f"\n{path.read_text()}".split("\n- ")
    return [" ".join(item.split("\n\n")[0].split()).replace("*", "").replace("`", "") for item in items]


def _bright(sample: PaperSample, network: str) -> tuple[PaperSample, str]:
    return sample[sample.mag < FAINTEST_TRANSFER], network


def _numbers(sample: PaperSample, network: str, rng: np.random.Generator) -> dict[str, float | None]:
    """Shear bias, and the largest median errors in bins of S/N, with bootstrap errors."""
    bias = shear_bias(sample.shape, sample.outputs[network].shape, rng)
    failed = ~np.isfinite(sample.shape_error(network))
    numbers = {"m": bias.mean, "m_err": bias.mean_err, "failed_shapes": failed.mean()}
    for i in (0, 1):
        numbers |= {f"m{i + 1}": bias.m[i], f"m{i + 1}_err": bias.m_err[i]}
        numbers |= {f"c{i + 1}": bias.c[i], f"c{i + 1}_err": bias.c_err[i]}
    edges = draw.AXES["snr"].edges
    for name, error in (("e", sample.shape_error(network)), ("mag", sample.mag_error(network))):

        def largest(rows, error=error) -> float:
            medians = sigma_percentiles(sample.snr[rows], error[rows], edges, draw.MIN_COUNT)[1][:, 2]
            return float(np.nanmax(np.abs(medians))) if np.isfinite(medians).any() else np.nan

        numbers[f"{name}_median_max"] = largest(slice(None))
        numbers[f"{name}_median_max_err"] = float(bootstrap(largest, len(error), rng, 50))
    return {k: _number(v) for k, v in numbers.items()}


def _binned_bias(sample: PaperSample, network: str, rng: np.random.Generator) -> list[ShearBias]:
    """Shear bias in bins of S/N; NaN in bins with few galaxies."""
    edges, output = draw.AXES["snr"].edges, sample.outputs[network].shape
    biases = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        rows = (sample.snr >= low) & (sample.snr < high)
        if rows.sum() < draw.MIN_COUNT:
            rows[:] = False
        biases.append(shear_bias(sample.shape[rows], output[rows], rng, repeats=100))
    return biases


def _draws(network: Network, image: NDArray, n: int, rng: np.random.Generator, batch: int = 250):
    """Yield batches of models (N, B, S, S) drawn from the posterior of one image (B, S, S).

    What the network gives for as many epsilons, but the image is read once: the decoder draws the rest.
    """
    seen = deblend_images(network, image[None, : len(network.metadata.bands)])
    while n > 0:
        epsilon = rng.standard_normal((min(batch, n), network.metadata.latent_size))
        yield network.decoder.render(seen.latent_mean + seen.latent_sigma * epsilon)
        n -= min(batch, n)


def _measured_draws(network, blend, maker, n, rng) -> NDArray:
    """KSB ellipticities and magnitudes of draws, (n, 3)."""
    batches = _draws(network, blend.image, n, rng)
    return np.array([measure_image(m, maker.psf) for models in batches for m in models[:, maker.reference]])


def _draw_errors(network, blend, maker: SampleMaker, n: int, rng) -> tuple[NDArray, NDArray]:
    """Errors of the absolute ellipticity and of the magnitude of n draws."""
    g1, g2, mag = measure_image(blend.members[0], maker.psf)
    found = _measured_draws(network, blend, maker, n, rng)
    return np.hypot(*found[:, :2].T) - np.hypot(g1, g2), found[:, 2] - mag


def _ranks(network: Network, maker: SampleMaker, count: int, each: int, rng) -> dict[str, NDArray]:
    """Fraction of the posterior's draws below the truth, by quantity, (count,)."""
    composer = maker.composer()
    ranks: dict[str, list[float]] = {"e1": [], "e2": [], "r flux": []}
    for _ in range(count):
        blend = composer.blend()
        truth = np.array(measure_image(blend.members[0], maker.psf))
        found = _measured_draws(network, blend, maker, each, rng)
        # Fainter magnitudes are smaller fluxes.
        truth[2], found[:, 2] = -truth[2], -found[:, 2]
        for values, t, rank in zip(found.T, truth, ranks.values(), strict=True):
            values = values[np.isfinite(values)]
            # The truth itself is one more draw from a sound posterior: ranks never reach 0 or 1.
            sound = len(values) and np.isfinite(t)
            rank.append(((values < t).sum() + 0.5) / (len(values) + 1) if sound else np.nan)
    return {k: np.array(v) for k, v in ranks.items()}


def _inside(rank: NDArray) -> list[tuple[float, float]]:
    """Fractions of objects inside of the central 68 and 95 percent, with binomial errors."""
    rank = rank[np.isfinite(rank)]
    fractions = [float((np.abs(2 * rank - 1) <= p).mean()) if len(rank) else np.nan for p in (0.68, 0.95)]
    return [(f, np.sqrt(f * (1 - f) / max(len(rank), 1))) for f in fractions]


def _html(report: _Report, samples: int) -> str:
    """One file with everything in it."""

    def cell(value) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return "" if value is None else html.escape(text)

    def bullets(lines: list[str]) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"

    columns = ("name", "paper", "ours", "error", "wanted", "missed_by")
    differences = [
        "Galaxies: the embedded COSMOS-like model of this package (i < 25.2) in place of the COSMOS "
        "catalogue, unless the configurations name a catalogue.",
        "Sky, zeropoints and filters are those of surveycodex and speclite; exposures are the paper's. "
        "The exponent of Euclid's Moffat PSF, which the paper does not give, is 2.5.",
        "Blends and noise are drawn anew for every step of the training, not from 100 000 fixed images.",
        "Optimiser and first weights, which the paper does not give, are those of config/training; above "
        "loss_knee, where a configuration has one, a galaxy counts by the logarithm of its loss.",
        "Deblenders are trained on several noise realisations of each blend where the configuration says so "
        "(exposures): the mean of their models is compared with the truth.",
        "Networks are measured at the mean of the posterior, not at one draw from it.",
        f"Each test sample has {samples} images.",
        *report.notes,
    ]
    parts = [
        "<!DOCTYPE html><html><head><meta charset='utf-8'><title>Arcelin et al. (2020)</title>",
        "<style>body{font-family:sans-serif;max-width:75em;margin:2em auto}img{max-width:100%}",
        "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ccc}</style></head><body>",
        "<h1>Arcelin et al. (2020), measured anew</h1>",
        "<h2>What differs from the paper</h2>",
        bullets(differences),
    ]
    if report.missing:
        parts += ["<h2>What is missing</h2>", bullets(report.missing)]
    parts += [
        "<h2>Numbers</h2>",
        "<p>Errors are those of drawing the sample anew; wanted is what the project set itself before.</p>",
        "<table><tr>" + "".join(f"<th>{'' if k == 'name' else k.replace('_', ' ')}</th>" for k in columns),
    ]
    for row in report.rows:
        parts.append("<tr>" + "".join(f"<td>{cell(row[k])}</td>" for k in columns))
    parts.append("</table>")
    if report.remarks:
        parts += ["<h2>What is missed by the networks that ship, why, and what was tried</h2>"]
        parts.append(bullets(report.remarks))
    for title, text, figure in report.sections:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=90)
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>")
        parts.append(f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>")
    return "\n".join([*parts, "</body></html>"]) + "\n"
