# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gauss-Newton steps on latents, with models that are linear: one step must reach the exact solution."""

from types import SimpleNamespace

import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.inference import WIDTHS, GaussNewton, Grids, groups, kernels, overlapping_pairs

BANDS, LENGTH, SIZE = 2, 3, 32
LEAST = 6
"""Pixels on both axes below which two squares count as apart."""


def derivatives():
    """Of models that are linear in three latents: a blob, and its derivatives along x and y, (B, L, S, S)."""
    line = np.arange(SIZE) - SIZE // 2
    y, x = line[:, None], line[None, :]
    blob = np.exp(-0.5 * (x**2 + y**2) / 2.5**2)
    images = np.stack([blob, blob * x / 2.5, blob * y / 2.5])
    return np.stack([images, 2.0 * images]).astype(np.float32)


def models(latents, corners, shape):
    """The scene that latents stand for."""
    out = np.zeros((BANDS, *shape))
    images = derivatives()
    for z, (y, x) in zip(latents, corners, strict=True):
        stamp = np.einsum("blyx,l->byx", images, z)
        for j in range(SIZE):
            for i in range(SIZE):
                if 0 <= y + j < shape[0] and 0 <= x + i < shape[1]:
                    out[:, y + j, x + i] += stamp[:, j, i]
    return out


@pytest.fixture
def scene():
    rng = np.random.default_rng(3)
    shape = (60, 64)
    corners = np.array([[5, 6], [9, 12], [20, 30], [-10, 40]])
    truth = 0.3 * rng.standard_normal((4, LENGTH))
    weight = rng.uniform(0.5, 2.0, (BANDS, *shape))
    weight[:, 20:23, 15:40] = 0.0
    image = models(truth, corners, shape) + rng.standard_normal((BANDS, *shape)) / np.sqrt(
        np.maximum(weight, 0.1)
    )
    return corners, truth, image, weight


def design_matrix(corners, shape):
    columns = []
    for k in range(len(corners)):
        for unit in np.eye(LENGTH):
            latents = np.zeros((len(corners), LENGTH))
            latents[k] = unit
            columns.append(models(latents, corners, shape).ravel())
    return np.array(columns).T


def linearise(latent, corners, image, weight, apart=False, lost=None):
    """The quadratic approximation, from sums over pixels as the procedure makes them.

    ``apart`` leaves overlaps out; the source ``lost`` has derivatives that are not finite.
    """
    residual = (image - models(latent, corners, image.shape[1:])).astype(np.float32)
    weight = weight.astype(np.float32)
    y, x = np.ascontiguousarray(corners.T)
    slopes = np.tile(derivatives(), (len(latent), 1, 1, 1, 1))
    if lost is not None:
        slopes[lost] = np.nan
    weighted = kernels.weighted_residual(residual, weight, y, x, SIZE)
    gradient = np.einsum("kblyx,kbyx->kl", slopes, weighted) - latent
    tangent = slopes * np.sqrt(kernels.coarse_weights(weight, y, x, SIZE, 1))[:, :, None]
    block = np.einsum("kbiyx,kbjyx->kij", tangent, tangent) + np.eye(LENGTH)
    pairs = overlapping_pairs(corners, np.full(len(latent), SIZE), LEAST)
    pairs = pairs[:0] if apart else pairs
    i, j = pairs.T
    cross = kernels.cross_blocks(tangent, i, y[i], x[i], tangent, j, y[j], x[j])
    return GaussNewton(gradient, block, pairs, cross)


def test_sources_that_overlap_form_a_group(scene):
    corners, truth, image, weight = scene
    found = linearise(truth, corners, image, weight)
    assert found.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert found.groups[0] == found.groups[1] == found.groups[2] != found.groups[3]
    assert sorted(rows.tolist() for rows in found.members) == [[0, 1, 2], [3]]


@pytest.mark.parametrize(("direct", "tolerance"), [(12, 1e-5), (0, 2e-3)], ids=["direct", "iterative"])
def test_one_step_reaches_the_solution_of_the_normal_equations(scene, direct, tolerance, monkeypatch):
    monkeypatch.setattr(groups, "_DIRECT", direct)
    corners, truth, image, weight = scene
    start = truth + 0.1
    a = design_matrix(corners, image.shape[1:])
    w = weight.ravel()
    matrix = a.T @ (w[:, None] * a) + np.eye(a.shape[1])
    expected = np.linalg.solve(matrix, a.T @ (w * image.ravel())).reshape(truth.shape)
    change, gain = linearise(start, corners, image, weight).step(np.zeros(4))
    np.testing.assert_allclose(start + change, expected, atol=tolerance)

    def cost(latent):
        chi2 = (weight * (image - models(latent, corners, image.shape[1:])) ** 2).sum()
        return chi2 + (latent**2).sum()

    # The models are linear, so that what is promised is what is gained.
    assert gain.sum() == pytest.approx(cost(start) - cost(expected), rel=1e-2)
    # The covariance of a source is the block of the inverse; here three of four sources overlap in a chain,
    # so the marginal over all is that over the neighbours for those in the middle of it.
    inverse = np.linalg.inv(matrix).reshape(4, LENGTH, 4, LENGTH)
    covariances = linearise(start, corners, image, weight).covariances()
    for k in range(4):
        np.testing.assert_allclose(covariances[k], inverse[k, :, k], rtol=0.02, atol=1e-5)


def test_overlapping_sources_share_what_is_missing():
    shape, corners = (50, 50), np.array([[5, 6], [6, 8]])
    truth = np.array([[0.5, 0.0, 0.1], [0.4, -0.1, 0.0]])
    image, weight = models(truth, corners, shape), np.full((BANDS, *shape), 4.0)

    def cost(latent):
        chi2 = (weight * (image - models(latent, corners, shape)) ** 2).sum()
        return chi2 + (latent**2).sum()

    start = np.zeros_like(truth)
    joint = linearise(start, corners, image, weight).step(np.zeros(2))[0]
    alone = linearise(start, corners, image, weight, apart=True).step(np.zeros(2))[0]
    # Each by itself would take all of the light that both should share.
    assert cost(joint) < 0.1 * cost(start)
    assert cost(alone) > 0.5 * cost(start)


def test_damping_and_length_bound_a_step(scene):
    corners, truth, image, weight = scene
    start = np.zeros_like(truth)
    free = linearise(start, corners, image, weight).step(np.zeros(4))[0]
    damped = linearise(start, corners, image, weight).step(np.full(4, 10.0))[0]
    assert (np.linalg.norm(damped, axis=1) < 0.5 * np.linalg.norm(free, axis=1)).all()
    for factor in (10, 100, 1e4):
        far = linearise(start, corners, factor * image, weight).step(np.zeros(4), 2.0)[0]
        assert np.linalg.norm(far, axis=1).max() <= 1.1 * 2.0 * (1 + 1e-9)


def test_without_data_the_prior_rules(scene):
    corners, truth, image, weight = scene
    found = linearise(truth, corners, image, 0.0 * weight)
    np.testing.assert_allclose(truth + found.step(np.zeros(4))[0], 0.0, atol=1e-12)
    np.testing.assert_allclose(found.covariances()[1], np.eye(LENGTH), atol=1e-12)


def test_a_source_that_overflows_leaves_other_groups_alone(scene):
    corners, truth, image, weight = scene
    latent = truth + 0.1
    whole = linearise(latent, corners, image, weight)
    expected, gain = whole.step(np.zeros(4))
    for lost, others in ((3, [0, 1, 2]), (1, [3])):
        broken = linearise(latent, corners, image, weight, lost=lost)
        change, promise = broken.step(np.zeros(4))
        assert np.isnan(change[lost]).all() and np.isnan(promise[lost])
        np.testing.assert_array_equal(change[others], expected[others])
        np.testing.assert_array_equal(promise[others], gain[others])
        np.testing.assert_array_equal(broken.covariances()[others], whole.covariances()[others])


def test_width_follows_the_extent_of_the_source():
    metadata = SimpleNamespace(cutout_size=64, frame={"type": "gaussian", "sigma": 0.8})
    stamps = gaussian_psf(1.5, 25)[None, None]
    moments = np.array([[[1.5**2, 1.5**2, 0.0]]])
    grids = Grids(SimpleNamespace(metadata=metadata), None, stamps, moments)
    sigma, flux = np.array([2.0, 5.0, 14.0, 14.0]), np.array([2500.0, 2500.0, 1e5, 10.0])
    covariance = np.stack([sigma**2, 0 * sigma, sigma**2], 1)[:, None]
    cell = np.zeros(4, np.int64)
    widths = grids.choose(flux[:, None, None], covariance, cell, np.ones((4, 1)), 1e-5)
    # Outside of the radius r lies exp(-r^2 / s^2) of the squared signal-to-noise ratio f^2 / (4 pi s^2),
    # where s^2 is the variance with the PSF's; 1, or a hundred-thousandth of the whole, is allowed.
    assert widths.tolist() == [WIDTHS[1], WIDTHS[2], WIDTHS[4], WIDTHS[0]]


def test_signal_inside_of_squares():
    rng = np.random.default_rng(2)
    weight = rng.uniform(0.5, 2.0, (2, 50, 45)).astype(np.float32)
    pool = rng.uniform(size=(3, 2, 40, 40)).astype(np.float32)
    y0, x0, scale = np.array([4, -13]), np.array([2, 20]), np.array([[1.0, 2.0], [0.5, 3.0]])
    found = kernels.signal_inside(weight, pool, np.array([2, 0]), y0, x0, scale, np.array([16, 24, 64]))
    for k, slot in enumerate((2, 0)):
        padded = np.pad(weight, ((0, 0), (40, 40), (40, 40)))
        own = padded[:, y0[k] + 40 : y0[k] + 80, x0[k] + 40 : x0[k] + 80]
        signal = (own * (pool[slot] * scale[k][:, None, None]) ** 2).sum(0)
        expected = [signal[20 - w // 2 : 20 + w // 2, 20 - w // 2 : 20 + w // 2].sum() for w in (16, 24, 40)]
        np.testing.assert_allclose(found[k], expected, rtol=1e-5)
