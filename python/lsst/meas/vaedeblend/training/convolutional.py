# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks of Arcelin et al. (2020), figure 2: convolutions to and from normalised pixels."""

from __future__ import annotations

__all__ = ["ConvolutionalDecoder", "ConvolutionalEncoder", "denormalise", "normalise"]

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..simulation.config import BETA

WIDTHS = (32, 64, 128, 256)
HIDDEN = 256

_SLOPE = 0.3
"""First slope of the rectifiers; with 0 every layer makes all images more alike (doc/experiments/009)."""

_MAX_LOGIT = 14.0
"""Decoded pixels reach 1 - 1e-6, some 250 times the mean maximum; beyond, float32 has no digits left."""


def normalise(image: Tensor, scale: Tensor) -> Tensor:
    """Equation 4, tanh(asinh(y)) with y = beta image / scale; equal to y / sqrt(1 + y^2).

    Parameters
    ----------
    image : `torch.Tensor`, (N, B, S, S)
        nJy.
    scale : `torch.Tensor`, (B,)
        Mean of the images' largest pixels, nJy.
    """
    y = image * (BETA / scale)[:, None, None]
    return y * torch.rsqrt(1.0 + y * y)


def denormalise(logit: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `normalise` for x = sigmoid(logit): nJy.

    y = x / sqrt((1 - x) (1 + x)) = exp(logit) / sqrt(1 + 2 exp(logit)). Sigmoids would do in torch; those of
    onnxruntime have an absolute error, which leaves few digits of 1 - x where pixels are bright.
    """
    odds = torch.exp(logit.clamp(max=_MAX_LOGIT))
    return odds * torch.rsqrt(1.0 + 2.0 * odds) * (scale / BETA)[:, None, None]


class _Rectifier(torch.autograd.Function):
    """`functional.prelu` of flattened maps, whose gradient the library computes slowly on processors."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return functional.prelu(x, slope)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, slope = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(gradient, x, 0.0)
        negative = gradient - positive
        by_x = torch.addcmul(positive, negative, slope) if ctx.needs_input_grad[0] else None
        by_slope = (negative * x).sum(0) if ctx.needs_input_grad[1] else None
        return by_x, by_slope


class _PReLU(nn.Module):
    """Parametric rectifier with a slope for every unit, as Keras has it: what figure 2's counts include."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, _SLOPE))

    def forward(self, x: Tensor) -> Tensor:
        # torch knows one slope per channel: units as channels are much faster than arithmetic on whole maps.
        slope, exporting = self.weight.to(x.dtype), torch.compiler.is_exporting()
        rectify = functional.prelu if exporting else _Rectifier.apply
        last = not exporting and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if last:
            # In the order of memory, which flattens without a copy.
            x, slope = x.permute(0, 2, 3, 1), slope.permute(1, 2, 0)
        y = rectify(x.flatten(1), slope.flatten()).view(x.shape)
        return y.permute(0, 3, 1, 2) if last else y


def _initialise(network: nn.Module) -> None:
    """Weights that keep the variance from layer to layer through rectifiers (He et al. 2015), biases 0.

    The library's defaults lose a factor of about 2.5 in every layer: what is left of the image at the end is
    less than the biases, and hundreds of steps pass before anything is learnt (doc/experiments/006).
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            inputs: float = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):
                # Weights are (in, out, ...), and a stride spreads the kernel over several pixels.
                inputs = layer.weight[:, 0].numel() / layer.stride[0] ** 2
            nn.init.normal_(layer.weight, std=(2.0 / (1.0 + _SLOPE**2) / inputs) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ConvolutionalEncoder(nn.Module):
    """Read a noisy cutout and give the approximate posterior of the central galaxy.

    Parameters
    ----------
    bands : `int`
        Number of bands B.
    size : `int`
        Cutout width S, a multiple of 16.
    latent_size : `int`
        Number L of latent variables.
    """

    inputs = ("image",)
    scale: Tensor

    def __init__(self, bands: int, size: int, latent_size: int):
        super().__init__()
        self.register_buffer("scale", torch.ones(bands))
        layers: list[nn.Module] = []
        channels = bands
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), _PReLU(width, size, size)]
            size //= 2
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), _PReLU(width, size, size)]
            channels = width
        layers += [nn.Flatten(), nn.Linear(channels * size * size, HIDDEN), _PReLU(HIDDEN)]
        self.body = nn.Sequential(*layers)
        self.mean = nn.Linear(HIDDEN, latent_size)
        self.log_sigma = nn.Linear(HIDDEN, latent_size)
        _initialise(self)
        # The posterior starts as a narrow one about what the image says.
        nn.init.zeros_(self.log_sigma.weight)
        nn.init.constant_(self.log_sigma.bias, -2.0)

    def forward(self, image: Tensor, *ignored: Tensor, autocast: torch.dtype | None = None):
        """Encode.

        Parameters
        ----------
        image : `torch.Tensor`, (N, B, S, S)
            nJy.
        *ignored
            Validity, noise and PSF, which are fixed for these networks.
        autocast : `torch.dtype`, optional
            Type in which the convolutions run; that of the weights by default.

        Returns
        -------
        mean, sigma : `torch.Tensor`, (N, L)
            Parameters of the approximate posterior.
        """
        x = normalise(image, self.scale)
        if autocast is None:
            x = self.body(x)
        else:
            with torch.autocast(image.device.type, autocast):
                x = self.body(x)
        x = x.float()
        return self.mean(x), torch.exp(self.log_sigma(x).clamp(-7.0, 2.0))


class ConvolutionalDecoder(nn.Module):
    """Draw a galaxy from latent variables: the mirror image of the encoder.

    Parameters
    ----------
    bands, size, latent_size
        As for `ConvolutionalEncoder`.
    """

    scale: Tensor

    def __init__(self, bands: int, size: int, latent_size: int):
        super().__init__()
        self.register_buffer("scale", torch.ones(bands))
        grid = size // 2 ** len(WIDTHS)
        units = WIDTHS[-1] * grid * grid
        layers: list[nn.Module] = [
            *(nn.Linear(latent_size, HIDDEN), _PReLU(HIDDEN)),
            *(nn.Linear(HIDDEN, units), _PReLU(units)),
            nn.Unflatten(1, (WIDTHS[-1], grid, grid)),
        ]
        channels = WIDTHS[-1]
        for width in reversed(WIDTHS):
            grid *= 2
            layers += [
                nn.ConvTranspose2d(channels, width, 3, stride=2, padding=1, output_padding=1),
                _PReLU(width, grid, grid),
                # A transposed convolution without stride is a convolution with the kernel turned: the same
                # layer to a network that learns its kernels, at half the cost.
                nn.Conv2d(width, width, 3, padding=1),
                _PReLU(width, grid, grid),
            ]
            channels = width
        self.body = nn.Sequential(*layers)
        self.last = nn.Conv2d(channels, bands, 3, padding=1)
        _initialise(self)
        # Most of an image is sky: start there rather than half-way to saturation.
        nn.init.normal_(self.last.weight, std=0.01)
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, -5.0)

    def logits(self, latent: Tensor, autocast: torch.dtype | None = None) -> Tensor:
        """Logits of the Bernoulli distributions of normalised pixels, (N, B, S, S)."""
        if autocast is None:
            return self.last(self.body(latent))
        with torch.autocast(latent.device.type, autocast):
            x = self.body(latent)
        # Single precision for the pixels themselves: bfloat16 has steps of one percent.
        return self.last(x.float())

    def image(self, logits: Tensor) -> Tensor:
        """Images in the observed frame, nJy, of logits."""
        return denormalise(logits, self.scale)

    def forward(self, latent: Tensor) -> Tensor:
        """Images in the observed frame, nJy, (N, B, S, S)."""
        return self.image(self.logits(latent))
