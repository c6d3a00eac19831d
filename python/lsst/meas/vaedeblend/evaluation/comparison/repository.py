# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""This deblender's outputs, and the coadds that they were made from, out of a Butler repository or files."""

from __future__ import annotations

__all__ = [
    "is_repository",
    "is_tables",
    "load_repository",
    "load_tables",
    "models_entrant",
    "repository_patches",
]

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...adapters.cell_coadd import scene_from_cell_coadds
from ...network import load_network, read_metadata
from ...sources import SourceModels
from ..metrics import run_seconds
from .entrants import Entrant, from_models
from .patches import Patch

_LOG = logging.getLogger("lsst.meas.vaedeblend.evaluation.comparison")

_LABEL = "vaeDeblend"
_MODELS = "object_vae_models"
_TABLES = ("objects.parquet", "latents.parquet")


def is_repository(what: str) -> bool:
    """Tell whether ``REPO@COLLECTION`` names a Butler repository that is there."""
    root, at, collection = what.rpartition("@")
    return bool(at and collection) and (Path(root) / "butler.yaml").is_file()


def _open(what: str) -> Any:
    from lsst.daf.butler import Butler

    root, _, collection = what.rpartition("@")
    return Butler.from_config(root, collections=collection)


def _name(data_id: Any) -> str:
    return f"{data_id['tract']}_{data_id['patch']}"


def _models(butler: Any) -> dict[str, Any]:
    """References of the models by the name of their patch."""
    from lsst.daf.butler import EmptyQueryResultError, MissingDatasetTypeError

    try:
        refs = butler.query_datasets(_MODELS)
    except (EmptyQueryResultError, MissingDatasetTypeError) as error:
        raise ValueError(f"The collection has no {_MODELS}: {error}") from error
    return {_name(ref.dataId): ref for ref in sorted(refs, key=lambda ref: _name(ref.dataId))}


def repository_patches(what: str, network: str | None = None, coadd: str = "deep_coadd") -> list[Patch]:
    """Read the coadds of all patches that were deblended.

    Parameters
    ----------
    what : `str`
        ``REPO@COLLECTION`` of the deblender's run, whose chain holds the coadds too.
    network : `str`, optional
        Name or path of the network, by default the one that the models name.
    coadd : `str`, optional
        Their dataset type.

    Returns
    -------
    patches : `list` [`Patch`]
        Named ``TRACT_PATCH``, in the bands of the network.

    Raises
    ------
    ValueError
        Raised when nothing was deblended, or a coadd is not in units of flux.
    """
    with _open(what) as butler:
        patches = []
        for name, ref in _models(butler).items():
            table = butler.get(ref)
            if not len(table):
                _LOG.warning("Patch %s is left out: no object has a model there.", name)
                continue
            bands = read_metadata(network or str(table["network"][0])).bands
            coadds = {}
            for band in bands:
                if (found := butler.find_dataset(coadd, ref.dataId, band=band)) is not None:
                    coadds[band] = butler.get(found)
            patches.append(Patch(name, scene_from_cell_coadds(coadds, [b for b in bands if b in coadds])))
        if not patches:
            raise ValueError(f"{what} has no object on any patch.")
        return patches


def load_repository(
    what: str, name: str, patches: Sequence[Patch], network: str | None = None
) -> list[Entrant]:
    """Load this deblender's objects from a repository.

    Parameters
    ----------
    what : `str`
        ``REPO@COLLECTION``.
    name : `str`
        Name of the entrant.
    patches : sequence of `Patch`
        The patches, named ``TRACT_PATCH``.
    network : `str`, optional
        Name or path of the network, by default the one that the models name.

    Returns
    -------
    entrants : `list` [`Entrant`]
        With the time that the task took and the size of its table of models.

    Raises
    ------
    ValueError
        Raised when the repository has no models for a patch.
    """
    out = []
    with _open(what) as butler:
        refs = _models(butler)
        for patch in patches:
            if patch.name not in refs:
                raise ValueError(f"{what} has no {_MODELS} for patch {patch.name}; it has {sorted(refs)}.")
            ref = refs[patch.name]
            table, objects = butler.get(ref), butler.get("object_vae_deblend", ref.dataId)
            seconds = np.nan
            if (found := butler.find_dataset(f"{_LABEL}_metadata", ref.dataId)) is not None:
                seconds = run_seconds(butler.get(found)[_LABEL])
            size = float(butler.getURI(ref).size())
            out.append(models_entrant(name, table, objects, patch, network, seconds=seconds, n_bytes=size))
    return out


def is_tables(what: str) -> bool:
    """Tell whether a directory holds this deblender's tables of one patch, or of patches by their names."""
    path = Path(what)
    return (path / _TABLES[1]).is_file() or any(path.glob(f"*/{_TABLES[1]}"))


def load_tables(what: str, name: str, patches: Sequence[Patch], network: str | None = None) -> list[Entrant]:
    """Load this deblender's objects from parquet files.

    Parameters
    ----------
    what : `str`
        Directory with ``objects.parquet`` and ``latents.parquet``, the tables ``object_vae_deblend`` and
        ``object_vae_models``, or with a directory of these for each patch, of its name.
    name : `str`
        Name of the entrant.
    patches : sequence of `Patch`
        The patches.
    network : `str`, optional
        Name or path of the network, by default the one that the models name.

    Returns
    -------
    entrants : `list` [`Entrant`]
        With the size of the table of models.

    Raises
    ------
    FileNotFoundError
        Raised when a table is lacking.
    ValueError
        Raised when tables and patch do not go together.
    """
    from astropy.table import Table

    out = []
    for patch in patches:
        folder = Path(what) / patch.name
        if not folder.is_dir() and len(patches) == 1:
            folder = Path(what)
        paths = [folder / table for table in _TABLES]
        if lacking := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"There is no {lacking[0]}.")
        objects, models = (Table.read(path) for path in paths)
        size = float(paths[1].stat().st_size)
        out.append(models_entrant(name, models, objects, patch, network, n_bytes=size))
    return out


def models_entrant(
    name: str,
    table: Any,
    objects: Any,
    patch: Patch,
    network: str | None = None,
    *,
    seconds: float = np.nan,
    n_bytes: float = np.nan,
) -> Entrant:
    """Make an entrant of the tables ``object_vae_models`` and ``object_vae_deblend`` of one patch.

    Parameters
    ----------
    name : `str`
        Name of the entrant.
    table, objects : `astropy.table.Table`
        The two tables.
    patch : `Patch`
        The patch.
    network : `str`, optional
        Name or path of the network, by default the one that the models name.
    seconds, n_bytes : `float`, optional
        See `Entrant`.

    Returns
    -------
    entrant : `Entrant`

    Raises
    ------
    ValueError
        Raised when there is no object, or tables, network and patch do not go together.
    """
    if not len(table):
        raise ValueError(f"{name} has no object on patch {patch.name}.")
    loaded = load_network(network or str(table["network"][0]), threads=1)
    scene = patch.scene.reordered(loaded.metadata.bands, allow_missing=True)
    sources = SourceModels.from_table(table, loaded, scene.psf.filled(), scene.origin)
    return from_models(name, sources, patch.scene, objects, seconds=seconds, n_bytes=n_bytes)
