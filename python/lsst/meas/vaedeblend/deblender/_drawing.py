# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""From cutouts and latents to images as observed, for both kinds of networks.

Networks that draw Gaussians are drawn on squares as wide as a source needs, and can be refined on the
pixels. Of others there is an image in the network's frame, which is taken to the observed frame whole.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from ..inference import Grids
from ..network import Network
from ..rendering import Renderer, unit_shapes

__all__ = ["Drawing", "Drawn", "GridDrawing", "PixelDrawing", "choose_drawing"]

_OUTSIDE = 1e-5
"""Part of the squared signal-to-noise ratio of a source that may lie outside of its square; one sigma in
any case."""


@dataclasses.dataclass(eq=False)
class Drawn:
    """Images of sources that are not part of the state yet.

    Parameters
    ----------
    images : `list` [`tuple` [`numpy.ndarray`]]
        Of each width: indices of the sources that have it, and their images (K, B, W, W) of unit flux.
    flux : `numpy.ndarray`, (N, B)
        Fluxes that go with the latents, nJy.
    offset : `numpy.ndarray`, (N, 2)
        Centroids (x, y) from the target's pixel.
    wanted : `numpy.ndarray`, (N,)
        Widths that the light asks for, pixel.
    good : `numpy.ndarray`, (N,)
        Whether there is an image.
    """

    images: list[tuple[NDArray[np.int64], NDArray[np.float32]]]
    flux: NDArray[np.float64]
    offset: NDArray[np.float64]
    wanted: NDArray[np.int64]
    good: NDArray[np.bool_]


class Drawing(Protocol):
    """What the procedure asks of either kind of network."""

    def answer(
        self, image: NDArray, valid: NDArray, noise: NDArray, cell: NDArray, batch_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Drawn]:
        """Means and widths of the posterior for cutouts, and the models that go with them."""

    def draw(self, latent: NDArray, noise: NDArray, cell: NDArray, wanted: NDArray) -> Drawn:
        """Models of latents; ``wanted`` are the widths that they had last."""


class GridDrawing:
    """Networks that draw Gaussians.

    Parameters
    ----------
    network : `Network`
        The network.
    grids : `Grids`
        Its graphs with the scene's PSFs.
    moments : `numpy.ndarray`, (P, B, 3)
        Moments of the PSFs, pixel^2.
    """

    def __init__(self, network: Network, grids: Grids, moments: NDArray) -> None:
        self._network, self.grids, self._moments = network, grids, moments

    def answer(
        self, image: NDArray, valid: NDArray, noise: NDArray, cell: NDArray, batch_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Drawn]:
        """See `Drawing`."""
        mean, sigma, finite = self._network.encode(image, valid, noise, self._moments[cell], batch_size)
        mixture = self.grids.mixture(mean)
        wanted = self.grids.choose(
            mixture.weight, mixture.covariance, cell, noise.astype(float) ** -2, _OUTSIDE
        )
        drawn = self.draw(mean, noise, cell, wanted)
        drawn.good &= finite
        return mean, sigma, drawn

    def draw(self, latent: NDArray, noise: NDArray, cell: NDArray, wanted: NDArray) -> Drawn:
        """See `Drawing`."""
        n, bands = noise.shape
        flux, offset = np.full((n, bands), np.nan), np.zeros((n, 2))
        new, good, images = wanted.copy(), np.zeros(n, bool), []
        for width in np.unique(wanted).tolist():
            index = np.flatnonzero(wanted == width)
            drawn, mixture = self.grids.draw(latent[index], cell[index], width)
            light = mixture.weight.astype(np.float64)
            with np.errstate(all="ignore"):
                flux[index] = light.sum(axis=2)
                sound = np.isfinite(flux[index]).all(axis=1)
                sound &= np.isfinite(drawn.sum(axis=(1, 2, 3), dtype=np.float64))
                counted = (light / noise[index, :, None]).sum(axis=1)
                offset[index] = np.einsum("kg,kgx->kx", counted, mixture.position)
                offset[index] /= counted.sum(axis=1, keepdims=True)
            good[index] = sound & np.isfinite(offset[index]).all(axis=1)
            kept = index[good[index]]
            if len(kept):
                images.append((kept, drawn[good[index]]))
                new[kept] = self.grids.choose(
                    light[good[index]],
                    mixture.covariance[good[index]],
                    cell[kept],
                    noise[kept].astype(float) ** -2,
                    _OUTSIDE,
                )
        return Drawn(images, flux, offset, new, good)


    def held(self, latent: NDArray, width: NDArray[np.int64]) -> NDArray[np.float64]:
        """Part of the light of models that squares hold, (N, B), the network's cutout or larger ones.

        Wings beyond them are hardly known, and no part of the flux that is told.
        """
        mixture = self._network.render.mixture(latent)
        size = self._network.metadata.cutout_size
        reach = np.sqrt(0.5) * size / 2
        light = mixture.weight.astype(np.float64)
        # As if axes did not correlate, which is good enough to find the few that need a closer look.
        part = erf(reach / np.sqrt(np.maximum(mixture.covariance[..., ::2], 1e-3))).prod(axis=2)
        out = (light * part[:, None]).sum(axis=2) / light.sum(axis=2)
        wide = np.flatnonzero((out < 0.9995).any(axis=1) & (width <= size))
        out[out >= 0.9995] = 1.0
        for start in range(0, len(wide), 64):
            rows = wide[start : start + 64]
            models = self._network.decoder.render(latent[rows])
            out[rows] = models.sum(axis=(2, 3), dtype=np.float64) / light[rows].sum(axis=2)
        for w in np.unique(width[width > size]).tolist():
            rows = np.flatnonzero(width == w)
            out[rows] = self.grids.draw_plain(latent[rows], w).sum(axis=(2, 3), dtype=np.float64)
        return np.minimum(out, 1.0)


class PixelDrawing:
    """Networks whose models are images.

    Parameters
    ----------
    network : `Network`
        The network.
    renderer : `Renderer`
        Takes its models to the observed frame.
    moments : `numpy.ndarray`, (P, B, 3)
        Moments of the PSFs, pixel^2.
    """

    def __init__(self, network: Network, renderer: Renderer, moments: NDArray) -> None:
        self._network, self._renderer, self._moments = network, renderer, moments

    def answer(
        self, image: NDArray, valid: NDArray, noise: NDArray, cell: NDArray, batch_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Drawn]:
        """See `Drawing`."""
        output = self._network.deblend(image, valid, noise, self._moments[cell], batch_size=batch_size)
        drawn = self._drawn(output.model, noise, cell)
        drawn.good &= output.finite
        return output.latent_mean, output.latent_sigma, drawn

    def draw(self, latent: NDArray, noise: NDArray, cell: NDArray, wanted: NDArray) -> Drawn:
        """See `Drawing`."""
        return self._drawn(self._network.decoder.render(latent), noise, cell)

    def _drawn(self, models: NDArray, noise: NDArray, cell: NDArray) -> Drawn:
        shapes, flux, good = unit_shapes(models)
        good &= np.isfinite(flux).all(axis=1)
        size = self._network.metadata.cutout_size
        centre_y, centre_x = self._network.metadata.centre
        scale = np.nan_to_num(np.maximum(flux, 0.0)) / noise
        image = np.maximum(np.einsum("kbyx,kb->kyx", shapes, scale), 0.0)
        total = image.sum(axis=(1, 2))
        pixels, total = np.arange(size), np.where(total > 0, total, 1.0)
        x, y = image.sum(axis=1) @ pixels / total, image.sum(axis=2) @ pixels / total
        offset = np.stack([x - np.floor(centre_x + 0.5), y - np.floor(centre_y + 0.5)], axis=1)
        index = np.flatnonzero(good)
        images = [(index, self._renderer.observed(shapes[index], cell[index]))] if len(index) else []
        return Drawn(images, np.where(good[:, None], flux, np.nan), offset, np.full(len(good), size), good)


def choose_drawing(network: Network, renderer: Renderer, moments: NDArray) -> Drawing:
    """Choose how a network is drawn: on squares if it has the graphs for it and squares share its centre."""
    metadata = network.metadata
    size = metadata.cutout_size
    if network.can_fit and metadata.frame["type"] == "gaussian" and metadata.centre == (size // 2, size // 2):
        grids = Grids(network.render, network.linearise, renderer.psf.stamps, moments)
        return GridDrawing(network, grids, moments)
    return PixelDrawing(network, renderer, moments)
