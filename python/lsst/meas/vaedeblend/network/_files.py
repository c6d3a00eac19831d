# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where artefacts are, and how their files are read."""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib.metadata import entry_points
from pathlib import Path

from ._metadata import KINDS, NetworkError, NetworkMetadata
from ._onnx import verify

__all__ = ["read_file", "read_metadata", "read_model", "resolve", "shipped_networks"]

MAX_FILE_SIZE = 1 << 30
"""Largest file that is read, bytes."""

_ARTEFACTS = Path(__file__).parent.parent / "artefacts"
_COMPANIONS = tuple(f"_{kind}" for kind in KINDS[1:])


ENTRY_POINTS = "meas_vaedeblend.artefacts"
"""Group of entry points by which other distributions add networks: each names a package of ONNX files."""

_DISTRIBUTIONS = {"arcelin2020_": "meas_vaedeblend_paper"}
"""What names begin with, and the distribution that has such networks, for messages."""


@functools.cache
def _other_folders() -> tuple[Path, ...]:
    """Folders of other distributions; none of their code is run."""
    folders = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        try:
            spec = importlib.util.find_spec(point.module)
        except ImportError:
            continue
        if spec is not None and spec.submodule_search_locations:
            folders += [Path(where) for where in spec.submodule_search_locations]
    return tuple(folders)


def shipped_networks() -> list[str]:
    """List the networks that ship with the package, or with installed distributions that add some.

    Returns
    -------
    names : `list` [`str`]
        Names that `resolve` takes, sorted.
    """
    found = {path.stem for folder in (_ARTEFACTS, *_other_folders()) for path in folder.glob("*.onnx")}
    return sorted(name for name in found if not name.endswith(_COMPANIONS))


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
    name = str(name_or_path)
    if os.sep not in name and not name.endswith(_COMPANIONS):
        # The package's own come first, and without a look at what else is installed.
        for folders in (lambda: (_ARTEFACTS,), _other_folders):
            for folder in folders():
                if (folder / f"{name}.onnx").is_file():
                    return folder / f"{name}.onnx"
    path = Path(os.path.expandvars(name_or_path)).expanduser()
    if path.is_file():
        return path
    hints = [f" pip install {d} adds it." for start, d in _DISTRIBUTIONS.items() if name.startswith(start)]
    raise NetworkError(
        f"No network {name!r}: it is neither a file nor one of the shipped networks {shipped_networks()}."
        + "".join(hints)
    )


def read_file(path: Path) -> bytes:
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
    return verify(read_file(path), str(path))


def read_model(name_or_path: str | os.PathLike[str]) -> bytes:
    """Read a serialized model, checked as by `read_metadata`, with the same parameters and errors.

    Returns
    -------
    model : `bytes`
    """
    path = resolve(name_or_path)
    model = read_file(path)
    verify(model, str(path))
    return model
