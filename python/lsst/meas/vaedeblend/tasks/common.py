# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tasks share: the configuration of network and procedure, and their run on a scene."""

from __future__ import annotations

__all__ = [
    "DeblendTaskConfig",
    "NoFiniteModelError",
    "check_bands",
    "check_quantum",
    "configured_network",
    "network_metadata",
    "record_run",
    "run_procedure",
]

import functools
import logging
import os
from collections.abc import Collection, MutableMapping
from typing import Any

from lsst.pex.config import Config, ConfigField, Field, FieldValidationError, ListField, RangeField
from lsst.pipe.base import AlgorithmError, NoWorkFound

from ..deblender import DeblendConfig, DeblendResult, deblend
from ..ground.flags import SOURCE_FLAGS
from ..network import Network, NetworkError, NetworkMetadata, load_network, read_metadata, resolve
from ..scene import Scene

_LOG = logging.getLogger("lsst.meas.vaedeblend.tasks")


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


class DeblendTaskConfig(Config):
    """Configuration of the network and the procedure, which every task that deblends has."""

    network = Field[str](
        doc=(
            "Name of a network that ships with the package, or the path of an ONNX file (environment "
            "variables are expanded). Its metadata define the bands."
        ),
        default="lsst_ugrizy",
    )
    executionProviders = ListField[str](
        doc="Execution providers of onnxruntime in order of preference; the CPU is always the last resort.",
        default=["CPUExecutionProvider"],
        minLength=1,
    )
    requireProvider = Field[bool](
        doc="Fail when the first execution provider is not available, instead of using the next.",
        default=False,
    )
    threads = RangeField[int](
        doc="Threads of onnxruntime; 0 leaves the number to it.", default=1, min=0, inclusiveMin=True
    )
    allowMissingBands = Field[bool](
        doc=(
            "Deblend patches that lack coadds in some bands of the network; the objects are flagged and "
            "have no flux there. Otherwise there is no work to do for such patches."
        ),
        default=False,
    )
    allowOtherPixelScale = Field[bool](
        doc="Deblend coadds whose pixel scale is not the network's; sizes come out wrong by the ratio.",
        default=False,
    )
    deblend = ConfigField[DeblendConfig](doc="The iterative procedure.")

    def validate(self) -> None:
        super().validate()
        if not self.network.strip():
            raise FieldValidationError(self.__class__.network, self, "A network must be named.")
        for provider in self.executionProviders:
            if not provider.endswith("ExecutionProvider"):
                raise FieldValidationError(
                    self.__class__.executionProviders,
                    self,
                    f"{provider!r} is no execution provider; they are called CPUExecutionProvider, "
                    "CUDAExecutionProvider and so on.",
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
        Raised when the file cannot be used.
    """
    path = resolve(name_or_path)
    status = os.stat(path)
    return _metadata_of(str(path), status.st_mtime_ns, status.st_size)


def check_bands(present: Collection[str], bands: Collection[str], allow_missing: bool, where: str) -> None:
    """Check that the coadds suffice.

    Parameters
    ----------
    present : collection of `str`
        Bands that have a coadd.
    bands : collection of `str`
        Bands of the network.
    allow_missing : `bool`
        Whether some of them may be missing.
    where : `str`
        The patch, for the message.

    Raises
    ------
    lsst.pipe.base.NoWorkFound
        Raised when a band that is needed has no coadd.
    """
    missing = [band for band in bands if band not in present]
    if missing and (not allow_missing or len(missing) == len(bands)):
        raise NoWorkFound(
            f"No coadd in band {', '.join(missing)} for {where}: the network needs {''.join(bands)}."
        )


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
    bands = network_metadata(config.network).bands
    try:
        check_bands(present, bands, config.allowMissingBands, where)
    except NoWorkFound as reason:
        _LOG.info("%s", reason)
        raise


def run_procedure(
    scene: Scene, network: Network, config: DeblendTaskConfig, log: logging.Logger | Any
) -> DeblendResult:
    """Deblend a scene as the task is configured to.

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
    allow_scale = config.allowOtherPixelScale or config.deblend.allowOtherPixelScale
    try:
        network.check(pixel_scale=scene.pixel_scale)
    except NetworkError as error:
        if not allow_scale:
            raise
        log.warning("Going on as configured: %s", error)
    # The two exceptions are the task's to grant.
    procedure = DeblendConfig()
    procedure.update(**config.deblend.toDict())
    procedure.allowMissingBands |= config.allowMissingBands
    procedure.allowOtherPixelScale = allow_scale
    return deblend(scene, network, procedure)


def record_run(metadata: MutableMapping[str, Any], network: Network, result: DeblendResult) -> None:
    """Note in a task's metadata what ran and what came of it.

    Parameters
    ----------
    metadata : mapping
        Metadata of the task.
    network : `lsst.meas.vaedeblend.network.Network`
        The network.
    result : `lsst.meas.vaedeblend.deblender.DeblendResult`
        The result.
    """
    metadata["network"] = network.metadata.name
    metadata["network_sha256"] = network.metadata.weights_sha256
    metadata["execution_provider"] = network.provider
    metadata["n_parents"] = len(result.parents)
    metadata["n_objects"] = len(result.sources)
    for flag in SOURCE_FLAGS:
        metadata[f"n_flag_{flag}"] = int(result.sources.flags[flag].sum())
