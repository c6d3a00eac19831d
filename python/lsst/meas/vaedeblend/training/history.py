# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a training was: its configuration, samples and hours, kept in its checkpoints and told by cards."""

from __future__ import annotations

__all__ = ["History", "read_history", "run_history", "step_checksum"]

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from ..network import NetworkError, read_metadata
from ..simulation.banks import bank_checksum
from ..simulation.config import TrainingConfig

_LOG = logging.getLogger("lsst.meas.vaedeblend.training")

_FREE = ("samples", "base", "validation_batches", "validation_every")
"""Settings of a fit that a run may be continued with after they were changed."""


def step_checksum(config: TrainingConfig, step: str) -> str:
    """SHA-256 of the configuration of a step: galaxies, scenes, networks and fit, but not how long it takes.

    Parameters
    ----------
    config : `TrainingConfig`
    step : `str`
        "prior" or "deblender".
    """
    values = config.toDict()
    fit = {name: value for name, value in values[step].items() if name not in _FREE}
    parts = [bank_checksum(config), values["scene"], values["blend"], values["network"], fit]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class History(lightning.Callback):
    """Count samples and hours, say how fast the training is, and refuse checkpoints of another configuration.

    Parameters
    ----------
    config : `TrainingConfig`
    step : `str`
        "prior" or "deblender".
    initial : `str` or path, optional
        What the step takes its first weights from.
    hours : `float`, optional
        End the run after so long.
    command : `str`, optional
        The command that runs it, for the card.

    Notes
    -----
    The state is part of the checkpoints: a run that is continued goes on counting.
    """

    def __init__(
        self,
        config: TrainingConfig,
        step: str,
        initial: str | os.PathLike | None = None,
        hours: float | None = None,
        command: str = "",
    ):
        self._settings, self._step, self._limit = getattr(config, step), step, hours
        self.state: dict[str, Any] = {
            "made_with": step_checksum(config, step),
            "samples": 0,
            "hours": 0.0,
            "commands": [command],
            **_origin(step, initial),
        }
        self._last = self._began = 0.0
        self._done = 0

    def time_used(self) -> float:
        """Fraction of the run's time that is over; 0 if that is not limited."""
        return self.state["hours"] / self._limit if self._limit else 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _check(state_dict, self.state["made_with"], "The checkpoint to go on from")
        commands = state_dict["commands"]
        commands += [c for c in self.state["commands"] if c not in commands]
        self.state = state_dict | {"commands": commands}

    def on_train_start(self, trainer, module) -> None:
        self._last = self._began = time.monotonic()
        self._done = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        now, samples = time.monotonic(), len(batch["image"]) * trainer.world_size
        self.state["samples"] += samples
        self.state["hours"] += (now - self._last) / 3600
        self._last, self._done = now, self._done + samples
        if self.time_used() >= 1:
            trainer.should_stop = True
        if trainer.is_global_zero and trainer.global_step % self._settings.validation_every == 0:
            _LOG.info(
                "%s: %d of %d samples, %.0f samples per second.",
                self._step,
                self.state["samples"],
                self._settings.samples,
                self._done / max(now - self._began, 1e-6),
            )


def read_history(checkpoint: str | os.PathLike, config: TrainingConfig, step: str) -> dict[str, Any]:
    """Read what a checkpoint tells of its training; nothing is unpickled but tensors and plain values.

    Parameters
    ----------
    checkpoint : path
    config : `TrainingConfig`
        The configuration that it must have been made with.
    step : `str`
        The step that it must be of.

    Returns
    -------
    history : `dict`
        ``made_with``, the checksum; ``samples`` and ``hours`` of this step; ``commands`` that ran it;
        ``initial``, whose weights it started from, and ``initial_samples``, how many samples those had seen,
        by step; both empty from scratch.

    Raises
    ------
    ValueError
        If the checkpoint was made with another configuration.
    """
    callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True).get("callbacks", {})
    state = callbacks.get(History.__name__, {})
    _check(state, step_checksum(config, step), str(checkpoint))
    return state


def run_history(run: str | os.PathLike, config: TrainingConfig, step: str) -> dict[str, dict[str, Any]]:
    """Read the histories of a run's steps up to one, by step, as `read_history` does.

    A deblender that was trained without a prior of its own has its own history alone.
    """
    paths = {name: Path(run) / name / "final.ckpt" for name in ("prior", "deblender")}
    if step == "prior" or not paths["prior"].exists():
        paths = {step: paths[step]}
    return {name: read_history(path, config, name) for name, path in paths.items()}


def _check(state: dict[str, Any], expected: str, name: str) -> None:
    made_with = str(state.get("made_with", ""))
    if made_with != expected:
        raise ValueError(
            f"{name} was made with another configuration ({made_with[:12] or 'unknown'} instead of "
            f"{expected[:12]}): use the one that it was made with, or another directory for the run."
        )


def _origin(step: str, initial: str | os.PathLike | None) -> dict[str, Any]:
    """Name of the first weights, without directories, and the samples that they have seen."""
    if initial is None:
        return {"initial": "", "initial_samples": {}}
    name, samples = os.path.basename(os.fspath(initial)), {}
    if name.endswith(".ckpt"):
        callbacks = torch.load(initial, map_location="cpu", weights_only=True).get("callbacks", {})
        state = callbacks.get(History.__name__, {"samples": 0, "initial_samples": {}})
        before = state["initial_samples"]
        samples = before | {step: state["samples"] + before.get(step, 0)}
    else:
        # Files that hold weights without being networks are refused where the weights are loaded.
        with contextlib.suppress(NetworkError):
            samples = dict(read_metadata(initial).training.get("samples", {}))
    return {"initial": name, "initial_samples": samples}
