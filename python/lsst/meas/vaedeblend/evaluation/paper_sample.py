# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Test samples of Arcelin et al. (2020), and what networks make of them, as numbers."""

from __future__ import annotations

__all__ = ["Measurement", "PaperSample", "SampleMaker", "measure_image"]

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..ground.statistics import stamp_snr
from ..network import Network, NetworkError
from ..simulation.banks import centring_errors, draw_sources, sample_banks, survey_of
from ..simulation.blends import Blend, BlendComposer, fit_centring_error, psf_stamp
from ..simulation.config import PopulationConfig, TrainingConfig
from ..simulation.ksb import ksb_shape
from ..simulation.population import Population
from .metrics import blendedness_closest, blendedness_total, magnitude, poisson_variance

_CHUNK = 100
"""Blends that are in memory at once."""


def measure_image(image: NDArray, psf: NDArray) -> tuple[float, float, float]:
    """Measure an r-band image: KSB ellipticities g1, g2, and AB magnitude of the summed flux.

    A corrected ellipticity beyond 1, which no ellipse has, is a failed measurement: NaN.

    Parameters
    ----------
    image, psf : `numpy.ndarray`, (S, S), (h, w)
        The image, nJy, and its fixed PSF.
    """
    g1, g2 = ksb_shape(image, psf)
    if np.hypot(g1, g2) > 1:
        g1 = g2 = np.nan
    return g1, g2, float(magnitude(image.sum(dtype=float)))


@dataclasses.dataclass
class Measurement:
    """What one network made of a sample of N blends.

    Attributes
    ----------
    shape : `numpy.ndarray`, (N, 2)
        KSB ellipticity of the output in r; NaN where the measurement failed.
    mag : `numpy.ndarray`, (N,)
        r magnitude of the output.
    latent : `numpy.ndarray`, (N, L)
        One draw of the latent variables from each posterior.
    """

    shape: NDArray
    mag: NDArray
    latent: NDArray

    def __getitem__(self, rows) -> Measurement:
        return Measurement(self.shape[rows], self.mag[rows], self.latent[rows])


@dataclasses.dataclass
class PaperSample:
    """A sample of N blends with its truth, and what each network made of it.

    Attributes
    ----------
    shape, mag : `numpy.ndarray`, (N, 2) and (N,)
        Of the noiseless targets in r, as `Measurement`'s.
    snr : `numpy.ndarray`, (N,)
        Equation 7.
    b_closest, b_total : `numpy.ndarray`, (N,)
        Equations 1 to 3; the first is NaN for isolated galaxies.
    mag_difference : `numpy.ndarray`, (N,)
        r magnitude of the closest neighbour minus that of the target; NaN for isolated galaxies.
    redshift : `numpy.ndarray`, (N,)
    outputs : `dict` [`str`, `Measurement`]
        By network.
    examples : `list`
        The first blends, each with the models of all networks, `dict` [`str`, (B, S, S)].
    """

    shape: NDArray
    mag: NDArray
    snr: NDArray
    b_closest: NDArray
    b_total: NDArray
    mag_difference: NDArray
    redshift: NDArray
    outputs: dict[str, Measurement]
    examples: list[tuple[Blend, dict[str, NDArray]]]

    @property
    def ellipticity(self) -> NDArray:
        """Absolute value of the targets' ellipticity, (N,)."""
        return np.hypot(*self.shape.T)

    def shape_error(self, network: str) -> NDArray:
        """Error of the absolute ellipticity, output minus target, (N,)."""
        return np.hypot(*self.outputs[network].shape.T) - self.ellipticity

    def mag_error(self, network: str) -> NDArray:
        """Error of the r magnitude, output minus target, (N,)."""
        return self.outputs[network].mag - self.mag

    def __getitem__(self, rows) -> PaperSample:
        names = ("shape", "mag", "snr", "b_closest", "b_total", "mag_difference", "redshift")
        return PaperSample(
            **{k: getattr(self, k)[rows] for k in names},
            outputs={k: v[rows] for k, v in self.outputs.items()},
            examples=self.examples,
        )


class SampleMaker:
    """Simulates the test sample of one configuration.

    Parameters
    ----------
    config : `TrainingConfig`
        One of the paper's configurations.
    galaxies : `int`, optional
        Number of galaxies, if fewer than the configuration's ``n_test``.
    real : `bool`, optional
        Take the real galaxies of the configuration's catalogue only.
    seed : `int`, optional
        Seed of blends and noise.
    processes : `int`, optional
        Processes that render the galaxies.

    Notes
    -----
    Galaxies of the embedded model are drawn with a seed of their own, so none of them is in any network's
    training sample; those of a catalogue are the configuration's own test sample.
    """

    def __init__(
        self,
        config: TrainingConfig,
        galaxies: int | None = None,
        real: bool = False,
        seed: int = 0,
        processes: int = 1,
    ):
        self.config, self.survey, self._rng = config, survey_of(config), np.random.default_rng([seed, 8])
        self.population = _test_population(config, real)[:galaxies]
        self.banks = sample_banks(config, self.population, self._rng, processes=processes)
        if config.blend.decentring == "peaks":
            n = min(config.blend.centring_blends, 20 * len(self.population))
            self.banks.centring = fit_centring_error(centring_errors(self.banks, config, self._rng, n))
        self.reference = self.survey.band_names.index("r")
        self.psf = psf_stamp(config.blend, self.survey.bands[self.reference])

    def composer(self, isolated: bool = False) -> BlendComposer:
        size = self.config.scene.cutout_size
        return BlendComposer(self.banks, self.survey, self.config.blend, size, self._rng, isolated)

    def run(
        self, networks: Mapping[str, Network], n: int, isolated: bool = False, examples: int = 0
    ) -> PaperSample:
        """Simulate ``n`` blends, give them to every network, and measure.

        Parameters
        ----------
        networks : mapping [`str`, `Network`]
            Their bands must be the first ones of the sample.
        n : `int`
        isolated : `bool`, optional
            Simulate isolated galaxies.
        examples : `int`, optional
            Number of blends that are kept with their models.

        Returns
        -------
        sample : `PaperSample`
            Networks are run once for each image, at the mean of the posterior.

        Raises
        ------
        NetworkError
            If a network has other bands.
        """
        for network in networks.values():
            bands = network.metadata.bands
            if bands != self.survey.band_names[: len(bands)]:
                raise NetworkError(
                    f"{network.path}: the network's bands are {bands}, the sample's {self.survey.band_names}."
                )
        composer = self.composer(isolated)
        truth: list[tuple] = []
        found: dict[str, list[tuple]] = {k: [] for k in networks}
        latents: dict[str, list[NDArray]] = {k: [] for k in networks}
        kept: list[tuple[Blend, dict[str, NDArray]]] = []
        while len(truth) < n:
            blends = [composer.blend() for _ in range(min(_CHUNK, n - len(truth)))]
            truth += [self._truth(b) for b in blends]
            image = np.stack([b.image for b in blends])
            new: list[tuple[Blend, dict[str, NDArray]]] = [
                (b, {}) for b in blends[: max(0, examples - len(kept))]
            ]
            for name, network in networks.items():
                output = deblend_images(network, image[:, : len(network.metadata.bands)])
                found[name] += [measure_image(m, self.psf) for m in output.model[:, self.reference]]
                draw = self._rng.standard_normal(output.latent_mean.shape)
                latents[name].append(output.latent_mean + output.latent_sigma * draw)
                for (_, models), model in zip(new, output.model, strict=False):
                    models[name] = model
            kept += new
        columns = np.array(truth).T
        return PaperSample(
            shape=columns[:2].T,
            mag=columns[2],
            snr=columns[3],
            b_closest=columns[4],
            b_total=columns[5],
            mag_difference=columns[6],
            redshift=columns[7],
            outputs={k: _measurement(found[k], latents[k]) for k in networks},
            examples=kept,
        )

    def _truth(self, blend: Blend) -> tuple:
        """What is known of one blend; see `PaperSample`."""
        target, band = blend.members[0], self.survey.bands[self.reference]
        g1, g2, mag = measure_image(target, self.psf)
        snr = stamp_snr(target, poisson_variance(target, band.counts_per_njy, band.sky_counts))
        closest = difference = np.nan
        total = 0.0
        if (i := blend.closest) is not None:
            closest = blendedness_closest(target, blend.members[i])
            total = blendedness_total(target, blend.members.sum(axis=0))
            mags = self.population.magnitude("r")[blend.rows]
            difference = mags[i] - mags[0]
        return g1, g2, mag, float(snr), closest, total, difference, self.population.redshift[blend.rows[0]]


def deblend_images(network: Network, image: NDArray, epsilon: NDArray | None = None):
    """Run a network that reads nothing but images, (N, B, S, S) nJy; `NetworkOutput`."""
    n, b = image.shape[:2]
    return network.deblend(image, np.ones_like(image), np.ones((n, b)), np.zeros((n, b, 3)), epsilon)


def _measurement(rows: list[tuple], latents: list[NDArray]) -> Measurement:
    table = np.array(rows)
    return Measurement(table[:, :2], table[:, 2], np.concatenate(latents))


def _test_population(config: TrainingConfig, real: bool) -> Population:
    population = PopulationConfig()
    population.update(**config.population.toDict())
    if real:
        # All samples in the same proportion: the split stays that of the training.
        population.real_fraction = 1.0
        return draw_sources(population, survey_of(config))["test"]
    population.real_catalogue = None
    if population.cosmos_directory is None:
        population.seed += 1_000_003
        population.n_train = population.n_validation = 1
    return draw_sources(population, survey_of(config))["test"]
