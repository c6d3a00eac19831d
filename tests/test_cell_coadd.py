# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Coadds to scene and back, without any Butler."""

import astropy.units as u
import lsst.images
import numpy as np
import pytest
from astropy.table import Table
from lsst.images import Box
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout
from lsst.meas.vaedeblend.adapters.cell_coadd import masked_image, scene_from_cell_coadds, union_planes
from lsst.meas.vaedeblend.adapters.footprints import parents_from_peaks
from lsst.meas.vaedeblend.adapters.mask_planes import EQUIVALENTS, check_planes, names_in

BANDS = ("g", "r", "i")
LAYOUT = PatchLayout(100, 200, (2, 3), (20, 25))
SHAPE = (40, 75)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return CoaddRepository(tmp_path_factory.mktemp("repo") / "repo", BANDS, {0: LAYOUT}, 0.2)


def make_coadds(repository, *, unit=u.nJy, missing=None, planes=None, bands=BANDS):
    """Coadds with their pixels, each band with other noise and another PSF in each cell."""
    rng = np.random.default_rng(11)
    coadds = {}
    for b, band in enumerate(bands):
        image = rng.normal(size=SHAPE).astype(np.float32)
        variance = np.full(SHAPE, 1.0 + b, np.float32)
        size = 5 + 2 * b
        psf = rng.uniform(size=(2, 3, size, size))
        if missing and band in missing:
            psf[missing[band]] = np.nan
        own = {k: v[b] if v.ndim == 3 else v for k, v in (planes or {}).items()}
        coadds[band] = repository.make_coadd(0, band, image, variance, psf, own, unit=unit)
    return coadds


def test_scene_holds_what_the_coadds_hold(repository):
    detected = np.zeros((3, *SHAPE), bool)
    detected[0, 3:6, 4:9] = True
    detected[1, 5:8, 8:12] = True
    detected[2, 30, 70] = True
    coadds = make_coadds(repository, planes={"DETECTED": detected})
    scene = scene_from_cell_coadds(coadds)
    assert scene.bands == BANDS
    assert scene.origin == (100, 200)
    assert scene.pixel_scale == pytest.approx(0.2, rel=1e-5)
    for b, band in enumerate(BANDS):
        np.testing.assert_array_equal(scene.image[b], coadds[band].image.array)
        np.testing.assert_array_equal(scene.variance[b], coadds[band].variance.array)
    assert scene.valid.all()
    assert not scene.edge.any()
    # The two overlapping regions of g and r are one parent, that of i another.
    assert [p.area for p in scene.parents] == [15 + 12 - 1, 1]
    assert all(len(p.peaks) == 0 for p in scene.parents)


def test_every_position_gets_its_own_cells_psf(repository):
    coadds = make_coadds(repository)
    psf = scene_from_cell_coadds(coadds).psf
    assert psf.stamps.shape == (6, 3, 9, 9)
    for x, y in ((0, 0), (24, 19), (25, 20), (74, 39), (50, 5)):
        for b, band in enumerate(BANDS):
            kernel = coadds[band].psf.compute_kernel_image(x=200 + x, y=100 + y).array
            pad = (9 - kernel.shape[0]) // 2
            np.testing.assert_allclose(psf.stamps[psf.index(x, y), b], np.pad(kernel / kernel.sum(), pad))


def test_missing_cells(repository):
    coadds = make_coadds(repository, missing={"r": (0, 1)})
    scene = scene_from_cell_coadds(coadds)
    expected = np.ones((6, 3), bool)
    expected[1, 1] = False
    np.testing.assert_array_equal(scene.psf.valid, expected)
    # A missing cell has no data either.
    assert not scene.valid[1, :20, 25:50].any() and scene.valid[1].sum() == 40 * 75 - 20 * 25
    assert scene.valid[[0, 2]].all()


def test_coadds_of_part_of_the_patch(repository):
    coadds = make_coadds(repository)
    # One band lacks the first rows and starts in the middle of a cell.
    coadds["g"] = coadds["g"][Box.factory[107:140, 203:275]]
    scene = scene_from_cell_coadds(coadds)
    assert scene.shape == SHAPE and scene.origin == (100, 200)
    assert not scene.valid[0, :7].any() and not scene.valid[0, :, :3].any() and scene.valid[0, 7:, 3:].all()
    assert scene.psf.valid.all()
    # All bands cut alike: the scene is the smaller box, and its cells keep their places.
    cut = {band: c[Box.factory[107:140, 230:275]] for band, c in make_coadds(repository).items()}
    part = scene_from_cell_coadds(cut)
    assert part.shape == (33, 45) and part.origin == (107, 230)
    assert part.psf.grid_shape == (2, 2) and part.psf.origin == (-7, -5)
    np.testing.assert_allclose(
        part.psf.stamps[part.psf.index(20, 13), 1], scene.psf.stamps[scene.psf.index(50, 20), 1]
    )


def test_bad_planes_and_edges(repository):
    saturated = np.zeros(SHAPE, bool)
    saturated[2, 3] = True
    edge = np.zeros((3, *SHAPE), bool)
    edge[1, :, 0] = True
    coadds = make_coadds(repository, planes={"SATURATED": saturated, "DETECTION_EDGE": edge})
    scene = scene_from_cell_coadds(coadds)
    np.testing.assert_array_equal(~scene.valid, saturated | edge)
    np.testing.assert_array_equal(scene.edge, edge[1])
    assert scene_from_cell_coadds(coadds, bad_planes=["NO_DATA"]).valid.all()
    # The same planes by afw's names, and planes that only other coadds have.
    for names in (["SAT"], ["SATURATED"], ["SAT", "SATURATED", "STREAK"]):
        np.testing.assert_array_equal(~scene_from_cell_coadds(coadds, bad_planes=names).valid[0], saturated)
    with pytest.raises(ValueError, match="no mask plane SATTURATED; the coadds have .*NO_DATA"):
        scene_from_cell_coadds(coadds, bad_planes=["SATTURATED"])


def test_the_union_of_planes_is_on_the_scenes_box(repository):
    saturated = np.zeros((3, *SHAPE), bool)
    saturated[0, 12, 13], saturated[1, 2, 3] = True, True
    coadds = make_coadds(repository, planes={"SATURATED": saturated})
    coadds["g"] = coadds["g"][Box.factory[107:140, 203:275]]
    planes = union_planes(coadds, ["SAT", "SUSPECT"])
    np.testing.assert_array_equal(planes["SAT"], saturated.any(axis=0))
    assert planes["SUSPECT"].shape == SHAPE and not planes["SUSPECT"].any()
    with pytest.raises(ValueError, match="no mask plane SATTURATED"):
        union_planes(coadds, ["SATTURATED"])


def test_names_of_planes_are_those_of_lsst_images():
    tables = (
        lsst.images.get_legacy_deep_coadd_mask_planes(),
        lsst.images.get_legacy_non_cell_coadd_mask_planes(),
        lsst.images.get_legacy_optional_mask_planes(),
    )
    for old, plane in (item for table in tables for item in table.items()):
        assert EQUIVALENTS.get(old, old) == plane.name
        check_planes([old, plane.name], ())
        assert names_in(old, {plane.name}) == names_in(plane.name, {plane.name}) == [plane.name]
        assert names_in(plane.name, {old}) == [old]


def test_a_coadd_without_the_plane_of_detection_is_warned_about(repository, caplog):
    coadds = make_coadds(repository, planes={"FOUND": np.ones(SHAPE, bool)}, bands=("g", "r"))
    assert len(scene_from_cell_coadds(coadds, detected_plane="FOUND").parents) == 1
    coadds["i"] = make_coadds(repository)["i"]
    with caplog.at_level("WARNING"):
        assert len(scene_from_cell_coadds(coadds, detected_plane="FOUND").parents) == 1
    assert "band i have no mask plane FOUND" in caplog.text


def test_coadds_that_all_lack_it_are_refused_without_peaks(repository):
    coadds = make_coadds(repository)
    with pytest.raises(ValueError, match="No coadd has the mask plane FOUND.*or give peaks"):
        scene_from_cell_coadds(coadds, detected_plane="FOUND")
    peaks = Table({"x": [220.0], "y": [115.0]})
    assert len(scene_from_cell_coadds(coadds, detected_plane="FOUND", peaks=peaks).parents) == 1


def test_without_a_detection_plane_there_are_no_parents(repository):
    coadds = make_coadds(repository, planes={"DETECTED": np.ones(SHAPE, bool)})
    assert len(scene_from_cell_coadds(coadds).parents) == 1
    assert scene_from_cell_coadds(coadds, detected_plane=None).parents == []


def test_units_are_converted(repository):
    scene = scene_from_cell_coadds(make_coadds(repository, unit=u.uJy))
    reference = scene_from_cell_coadds(make_coadds(repository))
    np.testing.assert_allclose(scene.image, 1e3 * reference.image, rtol=1e-6)
    np.testing.assert_allclose(scene.variance, 1e6 * reference.variance, rtol=1e-6)
    with pytest.raises(ValueError, match="band g has units uncalibrated: its unit, adu, does not"):
        scene_from_cell_coadds(make_coadds(repository, unit=u.adu))


def test_band_order_and_missing_bands(repository):
    coadds = make_coadds(repository)
    scene = scene_from_cell_coadds(coadds, ("i", "z", "g", "r"))
    assert scene.bands == ("i", "z", "g", "r")
    np.testing.assert_array_equal(scene.image[0], coadds["i"].image.array)
    assert not scene.valid[1].any() and not scene.psf.valid[:, 1].any()
    with pytest.raises(ValueError, match=r"bands \['i'\] are not among"):
        scene_from_cell_coadds(coadds, ("g", "r"))
    with pytest.raises(ValueError, match="No coadd"):
        scene_from_cell_coadds({}, ("g", "r"))


def test_other_cell_grid_is_refused(repository, tmp_path):
    other = CoaddRepository(tmp_path / "repo", BANDS, {0: PatchLayout(100, 200, (1, 3), (40, 25))}, 0.2)
    coadds = make_coadds(repository)
    coadds["r"] = other.make_coadd(0, "r", np.zeros(SHAPE), np.ones(SHAPE), np.ones((5, 5)))
    with pytest.raises(ValueError, match="cell grid of band r"):
        scene_from_cell_coadds(coadds)


def test_given_peaks(repository):
    detected = np.zeros(SHAPE, bool)
    detected[5:10, 5:10] = True
    coadds = make_coadds(repository, planes={"DETECTED": detected})
    table = Table({"x": [207.25, 250.0] * u.pix, "y": [107.0, 120.0] * u.pix})
    scene = scene_from_cell_coadds(coadds, peaks=table)
    assert [p.peaks.tolist() for p in scene.parents] == [[[7.25, 7.0]], [[50.0, 20.0]]]
    assert scene.parents[0].area == 25
    with pytest.raises(ValueError, match="no column y"):
        scene_from_cell_coadds(coadds, peaks=table["x",])


def test_peaks_near_and_far_from_footprints():
    detected = np.zeros((50, 60), bool)
    detected[10:20, 10:20] = True
    # On the footprint; 3 pixels beside it, so its disk touches; far away; outside the image.
    peaks = [[12.0, 15.0], [23.0, 15.0], [45.0, 40.0], [-4.0, 15.0]]
    parents = parents_from_peaks(detected, peaks)
    assert [p.peaks.tolist() for p in parents] == [peaks[:2], [peaks[2]], [peaks[3]]]
    assert parents[1].area == 81  # pixels within 5 of the centre
    covered = np.zeros((50, 60), int)
    for parent in parents:
        window, footprint = parent.window(covered.shape)
        covered[window] += footprint
    assert covered.max() == 1 and covered[detected].all()


def test_groups_unite_footprints():
    detected = np.zeros((30, 60), bool)
    for x in (5, 20, 35, 50):
        detected[5:10, x : x + 5] = True
    peaks = np.array([[7.0, 7.0], [37.0, 7.0], [22.0, 7.0], [8.0, 8.0]])
    parents = parents_from_peaks(detected, peaks, [10, 10, 20, 10])
    assert sorted(p.area for p in parents) == [25, 25, 50]
    blend = next(p for p in parents if p.area == 50)
    assert blend.peaks.tolist() == [[7, 7], [37, 7], [8, 8]]
    assert len(parents_from_peaks(detected, peaks, [1, 2, 3, 4])) == 4
    # No peak at all, or only one outside: nothing is united, nothing is lost.
    assert len(parents_from_peaks(detected, np.empty((0, 2)), [])) == 4
    assert len(parents_from_peaks(detected, [[-10.0, 3.0]], [1])) == 5
    with pytest.raises(ValueError, match="3 parent identifiers for 4 peaks"):
        parents_from_peaks(detected, peaks, [1, 2, 3])
    with pytest.raises(ValueError, match="1 given peaks have no finite"):
        parents_from_peaks(detected, [[np.nan, 1.0]])


def test_masked_image_is_on_the_coadds_box(repository):
    detected = np.zeros(SHAPE, bool)
    detected[3, 3] = True
    coadds = make_coadds(repository, planes={"DETECTED": detected}, unit=u.uJy)
    array = np.arange(40 * 75, dtype=np.float32).reshape(SHAPE)
    part = coadds["g"][Box.factory[107:140, 203:275]]
    result = masked_image(part, array, (100, 200))
    np.testing.assert_array_equal(result.image.array, array[7:, 3:])
    assert result.unit == u.nJy and result.variance.unit == u.nJy**2
    np.testing.assert_allclose(result.variance.array, 1e6)
    assert result.bbox == part.bbox and result.sky_projection is not None
    whole = masked_image(coadds["g"], array, (100, 200))
    np.testing.assert_array_equal(whole.mask.get("DETECTED"), detected)
    # Its mask is its own: changing it leaves the coadd alone.
    whole.mask.set("DETECTED", ~detected)
    np.testing.assert_array_equal(coadds["g"].mask.get("DETECTED"), detected)
