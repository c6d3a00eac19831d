# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The Butler repository built from arrays: what goes in comes out."""

import astropy.units as u
import numpy as np
import pytest
from lsst.daf.butler import DatasetNotFoundError
from lsst.images import BoundsError
from lsst.images.cells import CellIJ
from lsst.meas.vaedeblend.adapters.butler_repo import (
    PEAKS_DATASET,
    CoaddRepository,
    PatchLayout,
    PipetaskError,
    pipeline_path,
    run_pipetask,
)

BANDS = ("g", "r")
LAYOUTS = {0: PatchLayout(100, 200, (2, 3), (20, 25)), 5: PatchLayout(300, 200, (1, 1), (17, 23))}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return CoaddRepository(tmp_path_factory.mktemp("repo") / "repo", BANDS, LAYOUTS, 0.168)


@pytest.fixture(scope="module")
def arrays(repository):
    """Coadds of patch 0 with one missing cell in r, one NaN pixel in g."""
    rng = np.random.default_rng(3)
    image = rng.normal(size=(2, 40, 75)).astype(np.float32)
    image[0, 4, 6] = np.nan
    variance = rng.uniform(0.5, 2, size=image.shape).astype(np.float32)
    psf = rng.uniform(size=(2, 2, 3, 5, 7))
    psf[1, 0, 2] = np.nan
    detected = image > 1
    repository.put_coadds(0, image, variance, psf, {"DETECTED": detected, "OWN": image[1] < -1})
    return image, variance, psf, detected


def test_pixels_masks_and_psfs_come_back(repository, arrays):
    image, variance, psf, detected = arrays
    for b, band in enumerate(BANDS):
        coadd = repository.get("deep_coadd", 0, repository.inputs, band=band)
        np.testing.assert_array_equal(coadd.image.array, image[b])
        np.testing.assert_array_equal(coadd.variance.array, variance[b])
        np.testing.assert_array_equal(coadd.mask.get("DETECTED"), detected[b])
        np.testing.assert_array_equal(coadd.mask.get("OWN"), image[1] < -1)
        np.testing.assert_allclose(coadd.psf[CellIJ(i=1, j=2)].array, psf[b, 1, 2])
        assert coadd.unit == u.nJy and coadd.variance.unit == u.nJy**2
        assert (coadd.bbox.y.start, coadd.bbox.x.start) == (100, 200)
        assert (coadd.tract, coadd.patch.id, coadd.band) == (0, 0, band)


def test_a_cell_without_psf_is_missing_and_has_no_data(repository, arrays):
    coadd = repository.get("deep_coadd", 0, repository.inputs, band="r")
    assert coadd.psf.bounds.missing == {CellIJ(i=0, j=2)}
    with pytest.raises(BoundsError):
        coadd.psf.compute_kernel_image(x=200 + 60, y=100 + 5)
    expected = np.zeros((40, 75), bool)
    expected[:20, 50:] = True
    np.testing.assert_array_equal(coadd.mask.get("NO_DATA"), expected)
    assert not repository.get("deep_coadd", 0, repository.inputs, band="g").mask.get("NO_DATA").any()


def test_pixel_scale_on_the_sky(repository):
    sky = repository.projection.pixel_to_sky(x=np.array([210.0, 211.0]), y=np.array([150.0, 150.0]))
    assert sky[0].separation(sky[1]).arcsec == pytest.approx(0.168, rel=1e-6)


def test_peaks_keep_units(repository):
    repository.put_peaks(5, [203.0, 210.5], [301.0, 309.25], [7, 7])
    table = repository.get(PEAKS_DATASET, 5, repository.inputs)
    assert table["x"].unit == u.pix
    assert list(table["y"]) == [301.0, 309.25] and list(table["parent"]) == [7, 7]


def test_one_psf_serves_all_cells(repository):
    psf = np.full((2, 5, 5), 0.04)
    repository.put_coadds(5, np.zeros((2, 17, 23)), np.ones((2, 17, 23)), psf)
    coadd = repository.get("deep_coadd", 5, repository.inputs, band="g")
    np.testing.assert_allclose(coadd.psf.compute_kernel_image(x=222, y=316).array, psf[0])


def test_wrong_shapes_are_refused(repository):
    good = np.zeros((17, 23))
    with pytest.raises(ValueError, match=r"variance has shape \(3, 3\)"):
        repository.make_coadd(5, "g", good, np.ones((3, 3)), np.ones((5, 5)))
    with pytest.raises(ValueError, match="cells"):
        repository.make_coadd(5, "g", good, good + 1, np.ones((2, 2, 5, 5)))
    with pytest.raises(ValueError, match="bands"):
        repository.put_coadds(5, np.zeros((1, 17, 23)), np.ones((1, 17, 23)), np.ones((1, 5, 5)))


def test_absent_datasets(repository, arrays):
    assert repository.exists("deep_coadd", 0, repository.inputs, band="g")
    with pytest.raises(DatasetNotFoundError):
        repository.get(PEAKS_DATASET, 0, repository.inputs)


def test_a_second_repository_in_the_same_place_is_refused(repository):
    with pytest.raises(FileExistsError, match="already holds"):
        CoaddRepository(repository.root, BANDS, LAYOUTS, 0.2)


def test_pipeline_is_found(monkeypatch, tmp_path):
    assert pipeline_path().name == "deblend.yaml"
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "deblend.yaml").write_text("description: other\n")
    monkeypatch.setenv("MEAS_VAEDEBLEND_DIR", str(tmp_path))
    assert pipeline_path() == tmp_path / "pipelines" / "deblend.yaml"
    with pytest.raises(FileNotFoundError, match="no_such.yaml"):
        pipeline_path("no_such.yaml")


def test_a_failing_pipetask_raises_with_its_log(tmp_path):
    with pytest.raises(PipetaskError, match=r"exit status 1:\n.*Error.*nothing") as caught:
        run_pipetask(tmp_path / "nothing", "out", log=tmp_path / "log")
    # The message has the cause, the log its traceback.
    assert "Traceback" not in str(caught.value)
    assert "Traceback" in caught.value.log and (tmp_path / "log").read_text() == caught.value.log


def test_a_failing_quantum_says_why():
    log = """x ERROR: Execution of task 'vaeDeblend' on quantum {} failed. Exception NetworkError: pixels.
Traceback (most recent call last):
  File "somewhere.py", line 1, in somewhere
lsst.meas.vaedeblend.network._metadata.NetworkError: pixels.
lsst.pipe.base.mp_graph_executor.MPGraphExecutorError: One or more tasks failed during execution.
"""
    assert str(PipetaskError(1, log)).endswith("exit status 1:\nNetworkError: pixels.")
    assert str(PipetaskError(9, "killed\n")).endswith("exit status 9:\nkilled")
