# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Configuration of a training, from the galaxies to the optimiser.

One file says what is simulated and what is made of it. It is read here, below training, so that the same
samples can be simulated, and networks measured on them, without torch.
"""

from __future__ import annotations

__all__ = [
    "BETA",
    "BlendConfig",
    "FitConfig",
    "NetworkConfig",
    "PopulationConfig",
    "SceneConfig",
    "TrainingConfig",
    "load_config",
    "training_length",
]

import os
import traceback

from lsst.pex.config import ChoiceField, Config, ConfigField, DictField, Field, ListField

BETA = 2.5
"""Constant of the normalisation of pixels in Arcelin et al. (2020), equation 4."""


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
    star_mag_range = ListField[float](
        "Limits of the stars' magnitudes in the reference band.", default=[17.0, 26.0], length=2
    )
    mag_range = ListField[float](
        "Magnitude limits in the reference band (i).", default=[18.0, 27.0], length=2
    )
    count_slope = Field[float](
        "d log10 N / dm of the embedded model; flatter than the sky's 0.3 gives bright galaxies more weight.",
        default=0.22,
    )
    faintest = DictField[str, float](
        "Limiting magnitudes by band, besides that in the reference band.", default={}
    )
    colour_gradients = Field[bool](
        "Whether the components of a galaxy have colours of their own.", default=True
    )
    knot_fraction = Field[float]("Fraction of the embedded model's disks that carry knots.", default=0.4)
    size_scatter = Field[float](
        "Scatter of the embedded model's half-light radii about their relation with magnitude, dex.",
        default=0.22,
    )
    sersic_range = ListField[float](
        "Limits of the index of the embedded model's single Sersic profiles.", default=[0.5, 5.5], length=2
    )
    real_catalogue = Field[str](
        "File of a galsim.RealGalaxyCatalog, whose galaxies are mixed in; its image files lie beside it.",
        optional=True,
    )
    real_fraction = Field[float]("Fraction of each sample that is real, with such a catalogue.", default=0.2)
    # Otherwise the shapes of few galaxies are learnt by heart (doc/experiments/011).
    real_shear = Field[float](
        "Largest reduced shear of real galaxies in the training and validation samples; the test has none.",
        default=0.0,
        check=lambda x: 0 <= x < 1,
    )
    stamp_size = Field[int](
        "Width of the bank's stamps, pixel; odd for fields, even for single blends.", default=97
    )
    seed = Field[int]("Seed of the random numbers.", default=20200101)


class SceneConfig(Config):
    """What training scenes look like."""

    cutout_size = Field[int]("Width of the network's cutouts, pixel.", default=64)
    field_size = Field[int]("Width of the composed fields, pixel.", default=192)
    density_range = ListField[float](
        "Sources per square arcmin, log-uniform between these.", default=[40.0, 250.0], length=2
    )
    clustered_fraction = Field[float]("Fraction of the sources placed next to another source.", default=0.4)
    cluster_scale = Field[float](
        "Scale of the exponential distance of clustered sources, arcsec.", default=1.0
    )
    host_flux_power = Field[float](
        "Hosts of clustered sources are drawn with probabilities proportional to this power of their flux: 0 "
        "prefers none, larger numbers put more faint sources into the light of bright ones.",
        default=0.3,
    )
    psf_fwhm_range = ListField[float](
        "Full width at half maximum of the PSF, arcsec, uniform between these.", default=[0.5, 1.2], length=2
    )
    psf_max_ellipticity = Field[float]("Largest reduced shear of a PSF.", default=0.1)
    psf_bank_size = Field[int]("Number of PSFs that are drawn once and reused.", default=1000)
    noise_range = ListField[float](
        "Noise relative to the survey's full depth, log-uniform, common to all bands.",
        default=[0.7, 3.0],
        length=2,
    )
    noise_band_scatter = Field[float](
        "Scatter of the noise of single bands about that, natural log.", default=0.25
    )
    subtracted_fraction = Field[float](
        "Fraction of the fields in which sources other than the targets are subtracted with errors, "
        "as in the later iterations of the procedure.",
        default=0.6,
    )
    subtraction_error = Field[float]("Relative error of the subtracted components.", default=0.1)
    subtraction_spread = Field[float](
        "Sources are subtracted better than that by a factor of up to ten to this power, log-uniform: bright "
        "ones leave thousandths of their light, not tenths.",
        default=0.0,
    )
    subtraction_shift = Field[float](
        "Error of the subtracted sources' positions on each axis, pixel, smaller by the same factor.",
        default=0.0,
    )
    boosted_fraction = Field[float](
        "Fraction of the sources, never targets, that are made brighter than the bank has them.", default=0.0
    )
    largest_boost = Field[float]("Largest factor of that, log-uniform from 3.", default=1000.0)
    odd_colour_fraction = Field[float](
        "Fraction of the sources with colours that no catalogue has: without light in the bluest bands, with "
        "light in one band alone, or with each band's light changed by itself.",
        default=0.0,
    )
    noise_correlation = ListField[float](
        "Correlation of the noise of neighbouring pixels, as resampling leaves it, uniform between these for "
        "each field and band; the noise that is stated is that of a pixel.",
        default=[0.0, 0.0],
        length=2,
        itemCheck=lambda x: 0 <= x < 0.7,
    )
    sky_error = Field[float](
        "Largest sky left over, either sign, in units of the noise; uniform for each field and band.",
        default=0.0,
    )
    saturated_fraction = Field[float](
        "Fraction of the fields in which bright cores are masked, with the columns into which they bleed.",
        default=0.0,
    )
    saturation_mag_range = ListField[float](
        "Magnitude of the faintest star that is saturated in its middle, uniform for each field and band.",
        default=[16.0, 18.5],
        length=2,
    )
    psf_size = Field[int](
        "Width of the PSFs with which fields are convolved, pixel, odd; the sum is 1 within the 41 pixels "
        "that a network is told about.",
        default=41,
        check=lambda x: x >= 41 and x % 2 == 1,
    )
    centring_error = Field[float](
        "Gaussian error of the peak about the true position, pixel, before rounding to a pixel.", default=0.0
    )
    min_snr = Field[float]("Smallest signal-to-noise ratio, all bands, of a target.", default=5.0)
    targets_per_field = Field[int]("Largest number of cutouts taken from one field.", default=24)
    mask_fraction = Field[float]("Fraction of the cutouts with masked pixels.", default=0.15)
    band_dropout = Field[float]("Fraction of the cutouts that lack one or more bands.", default=0.05)


class BlendConfig(Config):
    """What the blends look like, and what the telescopes do to them."""

    max_galaxies = Field[int]("Largest number of galaxies; 1 to this are equally likely.", default=4)
    annulus = ListField[float](
        "Distances of the neighbours from the target, arcsec, uniform over the area between.",
        default=[0.325, 2.0],
        length=2,
    )
    exposure = DictField[str, float](
        "Exposure time by band, s, where it is not the survey's.",
        default=dict.fromkeys(("IE", "YE", "JE", "HE"), 4 * 450.0),
    )
    psf_fwhm = DictField[str, float](
        "Full width at half maximum of the PSF by band, arcsec.",
        default=dict.fromkeys("ugrizy", 0.65) | {"IE": 0.18} | dict.fromkeys(("YE", "JE", "HE"), 0.22),
    )
    moffat_beta = DictField[str, float](
        "Bands whose PSF is a Moffat profile, with its exponent (not in the paper); others are Kolmogorov.",
        default=dict.fromkeys(("IE", "YE", "JE", "HE"), 2.5),
    )
    decentring = ChoiceField[str](
        "Where the target is.",
        default="none",
        allowed={
            "none": "in the middle of the cutout, the corner of its four central pixels",
            "uniform": "anywhere in a square about it",
            "peaks": "near a peak found on a larger image, cropped at the pixel corner nearest to the peak",
        },
    )
    decentring_width = Field[float]("Width of that square, arcsec.", default=0.2)
    peak_threshold = Field[float]("Threshold of the peaks, standard deviations of the sky.", default=5.0)
    peak_box = Field[int]("Width of the box in which a peak is the maximum, pixel, odd.", default=5)
    centring_blends = Field[int](
        "Blends from which the centring error of isolated galaxies is fitted.", default=2000
    )


class NetworkConfig(Config):
    """Architecture."""

    architecture = ChoiceField[str](
        "Kind of the networks, and the loss that goes with it.",
        default="gaussians",
        allowed={
            "gaussians": "a decoder that draws sums of Gaussians in the model frame",
            "convolutional": "the paper's figure 2: convolutions to normalised pixels in the observed frame",
        },
    )
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
    base = Field[str](
        "Configuration that gives the step its first weights; the card has what the checkpoint tells.",
        default="",
    )
    # Small batches: the number of steps counts for more than their smoothness (doc/experiments/008).
    batch_size = Field[int]("Samples per step and process.", default=64)
    optimizer = ChoiceField[str](
        "What turns gradients into steps.",
        default="adamw",
        allowed={
            "adamw": "every number by its own scale",
            "muon": "weight matrices by orthogonalised momentum, all else as AdamW",
        },
    )
    learning_rate = Field[float]("Peak learning rate, after warm-up and before cosine decay.", default=1e-3)
    weight_decay = Field[float]("Decoupled weight decay.", default=1e-3)
    gradient_clip = Field[float]("Largest norm of the gradient.", default=5.0)
    kl_weight = Field[float]("Beta, the weight of the Kullback-Leibler divergence.", default=0.02)
    loss_knee = Field[float](
        "Loss of a sample above which it counts by its logarithm, so that few bright sources do not rule; "
        "none: in proportion.",
        optional=True,
        check=lambda x: x > 0,
    )
    exposures = Field[int](
        "Noise realisations of each blend in a batch; the mean of their models is compared with the truth, "
        "which leaves less bias and more scatter (single blends only).",
        default=1,
        check=lambda x: x > 0,
    )
    flux_weight = Field[float]("Weight of the flux term.", default=0.3)
    validation_batches = Field[int]("Batches of the fixed validation sample.", default=32)
    validation_every = Field[int]("Steps between validations.", default=500)
    precision = ChoiceField[str](
        "Arithmetic of the networks; bfloat16 is several times faster on processors that have it.",
        default="bf16-mixed",
        allowed={"bf16-mixed": "bfloat16 autocast", "32-true": "single precision"},
    )
    seed = Field[int]("Seed of scenes and weights.", default=1)


class TrainingConfig(Config):
    """Everything that makes a network."""

    name = Field[str]("Name of the network, and of its files.", default="network")
    base = Field[str](
        "Not used.", optional=True, deprecated="Each step has a base of its own (prior.base, deblender.base)."
    )
    survey = Field[str](
        'Survey: a name that surveycodex knows, or several joined by "+", whose bands share one network.',
        default="LSST",
    )
    bands = ListField[str]("Bands, in the network's order.", default=["u", "g", "r", "i", "z", "y"])
    population = ConfigField[PopulationConfig]("Galaxies and stars.")
    composition = ChoiceField[str](
        "How samples are composed.",
        default="fields",
        allowed={
            "fields": "cutouts of crowded fields with varying PSF and depth, targets in the model frame",
            "blends": "single blends with a fixed PSF and depth, targets in the observed frame (the paper's)",
        },
    )
    scene = ConfigField[SceneConfig]("Crowded fields; of single blends only the width of the cutouts.")
    blend = ConfigField[BlendConfig]("Single blends.")
    network = ConfigField[NetworkConfig]("Architecture.")
    prior = ConfigField[FitConfig]("Step 1: the variational autoencoder on isolated galaxies.")
    deblender = ConfigField[FitConfig]("Step 2: the deblender, whose decoder is step 1's, frozen.")

    def validate(self) -> None:
        super().validate()
        if self.scene.cutout_size % 16:
            raise ValueError(f"cutout_size must be a multiple of 16, not {self.scene.cutout_size}.")
        if (self.composition == "blends") != (self.network.architecture == "convolutional"):
            raise ValueError(
                f"Networks of kind {self.network.architecture} cannot learn from {self.composition}: sums of "
                "Gaussians need targets in the model frame, convolutional networks in the observed frame."
            )
        for name in ("prior", "deblender"):
            exposures, batch = getattr(self, name).exposures, getattr(self, name).batch_size
            if exposures > 1 and (self.composition != "blends" or batch % exposures):
                raise ValueError(
                    f"{name}.exposures = {exposures} is for single blends, in batches of a multiple of it, "
                    f"not for {self.composition} in batches of {batch}."
                )


def training_length(training: dict) -> str:
    """Tell from a network's metadata how many samples it has seen, and whose weights each step started from.

    Parameters
    ----------
    training : `dict`
        `~lsst.meas.vaedeblend.network.NetworkMetadata.training`.

    Returns
    -------
    text : `str`
    """
    samples, base = (
        value if isinstance(value, dict) else {} for value in map(training.get, ("samples", "base"))
    )
    steps = [
        f"{step} {samples[step]}" + (f" from the weights of {base[step]}" if base.get(step) else "")
        for step in ("prior", "deblender")
        if step in samples
    ]
    return ", ".join(steps) or "unknown"


def load_config(path: str | os.PathLike) -> TrainingConfig:
    """Read a training configuration: a Python file of ``config.field = value`` lines, as for any LSST task.

    Such a file is a program: read it before running one that came from elsewhere.

    Raises
    ------
    OSError
        Raised if the file cannot be read.
    ValueError
        Raised if it cannot be run, names a field that there is not, or gives one a wrong value.
    """
    config, name = TrainingConfig(), os.fspath(path)
    try:
        config.load(name)
    except OSError:
        raise
    except Exception as error:  # whatever a program may raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(name)]
        where = f"{name}, line {lines[-1]}" if lines else name
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    config.validate()
    return config
