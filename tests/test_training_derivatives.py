# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Closed-form derivatives of the decoder, and the graphs for fitting, against automatic differentiation."""

import pytest

torch = pytest.importorskip("torch")

from lsst.meas.vaedeblend.simulation.config import NetworkConfig  # noqa: E402
from lsst.meas.vaedeblend.simulation.galaxies import MODEL_SIGMA  # noqa: E402
from lsst.meas.vaedeblend.training.derivatives import MixtureTangents, summarise  # noqa: E402
from lsst.meas.vaedeblend.training.fitting import Linearise, Render  # noqa: E402
from lsst.meas.vaedeblend.training.networks import MODEL_VARIANCE, Decoder, Encoder, Mixture  # noqa: E402

WIDTH, GRID = 16, 28


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


def derivative(function, latent):
    """Of a function of single latents, by automatic differentiation: the latents' axis last."""
    return torch.func.vmap(torch.func.jacfwd(lambda z: function(z[None])[0]))(latent)


def transform(width=WIDTH, size=GRID):
    """The Fourier transform of squares that are padded with zeros, as the graphs take it, by brute force."""
    unit = torch.eye(width)
    k, f = size // 2 + 1, size
    spectrum = torch.fft.rfft(unit, size)
    columns = torch.cat([spectrum.real, spectrum.imag], 1)
    spectrum = torch.fft.fft(unit, size).T
    rows = torch.cat(
        [torch.cat([spectrum.real, -spectrum.imag], 1), torch.cat([spectrum.imag, spectrum.real], 1)], 0
    )
    # The inverse transforms, of unit vectors in real and imaginary parts.
    real, imaginary = torch.eye(f).to(torch.complex64), 1j * torch.eye(f).to(torch.complex64)
    columns_of = torch.cat([torch.fft.ifft(real, dim=0), torch.fft.ifft(imaginary, dim=0)], 1)[:width]
    back_rows = torch.cat([columns_of.real, columns_of.imag], 0)
    halves = torch.cat([torch.eye(k).to(torch.complex64), 1j * torch.eye(k).to(torch.complex64)], 0)
    back_columns = torch.fft.irfft(halves, size)[:, :width]
    return columns, rows, back_rows, back_columns


def kernels(cells=2, bands=2, size=GRID):
    """Random kernels without any symmetry that reach 6 pixels, and their transforms (C, 2, B, F, K)."""
    image = torch.zeros(cells, bands, size, size)
    image[:, :, :7, :7] = torch.rand(cells, bands, 7, 7)
    image = torch.roll(image, (-2, -4), (2, 3))
    spectrum = torch.fft.rfft2(image)
    return image, torch.stack([spectrum.real, spectrum.imag], 1)


@pytest.fixture
def inputs():
    """What both graphs take besides latents, for three sources in two cells."""
    torch.manual_seed(7)
    line = torch.arange(float(WIDTH)) - WIDTH // 2
    image, spectrum = kernels()
    common = dict(zip(("columns", "rows", "back_rows", "back_columns"), transform(), strict=True))
    return image, {"kernels": spectrum, "cell": torch.tensor([1, 0, 1]), "x": line, "y": line, **common}


def observed(decoder, image, cell, latent):
    """Images in nJy of sources, convolved pixel by pixel with the kernels of their cells."""
    model = decoder(latent)
    out = torch.zeros_like(model)
    for dy in range(-2, 5):
        for dx in range(-4, 3):
            shifted = torch.nn.functional.pad(model, (8, 8, 8, 8))[..., 8 - dy : 24 - dy, 8 - dx : 24 - dx]
            out = out + image[cell][:, :, dy % GRID, dx % GRID][..., None, None] * shifted
    return out


def close(found, expected, tolerance):
    """Within a part of the largest number of each source."""
    scale = expected.flatten(1).abs().amax(1).view(-1, *[1] * (expected.ndim - 1))
    assert found.shape == expected.shape
    assert ((found - expected).abs() / scale).max() < tolerance


def test_gaussians_agree_with_automatic_differentiation(decoder):
    latent = torch.randn(4, 5)
    tangents = MixtureTangents(decoder)(latent)
    log_flux, mixture = decoder.gaussians(latent)
    log_weight = torch.log(mixture.weight) + log_flux[..., None]
    close(tangents.log_weight, log_weight, 1e-5)
    close(tangents.position, mixture.position, 1e-5)
    close(tangents.covariance, mixture.covariance, 1e-5)

    def log_weights(z):
        log_flux, mixture = decoder.gaussians(z)
        return (torch.log(mixture.weight) + log_flux[..., None]).flatten(1)

    close(tangents.d_log_weight.transpose(1, 2), derivative(log_weights, latent), 1e-5)
    # Numbers of all Gaussians lie one after the other, x before y and xx before xy before yy.
    for name in ("position", "covariance"):
        expected = derivative(
            lambda z, name=name: getattr(decoder.gaussians(z)[1], name).transpose(1, 2).flatten(1), latent
        )
        close(getattr(tangents, f"d_{name}").transpose(1, 2), expected, 1e-5)


def test_limits_of_the_decoder_are_limits_of_the_derivatives(decoder):
    """Latents far out, where radii and ellipticities are bounded."""
    latent = 30 * torch.randn(6, 5)
    numbers = decoder._numbers(latent)
    assert (numbers["log_radius"].abs() > 4.0).any() and (numbers["log_radius"].abs() < 4.0).any()
    assert (numbers["free_log_radius"] > 3.5).any()
    assert (numbers["eta"].view(6, -1, 2).norm(dim=2) > 4.0).any()
    found = MixtureTangents(decoder)(latent)
    expected = derivative(lambda z: decoder.gaussians(z)[1].covariance, latent)
    # Of each Gaussian in proportion to its own size.
    size = (found.covariance[..., 0] + found.covariance[..., 2])[..., None, None]
    slope = found.d_covariance.unflatten(2, (3, -1)).permute(0, 3, 2, 1)
    assert ((slope - expected) / size).abs().max() < 1e-4 * (expected / size).abs().max()


def test_images_are_convolved_with_the_kernel_of_the_cell(decoder, inputs):
    image, common = inputs
    latent = torch.randn(3, 5)
    drawn, *mixture = Render(decoder)(latent, **common)
    mixture = Mixture(*mixture)
    flux = torch.exp(decoder.gaussians(latent)[0])
    torch.testing.assert_close(mixture.weight.sum(2), flux, rtol=1e-4, atol=0.0)
    expected = observed(decoder, image, common["cell"], latent)
    close(drawn * flux[..., None, None], expected, 1e-5)


def test_the_gradient_is_that_of_a_scalar_product(decoder, inputs):
    image, common = inputs
    latent = torch.randn(3, 5)
    weighted = torch.randn(3, 2, WIDTH, WIDTH)
    # The coarse pixels have nothing to do with it.
    coarse = {"weight": torch.zeros(3, 2, 4, 4), "psf_moments": torch.tensor([2.0, 2.0, 0.0]).expand(3, 2, 3)}
    coarse |= {"u": torch.zeros(3, 4), "v": torch.zeros(3, 4)}
    gradient = Linearise(MixtureTangents(decoder))(latent, weighted, **common, **coarse)[0]
    along = latent.clone().requires_grad_(True)
    product = (observed(decoder, image, common["cell"], along) * weighted).sum()
    (expected,) = torch.autograd.grad(product, along)
    close(gradient, expected, 1e-4)


def linearise(decoder, inputs, latent, weight, moments, u, v):
    """The matrices alone, without any residual."""
    nothing = torch.zeros(len(latent), 2, WIDTH, WIDTH)
    common = inputs[1] | {"cell": inputs[1]["cell"][: len(latent)]}
    module = Linearise(MixtureTangents(decoder))
    return module(latent, nothing, **common, weight=weight, psf_moments=moments, u=u, v=v)


def test_derivatives_of_pixels_agree_with_automatic_differentiation(decoder, inputs):
    latent = torch.randn(3, 5)
    # Through the PSF of the model frame the observed image is the decoder's own.
    moments = torch.tensor([MODEL_VARIANCE, MODEL_VARIANCE, 0.0]).expand(3, 2, 3)
    line = (torch.arange(16.0) - 8).expand(3, -1)
    weight = 0.1 + torch.rand(3, 2, 16, 16)
    _, block, tangent, *_ = linearise(decoder, inputs, latent, weight, moments, line, line)
    slope = derivative(decoder, latent).permute(0, 1, 4, 2, 3)
    close(tangent, slope * torch.sqrt(weight)[:, :, None], 1e-5)
    flat = slope.permute(0, 2, 1, 3, 4).flatten(2)
    expected = flat @ (weight.flatten(1)[:, :, None] * flat.transpose(1, 2))
    close(block, expected, 1e-5)
    torch.testing.assert_close(block, block.transpose(1, 2), rtol=1e-4, atol=1e-5 * float(block.abs().max()))


def test_a_wider_psf_and_another_grid(decoder, inputs):
    latent = torch.randn(2, 5)
    moments = torch.tensor([4.0, 3.0, 0.5]).expand(2, 2, 3)
    line = (torch.arange(41.0) - 20).expand(2, -1)
    weight = torch.ones(2, 2, 41, 41)
    whole = linearise(decoder, inputs, latent, weight, moments, line, line)[2]
    u, v = line[:, 10:20], line[:, 15:22]
    part = linearise(decoder, inputs, latent, weight[:, :, 15:22, 10:20], moments, u, v)[2]
    tolerance = 1e-5 * float(whole.abs().max())
    torch.testing.assert_close(part, whole[..., 15:22, 10:20], rtol=1e-4, atol=tolerance)


def test_each_source_has_coarse_pixels_of_its_own(decoder, inputs):
    latent = torch.randn(1, 5).expand(2, -1)
    moments = torch.tensor([4.0, 3.0, 0.5]).expand(2, 2, 3)
    weight = torch.rand(2, 2, 8, 8)
    u = torch.stack([2.0 * torch.arange(8.0) - 7.5, 2.0 * torch.arange(8.0) - 8.5])
    v = u.flip(0)
    together = linearise(decoder, inputs, latent, weight, moments, u, v)
    assert (together[2][0] - together[2][1]).abs().max() > 1e-2 * together[2].abs().max()
    for i in range(2):
        own = slice(i, i + 1)
        alone = linearise(decoder, inputs, latent[own], weight[own], moments[own], u[own], v[own])
        for k in (1, 2):
            tolerance = 1e-5 * float(alone[k].abs().max())
            torch.testing.assert_close(alone[k][0], together[k][i], rtol=1e-4, atol=tolerance)


def test_parameters_are_those_of_the_image(decoder):
    latent = 0.3 * torch.randn(3, 5)
    values, slopes = summarise(MixtureTangents(decoder)(latent))
    line = torch.arange(161.0) - 80
    y, x = torch.meshgrid(line, line, indexing="ij")
    decoder.size, decoder.x, decoder.y = 161, x.flatten(), y.flatten()
    x, y = decoder.x, decoder.y
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
    expected = derivative(lambda z: summarise(MixtureTangents(decoder)(z))[0], latent)
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
