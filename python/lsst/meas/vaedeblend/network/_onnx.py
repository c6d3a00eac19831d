# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Metadata and checksum of a serialized ONNX model, read and written without running any of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

from ._metadata import NetworkError, NetworkMetadata

__all__ = ["METADATA_KEY", "embed_metadata", "graph_sha256", "verify"]

METADATA_KEY = "vaedeblend"
"""Key of the JSON document among an ONNX file's metadata properties."""

# Fields of ModelProto and TensorProto in onnx.proto3.
_MODEL_GRAPH = 7
_MODEL_METADATA = 14
_MODEL_TRAINING, _MODEL_FUNCTIONS = 20, 25
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14

# Message to its fields that hold messages in which, at some depth, tensors are.
_CONTAINERS = {
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_MAX_DEPTH = 40


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


def verify(model: bytes, source: str) -> NetworkMetadata:
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
    for number, _, _ in _fields(memoryview(model), source):
        if number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise NetworkError(f"{source}: functions beside the graph are not covered by the checksum.")
    _check_tensors_are_here(graph, "graph", source)
    return metadata


def _check_tensors_are_here(message: memoryview, kind: str, source: str, depth: int = 0) -> None:
    """Refuse tensors in other files wherever they are: weights, constants of nodes, graphs in graphs."""
    if depth > _MAX_DEPTH:
        raise NetworkError(f"{source}: graphs are nested more than {_MAX_DEPTH} messages deep.")
    inside = _CONTAINERS[kind]
    for number, payload, _ in _fields(message, source):
        if kind == "tensor" and number in (_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION):
            raise NetworkError(f"{source}: weights in another file are not covered by the checksum.")
        if number in inside and payload is not None:
            _check_tensors_are_here(payload, inside[number], source, depth + 1)
