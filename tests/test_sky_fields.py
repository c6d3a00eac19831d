# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Simulated fields that look like coadds: what is on them is what the truth says."""

from __future__ import annotations

import numpy as np
import pytest
from lsst.meas.vaedeblend.evaluation.fields import FieldFile
from lsst.meas.vaedeblend.simulation import sky_fields
from lsst.meas.vaedeblend.simulation.sky_fields import SKY_STAMP, correlated_noise, simulate_sky_field


def test_noise_correlates_as_wanted():
    noise = correlated_noise((600, 600), (0.1, 0.25), 0.0, np.random.default_rng(3))
    # Errors of a correlation over 360 000 pixels are below 0.003.
    assert noise.shape == (600, 600) and noise.var() == pytest.approx(1, abs=0.01)
    assert (noise[1:] * noise[:-1]).mean() == pytest.approx(0.1, abs=0.01)
    assert (noise[:, 1:] * noise[:, :-1]).mean() == pytest.approx(0.25, abs=0.01)
    tailed = correlated_noise((600, 600), (0.1, 0.1), -0.06, np.random.default_rng(3))
    assert (tailed[2:] * tailed[:-2]).mean() < -0.05


def test_saturated_pixels_and_bleeds():
    image = np.zeros((80, 80))
    image[40, 30] = 5.0
    rng = np.random.default_rng(0)
    assert not sky_fields._saturated(image, 10.0, 0, rng).any()
    faint = sky_fields._saturated(image, 4.0, 0, rng)
    assert faint[40, 30] and faint[38:43, 28:33].sum() == faint.sum() > 1
    lengths = [np.ptp(np.nonzero(sky_fields._saturated(image, 0.01, 0, rng))[0]) for _ in range(12)]
    assert max(lengths) > 40 and min(lengths) < 5, "most bleed along y, some do not"


@pytest.fixture(scope="module")
def field():
    """The first few sources alone: stars, that is, and one galaxy."""
    draw = sky_fields._sources
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sky_fields, "_sources", lambda *a: draw(*a)[[0, 1, -1]])
        return simulate_sky_field(5, 1)


def test_truth_explains_the_image(field, tmp_path):
    np.savez(tmp_path / "field_00.npz", **field)
    read = FieldFile.read(tmp_path / "field_00.npz")
    assert (
        list(field["kind"][:2]) == ["star", "star"] and (field["hlr"][:2] == 0).all() and field["hlr"][2] > 0
    )
    assert read.stamp.shape == (3, 6, SKY_STAMP, SKY_STAMP)
    # Wings reach beyond the PSF's stamp: the truth has them where the kernel ends.
    star = read.stamp[0] / read.stamp[0].sum(axis=(1, 2), keepdims=True)
    ring = SKY_STAMP // 2 + 22
    assert (star[:, ring, SKY_STAMP // 2] > 0).all()
    model = np.array(field["sky"], float)
    for stamp, x0, y0 in zip(read.stamp, read.stamp_x0, read.stamp_y0, strict=True):
        model[:, y0 : y0 + SKY_STAMP, x0 : x0 + SKY_STAMP] += stamp
    near = np.zeros(model.shape[1:], bool)
    for x0, y0 in zip(read.stamp_x0, read.stamp_y0, strict=True):
        near[y0 : y0 + SKY_STAMP, x0 : x0 + SKY_STAMP] = True
    chi = ((read.image - model) / np.sqrt(read.variance))[:, near]
    # Chi-squares of thousands of correlated pixels scatter by a few percent.
    np.testing.assert_allclose(np.nanmean(chi**2, axis=1), 1, atol=0.06)
    again = np.abs(field["sky"]).max(axis=(1, 2)) / np.sqrt(read.variance.min(axis=(1, 2)))
    assert (again < 0.11).all() and (again > 0.005).all()
