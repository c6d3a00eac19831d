# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Numbers that the evaluations report."""

import itertools

import galsim
import numpy as np
import pytest
from lsst.meas.vaedeblend.evaluation.metrics import (
    ksb_shape,
    match,
    nmad,
    reduced_chi2,
    run_seconds,
    stamp_snr,
)


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
