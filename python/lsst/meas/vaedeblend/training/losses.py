# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a network is trained for."""

from __future__ import annotations

__all__ = [
    "LossTerms",
    "bernoulli_loss",
    "evidence_loss",
    "flux_loss",
    "kl_divergence",
    "logarithmic",
    "shape_chi2",
]

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class LossTerms(NamedTuple):
    """The loss of each sample, (N,), and its parts; those that a loss does not have are 0."""

    total: Tensor
    chi2: Tensor
    flux: Tensor
    kl: Tensor


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """Divergence of N(mean, sigma^2) from the standard normal prior, (N,) (Kingma & Welling 2013, app. B)."""
    return 0.5 * (mean.square() + sigma.square() - 1.0 - 2.0 * torch.log(sigma)).sum(dim=1)


def shape_chi2(morphology: Tensor, target: Tensor, power: Tensor, noise: Tensor) -> Tensor:
    """Chi-square of the shape in the observed frame, with the amplitude of each band profiled out.

    Errors of flux would drown the gradient of the shape, so each band's model
    is scaled by the factor that fits the target best, held constant in the
    gradient. The sum over pixels of a convolved image is a sum over
    frequencies of the unconvolved one (Parseval), so no image is convolved.

    Parameters
    ----------
    morphology : `torch.Tensor`, (N, B, S, S)
        Model in the model frame, any scale.
    target : `torch.Tensor`, (N, B, S, S)
        Truth in the model frame, nJy.
    power : `torch.Tensor`, (N, B, S, S // 2 + 1)
        Squared modulus of the difference kernel's transform.
    noise : `torch.Tensor`, (N, B)
        nJy per pixel.

    Returns
    -------
    chi2 : `torch.Tensor`, (N, B)
    """
    size = morphology.shape[-1]
    # The half-plane transform of real images holds every frequency but those of the first and the last column
    # twice.
    weight = power * (1.0 / size**2)
    weight = torch.cat([weight[..., :1], 2.0 * weight[..., 1:-1], weight[..., -1:]], dim=-1)
    model_ft, target_ft = torch.fft.rfft2(morphology), torch.fft.rfft2(target)
    with torch.no_grad():
        cross = (weight * (model_ft.real * target_ft.real + model_ft.imag * target_ft.imag)).sum((2, 3))
        auto = (weight * (model_ft.real.square() + model_ft.imag.square())).sum((2, 3))
        amplitude = (cross / auto.clamp(min=1e-20)).clamp(min=0.0)[:, :, None, None]
    difference = amplitude * model_ft - target_ft
    chi2 = (weight * (difference.real.square() + difference.imag.square())).sum((2, 3))
    return chi2 / noise.square()


def flux_loss(log_flux: Tensor, target_flux: Tensor, noise: Tensor, area: float = 40.0) -> Tensor:
    """Error of the fluxes in units of their uncertainty, robust to outliers; (N, B).

    The uncertainty b is that of a matched filter over ``area`` square pixels in
    background noise, with a floor of 5 percent, so that the flux of bright
    sources does not rule the loss. Fluxes are compared as asinh(F / 2 b) (Lupton et al. 1999,
    https://doi.org/10.1086/301004): as logarithms where they are bright, and linearly in the noise, where a
    band without light asks for a flux of 0 and a logarithm would not care.
    """
    softening = 2.0 * area**0.5 * noise
    target = target_flux / softening
    sigma = torch.sqrt(0.25 / (1.0 + target.square()) + 0.05**2)
    # A bound well above any flux, where the exponential is still finite.
    model = torch.exp(log_flux.clamp(max=40.0)) / softening
    error = (torch.asinh(model) - torch.asinh(target)) / sigma
    return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=2.0)


def evidence_loss(
    log_flux: Tensor,
    morphology: Tensor,
    mean: Tensor,
    sigma: Tensor,
    target: Tensor,
    target_flux: Tensor,
    power: Tensor,
    noise: Tensor,
    kl_weight: float,
    flux_weight: float,
) -> LossTerms:
    """Robust form of the paper's eq. 6: a reconstruction term and beta times the divergence from the prior.

    5 log(1 + chi2 / 10) equals chi2 / 2, minus a Gaussian log-likelihood, for good models, and grows slowly
    for bad ones, so that a few bright galaxies do not outweigh the others.
    """
    chi2 = shape_chi2(morphology, target, power, noise).sum(dim=1)
    flux = flux_loss(log_flux, target_flux, noise).sum(dim=1)
    kl = kl_divergence(mean, sigma)
    total = 5.0 * torch.log1p(chi2 / 10.0) + flux_weight * flux + kl_weight * kl
    return LossTerms(total, chi2, flux, kl)


def bernoulli_loss(
    logits: Tensor, target: Tensor, mean: Tensor, sigma: Tensor, kl_weight: float, exposures: int = 1
) -> LossTerms:
    """The paper's equation 6: beta times the divergence from the prior, minus a Bernoulli log-likelihood.

    Parameters
    ----------
    logits : `torch.Tensor`, (N K, B, S, S)
        Of the expected pixels.
    target : `torch.Tensor`, (N, B, S, S)
        Normalised truth, below 1. Noise of real images takes some of it below 0 (see below).
    mean, sigma : `torch.Tensor`, (N K, L)
        The approximate posterior.
    kl_weight : `float`
        Beta.
    exposures : `int`, optional
        Number K of successive samples that show one blend; the mean of their expected pixels is compared with
        the truth.

    Notes
    -----
    The sum over all pixels and bands. The entropy of the target, a constant of the data, is subtracted, so
    that a perfect image has a loss of 0 and progress is seen in the log.

    The likelihood is linear in the target, so that noise of the target has no effect in the mean, provided
    that it is not clipped at 0: what would be left is a halo, which makes models rounder and brighter
    (doc/experiments/011). Only the entropy, which changes no gradient, takes negative pixels for 0.

    A model that has the least error for each noisy image is a compromise between the image and the mean
    galaxy: faint galaxies come out too round. The error of the mean over exposures holds all of this bias
    but only 1 / K of the variance, which gives shapes without that shrinkage for K large (the mean square
    bias of Tewes et al. 2019, https://doi.org/10.1051/0004-6361/201833775).
    """
    n = len(logits) // exposures
    target = target.clamp(max=1.0)
    light = target.clamp(min=0.0)
    entropy = -(torch.xlogy(light, light) + torch.xlogy(1.0 - light, 1.0 - light))
    if exposures == 1:
        cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    else:
        # In logarithms, which keep their digits where pixels are nearly 0 or 1.
        logits = logits.unflatten(0, (n, exposures))
        log_p, log_q = (functional.logsigmoid(x).logsumexp(1) for x in (logits, -logits))
        cross = math.log(exposures) - target * log_p - (1.0 - target) * log_q
    kl = kl_divergence(mean, sigma).unflatten(0, (n, exposures)).mean(1)
    none = torch.zeros_like(kl)
    return LossTerms((cross - entropy).sum((1, 2, 3)) + kl_weight * kl, none, none, kl)


def logarithmic(loss: Tensor, knee: float) -> Tensor:
    """Let large losses count by their logarithm, (N,): knee log(1 + loss / knee), and themselves below 0.

    The function grows with the loss, so what is best for each galaxy stays best, the balance of
    reconstruction and divergence included. Only the weights of galaxies in a gradient change: in the mean of
    a Bernoulli loss, a sum over pixels, few bright galaxies outweigh all others.

    Parameters
    ----------
    loss : `torch.Tensor`, (N,)
        Below 0 only where the truth has noise.
    knee : `float`
        Loss above which the logarithm sets in.
    """
    return torch.where(loss > 0, knee * torch.log1p(loss.clamp(min=0.0) / knee), loss)
