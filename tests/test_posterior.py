# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors of fluxes and shapes from the posterior over the latents."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import synthetic
from lsst.meas.vaedeblend.deblender import deblend
from lsst.meas.vaedeblend.posterior import sample_posterior
from lsst.meas.vaedeblend.rendering import StoredImages

VARIANCE = 2  # the synthetic network's latents are x, y, variance, fluxes


@pytest.fixture(scope="module")
def scene():
    return synthetic.make_scene([40.0, 90.0], [50.0, 52.0], [[900, 800, 700], [500, 900, 600]], 1.0)[0]


@pytest.fixture(scope="module")
def sources(scene, network):
    models = copy.deepcopy(deblend(scene, network).sources)
    models.latent_sigma[:] = 0.0
    return models


def with_sigma(models, latent: int, sigma: float):
    wide = models.latent_sigma.copy()
    wide[:, latent] = sigma
    return dataclasses.replace(models, latent_sigma=wide)


def test_a_certain_posterior_adds_nothing(scene, sources, network):
    posterior = sample_posterior(sources, network, scene.psf)
    np.testing.assert_array_equal(posterior.flux, sources.flux)
    np.testing.assert_allclose(posterior.flux_err, sources.flux_err, rtol=1e-4)
    assert (posterior.shape_err < 1e-3 * posterior.shape[:, :1]).all()
    # Round Gaussians: the moments are the latent itself.
    variance = sources.latent_mean[:, VARIANCE]
    np.testing.assert_allclose(posterior.shape[:, 0], variance, rtol=0.02)
    np.testing.assert_allclose(posterior.shape[:, 1], variance, rtol=0.02)
    assert posterior.shape_band == "r"


def test_the_scatter_of_the_size_becomes_that_of_moments_and_fluxes(scene, sources, network):
    sigma = 0.2
    posterior = sample_posterior(with_sigma(sources, VARIANCE, sigma), network, scene.psf, n_samples=400)
    np.testing.assert_allclose(posterior.shape_err[:, :2], sigma, rtol=0.15)
    assert (posterior.shape_err[:, 2] < 1e-3).all()
    # A Gaussian of variance s fitted by one of s + d has 1 + d / (2 s) times its flux, to first order.
    for i, b in ((0, 0), (1, 2)):
        psf = scene.psf.moments[0, b, 0]
        observed = sources.latent_mean[i, VARIANCE] - synthetic.SIGMA**2 + psf
        expected = np.hypot(sources.flux_err[i, b], sources.flux[i, b] * sigma / (2 * observed))
        assert posterior.flux_err[i, b] == pytest.approx(expected, rel=0.15)


def test_a_known_covariance_replaces_the_widths(scene, sources, network):
    sigma = 0.2
    covariance = np.zeros_like(sources.latent_covariance)
    covariance[:, VARIANCE, VARIANCE] = sigma**2
    refined = dataclasses.replace(with_sigma(sources, VARIANCE, 9.0), latent_covariance=covariance)
    posterior = sample_posterior(refined, network, scene.psf, n_samples=400)
    np.testing.assert_allclose(posterior.shape_err[:, :2], sigma, rtol=0.15)
    # Errors of fluxes that were fitted with the shape have it in them already.
    np.testing.assert_array_equal(posterior.flux_err, sources.flux_err)


def test_draws_depend_on_nothing_but_the_source(scene, sources, network):
    wide = with_sigma(sources, VARIANCE, 0.3)
    both = sample_posterior(wide, network, scene.psf)
    rows = {
        field.name: getattr(wide, field.name)[1:]
        for field in dataclasses.fields(wide)
        if isinstance(getattr(wide, field.name), np.ndarray)
    }
    images = StoredImages(wide.model_frame[1:], wide.observed[1:])
    alone = sample_posterior(dataclasses.replace(wide, images=images, **rows), network, scene.psf)
    np.testing.assert_array_equal(both.flux_err[1:], alone.flux_err)
    np.testing.assert_array_equal(both.shape_err[1:], alone.shape_err)


def test_sources_without_a_model_have_no_shape(scene, sources, network):
    failed = dataclasses.replace(
        sources, flux_network=np.where([[True], [False]], np.nan, sources.flux_network)
    )
    posterior = sample_posterior(failed, network, scene.psf)
    assert np.isnan(posterior.shape[0]).all() and np.isfinite(posterior.shape[1]).all()
    np.testing.assert_array_equal(posterior.flux_err[0], sources.flux_err[0])


def test_without_draws_errors_hold_for_given_shapes(scene, sources, network):
    posterior = sample_posterior(with_sigma(sources, VARIANCE, 0.5), network, scene.psf, n_samples=0)
    np.testing.assert_array_equal(posterior.flux_err, sources.flux_err)
    assert np.isnan(posterior.shape_err).all() and np.isfinite(posterior.shape).all()


def test_what_makes_no_sense_is_refused(scene, sources, network):
    for number in (-2, 3):
        with pytest.raises(ValueError, match="even"):
            sample_posterior(sources, network, scene.psf, n_samples=number)
    with pytest.raises(ValueError, match="bands"):
        sample_posterior(dataclasses.replace(sources, bands=("a", "b", "c")), network, scene.psf)
