# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small files of convolutional networks: what is left of the weights, and where it is found again."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from lsst.meas.vaedeblend.network import Network, NetworkMetadata, embed_metadata, graph_sha256
from lsst.meas.vaedeblend.training.packing import (
    GROUP,
    LEVELS,
    pack_weights,
    split_decoder,
    split_encoder,
    unpack_weights,
)
from lsst.meas.vaedeblend.training.weights import halve_weights, load_weights
from onnx import TensorProto, helper, numpy_helper

SIZE, LATENTS = 16, 32


def _info(name: str, *shape: int):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])


def _model(nodes, inputs, outputs, weights) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "network", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return onnx.load_model_from_string(halve_weights(model.SerializeToString()))


def _decoder(prefix: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", ["latent", f"{prefix}last.weight"], ["flat"]),
        helper.make_node("Reshape", ["flat", f"{prefix}shape"], ["model"]),
    ]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    n = SIZE * SIZE
    return {
        "encoder.first.weight": rng.normal(0, 0.05, (n, n)).astype(np.float32),
        "encoder.slopes": (0.3 + rng.normal(0, 0.02, (n, n))).astype(np.float32),
        "encoder.mean.weight": rng.normal(0, 0.05, (n, LATENTS)).astype(np.float32),
        "decoder.last.weight": rng.normal(0, 0.05, (LATENTS, n)).astype(np.float32),
        "decoder.shape": np.array([-1, 1, SIZE, SIZE]),
    }


@pytest.fixture(scope="module")
def deblender(weights) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Flatten", ["image"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "encoder.first.weight"], ["first"]),
        helper.make_node("Unsqueeze", ["first", "axis"], ["column"]),
        helper.make_node("MatMul", ["column", "row"], ["square"]),
        helper.make_node("Reshape", ["encoder.slopes", "slopes_shape"], ["slopes"]),
        helper.make_node("PRelu", ["square", "slopes"], ["rectified"]),
        helper.make_node("ReduceMean", ["rectified", "axis"], ["second"], keepdims=0),
        helper.make_node("MatMul", ["second", "encoder.mean.weight"], ["latent_mean"]),
        helper.make_node("Exp", ["latent_mean"], ["latent_sigma"]),
        helper.make_node("Mul", ["latent_sigma", "epsilon"], ["shift"]),
        helper.make_node("Add", ["latent_mean", "shift"], ["latent"]),
        *_decoder("decoder."),
    ]
    n = SIZE * SIZE
    row = np.random.default_rng(2).normal(size=(1, n)).astype(np.float32)
    constants = {"axis": np.array([2]), "row": row, "slopes_shape": np.array([1, n, n])}
    inputs = [_info("image", 1, SIZE, SIZE), _info("epsilon", LATENTS)]
    outputs = [_info("model", 1, SIZE, SIZE), _info("latent_mean", LATENTS), _info("latent_sigma", LATENTS)]
    return _model(nodes, inputs, outputs, weights | constants)


@pytest.fixture(scope="module")
def decoder(weights) -> onnx.ModelProto:
    other = {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
    other["last.weight"] = other["last.weight"] + 1
    return _model(_decoder(""), [_info("latent", LATENTS)], [_info("model", 1, SIZE, SIZE)], other)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.load_model_from_string(model.SerializeToString())


def test_large_tensors_get_seven_bits(deblender, weights):
    packed = pack_weights(_copy(deblender))
    onnx.checker.check_model(packed)
    stored = {t.name: numpy_helper.to_array(t) for t in packed.graph.initializer}
    integers = stored["encoder.first.weight_integers"]
    assert integers.dtype == np.int8 and np.abs(integers).max() == LEVELS
    # Half a step; the largest of each group sets it. A rectifier's slopes lie around their middle.
    found = unpack_weights(packed)
    for name, around in (("encoder.first.weight", False), ("encoder.slopes", True)):
        groups = weights[name].reshape(-1, GROUP)
        width = np.ptp(groups, axis=1) / 2 if around else np.abs(groups).max(axis=1)
        error = np.abs(found[name] - weights[name]).reshape(groups.shape).max(axis=1)
        assert (error < 0.55 * width / LEVELS + 3e-4).all() and error.max() > 0.3 * width.min() / LEVELS
    # Small ones are as they were.
    assert "encoder.mean.weight_half" in stored
    assert packed.ByteSize() < 0.6 * deblender.ByteSize()


def test_both_halves_are_the_network(deblender, decoder, tmp_path):
    whole = NetworkMetadata(
        name="whole",
        kind="deblender",
        bands=("r",),
        pixel_scale=0.2,
        cutout_size=SIZE,
        latent_size=LATENTS,
        frame={"type": "gaussian", "sigma": 0.8},
        centre=(7.5, 7.5),
        training_range={},
        training={},
        figures_of_merit={},
        licence="GPL-3.0-or-later",
    )
    (tmp_path / "whole.onnx").write_bytes(embed_metadata(deblender.SerializeToString(), whole))
    drawing = split_decoder(deblender, decoder).SerializeToString()
    half = dataclasses.replace(whole, name="half", decoder_sha256=graph_sha256(drawing))
    encoder = split_encoder(deblender).SerializeToString()
    (tmp_path / "half.onnx").write_bytes(embed_metadata(encoder, half))
    beside = dataclasses.replace(half, kind="decoder", decoder_sha256="")
    (tmp_path / "half_decoder.onnx").write_bytes(embed_metadata(drawing, beside))
    rng = np.random.default_rng(2)
    image, epsilon = rng.normal(size=(3, 1, SIZE, SIZE)), rng.normal(size=(3, LATENTS))
    inputs = image, np.ones_like(image), np.ones((3, 1)), np.ones((3, 1, 3)), epsilon
    expected, found = (Network.load(tmp_path / f"{n}.onnx").deblend(*inputs) for n in ("whole", "half"))
    assert np.abs(expected.model).max() > 0.1
    np.testing.assert_allclose(found.model, expected.model, rtol=1e-5, atol=1e-5)
    one, two = (load_weights(tmp_path / f"{name}.onnx") for name in ("whole", "half"))
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


def test_a_decoder_of_another_architecture_is_refused(deblender, decoder):
    other = _copy(decoder)
    other.graph.initializer[0].name = "first.weight_half"
    with pytest.raises(ValueError, match="first.weight_half"):
        split_decoder(deblender, other)
