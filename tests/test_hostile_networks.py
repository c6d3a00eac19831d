# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Network files of others: whatever is wrong with them is a NetworkError, before anything is made of it."""

from __future__ import annotations

import json
import random
import shutil
import threading
from copy import deepcopy as copy_of
from pathlib import Path

import numpy as np
import onnx
import pytest
import synthetic
from lsst.meas.vaedeblend.network import Network, NetworkError, NetworkMetadata, embed_metadata, load_network
from lsst.meas.vaedeblend.network import _networks as networks
from lsst.meas.vaedeblend.network._onnx import verify


@pytest.fixture
def copy(network_path, tmp_path) -> Path:
    for path in network_path.parent.glob("*.onnx"):
        shutil.copy(path, tmp_path)
    return tmp_path / network_path.name


STRANGE = [
    None, True, False, 0, -1, 1, 2, 64, 10**9, 10**400, -(10**400), 0.5, -0.0, 1e308, 5e-324, "", "gri",
    "a" * 5000, "\ud800", "\x00", "../../etc/passwd", "g\n", [], [[]], {}, {"": {}}, ["g", 1], [1e999],
    {"type": "gaussian"}, {"g": None}, {"type": "gaussian", "sigma": 10**400}, [0, 10**400], [None, None],
    {"type": "observed", "fwhm": {}}, {"type": "gaussian", "sigma": 0.8, "pixel_scale": 3},
    {"noise": [1, 2]}, {"samples": 3},
]  # fmt: skip


def mutate(rng: random.Random, document: dict) -> str:
    """Alter a document, as a document or as text."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*document, "unknown"])
        where, part = document, key
        # Down into what is nested, sometimes.
        while isinstance(where.get(part), dict) and where[part] and rng.random() < 0.6:
            where = where[part]
            part = rng.choice(list(where))
        act = rng.random()
        if act < 0.15:
            where.pop(part, None)
        elif act < 0.3 and isinstance(where.get(part), list) and where[part]:
            where[part] = where[part] * rng.randint(0, 100)
        else:
            where[part] = copy_of(rng.choice(STRANGE))
    text = json.dumps(document)
    act = rng.random()
    if act < 0.15:
        text = text[: rng.randrange(len(text))]
    elif act < 0.3:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('{}[]",:0e-N\\ \x00é') + text[at + rng.randint(0, 2) :]
    elif act < 0.33:
        at = text.index(":") + 1
        text = text[:at] + "[" * 100_000 + text[at:]
    return text


def test_ten_thousand_altered_documents():
    """Each is refused by name, or is within the contract and comes back from JSON as itself."""
    rng, good = random.Random(1), json.loads(synthetic.metadata().to_json())
    refused = 0
    for _ in range(10_000):
        text = mutate(rng, good)
        try:
            metadata = NetworkMetadata.from_json(text, "some.onnx")
        except NetworkError as error:
            refused += 1
            assert str(error).startswith("some.onnx: ") and len(str(error)) < 5000
            continue
        assert 0 < metadata.cutout_size <= 1024 and 0 < metadata.latent_size <= 4096
        assert 0 < len(metadata.bands) <= 64
        assert NetworkMetadata.from_json(metadata.to_json()) == metadata
        # What the runtime asks of metadata later does not fail either.
        stub = Network.__new__(Network)
        stub.metadata, stub.path = metadata, Path("some.onnx")
        try:
            metadata.check_deblender()
            stub.check(metadata.bands, 0.2)
        except NetworkError:
            pass
    assert 5000 < refused < 10_000


def test_truncated_and_altered_files(copy):
    """A file that is not the one that was written is refused, or has the same graph to the bit."""
    data = copy.read_bytes()
    rng = random.Random(2)
    reference = verify(data, "whole")
    accepted = 0
    for _ in range(1500):
        changed = bytearray(data)
        act = rng.random()
        if act < 0.3:
            del changed[rng.randrange(len(data)) :]
        elif act < 0.4:
            at = rng.randrange(len(data))
            changed[at:at] = rng.randbytes(rng.randint(1, 20))
        elif act < 0.6:
            # The first bytes and the last are outside of the graph.
            at = rng.choice([rng.randrange(60), len(data) - 1 - rng.randrange(2000)])
            changed[at] ^= 1 << rng.randrange(8)
        else:
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(data))] = rng.randrange(256)
        try:
            metadata = verify(bytes(changed), "some.onnx")
        except NetworkError as error:
            assert str(error).startswith("some.onnx: ")
            continue
        accepted += 1
        assert metadata.weights_sha256 == reference.weights_sha256
    assert accepted < 300


def test_accepted_alterations_load_or_are_refused(copy):
    """Outside of the graph a change may pass the checksum: then it is refused or nothing differs."""
    data = copy.read_bytes()
    mine = Network.load(copy, threads=1)
    rng = np.random.default_rng(3)
    cutouts = (rng.normal(size=(2, 3, 64, 64)), np.ones((2, 3, 64, 64)), np.ones((2, 3)), np.ones((2, 3, 3)))
    expected = mine.deblend(*cutouts).model
    other, tried = copy.with_name("other.onnx"), 0
    shutil.copy(copy.with_name(f"{copy.stem}_decoder.onnx"), copy.with_name("other_decoder.onnx"))
    for at in [*range(40), *range(len(data) - 40, len(data))]:
        changed = bytearray(data)
        changed[at] ^= 1
        other.write_bytes(bytes(changed))
        try:
            network = Network.load(other, threads=1)
        except NetworkError:
            continue
        tried += 1
        np.testing.assert_array_equal(network.deblend(*cutouts).model, expected)
    assert tried < 80


@pytest.mark.parametrize("where", ["constant", "subgraph", "sparse", "location"])
def test_tensors_in_other_files_are_refused_wherever_they_are(copy, where):
    model = onnx.load(copy)
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32), "hidden")
    if where == "location":
        tensor.data_location = onnx.TensorProto.EXTERNAL
        model.graph.initializer.append(tensor)
    else:
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "/etc/passwd"
        node = onnx.helper.make_node("Constant", [], ["hidden"], value=tensor)
        if where == "subgraph":
            inner = onnx.helper.make_graph([node], "inner", [], [])
            node = onnx.helper.make_node("If", ["image"], ["hidden"], then_branch=inner, else_branch=inner)
        if where == "sparse":
            sparse = onnx.SparseTensorProto(values=tensor, dims=[3])
            model.graph.sparse_initializer.append(sparse)
        else:
            model.graph.node.append(node)
    copy.write_bytes(embed_metadata(model.SerializeToString(), synthetic.metadata()))
    with pytest.raises(NetworkError, match="another file"):
        Network.load(copy)


def test_functions_beside_the_graph_are_refused(copy):
    """The checksum is the graph's: a function of the model would change what the graph means."""
    model = onnx.load(copy)
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    opset = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function("", "Add", ["x"], ["y"], [node], opset))
    copy.write_bytes(embed_metadata(model.SerializeToString(), synthetic.metadata()))
    with pytest.raises(NetworkError, match="functions"):
        Network.load(copy)


def test_a_graph_without_end_is_refused(copy):
    def field(number: int, payload: bytes) -> bytes:
        size, out = len(payload), bytearray()
        while size > 0x7F:
            out.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes([number << 3 | 2, *out, size]) + payload

    graph = b""
    for _ in range(100):
        # A graph in an attribute (6) of a node (5) of a graph (1).
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(NetworkError, match="nested"):
        verify(embed_metadata(field(7, graph), synthetic.metadata()), "some.onnx")


def test_the_cache_is_bounded_and_threads_share_it(copy, monkeypatch):
    monkeypatch.setattr(networks, "_CACHE", type(networks._CACHE)())
    monkeypatch.setattr(networks, "MAX_CACHED", 2)
    loads, load = [], Network.load

    def counted(path, *args, **keywords):
        loads.append(path)
        return load(path, *args, **keywords)

    monkeypatch.setattr(Network, "load", counted)
    found: list[Network] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_network(copy, threads=1))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(found) == 4 and len(set(map(id, found))) == 1
    for k in (2, 3):
        load_network(copy, threads=k)
        load_network(copy, threads=1)
    assert len(networks._CACHE) == 2
    # The one in use stays, the one that was not asked for longest went.
    assert load_network(copy, threads=1) is found[0] and len(loads) == 3
    load_network(copy, threads=2)
    assert len(loads) == 4


class _Part:
    """What onnxruntime says of one part of a graph."""

    def __init__(self, provider: str, *operations: str) -> None:
        self.ep_name, self.operations = provider, operations

    def get_nodes(self) -> list:
        return [type("Node", (), {"op_type": name})() for name in self.operations]


class _Session:
    def __init__(self, *parts: _Part) -> None:
        self.parts = parts

    def get_provider_graph_assignment_info(self) -> tuple[_Part, ...]:
        return self.parts


def test_a_required_provider_has_the_work(copy, caplog):
    """One of the providers of this onnxruntime has no operation at all: what falls to the CPU is seen."""
    import onnxruntime
    from lsst.meas.vaedeblend.network._session import _check_placement

    idle = [name for name in onnxruntime.get_available_providers() if name == "AzureExecutionProvider"]
    if idle and hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        with pytest.raises(NetworkError, match="AzureExecutionProvider' is required, .* nodes would run"):
            Network.load(copy, idle, require=True, threads=1)
        assert Network.load(copy, idle, require=False, threads=1)
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    with caplog.at_level("INFO"):
        _check_placement(_Session(_Part(cuda, "Conv"), _Part(cpu, "Shape", "Gather")), cuda, "a.onnx")
    assert "2 nodes that handle shapes" in caplog.text
    with pytest.raises(NetworkError, match="2 nodes would run on another, among them Conv"):
        _check_placement(_Session(_Part(cpu, "Shape", "Conv"), _Part(cuda, "Gemm")), cuda, "a.onnx")
