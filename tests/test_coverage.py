# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""How often truths lie inside of the intervals."""

from types import SimpleNamespace

import numpy as np
from lsst.meas.vaedeblend.evaluation.coverage import INTERVAL, ellipticity, flux_inside, shape_inside
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.network import load_network
from lsst.meas.vaedeblend.rendering import Renderer
from lsst.meas.vaedeblend.scene import PsfGrid


def test_flux_inside():
    assert abs(INTERVAL - 0.6827) < 1e-4
    sources = SimpleNamespace(
        flux=np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]]), flux_err=np.full((3, 2), 0.5)
    )
    found = flux_inside(sources, np.array([2, 1]), np.array([[5.4, 6.6], [2.4, 1.0]]))
    assert found.tolist() == [[True, False], [False, False]]


def test_ellipticity_of_gaussians():
    y, x = np.mgrid[-20:21, -20:21]
    image = np.exp(-0.5 * (x**2 / 9 + y**2 / 4))
    np.testing.assert_allclose(ellipticity(image[None])[0], [5 / 13, 0.0], atol=1e-3)


def test_shape_inside():
    network = load_network("lsst_ugrizy", threads=1)
    length, bands = network.metadata.latent_size, len(network.metadata.bands)
    psf = PsfGrid.constant(np.tile(gaussian_psf(1.5, 25), (bands, 1, 1)))
    scene = SimpleNamespace(psf=psf)
    rng = np.random.default_rng(4)
    mean = 0.3 * rng.standard_normal((3, length)).astype(np.float32)
    covariance = np.tile(0.01 * np.eye(length, dtype=np.float32), (3, 1, 1))
    covariance[2] = np.nan
    sources = SimpleNamespace(latent_mean=mean, latent_covariance=covariance, psf_index=np.zeros(3, np.int64))
    images = Renderer(network.metadata, psf).observed(network.decoder.render(mean), np.zeros(3, np.int64))
    truth = images[:, 2]
    rows = np.arange(3)
    # The mean lies in the middle of the draws, and none of these is as elongated as the last image.
    assert shape_inside(sources, rows, truth, scene, network, 2).tolist() == [[True, True], [True, True]]
    y, x = np.mgrid[-32:32, -32:32]
    elongated = np.tile(np.exp(-0.5 * (x**2 / 16 + y**2 / 4)), (3, 1, 1))
    found = shape_inside(sources, rows, elongated, scene, network, 2)
    assert found.shape == (2, 2) and not found[:, 0].any()
