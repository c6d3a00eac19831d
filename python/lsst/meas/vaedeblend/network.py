# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ONNX artefact: its contract, loading, checking and running.

One file holds what one network needs at run time. Images go in and out in nJy per pixel, every normalisation
is inside the graph, and what the runtime must know about it (bands in order, pixel scale, cutout size, frame
of the model ...) is a JSON document among the file's metadata, `NetworkMetadata`. Nothing of a file is
believed before it has been checked, and every check that fails raises `NetworkError` with both sides in its
message.

Inputs of a deblender: ``image`` (N, B, S, S) nJy, ``valid`` (N, B, S, S) 0 or 1, ``noise`` (N, B) nJy,
``psf_moments`` (N, B, 3) pixel^2, ``epsilon`` (N, L); a graph may leave out any of them but ``image``.
Outputs: ``model`` (N, B, S, S) nJy, ``latent_mean`` and ``latent_sigma`` (N, L). A decoder takes ``latent``
(N, L) to ``model``. A decoder's Jacobian, a third file that a network may have, takes ``latent``,
``psf_moments`` and the coordinates ``x`` (W) and ``y`` (H) of pixels to ``image_jacobian`` (N, B, L, H, W),
``parameters`` (N, B, 6) and ``parameter_jacobian`` (N, B, 6, L).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CONTRACT_VERSION",
    "METADATA_KEY",
    "Decoder",
    "Jacobian",
    "Network",
    "NetworkError",
    "NetworkMetadata",
    "NetworkOutput",
    "embed_metadata",
    "graph_sha256",
    "load_network",
    "read_metadata",
    "read_model",
    "resolve",
    "shipped_networks",
]

_LOG = logging.getLogger("lsst.meas.vaedeblend.network")

METADATA_KEY = "vaedeblend"
"""Key of the JSON document among an ONNX file's metadata properties."""

CONTRACT_VERSION = 1
"""Version of the contract between artefact and runtime."""

MAX_FILE_SIZE = 1 << 30
"""Largest file that is read, bytes."""

PIXEL_SCALE_TOLERANCE = 0.01
"""Relative difference up to which two pixel scales count as the same."""

# Fields of ModelProto and GraphProto in onnx.proto3.
_MODEL_GRAPH = 7
_MODEL_METADATA = 14
_GRAPH_INITIALIZER = 5
_TENSOR_EXTERNAL_DATA = 13
_ARTEFACTS = Path(__file__).parent / "artefacts"
_KINDS = ("deblender", "decoder", "jacobian")
_COMPANIONS = tuple(f"_{kind}" for kind in _KINDS[1:])


class NetworkError(Exception):
    """A network artefact cannot be used; the message says what was expected and what was found."""


def _fields(buffer: memoryview, source: str) -> Iterator[tuple[int, memoryview | None, int]]:
    """Walk the top level of a protobuf message.

    Follows the wire format (https://protobuf.dev/programming-guides/encoding). Yields the field's number, its
    payload if length-delimited (`None` for other wire types), and the offset at which the field began.
    """
    size = len(buffer)

    def varint(at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= size:
                raise NetworkError(f"{source}: the file ends in the middle of a field, at byte {size}.")
            byte = buffer[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise NetworkError(f"{source}: not an ONNX file (no protobuf field at byte {at}).")

    at = 0
    while at < size:
        begin = at
        tag, at = varint(at)
        number, wire = tag >> 3, tag & 7
        payload = None
        if wire == 0:
            _, at = varint(at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            length, at = varint(at)
            payload = buffer[at : at + length]
            at += length
        else:
            raise NetworkError(f"{source}: not an ONNX file (protobuf wire type {wire} at byte {begin}).")
        if at > size:
            raise NetworkError(
                f"{source}: truncated: field {number} should end at byte {at}, the file ends at {size}."
            )
        yield number, payload, begin


def _graph(model: bytes, source: str) -> memoryview:
    graphs = [p for number, p, _ in _fields(memoryview(model), source) if number == _MODEL_GRAPH]
    # Protobuf merges repeated messages, so a second graph would change the first one behind the checksum.
    if len(graphs) != 1 or graphs[0] is None:
        raise NetworkError(f"{source}: not an ONNX model: expected one graph, found {len(graphs)}.")
    return graphs[0]


def graph_sha256(model: bytes) -> str:
    """Compute the checksum of the graph, weights included, of a serialized ONNX model.

    Parameters
    ----------
    model : `bytes`
        A serialized ModelProto.

    Returns
    -------
    digest : `str`
        Hexadecimal SHA-256 of the bytes of the GraphProto (field 7). Metadata do not enter it.

    Raises
    ------
    NetworkError
        Raised if the bytes are not an ONNX model.
    """
    return hashlib.sha256(_graph(model, "model")).hexdigest()


def _metadata_entry(payload: memoryview, source: str) -> tuple[str, str]:
    text = {1: "", 2: ""}
    for number, value, _ in _fields(payload, source):
        if number in text and value is not None:
            try:
                text[number] = bytes(value).decode("utf-8")
            except UnicodeDecodeError as err:
                raise NetworkError(f"{source}: a metadata property is not UTF-8: {err}.") from err
    return text[1], text[2]


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def embed_metadata(model: bytes, metadata: NetworkMetadata) -> bytes:
    """Write metadata into a serialized ONNX model, with the checksum of its graph.

    Parameters
    ----------
    model : `bytes`
        A serialized ModelProto. Metadata that are in it already are replaced; the graph is not touched.
    metadata : `NetworkMetadata`
        The document to write; ``weights_sha256`` is set to the checksum of the graph.

    Returns
    -------
    model : `bytes`
        The model with its metadata.

    Raises
    ------
    NetworkError
        Raised if the bytes are not an ONNX model.
    """
    document = dataclasses.replace(metadata, weights_sha256=graph_sha256(model)).to_json()
    begins, drop = [], []
    for number, payload, begin in _fields(memoryview(model), "model"):
        begins.append(begin)
        drop.append(
            number == _MODEL_METADATA
            and payload is not None
            and _metadata_entry(payload, "model")[0] == METADATA_KEY
        )
    begins.append(len(model))
    kept = b"".join(model[begins[i] : begins[i + 1]] for i in range(len(drop)) if not drop[i])
    entry = b""
    for number, text in ((1, METADATA_KEY), (2, document)):
        data = text.encode("utf-8")
        entry += bytes([number << 3 | 2]) + _varint_bytes(len(data)) + data
    return kept + bytes([_MODEL_METADATA << 3 | 2]) + _varint_bytes(len(entry)) + entry


@dataclasses.dataclass(frozen=True)
class NetworkMetadata:
    """What the runtime and the reader of a card must know about a network.

    Parameters
    ----------
    name : `str`
        Name of the network; a decoder bears the name of its deblender.
    kind : `str`
        "deblender", "decoder" or "jacobian".
    bands : `tuple` [`str`]
        Bands in the order of the arrays.
    pixel_scale : `float`
        Width of a pixel, arcsec.
    cutout_size, latent_size : `int`
        Sizes S (pixel) and L.
    frame : `dict`
        Frame of the model: ``{"type": "gaussian", "sigma": 0.8}`` with sigma in pixels, or ``{"type":
        "observed", "fwhm": {band: arcsec}}`` with, optionally, ``"profile"`` "kolmogorov" (the default) or
        "gaussian", and with ``"pixel_scale": {band: arcsec}`` where bands may have pixels of their own.
    centre : `tuple` [`float`]
        (y, x) pixel index of the cutout within half a pixel of which the target lies; half-integers mean a
        corner of pixels.
    training_range : `dict`
        ``{"noise": {band: [low, high]}, "psf_fwhm": [low, high]}``: background standard deviation per pixel
        in nJy and FWHM in arcsec that the network has seen. Either may be missing if the network has no
        range.
    training : `dict`
        Configuration, its hash, git commit, number of samples, description of the training set, command.
    figures_of_merit : `dict`
        Measured figures, with the command that measured them.
    licence : `str`
        Licence of the weights.
    weights_sha256 : `str`
        Checksum of the graph, see `graph_sha256`.
    contract : `int`
        Version of the contract.

    Raises
    ------
    NetworkError
        Raised if a value is missing, of the wrong type, or out of its range.
    """

    name: str
    kind: str
    bands: tuple[str, ...]
    pixel_scale: float
    cutout_size: int
    latent_size: int
    frame: dict[str, Any]
    centre: tuple[float, float]
    training_range: dict[str, Any]
    training: dict[str, Any]
    figures_of_merit: dict[str, Any]
    licence: str
    weights_sha256: str = ""
    contract: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        def number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        def check(key: str, good: bool, expected: str) -> None:
            if not good:
                raise NetworkError(
                    f"network {self.name!r}: {key} should be {expected}, found {getattr(self, key)!r}."
                )

        def interval(value: Any) -> bool:
            return isinstance(value, list | tuple) and len(value) == 2 and all(map(number, value))

        check("contract", self.contract == CONTRACT_VERSION, f"{CONTRACT_VERSION} (this runtime's contract)")
        check("name", isinstance(self.name, str) and bool(self.name), "a name")
        check("kind", self.kind in _KINDS, f"one of {list(_KINDS)}")
        check(
            "bands",
            isinstance(self.bands, list | tuple)
            and len(self.bands) > 0
            and all(isinstance(b, str) and b for b in self.bands)
            and len(set(self.bands)) == len(self.bands),
            "a list of different band names",
        )
        object.__setattr__(self, "bands", tuple(self.bands))
        check("pixel_scale", number(self.pixel_scale) and self.pixel_scale > 0, "a positive number of arcsec")
        for key in ("cutout_size", "latent_size"):
            value = getattr(self, key)
            check(key, isinstance(value, int) and not isinstance(value, bool) and value > 0, "a positive int")
        check(
            "centre",
            interval(self.centre) and all(0 <= c <= self.cutout_size - 1 for c in self.centre),
            f"[y, x] inside the cutout of {self.cutout_size} pixels",
        )
        object.__setattr__(self, "centre", tuple(float(c) for c in self.centre))
        for key in ("frame", "training_range", "training", "figures_of_merit"):
            check(key, isinstance(getattr(self, key), dict), "an object")
        gaussian = (
            self.frame.get("type") == "gaussian"
            and number(self.frame.get("sigma"))
            and self.frame["sigma"] > 0
        )
        fwhm = self.frame.get("fwhm")
        observed = (
            self.frame.get("type") == "observed"
            and isinstance(fwhm, dict)
            and all(number(fwhm.get(b)) and fwhm[b] > 0 for b in self.bands)
            and self.frame.get("profile", "kolmogorov") in ("kolmogorov", "gaussian")
        )
        check(
            "frame",
            gaussian or observed,
            '{"type": "gaussian", "sigma": pixels} or {"type": "observed", "fwhm": {band: arcsec}} '
            f"with a FWHM for each of {list(self.bands)}",
        )
        noise, psf = self.training_range.get("noise"), self.training_range.get("psf_fwhm")
        check(
            "training_range",
            (noise is None or (isinstance(noise, dict) and all(interval(noise.get(b)) for b in self.bands)))
            and (psf is None or interval(psf)),
            '{"noise": {band: [low, high]}, "psf_fwhm": [low, high]}',
        )
        check("licence", isinstance(self.licence, str), "a string")
        check("weights_sha256", isinstance(self.weights_sha256, str), "a string")

    def to_json(self) -> str:
        """Serialize to the JSON document that an artefact carries.

        Returns
        -------
        text : `str`
            The document, keys sorted.
        """
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "metadata") -> NetworkMetadata:
        """Parse and check a JSON document.

        Parameters
        ----------
        text : `str`
            The document.
        source : `str`, optional
            Where it comes from, for messages.

        Returns
        -------
        metadata : `NetworkMetadata`
            The metadata. Unknown keys are ignored, so that later writers may add some.

        Raises
        ------
        NetworkError
            Raised if the document is not valid.
        """
        try:
            document = json.loads(text)
        except ValueError as err:
            raise NetworkError(f"{source}: the metadata are not JSON: {err}.") from err
        if not isinstance(document, dict):
            raise NetworkError(
                f"{source}: the metadata should be an object, found {type(document).__name__}."
            )
        # A newer contract may have other keys: say so before complaining about any of them.
        if document.get("contract") != CONTRACT_VERSION:
            raise NetworkError(
                f"{source}: contract version {document.get('contract')!r}, "
                f"this runtime reads version {CONTRACT_VERSION}."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [key for key in names if key not in document]
        if missing:
            raise NetworkError(f"{source}: the metadata lack {missing}; they have {sorted(document)}.")
        try:
            return cls(**{key: document[key] for key in names})
        except NetworkError as err:
            raise NetworkError(f"{source}: {err}") from err


def shipped_networks() -> list[str]:
    """List the networks that ship with the package.

    Returns
    -------
    names : `list` [`str`]
        Names that `resolve` takes, sorted.
    """
    return sorted(p.stem for p in _ARTEFACTS.glob("*.onnx") if not p.stem.endswith(_COMPANIONS))


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """Find the file of a network.

    Parameters
    ----------
    name_or_path : `str` or path-like
        The name of a shipped network, or the path of an ONNX file.

    Returns
    -------
    path : `pathlib.Path`
        The file.

    Raises
    ------
    NetworkError
        Raised if there is neither such a network nor such a file.
    """
    if str(name_or_path) in shipped_networks():
        return _ARTEFACTS / f"{name_or_path}.onnx"
    path = Path(os.path.expandvars(name_or_path)).expanduser()
    if path.is_file():
        return path
    raise NetworkError(
        f"No network {str(name_or_path)!r}: it is neither a file nor one of the shipped networks "
        f"{shipped_networks()}."
    )


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_SIZE + 1)
    except OSError as err:
        raise NetworkError(f"{path}: cannot be read: {err}.") from err
    if len(data) > MAX_FILE_SIZE:
        raise NetworkError(f"{path}: larger than the {MAX_FILE_SIZE} bytes that a network may have.")
    if not data:
        raise NetworkError(f"{path}: the file is empty.")
    return data


def _verify(model: bytes, source: str) -> NetworkMetadata:
    """Read the metadata of a serialized model and check its graph against them."""
    graph = _graph(model, source)
    entries = [
        _metadata_entry(payload, source)
        for number, payload, _ in _fields(memoryview(model), source)
        if number == _MODEL_METADATA and payload is not None
    ]
    documents = [value for key, value in entries if key == METADATA_KEY]
    if len(documents) != 1:
        raise NetworkError(
            f"{source}: not a network of this package: expected one {METADATA_KEY!r} among the metadata "
            f"properties, found {sorted(key for key, _ in entries)}."
        )
    metadata = NetworkMetadata.from_json(documents[0], source)
    digest = hashlib.sha256(graph).hexdigest()
    if digest != metadata.weights_sha256:
        raise NetworkError(
            f"{source}: the graph was altered: its SHA-256 is {digest}, "
            f"the metadata say {metadata.weights_sha256}."
        )
    for number, payload, _ in _fields(graph, source):
        if number == _GRAPH_INITIALIZER and payload is not None:
            if any(field == _TENSOR_EXTERNAL_DATA for field, _, _ in _fields(payload, source)):
                raise NetworkError(f"{source}: weights in another file are not covered by the checksum.")
    return metadata


def read_metadata(name_or_path: str | os.PathLike[str]) -> NetworkMetadata:
    """Read and check the metadata of an artefact without loading the network.

    Parameters
    ----------
    name_or_path : `str` or path-like
        The name of a shipped network, or the path of an ONNX file.

    Returns
    -------
    metadata : `NetworkMetadata`
        The metadata, the checksum of the graph verified.

    Raises
    ------
    NetworkError
        Raised if the file is not a sound artefact.
    """
    path = resolve(name_or_path)
    return _verify(_read(path), str(path))


def read_model(name_or_path: str | os.PathLike[str]) -> bytes:
    """Read a serialized model, checked as by `read_metadata`, with the same parameters and errors.

    Returns
    -------
    model : `bytes`
    """
    path = resolve(name_or_path)
    model = _read(path)
    _verify(model, str(path))
    return model


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


@dataclasses.dataclass(frozen=True)
class NetworkOutput:
    """What a deblender makes of N cutouts.

    Parameters
    ----------
    model : `numpy.ndarray`, (N, B, S, S)
        The centred objects alone in the model frame, nJy, float32.
    latent_mean, latent_sigma : `numpy.ndarray`, (N, L)
        The approximate posterior, float32.
    finite : `numpy.ndarray`, (N,)
        False where the network returned anything not finite, or a negative posterior width; all three arrays
        are zero in these rows.
    """

    model: NDArray[np.float32]
    latent_mean: NDArray[np.float32]
    latent_sigma: NDArray[np.float32]
    finite: NDArray[np.bool_]


class _Artefact:
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
        data = _read(path)
        self.path = path
        self.metadata = _verify(data, source)
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


class Decoder(_Artefact):
    """The generative half of a network: latents to models.

    Parameters
    ----------
    path : `pathlib.Path`
        The file.
    providers, require, threads
        See `Network.load`.

    Raises
    ------
    NetworkError
        Raised if the file is not a sound decoder.
    """

    kind = "decoder"

    def render(self, latent: ArrayLike, batch_size: int = 128) -> NDArray[np.float32]:
        """Render models from latents.

        Parameters
        ----------
        latent : array_like, (N, L)
            Latent vectors.
        batch_size : `int`, optional
            Latents that go through the network at once.

        Returns
        -------
        model : `numpy.ndarray`, (N, B, S, S)
            Models in the model frame, nJy. Not checked for being finite.

        Raises
        ------
        ValueError
            Raised if the latents have the wrong shape.
        NetworkError
            Raised if onnxruntime fails.
        """
        latent = np.ascontiguousarray(latent, dtype=np.float32)
        if latent.ndim != 2 or latent.shape[1] != self.metadata.latent_size:
            raise ValueError(
                f"latent should have shape (N, {self.metadata.latent_size}), not {latent.shape}."
            )
        return self._run(["model"], {"latent": latent}, len(latent), batch_size)[0]


class Jacobian(_Artefact):
    """Derivatives of the decoder with respect to the latents.

    Parameters
    ----------
    path : `pathlib.Path`
        The file.
    providers, require, threads
        See `Network.load`.

    Raises
    ------
    NetworkError
        Raised if the file is not a sound Jacobian.
    """

    kind = "jacobian"

    def images(
        self, latent: ArrayLike, psf_moments: ArrayLike, width: int, batch_size: int = 1
    ) -> NDArray[np.float32]:
        """Differentiate observed images, seen through the Gaussian with the PSF's moments.

        Parameters
        ----------
        latent : array_like, (N, L)
            Latent vectors.
        psf_moments : array_like, (N, B, 3)
            Ixx, Iyy, Ixy of the PSF, pixel^2.
        width : `int`
            Width W of the square of pixels about the target's pixel, which has index W // 2 in it.
        batch_size : `int`, optional
            Latents that go through the graph at once; one by one stays in the processor's cache.

        Returns
        -------
        jacobian : `numpy.ndarray`, (N, B, L, W, W)
            Derivatives, nJy.

        Raises
        ------
        NetworkError
            Raised if onnxruntime fails.
        """
        feeds = self._feeds(latent, psf_moments, width)
        return self._run(["image_jacobian"], feeds, len(feeds["latent"]), batch_size)[0]

    def parameters(self, latent: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give what a catalogue wants to know of the models, and its derivatives.

        Parameters
        ----------
        latent : array_like, (N, L)
            Latent vectors.

        Returns
        -------
        parameters : `numpy.ndarray`, (N, B, 6)
            Natural log of the flux in nJy, centroid (x, y) from the target's pixel, and intrinsic second
            moments Ixx, Iyy, Ixy, pixel^2.
        jacobian : `numpy.ndarray`, (N, B, 6, L)
            Derivatives.

        Raises
        ------
        NetworkError
            Raised if onnxruntime fails.
        """
        latent = np.asarray(latent, np.float32)
        moments = np.tile(np.float32([1, 1, 0]), (len(latent), len(self.metadata.bands), 1))
        feeds = self._feeds(latent, moments, 1)
        values, jacobian = self._run(["parameters", "parameter_jacobian"], feeds, len(latent), 128)
        return values, jacobian

    def _feeds(self, latent: ArrayLike, psf_moments: ArrayLike, width: int) -> dict[str, NDArray]:
        line = np.arange(width, dtype=np.float32) - width // 2
        return {
            "latent": np.ascontiguousarray(latent, np.float32),
            "psf_moments": np.ascontiguousarray(psf_moments, np.float32),
            "x": line,
            "y": line,
        }


class Network(_Artefact):
    """A deblender: cutouts of blends to models of the centred objects.

    Make one with `load`, or with `load_network`, which remembers it.

    Attributes
    ----------
    metadata : `NetworkMetadata`
        What the artefact says of itself.
    provider : `str`
        The execution provider in use.
    path : `pathlib.Path`
        The file it came from.
    """

    kind = "deblender"
    _decoder: Decoder | None = None
    _jacobian: Jacobian | None = None

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        providers: Sequence[str] = ("CPUExecutionProvider",),
        require: bool = False,
        threads: int = 0,
        bands: Sequence[str] | None = None,
        pixel_scale: float | None = None,
    ) -> Network:
        """Load a network and check it.

        Parameters
        ----------
        name_or_path : `str` or path-like
            The name of a shipped network, or the path of an ONNX file.
        providers : `~collections.abc.Sequence` [`str`], optional
            onnxruntime's execution providers in order of preference; the CPU is always the last resort.
        require : `bool`, optional
            Whether it is an error if the first of them is absent.
        threads : `int`, optional
            Threads within an operation; 0 leaves it to onnxruntime.
        bands : `~collections.abc.Sequence` [`str`], optional
            Bands in the order in which the caller is going to feed them.
        pixel_scale : `float`, optional
            Width of the caller's pixels, arcsec.

        Returns
        -------
        network : `Network`
            The network.

        Raises
        ------
        NetworkError
            Raised if the artefact is missing, unsound, or does not go with what the caller needs.
        """
        network = cls(resolve(name_or_path), providers, require, threads)
        network.check(bands, pixel_scale)
        return network

    def check(self, bands: Sequence[str] | None = None, pixel_scale: float | None = None) -> None:
        """Check that data go with this network.

        Parameters
        ----------
        bands : `~collections.abc.Sequence` [`str`], optional
            Bands of the data, in order.
        pixel_scale : `float`, optional
            Width of the data's pixels, arcsec.

        Raises
        ------
        NetworkError
            Raised if the bands are others or in another order, or the pixel scale differs by more than a
            hundredth.
        """
        mine = self.metadata
        if bands is not None and tuple(bands) != mine.bands:
            raise NetworkError(
                f"{self.path}: the network's bands are {list(mine.bands)}, the data's are {list(bands)}."
            )
        scales = {b: s for b, s in mine.frame.get("pixel_scale", {}).items() if s != mine.pixel_scale}
        if pixel_scale is not None and scales:
            raise NetworkError(
                f"{self.path}: the network's pixels are {mine.pixel_scale} arcsec wide but for {scales}: it "
                f"cannot read images whose pixels are all {pixel_scale} arcsec wide."
            )
        if pixel_scale is not None and not (
            abs(pixel_scale - mine.pixel_scale) <= PIXEL_SCALE_TOLERANCE * mine.pixel_scale
        ):
            raise NetworkError(
                f"{self.path}: the network's pixels are {mine.pixel_scale} arcsec wide, "
                f"the data's {pixel_scale} arcsec."
            )

    @property
    def decoder(self) -> Decoder:
        """The decoder that belongs to this network, from ``<stem>_decoder.onnx`` beside it (`Decoder`)."""
        if self._decoder is None:
            path = self._companion("decoder")
            if not path.is_file():
                raise NetworkError(f"{self.path}: its decoder {path} does not exist.")
            self._decoder = self._checked(Decoder(path, *self._arguments))
        return self._decoder

    @property
    def jacobian(self) -> Jacobian | None:
        """The decoder's derivatives, from ``<stem>_jacobian.onnx`` beside the network; `None` without one."""
        if self._jacobian is None and self._companion("jacobian").is_file():
            self._jacobian = self._checked(Jacobian(self._companion("jacobian"), *self._arguments))
        return self._jacobian

    def _companion(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.stem}_{kind}.onnx")

    def _checked[Companion: _Artefact](self, companion: Companion) -> Companion:
        for key in ("name", "bands", "pixel_scale", "cutout_size", "latent_size", "frame", "centre"):
            mine, other = getattr(self.metadata, key), getattr(companion.metadata, key)
            if mine != other:
                raise NetworkError(
                    f"{companion.path}: its {key} is {other!r}, that of {self.path} is {mine!r}."
                )
        return companion

    def deblend(
        self,
        image: ArrayLike,
        valid: ArrayLike,
        noise: ArrayLike,
        psf_moments: ArrayLike,
        epsilon: ArrayLike | None = None,
        batch_size: int = 128,
    ) -> NetworkOutput:
        """Deblend cutouts.

        Parameters
        ----------
        image : array_like, (N, B, S, S)
            Cutouts centred on peaks, nJy, bands in the network's order; 0 where not valid.
        valid : array_like, (N, B, S, S)
            Whether a pixel may be used.
        noise : array_like, (N, B)
            Background standard deviation per pixel, nJy.
        psf_moments : array_like, (N, B, 3)
            Ixx, Iyy, Ixy of the PSF, pixel^2.
        epsilon : array_like, (N, L), optional
            Standard normal draws; without them the models are those of the posterior mean.
        batch_size : `int`, optional
            Cutouts that go through the network at once, which bounds the memory it takes.

        Returns
        -------
        output : `NetworkOutput`
            Models and posteriors; what is not finite is reported in it, not raised.

        Raises
        ------
        ValueError
            Raised if an array has the wrong shape.
        NetworkError
            Raised if onnxruntime fails.
        """
        m = self.metadata
        b, s = len(m.bands), m.cutout_size
        n = len(np.asarray(image))
        feeds = {}
        for name, array, shape in (
            ("image", image, (n, b, s, s)),
            ("valid", valid, (n, b, s, s)),
            ("noise", noise, (n, b)),
            ("psf_moments", psf_moments, (n, b, 3)),
            ("epsilon", epsilon, (n, m.latent_size)),
        ):
            if array is None:
                array = np.zeros(shape, np.float32)
            array = np.ascontiguousarray(array, dtype=np.float32)
            if array.shape != shape:
                raise ValueError(f"{name} should have shape {shape}, not {array.shape}.")
            if name in self._inputs:
                feeds[name] = array
        model, mean, sigma = self._run(["model", "latent_mean", "latent_sigma"], feeds, n, batch_size)
        finite = np.isfinite(mean).all(axis=1) & (np.isfinite(sigma) & (sigma >= 0)).all(axis=1)
        # A sum is not finite if any of its terms is not; it may overflow too, and then the model is no use.
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(model.sum(axis=(1, 2, 3)))
        for array in (model, mean, sigma):
            array[~finite] = 0.0
        return NetworkOutput(model, mean, sigma, finite)


_CACHE: dict[tuple, Network] = {}


def load_network(
    name_or_path: str | os.PathLike[str],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    require: bool = False,
    threads: int = 0,
    bands: Sequence[str] | None = None,
    pixel_scale: float | None = None,
) -> Network:
    """Load a network once per process.

    A PipelineTask is constructed for every quantum; the network it needs stays. A file that was replaced
    since (another time of modification or size) is loaded anew.

    Parameters
    ----------
    name_or_path, providers, require, threads, bands, pixel_scale
        See `Network.load`.

    Returns
    -------
    network : `Network`
        The network.

    Raises
    ------
    NetworkError
        Raised if the artefact is missing, unsound, or does not go with what the caller needs.
    """
    path = resolve(name_or_path).resolve()
    status = path.stat()
    key = (path, status.st_mtime_ns, status.st_size, tuple(providers), require, threads)
    network = _CACHE.get(key)
    if network is None:
        # What was loaded from an earlier state of the file is of no use any more.
        for old in [k for k in _CACHE if k[0] == path and k[1:3] != key[1:3]]:
            del _CACHE[old]
        network = _CACHE[key] = Network.load(path, providers, require, threads)
    network.check(bands, pixel_scale)
    return network
