# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Blends in the format of the real HSC ones, and two of the real ones, through the pipeline."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from lsst.meas.vaedeblend.evaluation.hsc import BANDS, HscBlend, calibration_factor, evaluate_hsc
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.network import NetworkError
from matplotlib.image import imread
from synthetic import gaussian_image, metadata, write_network

NOISE = np.array([0.02, 0.03, 0.04, 0.08, 0.14])
RANGE = {"noise": {band: [1.0, 9.0] for band in BANDS}, "psf_fwhm": [0.4, 1.6]}


@pytest.fixture(scope="module")
def hsc_network(tmp_path_factory):
    meta = metadata(BANDS, name="synthetic_hsc", pixel_scale=0.168, training_range=RANGE)
    return write_network(tmp_path_factory.mktemp("network"), meta)


def write_blend(path, x, y, flux, shape=(50, 60), seed=1):
    """Write Gaussian galaxies seen by a footprint that ends at twice the noise."""
    clean = np.zeros((5, *shape))
    for xi, yi, f in zip(x, y, flux, strict=True):
        clean += f * gaussian_image(shape, xi, yi, 1.9)
    footprint = (clean > 2 * NOISE[:, None, None]).any(axis=0)
    image = clean + np.random.default_rng(seed).normal(size=clean.shape) * NOISE[:, None, None]
    weight = np.broadcast_to(1 / NOISE[:, None, None] ** 2, clean.shape) * footprint
    np.savez(
        path,
        images=(image * footprint).astype(np.float32),
        weights=weight.astype(np.float32),
        psfs=np.stack([gaussian_psf(1.6, 41)] * 5).astype(np.float32),
        peaks=np.column_stack([x, y]).astype(float),
    )


@pytest.fixture(scope="module")
def blends(tmp_path_factory):
    directory = tmp_path_factory.mktemp("blends")
    write_blend(directory / "1001.npz", [20, 28], [25, 27], [30.0, 20.0])
    write_blend(directory / "1002.npz", [22.0], [15.0], [25.0], shape=(31, 44), seed=2)
    return directory


@pytest.fixture(scope="module")
def result(blends, hsc_network, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, evaluate_hsc(blends, out, network=str(hsc_network))


def test_summary(result):
    out, summary = result
    assert json.loads((out / "hsc.json").read_text()) == summary
    assert summary["n_blends"] == 2 and summary["n_peaks"] == 3 and summary["n_objects"] >= 3
    assert summary["seconds_per_object"] > 0
    rows = {row["blend"]: row for row in summary["blends"]}
    assert set(rows) == {"1001", "1002"}
    chi2 = [row["chi2"] for row in summary["blends"]]
    assert summary["median_chi2"] == pytest.approx(np.median(chi2))
    assert summary["p90_chi2"] == pytest.approx(np.percentile(chi2, 90))
    # Gaussians are what this network makes, so that what is left is noise.
    assert max(chi2) < 1.3 and summary["median_chi2_before"] > 20


def test_chi2_before_is_that_of_the_file(result, blends):
    _, summary = result
    with np.load(blends / "1001.npz") as data:
        used = data["weights"] > 0
        expected = (data["images"][used].astype(float) ** 2 * data["weights"][used]).sum() / used.sum()
    row = next(row for row in summary["blends"] if row["blend"] == "1001")
    assert row["chi2_before"] == pytest.approx(expected, rel=1e-5)
    assert row["n_pixels"] == used.sum()


def test_one_factor_brings_the_noise_to_the_middle_of_the_training_range(result, blends):
    _, summary = result
    noise = [HscBlend.read(path).noise[1] for path in sorted(blends.glob("*.npz"))]
    assert summary["njy_per_unit"] * np.median(noise) == pytest.approx(3.0)  # sqrt(1 x 9)
    without = metadata(BANDS, training_range={})
    with pytest.raises(NetworkError, match="no training range"):
        calibration_factor([HscBlend.read(p) for p in blends.glob("*.npz")], without)


def test_the_figure_shows_the_blends(result):
    out, _ = result
    picture = imread(out / "hsc.png")[..., :3]
    assert picture.shape[1] > 800
    # Something other than white paper, and in colour.
    assert (picture.min(axis=2) < 0.9).mean() > 0.1
    assert (np.ptp(picture, axis=2) > 0.2).mean() > 0.005


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No "):
        evaluate_hsc(tmp_path, tmp_path / "out", network="x")
    np.savez(tmp_path / "1.npz", images=np.zeros((5, 3, 3)), weights=np.zeros((5, 3, 3)))
    with pytest.raises(ValueError, match="has no peaks, psfs"):
        HscBlend.read(tmp_path / "1.npz")
    np.savez(
        tmp_path / "1.npz",
        images=np.zeros((3, 3, 3)),
        weights=np.zeros((3, 3, 3)),
        psfs=np.zeros((3, 3, 3)),
        peaks=np.zeros((1, 2)),
    )
    with pytest.raises(ValueError, match="with 5 bands"):
        HscBlend.read(tmp_path / "1.npz")


def test_real_blends(shared, tmp_path):
    real = shared / "data" / "hsc_blends"
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(real.glob("*.npz"))[:2]:
        shutil.copy(path, few)
    summary = evaluate_hsc(few, tmp_path / "out")
    assert summary["network"] == "hsc_grizy" and summary["n_blends"] == 2
    for row in summary["blends"]:
        assert row["n_objects"] >= row["n_peaks"]
        assert row["chi2"] < 0.5 * row["chi2_before"]
