# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw the banks of a training: galaxies in training, validation and test, none of them in two."""

from __future__ import annotations

__all__ = [
    "SAMPLES",
    "bank_checksum",
    "bank_paths",
    "centring_errors",
    "draw_sources",
    "make_banks",
    "sample_banks",
    "survey_of",
]

import functools
import hashlib
import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np

from .blends import BlendBanks, BlendComposer, fit_centring_error, render_blend_banks
from .config import PopulationConfig, TrainingConfig
from .galaxies import GalaxyBank, render_bank
from .population import (
    Population,
    concatenate,
    draw_population,
    draw_stars,
    read_cosmos,
    read_real,
    without_gradients,
)
from .surveys import SurveyInfo, get_survey_info

SAMPLES = ("train", "validation", "test")

_LOG = logging.getLogger("lsst.meas.vaedeblend.simulation")


def draw_sources(config: PopulationConfig, survey: SurveyInfo) -> dict[str, Population]:
    """Draw the galaxies and stars of the three samples.

    Parameters
    ----------
    config : `PopulationConfig`
    survey : `SurveyInfo`

    Returns
    -------
    samples : `dict` [`str`, `Population`]
        For each of `SAMPLES`. The source ids of galaxies are disjoint.

    Raises
    ------
    ValueError
        If a catalogue holds too few galaxies for each sample to have its own.

    Notes
    -----
    A catalogue smaller than the samples is used several times, each time at
    another orientation; the split is by galaxy all the same.
    """
    rng = np.random.default_rng(config.seed)
    wanted = {"train": config.n_train, "validation": config.n_validation, "test": config.n_test}
    if config.cosmos_directory is None:
        galaxies = _draw_galaxies(sum(wanted.values()), config, survey, rng)
        edges = np.cumsum([0, *wanted.values()])
        rows = {s: np.arange(edges[i], edges[i + 1]) for i, s in enumerate(wanted)}
    else:
        galaxies = read_cosmos(
            config.cosmos_directory,
            survey,
            file_name=config.cosmos_file,
            exclusion_level=config.cosmos_exclusion,
        )
        galaxies = galaxies[_bright_enough(galaxies, config)]
        rows = _split(len(galaxies), wanted, rng, "COSMOS")
    if not config.colour_gradients:
        galaxies = without_gradients(galaxies)
    real = real_rows = None
    if config.real_catalogue is not None:
        # A stream of its own: the split does not depend on the other galaxies.
        rng = np.random.default_rng([config.seed, 50])
        real = read_real(config.real_catalogue, survey, rng)
        real = real[_bright_enough(real, config)]
        part = {s: round(n * config.real_fraction) for s, n in wanted.items()}
        real_rows = _split(len(real), part, rng, "real")
    samples = {}
    for sample, own in rows.items():
        population = galaxies[own]
        if config.cosmos_directory is not None:
            _rotate(population, rng)
        if real is not None:
            images = real[real_rows[sample]]
            _rotate(images, rng)
            if sample != "test":
                images.shear = _draw_shear(len(images), config.real_shear, rng)
            population = concatenate([population[: len(population) - len(images)], images])
        bright, faint = config.star_mag_range
        n_stars = max(1, round(config.star_fraction * wanted[sample]))
        stars = draw_stars(n_stars, survey, rng, mag_range=(bright, faint))
        samples[sample] = concatenate([population, stars]) if config.star_fraction > 0 else population
    return samples


def _draw_galaxies(
    n: int, config: PopulationConfig, survey: SurveyInfo, rng: np.random.Generator
) -> Population:
    """Draw ``n`` galaxies of the embedded model that are bright enough in all bands with a limit."""
    drawn: list[Population] = []
    low, high = config.mag_range
    least, largest = config.sersic_range
    while (have := sum(map(len, drawn))) < n:
        population = draw_population(
            n - have,
            survey,
            rng,
            mag_range=(low, high),
            count_slope=config.count_slope,
            knot_fraction=config.knot_fraction,
            size_scatter=config.size_scatter,
            sersic_range=(least, largest),
        )
        kept = population[_bright_enough(population, config)]
        if not len(kept) and len(drawn) > 100:
            raise ValueError(f"No galaxy of the embedded model is brighter than {dict(config.faintest)}.")
        drawn.append(kept)
    galaxies = concatenate(drawn)
    galaxies.source_id = np.arange(n)
    return galaxies


def _bright_enough(population: Population, config: PopulationConfig) -> np.ndarray:
    """Whether a galaxy is brighter than every band's limit."""
    good = np.ones(len(population), bool)
    for band, limit in config.faintest.items():
        good &= population.magnitude(band) < limit
    return good


def _split(
    available: int, wanted: dict[str, int], rng: np.random.Generator, kind: str
) -> dict[str, np.ndarray]:
    """Deal out the galaxies of a catalogue to the samples, in proportion, and repeat them where too few."""
    order = rng.permutation(available)
    shares = np.cumsum([0, *wanted.values()]) / max(1, sum(wanted.values()))
    edges = np.rint(shares * available).astype(int)
    rows = {}
    for i, (sample, n) in enumerate(wanted.items()):
        own = order[edges[i] : edges[i + 1]]
        if not len(own) and n:
            raise ValueError(f"{available} {kind} galaxies are too few for the {sample} sample.")
        rows[sample] = np.resize(own, n)
    return rows


def _rotate(population: Population, rng: np.random.Generator) -> None:
    """Turn every galaxy by a random angle, in place."""
    angle = 2 * np.pi * rng.random((len(population), 1))
    g1, g2 = population.g1, population.g2
    population.g1 = g1 * np.cos(angle) - g2 * np.sin(angle)
    population.g2 = g1 * np.sin(angle) + g2 * np.cos(angle)


def _draw_shear(n: int, largest: float, rng: np.random.Generator) -> np.ndarray:
    """Draw reduced shears, (n, 2), uniformly from a disc."""
    size, angle = largest * np.sqrt(rng.random(n)), 2 * np.pi * rng.random(n)
    return np.stack([size * np.cos(angle), size * np.sin(angle)], axis=1)


def make_banks(config: TrainingConfig, directory: str | os.PathLike, processes: int = 1) -> None:
    """Render the banks of the three samples into ``directory``.

    A bank of fields is one file, train.npz, validation.npz or test.npz; a bank of single blends is one file
    for each instrument and role, e.g. train_target_0.npz. Banks that are there already are kept: remove them
    to draw anew. Each file is written whole or not at all.

    Parameters
    ----------
    config : `TrainingConfig`
    directory : path
    processes : `int`, optional
        Processes that render banks of single blends.

    Raises
    ------
    ValueError
        If there are banks of another configuration.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    survey, made_with = survey_of(config), bank_checksum(config)
    for i, (sample, population) in enumerate(draw_sources(config.population, survey).items()):
        paths = bank_paths(config, survey, directory, sample)
        if all(p.exists() for p in paths):
            for path in paths:
                GalaxyBank.load(path, made_with)
            _LOG.info("Keeping the %s sample in %s.", sample, directory)
            continue
        rng = np.random.default_rng([config.population.seed, i + 1])
        progress = functools.partial(_LOG.info, "%s: of %d sources, done: %d.", sample, len(population))
        if config.composition == "blends":
            banks = sample_banks(config, population, rng, progress, processes)
            for bank in itertools.chain(*banks.banks.values()):
                bank.made_with = made_with
            banks.save(directory, sample)
        else:
            bank = render_bank(
                population,
                survey.pixel_scale,
                rng,
                stamp_size=config.population.stamp_size,
                progress=progress,
            )
            bank.made_with = made_with
            bank.save(paths[0])
        _LOG.info("Wrote %s: %d sources.", ", ".join(p.name for p in paths), len(population))
    if config.composition == "blends" and config.blend.decentring == "peaks":
        _write_centring(config, survey, directory)


def bank_checksum(config: TrainingConfig) -> str:
    """SHA-256 of what banks depend on: bands, galaxies, and how single blends are rendered.

    Configurations that differ in scenes of fields, networks or fits share their banks, and their checksum.
    """
    values = config.toDict()
    kept = ["survey", "bands", "population", "composition"]
    text = {name: values[name] for name in kept}
    if config.composition == "blends":
        text["blend"] = values["blend"]
    # Where a catalogue lies does not change what is in it.
    for name in ("cosmos_directory", "real_catalogue"):
        path = text["population"][name]
        text["population"][name] = path and os.path.basename(os.path.normpath(path))
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


def bank_paths(config: TrainingConfig, survey: SurveyInfo, directory: Path, sample: str) -> list[Path]:
    """Files that `make_banks` writes for one of `SAMPLES`."""
    if config.composition == "fields":
        return [directory / f"{sample}.npz"]
    paths = BlendBanks.paths(directory, sample, len(survey.instruments))
    return [p for role in paths.values() for p in role]


def sample_banks(
    config: TrainingConfig,
    population: Population,
    rng: np.random.Generator,
    progress=None,
    processes: int = 1,
) -> BlendBanks:
    """Render the banks of single blends that a configuration asks for, of any population."""
    return render_blend_banks(
        population,
        survey_of(config),
        config.blend,
        rng,
        stamp_size=config.population.stamp_size,
        merge=not config.population.colour_gradients,
        progress=progress,
        processes=processes,
    )


def survey_of(config: TrainingConfig) -> SurveyInfo:
    """The survey of a configuration, in its bands and with its exposures."""
    exposure = tuple(config.blend.exposure.items()) if config.composition == "blends" else ()
    return get_survey_info(config.survey, tuple(config.bands), exposure)


def centring_errors(
    banks: BlendBanks, config: TrainingConfig, rng: np.random.Generator, n: int
) -> np.ndarray:
    """Distances of the detected centroids from the true centres in ``n`` blends, arcsec."""
    composer = BlendComposer(banks, survey_of(config), config.blend, config.scene.cutout_size, rng)
    blends = (composer.blend() for _ in range(n))
    return np.array([np.hypot(*(b.centroid - b.position[0])) for b in blends])


def _write_centring(config: TrainingConfig, survey: SurveyInfo, directory: Path) -> None:
    """Fit the centring error in blends of the training sample, for the isolated galaxies of the prior."""
    path = directory / "centring.json"
    if path.exists():
        _LOG.info("Keeping %s.", path)
        return
    banks = BlendBanks.load(directory, "train", survey)
    rng = np.random.default_rng([config.population.seed, 99])
    errors = centring_errors(banks, config, rng, config.blend.centring_blends)
    path.write_text(json.dumps(fit_centring_error(errors)) + "\n")
    _LOG.info("Wrote %s; the median centring error is %.3f arcsec.", path, np.median(errors))
