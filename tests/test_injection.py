# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Galaxies injected into blends: where they go, and how they come out."""

import json

import numpy as np
import pytest
from lsst.meas.vaedeblend.evaluation.hsc import BANDS, HscBlend
from lsst.meas.vaedeblend.evaluation.injection import _place, evaluate_injection
from lsst.meas.vaedeblend.simulation.patch import simulate_patch


@pytest.fixture(scope="module")
def blends(tmp_path_factory):
    """Two files in the format of the real blends, in a unit of their own."""
    directory = tmp_path_factory.mktemp("blends")
    for k in range(2):
        patch = simulate_patch(
            k, survey="HSC", bands=BANDS, n_galaxies=6, cells=(1, 1), cell_size=90, mag_range=(20.0, 24.0)
        )
        weights = 50.0**2 / patch.variance
        weights[:, :4] = 0.0
        np.savez(
            directory / f"blend_{k}.npz",
            images=patch.image / 50.0,
            weights=weights.astype(np.float32),
            psfs=patch.psf[:, 0, 0].astype(np.float32),
            peaks=np.column_stack([patch.x, patch.y]),
        )
    return directory


def test_places_are_beside_a_peak_and_on_the_footprint(blends):
    blend = HscBlend.read(blends / "blend_0.npz")
    rng = np.random.default_rng(2)
    for _ in range(50):
        x, y = _place(blend, rng)
        distance = np.hypot(*(blend.peaks - [x, y]).T) * 0.168
        assert 0.8 < distance.min() < 2.5
        assert (blend.weight[:, round(y), round(x)] > 0).any()
    blend.weight[:] = 0.0
    assert _place(blend, rng) is None


def test_injected_galaxies_are_recovered(blends, tmp_path):
    summary = evaluate_injection(blends, tmp_path / "out", per_blend=4, patches=1)
    assert json.loads((tmp_path / "out" / "injection.json").read_text()) == summary
    assert summary["injected"]["n"] >= 3 and summary["simulated"]["n"] > 30
    # Simulated blends are no harder than simulated patches.
    assert summary["injected"]["flux_meanabs"] < 0.5 and summary["simulated"]["flux_meanabs"] < 0.3
    ratio = summary["injected"]["flux_nmad"] / summary["simulated"]["flux_nmad"]
    assert summary["ratio_nmad"] == pytest.approx(ratio)


def test_a_directory_without_blends(tmp_path):
    with pytest.raises(FileNotFoundError, match="npz"):
        evaluate_injection(tmp_path, tmp_path / "out")
