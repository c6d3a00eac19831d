# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""An object's numbers depend on nothing but its surroundings, and one failure is one parent's."""

from __future__ import annotations

import numpy as np
import pytest
import synthetic
from lsst.meas.vaedeblend.deblender import DeblendConfig, deblend
from lsst.meas.vaedeblend.deblender._procedure import _deblend
from lsst.meas.vaedeblend.deblender._refinement import _linearise
from lsst.meas.vaedeblend.deblender._state import State
from lsst.meas.vaedeblend.network import Network, load_network
from lsst.meas.vaedeblend.scene import Parent, Scene
from scipy.spatial import cKDTree

SHAPE = (110, 300)
X, Y = [50.3, 57.6, 64.2, 40.0], [53.8, 54.4, 47.3, 80.2]
FLUX = np.array([[300, 400, 500], [4000, 3000, 2000], [350, 350, 350], [250, 200, 300]], float)
FAR_X, FAR_Y = [240.1, 246.3, 251.2], [54.0, 57.2, 51.1]

ROUNDING = 0.01
"""Standard deviations by which numbers may change where float32 sums take another order."""


def rebuilt(scene, **changes):
    """A scene with some of its parts replaced."""
    names = ("bands", "image", "variance", "valid", "psf", "pixel_scale", "parents", "edge", "origin")
    parts = {name: getattr(scene, name) for name in names}
    return Scene(**{**parts, **changes})


def make(far=0.0, noise_seed=1):
    """A blend and a galaxy alone, and another blend so many times as bright some 190 pixels away."""
    scene, _ = synthetic.make_scene(
        X + FAR_X, Y + FAR_Y, np.concatenate([FLUX, FLUX[:3]]), shape=SHAPE, seed=noise_seed
    )
    # Whatever is there, noise and footprints of the rest are the same.
    noise = np.random.default_rng(noise_seed).normal(0.0, 1.0, scene.image.shape)
    image = noise + synthetic.make_scene(X, Y, FLUX, shape=SHAPE, noise=0.0 + 1e-9)[0].image
    if far:
        image += far * synthetic.make_scene(FAR_X, FAR_Y, FLUX[:3], shape=SHAPE, noise=1e-9)[0].image
    parents = [p for p in scene.parents if far or p.peaks[:, 0].max() < 150]
    return rebuilt(scene, image=image, parents=parents)


def assert_same(one, other, rounding=ROUNDING, rows=slice(None)):
    """Objects of one result that the other has as well, matched by peaks, agree."""
    a, b = one.sources, other.sources
    own = np.arange(len(a))[rows]
    # Peaks that were found in a residual lie where rounding puts them.
    tree = cKDTree(np.column_stack([b.peak_x, b.peak_y]))
    distance, match = tree.query(np.column_stack([a.peak_x[own], a.peak_y[own]]))
    assert (distance <= np.where(a.iteration[own] > 0, 0.01, 0.0)).all()
    error, sigma = a.flux_err[own], a.latent_sigma[own]
    assert np.nanmax(np.abs(a.flux[own] - b.flux[match]) / error) <= rounding
    np.testing.assert_allclose(b.flux_err[match], error, rtol=max(rounding, 1e-9))
    assert np.abs((a.latent_mean[own] - b.latent_mean[match]) / sigma).max() <= rounding
    np.testing.assert_allclose(b.latent_sigma[match], sigma, rtol=max(rounding, 1e-9))
    for name in a.flags:
        np.testing.assert_array_equal(a.flags[name][own], b.flags[name][match], err_msg=name)


@pytest.fixture(scope="module")
def alone(gaussian_network):
    return deblend(make(), gaussian_network)


def test_the_scene_is_one_that_the_network_deblends(alone):
    order = [int(np.argmin(np.abs(alone.sources.peak_x - x))) for x in X]
    assert (np.abs(alone.sources.flux[order] - FLUX) < 5 * alone.sources.flux_err[order]).all()
    assert not any(flag.any() for flag in alone.sources.flags.values())
    assert (alone.parents.chi2 / alone.parents.n_pixels < 1.2).all()


@pytest.mark.parametrize("brightness", [1.0, 100.0])
def test_far_sources_do_not_matter(gaussian_network, alone, brightness):
    found = deblend(make(brightness), gaussian_network)
    assert len(found.sources) >= len(alone.sources) + 3
    assert_same(alone, found)


@pytest.mark.parametrize(
    "options", [{"batchSize": 1}, {"batchSize": 3}, {"refinementBatch": 1}, {"refinementBatch": 3}]
)
def test_batches_do_not_matter(gaussian_network, options):
    scene = make(3.0)
    plain = deblend(scene, gaussian_network)
    assert_same(plain, deblend(scene, gaussian_network, DeblendConfig(**options)))


def test_the_order_of_parents_does_not_matter(gaussian_network):
    scene = make(3.0)
    assert len(scene.parents) == 3
    plain = deblend(scene, gaussian_network)
    for order in ([2, 1, 0], [1, 2, 0]):
        other = rebuilt(scene, parents=[scene.parents[i] for i in order])
        assert_same(plain, deblend(other, gaussian_network))


def test_the_number_of_threads_does_not_matter(gaussian_network, gaussian_path, alone):
    assert_same(alone, deblend(make(), Network.load(gaussian_path, threads=2)))


def spoiled(scene, x, y, what):
    """A scene with a pixel that is no good in all bands."""
    image, variance = scene.image.copy(), scene.variance.copy()
    if what == "variance":
        variance[:, y, x] *= 1e-12
    else:
        image[:, y, x] = what
    return rebuilt(scene, image=image, variance=variance, valid=scene.valid.copy())


WRONG = [1e20, -1e20, 1e14, 1e10, float(np.finfo(np.float32).max), np.nan, "variance"]


@pytest.mark.parametrize("what", WRONG)
def test_a_pixel_that_is_no_good_is_its_parents(gaussian_network, what):
    near = ([50.3 + 69, 57.6 + 69, 50.0], [53.8, 54.4, 53.0])
    flux = np.concatenate([FLUX[:2], FLUX[:1]])
    scene, _ = synthetic.make_scene(*near, flux, shape=SHAPE)
    assert len(scene.parents) == 2
    touched = [len(p.peaks) for p in scene.parents].index(2)
    plain = deblend(scene, gaussian_network)
    found = deblend(spoiled(scene, 120, 54, what), gaussian_network)
    other = np.flatnonzero(plain.sources.parent != scene.parents[touched].id)
    assert len(other) == 1
    assert_same(plain, found, rows=other)
    of_parent = any(flag[touched] for flag in found.parents.flags.values())
    own = found.sources.parent == scene.parents[touched].id
    assert of_parent or any(flag[own].any() for flag in found.sources.flags.values())


@pytest.mark.parametrize("what", WRONG)
def test_a_pixel_within_the_blend_raises_nothing(gaussian_network, what):
    found = deblend(spoiled(make(), 52, 54, what), gaussian_network)
    assert np.isfinite(found.residual).all()
    assert len(found.sources) >= 4


def test_a_network_that_fails_on_all_sources_leaves_them_a_fallback(gaussian_network, monkeypatch):
    original = Network.encode

    def fail(self, *args, **options):
        mean, sigma, finite = original(self, *args, **options)
        return 0 * mean, 0 * sigma, np.zeros_like(finite)

    monkeypatch.setattr(Network, "encode", fail)
    found = deblend(make(), gaussian_network, DeblendConfig(findNewPeaks=False))
    assert found.sources.flags["fallback"].all() and len(found.sources) == 4
    assert (found.sources.flux > 0).all()


def test_a_network_that_fails_on_one_source_leaves_the_others_alone(gaussian_network, alone, monkeypatch):
    original = Network.encode

    def fail(self, image, valid, *args, **options):
        mean, sigma, finite = original(self, image, valid, *args, **options)
        # The one alone: its cutout reaches neither the border on the left nor the blend's middle.
        lost = np.abs(mean[:, 5] - gone) < 0.3 if len(mean) == 1 else np.arange(len(mean)) == which
        return mean, sigma, finite & ~lost

    which = int(np.argmin(np.abs(alone.sources.peak_x - X[3])))
    gone = alone.sources.latent_mean[which, 5]
    monkeypatch.setattr(Network, "encode", fail)
    found = deblend(make(), gaussian_network, DeblendConfig(findNewPeaks=False))
    np.testing.assert_array_equal(np.flatnonzero(found.sources.flags["fallback"]), [which])


# Convergence


def star_scene(masked=True, flux=6e5, seed=1):
    """A star with bands that have no data in its core, and a faint neighbour, in one parent."""
    x, y = [55.0, 66.0, 47.0], [55.0, 58.0, 45.0]
    fluxes = [[flux] * 3, [400, 400, 400], [900, 700, 600]]
    scene, _ = synthetic.make_scene(x, y, fluxes, [0.15, 1.0, 1.2], shape=(110, 110), seed=seed)
    valid = scene.valid.copy()
    if masked:
        valid[1:, 52:59, 52:59] = False
    image = np.where(valid, scene.image, np.nan)
    parent = Parent(1, 10, 10, np.ones((90, 90), bool), np.stack([x, y], 1))
    return rebuilt(scene, image=image, valid=valid, parents=[parent])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flux", [2e4, 6e5])
@pytest.mark.parametrize("masked", [True, False])
def test_no_convergence_is_what_the_undamped_step_says(gaussian_network, masked, flux, seed):
    config = DeblendConfig(findNewPeaks=False)
    state = State(star_scene(masked, flux, seed), gaussian_network, config)
    result = _deblend(state, None)
    flag = result.sources.flags["no_convergence"]
    # Another linearisation where everything came to rest says the same.
    point = state.rows.point
    rows = np.flatnonzero(state.rows.alive & ~point)
    assert len(rows) >= 2 and not flag[point].any()
    system, tolerance = _linearise(state, rows)
    promise = system.step(np.zeros(len(rows)))[1] / tolerance
    np.testing.assert_allclose(promise, state.rows.promise[rows], rtol=0.05, atol=0.05)
    clear = np.abs(promise - 1) > 0.1
    np.testing.assert_array_equal(flag[rows[clear]], ~(promise[clear] < 1))
    np.testing.assert_array_equal(result.parents.flags["no_convergence"], [flag.any()])
    if not flag.any():
        # What has settled is good: the neighbours of the star are what they are.
        error = np.maximum(result.sources.flux_err, 0.03 * result.sources.flux)
        truth = np.array([[flux] * 3, [400, 400, 400], [900, 700, 600]])
        assert (np.abs(result.sources.flux - truth)[1:] < 6 * error[1:] + 0.003 * flux).all()


# The network that ships


@pytest.fixture(scope="module")
def shipped():
    return load_network("lsst_ugrizy", threads=1)


def shipped_scene(far=0.0):
    bands, noise = "ugrizy", np.array([8.0, 4, 5, 8, 14, 30])[:, None, None]
    colours = np.array([0.3, 0.6, 1.0, 1.3, 1.5, 1.6])
    rng = np.random.default_rng(3)
    image = noise * rng.normal(size=(6, *SHAPE))
    x, y = [50.3, 57.6, 64.2], [53.8, 54.4, 47.3]
    places = [(x, y, 1.0)]
    if far:
        places.append((FAR_X, FAR_Y, far))
    parents = []
    for i, (xs, ys, scale) in enumerate(places):
        for a, b, flux in zip(xs, ys, (2000.0, 8000.0, 1500.0), strict=True):
            image += (scale * flux * colours)[:, None, None] * synthetic.gaussian_image(SHAPE, a, b, 2.2)
        x0 = int(min(xs)) - 18
        parents.append(Parent(i + 1, 30, x0, np.ones((50, 52), bool), np.stack([xs, ys], 1)))
    psf = synthetic.make_scene([50], [50], [[1.0] * 6], bands=bands, psf_sigma=1.7)[0].psf
    variance = np.broadcast_to(noise**2, image.shape).copy()
    return Scene(tuple(bands), image, variance, psf=psf, pixel_scale=0.2, parents=parents)


def test_the_network_that_ships_is_local(shipped):
    plain = deblend(shipped_scene(), shipped)
    assert not plain.sources.flags["no_convergence"].any()
    both = shipped_scene(100.0)
    found = deblend(both, shipped)
    assert_same(plain, found)
    assert_same(found, deblend(both, shipped, DeblendConfig(batchSize=1, refinementBatch=1)))
    assert_same(found, deblend(rebuilt(both, parents=both.parents[::-1]), shipped))
    for what in (1e20, "variance"):
        assert_same(plain, deblend(spoiled(both, 246, 55, what), shipped))
