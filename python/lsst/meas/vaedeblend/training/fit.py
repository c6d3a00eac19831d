# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The two steps of the training, run by lightning."""

from __future__ import annotations

__all__ = ["SceneData", "VaeModule", "fit_step", "settle_norms", "whiten"]

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..ground.bands import reference_band
from ..simulation.banks import bank_checksum, bank_paths, survey_of
from ..simulation.blends import BlendBanks, BlendComposer
from ..simulation.config import FitConfig, TrainingConfig
from ..simulation.galaxies import GalaxyBank
from ..simulation.scenes import PsfBank, SceneComposer
from .convolutional import normalise
from .history import History, read_history
from .losses import LossTerms, bernoulli_loss, evidence_loss, logarithmic
from .networks import build_networks
from .optimizer import Muon
from .weights import load_weights

_LOG = logging.getLogger("lsst.meas.vaedeblend.training")

STEPS = ("prior", "deblender")


class _Stream(IterableDataset):
    """Endless or fixed batches from a composer that is built in the worker."""

    def __init__(self, make_composer, batch_size: int, seed: list[int], batches: int | None = None):
        self._make, self._batch_size, self._seed, self._batches = make_composer, batch_size, seed, batches

    def __iter__(self):
        worker = get_worker_info()
        seed = [*self._seed, 0 if worker is None else worker.id]
        stream = self._make(np.random.default_rng(seed)).batches(self._batch_size)
        for i, batch in enumerate(stream):
            if self._batches is not None and i == self._batches:
                return
            yield {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in batch.as_dict().items()}


class SceneData(lightning.LightningDataModule):
    """Samples of one training step.

    Parameters
    ----------
    config : `TrainingConfig`
    directory : path
        Holds the banks of `make_banks`.
    step : `str`
        "prior" or "deblender".
    workers : `int`
        Processes that compose scenes; 0 composes in the training process.

    Raises
    ------
    FileNotFoundError
        If a bank is not there.
    """

    def __init__(self, config: TrainingConfig, directory: str | os.PathLike, step: str, workers: int = 1):
        super().__init__()
        self._config, self._directory, self._step, self._workers = config, Path(directory), step, workers
        self._fit: FitConfig = getattr(config, step)
        self.seed = self._fit.seed
        self.survey = survey_of(config)
        for sample in ("train", "validation"):
            for bank in bank_paths(config, self.survey, self._directory, sample):
                if not bank.exists():
                    raise FileNotFoundError(f"There is no {bank}; `vaedeblend simulate` makes it.")
        self.psfs: PsfBank | None = None
        if config.composition == "fields":
            rng = np.random.default_rng([config.population.seed, 77])
            self.psfs = PsfBank(config.scene, self.survey.pixel_scale, rng)

    def kernel_power(self) -> Tensor:
        """Squared modulus of each PSF's difference kernel, (P, S, S // 2 + 1); empty for single blends."""
        if self.psfs is None:
            return torch.zeros(0)
        return torch.from_numpy(np.abs(self.psfs.kernels(self._config.scene.cutout_size)) ** 2)

    def composer(self, sample: str, isolated: bool | None = None):
        """Make a function from a random generator to the composer of one sample's scenes.

        Isolated galaxies are those of the prior's step, unless ``isolated`` says otherwise.
        """
        config = self._config
        isolated = self._step == "prior" if isolated is None else isolated
        made_with = bank_checksum(config)
        if config.composition == "blends":
            banks = BlendBanks.load(self._directory, sample, self.survey, made_with)
            size, exposures = config.scene.cutout_size, self._fit.exposures if sample == "train" else 1
            return lambda rng: BlendComposer(banks, self.survey, config.blend, size, rng, isolated, exposures)
        bank, psfs = GalaxyBank.load(self._directory / f"{sample}.npz", made_with), self.psfs
        assert psfs is not None
        return lambda rng: SceneComposer(bank, psfs, self.survey, config.scene, rng, isolated=isolated)

    def mean_maximum(self, samples: int = 2000) -> Tensor:
        """Mean over noisy isolated galaxies of each band's largest pixel, nJy, (B,): equation 4's scale."""
        composer = self.composer("train", isolated=True)(np.random.default_rng(4))
        batches = composer.batches(100)
        maxima = [next(batches).image.max(axis=(2, 3)) for _ in range(-(-samples // 100))]
        return torch.from_numpy(np.concatenate(maxima).mean(axis=0))

    def train_dataloader(self) -> DataLoader:
        # A resumed run must not see the same scenes again, nor two processes the same.
        assert self.trainer is not None
        seed = [self.seed, self.trainer.global_step, self.trainer.global_rank]
        stream = _Stream(self.composer("train"), self._fit.batch_size, seed)
        prefetch = 4 if self._workers else None
        return DataLoader(stream, batch_size=None, num_workers=self._workers, prefetch_factor=prefetch)

    def val_dataloader(self) -> DataLoader:
        stream = _Stream(self.composer("validation"), self._fit.batch_size, [0], self._fit.validation_batches)
        # Anything with a length and items will do for a data set.
        return DataLoader(list(stream), batch_size=None)  # type: ignore[arg-type]


class VaeModule(lightning.LightningModule):
    """One training step: the prior (encoder and decoder learn) or the deblender (the decoder is frozen).

    Parameters
    ----------
    config : `TrainingConfig`
    step : `str`
        "prior" or "deblender".
    kernel_power : `torch.Tensor`, (P, S, S // 2 + 1)
    """

    kernel_power: Tensor
    encoder: Any
    decoder: Any

    def __init__(self, config: TrainingConfig, step: str, kernel_power: Tensor):
        super().__init__()
        if step not in STEPS:
            raise ValueError(f"step must be one of {STEPS}, not {step!r}.")
        self.step, self.fit = step, getattr(config, step)
        bands, size = len(config.bands), config.scene.cutout_size
        self.encoder, self.decoder = build_networks(bands, size, config.network)
        self.convolutional = config.network.architecture == "convolutional"
        if step == "deblender":
            self.decoder.requires_grad_(False)
        self.reference = config.bands.index(reference_band(config.bands))
        self.register_buffer("kernel_power", kernel_power, persistent=False)
        # Fraction of a run's time that is over; `fit_step` knows it for runs that are limited in time.
        self.time_used: Callable[[], float] = lambda: 0.0

    @property
    def _autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.fit.precision == "bf16-mixed" else None

    def set_scale(self, scale: Tensor) -> None:
        """Set the constants of the paper's normalisation, nJy, (B,); they are part of the weights."""
        self.encoder.scale.copy_(scale)
        self.decoder.scale.copy_(scale)

    def _forward(
        self, batch: dict[str, Tensor], sample: bool, exposures: int = 1
    ) -> tuple[LossTerms, Tensor, Tensor]:
        """Loss of blends, log fluxes (N, B) and images, of unit flux or nJy, (N, B, S, S)."""
        mean, sigma = self.encoder(
            batch["image"],
            batch["valid"].float(),
            batch["noise"],
            batch["psf_moments"],
            autocast=self._autocast,
        )
        latent = mean + sigma * torch.randn_like(sigma) if sample else mean
        if self.convolutional:
            logits = self.decoder.logits(latent, self._autocast)
            target = normalise(batch["target"][::exposures], self.decoder.scale)
            terms = bernoulli_loss(logits, target, mean, sigma, self.fit.kl_weight, exposures)
            model = self.decoder.image(logits.detach())
            return terms, torch.log(model.sum((2, 3))), model
        shape = self.decoder.shape(latent)
        terms = evidence_loss(
            shape.log_flux,
            shape.morphology,
            mean,
            sigma,
            batch["target"],
            batch["target_flux"],
            self.kernel_power[batch["psf_index"]],
            batch["noise"],
            self.fit.kl_weight,
            self.fit.flux_weight,
        )
        return terms, shape.log_flux, shape.morphology

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        terms, _, _ = self._forward(batch, sample=True, exposures=self.fit.exposures)
        # The log shows the loss itself whatever the optimiser gets.
        self.log("loss", terms.total.mean(), prog_bar=True)
        self.log("kl", terms.kl.mean())
        knee = self.fit.loss_knee
        return (terms.total if knee is None else logarithmic(terms.total, knee)).mean()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        terms, log_flux, morphology = self._forward(batch, sample=False)
        r = self.reference
        truth, model = batch["target"][:, r].double(), morphology[:, r].double()
        cosine = (truth * model).sum((1, 2)) / torch.sqrt(
            truth.square().sum((1, 2)) * model.square().sum((1, 2))
        ).clamp(min=1e-30)
        bright = batch["target_flux"][:, r] / (batch["noise"][:, r] * 40.0**0.5) > 30.0
        e_truth, e_model = _ellipticity(truth[bright]), _ellipticity(model[bright])
        flux_error = (log_flux[:, r] - torch.log(batch["target_flux"][:, r].clamp(min=1e-3)))[bright].abs()
        n = len(truth)
        self.log("val_loss", terms.total.mean(), prog_bar=True, batch_size=n)
        self.log("val_chi2", terms.chi2.median(), batch_size=n)
        self.log("val_flux", terms.flux.mean(), batch_size=n)
        self.log("val_kl", terms.kl.mean(), batch_size=n)
        self.log("val_cosine", cosine[bright].float().mean(), prog_bar=True, batch_size=n)
        self.log("val_flux_error", flux_error.median(), prog_bar=True, batch_size=n)
        for i in (0, 1):
            response = _response(e_model[:, [i]], e_truth[:, [i]])
            self.log(f"val_response_e{i + 1}", response.float(), prog_bar=True, batch_size=n)
        # What is fainter than the noise has no colour.
        faint = torch.log(batch["noise"][bright])
        colours = (
            torch.maximum(f, faint).diff(dim=1)
            for f in (log_flux[bright], batch["target_flux"][bright].log())
        )
        colour_response = _response(*colours)
        self.log("val_response_colour", colour_response, prog_bar=True, batch_size=n)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        options = {"lr": self.fit.learning_rate, "weight_decay": self.fit.weight_decay}
        optimizer: torch.optim.Optimizer
        if self.fit.optimizer == "muon":
            optimizer = Muon(parameters, dtype=self._autocast or torch.float32, **options)
        else:
            optimizer = torch.optim.AdamW(parameters, fused=True, **options)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warm = max(1, min(200, total // 10))

        def rate(i: int) -> float:
            # A run that ends by time may do so before it is warm: its rate comes down all the same.
            rise = min(1.0, (i + 1) / warm)
            done = min(1.0, max((i - warm) / max(1, total - warm), self.time_used(), 0.0))
            return rise * (0.5 * (1 + math.cos(math.pi * done)) + 1e-3)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.step == "deblender":
            self.decoder.eval()


def _response(model: Tensor, truth: Tensor) -> Tensor:
    """Slope of model on truth, (N, K), about the mean of each column; 0 where models do not follow at all."""
    deviation = truth - truth.mean(dim=0)
    return (deviation * model).sum() / deviation.square().sum().clamp(min=1e-12)


def _ellipticity(images: Tensor) -> Tensor:
    """Polarisation (e1, e2) with a fixed circular weight of 2.5 pixels; a monitor, not a measurement."""
    size = images.shape[-1]
    line = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    y, x = line[:, None], line
    weighted = images * torch.exp(-0.5 * (x * x + y * y) / 2.5**2)
    xx, yy, xy = ((weighted * q).sum((1, 2)) for q in (x * x, y * y, x * y))
    return torch.stack([xx - yy, 2 * xy], dim=1) / (xx + yy).clamp(min=1e-30)[:, None]


@torch.no_grad()
def whiten(module: VaeModule, scenes: SceneData, samples: int = 8192) -> None:
    """Choose latent variables in which the galaxies have zero mean and unit covariance.

    With a small weight of the divergence the posteriors of all galaxies together are far from the standard
    normal distribution: some directions spread several times as far, others hardly at all. A prior that does
    not know would tie down the former and let the latter loose when latent variables are fitted to pixels.
    A linear change of variables, absorbed in the first and last layers, makes the standard normal prior
    right to second order.

    Parameters
    ----------
    module : `VaeModule`
        A trained prior.
    scenes : `SceneData`
        Its isolated galaxies.
    samples : `int`, optional
        Number of galaxies from which mean and covariance are estimated.
    """
    module.eval()
    batches = scenes.composer("train")(np.random.default_rng([scenes.seed, 11])).batches(256)
    means, variance = [], torch.zeros(())
    for _ in range(-(-samples // 256)):
        batch = next(batches)
        inputs = (batch.image, batch.valid.astype(np.float32), batch.noise, batch.psf_moments)
        mean, sigma = module.encoder(*map(torch.from_numpy, inputs))
        means.append(mean)
        variance = variance + sigma.square().sum(0)
    mean = torch.cat(means).double()
    covariance = mean.T.cov() + torch.diag(variance.double() / len(mean))
    values, vectors = torch.linalg.eigh(covariance)
    # Directions without any spread would become noise of unit width.
    matrix = (vectors * values.clamp(min=1e-4).sqrt()).float()
    for network in (module.encoder, module.decoder):
        network.transform_latents(matrix, mean.mean(0).float())


@torch.no_grad()
def settle_norms(module: VaeModule, scenes: SceneData, samples: int = 2048) -> None:
    """Give normalisations without statistics those of a step; the encoder's outputs stay as they are.

    Those of simplified artefacts come as mere biases (`~lsst.meas.vaedeblend.training.weights.load_weights`):
    in training, where batches are normalised by their own statistics, the first step would start from another
    function.

    Parameters
    ----------
    module : `VaeModule`
    scenes : `SceneData`
    samples : `int`, optional
        Number of scenes that give mean and variance.
    """
    norms: list[Any] = [m for m in module.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    norms = [norm for norm in norms if not norm.running_mean.any()]
    if not norms:
        return
    module.eval()
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms}

    def measure(norm, inputs) -> None:
        x = inputs[0].transpose(0, 1).flatten(1).double()
        sums[norm] += torch.stack([torch.full((len(x),), float(x.shape[1])), x.sum(1), x.square().sum(1)])

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    batches = scenes.composer("train")(np.random.default_rng([scenes.seed, 12])).batches(128)
    for _ in range(-(-samples // 128)):
        batch = next(batches)
        inputs = (batch.image, batch.valid.astype(np.float32), batch.noise, batch.psf_moments)
        module.encoder(*map(torch.from_numpy, inputs))
    for hook in hooks:
        hook.remove()
    for norm, (count, first, second) in sums.items():
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=1e-6)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - scale * norm.running_mean
        norm.weight.copy_(scale * torch.sqrt(variance + norm.eps))
        norm.bias.copy_(shift + scale * mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    module.train()


def _start_from(module: VaeModule, source: str | os.PathLike) -> None:
    """Give a module its first weights, all of them."""
    weights, wanted = load_weights(source), module.state_dict().keys()
    # The number of batches that normalisations have seen is of no use to an artefact, nor to the training.
    missing = [n for n in wanted - weights.keys() if not n.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{source} does not fit the configuration: it has no {', '.join(sorted(missing))}.")
    try:
        module.load_state_dict({n: weights[n] for n in wanted & weights.keys()}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the configuration: {error}") from error


def fit_step(
    config: TrainingConfig,
    step: str,
    data: str | os.PathLike,
    run: str | os.PathLike,
    *,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    workers: int = 1,
    progress: bool = True,
    initial: str | os.PathLike | None = None,
    hours: float | None = None,
    command: str = "",
) -> Path:
    """Run one step, from the start or from where it was left.

    Parameters
    ----------
    config : `TrainingConfig`
    step : `str`
        "prior" or "deblender"; the latter needs the prior's checkpoint in ``run``.
    data : path
        Directory of the banks.
    run : path
        Directory of checkpoints and logs.
    accelerator, devices, strategy
        As for `lightning.Trainer`: "cpu", "gpu"; a number; "ddp".
    workers : `int`
        Processes that compose scenes.
    progress : `bool`
        Show a progress bar.
    initial : `str` or path, optional
        What the step takes its first weights from, for transfer learning, as in
        `~lsst.meas.vaedeblend.training.weights.load_weights`. A deblender keeps the decoder found there if
        ``run`` has no prior.
    hours : `float`, optional
        End after so long, whatever the number of samples; the learning rate has come down by then.
        Interruptions do not count.
    command : `str`, optional
        The command that runs the step, for the card of the network.

    Returns
    -------
    checkpoint : `pathlib.Path`

    Raises
    ------
    FileNotFoundError
        If a bank is not there, or the deblender is asked for, and there is neither a trained prior nor a
        checkpoint to start from.
    ValueError
        If a bank, or what ``run`` holds, was made with another configuration.
    """
    run = Path(run) / step
    last, final = run / "last.ckpt", run / "final.ckpt"
    if final.exists():
        read_history(final, config, step)
        _LOG.info("Step %s is complete: %s.", step, final)
        return final
    settings: FitConfig = getattr(config, step)
    # Lightning has handlers of its own besides the application's, and everything would be said twice.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    lightning.seed_everything(settings.seed)
    # Far from a narrow Gaussian the images underflow, and denormal numbers are slow on most processors.
    torch.set_flush_denormal(True)
    scenes = SceneData(config, data, step, workers)
    module = VaeModule(config, step, scenes.kernel_power())
    if module.convolutional:
        module.set_scale(scenes.mean_maximum())
    if initial is not None:
        _start_from(module, initial)
        settle_norms(module, scenes)
    if step == "deblender":
        prior = run.parent / "prior" / "final.ckpt"
        if prior.exists():
            read_history(prior, config, "prior")
            weights = load_weights(prior)
            # The encoder of another deblender stays; the decoder is always the prior's.
            part = module if initial is None else module.decoder
            prefix = "" if initial is None else "decoder."
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )
            if initial is not None and module.convolutional:
                module.set_scale(module.decoder.scale.clone())
        elif initial is None:
            raise FileNotFoundError(
                f"The deblender needs the decoder of a trained prior; there is no {prior}."
            )
    history = History(config, step, initial, hours, command)
    module.time_used = history.time_used
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        max_steps=max(1, settings.samples // settings.batch_size),
        gradient_clip_val=settings.gradient_clip,
        val_check_interval=settings.validation_every,
        check_val_every_n_epoch=None,
        log_every_n_steps=20,
        logger=CSVLogger(run, name=None),
        callbacks=[
            ModelCheckpoint(
                dirpath=run,
                save_last=True,
                save_top_k=0,
                every_n_train_steps=settings.validation_every,
                # A resumed run would leave last.ckpt alone and write last-v1.ckpt, which nothing resumes.
                enable_version_counter=False,
            ),
            LearningRateMonitor("step"),
            history,
            # The richer bar counts epochs, of which an endless stream has none ("Epoch 0/-2").
            *([TQDMProgressBar()] if progress else []),
        ],
        enable_progress_bar=progress,
        default_root_dir=run,
    )
    # A checkpoint of this step is continued; only tensors and plain values are read from it.
    trainer.fit(module, scenes, ckpt_path=last if last.exists() else None, weights_only=True)
    if step == "prior" and not module.convolutional:
        whiten(module.cpu(), scenes)
    # Lightning writes checkpoints whole or not at all.
    trainer.save_checkpoint(final)
    return final
