# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Field files: read, deblended, written for scoring."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lsst.meas.vaedeblend.evaluation.fields import FieldFile, evaluate_fields
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.network import NetworkError
from synthetic import gaussian_image, metadata, write_network

BANDS = ("g", "r", "i")
PSF_SIGMA = (1.6, 1.4, 1.5)
SIZE = 120


def write_field(path: Path, x, y, flux, noise=1.0, seed=4) -> dict[str, np.ndarray]:
    """Write a field of Gaussian galaxies in the format of the exams, with other PSFs in each band."""
    x, y, flux = np.asarray(x, float), np.asarray(y, float), np.asarray(flux, float)
    x0, y0 = np.rint(x).astype(int) - 32, np.rint(y).astype(int) - 32
    x0, y0 = np.clip(x0, 0, SIZE - 64), np.clip(y0, 0, SIZE - 64)
    stamp = np.zeros((len(x), len(BANDS), 64, 64), np.float32)
    image = np.zeros((len(BANDS), SIZE, SIZE))
    for i in range(len(x)):
        for b, sigma in enumerate(PSF_SIGMA):
            galaxy = flux[i][b] * gaussian_image((SIZE, SIZE), x[i], y[i], np.hypot(1.0, sigma))
            image[b] += galaxy
            stamp[i, b] = galaxy[y0[i] : y0[i] + 64, x0[i] : x0[i] + 64]
    image += np.random.default_rng(seed).normal(0, noise, image.shape)
    arrays = {
        "bands": np.array(BANDS),
        "image": image.astype(np.float32),
        "variance": np.full(image.shape, noise**2, np.float32),
        "psf": np.stack([gaussian_psf(sigma, 25) for sigma in PSF_SIGMA]).astype(np.float32),
        "x": x,
        "y": y,
        "flux": flux,
        "stamp": stamp,
        "stamp_x0": x0,
        "stamp_y0": y0,
    }
    np.savez(path, **arrays)
    return arrays


# Two that overlap, one alone, and one that is too faint to be detected.
X, Y = [40.2, 48.0, 90.4, 20.0], [50.0, 52.3, 80.6, 100.0]
FLUX = [[900, 900, 900], [400, 500, 900], [800, 700, 600], [4.0, 4.0, 4.0]]


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fields")
    write_field(directory / "field_00.npz", X, Y, FLUX)
    write_field(directory / "field_07.npz", X[2:3], Y[2:3], FLUX[2:3])
    return directory


def test_every_centre_becomes_a_peak(fields):
    field = FieldFile.read(fields / "field_00.npz")
    scene = field.scene(0.2, detect=False)
    peaks = np.concatenate([p.peaks for p in scene.parents])
    assert sorted(map(tuple, peaks)) == sorted(zip(X, Y, strict=True))
    # The overlapping two share a parent; the faint one has a parent of its own.
    assert sorted(len(p.peaks) for p in scene.parents) == [1, 1, 2]
    assert all(len(p.peaks) == 0 for p in field.scene(0.2, detect=True).parents)
    assert len(field.scene(0.2, detect=True).parents) == 2


def test_given_centres(fields, network_path, tmp_path):
    summary = evaluate_fields(fields, tmp_path / "out", network=str(network_path))
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert (summary["n_fields"], summary["n_true"], summary["n_true_bright"]) == (2, 5, 4)
    assert summary["n_matched"] == 5 and summary["recall"] == 1.0 and "purity" not in summary
    with np.load(tmp_path / "out" / "field_00.npz", allow_pickle=False) as result:
        model, seconds = result["model"], result["seconds"]
    truth = FieldFile.read(fields / "field_00.npz")
    assert model.shape == truth.stamp.shape and model.dtype == np.float32
    assert seconds.shape == () and 0 < float(seconds) == pytest.approx(summary["fields"][0]["seconds"])
    assert np.isfinite(model).all()
    for i in range(3):
        # On the right pixels, with the right flux: the model is the galaxy and not its neighbour.
        overlap = (model[i] * truth.stamp[i]).sum()
        overlap /= np.sqrt((model[i] ** 2).sum() * (truth.stamp[i] ** 2).sum())
        assert overlap > 0.98
        np.testing.assert_allclose(model[i].sum(axis=(1, 2)), FLUX[i], rtol=0.15)


def test_own_peaks(fields, network_path, tmp_path):
    summary = evaluate_fields(fields, tmp_path / "out", network=str(network_path), detect=True)
    assert summary["n_matched"] == summary["n_matched_bright"] == 4
    assert summary["recall"] == 1.0
    assert summary["purity"] == pytest.approx(4 / summary["n_objects"])
    with np.load(tmp_path / "out" / "field_00.npz") as result:
        found = np.isfinite(result["model"]).all(axis=(1, 2, 3))
        assert np.isnan(result["model"][3]).all()
    assert list(found) == [True, True, True, False]


def test_models_that_hang_over_the_stamp(network_path, tmp_path):
    # Galaxies near the border, whose stamps had to be moved inwards.
    write_field(tmp_path / "field_00.npz", [12.0, 110.3], [108.6, 9.0], [[900.0] * 3, [700.0] * 3])
    evaluate_fields(tmp_path, tmp_path / "out", network=str(network_path))
    truth = FieldFile.read(tmp_path / "field_00.npz")
    with np.load(tmp_path / "out" / "field_00.npz") as result:
        model = result["model"]
    for i in range(2):
        brightest = np.unravel_index(model[i].sum(axis=0).argmax(), (64, 64))
        assert brightest == np.unravel_index(truth.stamp[i].sum(axis=0).argmax(), (64, 64))


def test_other_bands_and_other_files_are_refused(fields, tmp_path):
    path = write_network(tmp_path, metadata(("g", "i", "r")))
    with pytest.raises(NetworkError, match=r"\['g', 'i', 'r'\], the data's are \['g', 'r', 'i'\]"):
        evaluate_fields(fields, tmp_path / "out", network=str(path))
    with pytest.raises(FileNotFoundError, match="No field_"):
        evaluate_fields(tmp_path, tmp_path / "out", network=str(path))
    np.savez(tmp_path / "field_00.npz", image=np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="has no bands, psf, stamp"):
        FieldFile.read(tmp_path / "field_00.npz")
    np.savez(tmp_path / "field_00.npz", image=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(ValueError, match="no bands"):
        FieldFile.read(tmp_path / "field_00.npz")


def test_the_exams_score(shared, tmp_path):
    exam, score = shared / "data" / "fields", shared / "tools" / "score.py"
    one = tmp_path / "one"
    one.mkdir()
    (one / "field_05.npz").symlink_to(exam / "field_05.npz")
    evaluate_fields(one, tmp_path / "out", network="lsst_ugrizy")
    subprocess.run(
        [sys.executable, score, exam, tmp_path / "out", "--json", tmp_path / "score.json"],
        check=True,
        capture_output=True,
    )
    result = json.loads((tmp_path / "score.json").read_text())
    assert result["n"] == 12 and result["all"]["found"] > 0.8
    assert result["all"]["flux_nmad"] < 0.3 and result["all"]["cos_mean"] > 0.95
