# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Do posterior widths mean what they say? How often the truth lies inside of the 68 percent interval."""

from __future__ import annotations

__all__ = ["INTERVAL", "flux_inside", "shape_inside"]

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from ..ground.psf import adaptive_moments
from ..network import Network
from ..rendering import Renderer
from ..scene import Scene
from ..sources import SourceModels

INTERVAL = float(norm.cdf(1) - norm.cdf(-1))
"""Probability within one standard deviation, 0.683."""


def flux_inside(sources: SourceModels, rows: NDArray, flux: NDArray) -> NDArray[np.bool_]:
    """Tell for which sources the true flux lies within one standard deviation of the measured one.

    Parameters
    ----------
    sources : `lsst.meas.vaedeblend.sources.SourceModels`
        Deblended sources.
    rows : `numpy.ndarray`, (K,)
        Rows of the sources in question.
    flux : `numpy.ndarray`, (K, B)
        Their true fluxes, nJy.

    Returns
    -------
    inside : `numpy.ndarray`, (K, B)
    """
    return np.abs(sources.flux[rows] - flux) < sources.flux_err[rows]


def ellipticity(images: NDArray) -> NDArray[np.float64]:
    """Ellipticity (Ixx - Iyy, 2 Ixy) / (Ixx + Iyy) from adaptive moments, (..., 2)."""
    ixx, iyy, ixy = np.moveaxis(adaptive_moments(images), -1, 0)
    return np.stack([ixx - iyy, 2 * ixy], axis=-1) / (ixx + iyy)[..., None]


def shape_inside(
    sources: SourceModels,
    rows: NDArray,
    truth: NDArray,
    scene: Scene,
    network: Network,
    band: int,
    draws: int = 32,
    seed: int = 1,
) -> NDArray[np.bool_]:
    """Tell for which sources the true ellipticity lies within the 68 percent interval of posterior draws.

    Parameters
    ----------
    sources : `lsst.meas.vaedeblend.sources.SourceModels`
        Deblended sources.
    rows : `numpy.ndarray`, (K,)
        Rows of the sources in question.
    truth : `numpy.ndarray`, (K, S, S)
        Their noiseless images as observed.
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The scene, for its PSFs.
    network : `lsst.meas.vaedeblend.network.Network`
        The network that made the models.
    band : `int`
        Index of the band in which shapes are compared.
    draws : `int`, optional
        Draws from the posterior of each source.
    seed : `int`, optional
        Seed of the draws.

    Returns
    -------
    inside : `numpy.ndarray`, (K, 2)
        For both components of the ellipticity of the observed image. Rows without a posterior, and those
        whose true image has no adaptive moments, are left out.
    """
    rng = np.random.default_rng(seed)
    renderer = Renderer(network.metadata, scene.psf)
    true = ellipticity(truth)
    low, high = norm.cdf(-1), norm.cdf(1)
    inside = []
    for row, e in zip(rows, true, strict=True):
        covariance = sources.latent_covariance[row].astype(float)
        if not (np.isfinite(covariance).all() and np.isfinite(e).all()):
            continue
        latent = rng.multivariate_normal(sources.latent_mean[row], covariance, draws, method="eigh")
        cells = np.full(draws, sources.psf_index[row])
        images = renderer.observed(network.decoder.render(latent), cells)[:, band]
        interval = np.nanquantile(ellipticity(images), [low, high], axis=0)
        inside.append((interval[0] < e) & (e < interval[1]))
    return np.array(inside, bool).reshape(-1, 2)
