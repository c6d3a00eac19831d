# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The state keeps its promise: the residual is the image minus all living models, whatever happens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import synthetic
from lsst.meas.vaedeblend.deblender import DeblendConfig
from lsst.meas.vaedeblend.deblender._drawing import Drawn
from lsst.meas.vaedeblend.deblender._state import State

BANDS, SHAPE, N = 3, (90, 110), 14


def make_state(network, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(2, SHAPE[1] - 3, N), rng.uniform(2, SHAPE[0] - 3, N)
    scene, _ = synthetic.make_scene(x, y, rng.uniform(100, 5000, (N, 3)), shape=SHAPE, one_parent=True)
    scene.valid[:, 40:43, 20:60] = False
    state = State(scene, network, DeblendConfig())
    state.add(state.new_rows(np.stack([x, y], 1), np.zeros(N, np.int64), given=True, iteration=0))
    return state


def drawn(rng, n, sound=1.0):
    """Models of several widths, some of them no good, and fluxes that go with them."""
    width = rng.choice([16, 24, 40, 64], n)
    images = []
    for w in np.unique(width).tolist():
        index = np.flatnonzero(width == w)
        images.append((index, rng.normal(0, 1, (len(index), BANDS, w, w)).astype(np.float32)))
    flux, offset = rng.uniform(1, 50, (n, BANDS)), rng.normal(0, 1, (n, 2))
    return Drawn(images, flux, offset, width, rng.random(n) < sound)


def expected_residual(state):
    """Image minus models, in double precision."""
    r, out = state.rows, state.image.astype(float)
    height, width = SHAPE
    for row in np.flatnonzero(r.alive & (r.stamps.width > 0)):
        stamp = r.stamps.images(np.array([row]))[0].astype(float) * r.flux[row][:, None, None]
        y, x = state.starts(np.array([row]))[0]
        size = stamp.shape[-1]
        y1, y2, x1, x2 = max(y, 0), min(y + size, height), max(x, 0), min(x + size, width)
        out[:, y1:y2, x1:x2] -= stamp[:, y1 - y : y2 - y, x1 - x : x2 - x]
    return out


def snapshot(rows, which):
    """All that there is of some sources."""
    fields = {
        f.name: getattr(rows, f.name)[which].copy() for f in dataclasses.fields(rows) if f.name != "stamps"
    }
    one = [which[i : i + 1] for i in range(len(which))]
    images = [rows.stamps.images(own)[0] if rows.stamps.width[own[0]] else None for own in one]
    return fields, images


def some(rng, rows):
    return rng.permutation(rows)[: rng.integers(1, len(rows) + 1)] if len(rows) else rows


OPERATIONS = {
    "add": 0.05,
    "replace": 0.3,
    "flux": 0.2,
    "kill": 0.1,
    "save": 0.12,
    "back": 0.12,
    "soften": 0.06,
    "refresh": 0.05,
}


def operate(state, rng, saved):
    """One operation that the procedure may do."""
    r = state.rows
    living = np.flatnonzero(r.alive)
    what = rng.choice(list(OPERATIONS), p=list(OPERATIONS.values()))
    if what == "add":
        n = int(rng.integers(1, 4))
        peaks = rng.uniform(0, 1, (n, 2)) * [SHAPE[1] - 1, SHAPE[0] - 1]
        added = state.add(state.new_rows(peaks, np.zeros(n, np.int64), given=False, iteration=1))
        assert (added == np.arange(len(r) - n, len(r))).all()
    elif what == "replace":
        rows = some(rng, living)
        r.tried[rows] = True
        state.replace(rows, drawn(rng, len(rows), 0.8), rng.uniform(-10, 100, (len(rows), BANDS)))
    elif what == "flux":
        rows = some(rng, living[r.stamps.width[living] > 0])
        state.set_fluxes(rows, rng.uniform(-10, 100, (len(rows), BANDS)))
    elif what == "kill":
        state.kill(some(rng, np.arange(len(r)))[:2])
    elif what == "save":
        rows = some(rng, np.arange(len(r)))
        saved.append((r.save(rows), snapshot(r, rows)))
    elif what == "back" and saved:
        kept, (fields, images) = saved[rng.integers(len(saved))]
        part = None if rng.random() < 0.5 else rng.random(len(kept.rows)) < 0.5
        state.put_back(kept, part)
        index = np.arange(len(kept.rows)) if part is None else np.flatnonzero(part)
        for name in r._CHANGING:
            np.testing.assert_array_equal(getattr(r, name)[kept.rows[index]], fields[name][index])
        for i in index.tolist():
            row = kept.rows[i : i + 1]
            if images[i] is None:
                assert r.stamps.width[row[0]] == 0
            else:
                np.testing.assert_array_equal(r.stamps.images(row)[0], images[i])
    elif what == "soften":
        state.soften(some(rng, living))
    elif what == "refresh":
        state.refresh()
    return what


@pytest.mark.parametrize("seed", range(4))
def test_the_residual_is_right_after_whatever_happens(gaussian_network, seed):
    rng = np.random.default_rng(100 + seed)
    state, saved = make_state(gaussian_network, seed), []
    largest = 1.0
    for _ in range(200):
        operate(state, rng, saved)
        expected = expected_residual(state)
        # Rounding adds up over operations; fluxes of 100 in some twenty overlapping stamps make thousands.
        largest = max(largest, np.abs(expected).max())
        np.testing.assert_allclose(state.residual, expected, atol=200 * 6e-8 * largest)
    np.testing.assert_array_equal(state.members(0), np.flatnonzero(state.rows.alive & state.rows.active))


def test_a_fresh_residual_does_not_depend_on_the_way(gaussian_network):
    def prepare():
        rng = np.random.default_rng(7)
        state = make_state(gaussian_network)
        state.rows.tried[:] = True
        state.replace(np.arange(N), drawn(rng, N), rng.uniform(1, 100, (N, BANDS)))
        state.kill(np.array([3, 8]))
        return state

    direct, rows = prepare(), np.arange(N)
    direct.refresh()
    rng = np.random.default_rng(8)
    for _ in range(3):
        other = prepare()
        kept = other.rows.save(rows)
        for _ in range(60):
            what = rng.integers(3)
            own = some(rng, np.flatnonzero(other.rows.alive))
            if what == 0 and len(own):
                other.replace(own, drawn(rng, len(own)), rng.uniform(1, 100, (len(own), BANDS)))
            elif what == 1 and len(own):
                other.set_fluxes(own, rng.uniform(1, 100, (len(own), BANDS)))
            else:
                peaks = rng.uniform(5, 80, (2, 2))
                added = other.add(other.new_rows(peaks, np.zeros(2, np.int64), given=False, iteration=1))
                other.rows.tried[added] = True
                other.replace(added, drawn(rng, 2), rng.uniform(1, 9, (2, BANDS)))
                other.kill(added)
        other.kill(np.arange(N, len(other.rows)))
        other.put_back(kept)
        assert not np.array_equal(other.residual, direct.residual)
        np.testing.assert_allclose(other.residual, direct.residual, atol=0.1)
        other.refresh()
        np.testing.assert_array_equal(other.residual, direct.residual)
        for name in other.rows._CHANGING:
            mine, theirs = getattr(other.rows, name)[rows], getattr(direct.rows, name)[rows]
            np.testing.assert_array_equal(mine, theirs)


def test_changes_of_chi_square_belong_to_what_was_done(gaussian_network):
    rng = np.random.default_rng(9)
    state = make_state(gaussian_network)
    rows = np.arange(N)
    state.rows.tried[rows] = True
    state.replace(rows, drawn(rng, N), rng.uniform(1, 20, (N, BANDS)))

    def chi2():
        return (state.soft_weight.astype(float) * expected_residual(state) ** 2).sum()

    before = chi2()
    moved = rng.permutation(rows)[:6]
    change = state.replace(moved, drawn(rng, 6, 0.7), rng.uniform(1, 20, (6, BANDS)))
    np.testing.assert_allclose(change.sum(), chi2() - before, rtol=1e-4)


def test_parents_keep_their_members(gaussian_network):
    x, y = [20.0, 22.0, 80.0, 84.0, 50.0], [20.0, 26.0, 70.0, 70.0, 5.0]
    scene, _ = synthetic.make_scene(x, y, np.full((5, 3), 500.0), shape=SHAPE)
    state = State(scene, gaussian_network, DeblendConfig())
    n = len(scene.parents)
    rng = np.random.default_rng(1)
    for _ in range(5):
        k = int(rng.integers(1, 5))
        state.add(state.new_rows(rng.uniform(0, 80, (k, 2)), rng.integers(0, n, k), given=True, iteration=0))
        state.rows.alive &= rng.random(len(state.rows)) < 0.8
        state.rows.active &= rng.random(len(state.rows)) < 0.9
        for p in range(n):
            own = (state.rows.parent == p) & state.rows.alive & state.rows.active
            np.testing.assert_array_equal(state.members(p), np.flatnonzero(own))
        np.testing.assert_array_equal(
            np.sort(state.members_of(list(range(n)))), np.flatnonzero(state.rows.alive & state.rows.active)
        )
