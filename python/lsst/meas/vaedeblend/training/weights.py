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


def load_weights(source: str | os.PathLike) -> dict[str, Tensor]:
    """Read the weights of encoder and decoder from a checkpoint or from a deblender's artefact.

    Of a checkpoint only tensors are read, and nothing is unpickled beyond them; an artefact's checksum is
    verified.

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
    return {name: torch.from_numpy(array) for name, array in weights.items() if name.startswith(parts)}


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
