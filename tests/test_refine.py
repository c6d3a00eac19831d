# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gauss-Newton steps on latents, with models that are linear: one step must reach the exact solution."""

from types import SimpleNamespace

import numpy as np
import pytest
from lsst.meas.vaedeblend.refine import MAX_STEP, WIDTHS, LinearisedModels, choose_widths

BANDS, LENGTH, SIZE = 2, 3, 32


class LinearJacobian:
    """Models that are linear in three latents: a blob, and its derivatives along x and y."""

    metadata = SimpleNamespace(cutout_size=SIZE)

    def images(self, latent, psf_moments, width):
        line = np.arange(width) - width // 2
        y, x = line[:, None], line[None, :]
        blob = np.exp(-0.5 * (x**2 + y**2) / 2.5**2)
        images = np.stack([blob, blob * x / 2.5, blob * y / 2.5])
        return np.stack([images, 2.0 * images])[None].astype(np.float32)


def models(latents, corners, shape):
    """The scene that latents stand for."""
    out = np.zeros((BANDS, *shape))
    images = LinearJacobian().images(None, None, SIZE)[0]
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


def linearise(latent, corners, image, weight, width=SIZE):
    residual = image - models(latent, corners, image.shape[1:])
    moments = np.zeros((len(latent), BANDS, 3))
    widths = np.full(len(latent), width)
    return LinearisedModels(LinearJacobian(), latent, moments, corners, widths, residual, weight)


def test_one_step_reaches_the_solution_of_the_normal_equations(scene):
    corners, truth, image, weight = scene
    start = truth + 0.1
    a = design_matrix(corners, image.shape[1:])
    w = weight.ravel()
    matrix = a.T @ (w[:, None] * a) + np.eye(a.shape[1])
    expected = np.linalg.solve(matrix, a.T @ (w * image.ravel())).reshape(truth.shape)
    found = linearise(start, corners, image, weight).step(np.zeros(4))[0]
    np.testing.assert_allclose(found, expected, atol=2e-3)
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
    alone = linearise(start, corners, image, weight)
    alone.cross[:] = 0.0
    # Each by itself would take all of the light that both should share.
    assert cost(joint) < 0.1 * cost(start)
    assert cost(alone.step(np.zeros(2))[0]) > 0.5 * cost(start)


def test_damping_and_length_bound_a_step(scene):
    corners, truth, image, weight = scene
    start = np.zeros_like(truth)
    free = linearise(start, corners, image, weight).step(np.zeros(4))[0] - start
    damped = linearise(start, corners, image, weight).step(np.full(4, 10.0))[0] - start
    assert (np.linalg.norm(damped, axis=1) < 0.5 * np.linalg.norm(free, axis=1)).all()
    far = linearise(start, corners, 1e4 * image, weight).step(np.zeros(4))[0] - start
    assert np.linalg.norm(far, axis=1).max() <= MAX_STEP * (1 + 1e-9)


def test_without_data_the_prior_rules(scene):
    corners, truth, image, weight = scene
    found = linearise(truth, corners, image, 0.0 * weight)
    np.testing.assert_allclose(found.step(np.zeros(4))[0], 0.0, atol=1e-12)
    np.testing.assert_allclose(found.covariances()[1], np.eye(LENGTH), atol=1e-12)


def test_a_source_that_overflows_leaves_the_others_alone(scene):
    corners, truth, image, weight = scene

    class Overflowing(LinearJacobian):
        def images(self, latent, psf_moments, width):
            out = super().images(latent, psf_moments, width)
            return np.full_like(out, np.inf) if latent[0, 0] > 50 else out

    latent = truth + 0.1
    residual = image - models(latent, corners, image.shape[1:])

    def linearised(jacobian, n):
        moments, widths = np.zeros((n, BANDS, 3)), np.full(n, SIZE)
        return LinearisedModels(jacobian, latent[:n], moments, corners[:n], widths, residual, weight)

    latent[3, 0] = 100.0
    broken = linearised(Overflowing(), 4)
    new, gain = broken.step(np.zeros(4))
    assert np.isfinite(new).all() and np.isfinite(gain).all()
    assert np.isfinite(broken.covariances()).all()
    expected = linearised(LinearJacobian(), 3).step(np.zeros(3))[0]
    # What conjugate gradients leave is in proportion to the whole, of which the last source has most.
    np.testing.assert_allclose(new[:3], expected, atol=1e-2)


def test_width_follows_the_extent_of_the_source():
    line = np.arange(64) - 32
    r2 = line[:, None] ** 2 + line**2
    narrow, wide = np.exp(-0.5 * r2 / 2.0**2), np.exp(-0.5 * r2 / 14.0**2)
    observed = np.stack([100 * narrow, 100 * wide, 0.01 * wide])[:, None]
    widths = choose_widths(observed, np.ones_like(observed))
    assert widths.tolist() == [WIDTHS[0], WIDTHS[2], WIDTHS[0]]
