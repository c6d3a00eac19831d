# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Both deblenders, measured and compared by one pipeline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from lsst.meas.vaedeblend.adapters.butler_repo import run_pipetask
from lsst.meas.vaedeblend.simulation.patch import simulate_patch
from stack_repo import DETECT, INPUTS, SIZE, SKYMAP, StackRepository

pytestmark = pytest.mark.stack

PIPELINE = Path(__file__).resolve().parents[2] / "pipelines" / "compare-scarlet.yaml"
HAS_BUNDLES = all(importlib.util.find_spec(f"lsst.{name}") for name in ("verify", "analysis"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> StackRepository:
    """One patch, deblended twice and compared."""
    repository = StackRepository(tmp_path_factory.mktemp("compare") / "repo")
    repository.put_patch(4, simulate_patch(8, n_galaxies=60, cells=(1, 1), cell_size=SIZE))
    repository.run(DETECT, [], "detections", [4])
    run_pipetask(
        repository.root,
        "compared",
        inputs=f"detections,{INPUTS},skymaps",
        pipeline=PIPELINE,
        label="compareDeblenders",
        config={"writeBundle": HAS_BUNDLES},
        query=f"skymap = '{SKYMAP}' AND tract = 0 AND patch = 4",
    )
    return repository


def test_both_deblenders_are_measured_and_compared(repository):
    metrics = repository.get("object_vae_compare_metrics", "compared", 4)
    objects = repository.get("object_vae_compare_objects", "compared", 4)
    catalogs = {
        name: repository.get(f"{short}Coadd_deblendedCatalog", "compared", 4)
        for name, short in (("vaedeblend", "vae"), ("scarlet", "scarlet"))
    }
    for name, catalog in catalogs.items():
        own = np.asarray(objects["id"])[np.asarray(objects["entrant"]) == name]
        assert len(own) > 20
        # All but sky objects, and what has no model.
        assert set(own) <= set(catalog["id"])
        assert len(own) >= 0.9 * (~np.array(catalog["merge_peak_sky"])).sum()
    value = {row["metric"]: row for row in metrics if row["versus"] == "scarlet"}
    assert value["n_matched"]["value"] > 20
    for plugin in ("base_PsfFlux", "base_GaussianFlux", "base_CircularApertureFlux_9_0"):
        row = value[f"{plugin}_instFlux in i, ratio - 1, median"]
        assert row["n"] > 10 and abs(row["value"]) < 0.1
    row = value["base_SdssShape size in r, ratio - 1, median"]
    assert row["n"] > 10 and abs(row["value"]) < 0.1
    # Number for number what the catalogues say.
    one, two = (
        {r["id"]: r["base_PsfFlux_instFlux"] for r in repository.get(name, "compared", 4, band="i")}
        for name in ("vaeCoadd_meas", "scarletCoadd_meas")
    )
    alone = set(np.array(catalogs["scarlet"]["id"])[np.array(catalogs["scarlet"]["parent"]) == 0])
    alone &= set(np.array(catalogs["vaedeblend"]["id"])[np.array(catalogs["vaedeblend"]["parent"]) == 0])
    assert alone and all(one[i] == pytest.approx(two[i], rel=0.05, abs=200) for i in alone)


@pytest.mark.skipif(not HAS_BUNDLES, reason="needs analysis_tools")
def test_the_numbers_are_measurements_too(repository):
    metrics = repository.get("object_vae_compare_metrics", "compared", 4)
    bundle = repository.get("object_vae_compare_bundle", "compared", 4)
    finite = metrics[np.isfinite(metrics["value"])]
    assert sum(len(own) for own in bundle.values()) == len(finite)
    found = {str(m.metric_name): m for m in bundle["vaedeblend_vs_scarlet"]}
    wanted = {row["metric"]: row for row in metrics if row["versus"] == "scarlet"}
    measurement = next(
        m for name, m in found.items() if name.endswith("base_PsfFlux_instFlux_in_i_ratio_1_nmad")
    )
    assert measurement.quantity.value == wanted["base_PsfFlux_instFlux in i, ratio - 1, nmad"]["value"]
