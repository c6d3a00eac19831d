# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The mathematics of the inference against plain numpy, finite differences and dense solutions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.psf import adaptive_moments, gaussian_psf, kolmogorov_psf
from lsst.meas.vaedeblend.inference import (
    GaussNewton,
    Grids,
    Stamps,
    joint_fluxes,
    kernels,
    overlapping_pairs,
)
from lsst.meas.vaedeblend.inference import groups as groups_module
from lsst.meas.vaedeblend.inference.groups import connected_groups
from lsst.meas.vaedeblend.inference.prior import prior_derivatives, prior_penalty
from lsst.meas.vaedeblend.rendering import Renderer, square
from lsst.meas.vaedeblend.scene import PsfGrid

BANDS, SHAPE = 3, (70, 83)
STARTS = [(5, 6), (-7, 3), (60, 75), (-9, -11), (30, 81), (-40, 2), (66, -3), (3, 200), (20, 20)]
"""Of squares within the scene, over each border and corner, and outside."""


# Grids: rendering and derivatives


def elliptical_psf(size=41):
    """A PSF with wings and an ellipticity, not symmetric about its middle."""
    y, x = np.mgrid[:size, :size] - size // 2
    core = np.exp(-0.5 * (x**2 / 1.9**2 + y**2 / 1.4**2 + 0.5 * x * y / 2.5))
    skewed = 0.1 * np.exp(-0.5 * ((x - 2.0) ** 2 + (y - 1.0) ** 2) / 3.0**2)
    psf = core / core.sum() + skewed / skewed.sum() * 0.1 + 0.2 * kolmogorov_psf(4.5, size)
    return psf / psf.sum()


def make_grids(network, psfs):
    """Grids and renderer for one cell with the PSFs of each band."""
    psf = PsfGrid.constant(np.stack(psfs))
    renderer = Renderer(network.metadata, psf)
    moments = adaptive_moments(renderer.psf.stamps)
    return Grids(network.render, network.linearise, renderer.psf.stamps, moments), renderer, moments


@pytest.fixture
def latents():
    return np.random.default_rng(7).normal(0, 0.7, (5, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def general(gaussian_network):
    return make_grids(gaussian_network, [elliptical_psf(), kolmogorov_psf(4.2, 41), gaussian_psf(1.3, 41)])


def gaussians(mixture, width, extra):
    """Sum of Gaussians on a square, in double precision, (N, B, W, W)."""
    line = np.arange(width) - width // 2
    position, cov = mixture.position.astype(float), mixture.covariance.astype(float)
    dx = line[None, None, None, :] - position[:, :, 0, None, None]
    dy = line[None, None, :, None] - position[:, :, 1, None, None]
    xx, xy, yy = (cov[:, :, i, None, None] for i in range(3))
    xx, yy = xx + extra, yy + extra
    det = xx * yy - xy * xy
    maps = np.exp(-0.5 * (yy * dx**2 - 2 * xy * dx * dy + xx * dy**2) / det) / (2 * np.pi * np.sqrt(det))
    weight = mixture.weight.astype(float)
    weight = weight / weight.sum(2, keepdims=True)
    return np.einsum("nbg,ngyx->nbyx", weight, maps)


def test_files_of_the_small_network_are_those_that_its_source_makes(gaussian_network, latents):
    torch = pytest.importorskip("torch")
    import synthetic_gaussians

    decoder = synthetic_gaussians.make_decoder()
    expected = decoder(torch.from_numpy(latents)).numpy()
    found = gaussian_network.decoder.render(latents)
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize("width", [16, 24, 40, 64])
def test_squares_are_convolved_as_by_fast_transforms(general, latents, width):
    grids, renderer, _ = general
    sigma = renderer.metadata.frame["sigma"]
    cell = np.zeros(len(latents), np.int64)
    images, mixture = grids.draw(latents, cell, width)
    plain = gaussians(mixture, width, sigma**2 + 1 / 12)
    expected = square(renderer.observed(square(plain, 64), cell), width)
    np.testing.assert_allclose(images, expected, atol=2e-6 * expected.max())
    # The graph has no shape of its own: one source gives what it gives among others.
    alone, _ = grids.draw(latents[2:3], cell[:1], width)
    np.testing.assert_allclose(alone[0], images[2], atol=1e-6 * images[2].max())


def test_a_gaussian_psf_adds_its_variance(gaussian_network, latents):
    sigma = 1.7
    grids, _, _ = make_grids(gaussian_network, [gaussian_psf(sigma, 41)] * 3)
    images, mixture = grids.draw(latents, np.zeros(5, np.int64), 40)
    expected = gaussians(mixture, 40, sigma**2 + 1 / 12)
    # The model frame has pixels by their variance alone, which is good to some 1e-3.
    middle = slice(10, 30)
    np.testing.assert_allclose(
        images[..., middle, middle], expected[..., middle, middle], atol=3e-3 * expected.max()
    )


def observed(grids, latent, width):
    """Models in nJy: image of unit flux times flux."""
    images, mixture = grids.draw(latent, np.zeros(len(latent), np.int64), width)
    return images.astype(float) * mixture.weight.sum(2, dtype=float)[:, :, None, None]


def finite_differences(grids, latent, width, h=5e-3):
    """Derivatives of models by the latents, (N, L, B, W, W), to the fourth order in h."""
    out = []
    for unit in np.eye(latent.shape[1], dtype=np.float32):
        one, two = (
            (observed(grids, latent + step, width) - observed(grids, latent - step, width)) / k
            for k, step in ((1, h * unit), (2, 2 * h * unit))
        )
        out.append((4 * one - two) / 3 / (2 * h))
    return np.stack(out, 1)


@pytest.mark.parametrize("width", [16, 24, 40, 64])
def test_gradients_are_those_of_chi_square_through_the_whole_rendering(general, latents, width):
    grids, _, _ = general
    rng = np.random.default_rng(1)
    model = observed(grids, latents, width)
    data = observed(grids, latents + 0.2 * rng.normal(size=latents.shape).astype(np.float32), width)
    weight = rng.uniform(0.5, 2.0, model.shape)
    weight[:, :, 3:6, 7:12] = 0.0
    weighted = weight * (data + rng.normal(size=model.shape) - model)
    inner = 16
    offset, coarse = np.zeros((5, 2), np.int64), np.ones((5, 3, inner // grids.stride, inner // grids.stride))
    cell = np.zeros(5, np.int64)
    found = grids.linearise(
        latents, cell, weighted.astype(np.float32), coarse.astype(np.float32), inner, offset, width
    )
    expected = np.einsum("nlbyx,nbyx->nl", finite_differences(grids, latents, width), weighted)
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found.gradient / scale, expected / scale, atol=1e-3)


@pytest.mark.parametrize(
    ("sigma", "stride", "tolerance"), [(1.0, 1, 0.01), (1.3, 1, 0.01), (1.5, 2, 0.13), (1.8, 2, 0.025)]
)
def test_blocks_are_sums_of_products_of_derivatives(gaussian_network, latents, sigma, stride, tolerance):
    """To rounding on pixels; coarse ones lose what compact sources under a narrow PSF have of structure."""
    grids, _, _ = make_grids(gaussian_network, [gaussian_psf(sigma, 41)] * 3)
    assert grids.stride == stride
    width, inner, n = 40, 24, len(latents)
    rng = np.random.default_rng(2)
    # Weights that change slowly: coarse pixels know their sums.
    line = np.arange(width)
    weight = 1.0 + 0.5 * np.sin(line / 9.0)[:, None] * np.cos(line / 7.0 + np.arange(n * 3)[:, None, None])
    weight = weight.reshape(n, 3, width, width).astype(np.float32)
    # The lattice begins up to one pixel before the inner square.
    offset = rng.integers(0, stride, (n, 2))
    low = width // 2 - inner // 2
    jacobian = finite_differences(grids, latents, width)
    pixels, coarse, expected = inner // stride, [], []
    for k in range(n):
        y, x = (np.int64([v]) for v in low - offset[k])
        coarse.append(kernels.coarse_weights(weight[k], y, x, pixels, stride)[0])
        own = (slice(None), slice(y[0], y[0] + inner), slice(x[0], x[0] + inner))
        part = jacobian[k][:, *own].reshape(8, -1)
        expected.append((part * weight[k][own].ravel()) @ part.T)
    nothing = np.zeros((n, 3, width, width), np.float32)
    found = grids.linearise(latents, np.zeros(n, np.int64), nothing, np.stack(coarse), inner, offset, width)
    np.testing.assert_array_equal(found.gradient, 0.0)
    for block, tangent, other in zip(found.block, found.tangent, expected, strict=True):
        scale = np.sqrt(np.outer(np.diagonal(other), np.diagonal(other)))
        np.testing.assert_allclose(block / scale, other / scale, atol=tolerance)
        flat = tangent.transpose(1, 0, 2, 3).reshape(8, -1)
        np.testing.assert_allclose(flat @ flat.T, block, rtol=1e-4, atol=1e-5 * block.max())


def test_cross_blocks_of_two_sources_are_those_of_their_derivatives(gaussian_network, latents):
    grids, _, _ = make_grids(gaussian_network, [gaussian_psf(1.8, 41)] * 3)
    starts, inner = np.array([[10, 12], [17, 7]]), np.array([24, 16])
    weight = np.ones((3, 60, 60), np.float32)
    tangents, places, fields = [], [], []
    for z, start, v in zip(latents[:2], starts, inner.tolist(), strict=True):
        coarse = start // 2
        y, x = (np.int64([c]) for c in 2 * coarse)
        own = kernels.coarse_weights(weight, y, x, v // 2, 2)
        offset = (start - 2 * coarse)[None]
        nothing = np.zeros((1, 3, 40, 40), np.float32)
        tangents.append(grids.linearise(z[None], np.zeros(1, np.int64), nothing, own, v, offset, 40).tangent)
        places.append(coarse)
        field = np.zeros((8, 3, 100, 100))
        y, x = start + v // 2 - 20 + 20
        field[:, :, y : y + 40, x : x + 40] = finite_differences(grids, z[None], 40)[0]
        field = field[:, :, 20:-20, 20:-20]
        inside = np.zeros((60, 60))
        inside[2 * coarse[0] : 2 * coarse[0] + v, 2 * coarse[1] : 2 * coarse[1] + v] = 1.0
        fields.append((field * inside).reshape(8, -1))
    zero = np.zeros(1, np.int64)
    (ya, xa), (yb, xb) = (np.ascontiguousarray(p[:, None]) for p in places)
    found = kernels.cross_blocks(tangents[0], zero, ya, xa, tangents[1], zero, yb, xb)[0]
    expected = fields[0] @ fields[1].T
    scale = np.outer(*(np.sqrt((f**2).sum(1)) for f in fields))
    np.testing.assert_allclose(found / scale, expected / scale, atol=0.02)


def test_widths_hold_what_matters_of_the_light(general):
    grids, renderer, _ = general
    rng = np.random.default_rng(5)
    latent = rng.normal(0, 0.5, (40, 8)).astype(np.float32)
    latent[:, 2], latent[:, 5] = rng.uniform(-2, 3, 40), rng.uniform(-1.5, 3, 40)
    cell = np.zeros(40, np.int64)
    mixture = grids.mixture(latent)
    part = 1e-4
    widths = grids.choose(mixture.weight, mixture.covariance, cell, np.full((40, 3), 0.1), part)
    assert len(np.unique(widths)) > 2
    whole = 0.1 * observed(grids, latent, 64) ** 2
    for squares, width in zip(whole, widths, strict=True):
        if width < 64:
            outside = squares.sum() - square(squares, width).sum()
            # Gaussians count as centred and round, so that it is no more than an estimate.
            assert outside < 4 * max(1.0, part * squares.sum())


# Systems


def random_system(rng, n, length, pairs, prior=1.0):
    """Blocks of a positive definite matrix whose sources overlap in pairs, and the dense matrix."""
    data = {}
    matrix = np.zeros((n, length, n, length))
    for i in range(n):
        matrix[i, :, i] = prior * np.eye(length)
    for i, j in [*((i, i) for i in range(n)), *pairs]:
        # Pixels that both see.
        a, b = rng.normal(size=(2, 3 * length, length))
        b = 0.7 * a + 0.3 * b
        matrix[i, :, i] += a.T @ a
        if i != j:
            matrix[j, :, j] += b.T @ b
            data[i, j] = a.T @ b
            matrix[i, :, j] += a.T @ b
            matrix[j, :, i] += b.T @ a
    block = np.stack([matrix[i, :, i] for i in range(n)])
    cross = np.stack([data[p] for p in map(tuple, pairs)]) if len(pairs) else np.zeros((0, length, length))
    return block, cross, matrix.reshape(n * length, n * length)


@pytest.mark.parametrize("n", [5, groups_module._DIRECT, groups_module._DIRECT + 1, 60])
def test_steps_solve_the_whole_system(n):
    rng = np.random.default_rng(n)
    length = 4
    pairs = np.array([*((i, i + 1) for i in range(n - 1)), *((i, i + 2) for i in range(n - 2))])
    # Some alone, and a pair, besides the chain.
    shift = 2
    pairs = np.concatenate([pairs + shift, [[n + shift + 1, n + shift + 2]]])
    total = n + shift + 3
    block, cross, dense = random_system(rng, total, length, pairs)
    gradient = rng.normal(size=(total, length)) * 10.0 ** rng.uniform(-2, 3, (total, 1))
    system = GaussNewton(gradient, block, pairs, cross)
    assert len(system.members) == shift + 3
    change, gain = system.step(np.zeros(total))
    expected = np.linalg.solve(dense, gradient.ravel()).reshape(total, length)
    scale = np.abs(expected).max()
    rounding = 1e-3 if n > groups_module._DIRECT else 1e-9
    np.testing.assert_allclose(change, expected, atol=rounding * scale)
    np.testing.assert_allclose(gain.sum(), (gradient * expected).sum(), rtol=1e-3)
    damping = np.full(total, 0.3)
    damped = dense.copy()
    damped[np.diag_indices_from(damped)] *= 1.3
    expected = np.linalg.solve(damped, gradient.ravel()).reshape(total, length)
    np.testing.assert_allclose(system.step(damping)[0], expected, atol=1e-3 * np.abs(expected).max())


def test_covariances_are_blocks_of_the_inverse_over_the_neighbours():
    rng = np.random.default_rng(8)
    pairs = np.array([[0, 1], [1, 2], [3, 4], [3, 5], [4, 5]])
    block, cross, dense = random_system(rng, 7, 3, pairs)
    found = GaussNewton(np.zeros((7, 3)), block, pairs, cross).covariances()
    for i in range(7):
        own = [i, *(int(p.sum() - i) for p in pairs if i in p)]
        index = np.concatenate([3 * j + np.arange(3) for j in own])
        expected = np.linalg.inv(dense[np.ix_(index, index)])[:3, :3]
        np.testing.assert_allclose(found[i], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(found[i], found[i].T)


def test_what_is_not_positive_definite_has_no_covariance():
    block = np.stack([np.diag([1.0, -2.0]), np.eye(2), np.eye(2), np.eye(2)])
    pairs, cross = np.array([[1, 2]]), 3.0 * np.eye(2)[None]
    found = GaussNewton(np.zeros((4, 2)), block, pairs, cross).covariances()
    assert np.isnan(found[:3]).all()
    np.testing.assert_array_equal(found[3], np.eye(2))
    block[1] = np.nan
    found = GaussNewton(np.zeros((4, 2)), block, pairs, cross).covariances()
    assert np.isnan(found[:3]).all()
    np.testing.assert_array_equal(found[3], np.eye(2))


def test_what_happens_in_one_group_changes_nothing_in_another():
    rng = np.random.default_rng(9)
    n, length = 40, 4
    pairs = np.array([(i, i + 1) for i in range(n - 1) if i not in (3, 5, 7, 22)])
    block, cross, _ = random_system(rng, n, length, pairs)
    gradient = rng.normal(size=(n, length))
    before = GaussNewton(gradient, block, pairs, cross).step(np.zeros(n), 0.5)[0]
    groups = connected_groups(n, pairs)
    for spoil in ("large", "nan", "singular", "indefinite"):
        for touched in (0, 5, 6, 10, 30):
            other_gradient, other_block = gradient.copy(), block.copy()
            if spoil == "large":
                other_gradient[touched] *= 1e8
            elif spoil == "nan":
                other_block[touched], other_gradient[touched] = np.nan, np.nan
            elif spoil == "singular":
                other_block[touched], other_gradient[touched] = 0.0, 0.0
            else:
                other_block[touched] *= -1.0
            system = GaussNewton(other_gradient, other_block, pairs, cross)
            after = system.step(np.zeros(n), 0.5)[0]
            rest = groups != groups[touched]
            np.testing.assert_array_equal(after[rest], before[rest])
            if spoil == "nan":
                assert np.isnan(after[~rest]).all()


@pytest.mark.parametrize("n", [2, 6, 30])
def test_long_steps_are_held_back_and_the_neighbours_know(n):
    rng = np.random.default_rng(20 + n)
    pairs = np.array([(i, i + 1) for i in range(n - 1)])
    for _ in range(20):
        block, cross, dense = random_system(rng, n, 5, pairs, prior=2.0)
        # Data that tell little of some directions.
        gradient = rng.normal(size=(n, 5))
        gradient[0] *= 10.0 ** rng.uniform(0, 4)
        system = GaussNewton(gradient, block, pairs, cross)
        free = np.linalg.norm(system.step(np.zeros(n))[0], axis=1)
        longest = 0.3 * free.max()
        change, gain = system.step(np.zeros(n), longest)
        length = np.linalg.norm(change, axis=1)
        assert length.max() < 1.3 * longest
        # It is the solution of a system with larger diagonals: what is left of the equations points along the
        # step, for those that were held back, and is nothing for all others.
        left = gradient - (dense @ change.ravel()).reshape(n, 5)
        held = np.linalg.norm(left, axis=1) > 1e-2 * np.linalg.norm(gradient, axis=1).max()
        assert held.any()
        cosine = (left * change).sum(1)[held] / np.linalg.norm(left[held], axis=1) / length[held]
        assert cosine.min() > 0.99


def test_connected_pairs_are_found_as_by_trying_them_all():
    rng = np.random.default_rng(4)
    for n, least in itertools.product((0, 1, 2, 30, 150), (1, 4)):
        width = rng.choice([16, 24, 40, 64], n)
        start = rng.integers(-30, 300, (n, 2))
        stop = start + width[:, None]
        expected = [
            (i, j)
            for i, j in itertools.combinations(range(n), 2)
            if (np.minimum(stop[i], stop[j]) - np.maximum(start[i], start[j]) >= least).all()
        ]
        found = overlapping_pairs(start, width, least)
        np.testing.assert_array_equal(found, np.array(expected, np.int64).reshape(-1, 2))


# Prior


@pytest.mark.parametrize("radius", [0.5, 0.99, 1.01, 1.5, 4.0])
def test_the_prior_is_differentiated(radius):
    rng = np.random.default_rng(3)
    latent = rng.normal(size=(6, 8))
    latent *= radius * 1.5 * np.sqrt(8) / np.linalg.norm(latent, axis=1, keepdims=True)
    slope, curvature = prior_derivatives(latent, 2.0, 1.5)
    h = 1e-4
    for i, unit in enumerate(np.eye(8)):
        up, down = latent + h * unit, latent - h * unit
        expected = (prior_penalty(up, 2.0, 1.5) - prior_penalty(down, 2.0, 1.5)) / (4 * h)
        np.testing.assert_allclose(slope[:, i], expected, rtol=1e-5, atol=1e-5)
        expected = (prior_derivatives(up, 2.0, 1.5)[0] - prior_derivatives(down, 2.0, 1.5)[0]) / (2 * h)
        np.testing.assert_allclose(curvature[:, i], expected, rtol=1e-5, atol=1e-5)


def test_the_prior_at_the_origin():
    slope, curvature = prior_derivatives(np.zeros((2, 8)), 2.0, 1.5)
    np.testing.assert_array_equal(slope, 0.0)
    np.testing.assert_array_equal(curvature, np.tile(2.0 * np.eye(8), (2, 1, 1)))


# Fluxes


def test_fluxes_are_the_best_that_are_not_negative():
    rng = np.random.default_rng(11)
    for _ in range(30):
        k = int(rng.integers(1, 9))
        design = rng.uniform(0, 1, (2, 60, k)) * rng.uniform(0.5, 2, (2, 60, 1))
        truth = rng.normal(2, 5, (2, k))
        data = np.einsum("bpk,bk->bp", design, truth) + rng.normal(0, 0.1, (2, 60))
        normal = np.einsum("bpi,bpj->bij", design, design)
        rhs = np.einsum("bpi,bp->bi", design, data)
        flux, error = joint_fluxes(normal, rhs, np.full((2, k), np.nan), 1e-4)
        assert (flux >= 0).all() and (error > 0).all()
        # Conditions of Karush, Kuhn and Tucker.
        slope = rhs - np.einsum("bij,bj->bi", normal, flux)
        scale = np.sqrt(np.diagonal(normal, axis1=1, axis2=2))
        np.testing.assert_allclose((slope / scale)[flux > 0], 0.0, atol=1e-4)
        assert ((slope / scale)[flux == 0] <= 1e-4).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e300])
def test_fluxes_of_data_that_are_no_data_raise_nothing(wrong):
    rng = np.random.default_rng(12)
    design = rng.uniform(0, 1, (2, 60, 4))
    normal = np.einsum("bpi,bpj->bij", design, design)
    rhs = np.einsum("bpi,bp->bi", design, rng.normal(0, 1, (2, 60)))
    good = joint_fluxes(normal, rhs, np.full((2, 4), np.nan), 1e-4)
    rhs[1, 2] = wrong
    flux, error = joint_fluxes(normal, rhs, np.full((2, 4), np.nan), 1e-4)
    np.testing.assert_array_equal(flux[0], good[0][0])
    np.testing.assert_array_equal(error[0], good[1][0])


def test_sources_in_one_place_have_fluxes():
    """Whose matrix is singular, and may have an eigenvalue below zero by rounding."""
    rng = np.random.default_rng(13)
    for k in (2, 5, 40):
        shape = rng.uniform(0, 1, 60)
        design = np.repeat(shape[:, None], k, 1) + 1e-9 * rng.normal(size=(60, k))
        normal, rhs = (design.T @ design)[None], (design.T @ (50 * shape))[None]
        for prior in (np.full((1, k), np.nan), rng.uniform(-5, 5, (1, k))):
            flux, error = joint_fluxes(normal, rhs, prior, 1e-4)
            np.testing.assert_allclose(flux.sum(), 50.0, rtol=0.02)
            assert (flux >= 0).all() and np.isfinite(error).all()


# Kernels


@pytest.fixture
def pixels():
    """Image, weights with holes, stamps of two widths, and places of squares within and over the border."""
    rng = np.random.default_rng(17)
    image = rng.normal(0, 3, (BANDS, *SHAPE)).astype(np.float32)
    weight = rng.uniform(0.5, 2, image.shape).astype(np.float32)
    weight[rng.random(weight.shape) < 0.1] = 0.0
    pools = {w: rng.normal(0, 1, (12, BANDS, w, w)).astype(np.float32) for w in (16, 24)}
    slots = {w: rng.permutation(12)[: len(STARTS)] for w in pools}
    return rng, image, weight, pools, slots


def pasted(stamp, y, x):
    """A stamp on an empty scene, in double precision."""
    size = stamp.shape[-1]
    out = np.zeros((*stamp.shape[:-2], SHAPE[0] + 600, SHAPE[1] + 600))
    out[..., y + 300 : y + 300 + size, x + 300 : x + 300 + size] = stamp
    return out[..., 300:-300, 300:-300]


def places(starts=STARTS):
    return tuple(np.ascontiguousarray(np.array(starts).T.astype(np.int64)))


def test_models_are_subtracted(pixels):
    rng, image, weight, pools, slots = pixels
    scale = rng.normal(0, 2, (len(STARTS), BANDS))
    scale[3, 1] = 0.0
    residual = image.copy()
    change = kernels.shift(residual, weight, pools[16], slots[16], *places(), scale)
    expected = image.astype(float)
    for k, (y, x) in enumerate(STARTS):
        before = (weight * expected**2).sum()
        expected = expected - pasted(pools[16][slots[16][k]] * scale[k][:, None, None], y, x)
        np.testing.assert_allclose(change[k], (weight * expected**2).sum() - before, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(residual, expected, atol=2e-5)


@pytest.mark.parametrize(("old", "new"), [(16, 24), (24, 16), (16, 16)])
def test_models_are_exchanged(pixels, old, new):
    rng, image, weight, pools, slots = pixels
    s, t = rng.normal(0, 2, (2, len(STARTS), BANDS))
    residual = image.copy()
    wide = max(old, new)
    change = kernels.exchange(
        residual, weight, pools[old], slots[old], t, pools[new], slots[new], s, *places()
    )
    expected = image.astype(float)
    for k, (y, x) in enumerate(STARTS):
        before = (weight * expected**2).sum()
        more = square(pools[new][slots[new][k]].astype(float), wide) * s[k][:, None, None]
        more = more - square(pools[old][slots[old][k]].astype(float), wide) * t[k][:, None, None]
        expected = expected - pasted(more, y, x)
        np.testing.assert_allclose(change[k], (weight * expected**2).sum() - before, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(residual, expected, atol=2e-5)


def test_weights_are_softened_in_squares(pixels):
    rng, image, weight, _, _ = pixels
    residual = (image + rng.normal(0, 5, image.shape)).astype(np.float32)
    soft = weight.copy()
    kernels.soften(soft, weight, image, residual, *places(), 16, 0.3)
    touched = sum(pasted(np.ones((16, 16)), y, x) for y, x in STARTS) > 0
    expected = weight / (1.0 + weight * 0.09 * (image.astype(float) - residual) ** 2)
    np.testing.assert_allclose(soft[:, touched], expected[:, touched], rtol=1e-5)
    np.testing.assert_array_equal(soft[:, ~touched], weight[:, ~touched])


def test_squares_are_cut(pixels):
    _, image, weight, _, _ = pixels
    both = kernels.weighted_residual(image, weight, *places(), 24)
    one = kernels.cut(image, *places(), 24)
    truth = kernels.cut(weight > 0, *places(), 24)
    assert truth.dtype == bool
    around = np.pad(image, ((0, 0), (300, 300), (300, 300)))
    heavy = np.pad(weight, ((0, 0), (300, 300), (300, 300)))
    for k, (y, x) in enumerate(STARTS):
        own = (slice(None), slice(y + 300, y + 324), slice(x + 300, x + 324))
        np.testing.assert_array_equal(one[k], around[own])
        np.testing.assert_array_equal(both[k], around[own] * heavy[own])
        np.testing.assert_array_equal(truth[k], heavy[own] > 0)


@pytest.mark.parametrize("stride", [1, 2])
def test_coarse_pixels_hold_sums_of_weights(pixels, stride):
    _, _, weight, _, _ = pixels
    found = kernels.coarse_weights(weight, *places(), 8, stride)
    heavy = np.pad(weight, ((0, 0), (300, 300), (300, 300)))
    size = 8 * stride
    for k, (y, x) in enumerate(STARTS):
        own = heavy[:, y + 300 : y + 300 + size, x + 300 : x + 300 + size]
        expected = own.reshape(BANDS, 8, stride, 8, stride).sum((2, 4))
        np.testing.assert_allclose(found[k], expected, rtol=1e-6)


def test_sums_over_products(pixels):
    _, image, weight, pools, slots = pixels
    own, seen, data = kernels.moments_of_products(image, weight, pools[24], slots[24], *places())
    for k, (y, x) in enumerate(STARTS):
        stamp = pasted(pools[24][slots[24][k]], y, x)
        np.testing.assert_allclose(own[k], (stamp**2 * weight).sum((1, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(seen[k], (stamp**2 * (weight > 0)).sum((1, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(data[k], (stamp * weight * image).sum((1, 2)), rtol=1e-4, atol=1e-3)
    shifted = [(y + 5, x - 3) for y, x in STARTS]
    found = kernels.products(weight, pools[16], slots[16], *places(shifted), pools[24], slots[24], *places())
    for k, ((ya, xa), (yb, xb)) in enumerate(zip(shifted, STARTS, strict=True)):
        expected = pasted(pools[16][slots[16][k]], ya, xa) * pasted(pools[24][slots[24][k]], yb, xb) * weight
        np.testing.assert_allclose(found[k], expected.sum((1, 2)), rtol=1e-4, atol=1e-3)


def test_cross_blocks_are_sums_over_what_two_squares_share():
    rng = np.random.default_rng(19)
    one, other = rng.normal(size=(4, 2, 3, 8, 8)), rng.normal(size=(5, 2, 3, 12, 12))
    one, other = one.astype(np.float32), other.astype(np.float32)
    a, b = rng.integers(0, 4, 30), rng.integers(0, 5, 30)
    ya, xa, yb, xb = rng.integers(-12, 12, (4, 30))
    found = kernels.cross_blocks(one, a, ya, xa, other, b, yb, xb)
    some = 0
    for k in range(30):
        fields = []
        for stamp, y, x in ((one[a[k]], ya[k], xa[k]), (other[b[k]], yb[k], xb[k])):
            field = np.zeros((2, 3, 60, 60))
            field[:, :, y + 20 : y + 20 + stamp.shape[-1], x + 20 : x + 20 + stamp.shape[-1]] = stamp
            fields.append(field)
        expected = np.einsum("biyx,bjyx->ij", *fields)
        some += expected.any()
        np.testing.assert_allclose(found[k], expected, rtol=1e-4, atol=1e-4)
    assert 5 < some < 30


def test_signal_is_summed_inside_of_widths(pixels):
    rng, _, weight, pools, slots = pixels
    scale = rng.uniform(0.5, 3, (len(STARTS), BANDS))
    widths = np.array([8, 16, 20, 40])
    found = kernels.signal_inside(weight, pools[24], slots[24], *places(), scale, widths)
    for k, (y, x) in enumerate(STARTS):
        stamp = pools[24][slots[24][k]] * scale[k][:, None, None]
        for w, width in enumerate(widths):
            inside = square(square(stamp, min(width, 24)), 24) if width < 24 else stamp
            expected = (pasted(inside, y, x) ** 2 * weight).sum()
            np.testing.assert_allclose(found[k, w], expected, rtol=1e-4, atol=1e-5)


def test_diagnostics_of_sources(pixels):
    rng, image, weight, pools, slots = pixels
    n = len(STARTS)
    scale, inverse = rng.normal(0, 2, (n, BANDS)), rng.uniform(0.5, 2, (n, BANDS))
    total, valid = rng.normal(0, 3, image.shape).astype(np.float32), weight > 0
    found = kernels.diagnostics(image, weight, valid, total, pools[16], slots[16], *places(), scale, inverse)
    own, mixed, whole, seen, chi2, foreign = found
    for k, (y, x) in enumerate(STARTS):
        stamp = pools[16][slots[16][k]] * scale[k][:, None, None]
        model, positive = pasted(stamp, y, x), pasted(np.maximum(stamp, 0), y, x)
        bands = inverse[k][:, None, None]
        np.testing.assert_allclose(own[k], (model**2 * bands).sum(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mixed[k], (model * total * bands).sum(), rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(whole[k], np.maximum(stamp, 0).sum((1, 2)), rtol=1e-4)
        np.testing.assert_allclose(seen[k], (positive * valid).sum((1, 2)), rtol=1e-4, atol=1e-5)
        expected = (positive * image**2 * weight * valid).sum()
        np.testing.assert_allclose(chi2[k], expected, rtol=1e-4, atol=1e-3)
        square = (model**2 * weight * valid).sum((1, 2))
        others = (model * (total - model) * weight * valid).sum((1, 2))
        expected = np.where(square > 0, others / np.where(square > 0, square, 1), 0)
        np.testing.assert_allclose(foreign[k], expected, rtol=1e-3, atol=1e-3)


# Stamps


def test_stamps_remember_what_was_given_last():
    rng = np.random.default_rng(23)
    stamps, expected = Stamps(2), {}
    for _ in range(300):
        what = rng.integers(0, 4)
        if what == 0 or not len(stamps):
            stamps.extend(int(rng.integers(1, 4)))
        elif what == 1:
            rows = np.flatnonzero(rng.random(len(stamps)) < 0.2)
            stamps.clear(rows)
            for row in rows:
                expected.pop(int(row), None)
        else:
            rows = rng.permutation(len(stamps))[: rng.integers(1, 6)]
            width = int(rng.choice([4, 6, 10]))
            images = rng.normal(size=(len(rows), 2, width, width)).astype(np.float32)
            stamps.set(rows, images)
            expected |= {int(row): image for row, image in zip(rows, images, strict=True)}
        width = np.array([expected[r].shape[-1] if r in expected else 0 for r in range(len(stamps))])
        np.testing.assert_array_equal(stamps.width, width)
        seen = 0
        for w, index in stamps.by_width(np.arange(len(stamps))):
            pool = stamps.pool(w)
            assert len(np.unique(stamps.slot[index])) == len(index)
            for row, image in zip(index.tolist(), stamps.images(index), strict=True):
                np.testing.assert_array_equal(image, expected[row])
                np.testing.assert_array_equal(pool[stamps.slot[row]], expected[row])
            seen += len(index)
        assert seen == len(expected)
    # Places are used again.
    assert sum(len(stamps.pool(w)) for w in (4, 6, 10)) < 3 * max(len(stamps), 10)


def test_no_stamps_are_no_stamps():
    stamps = Stamps(2)
    stamps.extend(2)
    stamps.set(np.empty(0, np.int64), np.empty((0, 2, 8, 8), np.float32))
    assert not list(stamps.by_width(np.arange(2)))
