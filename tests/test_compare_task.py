# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The task that compares deblenders, through a real `pipetask run`, and the command on its repository."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from lsst.meas.vaedeblend.adapters.butler_repo import (
    CoaddRepository,
    PatchLayout,
    pipeline_path,
    run_pipetask,
)
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.tasks.compare import CompareDeblendersConfig, CompareDeblendersConnections
from lsst.pex.config import FieldValidationError
from synthetic import make_scene

BANDS = ("g", "r", "i")
X = np.array([30.0, 38.0, 90.3, 60.0])
Y = np.array([40.0, 42.0, 100.6, 64.0])
FLUX = np.array([[600, 900, 700], [600, 800, 500], [900, 900, 900], [500, 700, 800]], float)
OUTPUT = "vaedeblend/compare"


@pytest.fixture(scope="module")
def repository(tmp_path_factory, network_path):
    scene, _ = make_scene(X, Y, FLUX, 1.0, psf_sigma=(1.6, 1.4, 1.5), bands=BANDS)
    detected = np.zeros(scene.shape, bool)
    for parent in scene.parents:
        window, footprint = parent.window(scene.shape)
        detected[window] |= footprint
    layout = PatchLayout(500, 900, (1, 1), scene.shape)
    root = tmp_path_factory.mktemp("compare") / "repo"
    repository = CoaddRepository(root, BANDS, {3: layout}, 0.2)
    repository.put_coadds(3, scene.image, scene.variance, scene.psf.stamps[0], {"DETECTED": detected})
    run_pipetask(
        root,
        OUTPUT,
        pipeline=pipeline_path("compare.yaml"),
        config={"network": str(network_path)},
        label="parameters",
    )
    return repository


def test_the_pipeline_writes_numbers_and_objects(repository):
    metrics = repository.get("object_vae_compare_metrics", 3, OUTPUT)
    objects = repository.get("object_vae_compare_objects", 3, OUTPUT)
    ours = repository.get("object_vae_deblend", 3, OUTPUT)
    mine = objects[objects["entrant"] == "vaedeblend"]
    assert sorted(mine["id"]) == sorted(ours["id"]) and set(objects["entrant"]) == {"vaedeblend", "sep"}
    assert set(objects["patch"]) == {"0_3"}
    order = np.argsort(mine["id"])
    own = ours[np.argsort(ours["id"])]
    np.testing.assert_allclose(np.asarray(mine["r_flux"])[order], own["r_flux"], rtol=1e-5)
    # Positions are those of the array; the catalogue's are of the tract.
    np.testing.assert_allclose(np.asarray(mine["x"])[order] + 900, own["x"], atol=1e-3)
    value = {(r["entrant"], r["versus"], r["metric"]): r["value"] for r in metrics}
    assert value["vaedeblend", "", "n_objects"] == len(ours)
    assert value["vaedeblend", "sep", "n_matched"] >= 3
    assert abs(value["vaedeblend", "sep", "flux in r, ratio - 1, median"]) < 0.2
    assert 0.7 < value["vaedeblend", "", "chi2_median"] < 1.5


def test_the_command_reads_the_repository(repository, network_path, tmp_path):
    what = f"vae={repository.root}@{OUTPUT}"
    result = CliRunner().invoke(main, ["compare", what, "sep", str(tmp_path), "--network", str(network_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "compare.html").read_text()
    assert "1 patch without truth" in text and "0_3, object " in text
    # The run's own time and the stored models' size.
    cells = text.split("<h2 id='fates'>")[1].split("<td>")
    assert cells[1].startswith("vae<") and float(cells[3].split("<")[0]) >= 0
    assert float(cells[4].split("<")[0].replace(" ", "")) > 100
    result = CliRunner().invoke(main, ["compare", f"{repository.root}@{repository.inputs}", "sep", "out"])
    assert result.exit_code == 1 and "object_vae_models" in result.output


def test_there_has_to_be_another():
    config = CompareDeblendersConfig()
    config.validate()
    assert "scarletModels" not in CompareDeblendersConnections(config=config).inputs
    config.useScarlet = True
    assert "scarletModels" in CompareDeblendersConnections(config=config).inputs
    config.useScarlet = config.runSep = False
    with pytest.raises(FieldValidationError, match="nobody to compare with"):
        config.validate()
