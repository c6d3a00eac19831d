# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The posterior of the refinement against a long sampled chain, and the memory that the procedure takes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import synthetic
from lsst.meas.vaedeblend.deblender import DeblendConfig, deblend
from lsst.meas.vaedeblend.deblender._procedure import _deblend
from lsst.meas.vaedeblend.deblender._state import State
from lsst.meas.vaedeblend.inference.prior import prior_penalty

WIDTH, WALKERS, STEPS = 24, 48, 450


@pytest.mark.parametrize(
    ("x", "flux"), [([40.2], [[370, 420, 340]]), ([38.2, 43.7], [[500, 560, 470], [470, 430, 540]])]
)
def test_widths_are_those_of_a_sampled_chain(gaussian_network, x, flux):
    y = [40.3, 41.6][: len(x)]
    scene, _ = synthetic.make_scene(x, y, flux, 1.1, shape=(84, 84), one_parent=True, psf_sigma=1.6)
    # What the chain knows of: noise and prior, nothing else.
    config = DeblendConfig(
        refinementModelError=0.0,
        fluxSystematic=0.0,
        neighbourError=0.0,
        posteriorScale=1.0,
        subtractSky=False,
        findNewPeaks=False,
    )
    state = State(scene, gaussian_network, config)
    result = _deblend(state, None)
    k, length = result.sources.latent_mean.shape
    assert not result.sources.flags["no_convergence"].any()
    snr = result.sources.flux / result.sources.flux_err
    assert (snr > 20).all() and (snr < 80).all()
    rows, grids = np.arange(k), state.drawing.grids
    start = state.start(rows, WIDTH)
    cell = np.zeros(WALKERS * k, np.int64)

    def evaluate(latent):
        """Minus twice the log posterior of (N, K, L), and fluxes (N, K, B)."""
        drawn, mixture = grids.draw(latent.reshape(-1, length).astype(np.float32), cell, WIDTH)
        own = mixture.weight.sum(2, dtype=np.float64)
        drawn = (drawn * own[:, :, None, None]).reshape(WALKERS, k, 3, WIDTH, WIDTH)
        left = np.tile(scene.image.astype(np.float64), (WALKERS, 1, 1, 1))
        for i, (y0, x0) in enumerate(start):
            left[:, :, y0 : y0 + WIDTH, x0 : x0 + WIDTH] -= drawn[:, i]
        chi2 = (left**2).sum((1, 2, 3))
        prior = prior_penalty(latent.reshape(-1, length), config.refinementPrior, config.refinementWall)
        return chi2 + prior.reshape(WALKERS, k).sum(1), own.reshape(WALKERS, k, -1)

    rng = np.random.default_rng(5)
    half = np.linalg.cholesky(state.rows.covariance[rows].astype(float))

    def scatter(scale):
        return scale * np.einsum("kij,nkj->nki", half, rng.normal(size=(WALKERS, k, length)))

    now = result.sources.latent_mean.astype(float) + scatter(1.0)
    cost, own = evaluate(now)
    chain, accepted = [], 0
    for step in range(STEPS):
        other = now + scatter(2.0 / np.sqrt(k * length))
        new_cost, new_own = evaluate(other)
        take = np.log(rng.random(WALKERS)) < 0.5 * (cost - new_cost)
        now[take], cost[take], own[take] = other[take], new_cost[take], new_own[take]
        accepted += take.mean() / STEPS
        if step >= STEPS // 4:
            chain.append(own.copy())
    assert 0.1 < accepted < 0.7
    sampled = np.array(chain).reshape(-1, k, 3)
    np.testing.assert_allclose(result.sources.flux_err, sampled.std(0), rtol=0.15)
    pull = (result.sources.flux - sampled.mean(0)) / sampled.std(0)
    assert np.abs(pull).max() < 0.5


def test_memory_grows_by_a_fraction_of_a_megabyte_per_object(gaussian_network):
    rng = np.random.default_rng(2)
    peaks = {}
    for n in (60, 300):
        x, y = rng.uniform(10, 590, (2, n))
        flux = 10 ** rng.uniform(2, 4, (n, 1)) * np.ones(3)
        scene, _ = synthetic.make_scene(x, y, flux, 1.2, shape=(600, 600))
        config = DeblendConfig(findNewPeaks=False, batchSize=16)
        if not peaks:
            deblend(scene, gaussian_network, config)
        tracemalloc.start()
        result = deblend(scene, gaussian_network, config)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(result.sources) == n
    # In three bands: models of at most 64 x 64 pixels, 0.05 MB, twice, derivatives, and what goes with them.
    assert (peaks[300] - peaks[60]) / 240 < 0.12e6
    # The scene and its weights, residual and cutouts.
    assert peaks[60] < 8 * scene.image.nbytes
