# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw the banks of a training: galaxies in training, validation and test, none of them in two."""

from __future__ import annotations

__all__ = ["SAMPLES", "draw_sources", "make_banks"]

import functools
import logging
import os
from pathlib import Path

import numpy as np

from .config import PopulationConfig, TrainingConfig
from .galaxies import render_bank
from .population import Population, concatenate, draw_population, draw_stars, read_cosmos
from .surveys import SurveyInfo, get_survey_info

SAMPLES = ("train", "validation", "test")

_LOG = logging.getLogger("lsst.meas.vaedeblend.training")


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
        If a COSMOS catalogue holds fewer galaxies than the samples ask for in
        training, where repetition would leak between samples.

    Notes
    -----
    A COSMOS catalogue smaller than the training sample is used several times,
    each time at another orientation; the split is by galaxy all the same.
    """
    rng = np.random.default_rng(config.seed)
    wanted = {"train": config.n_train, "validation": config.n_validation, "test": config.n_test}
    if config.cosmos_directory is None:
        galaxies = draw_population(
            sum(wanted.values()),
            survey,
            rng,
            mag_range=tuple(config.mag_range),
            count_slope=config.count_slope,
        )
        edges = np.cumsum([0, *wanted.values()])
        rows = {s: np.arange(edges[i], edges[i + 1]) for i, s in enumerate(wanted)}
    else:
        galaxies = read_cosmos(
            config.cosmos_directory,
            survey,
            file_name=config.cosmos_file,
            exclusion_level=config.cosmos_exclusion,
        )
        order = rng.permutation(len(galaxies))
        shares = np.cumsum([0, *wanted.values()]) / sum(wanted.values())
        edges = np.rint(shares * len(order)).astype(int)
        rows = {}
        for i, (sample, n) in enumerate(wanted.items()):
            own = order[edges[i] : edges[i + 1]]
            if not len(own):
                raise ValueError(f"{len(galaxies)} COSMOS galaxies are too few for the {sample} sample.")
            rows[sample] = np.resize(own, n)
    samples = {}
    for sample, own in rows.items():
        population = galaxies[own]
        if config.cosmos_directory is not None:
            _rotate(population, rng)
        stars = draw_stars(max(1, round(config.star_fraction * wanted[sample])), survey, rng)
        samples[sample] = concatenate([population, stars]) if config.star_fraction > 0 else population
    return samples


def _rotate(population: Population, rng: np.random.Generator) -> None:
    """Turn every galaxy by a random angle, in place."""
    angle = 2 * np.pi * rng.random((len(population), 1))
    g1, g2 = population.g1, population.g2
    population.g1 = g1 * np.cos(angle) - g2 * np.sin(angle)
    population.g2 = g1 * np.sin(angle) + g2 * np.cos(angle)


def make_banks(config: TrainingConfig, directory: str | os.PathLike) -> None:
    """Render the three banks into ``directory``, as train.npz, validation.npz and test.npz.

    Banks that are there already are kept: remove them to draw anew.

    Parameters
    ----------
    config : `TrainingConfig`
    directory : path
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    survey = get_survey_info(config.survey, tuple(config.bands))
    for i, (sample, population) in enumerate(draw_sources(config.population, survey).items()):
        path = directory / f"{sample}.npz"
        if path.exists():
            _LOG.info("Keeping %s.", path)
            continue
        rng = np.random.default_rng([config.population.seed, i + 1])
        bank = render_bank(
            population,
            survey.pixel_scale,
            rng,
            stamp_size=config.population.stamp_size,
            progress=functools.partial(_LOG.info, "%s: of %d sources, done: %d.", sample, len(population)),
        )
        bank.save(path)
        _LOG.info("Wrote %s: %d sources, %d components.", path, len(bank), len(bank.stamps))
