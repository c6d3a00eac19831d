# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Closed-form derivatives of the decoder against automatic differentiation."""

import pytest

torch = pytest.importorskip("torch")

from lsst.meas.vaedeblend.simulation.config import NetworkConfig  # noqa: E402
from lsst.meas.vaedeblend.simulation.galaxies import MODEL_SIGMA  # noqa: E402
from lsst.meas.vaedeblend.training.derivatives import DecoderJacobian  # noqa: E402
from lsst.meas.vaedeblend.training.networks import Decoder, Encoder  # noqa: E402


@pytest.fixture
def decoder():
    torch.manual_seed(3)
    config = NetworkConfig()
    config.latent_size, config.rungs, config.free_gaussians = 5, 3, 2
    decoder = Decoder(2, 16, config).eval()
    # Weights as they come hardly move anything; those of a trained decoder do.
    with torch.no_grad():
        decoder.hidden[-1].weight *= 10
        decoder.skip.weight *= 5
    return decoder.requires_grad_(False)


def test_images_agree_with_automatic_differentiation(decoder):
    latent = torch.randn(4, 5)
    # Through the PSF of the model frame the observed image is the decoder's own.
    variance = MODEL_SIGMA**2 + 1 / 12
    moments = torch.tensor([variance, variance, 0.0]).expand(4, 2, 3)
    line = torch.arange(16.0) - 8
    found = DecoderJacobian(decoder)(latent, moments, line, line)[0]
    expected = torch.func.vmap(torch.func.jacfwd(lambda z: decoder(z[None])[0]))(latent)
    expected = expected.permute(0, 1, 4, 2, 3)
    scale = expected.abs().amax((1, 2, 3, 4), keepdim=True)
    assert ((found - expected).abs() / scale).max() < 1e-5


def test_a_wider_psf_and_another_grid(decoder):
    latent = torch.randn(2, 5)
    moments = torch.tensor([4.0, 3.0, 0.5]).expand(2, 2, 3)
    jacobian = DecoderJacobian(decoder)
    line = torch.arange(41.0) - 20
    whole = jacobian(latent, moments, line, line)[0]
    part = jacobian(latent, moments, line[10:20], line[15:22])[0]
    tolerance = 1e-5 * float(whole.abs().max())
    torch.testing.assert_close(part, whole[..., 15:22, 10:20], rtol=1e-4, atol=tolerance)


def test_parameters_are_those_of_the_image(decoder):
    latent = 0.3 * torch.randn(3, 5)
    jacobian = DecoderJacobian(decoder)
    line = torch.arange(161.0) - 80
    moments = torch.tensor([2.0, 2.0, 0.0]).expand(3, 2, 3)
    _, values, slopes = jacobian(latent, moments, line, line)
    decoder.size = 161
    y, x = torch.meshgrid(line, line, indexing="ij")
    x, y = x.flatten(), y.flatten()
    decoder.basis = torch.stack([x * x, x * y, y * y, x, y, torch.ones_like(x)])
    image = decoder(latent).double().flatten(2)
    flux = image.sum(2)
    torch.testing.assert_close(values[..., 0].double(), torch.log(flux), rtol=1e-3, atol=1e-3)
    mx, my = (image * x).sum(2) / flux, (image * y).sum(2) / flux
    torch.testing.assert_close(values[..., 1].double(), mx, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(values[..., 2].double(), my, rtol=1e-2, atol=1e-2)
    extra = MODEL_SIGMA**2 + 1 / 12
    dx, dy = x - mx[..., None], y - my[..., None]
    second = [(image * q).sum(2) / flux for q in (dx * dx, dy * dy, dx * dy)]
    for k, (moment, offset) in enumerate(zip(second, (extra, extra, 0.0), strict=True)):
        torch.testing.assert_close(values[..., 3 + k].double(), moment - offset, rtol=2e-2, atol=2e-2)
    expected = torch.func.vmap(
        torch.func.jacfwd(lambda z: jacobian(z[None], moments[:1], line[:1], line[:1])[1][0])
    )(latent)
    torch.testing.assert_close(slopes, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_other_latents_draw_the_same(decoder):
    matrix, offset = torch.randn(5, 5) + 3 * torch.eye(5), torch.randn(5)
    latent = torch.randn(6, 5)
    before = decoder(latent @ matrix.T + offset)
    decoder.transform_latents(matrix, offset)
    torch.testing.assert_close(decoder(latent), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_the_encoder_answers_in_other_latents():
    torch.manual_seed(1)
    config = NetworkConfig()
    config.latent_size, config.widths = 5, [8, 8, 8]
    encoder = Encoder(2, 32, config).eval().requires_grad_(False)
    batch = torch.randn(3, 2, 32, 32), torch.ones(3, 2, 32, 32), torch.ones(3, 2), torch.ones(3, 2, 3)
    before, _ = encoder(*batch)
    matrix, offset = torch.randn(5, 5) + 3 * torch.eye(5), torch.randn(5)
    encoder.transform_latents(matrix, offset)
    after, sigma = encoder(*batch)
    torch.testing.assert_close(after @ matrix.T + offset, before, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(sigma).all() and (sigma > 0).all()
