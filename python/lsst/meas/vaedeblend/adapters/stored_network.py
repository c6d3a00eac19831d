# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""A network as a Butler dataset, so that a survey's repository holds the one that it uses."""

from __future__ import annotations

__all__ = ["DATASET", "load_stored_network", "network_table", "put_network"]

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from lsst.daf.butler import Butler, DatasetType

from ..network import Network, NetworkError, load_network, read_metadata, read_model, resolve

DATASET = "vaedeblend_network"
"""Name of the dataset type: an `ArrowTable` without dimensions, one row for each file."""

MAX_FILES, MAX_BYTES = 8, 1 << 30
"""Most files of a network, and bytes of all of them."""

_NAME = re.compile(r"[\w-][\w.-]{0,199}\.onnx")


def network_table(name_or_path: str | os.PathLike[str]) -> pa.Table:
    """Make the table that holds the files of a network.

    Parameters
    ----------
    name_or_path : `str` or path-like
        Name of a shipped network, or path of an ONNX file with its companions beside it.

    Returns
    -------
    table : `pyarrow.Table`
        Columns ``file``, its name, and ``content``, its bytes; the deblender is the first.

    Raises
    ------
    lsst.meas.vaedeblend.network.NetworkError
        Raised if a file is not sound, or what deblends is a prior.
    """
    path = resolve(name_or_path)
    metadata = read_metadata(path)
    metadata.check_deblender()
    if metadata.kind != "deblender":
        raise NetworkError(f"{path}: a deblender is needed, this is a {metadata.kind}.")
    companions = [path.with_name(f"{path.stem}_{kind}.onnx") for kind in ("decoder", "render", "linearise")]
    if metadata.decoder:
        companions[0] = path.with_name(f"{metadata.decoder}_decoder.onnx")
    files = [path, *(companion for companion in companions if companion.is_file())]
    content = [read_model(file) for file in files]
    return pa.table({"file": [file.name for file in files], "content": pa.array(content, pa.large_binary())})


_FOLDERS: dict[str, tuple[tempfile.TemporaryDirectory, Path]] = {}
_LOCK = threading.Lock()


def load_stored_network(
    table: pa.Table,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    require: bool = False,
    threads: int = 0,
) -> Network:
    """Load a network from its table, once per process.

    Parameters
    ----------
    table : `pyarrow.Table`
        What `network_table` made.
    providers, require, threads
        See `lsst.meas.vaedeblend.network.load_network`.

    Returns
    -------
    network : `lsst.meas.vaedeblend.network.Network`
        The network.

    Raises
    ------
    lsst.meas.vaedeblend.network.NetworkError
        Raised if the table is none of a network, or a file is not sound.
    """
    files = _files(table)
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    key = digest.hexdigest()
    with _LOCK:
        if key not in _FOLDERS:
            # onnxruntime's sessions are started again from their files; the folder goes with the process.
            folder = tempfile.TemporaryDirectory(prefix="vaedeblend")
            for name, content in files.items():
                Path(folder.name, name).write_bytes(content)
            _FOLDERS[key] = (folder, Path(folder.name, next(iter(files))))
            while len(_FOLDERS) > MAX_FILES:
                _FOLDERS.pop(next(iter(_FOLDERS)))[0].cleanup()
        path = _FOLDERS[key][1]
    return load_network(path, providers, require, threads)


def _files(table: pa.Table) -> Mapping[str, bytes]:
    """Names and contents of the files, checked before any is written."""
    if not {"file", "content"} <= set(getattr(table, "column_names", ())):
        raise NetworkError("A stored network is a table with the columns file and content.")
    if not 0 < table.num_rows <= MAX_FILES or table.nbytes > MAX_BYTES:
        raise NetworkError(
            f"A stored network has 1 to {MAX_FILES} files and at most {MAX_BYTES} bytes, this table "
            f"{table.num_rows} and {table.nbytes}."
        )
    files: dict[str, bytes] = {}
    for name, content in zip(table["file"].to_pylist(), table["content"].to_pylist(), strict=True):
        if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(content, bytes)):
            raise NetworkError(f"A stored network has the file {str(name)[:200]!r}, which is none of its.")
        if name in files:
            raise NetworkError(f"A stored network has the file {name} twice.")
        files[name] = content
    return files


def put_network(
    root: str | os.PathLike[str], name_or_path: str | os.PathLike[str], collection: str
) -> None:
    """Store a network in a repository.

    Parameters
    ----------
    root : path-like
        The Butler repository.
    name_or_path : `str` or path-like
        The network, see `network_table`.
    collection : `str`
        RUN collection to put it into; a collection holds one.

    Raises
    ------
    lsst.meas.vaedeblend.network.NetworkError
        Raised if the network is not sound.
    lsst.daf.butler.registry.ConflictingDefinitionError
        Raised if the collection has one.
    """
    table = network_table(name_or_path)
    with Butler.from_config(os.fspath(root), run=collection, writeable=True) as butler:
        butler.registry.registerDatasetType(
            DatasetType(DATASET, butler.dimensions.empty, "ArrowTable")
        )
        butler.put(table, DATASET)
