# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derivatives of the Gaussians that the decoder draws, with respect to its latent variables.

The runtime fits latent variables to pixels and needs derivatives of them. A sum of Gaussians has them in
closed form, and what leads from latent variables to Gaussians is a few dense layers followed by functions of
few numbers each. The layers are differentiated forwards, as matrix products; the functions by a matrix of
their own derivatives, most of whose entries are zero or constant. It is what automatic differentiation gives
(the tests compare), as a graph that ONNX can hold.
"""

from __future__ import annotations

__all__ = ["MixtureTangents", "Tangents", "summarise"]

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .networks import Decoder


class Tangents(NamedTuple):
    """The Gaussians of sources, and their derivatives with respect to the latent variables.

    Attributes
    ----------
    log_weight : (N, B, G)
        Natural log of the Gaussians' fluxes in nJy.
    position, covariance : (N, G, 2), (N, G, 3)
        See `lsst.meas.vaedeblend.training.networks.Mixture`.
    d_log_weight, d_position, d_covariance : (N, L, B * G), (N, L, 2 * G), (N, L, 3 * G)
        Derivatives, the Gaussians' axis last.
    """

    log_weight: Tensor
    position: Tensor
    covariance: Tensor
    d_log_weight: Tensor
    d_position: Tensor
    d_covariance: Tensor


class MixtureTangents(nn.Module):
    """Latent variables to Gaussians and their derivatives.

    Parameters
    ----------
    decoder : `lsst.meas.vaedeblend.training.networks.Decoder`
        Its weights are used, not copied.
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        k, r, f, b = decoder.profiles, decoder.rungs, decoder.free, decoder.bands
        gaussians, parts = k * r + f, k + f
        starts, at = {}, 0
        for name, size in decoder._sizes.items():
            starts[name], at = at, at + size
        # The part (profile or free Gaussian) that each Gaussian belongs to.
        part = torch.tensor([g // r if g < k * r else k + g - k * r for g in range(gaussians)])
        member = (part[None] == torch.arange(parts)[:, None]).float()  # (parts, G)

        def numbers(*names: str) -> list[int]:
            return [starts[n] + i for n in names for i in range(decoder._sizes[n])]

        # Weights: rows of log_flux, ladder and share, columns (B, G).
        self._weights = torch.tensor(numbers("log_flux", "ladder", "share"))
        own_band = torch.eye(b)[:, :, None].expand(b, b, gaussians)
        rung = torch.zeros(k * r, b, gaussians)
        profile = torch.zeros(k * r, b, gaussians)
        for row in range(k * r):
            rung[row, :, row] = 1.0
            profile[row, :, (row // r) * r : (row // r + 1) * r] = 1.0
        in_band = torch.eye(b)[None, :, :, None]
        share = (member[:, None, None] * in_band).reshape(parts * b, b, gaussians)
        whole = in_band.expand(parts, b, b, gaussians).reshape(parts * b, b, gaussians)
        fixed = torch.cat([own_band, rung, share]).reshape(-1, b * gaussians)
        spread = torch.cat([torch.zeros(b, b, gaussians), profile, whole]).reshape(-1, b * gaussians)
        self.register_buffer("weight_fixed", fixed, False)
        self.register_buffer("weight_spread", spread, False)
        # Positions: rows of centre and free_centre, columns (2, G).
        self._positions = torch.tensor(numbers("centre", "free_centre"))
        slope = torch.zeros(2 + 2 * f, 2, gaussians)
        for axis in range(2):
            slope[axis, axis] = 1.0
            for i in range(f):
                slope[2 + 2 * i + axis, axis, k * r + i] = decoder.free_reach
        self.register_buffer("position_slope", slope.reshape(-1, 2 * gaussians), False)
        # Covariances: for each part its size and the two components of its ellipticity, columns (3, G).
        sizes = numbers("log_radius", "free_log_radius")
        shapes = torch.tensor(numbers("eta", "free_eta")).reshape(parts, 2)
        self._covariances = torch.cat([torch.tensor(sizes), shapes[:, 0], shapes[:, 1]])
        self.register_buffer("member", member[None, None, :, None], False)

    def forward(self, latent: Tensor) -> Tangents:
        """Differentiate.

        Parameters
        ----------
        latent : `torch.Tensor`, (N, L)

        Returns
        -------
        tangents : `Tangents`
        """
        d = self.decoder
        n, k, r, f, b = latent.shape[0], d.profiles, d.rungs, d.free, d.bands
        value, slope = self._numbers(latent)
        p = dict(zip(d._sizes, value.split(list(d._sizes.values()), 1), strict=True))
        share = torch.log_softmax(p["share"].view(n, k + f, b), 1)
        ladder = torch.log_softmax(p["ladder"].view(n, k, r), 2)
        rungs = share[:, :k, None] + ladder[..., None]
        log_weight = torch.cat([rungs.reshape(n, k * r, b), share[:, k:]], 1).transpose(1, 2)
        log_weight = log_weight + (p["log_flux"] + d.log_flux_offset)[:, :, None]
        # The derivative of a log softmax: the unit matrix minus the softmax, in every row the same.
        mean = torch.cat([torch.zeros_like(p["log_flux"]), ladder.flatten(1), share.flatten(1)], 1).exp()
        local = self.weight_fixed - mean[:, :, None] * self.weight_spread
        d_log_weight = slope[:, :, self._weights] @ local
        centre = p["centre"].view(n, 1, 2)
        free = centre + d.free_reach * p["free_centre"].view(n, f, 2)
        position = torch.cat([centre.expand(-1, k * r, -1), free], 1)
        d_position = slope[:, :, self._positions] @ self.position_slope
        covariance, local = self._covariance(p)
        d_covariance = slope[:, :, self._covariances] @ local
        return Tangents(log_weight, position, covariance, d_log_weight, d_position, d_covariance)

    def _numbers(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the dense layers (N, Q), and its derivatives (N, L, Q)."""
        d = self.decoder
        value, slope = latent, None
        for layer in d.hidden:
            if isinstance(layer, nn.Linear):
                value = layer(value)
                # The derivatives of the latent variables themselves are the unit matrix.
                slope = layer.weight.T[None] if slope is None else slope @ layer.weight.T
            else:
                s = torch.sigmoid(value)
                slope = slope * (s * (1.0 + value * (1.0 - s)))[:, None]
                value = value * s
        return value + d.skip(latent), slope + d.skip.weight.T

    def _covariance(self, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """sigma^2 exp(H(eta)), see `Decoder.gaussians`: (N, G, 3), and local derivatives (N, 3 parts, 3
        G)."""
        d = self.decoder
        n, k, r, f = p["centre"].shape[0], d.profiles, d.rungs, d.free

        def spread(profiles: Tensor, free: Tensor) -> Tensor:
            """Numbers of parts to numbers of Gaussians, (N, G)."""
            return torch.cat([profiles[:, :, None].expand(-1, -1, r).reshape(n, -1), free], 1)

        # Sizes, with the decoder's limits; beyond them they do not depend on the latent variables any more.
        raw = spread(p["log_radius"], p["free_log_radius"])
        upper = torch.cat([torch.full((k * r,), 4.0), torch.full((f,), 3.5)])
        offset = torch.cat([(d.log_radius_offset + d.ladder).expand(k, -1).reshape(-1), torch.zeros(f)])
        log_sigma = torch.minimum(raw.clamp(min=-4.0), upper) + offset
        free_to_move = (raw > -4.0) & (raw < upper) & (log_sigma > -4.0) & (log_sigma < 4.5)
        scale = torch.exp(2.0 * log_sigma.clamp(-4.0, 4.5))
        eta, free_eta = p["eta"].view(n, k, 2), p["free_eta"].view(n, f, 2)
        e1, e2 = (spread(eta[..., i], free_eta[..., i]) for i in range(2))
        modulus = torch.sqrt(e1 * e1 + e2 * e2 + 1e-8)
        bounded = modulus.clamp(max=4.0)
        cosh, sinh = torch.cosh(bounded), torch.sinh(bounded)
        ratio = sinh / modulus
        shape = torch.stack([cosh + ratio * e1, ratio * e2, cosh - ratio * e1], 1)
        covariance = shape * scale[:, None]
        moving = (modulus < 4.0).to(scale.dtype)
        # d(modulus) / d(eta) = eta / modulus.
        columns = [2.0 * covariance * free_to_move.to(scale.dtype)[:, None]]
        d_ratio = (cosh * moving - ratio) / modulus
        for own, first in ((e1, 1.0), (e2, 0.0)):
            u = own / modulus
            d_cosh, dr = sinh * moving * u, d_ratio * u
            r1, r2 = dr * e1 + ratio * first, dr * e2 + ratio * (1.0 - first)
            columns.append(torch.stack([d_cosh + r1, r2, d_cosh - r1], 1) * scale[:, None])
        # (N, size or eta, part, component, Gaussian)
        local = torch.stack(columns, 1)[:, :, None] * self.member
        return covariance.transpose(1, 2), local.reshape(n, 3 * (k + f), -1)


def summarise(tangents: Tangents) -> tuple[Tensor, Tensor]:
    """Log flux, centroid and second moments in each band, and their derivatives.

    Parameters
    ----------
    tangents : `Tangents`

    Returns
    -------
    parameters : `torch.Tensor`, (N, B, 6)
        Natural log of the flux in nJy, centroid (x, y) from the target's pixel, and the intrinsic second
        moments Ixx, Iyy, Ixy, pixel^2, without PSF and pixel and without weight function.
    jacobian : `torch.Tensor`, (N, B, 6, L)
        Their derivatives with respect to the latent variables.
    """
    weight, (n, b, g) = tangents.log_weight, tangents.log_weight.shape
    x, y = tangents.position.unbind(2)
    xx, xy, yy = tangents.covariance.unbind(2)
    log_flux = torch.logsumexp(weight, 2)
    share = torch.exp(weight - log_flux[..., None])
    # Flux-weighted means over the Gaussians of 1, x, y and the three second moments about the target's pixel.
    of_gaussians = torch.stack([torch.ones_like(x), x, y, xx + x * x, yy + y * y, xy + x * y], 1)
    mean = share @ of_gaussians.transpose(1, 2)
    mx, my = mean[..., 1], mean[..., 2]
    values = torch.stack(
        [log_flux, mx, my, mean[..., 3] - mx * mx, mean[..., 4] - my * my, mean[..., 5] - mx * my], 2
    )
    # Derivatives with respect to log weights: share times what each Gaussian adds to the mean.
    own = share[:, :, None] * (of_gaussians[:, None] - mean[..., None])
    own = torch.cat([share[:, :, None], own[:, :, 1:]], 2)
    length = tangents.d_log_weight.shape[1]
    d_weight = tangents.d_log_weight.reshape(n, length, b, g).transpose(1, 2)
    slopes = own @ d_weight.transpose(2, 3)
    nothing, one = torch.zeros_like(x), torch.ones_like(x)
    along = torch.stack(
        [
            torch.cat([nothing, nothing, nothing, nothing, nothing], 1),
            torch.cat([one, nothing, nothing, nothing, nothing], 1),
            torch.cat([nothing, one, nothing, nothing, nothing], 1),
            torch.cat([2.0 * x, nothing, one, nothing, nothing], 1),
            torch.cat([nothing, 2.0 * y, nothing, nothing, one], 1),
            torch.cat([y, x, nothing, one, nothing], 1),
        ],
        1,
    )
    geometry = torch.cat([tangents.d_position, tangents.d_covariance], 2).transpose(1, 2)
    slopes = slopes + (along[:, None] * share.repeat(1, 1, 5)[:, :, None]) @ geometry[:, None]
    # Second moments are about the centroid.
    sx, sy = slopes[:, :, 1], slopes[:, :, 2]
    tx, ty = mx[..., None], my[..., None]
    central = [
        slopes[:, :, 3] - 2.0 * tx * sx,
        slopes[:, :, 4] - 2.0 * ty * sy,
        slopes[:, :, 5] - tx * sy - ty * sx,
    ]
    return values, torch.cat([slopes[:, :, :3], torch.stack(central, 2)], 2)
