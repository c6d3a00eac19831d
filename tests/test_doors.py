# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""One coadd gives one catalogue, whatever data model it comes by; tests/stack has the part that needs afw."""

from __future__ import annotations

import logging
import re
import threading

import numpy as np
import pytest
from astropy.table import Table
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout
from lsst.meas.vaedeblend.adapters.cell_coadd import scene_from_cell_coadds, union_planes
from lsst.meas.vaedeblend.adapters.mask_planes import BAD_PLANES
from lsst.meas.vaedeblend.catalog import models_table, object_table, parent_table
from lsst.meas.vaedeblend.ground.identifiers import PatchIds
from lsst.meas.vaedeblend.scene import PsfGrid, Scene, find_parents
from lsst.meas.vaedeblend.tasks import VaeDeblendConfig
from lsst.meas.vaedeblend.tasks.common import DeblendTaskConfig, _signs_of_life, deblend_patch
from lsst.pipe.base import TaskMetadata
from synthetic import make_scene

BANDS = ("g", "r", "i")
ORIGIN = (500, 900)
X = np.array([30.0, 37.0, 90.3, 60.0, 20.0])
Y = np.array([40.0, 42.0, 100.6, 64.0, 110.0])
FLUX = np.array([[300, 500, 700], [600, 400, 200], [900, 900, 900], [250, 500, 500], [400, 500, 600]], float)


@pytest.fixture(scope="module")
def simulated():
    """A scene with a saturated core and an edge, its mask planes, and the kernels of its cells."""
    scene, _ = make_scene(X, Y, FLUX, 1.0, psf_sigma=(1.6, 1.4, 1.5), bands=BANDS)
    detected = np.zeros(scene.shape, bool)
    for parent in scene.parents:
        window, footprint = parent.window(scene.shape)
        detected[window] |= footprint
    saturated, edge = np.zeros(scene.image.shape, bool), np.zeros(scene.image.shape, bool)
    saturated[1, 99:103, 89:92] = True
    edge[:, :3] = edge[:, :, :3] = True
    scene.image[saturated] = 1e6
    planes = {
        "DETECTED": np.broadcast_to(detected, edge.shape),
        "SATURATED": saturated,
        "DETECTION_EDGE": edge,
    }
    kernels = scene.psf.stamps[0][:, None] * np.array([1.0, 2.0, 0.5, 3.0])[None, :, None, None]
    return scene, planes, kernels


@pytest.fixture(scope="module")
def coadds(simulated, tmp_path_factory):
    scene, planes, kernels = simulated
    layout = PatchLayout(*ORIGIN, (2, 2), (64, 64))
    repository = CoaddRepository(tmp_path_factory.mktemp("doors") / "repo", BANDS, {0: layout}, 0.2)
    cells = kernels.reshape(3, 2, 2, *kernels.shape[2:])
    return {
        band: repository.make_coadd(
            0, band, scene.image[b], scene.variance[b], cells[b], {k: v[b] for k, v in planes.items()}
        )
        for b, band in enumerate(BANDS)
    }


def directly(simulated, pixel_scale, peaks):
    """The scene from arrays, as a script of one's own would make it."""
    scene, planes, kernels = simulated
    edge = planes["DETECTION_EDGE"].any(axis=0)
    parents = find_parents(planes["DETECTED"].any(axis=0), peaks)
    # Scenes of coadds have the identifiers of the patch, here the first of the first tract.
    for parent, number in zip(parents, PatchIds(0, 0).parents(len(parents)).tolist(), strict=True):
        parent.id = number
    return Scene(
        BANDS,
        scene.image,
        scene.variance,
        ~(planes["SATURATED"] | planes["DETECTION_EDGE"]),
        psf=PsfGrid(np.swapaxes(kernels, 0, 1), (64, 64), (2, 2)),
        pixel_scale=pixel_scale,
        parents=parents,
        edge=edge,
        origin=ORIGIN,
    )


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("limits", [{}, {"maskLimits": {"SAT": 0.0}, "maxNumberOfPeaks": 1}])
def test_cell_coadds_and_arrays_give_the_same_catalogue(simulated, coadds, network, given, limits):
    peaks = np.stack([X, Y], axis=1) if given else None
    table = Table({"x": X + ORIGIN[1], "y": Y + ORIGIN[0]}) if given else None
    one = scene_from_cell_coadds(coadds, BANDS, peaks=table)
    other = directly(simulated, one.pixel_scale, peaks)
    for name in ("image", "variance", "valid", "edge"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(one.psf.stamps, other.psf.stamps, rtol=1e-12)
    config = DeblendTaskConfig()
    config.update(**limits)
    masks = (
        union_planes(coadds, config.maskLimits),
        {name: simulated[1]["SATURATED"].any(axis=0) for name in config.maskLimits},
    )
    tables = []
    for scene, planes in zip((one, other), masks, strict=True):
        patch = deblend_patch(scene, network, config, logging.getLogger(), TaskMetadata(), planes)
        sources = patch.result.sources
        tables.append(
            (
                object_table(sources, patch.parents, posterior=patch.posterior),
                parent_table(patch.parents),
                models_table(sources),
            )
        )
    for mine, theirs in zip(*tables, strict=True):
        assert mine.colnames == theirs.colnames and len(mine) == len(theirs)
        for name in mine.colnames:
            if mine[name].dtype.kind == "f":
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-6, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    objects, parents, _ = tables[0]
    skipped = np.asarray(parents["deblend_skipped"])
    assert len(parents) == 4 and skipped.any() == bool(limits)
    assert not set(parents["id"][skipped]) & set(objects["parent"])
    assert np.asarray(objects["deblend_flag_masked_centre"]).sum() == (1 if given or not limits else 0)


def test_long_patches_show_signs_of_life(caplog):
    seen, log = threading.Event(), logging.getLogger("lsst.test_signs_of_life")
    log.addFilter(lambda record: seen.set() or True)
    with caplog.at_level("INFO"), _signs_of_life(log, "Deblending 3 parents", interval=0.001):
        assert seen.wait(30)
    assert re.search(r"Deblending 3 parents: \d+ s so far", caplog.text)
    assert not [thread for thread in threading.enumerate() if "report" in thread.name]


def test_what_is_common_is_in_one_class():
    """Beside it the task of lsst.images has what only it reads and writes."""
    own = set(VaeDeblendConfig().keys()) - set(DeblendTaskConfig().keys())
    settings = {"usePeaks", "useStoredNetwork", "doWriteResidual"}
    assert own == settings | ({"connections", "saveLogOutput", "quantumDataIdKeys"} & own)
    for config in (VaeDeblendConfig(), DeblendTaskConfig()):
        assert tuple(config.badMaskPlanes) == BAD_PLANES
        assert config.deblend.findNewPeaks and config.deblend.allowMissingBands
    # Exceptions are granted in one place.
    assert not {"allowMissingBands", "allowOtherPixelScale"} & set(VaeDeblendConfig().keys())
