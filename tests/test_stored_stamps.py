# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deblended stamps from a repository in which the task has run."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.table import Table
from lsst.daf.butler import Butler, DatasetType
from lsst.meas.vaedeblend import deblend, redistribute, stamps
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout
from lsst.meas.vaedeblend.adapters.cell_coadd import scene_from_cell_coadds
from lsst.meas.vaedeblend.ground.identifiers import PatchIds
from lsst.meas.vaedeblend.network import load_network
from lsst.meas.vaedeblend.sources import SourceModels
from lsst.meas.vaedeblend.tasks import VaeDeblendConfig, VaeDeblendTask
from synthetic import make_scene

BANDS = ("g", "r", "i")
X, Y = np.array([30.0, 38.0, 90.3]), np.array([40.0, 43.0, 100.6])
FLUX = np.array([[600, 800, 700], [900, 700, 500], [900, 900, 900]], float)
# Patch 3 is deblended at the peaks that are found, patch 4 at given ones, of which one lies beyond detection.
ORIGINS = {3: (500, 900), 4: (500, 1100)}
TRACT = 7
PEAKS = Table({"x": np.append(X, 20.0) + 1100, "y": np.append(Y, 110.0) + 500})


@pytest.fixture(scope="module")
def butler(network_path, tmp_path_factory):
    scene, _ = make_scene(X, Y, FLUX, 1.0, psf_sigma=(1.6, 1.4, 1.5), bands=BANDS)
    detected = np.zeros(scene.shape, bool)
    for parent in scene.parents:
        window, footprint = parent.window(scene.shape)
        detected[window] |= footprint
    layouts = {patch: PatchLayout(*origin, (2, 2), (64, 64)) for patch, origin in ORIGINS.items()}
    root = tmp_path_factory.mktemp("stamps") / "repo"
    repository = CoaddRepository(root, BANDS, layouts, 0.2, tract=TRACT)
    config = VaeDeblendConfig()
    config.network = str(network_path)
    task = VaeDeblendTask(config=config)
    tables = {"objects": "deblend", "parents": "parent", "models": "models"}
    with Butler.from_config(str(root), run="out") as writer:
        dimensions = writer.dimensions.conform(["skymap", "tract", "patch"])
        for name in tables.values():
            writer.registry.registerDatasetType(DatasetType(f"object_vae_{name}", dimensions, "ArrowAstropy"))
    for patch, peaks in ((3, None), (4, PEAKS)):
        repository.put_coadds(patch, scene.image, scene.variance, scene.psf.stamps[0], {"DETECTED": detected})
        if peaks is not None:
            repository.put_peaks(patch, peaks["x"], peaks["y"])
        coadds = {b: repository.get("deep_coadd", patch, repository.inputs, band=b) for b in BANDS}
        result = task.run(coadds, PatchIds(TRACT, patch), peaks=peaks)
        with Butler.from_config(str(root), run="out") as writer:
            for attribute, name in tables.items():
                writer.put(getattr(result, attribute), f"object_vae_{name}", repository.data_id(patch))
    with Butler.from_config(str(root), collections=["out", repository.inputs]) as reader:
        yield reader


@pytest.mark.parametrize("patch", [3, 4])
def test_any_object_in_one_call(butler, network_path, patch):
    data_id = {"skymap": "vaedeblend", "tract": TRACT, "patch": patch}
    origin_y, origin_x = ORIGINS[patch]
    objects = butler.get("object_vae_deblend", data_id)
    x, y = objects["deblend_peak_center_x"] - origin_x, objects["deblend_peak_center_y"] - origin_y
    nearest = [int(np.argmin(np.hypot(x - tx, y - ty))) for tx, ty in zip(X, Y, strict=True)]
    wanted = np.asarray(objects["id"])[nearest]
    cut = stamps(butler, wanted, network=str(network_path))
    assert list(cut.id) == list(wanted) and cut.bands == BANDS
    assert cut.deblended.shape == cut.model.shape == cut.coadd.shape == (3, 3, 64, 64)
    np.testing.assert_allclose(cut.deblended.sum(axis=(2, 3)), FLUX, rtol=0.15)
    # Where two share a pixel they share all that is in it.
    y, x = round(Y[0]) + origin_y, round(X[0]) + origin_x
    total = sum(cut.deblended[i, :, y - cut.corner_y[i], x - cut.corner_x[i]] for i in (0, 1))
    np.testing.assert_allclose(total, cut.coadd[0, :, y - cut.corner_y[0], x - cut.corner_x[0]], rtol=1e-4)
    # One alone is the same as among others, and a parent stands for its objects.
    alone = stamps(butler, int(wanted[1]), network=str(network_path), skymap="vaedeblend")
    np.testing.assert_array_equal(alone.deblended[0], cut.deblended[1])
    both = stamps(butler, int(cut.parent[0]), network=str(network_path))
    assert set(wanted[:2]) <= set(both.id) and set(both.parent) == {cut.parent[0]}
    sky = cut.projection.pixel_to_sky(x=np.array([float(x)]), y=np.array([float(y)]))
    assert abs(sky.ra.deg[0] - float(objects["coord_ra"][nearest[0]])) < 1e-4


def test_stored_models_go_with_the_scene_of_their_coadds(butler, network_path):
    data_id = {"skymap": "vaedeblend", "tract": TRACT, "patch": 3}
    network = load_network(str(network_path))
    scene = scene_from_cell_coadds({b: butler.get("deep_coadd", data_id, band=b) for b in BANDS}, BANDS)
    table = butler.get("object_vae_models", data_id)
    stored = SourceModels.from_table(table, network, scene.psf, scene.origin)
    again = deblend(scene, network).sources
    np.testing.assert_array_equal(stored.parent, again.parent)
    mine, theirs = redistribute(scene, stored), redistribute(scene, again)
    assert np.abs(mine - theirs).max() < 1e-3 * theirs.max()


def test_what_is_not_there(butler, network_path):
    ids = PatchIds(TRACT, 3)
    with pytest.raises(LookupError, match="no object with identifier"):
        stamps(butler, int(ids.objects(1000)[-1]), network=str(network_path))
    with pytest.raises(LookupError, match="no object_vae_models of patch 5 of tract 7"):
        stamps(butler, int(PatchIds(TRACT, 5).objects(1)[0]))
    with pytest.raises(ValueError, match="are of 2 patches"):
        stamps(butler, [int(ids.objects(1)[0]), int(PatchIds(TRACT, 4).objects(1)[0])])
    with pytest.raises(LookupError, match="no object_vae_models"):
        stamps(butler, int(ids.objects(1)[0]), skymap="other")


def test_other_coadds_are_noticed(butler, network_path):
    """A detection that has changed since would give objects the pixels of others."""
    from lsst.meas.vaedeblend.adapters.stored_stamps import _same_parents

    data_id = {"skymap": "vaedeblend", "tract": TRACT, "patch": 3}
    scene = scene_from_cell_coadds({b: butler.get("deep_coadd", data_id, band=b) for b in BANDS}, BANDS)
    table = butler.get("object_vae_parent", data_id)
    assert _same_parents(scene, table)
    scene.parents[0].footprint[:] = True
    assert not _same_parents(scene, table)
