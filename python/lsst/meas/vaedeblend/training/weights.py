# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights of networks in files: checkpoints of a training, and the artefacts that are exported from them."""

from __future__ import annotations

__all__ = ["halve_weights", "load_weights", "round_weights"]

import os
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ..network import read_metadata, read_model, resolve
from .packing import HALF, unpack_weights

_MANY_WEIGHTS = 4096
"""Tensors with at least as many elements are worth storing in half precision."""

_FOLDED = ".weight_bias"
"""What the names of the biases end in that simplified graphs have in place of normalisations."""

_NORMS = {"first": "norm1", "second": "norm2"}
"""Normalisations after the convolutions of a residual block; in a sequence it is the next module."""


def load_weights(source: str | os.PathLike) -> dict[str, Tensor]:
    """Read the weights of encoder and decoder from a checkpoint or from a deblender's artefact.

    Of a checkpoint only tensors are read, and nothing is unpickled beyond them; an artefact's checksum is
    verified. Weights of simplified graphs are those of a network with the same outputs.

    Parameters
    ----------
    source : `str` or path-like
        A checkpoint, FILE.ckpt, or an ONNX file, or the name of a network that ships.

    Returns
    -------
    weights : `dict` [`str`, `torch.Tensor`]
        By their names in `~lsst.meas.vaedeblend.training.fit.VaeModule`.

    Raises
    ------
    NetworkError
        If there is no such artefact, or if it is unsound.
    ValueError
        If its graph was simplified in a way that cannot be undone.
    """
    if Path(source).suffix == ".ckpt":
        return torch.load(source, map_location="cpu", weights_only=True)["state_dict"]
    weights = unpack_weights(onnx.load_model_from_string(read_model(source)))
    metadata = read_metadata(source)
    if metadata.decoder_sha256:
        # The other half of the network, which has the weights without the first part of their names.
        beside = resolve(source).with_name(f"{metadata.decoder or resolve(source).stem}_decoder.onnx")
        decoder = unpack_weights(onnx.load_model_from_string(read_model(beside)))
        weights |= {f"decoder.{name}": array for name, array in decoder.items()}
    parts = ("encoder.", "decoder.")
    own = {name: torch.from_numpy(array) for name, array in weights.items() if name.startswith(parts)}
    return _unfold(own)


def _unfold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give normalisations back to convolutions that a simplified graph has folded them into.

    Such a convolution has the bias ``NAME.weight_bias``, which none has in `Encoder`. The normalisation that
    follows it there becomes one that adds this bias and does nothing else: outputs are the same, and
    `~lsst.meas.vaedeblend.training.fit.settle_norms` gives it the statistics of pixels again.
    """
    unfolded = {}
    for name, tensor in weights.items():
        unfolded[name] = tensor
        if not name.endswith(_FOLDED):
            continue
        del unfolded[name]
        where, _, convolution = name.removesuffix(_FOLDED).rpartition(".")
        norm = _NORMS.get(convolution) or (str(int(convolution) + 1) if convolution.isdecimal() else None)
        if norm is None:
            raise ValueError(f"{name} belongs to no normalisation that is known.")
        unfolded[f"{where}.{norm}.weight"] = torch.ones_like(tensor)
        unfolded[f"{where}.{norm}.bias"] = tensor
        unfolded[f"{where}.{norm}.running_mean"] = torch.zeros_like(tensor)
        unfolded[f"{where}.{norm}.running_var"] = torch.full_like(tensor, 1.0 - nn.BatchNorm2d(1).eps)
    return unfolded


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Round large tensors of weights to what half precision can hold."""
    for weights in module.parameters():
        if weights.numel() >= _MANY_WEIGHTS:
            weights.copy_(weights.half().float())


def halve_weights(graph: bytes) -> bytes:
    """Store the weights that `round_weights` has rounded in half precision: nothing is lost by it.

    The graph turns them back into single precision, once, when it is loaded.
    """
    model = onnx.load_model_from_string(graph)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _MANY_WEIGHTS:
            continue
        name = tensor.name
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, name + HALF))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()
