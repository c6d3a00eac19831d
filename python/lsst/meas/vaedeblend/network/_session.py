# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""An artefact in a session of onnxruntime: started, checked against its metadata, run in batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._files import read_file
from ._metadata import NetworkError, NetworkMetadata
from ._onnx import verify

__all__ = ["Artefact"]

_LOG = logging.getLogger("lsst.meas.vaedeblend.network")


def _session(model: bytes, source: str, providers: Sequence[str], require: bool, threads: int) -> Any:
    """Create the onnxruntime session on the first of the wanted providers that works."""
    import onnxruntime

    if not providers:
        raise NetworkError("No execution provider was asked for; 'CPUExecutionProvider' is always there.")
    available = onnxruntime.get_available_providers()
    if require and providers[0] not in available:
        raise NetworkError(
            f"Execution provider {providers[0]!r} is required, this onnxruntime has {available}."
        )
    wanted = [p for p in providers if p in available]
    if "CPUExecutionProvider" not in wanted:
        wanted.append("CPUExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    try:
        session = onnxruntime.InferenceSession(model, sess_options=options, providers=wanted)
    except Exception as err:  # onnxruntime raises many unrelated types
        raise NetworkError(f"{source}: onnxruntime cannot load the graph: {err}") from err
    used = session.get_providers()[0]
    # A provider that is compiled in may still fail to start, and onnxruntime then silently takes the next.
    if used != providers[0]:
        if require:
            raise NetworkError(
                f"Execution provider {providers[0]!r} is required, onnxruntime started {used!r}."
            )
        _LOG.warning("Execution provider %s was asked for, %s is in use.", providers[0], used)
    return session


def _check_tensors(session: Any, metadata: NetworkMetadata, source: str) -> tuple[str, ...]:
    """Check names, types and shapes of a session's inputs and outputs; return the names of the inputs."""
    b, s, length = len(metadata.bands), metadata.cutout_size, metadata.latent_size
    # Shapes after the first axis, which is free; None stands for further free axes.
    known: dict[str, tuple[int | None, ...]]
    outputs: dict[str, tuple[int | None, ...]]
    if metadata.kind == "deblender":
        known = {
            "image": (b, s, s),
            "valid": (b, s, s),
            "noise": (b,),
            "psf_moments": (b, 3),
            "epsilon": (length,),
        }
        required = ("image",)
        outputs = {
            "model": (b, s, s),
            "latent_mean": (length,),
            "latent_sigma": (length,),
        }
    elif metadata.kind == "decoder":
        known = {"latent": (length,)}
        required = ("latent",)
        outputs = {"model": (b, s, s)}
    else:
        known = {"latent": (length,), "psf_moments": (b, 3), "x": (), "y": ()}
        required = tuple(known)
        outputs = {
            "image_jacobian": (b, length, None, None),
            "parameters": (b, 6),
            "parameter_jacobian": (b, 6, length),
        }
    declared = {tensor.name: tensor for tensor in session.get_inputs()}
    found = {tensor.name: tensor for tensor in session.get_outputs()}
    unknown = sorted(set(declared) - set(known))
    lacking = [name for name in required if name not in declared]
    if unknown or lacking:
        raise NetworkError(
            f"{source}: a {metadata.kind} may have inputs {sorted(known)} and must have {list(required)}, "
            f"the graph has {sorted(declared)}."
        )
    if not set(outputs) <= set(found):
        raise NetworkError(
            f"{source}: a {metadata.kind} must have outputs {sorted(outputs)}, the graph has {sorted(found)}."
        )
    pairs = [(declared[name], known[name]) for name in declared]
    pairs += [(found[name], shape) for name, shape in outputs.items()]
    for tensor, shape in pairs:
        if tensor.type != "tensor(float)":
            raise NetworkError(
                f"{source}: {tensor.name} should be tensor(float), the graph has {tensor.type}."
            )
        dims = tensor.shape
        # A dimension without a number is free.
        expected = (None, *shape)
        same = len(dims) == len(expected)
        same = same and all(d == e for d, e in zip(dims, expected, strict=True) if isinstance(d, int))
        if not same:
            raise NetworkError(
                f"{source}: {tensor.name} should have shape {['N', *shape]} by the metadata, "
                f"the graph has {list(dims)}."
            )
    return tuple(declared)


class Artefact:
    """A verified ONNX file with its session."""

    kind: str

    def __init__(
        self,
        path: Path,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        require: bool = False,
        threads: int = 0,
    ) -> None:
        source = str(path)
        data = read_file(path)
        self.path = path
        self.metadata = verify(data, source)
        if self.metadata.kind != self.kind:
            raise NetworkError(f"{source}: a {self.kind} is needed, this is a {self.metadata.kind}.")
        self._arguments = (tuple(providers), require, threads)
        self._session = _session(data, source, providers, require, threads)
        self._inputs = _check_tensors(self._session, self.metadata, source)
        self.provider: str = self._session.get_providers()[0]
        _LOG.info("%s %s runs on %s.", self.kind.capitalize(), self.metadata.name, self.provider)

    def _run(
        self, outputs: Sequence[str], feeds: dict[str, NDArray], n: int, batch_size: int
    ) -> list[NDArray]:
        """Run in batches of bounded size; a failure inside onnxruntime is a `NetworkError`."""
        if batch_size < 1:
            raise ValueError(f"The batch size must be positive, not {batch_size}.")
        m = self.metadata
        b, pixels = len(m.bands), tuple(len(feeds[k]) for k in ("y", "x") if k in feeds)
        shapes = {
            "model": (b, m.cutout_size, m.cutout_size),
            "latent_mean": (m.latent_size,),
            "latent_sigma": (m.latent_size,),
            "image_jacobian": (b, m.latent_size, *pixels),
            "parameters": (b, 6),
            "parameter_jacobian": (b, 6, m.latent_size),
        }
        results = [np.empty((n, *shapes[name]), np.float32) for name in outputs]
        for start in range(0, n, batch_size):
            stop = min(start + batch_size, n)
            try:
                # The coordinates of pixels are common to all rows.
                part = {k: v if k in ("x", "y") else v[start:stop] for k, v in feeds.items()}
                parts = self._session.run(list(outputs), part)
            except Exception as err:  # onnxruntime raises many unrelated types
                raise NetworkError(
                    f"{self.path}: onnxruntime failed on {stop - start} cutouts: {err}"
                ) from err
            for name, result, part in zip(outputs, results, parts, strict=True):
                if part.shape != result[start:stop].shape:
                    raise NetworkError(
                        f"{self.path}: {name} should have shape {result[start:stop].shape}, got {part.shape}."
                    )
                result[start:stop] = part
        return results
