# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rendering, persistence and redistribution of models."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import synthetic
from lsst.meas.vaedeblend.deblender import DeblendConfig, deblend
from lsst.meas.vaedeblend.ground.cutouts import add_cutouts, cut_out
from lsst.meas.vaedeblend.ground.psf import gaussian_psf, kolmogorov_psf
from lsst.meas.vaedeblend.network import Network
from lsst.meas.vaedeblend.redistribution import redistribute
from lsst.meas.vaedeblend.rendering import Renderer, render, unit_shapes
from lsst.meas.vaedeblend.scene import PsfGrid
from lsst.meas.vaedeblend.sources import SourceModels


@pytest.fixture(scope="module")
def blend():
    """Two galaxies that overlap, and one at the border."""
    return synthetic.make_scene(
        [60.3, 68.0, 2.0],
        [63.8, 64.4, 100.0],
        [[300, 400, 500], [400, 300, 200], [900, 900, 900]],
        1.2,
    )[0]


@pytest.fixture(scope="module")
def result(blend, network):
    return deblend(blend, network)


def test_cutouts_hang_over_the_border():
    image = np.arange(2 * 5 * 6.0).reshape(2, 5, 6)
    pieces = cut_out(image, [-1, 3, 9], [4, -2, 0], 4)
    np.testing.assert_array_equal(pieces[0, 0], [[0, 0, 0, 0], [4, 5, 0, 0], [10, 11, 0, 0], [16, 17, 0, 0]])
    np.testing.assert_array_equal(pieces[1, 1, :2, 2:], image[1, 3:, :2])
    assert not pieces[2].any()
    total = np.zeros(image.shape)
    add_cutouts(total, np.ones((3, 2, 4, 4)), [-1, 3, 9], [4, -2, 0])
    add_cutouts(total, np.ones((1, 2, 4, 4)), [0], [2])
    expected = np.zeros((5, 6))
    expected[:3, 4:] += 1
    expected[3:, :2] += 1
    expected[:4, 2:] += 1
    np.testing.assert_array_equal(total, [expected, expected])


def test_shapes_have_unit_sum_and_empty_bands_borrow_one():
    rng = np.random.default_rng(1)
    models = rng.uniform(1, 2, (3, 3, 8, 8))
    models[1, 0] = 0.0
    models[1, 1] -= models[1, 1].mean() - 1e-3  # positive sum, but no shape
    models[2] = -1.0
    shapes, flux, sound = unit_shapes(models)
    np.testing.assert_array_equal(sound, [True, True, False])
    np.testing.assert_allclose(shapes[:2].sum(axis=(2, 3)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(shapes[1, 0], shapes[1, 2], rtol=1e-6)
    np.testing.assert_allclose(shapes[1, 1], shapes[1, 2], rtol=1e-6)
    np.testing.assert_allclose(flux, models.sum(axis=(2, 3)), rtol=1e-5, atol=1e-4)
    assert not shapes[2].any()


@pytest.mark.parametrize("centre", [(32, 32), (31.5, 31.5)])
def test_a_point_source_in_the_observed_frame_is_the_psf(centre):
    meta = synthetic.metadata(centre=centre)
    stamps = np.stack([gaussian_psf(s, 31) for s in (1.3, 1.6, 2.2)])
    renderer = Renderer(meta, PsfGrid.constant(stamps))
    models = renderer.point_sources([0.3, -0.4], [0.2, 0.0])
    np.testing.assert_allclose(models.sum(axis=(2, 3)), 1.0, rtol=1e-5)
    observed = renderer.observed(models, [0, 0])
    for image, dx, dy in zip(observed, (0.3, -0.4), (0.2, 0.0), strict=True):
        for band, sigma in enumerate((1.3, 1.6, 2.2)):
            expected = synthetic.gaussian_image((64, 64), centre[1] + dx, centre[0] + dy, sigma)
            np.testing.assert_allclose(image[band], expected, atol=2e-3 * expected.max())


@pytest.mark.parametrize("profile", ["kolmogorov", "gaussian"])
def test_observed_frame_networks_render_to_the_local_psf(profile):
    """Identity where the scene has the network's PSF; the local PSF where it has another."""
    fwhm = {"g": 0.8, "r": 0.7, "i": 0.6}
    meta = synthetic.metadata(frame={"type": "observed", "fwhm": fwhm, "profile": profile})
    make = kolmogorov_psf if profile == "kolmogorov" else lambda w, n: gaussian_psf(w / synthetic.FWHM, n)
    same = np.stack([make(fwhm[b] / 0.2, 41) for b in "gri"])
    wider = np.stack([make(1.2 * fwhm[b] / 0.2, 41) for b in "gri"])
    renderer = Renderer(meta, PsfGrid(np.stack([same, wider]), (100, 100), (1, 2)))
    models = np.repeat(renderer.point_sources([0.0], [0.0]), 2, axis=0)
    observed = renderer.observed(models, [0, 1])
    np.testing.assert_allclose(observed[0], models[0], atol=1e-7)
    np.testing.assert_allclose(observed[1][:, 12:53, 12:53], wider, atol=5e-3 * wider.max())
    shifted = renderer.point_sources([0.5], [-0.25])
    pixels = np.arange(64)
    np.testing.assert_allclose((shifted.sum(axis=2) @ pixels)[0], 32.5, atol=0.02)
    np.testing.assert_allclose((shifted.sum(axis=3) @ pixels)[0], 31.75, atol=0.02)


def test_a_band_without_psf_renders_empty_and_a_cell_without_takes_its_neighbours():
    stamps = np.stack([[gaussian_psf(1.3, 31)] * 3, [gaussian_psf(2.0, 31)] * 3])
    stamps[0, 1] = np.nan
    stamps[:, 2] = np.nan
    renderer = Renderer(synthetic.metadata(), PsfGrid(stamps, (100, 100), (1, 2)))
    observed = renderer.observed(renderer.point_sources([0, 0], [0, 0]), [0, 1])
    np.testing.assert_allclose(observed[0, 1], observed[1, 1], atol=1e-7)
    assert observed[0, 0].max() > 1.5 * observed[0, 1].max()
    assert not observed[:, 2].any()
    with pytest.raises(ValueError, match="bands"):
        Renderer(synthetic.metadata(), PsfGrid.constant(stamps[0, :2]))


def test_the_rendered_scene_is_the_image_minus_the_residual(blend, result):
    total = render(result.sources, blend.shape)
    np.testing.assert_allclose(blend.image - total, result.residual, atol=1e-4)
    assert np.abs(total[:, :, -20:]).max() < 1e-3 * total.max()


def test_the_models_carry_their_solved_flux(result):
    sources = result.sources
    np.testing.assert_allclose(sources.model_frame.sum(axis=(2, 3)), sources.flux, rtol=1e-4)
    # The one at the border is complete in the model, though not in the image.
    np.testing.assert_allclose(sources.observed.sum(axis=(2, 3)), sources.flux, rtol=1e-3)


def test_models_are_rendered_again_from_their_table(blend, result, network):
    sources = result.sources
    table = sources.to_table()
    for given in (network, network.decoder):
        again = SourceModels.from_table(table, given, blend.psf)
        for name in ("observed", "model_frame"):
            images, expected = getattr(again, name), getattr(sources, name)
            assert np.abs(images - expected).max() < 1e-4 * expected.max()
        for name in ("id", "parent", "corner_x", "corner_y", "psf_index", "latent_mean", "latent_sigma"):
            np.testing.assert_array_equal(getattr(again, name), getattr(sources, name))
        np.testing.assert_allclose(again.flux, sources.flux, rtol=1e-6)
        np.testing.assert_allclose(again.x, sources.x, atol=1e-9)
    # A few hundred bytes per object, besides the names that repeat in every row.
    size = sum(
        table[c].dtype.itemsize * table[c][0].size for c in table.colnames if table[c].dtype.kind != "U"
    )
    assert size < 500


def test_the_table_is_in_tract_pixels(blend, network):
    moved = copy.copy(blend)
    moved.origin = (1000, 5000)
    sources = deblend(moved, network).sources
    table = sources.to_table()
    np.testing.assert_allclose(table["x"], sources.x + 5000)
    np.testing.assert_allclose(table["corner_y"], sources.corner_y + 1000)
    again = SourceModels.from_table(table, network, moved.psf, moved.origin)
    np.testing.assert_array_equal(again.corner_x, sources.corner_x)
    assert np.abs(again.observed - sources.observed).max() < 1e-4 * sources.observed.max()


def test_sources_without_a_network_model_come_back_as_point_sources(tmp_path):
    network = Network.load(synthetic.write_network(tmp_path, nan_above=600.0))
    scene, _ = synthetic.make_scene([40, 90], [40, 80], [[1000] * 3, [300] * 3], [0.0, 1.0])
    sources = deblend(scene, network, DeblendConfig(findNewPeaks=False)).sources
    np.testing.assert_array_equal(sources.flags["fallback"], [True, False])
    again = SourceModels.from_table(sources.to_table(), network, scene.psf)
    np.testing.assert_array_equal(again.flags["fallback"], [True, False])
    np.testing.assert_allclose(again.observed[0].sum(axis=(1, 2)), sources.flux[0], rtol=1e-3)
    assert np.abs(again.observed[0] - sources.observed[0]).max() < 0.1 * sources.observed[0].max()


def test_tables_of_other_networks_are_refused(result, network, tmp_path, blend):
    table = result.sources.to_table()
    meta = synthetic.metadata(name="another")
    other = Network.load(synthetic.write_network(tmp_path, meta))
    with pytest.raises(ValueError, match="network .'synthetic'., this one is 'another'"):
        SourceModels.from_table(table, other, blend.psf)
    same_name = Network.load(synthetic.write_network(tmp_path, inputs=("image",)))
    with pytest.raises(ValueError, match="weights_sha256"):
        SourceModels.from_table(table, same_name, blend.psf)


def test_an_empty_table_gives_no_models(result, network, blend):
    again = SourceModels.from_table(result.sources.to_table()[:0], network, blend.psf)
    assert len(again) == 0 and again.observed.shape == (0, 3, 64, 64)


def test_redistribution_shares_out_the_whole_image(blend, result):
    images = redistribute(blend, result.sources, footprints=False)
    total = np.zeros(blend.image.shape)
    add_cutouts(total, images, result.sources.corner_y, result.sources.corner_x)
    covered = render(result.sources, blend.shape) > 1e-3
    np.testing.assert_allclose(total[covered], blend.image[covered], rtol=1e-3, atol=1e-3)
    # Each gets about what it has.
    inside = redistribute(blend, result.sources)
    np.testing.assert_allclose(inside[:2].sum(axis=(2, 3)), [[300, 400, 500], [400, 300, 200]], rtol=0.15)
    assert np.count_nonzero(inside) < np.count_nonzero(images)


def test_redistribution_ends_at_the_footprint_and_at_bad_pixels(blend, result):
    parent = blend.parents[0]
    window, inside = parent.window(blend.shape)
    images = redistribute(blend, result.sources)
    total = np.zeros(blend.image.shape)
    mine = result.sources.parent == parent.id
    add_cutouts(total, images[mine], result.sources.corner_y[mine], result.sources.corner_x[mine])
    np.testing.assert_allclose(total[:, *window][:, inside], blend.image[:, *window][:, inside], rtol=1e-3)
    total[:, *window][:, inside] = 0.0
    assert not total.any()
    lost = dataclasses.replace(result.sources, parent=result.sources.parent + 50)
    with pytest.raises(ValueError, match="does not have"):
        redistribute(blend, lost)
    with pytest.raises(ValueError, match="are missing"):
        redistribute(blend.reordered(("g", "r")), result.sources)
