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

_BOOKKEEPING = frozenset(
    "Add Cast Concat ConstantOfShape Div Equal Expand Gather Identity Mod Mul Range Reshape SequenceAt Shape "
    "Slice SplitToSequence Squeeze Sub Transpose Unsqueeze Where".split()
)
"""Operations on shapes, which providers leave to the CPU on purpose; all others are work."""


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
    # Numbers too small for full precision cost a processor a hundred times the others. The first session of a
    # process decides for all threads; graphs bound their exponents, so that nothing depends on it.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    strict = require and providers[0] != "CPUExecutionProvider"
    if strict:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
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
    if strict:
        _check_placement(session, providers[0], source)
    return session


def _check_placement(session: Any, provider: str, source: str) -> None:
    """Check that a provider has the work of a graph; onnxruntime gives what it cannot do to others."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception as err:  # not there before 1.24, and onnxruntime raises many unrelated types
        _LOG.warning("%s: this onnxruntime does not say which nodes %s has: %s", source, provider, err)
        return
    elsewhere = [node.op_type for part in parts if part.ep_name != provider for node in part.get_nodes()]
    work = sorted(set(elsewhere) - _BOOKKEEPING)
    if work:
        raise NetworkError(
            f"{source}: execution provider {provider!r} is required, {len(elsewhere)} nodes would run on "
            f"another, among them {', '.join(work[:8])}."
        )
    if elsewhere:
        _LOG.info("%s: %d nodes that handle shapes are not on %s.", source, len(elsewhere), provider)


def _run_options() -> Any:
    """Options under which a graph computes only what was asked for."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    return options


def _check_tensors(session: Any, metadata: NetworkMetadata, source: str) -> tuple[str, ...]:
    """Check names, types and shapes of a session's inputs and outputs; return the names of the inputs."""
    b, s, length = len(metadata.bands), metadata.cutout_size, metadata.latent_size
    # Shapes after the first axis, which is free; None stands for further free axes, and for any shape at all.
    known: dict[str, tuple[int | None, ...] | None]
    outputs: dict[str, tuple[int | None, ...]]
    square = (b, None, None)
    if metadata.kind == "deblender":
        known = {
            "image": (b, s, s),
            "valid": (b, s, s),
            "noise": (b,),
            "psf_moments": (b, 3),
            "epsilon": (length,),
        }
        required: tuple[str, ...] = ("image",)
        outputs = {"latent_mean": (length,), "latent_sigma": (length,)}
        # Without it the drawing is left to the decoder, which is checked likewise.
        if any(tensor.name == "model" for tensor in session.get_outputs()):
            outputs["model"] = (b, s, s)
    elif metadata.kind == "decoder":
        known = {"latent": (length,)}
        required = ("latent",)
        outputs = {"model": (b, s, s)}
    else:
        # Cells, pixels and Fourier transforms are free in all their axes.
        known = {"latent": (length,), "kernels": None, "cell": (), "x": (), "y": ()}
        known |= dict.fromkeys(("columns", "rows", "back_rows", "back_columns"))
        outputs = {"image": square, "weight": (b, None), "position": (None, 2)}
        outputs |= {"covariance": (None, 3)}
        if metadata.kind == "linearise":
            known |= {"weighted": square, "weight": square, "psf_moments": (b, 3), "u": (None,), "v": (None,)}
            outputs = {
                "gradient": (length,),
                "block": (length, length),
                "tangent": (b, length, None, None),
                "parameters": (b, 6),
                "parameter_jacobian": (b, 6, length),
            }
        required = tuple(known)
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
        kind = "tensor(int64)" if tensor.name == "cell" else "tensor(float)"
        if tensor.type != kind:
            raise NetworkError(f"{source}: {tensor.name} should be {kind}, the graph has {tensor.type}.")
        if shape is None:
            continue
        dims = tensor.shape
        # A dimension without a number is free, as the first one has to be.
        same = len(dims) == 1 + len(shape) and not isinstance(dims[0], int)
        same = same and all(
            d == e for d, e in zip(dims[1:], shape, strict=True) if isinstance(d, int) and e is not None
        )
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
        self._outputs = tuple(tensor.name for tensor in self._session.get_outputs())
        self.provider: str = self._session.get_providers()[0]
        self._options = _run_options()
        _LOG.info("%s %s runs on %s.", self.kind.capitalize(), self.metadata.name, self.provider)

    def __reduce__(self) -> tuple[Any, ...]:
        # A session can be neither copied nor pickled, but started again.
        return type(self), (self.path, *self._arguments)

    def hold(self, array: NDArray) -> Any:
        """Put an array where the session computes, to be fed again and again.

        Parameters
        ----------
        array : `numpy.ndarray`
            On the CPU it is not copied, and must not change.

        Returns
        -------
        value : `onnxruntime.OrtValue`
            What `run` takes in place of an array.
        """
        import onnxruntime

        device = "cuda" if self.provider == "CUDAExecutionProvider" else "cpu"
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)

    def run(
        self, outputs: Sequence[str], rows: dict[str, NDArray], common: dict[str, Any], batch_size: int
    ) -> list[NDArray]:
        """Run the graph in batches.

        Parameters
        ----------
        outputs : `~collections.abc.Sequence` [`str`]
            Names of the outputs wanted; nothing is computed for others.
        rows : `dict` [`str`, `numpy.ndarray`]
            Inputs with one row for each source; inputs that the graph does not have are passed over.
        common : `dict` [`str`, `numpy.ndarray` or `onnxruntime.OrtValue`]
            Inputs that all sources share.
        batch_size : `int`
            Rows that go through the graph at once.

        Returns
        -------
        results : `list` [`numpy.ndarray`]
            The outputs, all rows of them, float32.

        Raises
        ------
        ValueError
            Raised if the batch size is not positive, or there is no row.
        NetworkError
            Raised if onnxruntime fails.
        """
        if batch_size < 1:
            raise ValueError(f"The batch size must be positive, not {batch_size}.")
        rows = {k: np.ascontiguousarray(v) for k, v in rows.items() if k in self._inputs}
        held = {k: self.hold(v) if isinstance(v, np.ndarray) else v for k, v in common.items()}
        held = {k: v for k, v in held.items() if k in self._inputs}
        n = len(next(iter(rows.values())))
        if n == 0:
            raise ValueError("There are no rows to run the graph on.")
        results: list[NDArray] = []
        for start in range(0, n, batch_size):
            part = slice(start, min(start + batch_size, n))
            try:
                feeds = held | {k: self.hold(v[part]) for k, v in rows.items()}
                values = self._session.run_with_ort_values(list(outputs), feeds, self._options)
            except Exception as err:  # onnxruntime raises many unrelated types
                raise NetworkError(
                    f"{self.path}: onnxruntime failed on {part.stop - part.start} sources: {err}"
                ) from err
            parts = [value.numpy() for value in values]
            if not results and part.stop == n:
                return parts
            if not results:
                results = [np.empty((n, *array.shape[1:]), array.dtype) for array in parts]
            for name, result, array in zip(outputs, results, parts, strict=True):
                if array.shape != result[part].shape:
                    raise NetworkError(
                        f"{self.path}: {name} should have shape {result[part].shape}, got {array.shape}."
                    )
                result[part] = array
        return results
