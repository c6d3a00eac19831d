# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a deblended source is: its models, how they are rendered, stored, and used to share out the image.

Models are cutouts of S x S pixels on a corner in scene coordinates, and may hang over the scene's border. A
network gives the shape of a model in each band; its flux is that of the joint solution with its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from .network import Decoder, Network, NetworkMetadata
from .psf import (
    FWHM_PER_SIGMA,
    convolve_to_observed,
    difference_kernel_ft,
    fft_size,
    gaussian_psf,
    kolmogorov_psf,
    matching_kernel_ft,
)
from .scene import PsfGrid, Scene

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = [
    "ParentSummary",
    "Renderer",
    "SourceModels",
    "add_cutouts",
    "cut_out",
    "overlaps",
    "redistribute",
    "render",
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
    models = np.asarray(models, dtype=np.float32)
    flux = models.sum(axis=(2, 3), dtype=np.float64)
    good = flux > 0.1 * np.abs(models).sum(axis=(2, 3), dtype=np.float64)
    shapes = models / np.where(good, flux, 1.0)[:, :, None, None].astype(np.float32)
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


def _gaussians(x: NDArray, y: NDArray, sigma: float, size: int) -> NDArray[np.float64]:
    """Pixel-integrated Gaussians of unit flux at (x, y): (N, size, size)."""
    edges = np.arange(size + 1) - 0.5
    along_x = 0.5 * np.diff(erf((edges - x[:, None]) / (np.sqrt(2.0) * sigma)), axis=1)
    along_y = 0.5 * np.diff(erf((edges - y[:, None]) / (np.sqrt(2.0) * sigma)), axis=1)
    return along_y[:, :, None] * along_x[:, None, :]


@dataclasses.dataclass(eq=False)
class SourceModels:
    """Deblended sources, one row each; a struct of arrays.

    Parameters
    ----------
    bands : `tuple` [`str`]
        Bands in the network's order, which is that of all arrays.
    network : `str`
        Name of the network.
    weights_sha256 : `str`
        Checksum of its graph.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].
    id, parent : `numpy.ndarray`, (N,)
        Identifiers of the sources and of their parents, int64.
    x, y : `numpy.ndarray`, (N,)
        Centroids of the models, scene coordinates.
    peak_x, peak_y : `numpy.ndarray`, (N,)
        The peaks they started from, scene coordinates.
    corner_x, corner_y : `numpy.ndarray`, (N,)
        Scene coordinates of pixel [0, 0] of the cutouts, int64.
    psf_index : `numpy.ndarray`, (N,)
        Cell of the scene's PSF grid, int64.
    iteration : `numpy.ndarray`, (N,)
        Iteration at which a source was accepted, 0 for those of the start.
    latent_mean, latent_sigma : `numpy.ndarray`, (N, L)
        Approximate posterior of the latents, float32.
    latent_covariance : `numpy.ndarray`, (N, L, L)
        Covariance of the posterior with the neighbours left free, float32; NaN where latents were not refined
        on the pixels, and for models from a table.
    flux, flux_err, flux_network : `numpy.ndarray`, (N, B)
        Total flux of the model and its standard deviation, nJy, NaN where there was nothing to measure it on;
        and the flux that goes with the latents, NaN without a model from the network.
    moments, moments_err : `numpy.ndarray`, (N, B, 3)
        Intrinsic second moments Ixx, Iyy, Ixy of the model, without any PSF and without weight function, and
        their standard deviations, pixel^2; NaN where latents were not refined, and for models from a table.
    model_frame, observed : `numpy.ndarray`, (N, B, S, S)
        Models with the solved flux, in the network's frame and as the coadd shows them, nJy, float32; 0 where
        the flux is NaN.
    flags : `dict` [`str`, `numpy.ndarray`]
        Flags by name, (N,) each; `lsst.meas.vaedeblend.catalog.FLAGS` explains them.
    blendedness : `numpy.ndarray`, (N,)
        1 - sum(I_i^2) / sum(I_tot I_i) over the models, bands weighted by their noise.
    data_coverage : `numpy.ndarray`, (N,)
        Part of the model's flux, mean over bands, that lies on valid pixels.
    chi2 : `numpy.ndarray`, (N,)
        Mean over the valid pixels, weighted with the model's share of the flux, of squared residual over
        variance.
    """

    bands: tuple[str, ...]
    network: str
    weights_sha256: str
    origin: tuple[int, int]
    id: NDArray[np.int64]
    parent: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    peak_x: NDArray[np.float64]
    peak_y: NDArray[np.float64]
    corner_x: NDArray[np.int64]
    corner_y: NDArray[np.int64]
    psf_index: NDArray[np.int64]
    iteration: NDArray[np.int64]
    latent_mean: NDArray[np.float32]
    latent_sigma: NDArray[np.float32]
    latent_covariance: NDArray[np.float32]
    flux: NDArray[np.float64]
    flux_err: NDArray[np.float64]
    flux_network: NDArray[np.float64]
    moments: NDArray[np.float32]
    moments_err: NDArray[np.float32]
    model_frame: NDArray[np.float32]
    observed: NDArray[np.float32]
    flags: dict[str, NDArray[np.bool_]]
    blendedness: NDArray[np.float64]
    data_coverage: NDArray[np.float64]
    chi2: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.id)

    def to_table(self) -> Table:
        """Make the table from which the models can be rendered again.

        Returns
        -------
        table : `astropy.table.Table`
            One row per source: identifiers, place in tract pixels, latents, fluxes, and the network by name
            and checksum. A few hundred bytes per row.
        """
        from astropy import units as u
        from astropy.table import Column, Table

        n, bands = len(self), ", ".join(self.bands)
        y0, x0 = self.origin
        nothing = u.dimensionless_unscaled
        columns = [
            ("id", self.id, nothing, "Identifier of the object"),
            ("parent", self.parent, nothing, "Identifier of its parent"),
            ("corner_x", self.corner_x + x0, u.pix, "Tract pixel column of the model's pixel [0, 0]"),
            ("corner_y", self.corner_y + y0, u.pix, "Tract pixel row of the model's pixel [0, 0]"),
            ("x", self.x + x0, u.pix, "Centroid of the model, tract pixel column"),
            ("y", self.y + y0, u.pix, "Centroid of the model, tract pixel row"),
            ("latent_mean", self.latent_mean, nothing, "Latents: mean of the approximate posterior"),
            ("latent_sigma", self.latent_sigma, nothing, "Latents: width of the approximate posterior"),
            ("flux", self.flux.astype(np.float32), u.nJy, f"Flux of the model in the bands {bands}"),
            ("fallback", self._flag("fallback"), nothing, "The model is a point source, not the decoder's"),
            ("network", np.full(n, self.network), nothing, "Name of the network and of its decoder"),
            ("weights_sha256", np.full(n, self.weights_sha256), nothing, "Checksum of the network's graph"),
        ]
        return Table([Column(d, name=k, unit=unit, description=doc) for k, d, unit, doc in columns])

    def _flag(self, name: str) -> NDArray[np.bool_]:
        return self.flags.get(name, np.zeros(len(self), dtype=bool))

    @classmethod
    def from_table(
        cls,
        table: Table,
        network: Network | Decoder,
        psf: PsfGrid,
        origin: tuple[int, int] = (0, 0),
    ) -> SourceModels:
        """Render models from their table.

        Parameters
        ----------
        table : `astropy.table.Table`
            What `to_table` made.
        network : `Network` or `Decoder`
            The network named in the table, or its decoder.
        psf : `PsfGrid`
            PSFs of the scene in the network's bands.
        origin : `tuple` [`int`], optional
            Tract pixel (y, x) of the scene's pixel [0, 0].

        Returns
        -------
        models : `SourceModels`
            The sources with their images. What the table does not hold is NaN. A source that fell back to
            what the image holds comes back as a point source of its flux.

        Raises
        ------
        ValueError
            Raised if the table was made with another network.
        """
        decoder = network.decoder if isinstance(network, Network) else network
        expected = {"network": decoder.metadata.name}
        # A decoder does not know the checksum of its deblender's graph.
        if isinstance(network, Network):
            expected["weights_sha256"] = network.metadata.weights_sha256
        for column, mine in expected.items():
            found = sorted({str(value) for value in table[column]})
            if found not in ([], [mine]):
                raise ValueError(f"The table was made with {column} {found}, this one is {mine!r}.")
        n, bands = len(table), decoder.metadata.bands
        y0, x0 = origin
        x, y = np.asarray(table["x"], float) - x0, np.asarray(table["y"], float) - y0
        corner_x = np.asarray(table["corner_x"], np.int64) - x0
        corner_y = np.asarray(table["corner_y"], np.int64) - y0
        centre_y, centre_x = decoder.metadata.centre
        psf_index = psf.index(corner_x + centre_x, corner_y + centre_y)
        latent = np.asarray(table["latent_mean"], np.float32).reshape(n, decoder.metadata.latent_size)
        flux = np.asarray(table["flux"], float).reshape(n, len(bands))
        fallback = np.asarray(table["fallback"], bool)
        renderer = Renderer(decoder.metadata, psf)
        shapes = unit_shapes(decoder.render(latent))[0]
        if fallback.any():
            dx, dy = x - corner_x - centre_x, y - corner_y - centre_y
            shapes[fallback] = renderer.point_sources(dx[fallback], dy[fallback])
        model = shapes * np.nan_to_num(flux)[:, :, None, None].astype(np.float32)
        nothing = np.full(n, np.nan)
        return cls(
            bands=bands,
            network=decoder.metadata.name,
            weights_sha256=str(table["weights_sha256"][0]) if n else "",
            origin=(int(y0), int(x0)),
            id=np.asarray(table["id"], np.int64),
            parent=np.asarray(table["parent"], np.int64),
            x=x,
            y=y,
            peak_x=nothing,
            peak_y=nothing.copy(),
            corner_x=corner_x,
            corner_y=corner_y,
            psf_index=psf_index,
            iteration=np.zeros(n, np.int64),
            latent_mean=latent,
            latent_sigma=np.asarray(table["latent_sigma"], np.float32).reshape(latent.shape),
            latent_covariance=np.full((*latent.shape, latent.shape[1]), np.nan, np.float32),
            flux=flux,
            flux_err=np.full(flux.shape, np.nan),
            flux_network=np.full(flux.shape, np.nan),
            moments=np.full((*flux.shape, 3), np.nan, np.float32),
            moments_err=np.full((*flux.shape, 3), np.nan, np.float32),
            model_frame=model,
            observed=renderer.observed(model, psf_index),
            flags={"fallback": fallback},
            blendedness=nothing.copy(),
            data_coverage=nothing.copy(),
            chi2=nothing.copy(),
        )


@dataclasses.dataclass(eq=False)
class ParentSummary:
    """What happened to the parents, one row each; a struct of arrays.

    Parameters
    ----------
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].
    id : `numpy.ndarray`, (M,)
        Identifiers, int64.
    x0, y0, width, height : `numpy.ndarray`, (M,)
        Bounding box of the footprint, scene coordinates, pixel.
    area : `numpy.ndarray`, (M,)
        Pixels of the footprint.
    n_peaks : `numpy.ndarray`, (M,)
        Peaks that were given, or found to start from.
    n_child : `numpy.ndarray`, (M,)
        Sources with a model that it has in the end.
    iterations : `numpy.ndarray`, (M,)
        Times its members went through the network.
    n_pixels : `numpy.ndarray`, (M,)
        Valid pixels of the footprint, summed over bands.
    chi2_start, chi2 : `numpy.ndarray`, (M,)
        Sum over these pixels of squared image over variance, before and after subtracting the models.
    flags : `dict` [`str`, `numpy.ndarray`]
        Flags by name, (M,) each; `lsst.meas.vaedeblend.catalog.FLAGS` explains them.
    """

    origin: tuple[int, int]
    id: NDArray[np.int64]
    x0: NDArray[np.int64]
    y0: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    area: NDArray[np.int64]
    n_peaks: NDArray[np.int64]
    n_child: NDArray[np.int64]
    iterations: NDArray[np.int64]
    n_pixels: NDArray[np.int64]
    chi2_start: NDArray[np.float64]
    chi2: NDArray[np.float64]
    flags: dict[str, NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.id)


def overlaps(
    corner_y: ArrayLike, corner_x: ArrayLike, size: int, shape: tuple[int, int]
) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """Match cutouts with an image.

    Parameters
    ----------
    corner_y, corner_x : array_like, (N,)
        The pixel of the image on which pixel [0, 0] of each cutout lies.
    size : `int`
        Width of the cutouts, pixel.
    shape : `tuple` [`int`]
        (H, W) of the image.

    Yields
    ------
    index : `int`
        Number of a cutout that has a pixel on the image.
    outer, inner : `tuple` [`slice`]
        The common window in the image and in the cutout.
    """
    for i, (y, x) in enumerate(
        zip(np.asarray(corner_y).tolist(), np.asarray(corner_x).tolist(), strict=True)
    ):
        y1, y2 = max(y, 0), min(y + size, shape[0])
        x1, x2 = max(x, 0), min(x + size, shape[1])
        if y1 < y2 and x1 < x2:
            yield i, (slice(y1, y2), slice(x1, x2)), (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))


def add_cutouts(total: NDArray, cutouts: NDArray, corner_y: ArrayLike, corner_x: ArrayLike) -> None:
    """Add cutouts to an image, in place.

    Parameters
    ----------
    total : `numpy.ndarray`, (B, H, W)
        The image.
    cutouts : `numpy.ndarray`, (N, B, S, S)
        What to add; parts beyond the image's border are left out.
    corner_y, corner_x : array_like, (N,)
        The pixel of the image on which pixel [0, 0] of each cutout lies.
    """
    for i, outer, inner in overlaps(corner_y, corner_x, cutouts.shape[-1], total.shape[-2:]):
        total[:, *outer] += cutouts[i][:, *inner]


def cut_out(image: NDArray, corner_y: ArrayLike, corner_x: ArrayLike, size: int) -> NDArray:
    """Cut squares out of an image.

    Parameters
    ----------
    image : `numpy.ndarray`, (B, H, W)
        The image.
    corner_y, corner_x : array_like, (N,)
        The pixel of the image for pixel [0, 0] of each cutout.
    size : `int`
        Width S of the cutouts, pixel.

    Returns
    -------
    cutouts : `numpy.ndarray`, (N, B, S, S)
        The cutouts, 0 beyond the image's border.
    """
    out = np.zeros((len(np.asarray(corner_y)), len(image), size, size), image.dtype)
    for i, outer, inner in overlaps(corner_y, corner_x, size, image.shape[-2:]):
        out[i][:, *inner] = image[:, *outer]
    return out


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
    add_cutouts(total, models.observed, models.corner_y, models.corner_x)
    return total


def redistribute(scene: Scene, models: SourceModels, footprints: bool = True) -> NDArray[np.float32]:
    """Share out the image among the sources in proportion to their models.

    Each pixel's value is divided as the positive parts of the models there are, so that no flux is lost where
    any model has some; what measurement sees of scarlet's models is made the same way (Melchior et al. 2018,
    Astronomy and Computing 24, 129).

    Parameters
    ----------
    scene : `Scene`
        The scene; it must have the models' bands.
    models : `SourceModels`
        The sources.
    footprints : `bool`, optional
        Whether a source's image ends at its parent's footprint. Beyond it the models are faint and would
        share out noise.

    Returns
    -------
    images : `numpy.ndarray`, (N, B, S, S)
        Images of the sources as observed, nJy, on the models' cutouts; 0 in invalid pixels.

    Raises
    ------
    ValueError
        Raised if the scene lacks a band of the models.
    """
    scene = scene.reordered(models.bands)
    share = np.maximum(models.observed, 0.0)
    size = share.shape[-1]
    if footprints:
        parents = {parent.id: parent for parent in scene.parents}
        inside = np.zeros((1, *scene.shape), bool)
        for number in np.unique(models.parent):
            rows = np.flatnonzero(models.parent == number)
            if int(number) not in parents:
                raise ValueError(f"The models have a parent {number} that the scene does not have.")
            window, footprint = parents[int(number)].window(scene.shape)
            inside[0][window] = footprint
            share[rows] *= cut_out(inside, models.corner_y[rows], models.corner_x[rows], size)
            inside[0][window] = False
    total = np.zeros(scene.image.shape, np.float32)
    add_cutouts(total, share, models.corner_y, models.corner_x)
    ratio = np.divide(scene.image, total, out=np.zeros_like(total), where=total > 0)
    return share * cut_out(ratio, models.corner_y, models.corner_x, size)
