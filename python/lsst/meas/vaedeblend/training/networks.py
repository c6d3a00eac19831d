# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks, in torch: images to latent variables (encoder), latent variables to images (decoder).

All numbers at the borders are physical: images in nJy per pixel, PSF moments
in pixel^2. Every normalisation happens inside.
"""

from __future__ import annotations

__all__ = [
    "LOWEST_EXPONENT",
    "MAX_LOG_FLUX",
    "MODEL_VARIANCE",
    "Deblender",
    "Decoder",
    "Encoder",
    "Mixture",
    "SourceShape",
    "build_networks",
    "draw_gaussians",
]

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..simulation.config import NetworkConfig
from ..simulation.galaxies import MODEL_SIGMA
from .convolutional import ConvolutionalDecoder, ConvolutionalEncoder

_LOG_FLUX_OFFSET = 5.0
"""Natural log of a typical flux in nJy (26.0 mag): latent zeros decode to about this."""


MODEL_VARIANCE = MODEL_SIGMA**2 + 1.0 / 12.0
"""What the model frame's PSF and the pixel add to the variance of a Gaussian, pixel^2."""

MAX_LOG_FLUX = 25.0
"""Bound of the natural log of a flux in nJy, so that latents far out do not overflow."""

LOWEST_EXPONENT = -40.0
"""Bound of a Gaussian's exponent: smaller numbers would lose precision, which makes processors slow."""


class SourceShape(NamedTuple):
    """What the decoder makes of latent variables before drawing.

    Attributes
    ----------
    log_flux : (N, B)
        Natural log of the total flux in nJy.
    morphology : (N, B, S, S)
        Image of a source of unit flux in the model frame; light beyond the cutout makes the sum less than 1.
    """

    log_flux: Tensor
    morphology: Tensor


class Mixture(NamedTuple):
    """The Gaussians of sources.

    Attributes
    ----------
    weight : (N, B, G)
        Flux of each Gaussian, nJy.
    position : (N, G, 2)
        x and y from the target's pixel, pixel.
    covariance : (N, G, 3)
        xx, xy, yy without any PSF, pixel^2.
    """

    weight: Tensor
    position: Tensor
    covariance: Tensor


def draw_gaussians(position: Tensor, covariance: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Draw Gaussians of unit flux in the model frame, whose PSF and pixel add to their covariance.

    Parameters
    ----------
    position, covariance : `torch.Tensor`, (N, G, 2), (N, G, 3)
        See `Mixture`.
    x, y : `torch.Tensor`, (P,)
        Pixels, from the target's.

    Returns
    -------
    maps : `torch.Tensor`, (N, G, P)
    """
    cxx, cxy, cyy = covariance.unbind(-1)
    cxx, cyy = cxx + MODEL_VARIANCE, cyy + MODEL_VARIANCE
    det = cxx * cyy - cxy * cxy
    a, b, c = cyy / det, -cxy / det, cxx / det
    x0, y0 = position.unbind(-1)
    # -1/2 (r - r0)^T C^-1 (r - r0) as coefficients of x^2, xy, y^2, x, y, 1: one matrix product gives every
    # exponent.
    constant = -0.5 * (a * x0 * x0 + 2 * b * x0 * y0 + c * y0 * y0)
    coefficients = torch.stack([-0.5 * a, -b, -0.5 * c, a * x0 + b * y0, b * x0 + c * y0, constant], dim=-1)
    basis = torch.stack([x * x, x * y, y * y, x, y, torch.ones_like(x)])
    maps = torch.exp((coefficients @ basis).clamp(min=LOWEST_EXPONENT))
    return maps * torch.rsqrt(det)[..., None] * (0.5 / math.pi)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.leaky_relu(self.norm1(self.first(x)), 0.1)
        return functional.leaky_relu(x + self.norm2(self.second(y)), 0.1)


def _signed_log(x: Tensor) -> Tensor:
    """sign(x) log(1 + abs(x)): linear in the noise, logarithmic above it, without saturation.

    Like an inverse hyperbolic sine, and several times faster on processors.
    """
    return torch.sign(x) * torch.log1p(torch.abs(x))


_MOMENTS = ("1", "x", "y", "x^2 - y^2", "2 x y", "x^2 + y^2 - 2 s^2")


def _moment_weights(size: int) -> Tensor:
    """Gaussian-weighted moments about the target's pixel at two widths s, unit norm each, (S * S, 2 * 6).

    What flux, position, shape and size mean, given to the network rather than left to be found: without them
    it draws round galaxies for most of its training.
    """
    line = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = (a.flatten() for a in torch.meshgrid(line, line, indexing="ij"))
    columns = []
    for s in (1.5, 4.0):
        gaussian = torch.exp(-0.5 * (x * x + y * y) / s**2)
        for polynomial in (torch.ones_like(x), x, y, x * x - y * y, 2 * x * y, x * x + y * y - 2 * s * s):
            columns.append(gaussian * polynomial)
    weights = torch.stack(columns, dim=1)
    return (weights / weights.square().sum(0).sqrt()).float()


class Encoder(nn.Module):
    """Read a noisy cutout and give the approximate posterior of the central source.

    Pixels enter twice: in units of the noise through a signed logarithm, which
    keeps faint and bright sources apart over many magnitudes, and in units of
    the central brightness, which keeps the profile of a bright source linear.
    Blocks of 4x4 pixels become channels first, so that nothing is computed at
    full resolution. Weighted moments of each band go straight to the last
    layers.

    Parameters
    ----------
    bands : `int`
        Number of bands B.
    size : `int`
        Cutout width S, a multiple of 16.
    config : `NetworkConfig`
    """

    inputs = ("image", "valid", "noise", "psf_moments")
    apertures: Tensor

    def __init__(self, bands: int, size: int, config: NetworkConfig):
        super().__init__()
        w1, w2, w3 = config.widths
        self.bands, self.size = bands, size
        self.stem = nn.Conv2d(2 * bands, w1, 4, stride=4)
        self.stem_valid = nn.Conv2d(bands, w1, 1, bias=False)
        self.condition = nn.Sequential(nn.Linear(4 * bands, 64), nn.LeakyReLU(0.1), nn.Linear(64, w1))
        self.body = nn.Sequential(
            nn.BatchNorm2d(w1),
            _Residual(w1),
            nn.Conv2d(w1, w2, 2, stride=2, bias=False),
            nn.BatchNorm2d(w2),
            nn.LeakyReLU(0.1),
            _Residual(w2),
            nn.Conv2d(w2, w3, 2, stride=2, bias=False),
            nn.BatchNorm2d(w3),
            nn.LeakyReLU(0.1),
            _Residual(w3),
        )
        grid = size // 16
        # Moments of two apertures, then moments of the PSF and the noise, of each band.
        self.moments = 2 * len(_MOMENTS)
        known = (self.moments + 4) * bands
        self.dense = nn.Linear(w3 * grid * grid, config.hidden)
        self.dense2 = nn.Linear(config.hidden + known, config.hidden)
        self.mean = nn.Linear(config.hidden + known, config.latent_size)
        self.log_sigma = nn.Linear(config.hidden, config.latent_size)
        self.register_buffer("apertures", _moment_weights(size), False)

    def forward(
        self,
        image: Tensor,
        valid: Tensor,
        noise: Tensor,
        psf_moments: Tensor,
        autocast: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode.

        Parameters
        ----------
        image, valid : `torch.Tensor`, (N, B, S, S)
            nJy, and 1 where the pixel may be used.
        noise : `torch.Tensor`, (N, B)
            nJy per pixel.
        psf_moments : `torch.Tensor`, (N, B, 3)
            Ixx, Iyy, Ixy, pixel^2.
        autocast : `torch.dtype`, optional
            Type in which the convolutions run; that of the weights by default.

        Returns
        -------
        mean, sigma : `torch.Tensor`, (N, L)
            Parameters of the approximate posterior.
        """
        planes, pooled, known, condition = self.features(image, valid, noise, psf_moments)
        if autocast is None:
            x = self.trunk(planes, pooled, condition)
        else:
            with torch.autocast(image.device.type, autocast):
                x = self.trunk(planes, pooled, condition)
        return self.head(x.float(), known)

    @torch.no_grad()
    def transform_latents(self, matrix: Tensor, offset: Tensor) -> None:
        """Answer in other latent variables: z with ``matrix @ z + offset`` equal to the mean of before.

        The widths of the new variables are those of independent old ones.

        Parameters
        ----------
        matrix : `torch.Tensor`, (L, L)
        offset : `torch.Tensor`, (L,)
        """
        inverse = torch.linalg.inv(matrix)
        self.mean.bias.copy_(inverse @ (self.mean.bias - offset))
        self.mean.weight.copy_(inverse @ self.mean.weight)
        # A typical width is all that a layer of logarithms can take over.
        width = torch.sqrt((inverse.square() * torch.exp(2 * self.log_sigma.bias)).sum(1))
        self.log_sigma.bias.copy_(torch.log(width))
        self.log_sigma.weight.zero_()

    def features(
        self, image: Tensor, valid: Tensor, noise: Tensor, psf_moments: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels normalised, fractions valid, weighted moments with PSF and noise, PSF and noise alone."""
        half = self.size // 2
        scaled = image * valid / noise[:, :, None, None]
        # One matrix product gives every weighted moment in units of its own noise.
        moments = (scaled.flatten(2) @ self.apertures).unflatten(2, (2, len(_MOMENTS)))
        snr = moments[..., :1]
        # The zeroth moment keeps its scale; the others are ratios to it, bounded where it is noise.
        ratios = (moments[..., 1:] / (snr.abs() + 3.0)).clamp(-4.0, 4.0)
        known = torch.cat([_signed_log(snr), ratios], dim=-1).flatten(1)
        centre = scaled[:, :, half - 2 : half + 3, half - 2 : half + 3]
        peak = functional.avg_pool2d(centre, 3, stride=1).amax((1, 2, 3)).clamp(min=3.0)
        linear = (scaled / peak[:, None, None, None]).clamp(-2.0, 2.0)
        ixx, iyy, ixy = psf_moments.unbind(-1)
        trace = (ixx + iyy).clamp(min=1e-3)
        condition = torch.cat(
            [
                torch.log(trace / 4.0),
                4.0 * (ixx - iyy) / trace,
                8.0 * ixy / trace,
                torch.log(noise) - 1.0,
            ],
            dim=1,
        )
        planes = torch.cat([_signed_log(scaled), linear], dim=1)
        return planes, functional.avg_pool2d(valid, 4), torch.cat([known, condition], dim=1), condition

    def trunk(self, planes: Tensor, pooled: Tensor, condition: Tensor) -> Tensor:
        """The convolutions and the first dense layer: nearly all of the cost; may run in bfloat16."""
        x = self.stem(planes) + self.stem_valid(pooled)
        x = x + self.condition(condition)[:, :, None, None]
        return self.dense(self.body(x).flatten(1))

    def head(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The last layers, in float32: fluxes need more digits than bfloat16 has."""
        h = functional.leaky_relu(x, 0.1)
        h = functional.leaky_relu(self.dense2(torch.cat([h, known], dim=1)), 0.1)
        mean = self.mean(torch.cat([h, known], dim=1))
        return mean, torch.exp(self.log_sigma(h).clamp(-7.0, 2.0))


class Decoder(nn.Module):
    """Draw a source from latent variables, as a sum of Gaussians.

    A source is made of a few concentric elliptical profiles, each a ladder of
    Gaussians of fixed relative widths whose weights are free (a multi-Gaussian
    expansion, Emsellem et al. 1994; Sersic profiles need few, Hogg & Lang
    2013), and of free Gaussians for what is neither concentric nor
    elliptical. Each has its own share of each band's flux, so that colour
    gradients are part of the model. Convolution with the model frame's
    Gaussian PSF adds its variance; images are positive and smooth by
    construction, and an error of shape moves few numbers.

    Parameters
    ----------
    bands : `int`
        Number of bands B.
    size : `int`
        Cutout width S, pixel.
    config : `NetworkConfig`
    """

    log_flux_offset = _LOG_FLUX_OFFSET
    log_radius_offset = 0.7
    free_reach = 4.0
    """What the dense layers count from: natural log of a profile's radius, reach of free Gaussians, pixel."""

    ladder: Tensor
    basis: Tensor

    def __init__(self, bands: int, size: int, config: NetworkConfig):
        super().__init__()
        self.bands, self.size = bands, size
        self.profiles, self.rungs, self.free = config.profiles, config.rungs, config.free_gaussians
        parts = self.profiles + self.free
        self._sizes = {
            "log_flux": bands,
            "centre": 2,
            "log_radius": self.profiles,
            "eta": 2 * self.profiles,
            "ladder": self.profiles * self.rungs,
            "free_centre": 2 * self.free,
            "free_log_radius": self.free,
            "free_eta": 2 * self.free,
            "share": parts * bands,
        }
        outputs = sum(self._sizes.values())
        self.skip = nn.Linear(config.latent_size, outputs)
        self.hidden = nn.Sequential(
            nn.Linear(config.latent_size, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            last := nn.Linear(config.hidden, outputs),
        )
        nn.init.normal_(self.skip.weight, std=0.1)
        nn.init.zeros_(self.skip.bias)
        nn.init.normal_(last.weight, std=0.02)
        with torch.no_grad():
            # Free Gaussians start faint: they are for what the profiles cannot draw.
            start = sum(list(self._sizes.values())[:-1])
            bias = self.skip.bias[start:].view(parts, bands)
            bias[self.profiles :] = -4.0
        # Widths relative to the profile's radius: from a cusp to the wings of a de Vaucouleurs profile.
        self.register_buffer("ladder", torch.linspace(math.log(0.12), math.log(4.8), self.rungs), False)
        line = torch.arange(size, dtype=torch.float32) - size // 2
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("x", x.flatten(), False)
        self.register_buffer("y", y.flatten(), False)

    @torch.no_grad()
    def transform_latents(self, matrix: Tensor, offset: Tensor) -> None:
        """Take other latent variables: what was drawn for ``matrix @ z + offset`` is now drawn for z.

        Parameters
        ----------
        matrix : `torch.Tensor`, (L, L)
        offset : `torch.Tensor`, (L,)
        """
        for layer in (self.skip, self.hidden[0]):
            assert isinstance(layer, nn.Linear)
            layer.bias.add_(layer.weight @ offset)
            layer.weight.copy_(layer.weight @ matrix)

    def _numbers(self, latent: Tensor) -> dict[str, Tensor]:
        flat = self.skip(latent) + self.hidden(latent)
        return dict(zip(self._sizes, flat.split(list(self._sizes.values()), dim=1), strict=True))

    def gaussians(self, latent: Tensor) -> tuple[Tensor, Mixture]:
        """Decode to log fluxes and the Gaussians of sources of unit flux.

        The intrinsic covariance is sigma^2 exp(H) with H = [[eta1, eta2],
        [eta2, -eta1]]: area-preserving, with conformal shear eta (Bernstein &
        Jarvis 2002, section 2.2).

        Parameters
        ----------
        latent : `torch.Tensor`, (N, L)

        Returns
        -------
        log_flux : `torch.Tensor`, (N, B)
            Natural log of the total flux in nJy.
        mixture : `Mixture`
            With weights whose sum is 1 in each band.
        """
        p = self._numbers(latent)
        n = latent.shape[0]
        centre = p["centre"].view(n, 1, 2)
        # Profiles: one radius, one ellipse and one set of weights per profile.
        log_radius = self.log_radius_offset + p["log_radius"].clamp(-4.0, 4.0)
        rung_log_sigma = (log_radius[:, :, None] + self.ladder).view(n, -1)
        rung_eta = p["eta"].view(n, self.profiles, 1, 2).expand(-1, -1, self.rungs, -1).reshape(n, -1, 2)
        rung_weight = torch.softmax(p["ladder"].view(n, self.profiles, self.rungs), dim=2)
        free_centre = centre + self.free_reach * p["free_centre"].view(n, self.free, 2)
        log_sigma = torch.cat([rung_log_sigma, p["free_log_radius"].clamp(-4.0, 3.5)], dim=1)
        eta = torch.cat([rung_eta, p["free_eta"].view(n, self.free, 2)], dim=1)
        count = self.profiles * self.rungs
        position = torch.cat([centre.expand(-1, count, -1), free_centre], dim=1)
        # Shares of the band's flux; a profile's share is spread over its ladder.
        share = torch.softmax(p["share"].view(n, self.profiles + self.free, self.bands), dim=1)
        ladder_share = (share[:, : self.profiles, None] * rung_weight[..., None]).view(n, count, self.bands)
        weight = torch.cat([ladder_share, share[:, self.profiles :]], dim=1).transpose(1, 2)
        modulus = torch.sqrt(eta.square().sum(-1) + 1e-8)
        modulus_safe = modulus.clamp(max=4.0)
        scale = torch.exp(2.0 * log_sigma.clamp(-4.0, 4.5))
        cosh, sinh = torch.cosh(modulus_safe), torch.sinh(modulus_safe) / modulus
        covariance = torch.stack(
            [
                scale * (cosh + sinh * eta[..., 0]),
                scale * sinh * eta[..., 1],
                scale * (cosh - sinh * eta[..., 0]),
            ],
            -1,
        )
        return p["log_flux"] + self.log_flux_offset, Mixture(weight, position, covariance)

    def shape(self, latent: Tensor) -> SourceShape:
        """Decode to log fluxes and unit-flux images, latents (N, L)."""
        log_flux, unit = self.gaussians(latent)
        maps = draw_gaussians(unit.position, unit.covariance, self.x, self.y)
        morphology = torch.bmm(unit.weight, maps).view(-1, self.bands, self.size, self.size)
        return SourceShape(log_flux, morphology)

    def forward(self, latent: Tensor) -> Tensor:
        """Images in the model frame, nJy, (N, B, S, S)."""
        shape = self.shape(latent)
        return shape.morphology * torch.exp(shape.log_flux.clamp(max=MAX_LOG_FLUX))[:, :, None, None]


class Deblender(nn.Module):
    """Encoder and decoder, with the outputs of the ONNX contract.

    Attributes
    ----------
    inputs : `tuple` [`str`]
        Names of the inputs in order: those that the encoder reads, then epsilon.
    """

    def __init__(self, encoder: Encoder | ConvolutionalEncoder, decoder: Decoder | ConvolutionalDecoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.inputs = (*encoder.inputs, "epsilon")

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *seen, epsilon = inputs
        mean, sigma = self.encoder(*seen)
        return self.decoder(mean + sigma * epsilon), mean, sigma


def build_networks(bands: int, size: int, config: NetworkConfig) -> tuple[Any, Any]:
    """Make encoder and decoder of the configured architecture.

    Parameters
    ----------
    bands, size : `int`
        Number of bands and width of the cutouts, pixel.
    config : `NetworkConfig`
    """
    if config.architecture == "convolutional":
        arguments = bands, size, config.latent_size
        networks: tuple[Any, Any] = ConvolutionalEncoder(*arguments), ConvolutionalDecoder(*arguments)
    else:
        networks = Encoder(bands, size, config), Decoder(bands, size, config)
    # Convolutions on processors are faster with the channels of a pixel side by side.
    encoder, decoder = (network.to(memory_format=torch.channels_last) for network in networks)
    return encoder, decoder
