# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tasks share: their configuration, and what becomes of a scene whatever data model it came by."""

from __future__ import annotations

__all__ = [
    "PATCH",
    "PATCH_BAND",
    "DeblendTaskConfig",
    "NoFiniteModelError",
    "Patch",
    "check_bands",
    "check_quantum",
    "configured_network",
    "deblend_patch",
    "network_metadata",
    "record_run",
    "run_procedure",
]

import contextlib
import dataclasses
import difflib
import functools
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from lsst.pex.config import (
    ConfigField,
    Field,
    FieldValidationError,
    ListField,
    RangeField,
)
from lsst.pex.config.callStack import StackFrame, getCallStack
from lsst.pipe.base import AlgorithmError, NoWorkFound, TaskMetadata
from numpy.typing import NDArray

from ..adapters.mask_planes import BAD_PLANES
from ..deblender import DeblendConfig, DeblendResult, deblend
from ..ground.flags import SOURCE_FLAGS
from ..network import Network, NetworkError, NetworkMetadata, load_network, read_metadata, resolve
from ..posterior import Posterior, sample_posterior
from ..scene import Scene
from ..sources import ParentSummary
from .limits import LimitsConfig, skip_reasons, with_skipped

_LOG = logging.getLogger("lsst.meas.vaedeblend.tasks")

# Part of the objects that makes a flag a matter of the whole patch.
_MOST = 0.5


PATCH = ("skymap", "tract", "patch")
"""Dimensions of what there is once per patch."""

PATCH_BAND = (*PATCH, "band")
"""Dimensions of what there is once per patch and band."""


class NoFiniteModelError(AlgorithmError):
    """The network gave no usable model for any object of a patch.

    Parameters
    ----------
    network : `str`
        Name of the network.
    n_objects : `int`
        Number of objects.
    """

    def __init__(self, network: str, n_objects: int) -> None:
        self.network, self.n_objects = network, n_objects
        super().__init__(f"Network {network} gave no finite model for any of the {n_objects} objects.")

    @property
    def metadata(self) -> dict[str, Any]:
        return {"network": self.network, "n_objects": self.n_objects}


class _ProvidersField(ListField):
    """A list of names that takes a string for one name, or several with commas between them.

    ``-c label:executionProviders=CUDAExecutionProvider`` assigns a string, which a plain list field takes for
    a list of letters.
    """

    def __set__(
        self,
        instance: Any,
        value: Any,
        at: list[StackFrame] | None = None,
        label: str = "assignment",
    ) -> None:
        if isinstance(value, str):
            value = [name.strip().strip("'\"") for name in value.strip().strip("[]()").split(",")]
            value = [name for name in value if name]
        super().__set__(instance, value, at=getCallStack() if at is None else at, label=label)


class DeblendTaskConfig(LimitsConfig):
    """Configuration that every task that deblends has, whatever data model its coadds come by."""

    network = Field[str](
        doc=(
            "Name of a network that ships with the package, or the path of an ONNX file (environment "
            "variables are expanded). Its metadata define the bands."
        ),
        default="lsst_ugrizy",
    )
    executionProviders = _ProvidersField(
        doc=(
            "Execution providers of onnxruntime in order of preference, such as ['CUDAExecutionProvider', "
            "'CPUExecutionProvider'], or one as a string; the CPU is always the last resort."
        ),
        dtype=str,
        default=["CPUExecutionProvider"],
        minLength=1,
    )
    requireProvider = Field[bool](
        doc="Fail when the first execution provider is not available, instead of using the next.",
        default=False,
    )
    threads = RangeField(
        dtype=int,
        doc="Threads of onnxruntime; 0 leaves the number to it.",
        default=1,
        min=0,
        inclusiveMin=True,
    )
    badMaskPlanes = ListField[str](
        doc=(
            "Mask planes whose pixels are not used. Names are those of afw or of lsst.images; planes that "
            "the coadds do not have are passed over."
        ),
        default=list(BAD_PLANES),
    )
    posteriorSamples = RangeField(
        dtype=int,
        doc=(
            "Draws from the posterior of each object, an even number, for the errors of shapes and, where "
            "latents were not refined on the pixels, of fluxes. With 0 shapes have none."
        ),
        default=8,
        min=0,
    )
    deblend = ConfigField[DeblendConfig](doc="The iterative procedure.")

    def validate(self) -> None:
        super().validate()
        cls = self.__class__
        if not self.network.strip():
            raise FieldValidationError(cls.network, self, "A network must be named.")
        for provider in self.executionProviders:
            if complaint := _no_provider(provider):
                raise FieldValidationError(cls.executionProviders, self, complaint)
        if "DETECTED" in self.badMaskPlanes:
            raise FieldValidationError(
                cls.badMaskPlanes, self, "Without the DETECTED pixels nothing is left to deblend."
            )
        if self.posteriorSamples % 2:
            raise FieldValidationError(
                cls.posteriorSamples, self, f"The number of draws must be even, not {self.posteriorSamples}."
            )


def _no_provider(name: str) -> str | None:
    """Say what is wrong with the name of an execution provider, if anything is."""
    if name == "CPUExecutionProvider":
        return None
    import onnxruntime

    known = onnxruntime.get_all_providers()
    if name in known:
        return None
    lower = {provider.lower(): provider for provider in known}
    wanted = name.lower().removesuffix("executionprovider") + "executionprovider"
    close = difflib.get_close_matches(wanted, lower, n=1, cutoff=0.85)
    right = lower[close[0]] if close else "CUDAExecutionProvider"
    return (
        f"{name!r} is no execution provider of onnxruntime; the right form is "
        f"executionProviders=['{right}', 'CPUExecutionProvider'] or executionProviders={right}."
    )


def configured_network(config: DeblendTaskConfig) -> Network:
    """Load the configured network, or take the one that this process has loaded already.

    Parameters
    ----------
    config : `DeblendTaskConfig`
        Configuration of the task.

    Returns
    -------
    network : `lsst.meas.vaedeblend.network.Network`
        The network.

    Raises
    ------
    NetworkError
        Raised when the file cannot be used, or a required execution provider is not available.
    """
    return load_network(
        config.network,
        providers=tuple(config.executionProviders),
        require=config.requireProvider,
        threads=config.threads,
    )


@functools.lru_cache(maxsize=8)
def _metadata_of(path: str, mtime_ns: int, size: int) -> NetworkMetadata:
    """Read metadata once per state of the file: quantum adjustment asks for them for every patch."""
    return read_metadata(path)


def network_metadata(name_or_path: str) -> NetworkMetadata:
    """Return the metadata of a network without loading it.

    Parameters
    ----------
    name_or_path : `str`
        Name or path, as configured.

    Returns
    -------
    metadata : `lsst.meas.vaedeblend.network.NetworkMetadata`
        The metadata.

    Raises
    ------
    NetworkError
        Raised when the file cannot be used, or holds a prior.
    """
    path = resolve(name_or_path)
    status = os.stat(path)
    metadata = _metadata_of(str(path), status.st_mtime_ns, status.st_size)
    metadata.check_deblender()
    return metadata


def check_bands(
    present: Collection[str],
    bands: Collection[str],
    config: DeblendTaskConfig,
    where: str,
    log: logging.Logger | Any,
) -> None:
    """Check that the coadds suffice, and warn if any is missing.

    Parameters
    ----------
    present : collection of `str`
        Bands that have a coadd.
    bands : collection of `str`
        Bands of the network.
    config : `DeblendTaskConfig`
        Says whether bands may be missing.
    where : `str`
        The patch, for the message.
    log : `logging.Logger`
        Takes the warning: what has no work to do is otherwise not told from what failed to be found.

    Raises
    ------
    lsst.pipe.base.NoWorkFound
        Raised when a band that is needed has no coadd.
    """
    missing = [band for band in bands if band not in present]
    if not missing:
        return
    what = f"No coadd in band {', '.join(missing)} for {where}: the network needs {''.join(bands)}"
    if len(missing) == len(bands):
        what += "."
    elif config.deblend.allowMissingBands:
        log.warning(
            "%s, and objects have no flux there and are flagged missing_band "
            "(deblend.allowMissingBands=False leaves such patches out).",
            what,
        )
        return
    else:
        what += ", because deblend.allowMissingBands is False."
    log.warning("%s", what)
    raise NoWorkFound(what)


def check_quantum(present: Collection[str], config: DeblendTaskConfig, where: str) -> None:
    """Check that the coadds suffice when the graph is built, and log it if they do not.

    The graph builder counts the quanta that it drops, but does not say why.

    Parameters
    ----------
    present : collection of `str`
        Bands that have a coadd.
    config : `DeblendTaskConfig`
        The configuration.
    where : `str`
        The quantum, for the message.

    Raises
    ------
    lsst.pipe.base.NoWorkFound
        Raised when a band that is needed has no coadd.
    """
    check_bands(present, network_metadata(config.network).bands, config, where, _LOG)


@dataclasses.dataclass(frozen=True, eq=False)
class Patch:
    """What became of the parents of a patch.

    Parameters
    ----------
    result : `lsst.meas.vaedeblend.deblender.DeblendResult`
        Sources, residual, and those parents that were deblended.
    posterior : `lsst.meas.vaedeblend.posterior.Posterior`
        Fluxes and shapes of the sources with their errors.
    skipped : `dict` [`int`, `str`]
        Ids of the parents that were not deblended, and why.
    parents : `lsst.meas.vaedeblend.sources.ParentSummary`
        All parents, in the scene's order.
    """

    result: DeblendResult
    posterior: Posterior
    skipped: dict[int, str]
    parents: ParentSummary


def deblend_patch(
    scene: Scene,
    network: Network,
    config: DeblendTaskConfig,
    log: logging.Logger | Any,
    metadata: TaskMetadata,
    masks: Mapping[str, NDArray[np.bool_]],
) -> Patch:
    """Deblend a scene as the task is configured to: the part that no data model has a say in.

    Parameters
    ----------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene in the network's bands, with all of its parents.
    network : `lsst.meas.vaedeblend.network.Network`
        The network.
    config : `DeblendTaskConfig`
        Configuration of the task.
    log : `logging.Logger`
        Logger of the task.
    metadata : `lsst.pipe.base.TaskMetadata`
        Metadata of the task, where it is noted what ran and what came of it.
    masks : mapping of `str` to `numpy.ndarray`, (H, W)
        Where each mask plane of ``config.maskLimits`` is set in any band.

    Returns
    -------
    patch : `Patch`
        The result.

    Raises
    ------
    NetworkError
        Raised when the network does not go with the scene's bands or pixel scale.
    """
    parents = list(scene.parents)
    skipped = skip_reasons(scene, masks, config)
    scene.parents = [parent for parent in parents if parent.id not in skipped]
    scene.others = [parent for parent in parents if parent.id in skipped]
    used = [b for b, some in zip(scene.bands, scene.valid.any(axis=(1, 2)), strict=True) if some]
    what = f"{len(scene.parents)} parents"
    log.info(
        "Deblending %s in the bands %s with network %s (%s) on %s.",
        what,
        " ".join(used),
        network.metadata.name,
        "".join(network.metadata.bands),
        network.provider,
    )
    if skipped:
        log.info("%d parents are beyond a limit or masked, and are skipped.", len(skipped))
    with _signs_of_life(log, f"Deblending {what}"):
        try:
            result = run_procedure(scene, network, config, log)
        finally:
            scene.parents, scene.others = parents, []
        posterior = sample_posterior(
            result.sources, network, scene.psf, _draws(network, config.posteriorSamples, log)
        )
    record_run(metadata, network, result, skipped)
    _warn(result, network, log)
    whole = with_skipped(result.parents, scene, parents, skipped, network.metadata.cutout_size)
    return Patch(result, posterior, skipped, whole)


@contextlib.contextmanager
def _signs_of_life(log: logging.Logger | Any, what: str, interval: float = 60.0) -> Iterator[None]:
    """Log every so many seconds that something is going on: a patch may take long, and looks hung."""
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(interval):
            log.info("%s: %.0f s so far.", what, time.monotonic() - start)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _draws(network: Network, n_samples: int, log: logging.Logger | Any) -> int:
    """Number of draws from the posterior; none without a decoder."""
    if n_samples:
        try:
            _ = network.decoder
        except NetworkError as error:
            log.warning("Shapes have no errors: %s", error)
            return 0
    return n_samples


def run_procedure(
    scene: Scene, network: Network, config: DeblendTaskConfig, log: logging.Logger | Any
) -> DeblendResult:
    """Run the iterative procedure on a scene, as the task is configured to.

    Parameters
    ----------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene.
    network : `lsst.meas.vaedeblend.network.Network`
        The network.
    config : `DeblendTaskConfig`
        Configuration of the task.
    log : `logging.Logger`
        Logger of the task.

    Returns
    -------
    result : `lsst.meas.vaedeblend.deblender.DeblendResult`
        Sources, parents and residual.

    Raises
    ------
    NetworkError
        Raised when the network does not go with the scene's bands or pixel scale.
    """
    try:
        network.check(pixel_scale=scene.pixel_scale)
    except NetworkError as error:
        if not config.deblend.allowOtherPixelScale:
            raise NetworkError(f"{error} deblend.allowOtherPixelScale lets it pass.") from error
        log.warning("Going on as configured: %s", error)
    return deblend(scene, network, config.deblend)


def _warn(result: DeblendResult, network: Network, log: logging.Logger | Any) -> None:
    """Warn of what concerns most objects: then it is no matter of single ones."""
    n, flags = len(result.sources), result.sources.flags
    if n and (count := int(flags["outside_training_range"].sum())) > _MOST * n:
        log.warning(
            "%d of %d objects have noise or seeing outside of what network %s was trained on: their shapes "
            "and errors cannot be relied on.",
            count,
            n,
            network.metadata.name,
        )
    if n and (count := int(flags["no_convergence"].sum())) > _MOST * n:
        log.warning("%d of %d objects had not settled at the limit (deblend.maxIterations).", count, n)


def record_run(
    metadata: TaskMetadata,
    network: Network,
    result: DeblendResult,
    skipped: Collection[int] = (),
) -> None:
    """Note in a task's metadata what ran and what came of it.

    Parameters
    ----------
    metadata : `lsst.pipe.base.TaskMetadata`
        Metadata of the task.
    network : `lsst.meas.vaedeblend.network.Network`
        The network.
    result : `lsst.meas.vaedeblend.deblender.DeblendResult`
        The result.
    skipped : collection of `int`, optional
        Ids of the parents that were not deblended.
    """
    metadata["network"] = network.metadata.name
    metadata["network_sha256"] = network.metadata.weights_sha256
    metadata["execution_provider"] = network.provider
    metadata["n_parents"] = len(result.parents) + len(skipped)
    metadata["n_skipped"] = len(skipped)
    metadata["n_objects"] = len(result.sources)
    for flag in SOURCE_FLAGS:
        metadata[f"n_flag_{flag}"] = int(result.sources.flags[flag].sum())
