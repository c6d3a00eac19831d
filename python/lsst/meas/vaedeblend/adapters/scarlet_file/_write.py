# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writing, and what the pipelines ask of a file."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...scene import PsfGrid
from ._records import (
    CubeComponent,
    FactorizedComponent,
    IsolatedSource,
    ScarletBlend,
    ScarletModels,
    ScarletParent,
    ScarletSource,
    bounding_box,
)

__all__ = ["check", "write"]

WRITTEN_VERSION = "1.0.1"
"""Schema version of the files that `write` makes."""

# Zip members carry a time. A fixed one, the earliest there is, makes equal models equal files.
_TIME = (1980, 1, 1, 0, 0, 0)


def write(path_or_stream: str | os.PathLike[str] | BinaryIO, models: ScarletModels) -> None:
    """Write a file of scarlet models in the layout of schema 1.0.1.

    Equal models give equal bytes. Numbers are written with the digits that single precision needs, so that
    what is read back is the same.

    Parameters
    ----------
    path_or_stream : path or binary stream
        Where to write to.
    models : `ScarletModels`
        What to write.

    Raises
    ------
    ValueError
        Raised if the pipelines could not read or not measure what would be written: PSFs of cells, arrays of
        other bands, a number that is not finite, a source without a component, a blend that reaches beyond
        its parent, or an id that appears twice.
    """
    check(models)
    members: dict[str, Any] = {str(key): _encode_parent(parent) for key, parent in models.parents.items()}
    members |= {str(key): _encode_isolated(source) for key, source in models.isolated.items()}
    members["metadata"] = _encode_metadata(models)
    members["version"] = WRITTEN_VERSION
    # All of it is encoded before the file is touched: an error leaves no half of a file.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system, info.external_attr = 3, 0o600 << 16
            archive.writestr(info, json.dumps(content, separators=(",", ":"), allow_nan=False))
    if hasattr(path_or_stream, "write"):
        path_or_stream.write(buffer.getvalue())
    else:
        with open(path_or_stream, "wb") as stream:
            stream.write(buffer.getvalue())


def check(models: ScarletModels) -> None:
    n_bands = len(models.bands)
    if isinstance(models.psf, PsfGrid):
        raise ValueError(f"Schema {WRITTEN_VERSION} has one PSF per band, not those of cells.")
    if models.psf.ndim != 3 or len(models.psf) != n_bands:
        raise ValueError(f"PSFs of {models.psf.shape} do not go with the bands {list(models.bands)}.")
    if both := models.parents.keys() & models.isolated.keys():
        raise ValueError(f"{min(both)} is a parent and an isolated source.")
    seen: set[int] = set()
    for key, parent in models.parents.items():
        outer = bounding_box([(parent.origin, parent.footprint.shape)])
        for blend in parent.blends.values():
            # The pipelines cut the blend's box out of the parent's.
            if bounding_box([(parent.origin, parent.footprint.shape), (blend.origin, blend.shape)]) != outer:
                raise ValueError(f"A blend of parent {key} reaches beyond its box.")
            for number, source in blend.sources.items():
                if number != source.id or number in seen:
                    raise ValueError(f"Source {number} of parent {key} appears twice or under another id.")
                seen.add(number)
                if not source.components:
                    raise ValueError(f"Source {number} has no component.")
                if any(c.n_bands != n_bands for c in source.components):
                    raise ValueError(f"Source {number} has a component that is not of {n_bands} bands.")


def _encode_parent(parent: ScarletParent) -> dict[str, Any]:
    return {
        "blend_type": "hierarchical",
        "children": {str(key): _encode_blend(blend) for key, blend in parent.blends.items()},
        "version": "1.0.0",
        "metadata": {
            # As numbers rather than words: they are read as bool all the same, and take a third of the space.
            "spans": parent.footprint.ravel().astype(int).tolist(),
            "spans_shape": list(parent.footprint.shape),
            "spans_dtype": "bool",
            "origin": list(parent.origin),
            "array_keys": ["spans"],
        },
    }


def _encode_blend(blend: ScarletBlend) -> dict[str, Any]:
    return {
        "blend_type": "blend",
        "origin": list(blend.origin),
        "shape": list(blend.shape),
        "sources": {str(key): _encode_source(source) for key, source in blend.sources.items()},
        "version": "1.0.0",
    }


def _encode_source(source: ScarletSource) -> dict[str, Any]:
    metadata = {} if source.peak_id is None else {"peak_id": int(source.peak_id)}
    return {
        "source_type": "source",
        "components": [_encode_component(component) for component in source.components],
        "version": "1.0.0",
        "metadata": metadata | {"id": int(source.id)},
    }


def _encode_component(component: FactorizedComponent | CubeComponent) -> dict[str, Any]:
    record: dict[str, Any] = {"origin": list(component.origin)}
    if isinstance(component, FactorizedComponent):
        record |= {
            "shape": list(component.morph.shape),
            "spectrum": _plain(component.spectrum),
            "morph": _plain(component.morph),
            "component_type": "factorized",
        }
    else:
        record |= {
            "shape": list(component.model.shape),
            "model": _plain(component.model),
            "component_type": "component",
        }
    return record | {"peak": _plain(component.peak, np.float64), "version": "1.0.0"}


def _encode_isolated(source: IsolatedSource) -> dict[str, Any]:
    return {
        "source_type": "isolated",
        "origin": list(source.origin),
        "shape": list(source.footprint.shape),
        "peak": _plain(source.peak, np.float64),
        "span_array": source.footprint.ravel().astype(int).tolist(),
        "version": "1.0.0",
    }


def _encode_metadata(models: ScarletModels) -> dict[str, Any]:
    record: dict[str, Any] = {"bands": list(models.bands)}
    # `check` has seen to it that the PSF is not one of cells.
    assert not isinstance(models.psf, PsfGrid)
    for key, array in (("model_psf", models.model_psf), ("psf", models.psf)):
        record |= {key: _plain(array), f"{key}_shape": list(array.shape), f"{key}_dtype": "float32"}
    return record | {"array_keys": ["model_psf", "psf"]}


def _plain(values: ArrayLike, dtype: type = np.float32) -> list[int | float]:
    """Make the numbers of an array ones that JSON writes with as few digits as their type needs."""
    numbers: NDArray = np.asarray(values, dtype).ravel()
    if not np.isfinite(numbers).all():
        raise ValueError("A model or PSF holds numbers that are not finite.")
    whole = (numbers == np.rint(numbers)) & (np.abs(numbers) < 1 << 24)
    if whole.all():
        return [*numbers.astype(np.int64).tolist()]
    return [int(v) if w else float(str(v)) for v, w in zip(numbers, whole.tolist(), strict=True)]
