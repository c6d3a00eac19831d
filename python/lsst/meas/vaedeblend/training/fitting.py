# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The graphs with which the runtime fits latent variables to pixels: rendering and linearisation.

A sum of Gaussians is drawn in the model frame on any square of pixels and taken to the observed frame by the
kernel of the local PSF. The kernel is applied as a product of discrete Fourier transforms written as matrix
products: exact, made of operations that every execution provider of onnxruntime has, and as cheap as a fast
transform on the small grids that most sources need.

What the derivatives of every pixel would cost most of the time, the fit does without: the gradient of
chi-square is that of a scalar product, so that the weighted residual goes back through the kernel (the
adjoint of the rendering, exact to rounding) and a few sums over each Gaussian remain. Only the matrix of
second derivatives (Gauss-Newton) needs derivatives of pixels; it steers steps and gives widths of the
posterior, for which the Gaussian with the PSF's moments is good enough, on coarser pixels where the seeing
allows.
"""

from __future__ import annotations

__all__ = ["Linearise", "Render"]

import math

import torch
from torch import Tensor, nn

from .derivatives import MixtureTangents, Tangents, summarise
from .networks import LOWEST_EXPONENT, MAX_LOG_FLUX, MODEL_VARIANCE, draw_gaussians


def _grid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels of rectangles, row by row: (..., W) and (..., H) to (..., H * W) each."""
    lead, h, w = x.shape[:-1], y.shape[-1], x.shape[-1]
    columns = x[..., None, :].expand(*lead, h, w)
    rows = y[..., :, None].expand(*lead, h, w)
    return columns.reshape(*lead, -1), rows.reshape(*lead, -1)


def convolve(
    image: Tensor,
    real: Tensor,
    imaginary: Tensor,
    columns: Tensor,
    rows: Tensor,
    back_rows: Tensor,
    back_columns: Tensor,
) -> Tensor:
    """Convolve images with kernels given by their transforms, see `lsst.meas.vaedeblend.network.Fourier`.

    Parameters
    ----------
    image : `torch.Tensor`, (N, B, W, W)
    real, imaginary : `torch.Tensor`, (N, B, F, K)
        Transform of the kernels on a grid of F rows and K = F // 2 + 1 columns.
    columns, rows, back_rows, back_columns : `torch.Tensor`, (W, 2K), (2F, 2W), (2W, 2F), (2K, W)
        The transform along rows and columns, and back; real parts first.
    """
    n, b, w = image.shape[:3]
    k = real.shape[3]
    f = real.shape[2]
    along = image @ columns
    both = torch.cat([along[..., :k], along[..., k:]], 2)
    spectrum = rows @ both
    re, im = spectrum[:, :, :f], spectrum[:, :, f:]
    product = torch.cat([re * real - im * imaginary, re * imaginary + im * real], 2)
    both = back_rows @ product
    along = torch.cat([both[:, :, :w], both[:, :, w:]], 3)
    return along @ back_columns


class Render(nn.Module):
    """Latent variables to observed images on squares of any width.

    Parameters
    ----------
    decoder : `torch.nn.Module`
        Has ``gaussians(latent)``, which gives log fluxes and the `Mixture` of a source of unit flux.
    """

    inputs = (
        "latent",
        "kernels",
        "cell",
        "x",
        "y",
        "columns",
        "rows",
        "back_rows",
        "back_columns",
    )
    outputs = ("image", "weight", "position", "covariance")

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        latent: Tensor,
        kernels: Tensor,
        cell: Tensor,
        x: Tensor,
        y: Tensor,
        columns: Tensor,
        rows: Tensor,
        back_rows: Tensor,
        back_columns: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Render.

        Parameters
        ----------
        latent : `torch.Tensor`, (N, L)
        kernels : `torch.Tensor`, (C, 2, B, F, K)
            Transforms of difference kernels of all cells, real and imaginary parts.
        cell : `torch.Tensor`, (N,)
            Which of them to use.
        x, y : `torch.Tensor`, (W,)
            Columns and rows of the wanted pixels, from the target's pixel.
        columns, rows, back_rows, back_columns : `torch.Tensor`
            See `convolve`.

        Returns
        -------
        image : `torch.Tensor`, (N, B, W, W)
            Observed image of unit flux.
        weight, position, covariance : `torch.Tensor`
            See `Mixture`.
        """
        log_flux, unit = self.decoder.gaussians(latent)
        flux = torch.exp(log_flux.clamp(max=MAX_LOG_FLUX))
        px, py = _grid(x, y)
        gauss = draw_gaussians(unit.position, unit.covariance, px, py)
        image = (unit.weight @ gauss).reshape(latent.shape[0], unit.weight.shape[1], y.shape[0], x.shape[0])
        kernel = kernels[cell]
        image = convolve(image, kernel[:, 0], kernel[:, 1], columns, rows, back_rows, back_columns)
        return image, unit.weight * flux[:, :, None], unit.position, unit.covariance


class Linearise(nn.Module):
    """Gradient of chi-square and its Gauss-Newton matrix with respect to the latent variables.

    Parameters
    ----------
    tangents : `MixtureTangents`
        Gives the Gaussians with their derivatives.
    """

    inputs = (
        "latent",
        "weighted",
        "kernels",
        "cell",
        "x",
        "y",
        "columns",
        "rows",
        "back_rows",
        "back_columns",
        "weight",
        "psf_moments",
        "u",
        "v",
    )
    outputs = ("gradient", "block", "tangent", "parameters", "parameter_jacobian")

    def __init__(self, tangents: MixtureTangents):
        super().__init__()
        self.tangents = tangents

    def forward(
        self,
        latent: Tensor,
        weighted: Tensor,
        kernels: Tensor,
        cell: Tensor,
        x: Tensor,
        y: Tensor,
        columns: Tensor,
        rows: Tensor,
        back_rows: Tensor,
        back_columns: Tensor,
        weight: Tensor,
        psf_moments: Tensor,
        u: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Linearise.

        Parameters
        ----------
        latent : `torch.Tensor`, (N, L)
        weighted : `torch.Tensor`, (N, B, W, W)
            Residual over variance on each square, nJy^-1.
        kernels, cell, x, y, columns, rows, back_rows, back_columns : `torch.Tensor`
            See `Render`.
        weight : `torch.Tensor`, (N, B, V, V)
            Sum of inverse variances over each coarse pixel, nJy^-2.
        psf_moments : `torch.Tensor`, (N, B, 3)
            Ixx, Iyy, Ixy of the PSF with the pixel, pixel^2.
        u, v : `torch.Tensor`, (N, V)
            Columns and rows of the middles of each source's coarse pixels, from its target's pixel.

        Returns
        -------
        gradient : `torch.Tensor`, (N, L)
            Derivative of the model times weighted residual, summed over bands and pixels: minus half the
            gradient of chi-square.
        block : `torch.Tensor`, (N, L, L)
            J^T W J with the derivatives J of the observed image.
        tangent : `torch.Tensor`, (N, B, L, V, V)
            J times the root of W.
        parameters : `torch.Tensor`, (N, B, 6)
            Natural log of the flux in nJy, centroid (x, y) from the target's pixel, and the intrinsic second
            moments Ixx, Iyy, Ixy, pixel^2, without PSF and pixel and without weight function.
        parameter_jacobian : `torch.Tensor`, (N, B, 6, L)
        """
        mixture = self.tangents(latent)
        kernel = kernels[cell]
        # The adjoint of a convolution is the one with the conjugate transform.
        pulled = convolve(weighted, kernel[:, 0], -kernel[:, 1], columns, rows, back_rows, back_columns)
        gradient = self._gradient(mixture, pulled, x, y)
        tangent = self._tangent(mixture, weight, psf_moments, u, v)
        block = (tangent @ tangent.transpose(2, 3)).sum(1)
        n, b, length = tangent.shape[:3]
        tangent = tangent.reshape(n, b, length, v.shape[1], u.shape[1])
        return gradient, block, tangent, *summarise(mixture)

    @staticmethod
    def _gradient(mixture: Tangents, pulled: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Derivatives of the model times what was pulled back to the model frame, summed over pixels, (N,
        L)."""
        n, b = pulled.shape[:2]
        px, py = _grid(x, y)
        gauss = draw_gaussians(mixture.position, mixture.covariance, px, py)
        # Moments of each Gaussian times what it is compared with, about the target's pixel.
        images = (pulled.reshape(n, b, 1, -1) * _powers(px, py)).reshape(n, b * 6, -1)
        moments = (gauss @ images.transpose(1, 2)).reshape(n, -1, b, 6)
        light = torch.exp(mixture.log_weight)
        d_weight = light * moments[..., 0].transpose(1, 2)
        # The same for all bands together, and about the Gaussian's own centre.
        one, mx, my, mxx, mxy, myy = (light.transpose(1, 2)[..., None] * moments).sum(2).unbind(2)
        x0, y0 = mixture.position.unbind(2)
        su, sv = mx - x0 * one, my - y0 * one
        suu = mxx - x0 * (mx + su)
        suv = mxy - x0 * my - y0 * su
        svv = myy - y0 * (my + sv)
        cxx, cxy, cyy = mixture.covariance.unbind(2)
        p, q, r = _inverse(cxx + MODEL_VARIANCE, cxy, cyy + MODEL_VARIANCE)[:3]
        # d(log Gaussian) = d^T P dmu + (d^T P dC P d - tr(P dC)) / 2.
        t11, t12 = p * suu + q * suv, p * suv + q * svv
        t21, t22 = q * suu + r * suv, q * suv + r * svv
        forces = torch.cat(
            [
                d_weight.reshape(n, -1),
                p * su + q * sv,
                q * su + r * sv,
                0.5 * (t11 * p + t12 * q - one * p),
                t11 * q + t12 * r - one * q,
                0.5 * (t21 * q + t22 * r - one * r),
            ],
            1,
        )
        slopes = torch.cat([mixture.d_log_weight, mixture.d_position, mixture.d_covariance], 2)
        return (slopes @ forces[:, :, None])[:, :, 0]

    @staticmethod
    def _tangent(mixture: Tangents, weight: Tensor, psf_moments: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Derivatives of pixels times the root of their weights, (N, B, L, V * V)."""
        n, b, g = mixture.log_weight.shape
        length = mixture.d_log_weight.shape[1]
        ixx, iyy, ixy = psf_moments.unbind(-1)
        cxx, cxy, cyy = mixture.covariance.unbind(2)
        p, q, r, det = _inverse(
            cxx[:, None] + ixx[:, :, None], cxy[:, None] + ixy[:, :, None], cyy[:, None] + iyy[:, :, None]
        )
        x0, y0 = (t[:, None] for t in mixture.position.unbind(2))
        # P (d - mu) as polynomials of the first degree: constant, and the factors of x and y.
        a0, b0 = -p * x0 - q * y0, -q * x0 - r * y0
        nothing = torch.zeros_like(p)
        one = nothing + 1.0
        # What a Gaussian is multiplied with to differentiate it, as polynomials in 1, x, y, x^2, xy, y^2.
        polynomials = torch.stack(
            [
                torch.stack([one, nothing, nothing, nothing, nothing, nothing], 3),
                torch.stack([a0, p, q, nothing, nothing, nothing], 3),
                torch.stack([b0, q, r, nothing, nothing, nothing], 3),
                0.5 * torch.stack([a0 * a0 - p, 2 * a0 * p, 2 * a0 * q, p * p, 2 * p * q, q * q], 3),
                torch.stack([a0 * b0 - q, a0 * q + b0 * p, a0 * r + b0 * q, p * q, p * r + q * q, q * r], 3),
                0.5 * torch.stack([b0 * b0 - r, 2 * b0 * q, 2 * b0 * r, q * q, 2 * q * r, r * r], 3),
            ],
            2,
        )
        norm = mixture.log_weight - 0.5 * torch.log(det) + 0.5 * (a0 * x0 + b0 * y0) - math.log(2 * math.pi)
        exponent = torch.stack([norm, -a0, -b0, -0.5 * p, -q, -0.5 * r], 3)
        px, py = _grid(u, v)
        powers = _powers(px, py)[:, None]
        # Bounded, lest numbers too small for full precision make everything slow.
        gauss = torch.exp((exponent @ powers).clamp(min=LOWEST_EXPONENT))
        gauss = gauss * torch.sqrt(weight.reshape(n, b, 1, -1))
        basis = (polynomials.reshape(n, b, 6 * g, 6) @ powers).reshape(n, b, 6, g, -1) * gauss[:, :, None]
        geometry = torch.cat([mixture.d_position, mixture.d_covariance], 2)
        slopes = torch.cat(
            [
                mixture.d_log_weight.reshape(n, length, b, g).transpose(1, 2),
                geometry[:, None].expand(-1, b, -1, -1),
            ],
            3,
        )
        return slopes @ basis.reshape(n, b, 6 * g, -1)


def _powers(x: Tensor, y: Tensor) -> Tensor:
    """1, x, y, x^2, xy, y^2: (..., P) to (..., 6, P)."""
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -2)


def _inverse(cxx: Tensor, cxy: Tensor, cyy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of symmetric matrices (xx, xy, yy), and their determinant."""
    det = cxx * cyy - cxy * cxy
    return cyy / det, -cxy / det, cxx / det, det
