# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""One coadd gives one catalogue, whether it comes as an ExposureF or as a CellCoadd."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import stack_repo
from astropy.table import Table
from lsst.afw.geom import makeCdMatrix, makeSkyWcs
from lsst.geom import Point2D, SpherePoint, arcseconds, degrees
from lsst.meas.vaedeblend.adapters import afw_scene, cell_coadd
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout
from lsst.meas.vaedeblend.adapters.mask_planes import EQUIVALENTS
from lsst.meas.vaedeblend.catalog import object_table, parent_table
from lsst.meas.vaedeblend.tasks import VaeDeblendConfig
from lsst.meas.vaedeblend.tasks.common import DeblendTaskConfig, deblend_patch
from lsst.meas.vaedeblend.tasks.multiband import VaeMultibandDeblendConfig
from lsst.pipe.base import TaskMetadata
from synthetic import make_scene

pytestmark = pytest.mark.stack

BANDS = ("g", "r", "i")
CORNER = (500, 900)
X, Y = np.array([30.0, 37.0, 90.3, 60.0]), np.array([40.0, 42.0, 100.6, 64.0])
FLUX = np.array([[300, 500, 700], [600, 400, 200], [900, 900, 900], [250, 500, 500]], float)


@pytest.fixture(scope="module")
def coadds(tmp_path_factory):
    """The same coadds as ExposureF and as CellCoadd."""
    scene, _ = make_scene(X, Y, FLUX, 1.0, bands=BANDS)
    detected = np.zeros(scene.shape, bool)
    for parent in scene.parents:
        window, footprint = parent.window(scene.shape)
        detected[window] |= footprint
    rng = np.random.default_rng(4)
    planes = {"DETECTED": detected}
    planes |= {
        name: rng.uniform(size=scene.shape) < 0.002 for name in ("SAT", "NO_DATA", "BAD", "SUSPECT", "CR")
    }
    planes["EDGE"] = np.zeros(scene.shape, bool)
    planes["EDGE"][:3] = True
    wcs = makeSkyWcs(Point2D(964, 564), SpherePoint(150, 2, degrees), makeCdMatrix(scale=0.2 * arcseconds))
    layout = PatchLayout(*CORNER, (2, 2), (64, 64))
    repository = CoaddRepository(tmp_path_factory.mktemp("doors") / "repo", BANDS, {0: layout}, 0.2)
    exposures, cells = {}, {}
    for b, band in enumerate(BANDS):
        arrays = scene.image[b], scene.variance[b], scene.psf.stamps[0, b]
        exposures[band] = stack_repo.make_exposure(*arrays, wcs, CORNER, band, planes=planes)
        own = {EQUIVALENTS.get(name, name): where for name, where in planes.items()}
        cells[band] = repository.make_coadd(0, band, *arrays, own)
    return exposures, cells


@pytest.mark.parametrize("limits", [{}, {"maskLimits": {"COSMIC_RAY": 0.001}, "maxNumberOfPeaks": 1}])
def test_exposures_and_cell_coadds_give_the_same_catalogue(coadds, network, limits):
    exposures, cells = coadds
    table = Table({"x": X + CORNER[1], "y": Y + CORNER[0]})
    two = cell_coadd.scene_from_cell_coadds(cells, BANDS, peaks=table)
    one = afw_scene.scene_from_exposures(exposures, BANDS, psf_cell=(64, 64), pixel_scale=two.pixel_scale)
    for name in ("image", "variance", "valid", "edge", "origin", "shape"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    np.testing.assert_allclose(one.psf.stamps, two.psf.stamps, atol=1e-9)
    assert not one.valid.all()
    one.parents = list(two.parents)
    config = DeblendTaskConfig()
    config.update(**limits)
    masks = (
        afw_scene.union_planes([e.mask for e in exposures.values()], config.maskLimits),
        cell_coadd.union_planes(cells, config.maskLimits),
    )
    tables = []
    for scene, planes in zip((one, two), masks, strict=True):
        patch = deblend_patch(scene, network, config, logging.getLogger(), TaskMetadata(), planes)
        assert bool(patch.skipped) == bool(limits)
        objects = object_table(patch.result.sources, patch.parents, posterior=patch.posterior)
        tables.append((objects, parent_table(patch.parents)))
    for mine, theirs in zip(*tables, strict=True):
        assert mine.colnames == theirs.colnames and len(mine) == len(theirs)
        for name in mine.colnames:
            if mine[name].dtype.kind == "f":
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_both_tasks_have_the_same_defaults():
    common = DeblendTaskConfig()
    for config in (VaeDeblendConfig(), VaeMultibandDeblendConfig()):
        for name, value in common.toDict().items():
            assert config.toDict()[name] == value, name
    own = set(VaeMultibandDeblendConfig().keys()) - set(common.keys())
    assert own == {
        "modelTolerance",
        "nanojanskyPerUnit",
        "notDeblendedMask",
        "pixelScale",
        "pseudoColumns",
        "psfCellSize",
    }
