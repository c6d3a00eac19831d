# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Columns, units and flags of the tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import synthetic
from astropy import units as u
from lsst.meas.vaedeblend.catalog import models_table, object_table, parent_table
from lsst.meas.vaedeblend.deblender import deblend
from lsst.meas.vaedeblend.ground.bands import reference_band
from lsst.meas.vaedeblend.ground.flags import PARENT_FLAGS, SKIP_FLAGS, SOURCE_FLAGS
from lsst.meas.vaedeblend.posterior import Posterior, sample_posterior
from lsst.meas.vaedeblend.scene import PsfGrid


@pytest.fixture(scope="module")
def result(network):
    scene, _ = synthetic.make_scene(
        [40.3, 52.0, 100.0], [40.0, 40.0, 90.4], [[500] * 3, [700] * 3, [400] * 3], [1.0, 2.0, 1.5], noise=0.3
    )
    scene.origin = (200, 300)
    return deblend(scene, network)


def sky(x, y):
    return 150 + x * 1e-4, 2 + y * 1e-4


def test_every_column_has_a_unit_and_a_description(result):
    for table in (
        object_table(result.sources, result.parents, sky),
        parent_table(result.parents, sky),
        models_table(result.sources),
    ):
        assert len(table.colnames) > 10
        for name in table.colnames:
            assert table[name].unit is not None, name
            assert len(table[name].description) > 5, name
            assert table[name].description[0].isupper(), name


def rst(table, bands: str = "gri") -> str:
    """Columns of a table as the documentation lists them."""
    lines = [".. list-table::", "   :header-rows: 1", "", "   * - column", "     - unit", "     - meaning"]
    for name in table.colnames:
        band, _, quantity = name.partition("_")
        text = table[name].description.replace(f"in the bands {', '.join(bands)}", "in the network's bands")
        if band in bands:
            if band != bands[0]:
                continue
            name, text = f"BAND_{quantity}", text.replace(f" in {band}", " in BAND")
        unit = table[name.replace("BAND", bands[0])].unit.to_string()
        lines += [f"   * - ``{name}``", f"     - {unit}".rstrip(), f"     - {text}"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("dataset", ["object_vae_deblend", "object_vae_parent", "object_vae_models"])
def test_the_documentation_lists_every_column(result, network, dataset):
    posterior = sample_posterior(result.sources, network, PsfGrid.constant(np.ones((3, 5, 5))), 0)
    table = {
        "object_vae_deblend": object_table(result.sources, result.parents, sky, posterior=posterior),
        "object_vae_parent": parent_table(result.parents, sky),
        "object_vae_models": models_table(result.sources),
    }[dataset]
    page = Path(__file__).parents[1] / "doc" / "lsst.meas.vaedeblend" / "outputs.rst"
    # What is missing can be copied from this test's message.
    assert rst(table) in page.read_text(), f"{page} should have:\n{rst(table)}"


def test_errors_of_a_posterior_take_the_place_of_the_sources_own(result, network):
    n = len(result.sources)
    posterior = Posterior(
        ("g", "r", "i"),
        "i",
        flux=np.full((n, 3), 7.0),
        flux_err=np.full((n, 3), 2.0),
        shape=np.tile([5.0, 3.0, 1.0], (n, 1)),
        shape_err=np.tile([0.5, 0.3, 0.1], (n, 1)),
    )
    table = object_table(result.sources, result.parents, posterior=posterior)
    assert (table["r_flux"] == 7).all() and (table["i_fluxErr"] == 2).all()
    np.testing.assert_allclose(table["shape_e1"], 0.25)
    np.testing.assert_allclose(table["shape_xyErr"], 0.1)
    assert "in i," in table["shape_xx"].description
    assert np.isnan(object_table(result.sources, result.parents)["shape_xyErr"]).all()
    with pytest.raises(ValueError, match="shapes in i, not in r"):
        object_table(result.sources, result.parents, band="r", posterior=posterior)


def test_reasons_for_skipping_become_columns(result):
    flags = {f"skipped_{name}": np.array([i == 0, False]) for i, name in enumerate(SKIP_FLAGS)}
    table = parent_table(dataclasses.replace(result.parents, flags=flags))
    assert table["deblend_skipped"].tolist() == [True, False]
    for i, (name, doc) in enumerate(SKIP_FLAGS.items()):
        assert table[f"deblend_skipped_{name}"].tolist() == [i == 0, False]
        assert table[f"deblend_skipped_{name}"].description == doc
    assert not parent_table(result.parents)["deblend_skipped"].any()


def test_objects_have_tract_coordinates_fluxes_and_their_parents_figures(result):
    table = object_table(result.sources, result.parents, sky)
    assert table["id"].dtype == np.int64 and len(set(table["id"])) == len(table) == 3
    np.testing.assert_allclose(table["x"], [340.3, 352.0, 400.0], atol=0.2)
    np.testing.assert_allclose(table["y"], [240.0, 240.0, 290.4], atol=0.2)
    np.testing.assert_allclose(table["coord_ra"], 150 + table["x"].data * 1e-4)
    np.testing.assert_allclose(table["coord_dec"], 2 + table["y"].data * 1e-4)
    assert table["coord_ra"].unit == u.deg and table["g_flux"].unit == u.nJy
    for band in "gri":
        np.testing.assert_allclose(table[f"{band}_flux"], [500, 700, 400], rtol=0.05)
        assert (table[f"{band}_fluxErr"] > 0).all()
    by_parent = dict(zip(table["parent"].tolist(), table["deblend_nChild"].tolist(), strict=True))
    assert by_parent == {1: 2, 2: 1}
    np.testing.assert_array_equal(table["deblend_nPeaks"], table["deblend_nChild"])
    np.testing.assert_allclose(table["deblend_peak_center_x"], [340.3, 352.0, 400.0])
    assert (table["deblend_blendedness"][:2] > table["deblend_blendedness"][2]).all()
    np.testing.assert_allclose(table["deblend_dataCoverage"], 1.0, atol=1e-3)
    assert "coord_ra" not in object_table(result.sources, result.parents).colnames


def test_shapes_are_those_of_the_model_in_the_reference_band(result):
    table = object_table(result.sources, result.parents)
    # Galaxy plus the model frame's pixel-integrated Gaussian.
    expected = np.array([1.0, 2.0, 1.5]) ** 2 + synthetic.SIGMA**2 + 1 / 12
    np.testing.assert_allclose(table["shape_xx"], expected, rtol=0.1)
    np.testing.assert_allclose(table["shape_yy"], expected, rtol=0.1)
    np.testing.assert_allclose([table["shape_e1"], table["shape_e2"]], 0.0, atol=1e-3)
    assert "in r," in table["shape_xx"].description
    assert "in i," in object_table(result.sources, result.parents, band="i")["shape_xx"].description
    with pytest.raises(ValueError, match=r"\['g', 'r', 'i'\], none is 'z'"):
        object_table(result.sources, result.parents, band="z")


@pytest.mark.parametrize(
    ("bands", "expected"), [("ugrizy", "r"), ("izy", "i"), ("gz", "z"), (["F814W"], "F814W")]
)
def test_the_reference_band(bands, expected):
    assert reference_band(bands) == expected


def test_flags_become_columns(result):
    flags = {name: np.arange(3) == i % 3 for i, name in enumerate(SOURCE_FLAGS)}
    table = object_table(dataclasses.replace(result.sources, flags=flags), result.parents)
    for name, doc in SOURCE_FLAGS.items():
        np.testing.assert_array_equal(table[f"deblend_flag_{name}"], flags[name])
        assert table[f"deblend_flag_{name}"].description == doc
    # What a re-rendered table does not know is not set.
    bare = object_table(dataclasses.replace(result.sources, flags={}), result.parents)
    assert not any(bare[f"deblend_flag_{name}"].any() for name in SOURCE_FLAGS)
    flags = {name: np.array([True, False]) for name in PARENT_FLAGS}
    table = parent_table(dataclasses.replace(result.parents, flags=flags))
    assert all(table[f"deblend_flag_{name}"].tolist() == [True, False] for name in PARENT_FLAGS)


def test_the_deblender_sets_only_flags_that_are_documented(result):
    assert set(result.sources.flags) == set(SOURCE_FLAGS)
    assert set(result.parents.flags) == set(PARENT_FLAGS)


def test_parents(result):
    table = parent_table(result.parents, sky)
    np.testing.assert_array_equal(table["deblend_nChild"], [2, 1])
    assert (table["bbox_x0"] >= 300).all() and (table["bbox_y0"] >= 200).all()
    inside = np.abs(table["x"].data - [346, 400]) < 4
    assert inside.all()
    assert (table["area"] <= table["bbox_width"] * table["bbox_height"]).all()
    reduced = table["deblend_chi2"] / table["deblend_nPixels"]
    assert (reduced < 1.5).all() and (table["deblend_chi2_start"] > 20 * table["deblend_chi2"]).all()


def test_sources_of_unknown_parents_are_refused(result):
    lost = dataclasses.replace(result.sources, parent=result.sources.parent + 10)
    with pytest.raises(ValueError, match="not among the 2 parents"):
        object_table(lost, result.parents)


def test_tables_of_nothing_have_all_columns(network, result):
    scene, _ = synthetic.make_scene([], [], np.empty((0, 3)))
    nothing = deblend(scene, network)
    table = object_table(nothing.sources, nothing.parents)
    assert len(table) == 0
    assert table.colnames == object_table(result.sources, result.parents).colnames
    assert len(parent_table(nothing.parents)) == 0 and len(models_table(nothing.sources)) == 0
