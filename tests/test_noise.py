# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Correlated noise and the local sky, against noise whose correlation is known."""

from __future__ import annotations

import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.noise import noise_correlation, noise_factor
from lsst.meas.vaedeblend.ground.sky import local_sky
from scipy import ndimage

SIZE = 400
KERNEL = np.outer([0.2, 1.0, 0.2], [0.35, 1.0, 0.35])
"""What white noise is convolved with; its autocorrelation ends at lag 2."""


def noise(seed: int, kernel=None, shape=(SIZE, SIZE)) -> np.ndarray:
    """Noise of unit variance in one band, white or convolved with a kernel."""
    image = np.random.default_rng(seed).standard_normal(shape)
    if kernel is not None:
        image = ndimage.convolve(image, kernel / np.sqrt((kernel**2).sum()), mode="wrap")
    return image[None].astype(np.float32)


def autocorrelation(kernel: np.ndarray) -> np.ndarray:
    """The truth at lags up to 2 along each axis."""
    padded = np.pad(kernel, 2)
    rolled = [[(padded * np.roll(padded, (dy, dx), (0, 1))).sum() for dx in LAGS] for dy in LAGS]
    return np.array(rolled) / (kernel**2).sum()


LAGS = range(-2, 3)


def disks(radius: int, count: int, seed: int) -> np.ndarray:
    """Whether pixels lie in some disks."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:SIZE, :SIZE]
    out = np.zeros((SIZE, SIZE), bool)
    for x, y in rng.uniform(0, SIZE, (count, 2)):
        out |= np.hypot(yy - y, xx - x) < radius
    return out


def test_correlation_of_known_noise():
    truth = autocorrelation(KERNEL)
    assert truth[2, 3] == pytest.approx(0.7 / (1 + 2 * 0.35**2))
    correlation, measured = noise_correlation(
        noise(1, KERNEL), np.ones((1, SIZE, SIZE)), np.ones((SIZE, SIZE))
    )
    # 160 000 pixels, errors of 0.0025 and, as neighbours correlate, somewhat more.
    assert measured.all()
    np.testing.assert_allclose(correlation[0], truth, atol=0.01)
    for sigma in (1.5, 2.5):
        # The variance of the filtered image scatters by sqrt(8 pi sigma^2 / 160 000), up to 0.03.
        assert noise_factor(correlation, sigma) == pytest.approx(noise_factor(truth[None], sigma), rel=0.03)


def test_white_noise_is_white_even_with_sources_sky_and_uneven_depth():
    rng = np.random.default_rng(2)
    depth = np.where(np.arange(SIZE) < 150, 1.0, 3.0).astype(np.float32) * np.ones((1, SIZE, 1), np.float32)
    image = noise(2) * depth
    occupied = disks(9, 60, 5)
    image[:, occupied] += 300.0
    # Thirty faint ones that nobody detected, and a sky with a gradient.
    for x, y in rng.integers(20, SIZE - 20, (30, 2)):
        yy, xx = np.mgrid[-9:10, -9:10]
        image[0, y - 9 : y + 10, x - 9 : x + 10] += np.exp(-(yy**2 + xx**2) / 8)
    image += depth * np.linspace(-0.3, 0.3, SIZE, dtype=np.float32)[:, None]
    image[0, 100:103, 50] = np.nan
    free = ~ndimage.binary_dilation(occupied, iterations=2)
    weight = np.where(np.isfinite(image), depth**-2, 0)
    correlation, measured = noise_correlation(image, weight, free)
    factor = noise_factor(correlation, 2.0)
    # 24 lags of error 0.004 each, twelve of them independent.
    assert measured.all() and factor == pytest.approx(1, abs=0.05)


def test_the_factor_is_what_a_matched_filter_feels():
    image = noise(3, KERNEL, (1500, 1500))[0]
    filtered = ndimage.gaussian_filter(image, 1.8, truncate=6)
    white = 1 / (4 * np.pi * 1.8**2)
    factor = noise_factor(autocorrelation(KERNEL)[None], 1.8)[0]
    assert filtered.var() / white == pytest.approx(factor, rel=0.02)
    # A plain mean feels the sum of all correlations.
    means = image.reshape(50, 30, 50, 30).mean(axis=(1, 3))
    assert means.var() * 900 == pytest.approx(noise_factor(autocorrelation(KERNEL)[None], np.inf)[0], rel=0.1)
    assert noise_factor(np.ones((1, 1, 1)), 2.0) == 1


def test_few_pixels_say_nothing():
    free = np.zeros((SIZE, SIZE), bool)
    free[:60, :60] = True
    correlation, measured = noise_correlation(noise(4, KERNEL), np.ones((1, SIZE, SIZE)), free)
    assert not measured.any() and correlation[0, 2, 2] == 1 and np.abs(correlation).sum() == 1
    correlation, measured = noise_correlation(np.zeros((2, 3, 3)), np.zeros((2, 3, 3)), np.ones((3, 3)))
    assert not measured.any() and correlation.shape == (2, 5, 5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"should be \(B, H, W\)"):
        noise_correlation(np.zeros((3, 3)), np.zeros((3, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="odd n"):
        noise_factor(np.ones((1, 2, 2)), 1.0)
    with pytest.raises(ValueError, match="positive in every band"):
        noise_factor(np.ones((1, 3, 3)), 0.0)
    with pytest.raises(ValueError, match="a width of 8"):
        local_sky(np.zeros((1, 3, 3)), np.ones((1, 3, 3)), np.ones((3, 3)), width=4)
    with pytest.raises(ValueError, match=r"should be \(B, H, W\)"):
        local_sky(np.zeros((1, 3, 3)), np.ones((1, 4, 3)), np.ones((3, 3)))


def test_a_sky_left_over_is_found():
    sigma = 7.0
    occupied = disks(12, 40, 6)
    weight = np.full((1, SIZE, SIZE), sigma**-2, np.float32)
    factor = noise_factor(autocorrelation(KERNEL)[None], np.inf)
    image = sigma * (noise(5, KERNEL) + 0.1)
    image[:, occupied] += 1000.0
    image[0, 200, 200] = 1e20
    sky, error = local_sky(image, weight, ~occupied, factor)
    assert sky.dtype == error.dtype == np.float32
    # Shrunk by the part that the prior has in the precision, and scattered by no more than the error says.
    shrunk = 1 - (error**2).mean() / (0.1 * sigma) ** 2
    assert shrunk > 0.7 and sky.mean() == pytest.approx(0.1 * sigma * shrunk, rel=0.1)
    assert np.sqrt(((sky - 0.1 * sigma) ** 2).mean()) < 1.2 * error.mean()
    nothing, error = local_sky(sigma * noise(6, KERNEL), weight, ~occupied, factor)
    assert abs(nothing.mean()) < 0.01 * sigma
    assert 0.7 < np.sqrt((nothing**2).mean()) / error.mean() < 1.2
    # A tighter prior takes more off.
    shy, _ = local_sky(image, weight, ~occupied, factor, prior=0.02)
    assert shy.mean() < 0.6 * sky.mean()
    # A sky of several standard deviations, which the prior deems impossible, is still nearly found.
    large, _ = local_sky(image + 2 * sigma, weight, ~occupied, factor)
    assert large.mean() == pytest.approx(2.1 * sigma * shrunk, rel=0.05)


def test_the_sky_is_local_to_the_last_bit():
    image, weight = noise(7), np.ones((1, SIZE, SIZE), np.float32)
    free = ~disks(10, 30, 8)
    sky, error = local_sky(image, weight, free, 1.5, width=32)
    image[0, :, 300:] = np.random.default_rng(1).normal(1e4, 1e6, (SIZE, 100))
    weight[0, 50:, 300:], free[:60, 300:] = 1e-12, True
    other, other_error = local_sky(image, weight, free, 1.5, width=32)
    # Three rounds of clipping, each of which looks 16 pixels around, and interpolation over one square.
    np.testing.assert_array_equal(sky[..., : 300 - 3 * 16 - 4], other[..., : 300 - 3 * 16 - 4])
    np.testing.assert_array_equal(error[..., : 300 - 3 * 16 - 4], other_error[..., : 300 - 3 * 16 - 4])
    assert (sky[..., 299] != other[..., 299]).any()


def test_where_nothing_is_free_the_sky_is_zero():
    image, weight = noise(8), np.full((1, SIZE, SIZE), 0.25, np.float32)
    image[0, :100], weight[0, :100] = np.nan, 0
    weight[0, 100:110] = np.nan
    free = np.ones((SIZE, SIZE), bool)
    free[250:] = False
    with np.errstate(all="raise"):
        sky, error = local_sky(image, weight, free, width=32)
    assert np.isfinite(sky).all() and np.isfinite(error).all()
    assert (sky[0, :90] == 0).all() and (error[0, :90] == 0).all()
    assert (sky[0, 300:] == 0).all()
    np.testing.assert_allclose(error[0, 300:], 0.1 * 2, rtol=1e-5)
