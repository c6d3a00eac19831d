# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Objects of afw to scenes and back, without a pipeline."""

from __future__ import annotations

import lsst.afw.detection as afwDetection
import lsst.afw.image as afwImage
import numpy as np
import pytest
import stack_repo
from lsst.afw.geom import SpanSet, makeCdMatrix, makeSkyWcs
from lsst.afw.math import BackgroundList
from lsst.afw.table import SourceCatalog, SourceTable
from lsst.geom import Box2I, Extent2I, Point2D, Point2I, SpherePoint, arcseconds, degrees
from lsst.meas.algorithms import ImagePsf
from lsst.meas.vaedeblend.adapters.afw_catalog import read_parents
from lsst.meas.vaedeblend.adapters.afw_scene import (
    calibration,
    plane,
    psf_grid,
    scene_from_exposures,
    set_plane,
    uncalibrated_unit,
    union_planes,
)
from lsst.meas.vaedeblend.ground.psf import gaussian_psf

pytestmark = pytest.mark.stack

CORNER = (3000, 9900)
SHAPE = (60, 80)


@pytest.fixture(scope="module")
def wcs():
    matrix = makeCdMatrix(scale=0.2 * arcseconds)
    return makeSkyWcs(Point2D(9950, 3030), SpherePoint(150, 2, degrees), matrix)


def exposure(wcs, band="r", psf=1.5, **keywords):
    rng = np.random.default_rng(ord(band))
    stamp = None if psf is None else gaussian_psf(psf, 25)
    image, variance = rng.normal(size=SHAPE), rng.uniform(0.5, 2, SHAPE)
    return stack_repo.make_exposure(image, variance, stamp, wcs, CORNER, band, **keywords)


class Cells(ImagePsf):
    """A PSF that is wider in every column of 20 pixels, and missing in the third."""

    def __init__(self):
        super().__init__()

    def _doComputeKernelImage(self, position, color=None):
        column = int(position.getX() - CORNER[1]) // 20
        if column == 2:
            raise afwDetection.InvalidPsfError("no visit here")
        size = 11 + 2 * column
        image = afwImage.ImageD(np.ascontiguousarray(gaussian_psf(1.0 + 0.2 * column, size)))
        image.setXY0(Point2I(-(size // 2), -(size // 2)))
        return image

    def _doComputeBBox(self, position, color=None):
        return self._doComputeKernelImage(position).getBBox()


def test_images_come_in_nanojansky_whatever_their_unit(wcs):
    plain = scene_from_exposures({"r": exposure(wcs)}, ["r"], bad_planes=[])
    scaled = scene_from_exposures({"r": exposure(wcs, scale=57.5)}, ["r"], bad_planes=[])
    np.testing.assert_allclose(plain.image, scaled.image, rtol=1e-5)
    np.testing.assert_allclose(plain.variance, scaled.variance, rtol=1e-5)
    assert calibration(exposure(wcs, scale=57.5)) == pytest.approx(57.5)
    assert plain.origin == CORNER and plain.shape == SHAPE
    assert plain.pixel_scale == pytest.approx(0.2, rel=1e-4)


def test_a_coadd_without_calibration_or_wcs_is_refused(wcs):
    bare = exposure(wcs)
    bare.setPhotoCalib(None)
    assert calibration(bare, 2.0) == 2.0
    with pytest.raises(ValueError, match="calibration"):
        scene_from_exposures({"r": bare}, ["r"], bad_planes=[])
    with pytest.raises(ValueError, match="WCS"):
        scene_from_exposures({"r": exposure(None)}, ["r"], bad_planes=[])
    scene = scene_from_exposures({"r": exposure(None)}, ["r"], bad_planes=[], pixel_scale=0.168)
    assert scene.pixel_scale == 0.168
    with pytest.raises(ValueError, match="No coadd"):
        scene_from_exposures({}, ["r"], bad_planes=[])
    with pytest.raises(ValueError, match=r"\['g'\] are on other boxes"):
        scene_from_exposures(
            {"r": exposure(wcs), "g": exposure(wcs, "g")[Box2I(Point2I(9900, 3000), Extent2I(9, 9))]},
            ["r", "g"],
            bad_planes=[],
        )


def test_mask_planes_go_by_name(wcs):
    saturated, edge = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    saturated[5, 7], edge[:, :4] = True, True
    coadds = {
        "g": exposure(wcs, "g", planes={"SAT": saturated}),
        "r": exposure(wcs, planes={"EDGE": edge}),
    }
    # The name in lsst.images will do, and so will planes that these coadds do not have.
    for names in (["SAT", "UNMASKEDNAN"], ["SATURATED"]):
        scene = scene_from_exposures(coadds, ["r", "g", "i"], bad_planes=names)
        np.testing.assert_array_equal(scene.valid[1], ~saturated)
    with pytest.raises(ValueError, match="no mask plane NO_SUCH_PLANE; the coadds have .*SAT"):
        scene_from_exposures(coadds, ["r", "g", "i"], bad_planes=["SAT", "NO_SUCH_PLANE"])
    with pytest.raises(ValueError, match="no mask plane NO_SUCH_PLANE"):
        union_planes([c.mask for c in coadds.values()], ["NO_SUCH_PLANE"])
    default = scene_from_exposures(coadds, ["r", "g"])
    np.testing.assert_array_equal(default.valid, ~np.stack([edge, saturated]))
    assert scene.bands == ("r", "g", "i")
    np.testing.assert_array_equal(scene.valid[1], ~saturated)
    assert scene.valid[0].all() and not scene.valid[2].any()
    np.testing.assert_array_equal(scene.edge, edge)
    assert not plane(coadds["g"].mask, "NO_SUCH_PLANE").any()
    union = union_planes([c.mask for c in coadds.values()], ["SAT", "EDGE"])
    np.testing.assert_array_equal(union["SAT"], saturated)
    np.testing.assert_array_equal(union["EDGE"], edge)


def test_units_that_contradict_the_calibration_are_warned_about(wcs, caplog):
    r = exposure(wcs)
    assert uncalibrated_unit(r, 1.0) is None
    for unit, scale, expected in (
        ("nJy", 1.0, None),
        ("adu", 57.5, None),
        ("adu", 1.0, "adu"),
        ("?", 1.0, "?"),
    ):
        r.getMetadata().set("BUNIT", unit)
        assert uncalibrated_unit(r, scale) == expected
    with caplog.at_level("WARNING"):
        scene_from_exposures({"r": r}, ["r"])
    assert "band r has units uncalibrated: BUNIT is '?'" in caplog.text


def test_psfs_are_evaluated_where_they_hold(wcs):
    r = exposure(wcs)
    r.setPsf(Cells())
    grid = psf_grid([r.getPsf(), None], r.getBBox(), (100, 20))
    assert grid.grid_shape == (1, 4) and grid.stamps.shape == (4, 2, 17, 17)
    np.testing.assert_array_equal(grid.valid[:, 0], [True, True, False, True])
    assert not grid.valid[:, 1].any()
    np.testing.assert_allclose(np.sqrt(grid.moments[[0, 1, 3], 0, 0]), [1.0, 1.2, 1.6], rtol=0.05)
    assert grid.index(25.0, 40.0) == 1
    # A grid of cells that began before the coadd: its first column here is the half of one.
    shifted = psf_grid([r.getPsf()], r.getBBox(), (100, 20), (CORNER[0], CORNER[1] - 10))
    assert shifted.grid_shape == (1, 5) and shifted.origin == (0, -10)
    assert shifted.index(9.0, 0.0) == 0 and shifted.index(10.0, 0.0) == 1


def test_skipped_footprints_are_marked(wcs):
    r = exposure(wcs)
    spans = SpanSet(Box2I(Point2I(9895, 2998), Extent2I(10, 6)))
    set_plane(r.mask, "NOT_DEBLENDED", [afwDetection.Footprint(spans)])
    expected = np.zeros(SHAPE, bool)
    expected[:4, :5] = True
    np.testing.assert_array_equal(plane(r.mask, "NOT_DEBLENDED"), expected)


def test_footprints_become_parents():
    catalog = SourceCatalog(SourceTable.make(SourceTable.makeMinimalSchema()))
    for number, x in ((7, 9910), (5, 9940)):
        record = catalog.addNew()
        record.setId(number)
        footprint = afwDetection.Footprint(SpanSet.fromShape(4, offset=(x, 3020)))
        footprint.addPeak(x + 0.25, 3020.5, 10.0)
        footprint.addPeak(x - 2, 3021, 5.0)
        record.setFootprint(footprint)
    first, second = read_parents(catalog, CORNER, ["merge_peak_sky"])
    assert (first.id, second.id) == (5, 7) and not first.pseudo
    assert (first.parent.y0, first.parent.x0) == (16, 36)
    np.testing.assert_array_equal(second.parent.peaks, [[10.25, 20.5], [8.0, 21.0]])
    np.testing.assert_array_equal(first.parent.footprint, second.parent.footprint)
    assert first.parent.footprint.shape == (9, 9) and not first.parent.footprint[0, 0]


def test_cells_are_stitched_and_their_background_subtracted(wcs):
    from lsst.afw.math import ApproximateControl, BackgroundMI, Interpolate, UndersampleStyle
    from lsst.meas.vaedeblend.adapters.afw_scene import exposure_from_cells

    r = exposure(wcs)
    cells = stack_repo.make_cell_coadd(r, {"skymap": "s", "tract": 0, "band": "r"}, 20)
    level = afwImage.MaskedImageF(1, 1)
    level.set(0.5, 0, 1.0)
    background = BackgroundList()
    background.append(
        (
            BackgroundMI(r.getBBox(), level),
            Interpolate.CONSTANT,
            UndersampleStyle.REDUCE_INTERP_ORDER,
            ApproximateControl.UNKNOWN,
            0,
            0,
            False,
        )
    )
    stitched = exposure_from_cells(cells, background)
    np.testing.assert_allclose(stitched.image.array, r.image.array - 0.5, atol=1e-6)
    assert calibration(stitched) == 1.0
    scene = scene_from_exposures(
        {"r": stitched}, ["r"], bad_planes=["NO_DATA"], psf_cell=(20, 20), psf_origin=CORNER
    )
    assert scene.psf.grid_shape == (3, 4) and scene.psf.valid.all()
    expected = r.getPsf().computeKernelImage(Point2D(9920, 3020)).array
    np.testing.assert_allclose(scene.psf.stamps[5, 0], expected / expected.sum(), atol=1e-6)
