# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fluxes and shapes of sources with the uncertainty that the posterior over their latents gives them."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from .ground.bands import reference_band
from .ground.psf import adaptive_moments
from .network import Network
from .rendering import Renderer, latent_shapes, square, unit_shapes
from .scene import PsfGrid
from .sources import SourceModels

__all__ = ["Posterior", "sample_posterior"]

# Sources whose samples are decoded and rendered at once; bounds the memory.
_CHUNK = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """What is known of the sources' fluxes and shapes, one row each; NaN where nothing is.

    Parameters
    ----------
    bands : `tuple` [`str`]
        Bands in the order of the fluxes.
    shape_band : `str`
        Band of the shapes.
    flux : `numpy.ndarray`, (N, B)
        Fluxes fitted jointly with the neighbours, nJy.
    flux_err : `numpy.ndarray`, (N, B)
        Standard deviations over data and posterior, nJy.
    shape, shape_err : `numpy.ndarray`, (N, 3)
        Adaptive second moments Ixx, Iyy, Ixy of the model in the network's frame, pixel^2, and standard
        deviations over the posterior.
    """

    bands: tuple[str, ...]
    shape_band: str
    flux: NDArray[np.float64]
    flux_err: NDArray[np.float64]
    shape: NDArray[np.float64]
    shape_err: NDArray[np.float64]


def sample_posterior(
    models: SourceModels, network: Network, psf: PsfGrid, n_samples: int = 8, band: str | None = None
) -> Posterior:
    """Propagate the posterior over the latents to fluxes and shapes.

    Latents are drawn from their posterior and decoded: where they were refined on the pixels, from the normal
    distribution with the covariance of the fit, whose errors of fluxes are taken as they are; elsewhere from
    the encoder's, which is diagonal (Arcelin et al. 2021, section 3). There the flux of a draw is that which
    its shape, as observed, would have by least squares if the source looked exactly as its model does, and
    the scatter of these fluxes, which is what not knowing the shape costs, is added to the errors at given
    shapes. All sources share the same standard normal draws, in pairs of opposite sign, so that the result is
    the same in every run and does not depend on which other sources there are.

    Parameters
    ----------
    models : `lsst.meas.vaedeblend.sources.SourceModels`
        The sources.
    network : `lsst.meas.vaedeblend.network.Network`
        The network they come from, with its decoder.
    psf : `lsst.meas.vaedeblend.scene.PsfGrid`
        PSFs of the scene in the network's bands.
    n_samples : `int`, optional
        Draws per source, an even number; with 0 there are no errors of shapes, and those of fluxes are the
        sources' own.
    band : `str`, optional
        Band of the shapes, by default that of `lsst.meas.vaedeblend.ground.bands.reference_band`.

    Returns
    -------
    posterior : `Posterior`
        Fluxes, shapes and errors. Sources without a model from the network have no shape.

    Raises
    ------
    ValueError
        Raised if the number of draws is negative or odd, or the models are not the network's.
    NetworkError
        Raised if there is no decoder.
    """
    if n_samples < 0 or n_samples % 2:
        raise ValueError(f"The number of draws should be even and not negative, not {n_samples}.")
    if models.bands != network.metadata.bands:
        raise ValueError(f"The models have bands {models.bands}, the network {network.metadata.bands}.")
    band = reference_band(models.bands) if band is None else band
    b, n = models.bands.index(band), len(models)
    from_network = np.isfinite(models.flux_network).any(axis=1)
    shape = np.full((n, 3), np.nan)
    shape[from_network] = models.images.shapes(b)[from_network]
    flux_err, shape_err = models.flux_err.copy(), np.full((n, 3), np.nan)
    rows = np.flatnonzero(from_network)
    if n_samples and len(rows):
        half = np.random.default_rng(0).standard_normal((n_samples // 2, models.latent_mean.shape[1]))
        draws = np.concatenate([half, -half]).astype(np.float32)
        renderer = Renderer(network.metadata, psf)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            scatter, shape_err[part] = _scatter(models, network, renderer, part, draws, b)
            flux_err[part] = np.hypot(flux_err[part], np.nan_to_num(scatter))
    return Posterior(models.bands, band, models.flux.copy(), flux_err, shape, shape_err)


def _scatter(
    models: SourceModels, network: Network, renderer: Renderer, rows: NDArray, draws: NDArray, band: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scatter of the fluxes, (K, B) nJy, and scatter of the moments, (K, 3), over draws (D, L)."""
    k, d = len(rows), len(draws)
    latent = models.latent_mean[rows, None] + models.latent_sigma[rows, None] * draws
    for i, row in enumerate(rows):
        if np.isfinite(models.latent_covariance[row]).all():
            # Rounding may leave an eigenvalue below zero.
            values, vectors = np.linalg.eigh(models.latent_covariance[row].astype(float))
            latent[i] = models.latent_mean[row] + draws @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
    refined = np.isfinite(models.latent_covariance[rows]).all(axis=(1, 2))
    flat = latent.reshape(k * d, -1)
    if network.can_fit and refined.all():
        # Errors of fluxes are those of the fit, and shapes of Gaussians need no pixels.
        moments = latent_shapes(network.render.mixture, flat, band, network.metadata)
        sound = np.ones((k, d, 1), bool)
        return np.zeros((k, len(models.bands))), _spread(moments.reshape(k, d, 3), sound)
    shapes, _, whole = unit_shapes(network.decoder.render(flat))
    moments = adaptive_moments(shapes[:, band])
    observed = renderer.observed(shapes, np.repeat(models.psf_index[rows], d))
    observed = observed.reshape(k, d, *observed.shape[1:])
    with np.errstate(invalid="ignore", divide="ignore"):
        model = square(models.images.observed(rows), observed.shape[-1])
        own = np.einsum("kbyx,kdbyx->kdb", model, observed, dtype=np.float64)
        own /= np.einsum("kdbyx,kdbyx->kdb", observed, observed, dtype=np.float64)
    sound = whole.reshape(k, d, 1)
    scatter = np.where(refined[:, None], 0.0, _spread(own, sound))
    return scatter, _spread(moments.reshape(k, d, 3), sound)


def _spread(values: NDArray, good: NDArray) -> NDArray[np.float64]:
    """Standard deviation over the second axis of those values that are good and finite; NaN below two."""
    good = good & np.isfinite(values)
    count = good.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(good, values, 0.0).sum(axis=1) / count
        square = np.where(good, values - mean[:, None], 0.0) ** 2
        return np.where(count > 1, np.sqrt(square.sum(axis=1) / (count - 1)), np.nan)
