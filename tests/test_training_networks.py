# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decoder, losses and encoder against analytic results."""

import galsim
import numpy as np
import pytest
import torch
from lsst.meas.vaedeblend.simulation.config import NetworkConfig
from lsst.meas.vaedeblend.simulation.galaxies import MODEL_SIGMA
from lsst.meas.vaedeblend.training.losses import flux_loss, kl_divergence, shape_chi2
from lsst.meas.vaedeblend.training.networks import Deblender, Decoder, Encoder


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder(3, 64, NetworkConfig()).eval()


def test_gaussians_are_those_of_galsim(decoder, monkeypatch):
    """One elliptical Gaussian, conformal shear 0.4 at 30 degrees, against GalSim with PSF and pixel."""
    sigma, eta, beta = 2.5, 0.4, np.pi / 6
    latent = torch.zeros(1, 32)
    with torch.no_grad():
        numbers = {name: torch.zeros_like(values) for name, values in decoder._numbers(latent).items()}
        # All of the flux in the first of the free Gaussians.
        numbers["share"].view(1, -1, 3)[:, decoder.profiles] = 40.0
        numbers["free_centre"][0, :2] = torch.tensor([1.3, -0.7]) / decoder.free_reach
        numbers["free_log_radius"][0, 0] = np.log(sigma)
        numbers["free_eta"][0, :2] = torch.tensor([eta * np.cos(2 * beta), eta * np.sin(2 * beta)])
        monkeypatch.setattr(decoder, "_numbers", lambda latent: numbers)
        shape = decoder.shape(latent)
        drawn = shape.morphology[0, 1].numpy()
        flux = decoder(latent)[0, 1].numpy().sum() / drawn.sum()
    assert flux == pytest.approx(np.exp(decoder.log_flux_offset), rel=1e-5)
    profile = galsim.Gaussian(sigma=sigma).shear(eta=eta, beta=beta * galsim.radians)
    profile = galsim.Convolve(profile, galsim.Gaussian(sigma=MODEL_SIGMA)).shift(1.3, -0.7)
    expected = profile.drawImage(nx=65, ny=65, scale=1.0).array[:64, :64]
    # The pixel enters as its variance only: the difference is of fourth order.
    assert np.abs(drawn - expected).max() < 2e-3 * expected.max()


def test_morphology_has_unit_flux_and_model_its_flux(decoder):
    latent = torch.randn(20, 32) * 0.5
    with torch.no_grad():
        shape, model = decoder.shape(latent), decoder(latent)
    total = shape.morphology.sum((2, 3))
    assert (total < 1.01).all() and (total > 0.8).all()
    assert (shape.morphology >= 0).all()
    torch.testing.assert_close(model.sum((2, 3)), total * torch.exp(shape.log_flux), rtol=1e-4, atol=0.0)


def test_extreme_latents_stay_finite(decoder):
    with torch.no_grad():
        assert torch.isfinite(decoder(torch.randn(50, 32) * 20)).all()


def test_chi2_in_fourier_space_is_that_of_convolved_pixels():
    """By Parseval, and with the amplitude that a direct least-squares fit gives."""
    generator = np.random.default_rng(0)
    model, target = (generator.random((2, 3, 16, 16)) for _ in range(2))
    kernel = generator.random((2, 3, 16, 16))
    kernel_ft = np.fft.rfft2(kernel)
    noise = generator.uniform(0.5, 2.0, (2, 3))
    m, t = (np.fft.irfft2(np.fft.rfft2(a) * kernel_ft) for a in (model, target))
    amplitude = (m * t).sum((2, 3)) / (m * m).sum((2, 3))
    expected = ((amplitude[..., None, None] * m - t) ** 2).sum((2, 3)) / noise**2
    found = shape_chi2(*(torch.from_numpy(a) for a in (model, target, np.abs(kernel_ft) ** 2, noise)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_chi2_does_not_see_the_amplitude_of_a_band():
    target = torch.rand(1, 2, 16, 16)
    power = torch.rand(1, 2, 16, 9)
    scaled = target * torch.tensor([3.0, 0.2])[None, :, None, None]
    assert shape_chi2(scaled, target, power, torch.ones(1, 2)).max() < 1e-6


def test_kl_divergence_by_hand():
    """Mean (1, 0), sigma (1, 2): 1/2 + (4 - 1 - 2 ln 2) / 2."""
    value = kl_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    assert value.item() == pytest.approx(0.5 + (3 - 2 * np.log(2)) / 2, rel=1e-6)


def test_flux_loss_is_in_units_of_the_error():
    """Where the light is bright the error is the floor's 5 percent; without light it is that of the noise."""
    noise = torch.tensor([[1.0]])
    value = flux_loss(torch.log(torch.tensor([[1e5]])) + 0.05, torch.tensor([[1e5]]), noise)
    assert value.item() == pytest.approx(0.5, rel=1e-4)
    # A small flux, in units of the noise of 40 pixels, where there is none; the floor adds a percent.
    value = flux_loss(torch.log(torch.tensor([[0.1 * 40**0.5]])), torch.tensor([[0.0]]), noise)
    assert value.item() == pytest.approx(0.5 * 0.1**2 / 1.01, rel=2e-3)


def test_flux_loss_is_finite_without_light_and_far_off():
    log_flux = torch.tensor([[-80.0, 0.0, 25.0, 90.0]], requires_grad=True)
    flux_loss(log_flux, torch.tensor([[1e7, 0.0, 0.0, 0.0]]), torch.ones(1, 4)).sum().backward()
    assert torch.isfinite(log_flux.grad).all() and log_flux.grad[0, 2] > 0


def test_encoder_scales_with_masked_pixels_and_batch():
    torch.manual_seed(1)
    config = NetworkConfig()
    module = Deblender(Encoder(3, 64, config), Decoder(3, 64, config)).eval()
    image = torch.randn(4, 3, 64, 64) * 5
    valid = torch.ones_like(image)
    valid[:, :, :20] = 0
    noise, moments = torch.ones(4, 3), torch.tensor([2.0, 2.0, 0.0]).expand(4, 3, 3)
    epsilon = torch.zeros(4, 32)
    with torch.no_grad():
        together = module(image, valid, noise, moments, epsilon)
        garbage = torch.where(valid > 0, image, torch.full_like(image, 1e6))
        masked = module(garbage, valid, noise, moments, epsilon)
        single = module(*(a[1:2] for a in (image, valid, noise, moments, epsilon)))
    torch.testing.assert_close(masked, together)
    torch.testing.assert_close(single[1], together[1][1:2], rtol=1e-4, atol=1e-5)
    assert (together[2] > 0).all()
