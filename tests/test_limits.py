# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Limits beyond which parents are not deblended."""

from __future__ import annotations

import numpy as np
import pytest
from lsst.meas.vaedeblend.deblender import deblend
from lsst.meas.vaedeblend.ground.flags import PARENT_FLAGS, SKIP_FLAGS
from lsst.meas.vaedeblend.scene import Parent, PsfGrid, Scene
from lsst.meas.vaedeblend.tasks.limits import (
    LimitsConfig,
    axis_ratio,
    skip_reasons,
    why_skipped,
    with_skipped,
)
from synthetic import make_scene

PARENT = Parent(1, 3, 5, np.ones((10, 20), bool), [[6, 4], [9, 9]])


@pytest.mark.parametrize(
    ("field", "within", "beyond", "reason"),
    [
        ("maxFootprintArea", 200, 199, "parentTooBig"),
        ("maxFootprintSize", 20, 19, "parentTooBig"),
        ("maxAreaTimesPeaks", 400, 399, "parentTooBig"),
        ("minFootprintAxisRatio", 0.49, 0.51, "parentTooBig"),
        ("maxNumberOfPeaks", 2, 1, "tooManyPeaks"),
    ],
)
def test_each_limit_has_its_reason(field, within, beyond, reason):
    config = LimitsConfig()
    setattr(config, field, within)
    assert why_skipped(PARENT, 2, {}, config) is None
    setattr(config, field, beyond)
    assert why_skipped(PARENT, 2, {}, config) == reason
    assert reason in SKIP_FLAGS
    setattr(config, field, 0)
    assert why_skipped(PARENT, 2, {}, config) is None


def test_masked_pixels_count_on_the_footprint_only():
    config = LimitsConfig()
    config.maskLimits = {"SAT": 0.1, "OTHER": 0.0}
    mask = np.zeros((40, 50), bool)
    mask[:3] = True  # beside the parent
    mask[3, 5:25] = True  # a tenth of it
    assert why_skipped(PARENT, 2, {"SAT": mask}, config) is None
    mask[4, 5] = True
    assert why_skipped(PARENT, 2, {"SAT": mask}, config) == "masked"
    config.maskLimits = {"OTHER": 0.0}
    assert why_skipped(PARENT, 2, {"SAT": mask}, config) is None
    one = np.zeros((40, 50), bool)
    one[5, 5] = True
    assert why_skipped(PARENT, 2, {"OTHER": one}, config) == "masked"


def small_scene(*parents: Parent) -> Scene:
    image = np.ones((2, 40, 50))
    valid = np.ones(image.shape, bool)
    valid[0, :5], valid[1, :10] = False, False
    psf = PsfGrid.constant(np.ones((2, 5, 5)))
    return Scene("gr", image, np.full(image.shape, 4.0), valid, psf=psf, pixel_scale=0.2, parents=parents)


def test_parents_of_a_scene_and_why_they_are_skipped():
    square, two = np.ones((4, 4), bool), [[2.0, 2.0], [3.0, 3.0]]
    scene = small_scene(
        Parent(1, 0, 0, square, two),  # no pixel in any band
        Parent(2, 0, 10, square, two[:1]),  # the same, but a single object
        Parent(3, 0, 20, square),  # the same, and its peaks not known yet
        Parent(4, 20, 0, np.ones((4, 12), bool), two),
        Parent(5, 5, 20, square, two),
        Parent(6, -30, 0, square, two),  # beside the image
    )
    config = LimitsConfig()
    assert skip_reasons(scene, {}, config) == {1: "masked", 3: "masked"}
    config.maxFootprintSize = 10
    assert skip_reasons(scene, {}, config) == {1: "masked", 3: "masked", 4: "parentTooBig"}
    # A band without PSF counts for nothing.
    bare = small_scene(*scene.parents)
    bare.psf = bare.psf.select([-1, 1])
    assert skip_reasons(bare, {}, LimitsConfig()) == {1: "masked", 3: "masked", 5: "masked"}


def test_skipped_parents_keep_a_row(network):
    scene, _ = make_scene([30.0, 36.0, 90.0], [40.0, 42.0, 100.0], np.full((3, 3), 500.0))
    parents = scene.parents
    whole = deblend(scene, network).parents
    blend = int(np.flatnonzero(whole.n_child == 2)[0])
    scene.parents = [parent for i, parent in enumerate(parents) if i != blend]
    rest = deblend(scene, network).parents
    reasons = {parents[blend].id: "tooManyPeaks"}
    summary = with_skipped(rest, scene, parents, reasons, network.metadata.cutout_size)
    for name in ("id", "x0", "y0", "width", "height", "area", "n_peaks", "n_pixels"):
        np.testing.assert_array_equal(getattr(summary, name), getattr(whole, name), err_msg=name)
        assert getattr(summary, name).dtype == getattr(whole, name).dtype
    np.testing.assert_allclose(summary.chi2_start, whole.chi2_start, rtol=1e-6)
    assert summary.chi2[blend] == summary.chi2_start[blend] and summary.n_child[blend] == 0
    assert summary.flags["skipped_tooManyPeaks"].tolist() == [i == blend for i in range(len(parents))]
    assert not summary.flags["skipped_masked"].any() and set(PARENT_FLAGS) < set(summary.flags)
    with pytest.raises(ValueError, match="1 parents were deblended, 2 should"):
        with_skipped(rest, scene, parents, {}, 64)


def test_the_defaults_let_ordinary_parents_pass():
    config = LimitsConfig()
    assert why_skipped(Parent(1, 0, 0, np.ones((500, 500), bool)), 600, {}, config) is None
    assert why_skipped(Parent(1, 0, 0, np.ones((1500, 1500), bool)), 2, {}, config) == "parentTooBig"


def test_axis_ratio_of_boxes_and_lines():
    assert axis_ratio(np.ones((7, 7), bool)) == pytest.approx(1.0)
    assert axis_ratio(np.ones((10, 20), bool)) == pytest.approx(0.5)
    # A line of pixels is a box of width one.
    assert axis_ratio(np.ones((1, 8), bool)) == pytest.approx(1 / 8)
    diagonal = np.eye(9, dtype=bool)
    assert axis_ratio(diagonal) < 0.2
