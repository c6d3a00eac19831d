# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Limits beyond which parents are not deblended."""

from __future__ import annotations

import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.flags import SKIP_FLAGS
from lsst.meas.vaedeblend.scene import Parent
from lsst.meas.vaedeblend.tasks.limits import LimitsConfig, axis_ratio, why_skipped

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
