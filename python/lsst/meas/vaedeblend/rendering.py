# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""How models are rendered: shapes and fluxes, and from a network's frame to the coadd's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from .ground.cutouts import add_cutouts
from .ground.gaussians import adaptive_moments_of_gaussians
from .ground.psf import (
    FWHM_PER_SIGMA,
    adaptive_moments,
    convolve_to_observed,
    difference_kernel_ft,
    fft_size,
    gaussian_psf,
    kolmogorov_psf,
    matching_kernel_ft,
    wings,
)
from .inference import WIDTHS, Grids
from .network import Decoder, Mixture, NetworkMetadata
from .scene import PsfGrid

if TYPE_CHECKING:
    from .sources import SourceModels

__all__ = [
    "Renderer",
    "SelectedImages",
    "SourceImages",
    "StoredImages",
    "latent_shapes",
    "render",
    "square",
    "unit_shapes",
]


def unit_shapes(models: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
    """Split models into shapes and fluxes.

    Parameters
    ----------
    models : array_like, (N, B, S, S)
        Models, nJy.

    Returns
    -------
    shapes : `numpy.ndarray`, (N, B, S, S)
        Shapes with sum 1 in each band. A band whose model has no flux worth the name (a sum below a tenth of
        the sum of its absolute values) takes the mean shape of the other bands.
    flux : `numpy.ndarray`, (N, B)
        Sums of the models, nJy.
    sound : `numpy.ndarray`, (N,)
        Whether any band has a shape; ``shapes`` are 0 where none has.
    """
    pixels: NDArray[np.float32] = np.asarray(models, dtype=np.float32)
    flux = pixels.sum(axis=(2, 3), dtype=np.float64)
    good = flux > 0.1 * np.abs(pixels).sum(axis=(2, 3), dtype=np.float64)
    divisor: NDArray[np.float32] = np.where(good, flux, 1.0)[:, :, None, None].astype(np.float32)
    shapes = pixels / divisor
    for i in np.flatnonzero(~good.all(axis=1)):
        shapes[i, ~good[i]] = shapes[i, good[i]].mean(axis=0) if good[i].any() else 0.0
    return shapes, flux, good.any(axis=1)


class Renderer:
    """Takes models from a network's frame to the frame of the local PSFs.

    Parameters
    ----------
    metadata : `NetworkMetadata`
        Of the network or decoder whose models are rendered.
    psf : `PsfGrid`
        PSFs of the scene in the network's bands. Missing stamps are taken from the nearest cell; a band
        without any stamp renders as 0.
    """

    def __init__(self, metadata: NetworkMetadata, psf: PsfGrid) -> None:
        if psf.stamps.shape[1] != len(metadata.bands):
            raise ValueError(f"The network has bands {list(metadata.bands)}, the PSF {psf.stamps.shape[1]}.")
        self.metadata = metadata
        self.psf = psf.filled()
        self._size = fft_size(metadata.cutout_size, max(psf.stamps.shape[2:]))
        self._kernels: dict[int, NDArray[np.complex64]] = {}
        self._halo_lights: dict[int, NDArray[np.float64]] = {}

    def _network_psf(self, band: str) -> NDArray[np.float64]:
        """The PSF that an observed-frame network has in its models, pixel-integrated."""
        frame = self.metadata.frame
        fwhm = frame["fwhm"][band] / self.metadata.pixel_scale
        # On a stamp as large as the scene's, so that equal PSFs are cut off equally and cancel exactly.
        width = max(self.psf.stamps.shape[2:])
        if frame.get("profile", "kolmogorov") == "gaussian":
            return gaussian_psf(fwhm / FWHM_PER_SIGMA, width)
        return kolmogorov_psf(fwhm, width)

    def _kernel(self, cell: int) -> NDArray[np.complex64]:
        kernel = self._kernels.get(cell)
        if kernel is None:
            frame = self.metadata.frame
            stamps = np.nan_to_num(self.psf.stamps[cell])
            if frame["type"] == "gaussian":
                kernel = difference_kernel_ft(stamps, frame["sigma"], self._size)
            else:
                present = np.stack([self._network_psf(band) for band in self.metadata.bands])
                # What a wide PSF has taken away cannot be had back: below a hundredth it would be noise.
                kernel = matching_kernel_ft(stamps, present, self._size, floor=1e-2)
            kernel[~self.psf.valid[cell]] = 0.0
            kernel = self._kernels[cell] = kernel.astype(np.complex64)
        return kernel

    def observed(self, models: ArrayLike, psf_index: ArrayLike) -> NDArray[np.float32]:
        """Convolve models to the observed frame.

        Parameters
        ----------
        models : array_like, (N, B, S, S)
            Models in the network's frame, nJy.
        psf_index : array_like, (N,)
            PSF cell of each one.

        Returns
        -------
        observed : `numpy.ndarray`, (N, B, S, S)
            The models as the coadd shows them, nJy.
        """
        cells, index = np.unique(np.asarray(psf_index), return_inverse=True)
        if not len(cells):
            return np.asarray(models, dtype=np.float32).copy()
        return convolve_to_observed(models, np.stack([self._kernel(int(c)) for c in cells]), index)

    def point_sources(self, dx: ArrayLike, dy: ArrayLike) -> NDArray[np.float32]:
        """Render unresolved sources of unit flux in the network's frame.

        Parameters
        ----------
        dx, dy : array_like, (N,)
            Offsets from the cutout's centre, pixel.

        Returns
        -------
        models : `numpy.ndarray`, (N, B, S, S)
            The network frame's PSF, in every band with sum 1 but for what falls off the cutout.
        """
        dx, dy = np.asarray(dx, dtype=float), np.asarray(dy, dtype=float)
        m, size = self.metadata, self.metadata.cutout_size
        out = np.empty((len(dx), len(m.bands), size, size), np.float32)
        x, y = dx + m.centre[1], dy + m.centre[0]
        if m.frame["type"] == "gaussian":
            out[:] = _gaussians(x, y, m.frame["sigma"], size)[:, None]
            return out
        grid = (self._size, self._size)
        fy, fx = scipy.fft.fftfreq(self._size)[:, None], scipy.fft.rfftfreq(self._size)
        for i, band in enumerate(m.bands):
            stamp = self._network_psf(band)
            middle = len(stamp) // 2
            shift = (y - middle)[:, None, None] * fy + (x - middle)[:, None, None] * fx
            spectrum = scipy.fft.rfft2(stamp, s=grid) * np.exp(-2j * np.pi * shift)
            out[:, i] = scipy.fft.irfft2(spectrum, s=grid)[:, :size, :size]
        return out


    def points(
        self, dx: ArrayLike, dy: ArrayLike, psf_index: ArrayLike, width: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Render unresolved sources, with the wings that their PSFs have beyond the stamps.

        Parameters
        ----------
        dx, dy : array_like, (N,)
            Offsets from the cutout's centre, pixel.
        psf_index : array_like, (N,)
            PSF cells.
        width : `int`, optional
            Width W of the images, S by default, pixel.

        Returns
        -------
        models, observed : `numpy.ndarray`, (N, B, W, W)
            Images of unit flux in the network's frame, and as the coadd shows them; the latter have sum 1,
            as long as the source lies well on the cutout.
        """
        dx, dy, cell = np.asarray(dx, float), np.asarray(dy, float), np.asarray(psf_index, np.int64)
        width = self.metadata.cutout_size if width is None else width
        models = self.point_sources(dx, dy)
        observed = square(self.observed(models, cell), width) + self._halo(dx, dy, cell, width)
        observed /= 1.0 + self._halo_light(width)[cell].astype(np.float32)[:, :, None, None]
        return square(models, width), observed

    def point_templates(
        self, rows: NDArray, dx: NDArray, dy: NDArray, psf_index: NDArray, flux: NDArray, width: NDArray
    ) -> dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Render unresolved sources of given fluxes on squares of their own widths.

        Parameters
        ----------
        rows : `numpy.ndarray`, (N,)
            Numbers of the sources.
        dx, dy, psf_index
            See `points`.
        flux : `numpy.ndarray`, (N, B)
            Fluxes, nJy; NaN renders as 0.
        width : `numpy.ndarray`, (N,)
            Widths of their squares, pixel.

        Returns
        -------
        templates : `dict` [`int`, `tuple` [`numpy.ndarray`]]
            By number, images in the network's frame and as observed, nJy, see `SourceImages`.
        """
        out: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for w in np.unique(width).tolist():
            own = np.flatnonzero(width == w)
            models, observed = self.points(dx[own], dy[own], psf_index[own], w)
            scale = np.nan_to_num(flux[own]).astype(np.float32)[:, :, None, None]
            out |= zip(rows[own].tolist(), zip(models * scale, observed * scale, strict=True), strict=True)
        return out

    def point_widths(
        self, flux: ArrayLike, noise: ArrayLike, psf_index: ArrayLike
    ) -> NDArray[np.int64]:
        """Choose squares for unresolved sources: the smallest beyond which their wings do not matter.

        Parameters
        ----------
        flux, noise : array_like, (N, B)
            Fluxes and standard deviations of a pixel, nJy.
        psf_index : array_like, (N,)
            PSF cells.

        Returns
        -------
        widths : `numpy.ndarray`, (N,)
            The cutout's width S or a larger one of `lsst.meas.vaedeblend.inference.WIDTHS`, pixel; the
            largest one where none suffices.
        """
        cell, size = np.asarray(psf_index, np.int64), self.metadata.cutout_size
        level, slope = (a[cell] for a in self._wings)
        half = min(self.psf.stamps.shape[2:]) / 2
        signal = level * half * np.nan_to_num(np.asarray(flux) / np.asarray(noise), posinf=0.0)
        # The integral of (level (r / half)^-slope)^2 beyond a circle.
        power = np.maximum(2.0 * slope - 2.0, 0.5)
        possible = [size, *(w for w in WIDTHS if w > size)]
        out = np.full(len(cell), possible[-1])
        for width in possible[-2::-1]:
            beyond = 2.0 * np.pi * signal**2 * np.maximum(width / 2 / half, 1.0) ** -power / power
            out[beyond.sum(axis=1) < 1.0] = width
        return out

    def _halo(self, dx: NDArray, dy: NDArray, cell: NDArray, width: int) -> NDArray[np.float32]:
        """Continue PSFs beyond their stamps as power laws, (N, B, W, W), see `wings`.

        The offsets are those from the cutout's centre; the unit is the light inside of the stamp.
        """
        level, slope = self._wings
        (h, w), pixels = self.psf.stamps.shape[2:], np.arange(width)
        pixels = pixels + self.metadata.cutout_size // 2 - width // 2
        y = pixels - (self.metadata.centre[0] + dy)[:, None]
        x = pixels - (self.metadata.centre[1] + dx)[:, None]
        outside = (np.abs(y) > h / 2)[:, :, None] | (np.abs(x) > w / 2)[:, None, :]
        distance = np.maximum(np.hypot(y[:, :, None], x[:, None, :]) / (min(h, w) / 2), 1.0)
        log = np.log(distance)[:, None] * -slope[cell][:, :, None, None]
        out = level[cell][:, :, None, None] * np.exp(log)
        return (out * outside[:, None]).astype(np.float32)

    @cached_property
    def _wings(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Levels and slopes of the wings of all cells, (P, B)."""
        return wings(self.psf.stamps)

    def _halo_light(self, width: int) -> NDArray[np.float64]:
        """Light of a central source beyond the stamp, on squares of some width, (P, B)."""
        if width not in self._halo_lights:
            nothing, pieces = np.zeros(1), []
            for cell in range(len(self.psf.stamps)):
                halo = self._halo(nothing, nothing, np.array([cell]), width)
                pieces.append(halo.sum(axis=(2, 3), dtype=np.float64))
            self._halo_lights[width] = np.concatenate(pieces)
        return self._halo_lights[width]


def _gaussians(x: NDArray, y: NDArray, sigma: float, size: int) -> NDArray[np.float64]:
    """Pixel-integrated Gaussians of unit flux at (x, y): (N, size, size)."""
    edges = np.arange(size + 1) - 0.5
    along_x = 0.5 * np.diff(erf((edges - x[:, None]) / (np.sqrt(2.0) * sigma)), axis=1)
    along_y = 0.5 * np.diff(erf((edges - y[:, None]) / (np.sqrt(2.0) * sigma)), axis=1)
    return along_y[:, :, None] * along_x[:, None, :]


def square(images: NDArray, width: int) -> NDArray:
    """Cut the middle out of images, or pad them with zeros.

    Parameters
    ----------
    images : `numpy.ndarray`, (..., S, S)
        Images.
    width : `int`
        The width wanted; the pixel of index S // 2 becomes that of index width // 2.

    Returns
    -------
    images : `numpy.ndarray`, (..., width, width)
        A view where they are cut.
    """
    size = images.shape[-1]
    if width <= size:
        low = size // 2 - width // 2
        return images[..., low : low + width, low : low + width]
    out = np.zeros((*images.shape[:-2], width, width), images.dtype)
    low = width // 2 - size // 2
    out[..., low : low + size, low : low + size] = images
    return out


def latent_shapes(
    mixture_of: Callable[[NDArray], Mixture], latent: NDArray, band: int, metadata: NetworkMetadata
) -> NDArray[np.float64]:
    """Measure adaptive second moments of models in the frame of a network that draws Gaussians.

    Parameters
    ----------
    mixture_of : callable
        Gives the Gaussians of latents.
    latent : `numpy.ndarray`, (N, L)
        Latents.
    band : `int`
        Index of the band.
    metadata : `NetworkMetadata`
        Of the network.

    Returns
    -------
    moments : `numpy.ndarray`, (N, 3)
        Ixx, Iyy and Ixy, pixel^2.
    """
    mixture = mixture_of(latent)
    # The decoder integrates over pixels by adding their variance.
    frame = metadata.frame["sigma"] ** 2 + 1.0 / 12.0
    return adaptive_moments_of_gaussians(mixture.weight[:, band], mixture.position, mixture.covariance, frame)


class SourceImages:
    """Images of deblended sources, rendered when they are asked for.

    Several are given on squares of one width W, that of the largest of them; the pixel of index W // 2 is the
    same pixel of the scene for each width.

    Parameters
    ----------
    decoder : `Decoder` or `None`
        Renders the latents; `None` only where every source has a template.
    grids : `lsst.meas.vaedeblend.inference.Grids` or `None`
        Draws the latents on any square, where the network draws Gaussians.
    renderer : `Renderer`
        Takes models to the observed frame.
    latent : `numpy.ndarray`, (N, L)
        Latents.
    psf_index : `numpy.ndarray`, (N,)
        PSF cells.
    flux : `numpy.ndarray`, (N, B)
        Fluxes of the models, nJy; NaN renders as 0.
    flux_network : `numpy.ndarray`, (N, B)
        Fluxes that go with the latents, light beyond the cutout included; NaN where that is not known.
    width : `numpy.ndarray`, (N,)
        Widths of the sources' squares, pixel: that of the network's cutout S, or larger.
    templates : `dict` [`int`, `tuple` [`numpy.ndarray`]], optional
        Images on their squares in the network's frame and as observed, nJy, of sources without a model
        from the network.
    """

    _CHUNK = 64

    def __init__(
        self,
        decoder: Decoder | None,
        grids: Grids | None,
        renderer: Renderer,
        latent: NDArray[np.float32],
        psf_index: NDArray[np.int64],
        flux: NDArray[np.float64],
        flux_network: NDArray[np.float64],
        width: NDArray[np.int64],
        templates: dict[int, tuple[NDArray, NDArray]] | None = None,
    ) -> None:
        self._decoder, self._grids, self._renderer = decoder, grids, renderer
        self._latent, self._psf_index = latent, psf_index
        self._flux, self._flux_network = flux, flux_network
        self._templates = templates or {}
        self.width = width

    def __len__(self) -> int:
        return len(self._latent)

    @property
    def size(self) -> int:
        """Width S of the network's cutout, which most of the images have, pixel (`int`)."""
        return self._renderer.metadata.cutout_size

    def model_frame(self, rows: ArrayLike | None = None) -> NDArray[np.float32]:
        """Render models in the network's frame, (K, B, W, W), nJy; all of them by default."""
        return self._render(rows, 0)

    def observed(self, rows: ArrayLike | None = None) -> NDArray[np.float32]:
        """Render models as the coadd shows them, (K, B, W, W), nJy; all of them by default."""
        return self._render(rows, 1)

    def shapes(self, band: int) -> NDArray[np.float64]:
        """Measure adaptive second moments Ixx, Iyy, Ixy of all models in the network's frame.

        Parameters
        ----------
        band : `int`
            Index of the band.

        Returns
        -------
        moments : `numpy.ndarray`, (N, 3)
            Moments, pixel^2; NaN where there are none.
        """
        out = np.full((len(self), 3), np.nan)
        templates = np.isin(np.arange(len(self)), list(self._templates))
        drawn = np.flatnonzero(~templates & np.isfinite(self._flux_network).any(axis=1))
        if self._grids is not None and len(drawn):
            metadata = self._renderer.metadata
            out[drawn] = latent_shapes(self._grids.mixture, self._latent[drawn], band, metadata)
            drawn = np.flatnonzero(templates)
        else:
            drawn = np.arange(len(self))
        for start in range(0, len(drawn), self._CHUNK):
            rows = drawn[start : start + self._CHUNK]
            out[rows] = adaptive_moments(self.model_frame(rows)[:, band])
        return out

    def _render(self, rows: ArrayLike | None, frame: int) -> NDArray[np.float32]:
        number = np.arange(len(self)) if rows is None else np.atleast_1d(np.asarray(rows, np.int64))
        bands, widest = self._flux.shape[1], int(self.width[number].max(initial=self.size))
        out = np.zeros((len(number), bands, widest, widest), np.float32)
        templates = np.array([int(i) in self._templates for i in number], bool)
        for i in np.flatnonzero(templates):
            out[i] = square(self._templates[int(number[i])][frame], widest)
        for width in np.unique(self.width[number]).tolist():
            own = np.flatnonzero(~templates & (self.width[number] == width))
            if len(own) and self._grids is not None and width > self.size:
                out[own] = square(self._draw_wide(number[own], width, frame), widest)
        rest = np.flatnonzero(~templates & (self.width[number] <= self.size))
        for start in range(0, len(rest) if self._decoder is not None else 0, self._CHUNK):
            part = rest[start : start + self._CHUNK]
            own = number[part]
            assert self._decoder is not None
            shapes, total, _ = unit_shapes(self._decoder.render(self._latent[own]))
            with np.errstate(invalid="ignore", divide="ignore"):
                # Part of the light that the cutout holds.
                held = np.where(self._flux_network[own] > 0, total / self._flux_network[own], 1.0)
            scale = np.nan_to_num(self._flux[own] * np.where(total > 0, np.minimum(held, 1.0), 1.0))
            shapes *= scale[:, :, None, None].astype(np.float32)
            images = shapes if frame == 0 else self._renderer.observed(shapes, self._psf_index[own])
            out[part] = square(images, widest)
        return out

    def _draw_wide(self, rows: NDArray, width: int, frame: int) -> NDArray[np.float32]:
        """Render models on squares larger than the cutout, whose light inside is their flux."""
        assert self._grids is not None
        plain = self._grids.draw_plain(self._latent[rows], width)
        inside = plain.sum(axis=(2, 3), dtype=np.float64)
        flux = np.nan_to_num(self._flux[rows]) / np.where(inside > 0, inside, 1.0)
        images = self._grids.draw(self._latent[rows], self._psf_index[rows], width)[0] if frame else plain
        return images * flux.astype(np.float32)[:, :, None, None]


class SelectedImages:
    """Images of deblended sources in some of their bands, in place of `SourceImages`.

    Parameters
    ----------
    images : `SourceImages`, `StoredImages` or `SelectedImages`
        Images in all bands.
    bands : array_like, (B,)
        Indices of the bands.
    """

    def __init__(self, images: SourceImages | StoredImages | SelectedImages, bands: ArrayLike) -> None:
        self._images, self._bands = images, np.asarray(bands)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def size(self) -> int:
        """Width S of the network's cutout, which most of the images have, pixel (`int`)."""
        return self._images.size

    @property
    def width(self) -> NDArray[np.int64]:
        """Widths of the sources' squares, (N,), pixel."""
        return self._images.width

    def model_frame(self, rows: ArrayLike | None = None) -> NDArray[np.float32]:
        """Give models in the network's frame; see `SourceImages.model_frame`."""
        return self._images.model_frame(rows)[:, self._bands]

    def observed(self, rows: ArrayLike | None = None) -> NDArray[np.float32]:
        """Give models as the coadd shows them; see `SourceImages.observed`."""
        return self._images.observed(rows)[:, self._bands]

    def shapes(self, band: int) -> NDArray[np.float64]:
        """Measure adaptive second moments; see `SourceImages.shapes`."""
        return self._images.shapes(int(self._bands[band]))


class StoredImages:
    """Images of deblended sources that are at hand, in place of `SourceImages`.

    Parameters
    ----------
    model_frame, observed : `numpy.ndarray`, (N, B, S, S)
        Images in the network's frame and as observed, nJy.
    """

    def __init__(self, model_frame: NDArray[np.float32], observed: NDArray[np.float32]) -> None:
        self._model_frame, self._observed = model_frame, observed

    def __len__(self) -> int:
        return len(self._observed)

    @property
    def size(self) -> int:
        """Width S of the images, pixel (`int`)."""
        return self._observed.shape[-1]

    @property
    def width(self) -> NDArray[np.int64]:
        """Widths of the sources' squares, (N,), pixel."""
        return np.full(len(self), self.size)

    def model_frame(self, rows: ArrayLike | None = None) -> NDArray[np.float32]:
        """Give models in the network's frame; see `SourceImages.model_frame`."""
        return self._model_frame if rows is None else self._model_frame[np.atleast_1d(rows)]

    def observed(self, rows: ArrayLike | None = None) -> NDArray[np.float32]:
        """Give models as the coadd shows them; see `SourceImages.observed`."""
        return self._observed if rows is None else self._observed[np.atleast_1d(rows)]

    def shapes(self, band: int) -> NDArray[np.float64]:
        """Measure adaptive second moments; see `SourceImages.shapes`."""
        return adaptive_moments(self._model_frame[:, band])


def render(models: SourceModels, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Render the sum of all models as the coadd shows it.

    Parameters
    ----------
    models : `SourceModels`
        The sources.
    shape : `tuple` [`int`]
        (H, W) of the scene.

    Returns
    -------
    image : `numpy.ndarray`, (B, H, W)
        The sum, nJy, float32, bands in the models' order.
    """
    total = np.zeros((len(models.bands), *shape), np.float32)
    for start in range(0, len(models), SourceImages._CHUNK):
        rows = np.arange(start, min(start + SourceImages._CHUNK, len(models)))
        add_cutouts(total, models.images.observed(rows), *models.corners(rows))
    return total
