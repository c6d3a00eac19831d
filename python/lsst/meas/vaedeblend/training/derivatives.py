# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derivatives of what the decoder draws, with respect to its latent variables.

The runtime refines latent variables on the pixels by Gauss-Newton steps and needs the derivative of every
pixel. A sum of Gaussians has them in closed form: the tangent of a Gaussian is itself times a polynomial
of second order. What is written out here by hand, forward through every layer, is what automatic
differentiation gives (the tests compare), as a graph that ONNX can hold.
"""

from __future__ import annotations

__all__ = ["DecoderJacobian"]

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .networks import Decoder


class _Dual(NamedTuple):
    """A quantity (N, ...) and its tangents along the latent variables (N, L, ...)."""

    value: Tensor
    tangent: Tensor

    def times(self, factor: Tensor) -> Tensor:
        """Tangents times a factor with the shape of the value."""
        return self.tangent * factor[:, None]

    def view(self, *shape: int) -> _Dual:
        n, length = self.tangent.shape[:2]
        return _Dual(self.value.reshape(n, *shape), self.tangent.reshape(n, length, *shape))

    def __getitem__(self, index) -> _Dual:
        """Index the axes after the first."""
        index = index if isinstance(index, tuple) else (index,)
        return _Dual(self.value[(slice(None), *index)], self.tangent[(slice(None), slice(None), *index)])


def _cat(duals: list[_Dual], dim: int) -> _Dual:
    """Join along an axis of the values."""
    return _Dual(torch.cat([d.value for d in duals], dim), torch.cat([d.tangent for d in duals], dim + 1))


def _log_softmax(x: _Dual, dim: int) -> _Dual:
    value = torch.log_softmax(x.value, dim)
    mean = x.times(torch.exp(value)).sum(dim + 1, keepdim=True)
    return _Dual(value, x.tangent - mean)


def _clamp(x: _Dual, low: float, high: float) -> _Dual:
    inside = ((x.value > low) & (x.value < high)).to(x.value.dtype)
    return _Dual(x.value.clamp(low, high), x.times(inside))


class _Mixture(NamedTuple):
    """The Gaussians of a source: log of their flux in nJy (B, G), position (G, 2) and covariance (G, 3)
    without any PSF, in the order xx, xy, yy; pixel."""

    log_weight: _Dual
    position: _Dual
    covariance: _Dual


class DecoderJacobian(nn.Module):
    """Derivatives of observed images and of catalogued parameters with respect to the latent variables.

    Parameters
    ----------
    decoder : `lsst.meas.vaedeblend.training.networks.Decoder`
        Its weights are used, not copied.

    Notes
    -----
    The PSF is taken as the Gaussian with its adaptive moments. Residuals are computed with the PSF itself, so
    that this only changes the direction of a step, hardly where steps end.
    """

    inputs = ("latent", "psf_moments", "x", "y")
    outputs = ("image_jacobian", "parameters", "parameter_jacobian")

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def _numbers(self, latent: Tensor) -> dict[str, _Dual]:
        """Output of the dense layers, by name."""
        d = self.decoder
        value, tangent = latent, None
        for layer in d.hidden:
            if isinstance(layer, nn.Linear):
                value = layer(value)
                # The tangents of the latent variables themselves are the unit matrix.
                tangent = layer.weight.T[None] if tangent is None else tangent @ layer.weight.T
            else:
                s = torch.sigmoid(value)
                tangent = tangent * (s * (1.0 + value * (1.0 - s)))[:, None]
                value = value * s
        value, tangent = value + d.skip(latent), tangent + d.skip.weight.T[None]
        sizes = list(d._sizes.values())
        parts = zip(d._sizes, value.split(sizes, 1), tangent.split(sizes, 2), strict=True)
        return {name: _Dual(v, t) for name, v, t in parts}

    def _mixture(self, latent: Tensor) -> _Mixture:
        d = self.decoder
        p = self._numbers(latent)
        k, r, f, b = d.profiles, d.rungs, d.free, d.bands
        n, length = latent.shape
        # Weights: the share of the part, spread over the rungs of a profile, times the flux.
        share = _log_softmax(p["share"].view(k + f, b), 1)
        ladder = _log_softmax(p["ladder"].view(k, r), 2)
        rungs = _Dual(
            share.value[:, :k, None] + ladder.value[..., None],
            share.tangent[:, :, :k, None] + ladder.tangent[..., None],
        )
        weight = _cat([rungs.view(k * r, b), share[k:]], 1)
        flux = p["log_flux"]
        weight = _Dual(
            weight.value + flux.value[:, None] + d.log_flux_offset, weight.tangent + flux.tangent[:, :, None]
        )
        weight = _Dual(weight.value.transpose(1, 2), weight.tangent.transpose(2, 3))
        # Positions.
        centre, free = p["centre"].view(1, 2), p["free_centre"].view(f, 2)
        position = _cat(
            [
                _Dual(
                    centre.value.expand(n, k * r, 2),
                    centre.tangent.expand(n, length, k * r, 2),
                ),
                _Dual(centre.value + d.free_reach * free.value, centre.tangent + d.free_reach * free.tangent),
            ],
            1,
        )
        # Sizes and ellipticities; the limits are the decoder's.
        radius = _clamp(p["log_radius"], -4.0, 4.0)
        sigma = _Dual(
            (d.log_radius_offset + radius.value[:, :, None] + d.ladder).reshape(n, -1),
            radius.tangent[..., None].expand(-1, -1, -1, r).reshape(n, length, -1),
        )
        sigma = _clamp(_cat([sigma, _clamp(p["free_log_radius"], -4.0, 3.5)], 1), -4.0, 4.5)
        profile_eta = p["eta"].view(k, 1, 2)
        eta = _cat(
            [
                _Dual(
                    profile_eta.value.expand(-1, -1, r, -1).reshape(n, k * r, 2),
                    profile_eta.tangent.expand(-1, -1, -1, r, -1).reshape(n, length, k * r, 2),
                ),
                p["free_eta"].view(f, 2),
            ],
            1,
        )
        return _Mixture(weight, position, self._covariance(sigma, eta))

    def _covariance(self, log_sigma: _Dual, eta: _Dual) -> _Dual:
        """sigma^2 exp(H(eta)), see `Decoder._gaussians`."""
        modulus = torch.sqrt(eta.value.square().sum(-1) + 1e-8)
        bounded = modulus.clamp(max=4.0)
        scale = torch.exp(2.0 * log_sigma.value)
        cosh, sinh = torch.cosh(bounded), torch.sinh(bounded)
        ratio = sinh / modulus
        d_modulus = (eta.value[:, None] * eta.tangent).sum(-1) / modulus[:, None]
        d_bounded = d_modulus * (modulus < 4.0).to(modulus.dtype)[:, None]
        d_cosh = sinh[:, None] * d_bounded
        d_ratio = (cosh / modulus)[:, None] * d_bounded - (ratio / modulus)[:, None] * d_modulus
        e1, e2 = eta.value.unbind(-1)
        d_e1, d_e2 = eta.tangent.unbind(-1)
        value = torch.stack([cosh + ratio * e1, ratio * e2, cosh - ratio * e1], -1) * scale[..., None]
        r1 = d_ratio * e1[:, None] + ratio[:, None] * d_e1
        r2 = d_ratio * e2[:, None] + ratio[:, None] * d_e2
        tangent = torch.stack([d_cosh + r1, r2, d_cosh - r1], -1) * scale[:, None, :, None]
        return _Dual(value, tangent + 2.0 * value[:, None] * log_sigma.tangent[..., None])

    def forward(
        self, latent: Tensor, psf_moments: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate.

        Parameters
        ----------
        latent : `torch.Tensor`, (N, L)
        psf_moments : `torch.Tensor`, (N, B, 3)
            Ixx, Iyy, Ixy of the PSF with the pixel, pixel^2.
        x, y : `torch.Tensor`, (W,) and (H,)
            Columns and rows of the wanted pixels, from the target's pixel.

        Returns
        -------
        image_jacobian : `torch.Tensor`, (N, B, L, H, W)
            Derivatives of the observed image, nJy.
        parameters : `torch.Tensor`, (N, B, 6)
            Natural log of the flux in nJy, centroid (x, y) from the target's pixel, and the intrinsic second
            moments Ixx, Iyy, Ixy, pixel^2, without PSF and pixel and without weight function.
        parameter_jacobian : `torch.Tensor`, (N, B, 6, L)
        """
        mixture = self._mixture(latent)
        parameters = self._summarise(mixture)
        weight, position, covariance = mixture
        ixx, iyy, ixy = psf_moments.unbind(-1)
        total = covariance.value[:, None] + torch.stack([ixx, ixy, iyy], -1)[:, :, None]
        cxx, cxy, cyy = total.unbind(-1)
        det = cxx * cyy - cxy * cxy
        # The inverse of the covariance; tangents have the axes (N, B, L, G).
        a, b, c = cyy / det, -cxy / det, cxx / det
        al, bl, cl = a[:, :, None], b[:, :, None], c[:, :, None]
        dx0, dy0 = (t[:, None] for t in position.tangent.unbind(-1))
        dxx, dxy, dyy = (t[:, None] for t in covariance.tangent.unbind(-1))
        # With P = C^-1 the tangent of a Gaussian is itself times
        # d(log weight) + d^T P dmu + (d^T P dC P d - tr(P dC)) / 2.
        m11, m12 = al * dxx + bl * dxy, al * dxy + bl * dyy
        m21, m22 = bl * dxx + cl * dxy, bl * dxy + cl * dyy
        coefficients = torch.stack(
            [
                weight.tangent.transpose(1, 2) - 0.5 * (m11 + m22),
                al * dx0 + bl * dy0,
                bl * dx0 + cl * dy0,
                0.5 * (m11 * al + m12 * bl),
                m11 * bl + m12 * cl,
                0.5 * (m21 * bl + m22 * cl),
            ],
            -1,
        )
        n, bands, gaussians = weight.value.shape
        yy, xx = y[:, None].expand(-1, x.shape[0]).flatten(), x[None].expand(y.shape[0], -1).flatten()
        u = (xx - position.value[..., :1])[:, None]
        v = (yy - position.value[..., 1:])[:, None]
        a, b, c = a[..., None], b[..., None], c[..., None]
        norm = weight.value - 0.5 * torch.log(det) - math.log(2 * math.pi)
        gauss = torch.exp(norm[..., None] - 0.5 * (a * u * u + c * v * v) - b * u * v)
        gu, gv = gauss * u, gauss * v
        basis = torch.stack([gauss, gu, gv, gu * u, gu * v, gv * v], 3)
        length = latent.shape[1]
        flat = coefficients.reshape(n, bands, length, gaussians * 6) @ basis.reshape(
            n, bands, gaussians * 6, y.shape[0] * x.shape[0]
        )
        return flat.reshape(n, bands, length, y.shape[0], x.shape[0]), *parameters

    @staticmethod
    def _summarise(mixture: _Mixture) -> tuple[Tensor, Tensor]:
        """Log flux, centroid and second moments in each band, and their derivatives."""
        weight, position, covariance = mixture
        log_flux = torch.logsumexp(weight.value, 2)
        share = torch.exp(weight.value - log_flux[..., None])
        d_log_flux = (share[:, None] * weight.tangent).sum(3)
        d_share = share[:, None] * (weight.tangent - d_log_flux[..., None])

        def mean(dual: _Dual) -> _Dual:
            """Flux-weighted mean over the Gaussians in each band, (N, B) and (N, L, B)."""
            value = (share * dual.value[:, None]).sum(2)
            tangent = (d_share * dual.value[:, None, None]).sum(3)
            return _Dual(value, tangent + (share[:, None] * dual.tangent[:, :, None]).sum(3))

        def product(one: _Dual, other: _Dual) -> _Dual:
            return _Dual(one.value * other.value, one.times(other.value) + other.times(one.value))

        x, y = position[..., 0], position[..., 1]
        mx, my = mean(x), mean(y)

        def moment(index: int, one: _Dual, other: _Dual, m_one: _Dual, m_other: _Dual) -> _Dual:
            spread, square = product(one, other), product(m_one, m_other)
            own = covariance[..., index]
            second = mean(_Dual(own.value + spread.value, own.tangent + spread.tangent))
            return _Dual(second.value - square.value, second.tangent - square.tangent)

        flux = _Dual(log_flux, d_log_flux)
        xx, xy, yy = moment(0, x, x, mx, mx), moment(1, x, y, mx, my), moment(2, y, y, my, my)
        values = torch.stack([d.value for d in (flux, mx, my, xx, yy, xy)], 2)
        tangents = torch.stack([d.tangent for d in (flux, mx, my, xx, yy, xy)], 3)
        return values, tangents.permute(0, 2, 3, 1)
