# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Configuration of a training, from the galaxies to the optimiser."""

from __future__ import annotations

__all__ = ["FitConfig", "NetworkConfig", "PopulationConfig", "TrainingConfig", "load_config"]

import os

from lsst.pex.config import ChoiceField, Config, ConfigField, Field, ListField

from .scenes import SceneConfig


class PopulationConfig(Config):
    """The galaxies and stars that a bank is made of."""

    cosmos_directory = Field[str](
        "Directory of a galsim.COSMOSCatalog; the embedded model is used if this is not set.", optional=True
    )
    cosmos_file = Field[str]("Catalogue file in that directory; GalSim's default if not set.", optional=True)
    cosmos_exclusion = Field[str](
        'Exclusion level of galsim.COSMOSCatalog; all but "none" need its selection file.', default="marginal"
    )
    n_train = Field[int]("Galaxies in the training bank.", default=30000)
    n_validation = Field[int]("Galaxies in the validation bank.", default=1500)
    n_test = Field[int]("Galaxies in the test bank.", default=1500)
    star_fraction = Field[float]("Stars, as a fraction of the number of galaxies.", default=0.08)
    mag_range = ListField[float](
        "Magnitude limits in the reference band (i).", default=[18.0, 27.0], length=2
    )
    count_slope = Field[float](
        "d log10 N / dm of the embedded model; flatter than the sky's 0.3 gives bright galaxies more weight.",
        default=0.22,
    )
    stamp_size = Field[int]("Width of the bank's stamps, pixel, odd.", default=97)
    seed = Field[int]("Seed of the random numbers.", default=20200101)


class NetworkConfig(Config):
    """Architecture."""

    latent_size = Field[int]("Number of latent variables.", default=32)
    widths = ListField[int](
        "Channels of the encoder at 1/4, 1/8 and 1/16 of the resolution.", default=[64, 128, 256]
    )
    hidden = Field[int]("Units of the hidden dense layers.", default=256)
    profiles = Field[int]("Concentric elliptical profiles of the decoder.", default=2)
    rungs = Field[int]("Gaussians in the ladder of each profile.", default=7)
    free_gaussians = Field[int]("Gaussians with positions of their own.", default=10)


class FitConfig(Config):
    """One of the two steps of the training."""

    samples = Field[int]("Training samples.", default=300000)
    batch_size = Field[int]("Samples per step and process.", default=256)
    learning_rate = Field[float](
        "Peak learning rate of AdamW, after warm-up and before cosine decay.", default=2e-3
    )
    weight_decay = Field[float]("Weight decay of AdamW.", default=1e-3)
    gradient_clip = Field[float]("Largest norm of the gradient.", default=5.0)
    kl_weight = Field[float]("Beta, the weight of the Kullback-Leibler divergence.", default=0.02)
    flux_weight = Field[float]("Weight of the flux term.", default=0.3)
    validation_batches = Field[int]("Batches of the fixed validation sample.", default=8)
    validation_every = Field[int]("Steps between validations.", default=200)
    precision = ChoiceField[str](
        "Arithmetic of the networks; bfloat16 is several times faster on processors that have it.",
        default="bf16-mixed",
        allowed={"bf16-mixed": "bfloat16 autocast", "32-true": "single precision"},
    )
    seed = Field[int]("Seed of scenes and weights.", default=1)


class TrainingConfig(Config):
    """Everything that makes a network."""

    name = Field[str]("Name of the network, and of its files.", default="network")
    survey = Field[str]("Survey: a name that surveycodex knows.", default="LSST")
    bands = ListField[str]("Bands, in the network's order.", default=["u", "g", "r", "i", "z", "y"])
    population = ConfigField[PopulationConfig]("Galaxies and stars.")
    scene = ConfigField[SceneConfig]("Blends.")
    network = ConfigField[NetworkConfig]("Architecture.")
    prior = ConfigField[FitConfig]("Step 1: the variational autoencoder on isolated galaxies.")
    deblender = ConfigField[FitConfig]("Step 2: the deblender, whose decoder is step 1's, frozen.")

    def validate(self) -> None:
        super().validate()
        if self.scene.cutout_size % 16:
            raise ValueError(f"cutout_size must be a multiple of 16, not {self.scene.cutout_size}.")


def load_config(path: str | os.PathLike) -> TrainingConfig:
    """Read a training configuration: a Python file of ``config.field = value`` lines, as for any LSST task.

    Such a file is a program: read it before running one that came from elsewhere.
    """
    config = TrainingConfig()
    config.load(os.fspath(path))
    config.validate()
    return config
