# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Detection image and peaks."""

from __future__ import annotations

import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.peaks import detection_image, find_peaks, significance_map
from synthetic import gaussian_image


def test_pure_noise_has_unit_significance():
    rng = np.random.default_rng(2)
    noise = np.array([1.0, 5.0, 30.0])[:, None, None]
    image = rng.normal(0, 1, (3, 300, 300)) * noise
    map_ = detection_image(
        image, np.broadcast_to(noise**2, image.shape), np.ones(image.shape, bool), [1.5, 2, 3]
    )
    assert map_.std() == pytest.approx(1.0, abs=0.04)
    assert map_.mean() == pytest.approx(0.0, abs=0.04)


def test_a_point_source_has_the_significance_of_its_optimal_flux():
    sigma, flux, noise = np.array([1.5, 2.0]), np.array([300.0, 300.0]), np.array([2.0, 3.0])
    image = np.stack([f * gaussian_image((64, 64), 30, 33, s) for f, s in zip(flux, sigma, strict=True)])
    variance = np.broadcast_to(noise[:, None, None] ** 2, image.shape)
    map_ = detection_image(image, variance, np.ones(image.shape, bool), sigma)
    # Signal to noise of a point source, Gaussian PSF: flux / (noise sqrt(4 pi) sigma), bands in quadrature.
    expected = np.sqrt((flux**2 / (noise**2 * 4 * np.pi * sigma**2)).sum())
    assert map_.max() == pytest.approx(expected, rel=0.02)
    assert np.unravel_index(map_.argmax(), map_.shape) == (33, 30)


def test_invalid_pixels_and_bands_do_not_count():
    rng = np.random.default_rng(1)
    image, variance = rng.normal(0, 1, (2, 40, 40)), np.ones((2, 40, 40))
    valid = np.ones((2, 40, 40), bool)
    valid[1] = False
    valid[0, :20] = False
    image[1], image[0, :20] = 1e9, np.nan
    variance[1], variance[0, :20] = 0.0, np.nan
    map_ = detection_image(image, variance, valid, [1.5, 1.5])
    assert np.isfinite(map_).all() and np.abs(map_).max() < 6
    assert not map_[:12].any()
    assert not detection_image(image, variance, np.zeros_like(valid), [1.5, 1.5]).any()


def test_weights_say_the_same_as_variances():
    rng = np.random.default_rng(1)
    image, variance = rng.normal(0, 1, (2, 40, 40)), rng.uniform(1, 2, (2, 40, 40))
    valid = rng.uniform(size=image.shape) > 0.1
    weight = np.where(valid, 1.0 / variance, 0.0)
    np.testing.assert_array_equal(
        significance_map(image, weight, 1.7), detection_image(image, variance, valid, 1.7)
    )
    with pytest.raises(ValueError, match="positive in every band"):
        significance_map(image, weight, [1.0, np.nan])


def test_peaks_are_refined_and_come_brightest_first():
    image = 50 * gaussian_image((60, 70), 20.3, 30.8, 2.0) + 90 * gaussian_image((60, 70), 45.0, 11.6, 2.0)
    peaks = find_peaks(image, 0.5, min_separation=3)
    np.testing.assert_allclose(peaks, [[45.0, 11.6], [20.3, 30.8]], atol=0.03)
    assert find_peaks(image, image.max()).shape == (0, 2)


def test_peaks_lie_in_the_footprint_and_away_from_others():
    image = sum(f * gaussian_image((60, 70), x, 30, 1.2) for f, x in ((90, 20), (60, 26), (50, 50)))
    inside = np.zeros(image.shape, bool)
    inside[:, :40] = True
    np.testing.assert_allclose(find_peaks(image, 1, inside)[:, 0], [20, 26], atol=0.1)
    np.testing.assert_allclose(find_peaks(image, 1, min_separation=8)[:, 0], [20, 50], atol=0.1)
    existing = [[50.5, 30.5], [0.0, 0.0]]
    np.testing.assert_allclose(find_peaks(image, 1, None, 3, existing)[:, 0], [20, 26], atol=0.1)


def test_a_plateau_is_one_peak_and_the_border_may_have_one():
    image = np.zeros((20, 20))
    image[5:7, 5:7] = 10.0
    image[0, 19] = 8.0
    peaks = find_peaks(image, 1.0)
    assert len(peaks) == 2
    np.testing.assert_array_equal(peaks[1], [19, 0])
    assert 4.5 <= peaks[0, 0] <= 6.5 and 4.5 <= peaks[0, 1] <= 6.5
