# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The iterative procedure: what it recovers, what it refuses, and what becomes of bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.optimize
import synthetic
from lsst.meas.vaedeblend.deblender import DeblendConfig, deblend
from lsst.meas.vaedeblend.deblender._passes import take_pass
from lsst.meas.vaedeblend.deblender._start import place_first
from lsst.meas.vaedeblend.deblender._state import State
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.inference import joint_fluxes
from lsst.meas.vaedeblend.network import Network, NetworkError
from lsst.meas.vaedeblend.rendering import render
from lsst.meas.vaedeblend.scene import Parent, PsfGrid, Scene
from lsst.pex.config import FieldValidationError

X, Y = [50.3, 57.6, 64.2, 100.0], [63.8, 64.4, 57.3, 30.2]
FLUX = np.array([[300, 400, 500], [400, 300, 200], [350, 350, 350], [250, 200, 300]], float)


def make(**options):
    """Three galaxies that overlap and one alone."""
    return synthetic.make_scene(X, Y, FLUX, 1.0, **options)[0]


def rebuilt(scene, **changes):
    """A scene with some of its parts replaced."""
    parts = dict(
        bands=scene.bands,
        image=scene.image,
        variance=scene.variance,
        valid=scene.valid,
        psf=scene.psf,
        pixel_scale=scene.pixel_scale,
        parents=scene.parents,
        edge=scene.edge,
        origin=scene.origin,
    )
    return Scene(**{**parts, **changes})


def same(a, b):
    """Whether two results are the same, bit for bit."""
    names = ("x", "y", "flux", "flux_err", "observed", "model_frame", "latent_mean", "iteration", "parent")
    return np.array_equal(a.residual, b.residual) and all(
        np.array_equal(getattr(a.sources, n), getattr(b.sources, n), equal_nan=True) for n in names
    )


@pytest.fixture(scope="module")
def blend():
    return make()


@pytest.fixture(scope="module")
def result(blend, network):
    return deblend(blend, network)


# What it is for


def test_blended_galaxies_are_recovered(result):
    sources = result.sources
    np.testing.assert_allclose([sources.x, sources.y], [[X[3], *X[:3]], [Y[3], *Y[:3]]], atol=0.3)
    expected = FLUX[[3, 0, 1, 2]]
    assert (np.abs(sources.flux - expected) < 5 * sources.flux_err).all()
    np.testing.assert_allclose(sources.flux, expected, rtol=0.15)
    np.testing.assert_array_equal(sources.parent, [1, 2, 2, 2])
    reduced = result.parents.chi2 / result.parents.n_pixels
    assert (reduced < 1.15).all() and (result.parents.chi2_start > 4 * result.parents.chi2).all()
    assert not any(flag.any() for flag in sources.flags.values())
    assert not any(flag.any() for flag in result.parents.flags.values())


def test_errors_of_the_models_soften_the_weights_of_the_refinement(blend, network):
    config = DeblendConfig()
    config.refinementModelError = 0.1
    config.subtractSky = False
    state = State(blend, network, config)
    place_first(state)
    take_pass(state, [0, 1])
    first = np.array([0])
    state.soften(first)
    (y, x), (stop_y, stop_x) = np.maximum(state.rows.corner[0], 0), state.rows.corner[0] + state.size
    around = (slice(None), slice(y, stop_y), slice(x, stop_x))
    model = (blend.image - state.residual)[around]
    assert model.max() > 10
    expected = 1.0 / (blend.variance[around] + (0.1 * model) ** 2)
    np.testing.assert_allclose(state.soft_weight[around], expected, rtol=1e-5)
    untouched = np.ones(blend.shape, bool)
    untouched[around[1:]] = False
    np.testing.assert_array_equal(state.soft_weight[:, untouched], state.weight[:, untouched])
    config.refinementModelError = 0.0
    state = State(blend, network, config)
    place_first(state)
    take_pass(state, [0, 1])
    state.soften(first)
    np.testing.assert_array_equal(state.soft_weight, state.weight)


def test_a_neighbour_without_a_peak_is_found_in_the_residual(network, result):
    found = deblend(make(peaks=[0, 2, 3]), network)
    assert len(found.sources) == 4
    new = np.flatnonzero(found.sources.iteration > 0)
    assert len(new) == 1
    np.testing.assert_allclose(found.sources.x[new], X[1], atol=0.3)
    np.testing.assert_allclose(found.sources.flux[new], FLUX[[1]], rtol=0.15)
    # In the end it makes no difference which ones were given.
    np.testing.assert_allclose(
        np.sort(found.sources.flux[:, 0]), np.sort(result.sources.flux[:, 0]), rtol=0.03
    )
    np.testing.assert_array_equal(found.parents.n_child, [1, 3])
    np.testing.assert_array_equal(found.parents.n_peaks, [1, 2])


def test_peaks_are_found_where_none_are_given(network):
    found = deblend(make(peaks=False), network)
    assert len(found.sources) == 4
    order = np.argsort(found.sources.x)
    np.testing.assert_allclose(found.sources.x[order], X, atol=0.4)
    np.testing.assert_allclose(found.sources.flux[order], FLUX, rtol=0.15)


def test_the_residual_is_the_original_minus_all_models(blend, result, network):
    for scene, done in ((blend, result), ((s := make(peaks=[0])), deblend(s, network))):
        np.testing.assert_allclose(
            done.residual, scene.image - render(done.sources, scene.shape), atol=2e-5 * scene.image.max()
        )


def test_one_galaxy_stays_one(network):
    """Neither noise nor what is left of a bright galaxy becomes a source."""
    for flux, size, seed in ((1e3, 0.5, 1), (1e5, 1.0, 2), (3e5, 2.5, 3)):
        scene, _ = synthetic.make_scene([60.4], [61.7], [[flux] * 3], size, seed=seed)
        found = deblend(scene, network).sources
        assert len(found) == 1
        np.testing.assert_allclose(found.flux, flux, rtol=0.05)


def test_found_sources_keep_their_distance(network):
    rng = np.random.default_rng(5)
    x, y = rng.uniform(8, 152, (2, 60))
    scene, _ = synthetic.make_scene(
        x, y, rng.uniform(200, 3000, (60, 1)) * np.ones(3), shape=(160, 160), peaks=range(20)
    )
    sources = deblend(scene, network).sources
    assert (sources.iteration > 0).sum() > 10
    peaks = np.stack([sources.peak_x, sources.peak_y], axis=1)
    distance = np.hypot(*(peaks[:, None] - peaks[None]).transpose(2, 0, 1))
    np.fill_diagonal(distance, np.inf)
    new = sources.iteration > 0
    assert distance[new].min() >= DeblendConfig().minSeparation


def test_a_rejected_trial_leaves_everything_as_it_was(network):
    scene = make(peaks=[0, 2, 3])
    never = deblend(scene, network, DeblendConfig(costPerParameter=1e9))
    without = deblend(scene, network, DeblendConfig(costPerParameter=1e9, findNewPeaks=False))
    assert len(never.sources) == 3 and never.parents.iterations.sum() > without.parents.iterations.sum()
    assert same(never, without)


def test_the_procedure_is_deterministic(network, network_path):
    scene = make(peaks=[0])
    first = deblend(scene, network)
    assert same(first, deblend(copy.deepcopy(scene), Network.load(network_path, threads=1)))


def test_pieces_and_batches_change_nothing_that_matters(network, result, blend):
    small = deblend(blend, network, DeblendConfig(batchSize=1))
    np.testing.assert_allclose(small.sources.flux, result.sources.flux, rtol=1e-3)


def test_all_parents_share_batches(network, blend, monkeypatch):
    calls = []
    original = Network.deblend

    def spy(self, image, *args, **options):
        calls.append(len(image))
        return original(self, image, *args, **options)

    monkeypatch.setattr(Network, "deblend", spy)
    deblend(blend, network, DeblendConfig(minPasses=2, maxIterations=0))
    # The one that is alone has nothing to be asked again for.
    assert calls == [4, 3]


def test_cutouts_are_the_original_minus_the_other_sources(network, blend, monkeypatch):
    seen = []
    original = Network.deblend

    def spy(self, image, *args, **options):
        seen.append(np.array(image))
        return original(self, image, *args, **options)

    monkeypatch.setattr(Network, "deblend", spy)
    config = DeblendConfig(minPasses=2, maxIterations=0, findNewPeaks=False, subtractSky=False)
    done = deblend(blend, network, config)
    peaks = np.array([[X[3], *X[:3]], [Y[3], *Y[:3]]]).T
    corner = np.rint(peaks).astype(int) - 32
    # At first nothing is known of the others.
    for image, (x, y) in zip(seen[0], corner, strict=True):
        y1, y2, x1, x2 = max(y, 0), min(y + 64, 128), max(x, 0), min(x + 64, 128)
        np.testing.assert_array_equal(
            image[:, y1 - y : y2 - y, x1 - x : x2 - x], blend.image[:, y1:y2, x1:x2]
        )
        assert np.count_nonzero(image) <= 3 * (y2 - y1) * (x2 - x1)
    # Then they are gone: alone in the cutout, the galaxy has its own flux only.
    window = (
        synthetic.gaussian_image((64, 64), 32, 32, 12)
        > synthetic.gaussian_image((64, 64), 32, 32, 12).max() / 2
    )
    flux = (seen[1] * window).sum(axis=(2, 3))
    np.testing.assert_allclose(flux, FLUX[:3], rtol=0.35)
    assert ((seen[0] * window).sum(axis=(2, 3))[1:] > 1.5 * FLUX[:3]).all()
    np.testing.assert_array_equal(done.sources.corner_x, corner[:, 0])


def test_light_of_other_parents_is_not_stolen(network):
    """A faint galaxy beside a bright one's footprint, each a parent of its own."""
    scene, _ = synthetic.make_scene([50, 66], [64, 64], [[20000] * 3, [300] * 3], [2.0, 1.0])
    halves = np.zeros((2, 128, 128), bool)
    halves[0, 40:90, 30:60] = halves[1, 56:72, 60:75] = True
    parents = [
        Parent(i + 1, 0, 0, half, [[x, 64.0]])
        for i, (half, x) in enumerate(zip(halves, (50, 66), strict=True))
    ]
    sources = deblend(rebuilt(scene, parents=parents), network).sources
    np.testing.assert_allclose(sources.flux[0], 20000, rtol=0.02)
    np.testing.assert_allclose(sources.flux[1], 300, rtol=0.35)


@pytest.mark.parametrize("centre", [(32, 32), (31.5, 31.5)])
def test_the_centring_convention_is_followed(tmp_path, centre):
    network = Network.load(synthetic.write_network(tmp_path, synthetic.metadata(centre=centre)))
    sources = deblend(make(), network).sources
    np.testing.assert_allclose(sources.x, [X[3], *X[:3]], atol=0.3)
    offset = np.stack([sources.peak_x - sources.corner_x, sources.peak_y - sources.corner_y])
    assert (np.abs(offset - centre[0]) <= 0.5).all()


def test_observed_frame_networks_deblend_as_well(tmp_path):
    frame = {
        "type": "observed",
        "fwhm": {b: 1.3 * synthetic.FWHM * 0.2 for b in "gri"},
        "profile": "gaussian",
    }
    network = Network.load(synthetic.write_network(tmp_path, synthetic.metadata(frame=frame)))
    result = deblend(make(), network)
    np.testing.assert_allclose(result.sources.flux, FLUX[[3, 0, 1, 2]], rtol=0.15)
    assert (result.parents.chi2 / result.parents.n_pixels < 1.15).all()


def test_each_cell_and_band_has_its_own_psf(network):
    left = synthetic.make_scene(
        [40.2], [64], [[500] * 3], 1.0, psf_sigma=[1.3, 1.3, 1.2], shape=(128, 128), noise=0.3
    )[0]
    right = synthetic.make_scene(
        [88.3], [64], [[500] * 3], 1.0, psf_sigma=[1.9, 2.0, 2.0], shape=(128, 128), noise=0.3
    )[0]
    image = np.concatenate([left.image[:, :, :64], right.image[:, :, 64:]], axis=2)
    psf = PsfGrid(np.concatenate([left.psf.stamps, right.psf.stamps]), (128, 64), (1, 2))
    parents = [
        left.parents[0],
        Parent(2, *(getattr(right.parents[0], n) for n in ("y0", "x0", "footprint", "peaks"))),
    ]
    result = deblend(rebuilt(left, image=image, psf=psf, parents=parents), network)
    np.testing.assert_array_equal(result.sources.psf_index, [0, 1])
    np.testing.assert_allclose(result.sources.flux, 500, rtol=0.1)
    assert (result.parents.chi2 / result.parents.n_pixels < 1.3).all()


# Acceptance, convergence


def test_given_peaks_that_bring_nothing_are_kept_and_flagged_or_dropped(network, blend):
    parents = copy.deepcopy(blend.parents)
    parents[1].peaks = np.concatenate([parents[1].peaks, [[40.0, 66.0]]])
    scene = rebuilt(blend, parents=parents)
    kept = deblend(scene, network).sources
    assert len(kept) == 5
    np.testing.assert_array_equal(
        np.flatnonzero(kept.flags["insignificant"]), np.flatnonzero(kept.peak_x == 40.0)
    )
    dropped = deblend(scene, network, DeblendConfig(dropGivenPeaks=True)).sources
    assert len(dropped) == 4 and 40.0 not in dropped.peak_x


def test_the_iteration_limit_is_flagged(network):
    scene = make(peaks=[0])
    result = deblend(scene, network, DeblendConfig(maxIterations=1, maxNewPeaks=1))
    assert result.parents.flags["no_convergence"].any()
    flagged = result.parents.id[result.parents.flags["no_convergence"]]
    np.testing.assert_array_equal(
        result.sources.flags["no_convergence"], np.isin(result.sources.parent, flagged)
    )
    assert not deblend(scene, network, DeblendConfig(maxIterations=9)).parents.flags["no_convergence"].any()


def test_impossible_configurations_are_refused():
    for options in ({"minPasses": 0}, {"fluxTolerance": 0.0}, {"maxPeaks": 0}, {"batchSize": 0}):
        with pytest.raises(FieldValidationError):
            DeblendConfig(**options).validate()


# Fluxes


def shapes_and_design(rng, k=4, bands=2, pixels=200):
    shapes = rng.uniform(0, 1, (bands, k, pixels)) * np.exp(-np.linspace(0, 3, pixels))
    weight = rng.uniform(0.5, 2, (bands, pixels))
    normal = np.einsum("bip,bjp,bp->bij", shapes, shapes, weight)
    return shapes, weight, normal


def test_joint_fluxes_are_non_negative_least_squares():
    rng = np.random.default_rng(3)
    shapes, weight, normal = shapes_and_design(rng)
    for truth in ([5.0, 3.0, 8.0, 1.0], [5.0, -3.0, 8.0, -1.0]):
        data = np.einsum("bip,i->bp", shapes, truth) + rng.normal(0, 0.1, weight.shape)
        rhs = np.einsum("bip,bp,bp->bi", shapes, data, weight)
        flux, error = joint_fluxes(normal, rhs, np.full((2, 4), np.nan), 1e-4)
        for band in range(2):
            root = np.sqrt(weight[band])
            expected, _ = scipy.optimize.nnls((shapes[band] * root).T, data[band] * root)
            np.testing.assert_allclose(flux[band], expected, rtol=1e-6, atol=1e-6)
            active = expected > 0
            covariance = np.linalg.inv(normal[band][np.ix_(active, active)])
            np.testing.assert_allclose(error[band][active], np.sqrt(np.diagonal(covariance)), rtol=1e-5)
            np.testing.assert_allclose(
                error[band][~active] ** -2, np.diagonal(normal[band])[~active], rtol=1e-6
            )


def test_flux_errors_are_the_scatter_of_the_fluxes():
    rng = np.random.default_rng(4)
    shapes, weight, normal = shapes_and_design(rng, bands=1)
    truth = np.array([50.0, 30.0, 80.0, 20.0])
    data = np.einsum("bip,i->bp", shapes, truth) + rng.normal(0, 1, (2000, *weight.shape)) / np.sqrt(weight)
    rhs = np.einsum("bip,nbp,bp->nbi", shapes, data, weight)
    solved = [joint_fluxes(normal, r, np.full((1, 4), np.nan), 1e-4) for r in rhs]
    pull = np.array([(f[0] - truth) / e[0] for f, e in solved])
    np.testing.assert_allclose(pull.std(axis=0), 1.0, atol=0.07)
    np.testing.assert_allclose(pull.mean(axis=0), 0.0, atol=0.1)


def test_coincident_sources_follow_the_networks_fluxes():
    normal = np.full((1, 2, 2), 4.0)
    flux, error = joint_fluxes(normal, np.full((1, 2), 400.0), np.array([[80.0, 30.0]]), 1e-4)
    assert flux.sum() == pytest.approx(100, rel=1e-3)
    np.testing.assert_allclose(flux, [[75.0, 25.0]], rtol=1e-2)
    assert (error > 10).all() and np.isfinite(error).all()
    alone, _ = joint_fluxes(normal, np.full((1, 2), 400.0), np.full((1, 2), np.nan), 1e-4)
    assert alone.sum() == pytest.approx(100, rel=1e-3) and (alone >= 0).all()


def test_rounding_that_makes_the_matrix_indefinite_is_survived():
    normal = np.array([[[1.0, 1.0 + 1e-5], [1.0 + 1e-5, 1.0]]])
    flux, error = joint_fluxes(normal, np.array([[5.0, 4.0]]), np.full((1, 2), np.nan), 1e-4)
    assert np.isfinite(flux).all() and (flux >= 0).all() and np.isfinite(error).all()
    assert 4 < flux.sum() < 5.5


def test_sources_without_data_have_no_flux():
    normal = np.zeros((2, 2, 2))
    normal[0] = np.diag([4.0, 0.0])
    flux, error = joint_fluxes(normal, np.array([[8.0, 0.0], [0.0, 0.0]]), np.ones((2, 2)), 1e-4)
    np.testing.assert_allclose(flux, [[2.0, np.nan], [np.nan, np.nan]], rtol=1e-3)
    np.testing.assert_allclose(error, [[0.5, np.nan], [np.nan, np.nan]], rtol=1e-3)


# Bad input: bands and pixel scale


def test_bands_in_another_order_are_brought_into_the_networks(network, blend, result):
    shuffled = blend.reordered(("i", "g", "r"))
    assert same(deblend(shuffled, network), result)


def test_bands_the_network_does_not_know_are_left_out(network, blend, result):
    image, variance = (np.concatenate([a, a[:1]]) for a in (blend.image, blend.variance))
    psf = blend.psf.select([0, 1, 2, 0])
    more = Scene(("g", "r", "i", "z"), image, variance, psf=psf, pixel_scale=0.2, parents=blend.parents)
    assert same(deblend(more, network), result)


def test_a_missing_band_is_an_error_if_not_allowed(network, blend, result):
    scene = blend.reordered(("i", "g"))
    with pytest.raises(ValueError, match=r"\['r'\] of \['g', 'r', 'i'\] are missing.*\['i', 'g'\]"):
        deblend(scene, network, DeblendConfig(allowMissingBands=False))
    done = deblend(scene, network)
    sources = done.sources
    assert np.isnan(sources.flux[:, 1]).all() and np.isnan(sources.flux_err[:, 1]).all()
    assert sources.flags["missing_band"].all() and not sources.flags["no_psf"].any()
    assert not sources.observed[:, 1].any() and not done.residual[1].any()
    np.testing.assert_allclose(sources.flux[:, [0, 2]], result.sources.flux[:, [0, 2]], rtol=0.1)
    with pytest.raises(ValueError, match="none in common"):
        deblend(rebuilt(blend, bands=("u", "y", "z")), network)


def test_another_pixel_scale_is_an_error_unless_allowed(network, blend):
    scene = rebuilt(blend, pixel_scale=0.168)
    with pytest.raises(NetworkError, match="0.2 arcsec.*0.168 arcsec"):
        deblend(scene, network)
    assert len(deblend(scene, network, DeblendConfig(allowOtherPixelScale=True)).sources) == 4


# Bad input: pixels


def test_pixels_that_are_not_finite_do_no_harm(network, blend, result):
    image, variance = blend.image.copy(), blend.variance.copy()
    rng = np.random.default_rng(7)
    bad = rng.uniform(size=image.shape) < 0.1
    image[bad] = rng.choice([np.nan, np.inf, -np.inf, 1e30], bad.sum())
    variance[bad] = rng.choice([np.nan, 0.0, -1.0], bad.sum())
    done = deblend(rebuilt(blend, image=image, variance=variance), network)
    assert len(done.sources) == 4
    for array in (done.residual, done.sources.observed, done.sources.flux, done.sources.chi2):
        assert np.isfinite(array).all()
    assert not done.residual[bad].any()
    assert done.parents.flags["incomplete_data"].all()
    assert (np.abs(done.sources.flux - result.sources.flux) < 6 * done.sources.flux_err).all()
    assert (done.sources.data_coverage < 0.97).all()


def test_a_parent_wholly_masked_keeps_its_rows(network, blend):
    (rows, columns), _ = blend.parents[0].window(blend.shape)
    valid = blend.valid.copy()
    valid[:, rows, columns] = False
    done = deblend(rebuilt(blend, valid=valid), network)
    np.testing.assert_array_equal(done.parents.flags["masked"], [True, False])
    sources = done.sources
    np.testing.assert_array_equal(sources.flags["masked"], [True, False, False, False])
    assert np.isnan(sources.flux[0]).all() and not sources.observed[0].any()
    assert sources.x[0] == X[3] and sources.flags["masked_centre"][0]
    np.testing.assert_allclose(sources.flux[1:], FLUX[:3], rtol=0.15)
    np.testing.assert_array_equal(done.parents.n_child, [0, 3])
    # Without a peak it has a row as well.
    parents = [Parent(1, p.y0, p.x0, p.footprint) if p.id == 1 else p for p in blend.parents]
    again = deblend(rebuilt(blend, valid=valid, parents=parents), network)
    assert len(again.sources) == 4 and again.parents.flags["no_peak"].tolist() == [True, False]
    assert again.sources.x[0] == pytest.approx(X[3], abs=2)


def test_a_scene_wholly_masked_keeps_all_rows(network, blend):
    done = deblend(rebuilt(blend, valid=np.zeros(blend.image.shape)), network)
    assert len(done.sources) == 4 and np.isnan(done.sources.flux).all()
    assert done.parents.flags["masked"].all() and not done.residual.any()


def test_a_peak_in_a_masked_pixel_is_flagged(network, blend):
    valid = blend.valid.copy()
    valid[1, 29:32, 99:102] = False
    done = deblend(rebuilt(blend, valid=valid), network).sources
    np.testing.assert_array_equal(done.flags["masked_centre"], [True, False, False, False])
    assert np.isfinite(done.flux).all()
    assert (np.abs(done.flux[0] - FLUX[3]) < 6 * done.flux_err[0]).all()
    assert done.flux_err[0, 1] > 1.2 * done.flux_err[0, 0]


def test_a_source_masked_in_one_band_has_no_flux_there(network, blend):
    valid = blend.valid.copy()
    valid[1, :50, 80:] = False
    done = deblend(rebuilt(blend, valid=valid), network).sources
    np.testing.assert_array_equal(np.isnan(done.flux), [[False, True, False]] + [[False] * 3] * 3)
    np.testing.assert_array_equal(done.flags["missing_band"], [True, False, False, False])


@pytest.mark.parametrize("x", [0.2, 126.9])
def test_a_peak_at_the_edge_is_flagged_and_deblended(network, x):
    scene, _ = synthetic.make_scene([x, 64], [64, 64], [[1000] * 3] * 2, 1.0)
    sources = deblend(scene, network).sources
    edge = np.abs(sources.peak_x - 63.5) > 60
    np.testing.assert_array_equal(sources.flags["edge"], edge)
    np.testing.assert_allclose(sources.flux, 1000, rtol=0.35)
    assert sources.data_coverage[edge] < 0.9 < sources.data_coverage[~edge]


def test_a_peak_near_pixels_marked_as_edge_is_flagged(network, blend):
    edge = np.zeros(blend.shape, bool)
    edge[25:28, 95:97] = True
    sources = deblend(rebuilt(blend, edge=edge), network).sources
    np.testing.assert_array_equal(sources.flags["edge"], [True, False, False, False])


def test_a_peak_outside_the_image_keeps_its_row(network, blend):
    parents = copy.deepcopy(blend.parents)
    parents[0].peaks = np.concatenate([parents[0].peaks, [[500.0, 30.0]]])
    parents.append(Parent(9, -40, -40, np.ones((11, 11)), [[-35.0, -35.0]]))
    done = deblend(rebuilt(blend, parents=parents), network)
    outside = done.sources.flags["peak_outside"]
    assert len(done.sources) == 6 and outside.sum() == 2
    assert np.isnan(done.sources.flux[outside]).all() and not done.sources.observed[outside].any()
    np.testing.assert_array_equal(done.sources.x[outside], [500.0, -35.0])
    np.testing.assert_allclose(done.sources.flux[~outside], FLUX[[3, 0, 1, 2]], rtol=0.15)
    np.testing.assert_array_equal(done.parents.n_child, [1, 3, 0])


# Bad input: PSFs


def cells(blend, missing):
    """The scene's PSF in 2 x 2 cells, some of them missing: (cell, band) pairs."""
    stamps = np.tile(blend.psf.stamps, (4, 1, 1, 1))
    for cell, band in missing:
        stamps[cell, band] = np.nan
    return rebuilt(blend, psf=PsfGrid(stamps, (64, 64), (2, 2)))


def test_a_psf_missing_in_a_cell_is_taken_from_the_nearest_and_flagged(network, blend, result):
    done = deblend(cells(blend, [(1, 0), (1, 1), (1, 2)]), network).sources
    np.testing.assert_array_equal(done.flags["no_psf"], [True, False, False, True])
    np.testing.assert_allclose(done.flux, result.sources.flux, rtol=1e-3)


def test_a_psf_missing_in_a_whole_band_leaves_its_fluxes_out(network, blend, result):
    done = deblend(cells(blend, [(c, 2) for c in range(4)]), network).sources
    assert done.flags["no_psf"].all() and done.flags["missing_band"].all()
    assert np.isnan(done.flux[:, 2]).all() and not done.observed[:, 2].any()
    np.testing.assert_allclose(done.flux[:, :2], result.sources.flux[:, :2], rtol=0.1)


def test_no_psf_at_all_is_an_error(network, blend):
    with pytest.raises(ValueError, match="no PSF in any cell"):
        deblend(cells(blend, [(c, b) for c in range(4) for b in range(3)]), network)
    flat = PsfGrid.constant(np.where(np.arange(25) == 0, 1.0, 0.0) * np.ones((3, 25, 1)))
    with pytest.raises(ValueError, match="no PSFs"):
        deblend(rebuilt(blend, psf=flat), network)


# Bad input: parents


def test_no_parents_give_no_sources(network, blend):
    done = deblend(rebuilt(blend, parents=[]), network)
    assert len(done.sources) == len(done.parents) == 0
    np.testing.assert_array_equal(done.residual, blend.image)
    assert done.sources.observed.shape == (0, 3, 64, 64)


def test_a_parent_larger_than_the_cutout_is_flagged_and_deblended(network, blend):
    scene = make(one_parent=True)
    done = deblend(scene, network)
    assert done.parents.flags["parent_too_big"].tolist() == [True]
    np.testing.assert_allclose(done.sources.flux, FLUX, rtol=0.15)
    assert not deblend(blend, network).parents.flags["parent_too_big"].any()


def test_a_parent_in_which_nothing_is_significant_has_its_maximum(network, blend):
    parents = [*blend.parents, Parent(7, 100, 5, np.ones((8, 9)))]
    done = deblend(rebuilt(blend, parents=parents), network)
    assert done.parents.flags["no_peak"].tolist() == [False, False, True]
    last = done.sources.parent == 7
    assert last.sum() == 1 and done.sources.flags["insignificant"][last].all()
    assert 5 <= done.sources.peak_x[last][0] < 14 and 100 <= done.sources.peak_y[last][0] < 108


def crowd(n, seed=3, shape=(300, 300)):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(6, shape[0] - 6, (2, n))
    flux = np.exp(rng.normal(6.5, 0.8, (n, 1))) * rng.uniform(0.5, 1.5, (n, 3))
    return synthetic.make_scene(x, y, flux, rng.uniform(0.3, 1.5, n), shape=shape, one_parent=True)


def test_500_peaks_in_one_parent(network):
    scene, truth = crowd(500)
    # The synthetic network draws what this scene is made of, so the search may be sensitive.
    config = DeblendConfig(maxIterations=1, modelError=0.05, newPeakThreshold=6.0)
    done = deblend(scene, network, config)
    given = done.sources.iteration == 0
    assert given.sum() == 500 and not done.parents.flags["too_many_peaks"].any()
    assert done.parents.chi2[0] < 1.5 * done.parents.n_pixels[0]
    relative = np.abs(done.sources.flux[given] / truth.flux - 1)
    assert np.median(relative) < 0.1


def test_of_too_many_peaks_the_brightest_are_deblended_and_none_is_lost(network):
    scene, truth = crowd(30, shape=(200, 200))
    done = deblend(scene, network, DeblendConfig(maxPeaks=12))
    skipped = done.sources.flags["too_many_peaks"]
    assert len(done.sources) == 30 and skipped.sum() == 18
    assert done.parents.flags["too_many_peaks"].tolist() == [True]
    assert np.isnan(done.sources.flux[skipped]).all() and np.isfinite(done.sources.flux[~skipped]).all()
    assert truth.flux[~skipped].sum(axis=1).min() > np.median(truth.flux[skipped].sum(axis=1))
    np.testing.assert_array_equal(done.parents.n_child, [12])
    np.testing.assert_array_equal(done.parents.n_peaks, [30])
    # Peaks that were found, not given, are simply not so many.
    for parent in scene.parents:
        parent.peaks = parent.peaks[:0]
    found = deblend(scene, network, DeblendConfig(maxPeaks=12))
    assert len(found.sources) == 12 and found.parents.flags["too_many_peaks"].tolist() == [True]


# Bad input: networks


def test_output_that_is_not_finite_falls_back_on_the_image_and_spares_siblings(tmp_path, network):
    x, y, flux = [50.3, 58.0, 100.0], [64.0, 64.0, 30.0], np.array([[3000] * 3, [300] * 3, [400] * 3], float)
    scene, _ = synthetic.make_scene(x, y, flux, [1.5, 1.0, 1.0])
    broken = Network.load(synthetic.write_network(tmp_path, nan_above=2000.0))
    done = deblend(scene, broken, DeblendConfig(findNewPeaks=False))
    sources = done.sources
    failed = sources.flags["fallback"]
    np.testing.assert_array_equal(failed, np.abs(sources.peak_x - 50.3) < 1e-9)
    np.testing.assert_array_equal(sources.flags["not_finite"], failed)
    for array in (sources.flux, sources.observed, sources.model_frame, done.residual, sources.x):
        assert np.isfinite(array).all()
    # It has what the image holds of it, and its sibling is as it should be.
    np.testing.assert_allclose(sources.flux[failed], 3000, rtol=0.1)
    np.testing.assert_allclose(sources.observed[failed].sum(axis=(2, 3)), sources.flux[failed], rtol=1e-3)
    sibling = np.abs(sources.peak_x - 58.0) < 1e-9
    np.testing.assert_allclose(sources.flux[sibling], 300, rtol=0.4)
    whole = deblend(scene, network, DeblendConfig(findNewPeaks=False)).sources
    far = np.abs(sources.peak_x - 100.0) < 1e-9
    np.testing.assert_allclose(sources.flux[far], whole.flux[far], rtol=1e-5)
    assert done.parents.flags["failed_source"].tolist() == [False, True]
    assert np.abs(done.residual).max() < 0.2 * scene.image.max()


@pytest.mark.parametrize("options", [{"nan_above": -1.0}, {"empty": True}])
def test_a_network_that_fails_on_everything_leaves_the_image_shared_out(tmp_path, blend, options):
    broken = Network.load(synthetic.write_network(tmp_path, **options))
    done = deblend(blend, broken)
    sources = done.sources
    assert len(sources) == 4 and sources.flags["fallback"].all()
    np.testing.assert_allclose(sources.flux, FLUX[[3, 0, 1, 2]], rtol=0.3)
    assert (done.parents.chi2 < 0.3 * done.parents.chi2_start).all()


def test_a_later_failure_keeps_the_earlier_model(network, blend, monkeypatch, result):
    original, count = Network.deblend, [0]

    def fail_later(self, image, *args, **options):
        out = original(self, image, *args, **options)
        count[0] += 1
        if count[0] > 1:
            out.finite[:] = False
            out.model[:] = 0.0
        return out

    monkeypatch.setattr(Network, "deblend", fail_later)
    sources = deblend(blend, network, DeblendConfig(findNewPeaks=False)).sources
    # The one that is alone, the first, is not asked again at the start; a pass that made nothing better is
    # taken back, flags included.
    assert sources.flags["not_finite"][1:].all() and not sources.flags["fallback"].any()
    np.testing.assert_allclose(sources.flux, FLUX[[3, 0, 1, 2]], rtol=0.2)


def test_noise_and_seeing_outside_the_training_range_are_flagged(tmp_path, blend):
    for name, ranges in (
        ("noisy", {"noise": {"g": [0.1, 10], "r": [0.1, 0.8], "i": [0.1, 10]}}),
        ("sharp", {"psf_fwhm": [0.9, 1.5]}),
    ):
        meta = synthetic.metadata(name=name, training_range=ranges)
        network = Network.load(synthetic.write_network(tmp_path, meta))
        assert deblend(blend, network).sources.flags["outside_training_range"].all()
    meta = synthetic.metadata(name="neither", training_range={})
    network = Network.load(synthetic.write_network(tmp_path, meta))
    assert not deblend(blend, network).sources.flags["outside_training_range"].any()


def test_the_network_is_told_noise_and_psf_of_the_place(network, monkeypatch):
    scene = make()
    variance = scene.variance.copy()
    variance[:, :, 84:] = 9.0
    variance[2, 20:40, 90:94] = 1e6  # a few bad columns do not count
    seen = {}
    original = Network.deblend

    def spy(self, image, valid, noise, moments, **options):
        seen.setdefault("noise", np.array(noise))
        seen.setdefault("moments", np.array(moments))
        return original(self, image, valid, noise, moments, **options)

    monkeypatch.setattr(Network, "deblend", spy)
    psf = PsfGrid.constant(np.stack([gaussian_psf(s, 25) for s in (1.4, 1.5, 1.6)]))
    deblend(rebuilt(scene, variance=variance, psf=psf), network)
    np.testing.assert_allclose(seen["noise"], [[3] * 3] + [[1] * 3] * 3)
    expected = np.array([1.4, 1.5, 1.6]) ** 2 + 1 / 12
    np.testing.assert_allclose(seen["moments"][:, :, 0], np.tile(expected, (4, 1)), rtol=2e-3)
    np.testing.assert_allclose(seen["moments"][:, :, 2], 0.0, atol=1e-6)


def test_saved_configurations_name_the_public_module():
    config = DeblendConfig()
    config.maxIterations = 3
    text = config.saveToString()
    assert "type(config) is lsst.meas.vaedeblend.deblender.DeblendConfig," in text
    again = DeblendConfig()
    again.loadFromString(text)
    assert again.maxIterations == 3
