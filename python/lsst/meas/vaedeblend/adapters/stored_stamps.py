# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Deblended images of any object of a repository in which the task has run."""

from __future__ import annotations

__all__ = ["Stamps", "stamps"]

import dataclasses
from collections.abc import Sequence

import numpy as np
from astropy.table import Table
from lsst.daf.butler import Butler, DatasetNotFoundError, MissingDatasetTypeError
from lsst.images import SkyProjection
from numpy.typing import ArrayLike, NDArray

from ..ground.cutouts import cut_out
from ..ground.identifiers import PatchIds
from ..network import load_network
from ..redistribution import redistribute
from ..scene import Scene
from ..sources import SourceModels
from .butler_repo import PEAKS_DATASET
from .cell_coadd import scene_from_cell_coadds
from .mask_planes import BAD_PLANES


@dataclasses.dataclass(frozen=True, eq=False)
class Stamps:
    """Images of objects, in nJy; all arrays have one row per object.

    Parameters
    ----------
    id, parent : `numpy.ndarray`, (N,)
        Identifiers of the objects and of their parents.
    bands : `tuple` [`str`]
        Bands in the order of the images.
    deblended : `numpy.ndarray`, (N, B, S, S)
        The coadds, shared out among the objects as their models are.
    model : `numpy.ndarray`, (N, B, S, S)
        Models as the coadds show them.
    coadd : `numpy.ndarray`, (N, B, S, S)
        The coadds; 0 in pixels that were not used.
    corner_x, corner_y : `numpy.ndarray`, (N,)
        Tract pixel of the stamps' pixel [0, 0].
    projection : `lsst.images.SkyProjection`
        Takes tract pixels to the sky.
    """

    id: NDArray[np.int64]
    parent: NDArray[np.int64]
    bands: tuple[str, ...]
    deblended: NDArray[np.float32]
    model: NDArray[np.float32]
    coadd: NDArray[np.float32]
    corner_x: NDArray[np.int64]
    corner_y: NDArray[np.int64]
    projection: SkyProjection

    def __len__(self) -> int:
        return len(self.id)


def stamps(
    butler: Butler,
    ids: int | ArrayLike,
    *,
    skymap: str | None = None,
    network: str | None = None,
    coadd: str = "deep_coadd",
    bad_planes: Sequence[str] = BAD_PLANES,
) -> Stamps:
    """Make the deblended stamps of objects from what the task has stored.

    Parameters
    ----------
    butler : `lsst.daf.butler.Butler`
        Butler with collections that hold the task's outputs and the coadds.
    ids : `int` or array_like
        Identifiers of objects of one patch; that of a parent stands for all of its objects.
    skymap : `str`, optional
        Name of the sky map, where the repository has several.
    network : `str`, optional
        Path of the network, where it is none of those that ship.
    coadd : `str`, optional
        Dataset type of the coadds.
    bad_planes : `~collections.abc.Sequence` [`str`], optional
        The task's ``badMaskPlanes``.

    Returns
    -------
    stamps : `Stamps`
        Images of the objects in the order of ``ids``.

    Raises
    ------
    LookupError
        Raised if there is no such object, or no such patch.
    ValueError
        Raised if the identifiers are of several patches, the parents are not those that the task had, or the
        models were made with another network.
    """
    wanted = [int(number) for number in np.atleast_1d(np.asarray(ids, np.int64))]
    patches = {PatchIds.split(number)[:2] for number in wanted}
    if len(patches) != 1:
        raise ValueError(f"The identifiers are of {len(patches)} patches; they should be of one.")
    tract, patch = patches.pop()
    data_id = {"skymap": _skymap(butler, skymap, tract, patch), "tract": tract, "patch": patch}
    table = butler.get("object_vae_models", data_id)
    known, parent = np.asarray(table["id"]), np.asarray(table["parent"])
    rows: list[int] = []
    for number in wanted:
        found = np.flatnonzero((parent if PatchIds.split(number)[2] else known) == number)
        if not len(found):
            raise LookupError(
                f"There is no object with identifier {number} in patch {patch} of tract {tract}."
            )
        rows += found.tolist()

    loaded = load_network(network or str(table["network"][0]), threads=1)
    bands = loaded.metadata.bands
    there = {str(ref.dataId["band"]) for ref in butler.query_datasets(coadd, data_id=data_id)}
    coadds = {band: butler.get(coadd, data_id, band=band) for band in bands if band in there}
    parents = butler.get("object_vae_parent", data_id)
    scene = scene_from_cell_coadds(coadds, bands, bad_planes=tuple(bad_planes))
    if not _same_parents(scene, parents) and (peaks := _peaks(butler, data_id)) is not None:
        scene = scene_from_cell_coadds(coadds, bands, bad_planes=tuple(bad_planes), peaks=peaks)
    if not _same_parents(scene, parents):
        raise ValueError(
            f"The detected regions of the {coadd} are not the parents of object_vae_parent in patch {patch} "
            f"of tract {tract}: these are not the coadds that the task has read."
        )

    models = SourceModels.from_table(table, loaded, scene.psf, scene.origin)
    corner_y, corner_x = models.corners(rows)
    observed = models.images.observed(rows)
    return Stamps(
        id=models.id[rows],
        parent=models.parent[rows],
        bands=bands,
        deblended=redistribute(scene, models, rows=rows),
        model=observed,
        coadd=cut_out(scene.image, corner_y, corner_x, observed.shape[-1]),
        corner_x=corner_x + scene.origin[1],
        corner_y=corner_y + scene.origin[0],
        projection=next(iter(coadds.values())).sky_projection,
    )


def _skymap(butler: Butler, skymap: str | None, tract: int, patch: int) -> str:
    """Name of the sky map whose patch has models."""
    refs = butler.query_datasets("object_vae_models", explain=False)
    names = {
        str(ref.dataId["skymap"])
        for ref in refs
        if ref.dataId["tract"] == tract and ref.dataId["patch"] == patch
    }
    if skymap is not None:
        names &= {skymap}
    if not names:
        raise LookupError(f"There are no object_vae_models of patch {patch} of tract {tract}.")
    if len(names) > 1:
        raise ValueError(f"Patch {patch} of tract {tract} is in the sky maps {sorted(names)}: name one.")
    return names.pop()


def _peaks(butler: Butler, data_id: dict) -> Table | None:
    """The peaks that the task may have started from."""
    try:
        return butler.get(PEAKS_DATASET, data_id)
    except (DatasetNotFoundError, MissingDatasetTypeError):
        return None


def _same_parents(scene: Scene, table: Table) -> bool:
    """Tell whether a scene has the parents of a table: number, boxes and areas."""
    y0, x0 = scene.origin
    mine = [(p.id, p.x0 + x0, p.y0 + y0, *p.footprint.shape[::-1], p.area) for p in scene.parents]
    columns = ("id", "bbox_x0", "bbox_y0", "bbox_width", "bbox_height", "area")
    return mine == list(zip(*(np.asarray(table[name]).tolist() for name in columns), strict=True))
