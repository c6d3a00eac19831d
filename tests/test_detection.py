# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Our own detection: its threshold in white and in correlated noise, with sky left over and masked pixels."""

from __future__ import annotations

import numpy as np
import pytest
from lsst.meas.vaedeblend import detect
from lsst.meas.vaedeblend.scene import find_parents
from lsst.meas.vaedeblend.simulation.sky_fields import correlated_noise
from scipy import ndimage
from synthetic import gaussian_image

SIZE, SIGMA = 240, 1.8
SHAPE = (SIZE, SIZE)


def correlated(seed: int, bands: int = 2) -> np.ndarray:
    """Noise of unit variance whose neighbours correlate by 0.3 and 0.25."""
    rng = np.random.default_rng(seed)
    return np.stack([correlated_noise(SHAPE, (0.3, 0.25), 0.0, rng) for _ in range(bands)])


def ground(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(image.shape), np.ones(image.shape, bool)


def test_threshold_and_growth():
    noise = 2.0
    # The matched filter gives a point source of flux f the significance f / (noise sqrt(4 pi) sigma). Without
    # noise in the image nothing can be learnt of it, and few free pixels leave it at that.
    limit = 5 * noise * np.sqrt(4 * np.pi) * SIGMA
    image = np.stack([f * limit * gaussian_image((61, 61), 30, 30, SIGMA) for f in (1.2, 0.8)])
    variance, valid = np.full(image.shape, noise**2), np.ones(image.shape, bool)
    found = detect(image, variance, valid, [SIGMA, SIGMA])
    assert not found.measured.any() and (found.factor == 1).all()
    assert found.detected[0, 30, 30] and not found.detected[1].any()
    np.testing.assert_allclose(found.peaks, [[30, 30]], atol=0.05)
    plain = detect(image, variance, valid, SIGMA, grow=0.0).detected
    grown = np.flatnonzero(found.detected[0, 30])
    assert grown[0] == np.flatnonzero(plain[0, 30])[0] - int(2.4 * SIGMA)


def test_noise_makes_no_parents():
    image = correlated(1, 3)
    found = detect(image, *ground(image), SIGMA)
    assert found.measured.all() and found.detected.sum() == 0 and found.peaks.shape == (0, 2)
    # Were it white, many pixels would stand out.
    smoothed = ndimage.gaussian_filter(image, (0, SIGMA, SIGMA)) * np.sqrt(4 * np.pi) * SIGMA
    assert (smoothed > 5).sum() > 10
    # The filtered image scatters as the factor says.
    np.testing.assert_allclose(found.factor, smoothed.var(axis=(1, 2)), rtol=0.1)


def test_sky_left_over_makes_no_parents_and_takes_nothing_away():
    image = correlated(2)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    image += 0.4 * x + 0.2 * y
    flux = 12 * np.sqrt(4 * np.pi) * SIGMA
    places = [(60.0, 60.0), (180.0, 70.0), (120.0, 180.0)]
    for place in places:
        image += flux * gaussian_image(SHAPE, *place, SIGMA)
    found = detect(image, *ground(image), SIGMA)
    parents = find_parents(found.detected.any(axis=0))
    assert len(parents) == len(found.peaks) == 3
    for place in places:
        assert np.hypot(*(found.peaks - place).T).min() < 1
    inner = found.sky[:, 60:-60, 60:-60]
    assert inner.mean() == pytest.approx(0.3, abs=0.05)


def test_bright_objects_have_one_parent_and_masked_pixels_none():
    image = correlated(3)
    # A Moffat profile with wings, and its core masked.
    y, x = np.mgrid[:SIZE, :SIZE]
    image += 5000 * (1 + ((y - 120) ** 2 + (x - 110) ** 2) / 2.5**2) ** -2.2
    core = np.hypot(y - 120, x - 110) < 4
    image[:, core] = np.nan
    image[0, 200:203, 200] = 1e20
    variance, valid = ground(image)
    valid[0, 200:203, 200] = False
    variance[1, 30, 30] = 0
    found = detect(image, variance, valid, SIGMA)
    parents = find_parents(found.detected.any(axis=0))
    assert len(parents) == 1
    window, inside = parents[0].window(SHAPE)
    assert inside[120 - window[0].start, 110 - window[1].start - 8]
    assert np.isfinite(found.sky).all() and np.isfinite(found.sky_error).all()
    assert (found.factor > 1.2).all() and (found.factor < 2.6).all()


def test_what_does_not_fit_is_refused():
    image = np.zeros((2, 30, 30))
    variance, valid = ground(image)
    with pytest.raises(ValueError, match="should be"):
        detect(image, variance[0], valid, SIGMA)
    with pytest.raises(ValueError, match="should be"):
        detect(image, variance, valid[0], SIGMA)
    with pytest.raises(ValueError, match="positive in every band"):
        detect(image, variance, valid, [1.0, 0.0])
    nothing = detect(image, variance, ~valid, SIGMA)
    assert not nothing.detected.any() and not nothing.sky.any()
