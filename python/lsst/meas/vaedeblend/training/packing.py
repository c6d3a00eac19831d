# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small files of convolutional networks: encoders without their decoder, weights of a few bits."""

from __future__ import annotations

__all__ = ["pack_weights", "split_decoder", "split_encoder", "unpack_weights"]

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor

HALF = "_half"
"""What the names of tensors in half precision end in."""

GROUP = 128
"""Neighbouring weights that share a scale, and the slopes of rectifiers a middle too."""

LEVELS = 63
"""Largest integer: 7 bits with its sign. The eighth is left to compression, in wheels and in the history."""

MANY = 65536
"""Tensors with at least as many elements are packed; smaller ones are little in bytes, and much in effect."""

_PARTS = ("_integers", "_scale", "_middle")


def split_encoder(model: onnx.ModelProto) -> onnx.ModelProto:
    """Keep of a deblender's graph what finds the latents.

    Parameters
    ----------
    model : `onnx.ModelProto`
        A deblender with the one input ``image`` besides ``epsilon``.

    Returns
    -------
    encoder : `onnx.ModelProto`
        The graph from ``image`` to ``latent_mean`` and ``latent_sigma``.
    """
    return _without_metadata(Extractor(model).extract_model(["image"], ["latent_mean", "latent_sigma"]))


def split_decoder(model: onnx.ModelProto, pattern: onnx.ModelProto) -> onnx.ModelProto:
    """Make a decoder of the weights in a deblender's graph.

    Parameters
    ----------
    model : `onnx.ModelProto`
        The deblender.
    pattern : `onnx.ModelProto`
        The decoder of a network of the same architecture and bands, whose graph is taken.

    Returns
    -------
    decoder : `onnx.ModelProto`
        The pattern with the deblender's weights.

    Raises
    ------
    ValueError
        Raised if a weight of the pattern is not in the deblender.
    """
    decoder = _without_metadata(onnx.ModelProto.FromString(pattern.SerializeToString()))
    known = {tensor.name.removeprefix("decoder."): tensor for tensor in model.graph.initializer}
    for tensor in decoder.graph.initializer:
        found = known.get(tensor.name)
        if found is None or found.dims != tensor.dims or found.data_type != tensor.data_type:
            raise ValueError(f"The deblender has no weights {tensor.name} of shape {list(tensor.dims)}.")
        name = tensor.name
        tensor.CopyFrom(found)
        tensor.name = name
    return decoder


def _without_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.metadata_props[:]
    return model


def pack_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store large tensors of half precision as integers of 7 bits, with a scale for each 128 neighbours.

    Weights are scale times integer; the slopes of rectifiers, which lie around the same value all, are middle
    plus scale times integer. The graph turns them back into single precision, once, when it is loaded.

    Parameters
    ----------
    model : `onnx.ModelProto`
        A graph whose weights `lsst.meas.vaedeblend.training.weights.halve_weights` has halved. It is changed.

    Returns
    -------
    model : `onnx.ModelProto`
        The same graph with integers in it, as bytes would have it.
    """
    graph = model.graph
    slopes = {node.input[1] for node in graph.node if node.op_type == "PRelu"}
    # A node that shapes them is in between.
    slopes |= {node.input[0] for node in graph.node if slopes & set(node.output)}
    casts = {node.input[0]: node for node in graph.node if node.op_type == "Cast"}
    tensors, nodes, dropped = [], [], []
    for tensor in graph.initializer:
        if not tensor.name.endswith(HALF) or np.prod(tensor.dims) < MANY:
            tensors.append(tensor)
            continue
        name = tensor.name.removesuffix(HALF)
        weights = numpy_helper.to_array(tensor)
        integers, scale, middle = _quantize(weights, name in slopes)
        dropped.append(casts[tensor.name])
        arrays = [integers, scale, *([] if middle is None else [middle])]
        value = ""
        for part, array in zip(_PARTS, arrays, strict=False):
            tensors.append(numpy_helper.from_array(array, name + part))
            single = f"{name}{part}_single"
            nodes.append(helper.make_node("Cast", [name + part], [single], to=TensorProto.FLOAT))
            if value:
                result, operation = f"{name}_times{part}", "Mul" if part == "_scale" else "Add"
                nodes.append(helper.make_node(operation, [value, single], [result]))
                single = result
            value = single
        tensors.append(numpy_helper.from_array(np.array(weights.shape, np.int64), f"{name}_shape"))
        nodes.append(helper.make_node("Reshape", [value, f"{name}_shape"], [name]))
    nodes += [node for node in graph.node if not any(node is other for other in dropped)]
    tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(tensors)
    graph.node.extend(nodes)
    return model


def _quantize(weights: NDArray, around: bool) -> tuple[NDArray, NDArray, NDArray | None]:
    """Integers (G, 128) int8, scale and middle (G, 1) in half precision; no middle unless ``around``."""
    groups = weights.astype(np.float32).reshape(-1, GROUP)
    middle = None
    if around:
        extremes = groups.max(axis=1, keepdims=True) + groups.min(axis=1, keepdims=True)
        middle = (extremes / 2).astype(np.float16)
        groups = groups - middle
    # Below that there is nothing but rounding, and half precision has no smaller number with all its digits.
    scale = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / LEVELS, 1e-4).astype(np.float16)
    integers = np.clip(np.rint(groups / scale), -LEVELS, LEVELS).astype(np.int8)
    return integers, scale, middle


def unpack_weights(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Read the weights of a graph by the names that torch knows them by, however they are stored.

    Parameters
    ----------
    model : `onnx.ModelProto`
        The graph.

    Returns
    -------
    weights : `dict` [`str`, `numpy.ndarray`]
        In single precision, in memory of their own.
    """
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    floats = TensorProto.FLOAT, TensorProto.FLOAT16
    weights = {}
    for name, tensor in arrays.items():
        if name.endswith(_PARTS[0]):
            name = name.removesuffix(_PARTS[0])
            value = numpy_helper.to_array(tensor).astype(np.float32)
            value = value * numpy_helper.to_array(arrays[f"{name}_scale"])
            if f"{name}_middle" in arrays:
                value = value + numpy_helper.to_array(arrays[f"{name}_middle"])
            weights[name] = value.reshape(numpy_helper.to_array(arrays[f"{name}_shape"]))
        elif tensor.data_type in floats and not name.endswith(_PARTS):
            # The array's own memory belongs to the message, and may not be written to.
            weights[name.removesuffix(HALF)] = numpy_helper.to_array(tensor).astype(np.float32).copy()
    return weights
