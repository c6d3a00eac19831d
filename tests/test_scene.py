# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Scenes, parents and PSF grids: what they accept and what they make of it."""

from __future__ import annotations

import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.scene import Parent, PsfGrid, Scene, assign_peaks, find_parents


def grid(sigmas=((1.2, 1.5), (1.3, 1.6), (1.4, 1.7), (1.5, 1.8))):
    stamps = np.array([[gaussian_psf(s, 21) for s in row] for row in sigmas])
    return PsfGrid(stamps, cell_shape=(10, 20), grid_shape=(2, 2), origin=(-2, 5))


def scene(image=None, bands=("g", "r"), **options):
    image = np.arange(2 * 30 * 40, dtype=float).reshape(2, 30, 40) if image is None else image
    options = {"psf": grid(), "pixel_scale": 0.2, "variance": np.full(image.shape, 4.0), **options}
    return Scene(bands, image, **options)


def test_what_is_not_finite_becomes_invalid_and_empty():
    image = np.ones((2, 30, 40))
    variance = np.full(image.shape, 4.0)
    valid = np.ones(image.shape, bool)
    image[0, 0, 0], image[0, 0, 1], image[1, 2, 3] = np.nan, np.inf, -np.inf
    variance[0, 1, 0], variance[0, 1, 1], variance[0, 1, 2], variance[0, 1, 3] = 0, -1, np.nan, np.inf
    valid[1, 5, 5] = False
    bad = np.zeros(image.shape, bool)
    for i in ((0, 0, 0), (0, 0, 1), (1, 2, 3), (0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 1, 3), (1, 5, 5)):
        bad[i] = True
    s = scene(image, variance=variance, valid=valid)
    np.testing.assert_array_equal(s.valid, ~bad)
    np.testing.assert_array_equal(s.image, np.where(bad, 0, 1))
    np.testing.assert_array_equal(s.weight, np.where(bad, 0, 0.25))
    np.testing.assert_array_equal(s.noise, [2, 2])
    assert s.image.dtype == np.float32 and not np.isnan(s.variance).any()


def masked(values, *where):
    """A masked array with some elements masked; what lies under the mask looks sound."""
    mask = np.zeros(np.shape(values), bool)
    for index in where:
        mask[index] = True
    return np.ma.array(values, mask=mask)


def test_what_is_masked_in_masked_arrays_is_invalid():
    ones = np.ones((2, 30, 40))
    s = scene(
        masked(ones, (0, 1, 2)),
        variance=masked(4 * ones, (1, 3, 4)),
        valid=masked(ones.astype(bool), (1, 5, 6)),
        edge=masked(np.zeros((30, 40), bool), (7, 8)),
    )
    bad = [[0, 1, 2], [1, 3, 4], [1, 5, 6]]
    np.testing.assert_array_equal(np.argwhere(~s.valid), bad)
    np.testing.assert_array_equal(np.argwhere(s.weight == 0), bad)
    np.testing.assert_array_equal(np.argwhere(s.image == 0), bad)
    np.testing.assert_array_equal(np.argwhere(s.edge), [[7, 8]])
    # A list of bands is an array, too.
    s = scene(ones, variance=[masked(4 * ones[0], (1, 2)), masked(4 * ones[1])])
    np.testing.assert_array_equal(np.argwhere(~s.valid), [[0, 1, 2]])
    assert scene(ones, variance=np.ma.array(4 * ones)).valid.all()


def test_masked_peaks_footprints_and_stamps():
    with pytest.raises(ValueError, match="not finite"):
        Parent(1, 0, 0, np.ones((2, 2)), masked([[1.0, 1.0]], (0, 1)))
    with pytest.raises(ValueError, match="not finite"):
        assign_peaks([], masked([[1, 1], [2, 2]], (1, 0)), (5, 5))
    assert Parent(1, 0, 0, masked(np.ones((2, 2), bool), (0, 0))).area == 3
    detected = masked(np.ones((3, 3), bool), (slice(None), 1))
    assert [p.area for p in find_parents(detected)] == [3, 3]
    stamps = masked(np.ones((2, 5, 5)), (1, 2, 2))
    np.testing.assert_array_equal(PsfGrid.constant(stamps).valid, [[True, False]])


def test_the_arrays_of_the_caller_stay_as_they_are():
    image = np.full((2, 30, 40), np.nan, np.float32)
    variance = np.zeros((2, 30, 40), np.float32)
    s = scene(image, variance=variance)
    assert not s.valid.any() and np.isnan(s.noise).all()
    assert np.isnan(image).all() and not variance.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bands": ("g", "g")}, "different bands"),
        ({"bands": ()}, "different bands"),
        ({"bands": ("g", "r", "i")}, r"should be \(3, H, W\), it has shape \(2, 30, 40\)"),
        ({"variance": np.ones((2, 30, 41))}, r"shape \(2, 30, 40\), variance has \(2, 30, 41\)"),
        ({"valid": np.ones((30, 40))}, "valid has"),
        ({"edge": np.ones((2, 30, 40))}, "edge has"),
        ({"psf": PsfGrid.constant(np.ones((3, 5, 5)))}, r"bands \['g', 'r'\], the PSF 3"),
        ({"pixel_scale": 0.0}, "pixel scale"),
        ({"pixel_scale": np.nan}, "pixel scale"),
        ({"parents": [Parent(1, 0, 0, np.ones((2, 2)))] * 2}, "same id"),
    ],
)
def test_what_does_not_agree_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        scene(**change)


def test_bands_are_reordered_with_everything_that_belongs_to_them():
    s = scene(variance=np.stack([np.full((30, 40), 1.0), np.full((30, 40), 9.0)]), origin=(7, 8))
    other = s.reordered(("r", "g"))
    assert other.bands == ("r", "g") and other.origin == (7, 8)
    np.testing.assert_array_equal(other.image, s.image[::-1])
    np.testing.assert_array_equal(other.noise, [3, 1])
    np.testing.assert_array_equal(other.psf.stamps, s.psf.stamps[:, ::-1])
    assert s.reordered(("g", "r")) is s
    assert s.reordered(("r",)).bands == ("r",)


def test_a_missing_band_is_an_error_or_a_band_without_data():
    s = scene()
    with pytest.raises(ValueError, match=r"\['u', 'i'\] of \['u', 'g', 'i'\] are missing.*\['g', 'r'\]"):
        s.reordered(("u", "g", "i"))
    other = s.reordered(("u", "g"), allow_missing=True)
    assert not other.valid[0].any() and other.valid[1].all() and not other.psf.valid[:, 0].any()
    np.testing.assert_array_equal(other.image[1], s.image[0])


def test_parents_are_the_connected_regions():
    detected = np.zeros((12, 15), bool)
    detected[2:4, 3:6] = True
    detected[4, 6] = True  # touches by a corner
    detected[9, 1] = True
    parents = find_parents(detected)
    assert [(p.id, p.y0, p.x0, p.area) for p in parents] == [(1, 2, 3, 7), (2, 9, 1, 1)]
    whole = np.zeros(detected.shape, bool)
    for parent in parents:
        window, inside = parent.window(detected.shape)
        whole[window] |= inside
    np.testing.assert_array_equal(whole, detected)
    assert find_parents(np.zeros((5, 5))) == []
    with pytest.raises(ValueError, match="should be"):
        find_parents(np.zeros((2, 5, 5)))


def test_no_peak_is_lost():
    detected = np.zeros((30, 40), bool)
    detected[2:8, 3:9] = detected[20:25, 20:25] = True
    peaks = [[4.4, 3.0], [22.0, 22.0], [8.4, 7.4], [15.0, 15.0], [-20.0, 500.0]]
    parents = find_parents(detected, peaks)
    np.testing.assert_array_equal(parents[0].peaks, [[4.4, 3.0], [8.4, 7.4]])
    np.testing.assert_array_equal(parents[1].peaks, [[22.0, 22.0]])
    assert [p.id for p in parents] == [1, 2, 3, 4]
    np.testing.assert_array_equal(parents[2].peaks, [[15.0, 15.0]])
    np.testing.assert_array_equal(parents[3].peaks, [[-20.0, 500.0]])
    window, inside = parents[3].window(detected.shape)
    assert inside.size == 0 and detected[window].size == 0
    assert sum(len(p.peaks) for p in assign_peaks(parents, [], detected.shape)) == 5
    with pytest.raises(ValueError, match="not finite"):
        find_parents(detected, [[np.nan, 1.0]])


def test_parents_without_pixels_and_peaks_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="Parent 3"):
        Parent(3, 0, 0, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="Parent 4.*not finite"):
        Parent(4, 0, 0, np.ones((2, 2)), [[1.0, np.inf]])


def test_a_footprint_that_hangs_over_the_border_is_cut_off():
    footprint = np.arange(20).reshape(4, 5) % 2 == 0
    window, inside = Parent(1, -2, 37, footprint).window((30, 40))
    assert window == (slice(0, 2), slice(37, 40))
    np.testing.assert_array_equal(inside, footprint[2:, :3])


def test_positions_belong_to_cells():
    g = grid()
    # Cell 0 spans rows -2 to 7 and columns 5 to 24; pixel n reaches from n - 0.5 to n + 0.5.
    x = [5, 24.4, 24.6, 5, 44, 0, 1000]
    y = [-2, 7.4, 7.4, 7.6, 17, -50, 1000]
    np.testing.assert_array_equal(g.index(x, y), [0, 0, 1, 2, 3, 0, 3])
    np.testing.assert_array_equal(PsfGrid.constant(np.ones((2, 5, 5))).index(x, y), 0)


def test_stamps_are_normalised_and_missing_ones_replaced_by_the_nearest():
    stamps = 7.0 * grid().stamps
    stamps[0, 0, 3, 3] = np.nan
    stamps[3, 0] = 0.0
    stamps[:, 1] = np.nan
    g = PsfGrid(stamps, (10, 20), (2, 2))
    np.testing.assert_array_equal(g.valid, [[False, False], [True, False], [True, False], [False, False]])
    np.testing.assert_allclose(g.stamps[g.valid].sum(axis=(1, 2)), 1.0)
    # Cells are 10 high and 20 wide: the vertical neighbour is nearer.
    np.testing.assert_array_equal(g.nearest_valid[:, 0], [2, 1, 2, 1])
    np.testing.assert_array_equal(g.nearest_valid[:, 1], -1)
    filled = g.filled()
    np.testing.assert_array_equal(filled.stamps[0, 0], g.stamps[2, 0])
    np.testing.assert_array_equal(filled.valid, [[True, False]] * 4)
    np.testing.assert_array_equal(np.isfinite(filled.moments).all(axis=2), filled.valid)
    assert grid().filled().stamps.shape == grid().stamps.shape


def test_psf_grids_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="odd"):
        PsfGrid.constant(np.ones((2, 4, 5)))
    with pytest.raises(ValueError, match="grid of"):
        PsfGrid(np.ones((3, 2, 5, 5)), (10, 10), (2, 2))
    with pytest.raises(ValueError, match="positive size"):
        PsfGrid(np.ones((4, 2, 5, 5)), (0, 10), (2, 2))
