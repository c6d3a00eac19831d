# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Squares of pixels on which sources are drawn and linearised, and what the graphs need to do so.

A few widths serve all sources: small ones cost little, and graphs run on batches of one shape. For each width
there are the coordinates of its pixels, the discrete Fourier transform as matrices, and the transforms of the
kernels that take the model frame to the local PSFs.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from ..ground.psf import difference_kernel_ft, fft_size, moments_sigma
from ..network import Linearisation, Linearise, Mixture, Render

__all__ = ["WIDTHS", "Grids"]

WIDTHS = (16, 24, 40, 64, 104, 160)
"""Widths of the squares, pixel; even, so that coarse pixels of two fit in. The last ones are for the
few sources whose light does not end on the network's cutout."""

_PADDED = {16: 36, 24: 48, 40: 64, 64: 96, 104: 135, 160: 192}
"""Widths of the grids of the Fourier transforms: kernels may reach as far as these exceed the squares."""

_FINE_SIGMA = 1.4
"""Narrowest PSF, pixel, whose derivatives coarse pixels of 2 x 2 hold: widths of the posterior of the most
compact sources are then right to 5 percent (12 at 1.2, 2 at 1.5; tests/test_inference.py)."""

_BATCH = {16: 16, 24: 16, 40: 8, 64: 4, 104: 2, 160: 1}
"""Sources that go through a graph at once: as many as a processor's cache holds what comes between."""


@dataclasses.dataclass(frozen=True)
class _Fourier:
    """The transform of squares that are padded with zeros, along rows and columns, and back.

    Real and imaginary parts are halves of the matrices: (W, 2K), (2F, 2W), (2W, 2F) and (2K, W) for F rows
    and K = F // 2 + 1 columns of frequencies.
    """

    columns: NDArray[np.float32]
    rows: NDArray[np.float32]
    back_rows: NDArray[np.float32]
    back_columns: NDArray[np.float32]

    @classmethod
    def make(cls, width: int, size: int) -> _Fourier:
        pixel, k, f = np.arange(width), np.arange(size // 2 + 1), np.arange(size)
        phase = 2 * np.pi * np.outer(pixel, k) / size
        columns = np.concatenate([np.cos(phase), -np.sin(phase)], 1)
        # Frequencies other than 0 and Nyquist's stand for their negatives as well.
        twice = np.where((k == 0) | (2 * k == size), 1.0, 2.0)
        back_columns = np.concatenate([np.cos(phase) * twice, -np.sin(phase) * twice], 1).T / size
        phase = 2 * np.pi * np.outer(f, pixel) / size
        real, imaginary = np.cos(phase), -np.sin(phase)
        rows = np.block([[real, -imaginary], [imaginary, real]])
        back_rows = np.block([[real.T, imaginary.T], [-imaginary.T, real.T]]) / size
        arrays = (columns, rows, back_rows, back_columns)
        return cls(*(np.ascontiguousarray(a, np.float32) for a in arrays))


class Grids:
    """Draws and linearises sources on squares, for the PSFs of one scene.

    Parameters
    ----------
    render, linearise : `Render`, `Linearise`
        The graphs; without the second one (`None`) sources can only be drawn.
    stamps : `numpy.ndarray`, (P, B, h, w)
        PSFs of the cells; NaN where a band has none.
    moments : `numpy.ndarray`, (P, B, 3)
        Their adaptive moments, pixel^2; finite.
    """

    def __init__(
        self, render: Render, linearise: Linearise | None, stamps: NDArray, moments: NDArray
    ) -> None:
        self._render, self._linearise = render, linearise
        self._stamps, self._moments = stamps, moments
        metadata = render.metadata
        self._sigma = metadata.frame["sigma"]
        size = metadata.cutout_size
        self.widths = WIDTHS
        # A middle of the kernels in pixels, once per cell, from which every width takes what it needs.
        self._wide = fft_size(size, max(stamps.shape[2:]))
        self._kernels: dict[int, NDArray[np.float32]] = {}
        self._pixel_kernels: dict[int, NDArray[np.float32]] = {}
        self._row: dict[int, NDArray[np.int64]] = {w: np.full(len(stamps), -1) for w in self.widths}
        self._common: dict[int, dict[str, Any]] = {}
        self._plain: dict[int, dict[str, Any]] = {}
        narrowest = float(moments_sigma(moments).min())
        self.stride = 2 if narrowest >= _FINE_SIGMA else 1

    @cached_property
    def _point_tails(self) -> NDArray[np.float64]:
        """Part of the PSFs' squared light outside of each width, (P, B, number of widths)."""
        stamps = np.nan_to_num(self._stamps)
        h, w = stamps.shape[2:]
        y, x = np.abs(np.arange(h) - h // 2), np.abs(np.arange(w) - w // 2)
        distance = np.maximum(y[:, None], x[None])
        return np.stack([(stamps**2 * (distance >= v // 2)).sum((2, 3)) for v in self.widths], 2)

    def choose(
        self, light: NDArray, covariance: NDArray, cell: NDArray, weight: NDArray, tolerance: float
    ) -> NDArray[np.int64]:
        """Choose the width for each source: the smallest outside of which its light does not matter.

        Parameters
        ----------
        light, covariance : `numpy.ndarray`, (K, B, G), (K, G, 3)
            Fluxes and second moments of the Gaussians, see `lsst.meas.vaedeblend.network.Mixture`.
        cell : `numpy.ndarray`, (K,)
            PSF cells.
        weight : `numpy.ndarray`, (K, B)
            Typical inverse variance of a pixel, nJy^-2.
        tolerance : `float`
            Part of the squared signal-to-noise ratio that may lie outside, and never less than 1.

        Returns
        -------
        widths : `numpy.ndarray`, (K,)
            The largest one where none suffices.
        """
        # As round Gaussians through the widest PSF, with the PSF's wings as those of a point source.
        spread = np.maximum(covariance[..., 0], covariance[..., 2])
        spread = spread + moments_sigma(self._moments[cell]).max(axis=1)[:, None] ** 2
        out = np.full(len(light), self.widths[-1])
        scaled = light * np.sqrt(weight)[:, :, None]
        both = scaled.transpose(0, 2, 1) @ scaled
        both /= 2 * np.pi * (spread[:, :, None] + spread[:, None, :])
        allowed = np.maximum(1.0, tolerance * both.sum((1, 2)))
        steep = 0.5 / spread[:, :, None] + 0.5 / spread[:, None, :]
        flux2 = scaled.sum(2) ** 2
        for i in reversed(range(len(self.widths) - 1)):
            outside = (both * np.exp(-steep * (self.widths[i] / 2) ** 2)).sum((1, 2))
            outside += (flux2 * self._point_tails[cell, :, i]).sum(1)
            out[outside < allowed] = self.widths[i]
        return out

    def draw(self, latent: NDArray, cell: NDArray, width: int) -> tuple[NDArray[np.float32], Mixture]:
        """Draw sources as the coadd shows them.

        Parameters
        ----------
        latent : `numpy.ndarray`, (K, L)
            Latents.
        cell : `numpy.ndarray`, (K,)
            PSF cells.
        width : `int`
            One of ``widths``.

        Returns
        -------
        images : `numpy.ndarray`, (K, B, width, width)
            Images of unit flux; light beyond the square makes their sums less than 1.
        mixture : `lsst.meas.vaedeblend.network.Mixture`
            The Gaussians that they are made of.
        """
        common = self._inputs(width, cell)
        return self._render.images(latent, self._row[width][cell], common, _BATCH[width])

    def draw_plain(self, latent: NDArray, width: int) -> NDArray[np.float32]:
        """Draw sources in the model frame.

        Parameters
        ----------
        latent : `numpy.ndarray`, (K, L)
            Latents.
        width : `int`
            One of ``widths``.

        Returns
        -------
        images : `numpy.ndarray`, (K, B, width, width)
            Images of unit flux; light beyond the square makes their sums less than 1.
        """
        common = self._plain.get(width)
        if common is None:
            # The transform of a kernel that changes nothing.
            size = _PADDED[width]
            kernel = np.zeros((1, 2, self._stamps.shape[1], size, size // 2 + 1), np.float32)
            kernel[:, 0] = 1.0
            common = self._plain[width] = self._geometry(width) | {"kernels": self._render.hold(kernel)}
        cell = np.zeros(len(latent), np.int64)
        return self._render.images(latent, cell, common, _BATCH[width])[0]

    def linearise(
        self,
        latent: NDArray,
        cell: NDArray,
        weighted: NDArray,
        weight: NDArray,
        inner: int,
        offset: NDArray,
        width: int,
    ) -> Linearisation:
        """Differentiate chi-square by the latents of sources.

        Parameters
        ----------
        latent, cell, width
            See `draw`.
        weighted : `numpy.ndarray`, (K, B, width, width)
            Residual times weight.
        weight : `numpy.ndarray`, (K, B, V, V)
            Weights summed over coarse pixels.
        inner : `int`
            Width of the square that the coarse pixels cover.
        offset : `numpy.ndarray`, (K, 2)
            By how many pixels (y, x) the coarse pixels begin before that square.

        Returns
        -------
        linearisation : `lsst.meas.vaedeblend.network.Linearisation`
            Gradients and Gauss-Newton matrices.
        """
        assert self._linearise is not None
        middle = np.arange(weight.shape[-1]) * self.stride - inner // 2 + (self.stride - 1) / 2
        common = self._inputs(width, cell)
        return self._linearise.models(
            latent,
            self._row[width][cell],
            self._moments[cell],
            weighted,
            weight,
            middle - offset[:, 1:],
            middle - offset[:, :1],
            common,
            _BATCH[width],
        )

    def mixture(self, latent: NDArray) -> Mixture:
        """Give the Gaussians of sources; see `lsst.meas.vaedeblend.network.Render.mixture`."""
        return self._render.mixture(latent)

    def parameters(self, latent: NDArray) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give parameters of the models; see `lsst.meas.vaedeblend.network.Linearise.parameters`."""
        assert self._linearise is not None
        return self._linearise.parameters(latent)

    def _inputs(self, width: int, cell: NDArray) -> dict[str, Any]:
        """What all sources of one width share, with the kernels of some cells."""
        row = self._row[width]
        new = np.unique(cell[row[cell] < 0]).tolist()
        common = self._common.get(width)
        if common is None:
            common = self._geometry(width)
            self._kernels[width] = np.empty(
                (0, 2, self._stamps.shape[1], _PADDED[width], _PADDED[width] // 2 + 1), np.float32
            )
            self._common[width] = common
        if new:
            start = len(self._kernels[width])
            row[new] = np.arange(start, start + len(new))
            table = np.concatenate([self._kernels[width], np.stack([self._kernel(c, width) for c in new])])
            self._kernels[width] = table
            common["kernels"] = self._render.hold(table)
        return common

    def _geometry(self, width: int) -> dict[str, Any]:
        """Pixels and Fourier transforms of one width."""
        hold = self._render.hold
        line = hold((np.arange(width) - width // 2).astype(np.float32))
        fourier = _Fourier.make(width, _PADDED[width])
        return {"x": line, "y": line} | {
            f.name: hold(getattr(fourier, f.name)) for f in dataclasses.fields(fourier)
        }

    def _kernel(self, cell: int, width: int) -> NDArray[np.float32]:
        """Transform of a cell's kernels, real and imaginary parts, (2, B, F, K)."""
        size, kernel = _PADDED[width], self._pixel_kernels.get(cell)
        if kernel is None:
            stamps = self._stamps[cell]
            wide = difference_kernel_ft(np.nan_to_num(stamps).astype(np.float32), self._sigma, self._wide)
            kernel = scipy.fft.irfft2(wide, s=(self._wide, self._wide))
            kernel[~np.isfinite(stamps).all(axis=(1, 2))] = 0.0
            self._pixel_kernels[cell] = kernel
        # Offsets that the padding holds without wrapping around.
        reach = min(size - width, (self._wide - 1) // 2)
        offsets = np.arange(-reach, reach + 1)
        small = np.zeros((len(kernel), size, size), np.float32)
        small[:, (offsets % size)[:, None], offsets % size] = kernel[:, offsets[:, None], offsets]
        transform = scipy.fft.rfft2(small)
        return np.stack([transform.real, transform.imag]).astype(np.float32)
