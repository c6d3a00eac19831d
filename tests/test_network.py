# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ONNX artefact: what is accepted, what is refused with which words, and how it runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import synthetic
from lsst.meas.vaedeblend.network import (
    METADATA_KEY,
    Decoder,
    Network,
    NetworkError,
    NetworkMetadata,
    _files,
    embed_metadata,
    graph_sha256,
    load_network,
    read_metadata,
    resolve,
    shipped_networks,
)


@pytest.fixture
def copy(network_path, tmp_path):
    """A network of one's own to spoil, decoder included."""
    for path in network_path.parent.glob("synthetic*.onnx"):
        shutil.copy(path, tmp_path)
    return tmp_path / "synthetic.onnx"


def cutouts(n=3, bands=3, size=64, seed=1):
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 0.1, (n, bands, size, size)).astype(np.float32)
    image += 100 * synthetic.gaussian_image((size, size), 32.2, 31.7, 1.8)
    return image, np.ones(image.shape), np.full((n, bands), 0.1), np.tile([2.3, 2.3, 0.0], (n, bands, 1))


def test_the_checksum_is_that_of_the_graph_alone(network_path):
    import hashlib

    data = network_path.read_bytes()
    graph = onnx.load_from_string(data).graph.SerializeToString()
    assert graph_sha256(data) == hashlib.sha256(graph).hexdigest()
    meta = read_metadata(network_path)
    assert meta.weights_sha256 == graph_sha256(data)
    other = embed_metadata(data, dataclasses.replace(meta, licence="another"))
    assert graph_sha256(other) == graph_sha256(data)


def test_embedded_metadata_are_read_by_onnx_and_replace_older_ones(network_path):
    data = network_path.read_bytes()
    meta = read_metadata(network_path)
    again = embed_metadata(embed_metadata(data, meta), dataclasses.replace(meta, licence="new"))
    properties = onnx.load_from_string(again).metadata_props
    assert [p.key for p in properties] == [METADATA_KEY]
    assert json.loads(properties[0].value)["licence"] == "new"


def test_metadata_survive_json(network_path):
    meta = read_metadata(network_path)
    assert NetworkMetadata.from_json(meta.to_json()) == meta
    assert meta.bands == ("g", "r", "i") and meta.centre == (32.0, 32.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contract": 2}, ["contract version 2", "reads version 1"]),
        ({"kind": "classifier"}, ["kind", "classifier"]),
        ({"bands": ["g", "g", "r"]}, ["bands", "different"]),
        ({"bands": []}, ["bands"]),
        ({"bands": "gri"}, ["bands", "'gri'"]),
        ({"pixel_scale": -0.2}, ["pixel_scale", "-0.2"]),
        ({"pixel_scale": "0.2"}, ["pixel_scale", "'0.2'"]),
        ({"cutout_size": 64.0}, ["cutout_size", "64.0"]),
        ({"cutout_size": True}, ["cutout_size", "True"]),
        ({"latent_size": 0}, ["latent_size"]),
        ({"centre": [32, 64]}, ["centre", "64"]),
        ({"centre": 32}, ["centre"]),
        ({"frame": {"type": "gaussian", "sigma": 0}}, ["frame", "sigma"]),
        ({"frame": {"type": "observed", "fwhm": {"g": 0.7, "r": 0.7}}}, ["frame", "fwhm"]),
        ({"frame": {"type": "moffat"}}, ["frame", "moffat"]),
        ({"training_range": {"noise": {"g": [0, 1]}}}, ["training_range"]),
        ({"training_range": {"psf_fwhm": [1]}}, ["training_range"]),
        ({"training": None}, ["training"]),
        ({"name": ""}, ["name"]),
    ],
)
def test_metadata_out_of_contract_are_refused(change, words):
    document = {**json.loads(synthetic.metadata().to_json()), **change}
    with pytest.raises(NetworkError) as caught:
        NetworkMetadata.from_json(json.dumps(document), "some.onnx")
    for word in ["some.onnx", *words]:
        assert word in str(caught.value)


def test_metadata_that_lack_a_key_or_are_no_object_are_refused():
    document = json.loads(synthetic.metadata().to_json())
    del document["pixel_scale"]
    with pytest.raises(NetworkError, match="lack .'pixel_scale'."):
        NetworkMetadata.from_json(json.dumps(document))
    with pytest.raises(NetworkError, match="should be an object, found list"):
        NetworkMetadata.from_json("[]")
    with pytest.raises(NetworkError, match="not JSON"):
        NetworkMetadata.from_json("{")


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(copy, fraction):
    path = synthetic.write_truncated(copy, fraction)
    with pytest.raises(NetworkError, match="truncated|empty|ends in the middle|not a network|not an ONNX"):
        Network.load(path)


def test_tampered_files_are_refused_naming_both_checksums(copy):
    path = synthetic.write_tampered(copy)
    with pytest.raises(NetworkError, match="altered") as caught:
        Network.load(path)
    assert read_metadata(copy).weights_sha256 in str(caught.value)
    assert graph_sha256(path.read_bytes()) in str(caught.value)


def test_a_second_graph_is_refused(copy):
    # Protobuf merges a repeated message into the first: weights would change behind the checksum's back.
    data = copy.read_bytes()
    copy.write_bytes(data + onnx.ModelProto(graph=onnx.GraphProto(name="other")).SerializeToString())
    with pytest.raises(NetworkError, match="expected one graph, found 2"):
        Network.load(copy)


def test_two_metadata_documents_are_refused(copy):
    model = onnx.load(copy)
    model.metadata_props.add(key=METADATA_KEY, value="{}")
    copy.write_bytes(model.SerializeToString())
    with pytest.raises(NetworkError, match="expected one 'vaedeblend'"):
        Network.load(copy)


def test_weights_in_another_file_are_refused(copy):
    model = onnx.load(copy)
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    copy.write_bytes(embed_metadata(model.SerializeToString(), synthetic.metadata()))
    with pytest.raises(NetworkError, match="not covered by the checksum"):
        Network.load(copy)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(NetworkError, match="not a network of this package"):
        Network.load(synthetic.write_foreign(tmp_path))
    for name, data in (
        ("text", b"hello, world, this is no network"),
        ("zeros", bytes(1000)),
        ("zip", b"PK\x03\x04" * 9),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(NetworkError, match="not an ONNX|truncated|ends in the middle"):
            Network.load(path)


def test_oversized_files_are_refused(copy, monkeypatch):
    monkeypatch.setattr(_files, "MAX_FILE_SIZE", 1000)
    with pytest.raises(NetworkError, match="larger than the 1000 bytes"):
        Network.load(copy)


def test_missing_networks_are_refused_naming_the_shipped_ones(tmp_path):
    with pytest.raises(NetworkError, match="neither a file nor one of the shipped") as caught:
        Network.load(tmp_path / "no.onnx")
    assert str(shipped_networks()) in str(caught.value)
    with pytest.raises(NetworkError, match="cannot be read|neither"):
        Network.load(tmp_path)


def test_shipped_networks_are_found_by_name(copy, monkeypatch):
    monkeypatch.setattr(_files, "_ARTEFACTS", copy.parent)
    monkeypatch.setattr(_files, "_other_folders", lambda: ())
    assert shipped_networks() == ["synthetic"]
    assert resolve("synthetic") == copy
    assert Network.load("synthetic").metadata.name == "synthetic"


def test_other_distributions_add_networks(copy, tmp_path, monkeypatch):
    """By an entry point that names a package, which is not imported."""
    package = tmp_path / "site" / "more_networks"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for path in copy.parent.glob("synthetic*.onnx"):
        shutil.copy(path, package / path.name.replace("synthetic", "another"))
    information = tmp_path / "site" / "more-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    points = "[meas_vaedeblend.artefacts]\nmore = more_networks\nbroken = nowhere.at.all\n"
    (information / "entry_points.txt").write_text(points)
    assert "another" not in shipped_networks()
    monkeypatch.syspath_prepend(tmp_path / "site")
    _files._other_folders.cache_clear()
    try:
        assert {"another", "lsst_ugrizy"} <= set(shipped_networks())
        assert resolve("another") == package / "another.onnx"
        with pytest.raises(NetworkError, match="neither a file"):
            resolve("another_decoder")
    finally:
        monkeypatch.undo()
        _files._other_folders.cache_clear()


def test_a_missing_network_of_another_distribution_names_it(monkeypatch):
    monkeypatch.setattr(_files, "_other_folders", lambda: ())
    with pytest.raises(NetworkError, match="pip install meas_vaedeblend_paper"):
        load_network("arcelin2020_lsst")


@pytest.fixture
def halves(network_path, tmp_path):
    """The synthetic network without its drawing, which the decoder of a network of another name does."""
    inputs = ["image", "valid", "noise", "psf_moments"]
    extractor = onnx.utils.Extractor(onnx.load(network_path))
    encoder = extractor.extract_model(inputs, ["latent_mean", "latent_sigma"]).SerializeToString()
    decoder = synthetic.decoder_bytes(synthetic.metadata())
    shared = synthetic.metadata(name="shared", kind="decoder")
    (tmp_path / "shared_decoder.onnx").write_bytes(embed_metadata(decoder, shared))
    own = synthetic.metadata(name="half", decoder="shared", decoder_sha256=graph_sha256(decoder))
    (tmp_path / "half.onnx").write_bytes(embed_metadata(encoder, own))
    return tmp_path / "half.onnx"


def test_an_encoder_and_the_decoder_that_it_names_are_a_network(network, halves):
    half = Network.load(halves, threads=1)
    inputs = cutouts()
    for epsilon in (None, np.random.default_rng(3).normal(size=(3, 6))):
        for batch in (2, 128):
            found = half.deblend(*inputs, epsilon, batch_size=batch)
            expected = network.deblend(*inputs, epsilon)
            np.testing.assert_array_equal(found.latent_mean, expected.latent_mean)
            np.testing.assert_array_equal(found.latent_sigma, expected.latent_sigma)
            np.testing.assert_allclose(found.model, expected.model, rtol=1e-5, atol=1e-6)
    empty = half.deblend(*(np.asarray(a)[:0] for a in inputs))
    assert empty.model.shape == (0, 3, 64, 64)
    spoiled = inputs[0].copy()
    spoiled[1] = np.nan
    found = half.deblend(spoiled, *inputs[1:])
    assert found.finite.tolist() == [True, False, True] and not found.model[1].any()
    assert pickle.loads(pickle.dumps(half)).metadata == half.metadata


def test_half_a_network_is_none(halves):
    beside = halves.with_name("shared_decoder.onnx")
    model = onnx.load(beside)
    model.graph.node[-1].name = "another graph"
    other = synthetic.metadata(name="shared", kind="decoder")
    beside.write_bytes(embed_metadata(model.SerializeToString(), other))
    with pytest.raises(NetworkError, match="SHA-256"):
        Network.load(halves)
    beside.unlink()
    with pytest.raises(NetworkError, match="shared_decoder.onnx does not exist"):
        Network.load(halves)


def test_a_decoder_in_another_folder_is_refused():
    with pytest.raises(NetworkError, match="plain name"):
        synthetic.metadata(decoder="../another")


def test_other_bands_order_and_pixel_scale_are_refused_naming_both_sides(network_path):
    with pytest.raises(NetworkError, match=r"\['g', 'r', 'i'\].*\['r', 'g', 'i'\]"):
        Network.load(network_path, bands=("r", "g", "i"))
    with pytest.raises(NetworkError, match=r"\['g', 'r', 'i'\].*\['g', 'r'\]"):
        load_network(network_path, bands=("g", "r"))
    with pytest.raises(NetworkError, match="0.2 arcsec.*0.168 arcsec"):
        Network.load(network_path, pixel_scale=0.168)
    with pytest.raises(NetworkError, match="nan"):
        Network.load(network_path, pixel_scale=float("nan"))
    assert Network.load(network_path, bands="gri", pixel_scale=0.2001).metadata.bands == ("g", "r", "i")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cutout_size": 32, "centre": [16, 16]}, r"image should have shape \['N', 3, 32, 32\].*64, 64"),
        ({"bands": ["g", "r"]}, r"image should have shape \['N', 2, 64, 64\].*3, 64, 64"),
        ({"latent_size": 7}, r"epsilon should have shape \['N', 7\].*6"),
        ({"kind": "decoder"}, "a deblender is needed, this is a decoder"),
    ],
)
def test_graphs_that_contradict_their_metadata_are_refused(copy, change, words):
    document = {**json.loads(read_metadata(copy).to_json()), **change}
    if "bands" in change:
        document["training_range"] = {}
    meta = NetworkMetadata.from_json(json.dumps(document))
    copy.write_bytes(embed_metadata(copy.read_bytes(), meta))
    with pytest.raises(NetworkError, match=words):
        Network.load(copy)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("image", "picture", "picture"),
        ("latent_mean", "mu", "must have outputs"),
        ("epsilon", "noise_draw", "may have inputs"),
    ],
)
def test_other_tensor_names_are_refused(copy, old, new, words):
    model = onnx.load(copy)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name == old:
            value.name = new
    for node in model.graph.node:
        node.input[:] = [new if i == old else i for i in node.input]
        node.output[:] = [new if o == old else o for o in node.output]
    copy.write_bytes(embed_metadata(model.SerializeToString(), synthetic.metadata()))
    with pytest.raises(NetworkError, match=words):
        Network.load(copy)


def test_a_fixed_batch_size_is_refused(copy):
    model = onnx.load(copy)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    copy.write_bytes(embed_metadata(model.SerializeToString(), synthetic.metadata()))
    with pytest.raises(NetworkError, match="image should have shape"):
        Network.load(copy)


def test_a_graph_that_onnxruntime_cannot_run_is_refused(copy):
    model = onnx.load(copy)
    model.graph.node[0].op_type = "NoSuchOperator"
    copy.write_bytes(embed_metadata(model.SerializeToString(), synthetic.metadata()))
    with pytest.raises(NetworkError, match="onnxruntime cannot load the graph"):
        Network.load(copy)


def test_providers_are_logged_required_and_replaced(network_path, caplog):
    with caplog.at_level(logging.INFO, logger="lsst.meas.vaedeblend.network"):
        network = Network.load(network_path, providers=["CPUExecutionProvider"], require=True)
    assert network.provider == "CPUExecutionProvider"
    assert "synthetic runs on CPUExecutionProvider" in caplog.text
    caplog.clear()
    absent = "NoSuchExecutionProvider"
    with pytest.raises(NetworkError, match="'NoSuchExecutionProvider' is required.*CPUExecutionProvider"):
        Network.load(network_path, providers=[absent, "CPUExecutionProvider"], require=True)
    with caplog.at_level(logging.WARNING, logger="lsst.meas.vaedeblend.network"):
        assert Network.load(network_path, providers=[absent]).provider == "CPUExecutionProvider"
    assert "NoSuchExecutionProvider was asked for, CPUExecutionProvider is in use" in caplog.text
    with pytest.raises(NetworkError, match="No execution provider"):
        Network.load(network_path, providers=[])


def test_the_batch_size_bounds_what_goes_through_at_once_and_changes_nothing(network, monkeypatch):
    arguments = cutouts(7)
    whole = network.deblend(*arguments)
    seen = []
    session = network._session

    class Spy:
        def run_with_ort_values(self, outputs, feeds, options):
            seen.append(feeds["image"].shape()[0])
            return session.run_with_ort_values(outputs, feeds, options)

    monkeypatch.setattr(network, "_session", Spy())
    parts = network.deblend(*arguments, batch_size=3)
    assert seen == [3, 3, 1]
    np.testing.assert_allclose(parts.model, whole.model, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts.latent_mean, whole.latent_mean, rtol=1e-5)


def test_the_synthetic_network_measures_what_it_should(network):
    out = network.deblend(*cutouts())
    assert out.finite.all()
    # Position, variance in the model frame (of a galaxy of variance 1.8^2 - 2.3) and flux.
    expected = [0.2, -0.3, 1.8**2 + 1 / 12 - 2.3 + 0.8**2 + 1 / 12]
    np.testing.assert_allclose(out.latent_mean[:, :3], np.tile(expected, (3, 1)), atol=0.25)
    np.testing.assert_allclose(out.model.sum(axis=(2, 3)), 100, rtol=0.15)


def test_epsilon_draws_from_the_posterior(network):
    arguments = cutouts(2)
    mean = network.deblend(*arguments)
    zeros = network.deblend(*arguments, epsilon=np.zeros((2, 6)))
    drawn = network.deblend(*arguments, epsilon=np.ones((2, 6)))
    np.testing.assert_array_equal(mean.model, zeros.model)
    latent = mean.latent_mean + mean.latent_sigma
    np.testing.assert_allclose(network.decoder.render(latent), drawn.model, rtol=1e-4, atol=1e-5)


def test_a_graph_may_leave_inputs_out(tmp_path):
    path = synthetic.write_network(tmp_path, inputs=("image",))
    out = Network.load(path).deblend(*cutouts())
    np.testing.assert_allclose(out.model.sum(axis=(2, 3)), 100, rtol=0.15)


def test_inputs_of_the_wrong_shape_are_refused(network):
    image, valid, noise, moments = cutouts()
    with pytest.raises(ValueError, match=r"image should have shape \(3, 3, 64, 64\), not \(3, 2, 64, 64\)"):
        network.deblend(image[:, :2], valid, noise, moments)
    with pytest.raises(ValueError, match="noise should have shape"):
        network.deblend(image, valid, noise[:2], moments)
    with pytest.raises(ValueError, match="epsilon should have shape"):
        network.deblend(image, valid, noise, moments, epsilon=np.zeros((3, 5)))
    with pytest.raises(ValueError, match="batch size"):
        network.deblend(image, valid, noise, moments, batch_size=0)
    with pytest.raises(ValueError, match="latent should have shape"):
        network.decoder.render(np.zeros((2, 5)))


def test_no_cutouts_give_no_models(network):
    out = network.deblend(*(array[:0] for array in cutouts()))
    assert out.model.shape == (0, 3, 64, 64) and out.finite.shape == (0,)


def test_output_that_is_not_finite_is_reported_and_emptied(tmp_path):
    network = Network.load(synthetic.write_network(tmp_path, nan_above=200.0))
    image, *rest = cutouts()
    image[1] *= 10
    out = network.deblend(image, *rest)
    np.testing.assert_array_equal(out.finite, [True, False, True])
    assert np.isfinite(out.model).all() and not out.model[1].any() and out.model[0].any()


def test_the_decoder_renders_what_the_deblender_did(network):
    out = network.deblend(*cutouts())
    np.testing.assert_allclose(network.decoder.render(out.latent_mean, batch_size=2), out.model, atol=1e-5)
    assert network.decoder is network.decoder


def test_a_decoder_that_is_missing_or_of_another_network_is_refused(copy):
    network = Network.load(copy)
    decoder = copy.with_name("synthetic_decoder.onnx")
    meta = dataclasses.replace(read_metadata(decoder), name="other")
    decoder.write_bytes(embed_metadata(decoder.read_bytes(), meta))
    with pytest.raises(NetworkError, match="its name is 'other', that of .* is 'synthetic'"):
        _ = network.decoder
    decoder.unlink()
    with pytest.raises(NetworkError, match="does not exist"):
        _ = network.decoder
    with pytest.raises(NetworkError, match="a decoder is needed, this is a deblender"):
        Decoder(copy)


def test_networks_can_be_copied_and_pickled(network):
    """Results hold their decoder, and go from process to process."""
    again = pickle.loads(pickle.dumps(network.decoder))
    latent = np.zeros((1, 6))
    np.testing.assert_array_equal(again.render(latent), network.decoder.render(latent))


def test_networks_are_loaded_once_per_process_until_the_file_changes(copy):
    first = load_network(copy)
    assert load_network(str(copy)) is first
    assert load_network(copy, threads=1) is not first
    status = copy.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    second = load_network(copy)
    assert second is not first and load_network(copy) is second


def test_importing_the_runtime_needs_neither_torch_nor_galsim_nor_onnx():
    code = (
        "import sys; import lsst.meas.vaedeblend.deblender, lsst.meas.vaedeblend.catalog; "
        "print(sorted({'torch', 'galsim', 'onnx', 'lightning', 'lsst.afw'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_prior_is_no_deblender(tmp_path):
    training = {"samples": {"prior": 9}}
    path = synthetic.write_network(tmp_path, synthetic.metadata(name="n_prior", training=training))
    with pytest.raises(NetworkError, match="n_prior is a prior.*belongs to it is n.$"):
        load_network(path)
    # Comparisons read it all the same.
    assert Network.load(path).metadata.name == "n_prior"
