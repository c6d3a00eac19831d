# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The simulated patch, and the demonstration on a small one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from lsst.meas.vaedeblend.demo import _magnitude, _Marks, format_table, run_demo
from lsst.meas.vaedeblend.evaluation.figures import (
    colour,
    colour_key,
    new_figure,
    residual_map,
    scale_bar,
)
from lsst.meas.vaedeblend.ground.psf import psf_sigma
from lsst.meas.vaedeblend.simulation.patch import simulate_patch
from lsst.meas.vaedeblend.simulation.surveys import get_survey_info
from matplotlib.image import imread

BANDS = ("g", "r", "i")
SMALL = {"bands": BANDS, "n_galaxies": 12, "cells": (2, 2), "cell_size": 80}


@pytest.fixture(scope="module")
def patch():
    return simulate_patch(5, **SMALL)


def test_patch_is_the_same_for_the_same_seed(patch):
    again, other = simulate_patch(5, **SMALL), simulate_patch(6, **SMALL)
    np.testing.assert_array_equal(patch.image, again.image)
    assert np.abs(patch.image - other.image).max() > 1


def test_a_patch_without_anything_is_refused():
    for wrong, message in (({"n_galaxies": 0}, "one galaxy"), ({"cells": (0, 1)}, "no place for galaxies")):
        with pytest.raises(ValueError, match=message):
            simulate_patch(5, **{**SMALL, **wrong})


def test_patch_has_a_psf_of_its_own_in_every_cell_and_band(patch):
    assert patch.psf.shape == (3, 2, 2, 41, 41)
    np.testing.assert_allclose(patch.psf.sum(axis=(3, 4)), 1)
    width = psf_sigma(patch.psf)
    assert len(np.unique(width.round(6))) == 12
    survey = get_survey_info("LSST", BANDS)
    for b, band in enumerate(survey.bands):
        fwhm = 2.3548 * width[b] * survey.pixel_scale
        np.testing.assert_allclose(fwhm, band.psf_fwhm, rtol=0.25)


def test_patch_noise_and_flux(patch):
    survey = get_survey_info("LSST", BANDS)
    for b, band in enumerate(survey.bands):
        # Away from galaxies the variance is the sky's, and the image has it.
        empty = patch.variance[b] < band.noise**2 * 1.001
        assert empty.mean() > 0.2
        assert np.std(patch.image[b][empty]) == pytest.approx(band.noise, rel=0.05)
        # All the light is there: the sum of the image is that of the fluxes.
        total = patch.flux[:, b].sum()
        error = np.sqrt(patch.variance[b].sum())
        assert patch.image[b].sum() == pytest.approx(total, abs=4 * error + 0.05 * total)
    assert (patch.snr > 0).all() and patch.snr.shape == patch.flux.shape == (12, 3)


def test_patch_galaxies_are_where_the_truth_says(patch):
    brightest = np.argsort(-patch.snr[:, 1])[:3]
    for i in brightest:
        x, y = round(patch.x[i]), round(patch.y[i])
        box = patch.image[1, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4]
        assert box.max() > 10 * np.sqrt(np.median(patch.variance[1]))


def test_colour_shows_faint_and_bright():
    images = np.zeros((3, 20, 20))
    images[:, 5, 5], images[:, 10, 10] = 5.0, 5000.0
    rgb = colour(images, BANDS, [1.0, 1.0, 1.0])
    assert rgb.shape == (20, 20, 3) and rgb.dtype == np.uint8
    sky, faint, bright = (rgb[i, i].max() for i in (0, 5, 10))
    assert sky < faint < bright
    red = np.zeros((3, 4, 4))
    red[2] = 30.0
    r, g, b = colour(red, BANDS, [1.0, 1.0, 1.0])[0, 0]
    assert r > g and r > b
    # Without g, r and i the order of the bands decides.
    r, g, b = colour(red, ("J", "H", "K"), [1.0, 1.0, 1.0])[0, 0]
    assert r > g and r > b


def test_residual_map_of_noise_has_unit_width():
    rng = np.random.default_rng(1)
    variance = np.array([1.0, 9.0, 100.0])[:, None, None] * np.ones((3, 100, 100))
    residual = rng.normal(size=variance.shape) * np.sqrt(variance)
    valid = np.ones(variance.shape, bool)
    valid[:, :10] = False
    valid[0] = False
    sigma = residual_map(residual, variance, valid)
    assert np.isnan(sigma[:10]).all() and np.std(sigma[10:]) == pytest.approx(1.0, abs=0.03)


@pytest.fixture(scope="module")
def demo(network_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new"
    keywords = {k: v for k, v in SMALL.items() if k != "bands"}
    summary = run_demo(out, network=str(network_path), seed=5, **keywords)
    return out, summary, keywords


def test_demo_numbers(demo):
    out, summary, _ = demo
    assert json.loads((out / "demo.json").read_text()) == summary
    assert summary["n_true"] == 12
    assert summary["n_found"] + summary["n_missed"] == summary["n_true_bright"] > 3
    assert summary["n_found"] > 0.7 * summary["n_true_bright"]
    assert summary["n_objects"] >= summary["n_parents"] >= summary["n_blends"]
    assert summary["n_found_any"] + summary["n_unmatched"] == summary["n_objects"]
    assert summary["flux_error_median_abs"] < 0.5 and summary["seconds_per_object"] > 0


def test_demo_table_names_what_was_asked(demo):
    _, summary, _ = demo
    text = format_table(summary)
    for word in ("parents", "objects", "found within 3 pixels", "missed", "NMAD", "seconds per object"):
        assert word in text
    assert f"  {summary['n_found']}\n" in text
    empty = {**summary, "flux_error_nmad": None, "seconds_per_object": None}
    assert "none" in format_table(empty)


def test_demo_figure(demo):
    out, _, _ = demo
    picture = imread(out / "demo.png")[..., :3]
    assert picture.shape[1] > 1500
    assert (picture.min(axis=2) < 0.9).mean() > 0.2
    # The residual's panel is nearly white; the sky of the other panels is dark.
    assert (picture.max(axis=2) < 0.5).mean() > 0.1


def test_marks_are_counted_where_they_are_explained():
    axes = new_figure(4, 4).subplots()
    objects = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    marks = _Marks(objects, np.array([True, True, False]), objects + 0.5, np.array([True, False, False]))
    marks.plot(axes)
    shown = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert shown == {
        "1 true galaxies with S/N > 10, found": [[1.5, 2.5]],
        "2 true galaxies with S/N > 10, missed": [[3.5, 4.5], [5.5, 6.5]],
        "2 objects that match a true galaxy": [[1.0, 2.0], [3.0, 4.0]],
        "1 objects that match none": [[5.0, 6.0]],
    }


def test_pictures_say_their_colours_scale_and_magnitudes():
    assert colour_key("ugrizy") == "red i, green r, blue g"
    assert colour_key(("u", "z")) == "red z, green u, blue u"
    axes = new_figure(4, 4).subplots()
    axes.set(xlim=(0, 100), ylim=(0, 100))
    scale_bar(axes, 5.0, 0.2)
    (line,) = axes.lines
    assert np.ptp(line.get_xdata()) == pytest.approx(25) and axes.texts[0].get_text() == '5"'
    # 3631 Jy is magnitude zero, so that 3.631 uJy is 22.5.
    assert _magnitude(3631.0, "r") == "r = 22.50" and _magnitude(-3.0, "g") == "-3 nJy in g"


def test_demo_again(demo, network_path):
    out, summary, keywords = demo
    with pytest.raises(FileExistsError, match="already holds a Butler repository"):
        run_demo(out, network=str(network_path), seed=5, **keywords)
    again = run_demo(out, network=str(network_path), seed=5, overwrite=True, **keywords)
    same = [key for key in summary if key != "seconds_per_object"]
    assert {k: again[k] for k in same} == {k: summary[k] for k in same}
