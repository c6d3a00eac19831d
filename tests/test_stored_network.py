# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""A network that a repository holds deblends as its files do, and nothing of it is believed unchecked."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from lsst.meas.vaedeblend.adapters import stored_network
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout, run_pipetask
from lsst.meas.vaedeblend.adapters.stored_network import load_stored_network, network_table
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.network import NetworkError
from synthetic import make_scene

BANDS = ("g", "r", "i", "z")


def test_a_pinned_network_is_the_one_that_runs(network_path, tmp_path):
    repository = CoaddRepository(tmp_path / "repo", BANDS, {0: PatchLayout(0, 0, (1, 1), (96, 96))}, 0.2)
    scene, _ = make_scene([30.0, 60.0], [40.0, 50.0], [[400] * 3, [600] * 3], shape=(96, 96))
    detected = np.zeros(scene.shape, bool)
    for parent in scene.parents:
        window, inside = parent.window(scene.shape)
        detected[window] |= inside
    # A band more than the network has.
    image, variance = (np.concatenate([a, a[:1]]) for a in (scene.image, scene.variance))
    psf = np.concatenate([scene.psf.stamps[0], scene.psf.stamps[0][:1]])
    repository.put_coadds(0, image, variance, psf, {"DETECTED": detected})
    result = CliRunner().invoke(main, ["pin", str(repository.root), str(network_path), "pins/first"])
    assert result.exit_code == 0, result.output
    run_pipetask(repository.root, "by_name", config={"network": network_path})
    # The name that the configuration has is not looked at.
    pinned = {"useStoredNetwork": True, "network": "no_such_network", "doWriteResidual": True}
    run_pipetask(repository.root, "pinned", config=pinned, inputs=f"{CoaddRepository.inputs},pins/first")
    for name in ("object_vae_deblend", "object_vae_models"):
        one, other = repository.get(name, 0, "by_name"), repository.get(name, 0, "pinned")
        assert len(one) == 2
        for column in one.colnames:
            np.testing.assert_array_equal(one[column], other[column], err_msg=column)
    assert repository.exists("deep_coadd_vae_residual", 0, "pinned", band="r")
    assert not repository.exists("deep_coadd_vae_residual", 0, "pinned", band="z")


def test_the_table_has_all_files_of_a_network(gaussian_path):
    table = network_table(gaussian_path)
    kinds = ("", "_decoder", "_render", "_linearise")
    assert table["file"].to_pylist() == [f"{gaussian_path.stem}{kind}.onnx" for kind in kinds]
    network = load_stored_network(table, threads=1)
    assert network.can_fit and network.path.parent != gaussian_path.parent
    assert network.linearise.metadata.name == network.metadata.name
    # Once per process.
    assert load_stored_network(table, threads=1) is network
    with pytest.raises(NetworkError, match="a deblender is needed"):
        network_table(gaussian_path.with_name("gaussians_decoder.onnx"))


@pytest.mark.parametrize(
    ("files", "content", "words"),
    [
        (["../evil.onnx"], [b"x"], "none of its"),
        (["/tmp/evil.onnx"], [b"x"], "none of its"),
        (["a.onnx", "a.onnx"], [b"x", b"y"], "twice"),
        ([f"{k}.onnx" for k in range(20)], [b"x"] * 20, "1 to 8 files"),
        ([], [], "1 to 8 files"),
        (["a.onnx"], [b"no network"], "not an ONNX|truncated|ends in the middle"),
        (["a.onnx"], [None], "none of its"),
    ],
)
def test_tables_that_are_no_network_are_refused(files, content, words):
    table = pa.table({"file": pa.array(files, pa.string()), "content": pa.array(content, pa.large_binary())})
    with pytest.raises(NetworkError, match=words):
        load_stored_network(table)
    with pytest.raises(NetworkError, match="columns file and content"):
        load_stored_network(pa.table({"spam": [1]}))


def test_large_tables_are_refused_before_they_are_taken_apart(gaussian_path, monkeypatch):
    table = network_table(gaussian_path)
    monkeypatch.setattr(stored_network, "MAX_BYTES", 1000)
    with pytest.raises(NetworkError, match="at most 1000 bytes"):
        load_stored_network(table)
