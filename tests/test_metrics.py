# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Numbers that the evaluations report."""

import itertools

import galsim
import numpy as np
import pytest
from lsst.meas.vaedeblend.evaluation.metrics import (
    blendedness_closest,
    blendedness_total,
    bootstrap,
    magnitude,
    match,
    poisson_variance,
    reduced_chi2,
    run_seconds,
    shear_bias,
    sigma_percentiles,
)
from lsst.meas.vaedeblend.ground.statistics import nmad, stamp_snr
from lsst.meas.vaedeblend.simulation.ksb import ksb_shape


def test_nmad_is_the_sigma_of_a_gaussian_and_ignores_outliers():
    values = np.random.default_rng(1).normal(3.0, 2.0, 100_000)
    assert nmad(values) == pytest.approx(2.0, rel=0.02)
    values[:1000] = 1e9
    assert nmad(values) == pytest.approx(2.0, rel=0.05)
    assert np.isnan(nmad([]))


def brute_force(xy, truth, radius):
    """Largest number of pairs and their least squared distance, by trying everything."""
    best = (0, 0.0)
    short, long = (xy, truth) if len(xy) <= len(truth) else (truth, xy)
    for size in range(len(short), 0, -1):
        for rows in itertools.combinations(range(len(short)), size):
            for columns in itertools.permutations(range(len(long)), size):
                d2 = ((short[list(rows)] - long[list(columns)]) ** 2).sum(axis=1)
                if (d2 <= radius**2).all() and (size > best[0] or d2.sum() < best[1]):
                    best = (size, d2.sum())
        if best[0] == size:
            return best
    return best


@pytest.mark.parametrize("seed", range(8))
def test_match_is_the_best_one_to_one_matching(seed):
    rng = np.random.default_rng(seed)
    xy, truth = rng.uniform(0, 8, (5, 2)), rng.uniform(0, 8, (4, 2))
    index, truth_index = match(xy, truth, 3.0)
    assert len(set(index)) == len(index) and list(truth_index) == sorted(set(truth_index))
    distance2 = ((xy[index] - truth[truth_index]) ** 2).sum(axis=1)
    assert (distance2 <= 9.0).all()
    n, total = brute_force(xy, truth, 3.0)
    assert len(index) == n
    assert distance2.sum() == pytest.approx(total)


def test_match_of_nothing():
    assert [len(i) for i in match(np.empty((0, 2)), [[1, 1]], 3.0)] == [0, 0]
    assert [len(i) for i in match([[9, 9]], [[1, 1]], 3.0)] == [0, 0]


def test_stamp_snr():
    stamps = np.zeros((2, 3, 5, 5))
    stamps[0, 1, 2, 2] = 6.0
    snr = stamp_snr(stamps, np.full((5, 5), 4.0))
    assert snr.shape == (2, 3) and snr[0, 1] == 3.0 and snr.sum() == 3.0


def test_reduced_chi2_uses_the_weighted_pixels_only():
    image = np.array([[3.0, 100.0], [4.0, np.nan]])
    weight = np.array([[1.0, 0.0], [0.25, 0.0]])
    assert reduced_chi2(image, weight) == pytest.approx((9 + 4) / 2)
    assert np.isnan(reduced_chi2(image, np.zeros((2, 2))))


def test_run_seconds_takes_the_last_run():
    start, end = "2026-01-01T00:00:00.000000+00:00", "2026-01-01T00:01:02.500000+00:00"
    assert run_seconds({"runStartUtc": start, "runEndUtc": end}) == 62.5
    assert run_seconds({"runStartUtc": ["x", start], "runEndUtc": ["y", end]}) == 62.5


def test_ksb_recovers_a_gaussian_galaxys_shape():
    psf = galsim.Gaussian(sigma=1.5)
    galaxy = galsim.Convolve(galsim.Gaussian(sigma=2.5).shear(g1=0.1, g2=-0.05), psf)
    image, seen = (p.drawImage(nx=64, ny=64, scale=1.0).array for p in (galaxy, psf))
    assert ksb_shape(image, seen) == pytest.approx((0.1, -0.05), abs=0.01)


def test_ksb_of_nothing_is_nan():
    assert np.isnan(ksb_shape(np.zeros((32, 32)), np.ones((15, 15)))).all()


def test_blendedness_by_hand():
    """Equations 1 to 3: inner products 4 + 2 = 6, 5 and 8; three of them for two neighbours."""
    target = np.array([[2.0, 1.0], [0.0, 0.0]])
    closest = np.array([[2.0, 2.0], [0.0, 0.0]])
    far = np.array([[0.0, 0.0], [3.0, 0.0]])
    assert blendedness_closest(target, closest) == pytest.approx(6 / np.sqrt(5 * 8))
    assert blendedness_closest(target, far) == 0
    assert blendedness_closest(target, 7 * target) == pytest.approx(1)
    assert blendedness_total(target, target + closest + far) == pytest.approx(1 - 5 / (5 + 6))
    assert blendedness_total(target, target) == 0


def test_signal_to_noise_by_hand():
    """Equation 7: two pixels of 3 and 4 nJy, 2 electrons per nJy, 10 electrons of sky."""
    image = np.array([[3.0, 4.0]])
    variance = poisson_variance(image, 2.0, 10.0)
    np.testing.assert_allclose(variance, [[16 / 4, 18 / 4]])
    assert stamp_snr(image, variance) == pytest.approx(np.sqrt(9 / 4 + 16 / 4.5))
    assert poisson_variance(-1.0, 2.0, 10.0) == pytest.approx(2.5)


def test_magnitudes():
    np.testing.assert_allclose(magnitude([1.0, 100.0]), [31.4, 26.4])
    assert np.isnan(magnitude([0.0, -1.0])).all()


def test_shear_bias_is_found_per_component():
    rng = np.random.default_rng(3)
    true = rng.normal(0, 0.2, (5000, 2))
    measured = true * [0.9, 1.05] + [0.01, -0.02] + rng.normal(0, 0.1, true.shape)
    measured[0] = np.nan
    bias = shear_bias(true, measured, np.random.default_rng(0))
    # Error of a slope: scatter over spread over root N, 0.1 / 0.2 / sqrt(5000); of the offset 0.1 / root N.
    np.testing.assert_allclose(bias.m_err, 0.5 / np.sqrt(5000), rtol=0.2)
    np.testing.assert_allclose(bias.c_err, 0.1 / np.sqrt(5000), rtol=0.2)
    assert (np.abs(bias.m - [-0.1, 0.05]) < 4 * bias.m_err).all()
    assert (np.abs(bias.c - [0.01, -0.02]) < 4 * bias.c_err).all()
    assert bias.mean == pytest.approx(bias.m.mean())
    assert bias.mean_err == pytest.approx(0.5 / np.sqrt(10000), rel=0.2)
    assert np.isnan(shear_bias(true[:2], measured[:2], rng).mean)


def test_bootstrap_error_of_a_mean():
    values = np.random.default_rng(1).normal(0, 3.0, 900)
    error = bootstrap(lambda rows: values[rows].mean(), 900, np.random.default_rng(2), 400)
    assert error == pytest.approx(0.1, rel=0.15)


def test_percentiles_in_bins():
    """A Gaussian's, in the bin that has it; the uppermost edge belongs to the last bin."""
    y = np.random.default_rng(2).normal(1.0, 2.0, 100_000)
    x = np.full(y.shape, 0.5)
    x[:3], y[3] = (1.0, 2.0, 7.0), np.nan
    count, percentiles = sigma_percentiles(x, y, [0, 1, 2], min_count=3)
    assert list(count) == [100_000 - 4, 2]
    np.testing.assert_allclose(percentiles[0], [-3, -1, 1, 3, 5], atol=0.05)
    assert np.isnan(percentiles[1]).all()
