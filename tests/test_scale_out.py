# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several tracts of overlapping patches in one repository: `bps submit`, joined catalogues, duplicates."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.table import Table
from lsst.daf.butler import Butler
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout
from lsst.meas.vaedeblend.catalog import flag_tracts, join_patches
from lsst.meas.vaedeblend.ground.files import shipped_file
from lsst.meas.vaedeblend.ground.identifiers import PatchIds
from lsst.meas.vaedeblend.tasks import JoinTractConfig
from lsst.pex.config import FieldValidationError
from synthetic import make_scene

BANDS = ("g", "r", "i")
ORIGIN = (500, 900)
# Patches of 128 pixels every 64: two in each direction make a tract, and its neighbour begins 128 pixels on.
STEP, CELL, TRACT, APART = 64, 64, 192, 128
CENTRES = {7: (150.0, 0.0), 8: (150.0 + APART * 0.2 / 3600, 0.0)}


def layouts() -> dict[int, PatchLayout]:
    half = (2 * CELL - STEP) // 2
    out = {}
    for row in range(2):
        for column in range(2):
            # A tract's own edge is nobody else's.
            border = (half * row, half * (1 - row), half * column, half * (1 - column))
            y0, x0 = ORIGIN[0] + row * STEP, ORIGIN[1] + column * STEP
            out[2 * row + column] = PatchLayout(y0, x0, (2, 2), (CELL, CELL), border)
    return out


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, np.ndarray]:
    """Centres of galaxies 25 to 30 pixels apart on the sky of both tracts, (x, y)."""
    rng = np.random.default_rng(4)
    grid = np.stack(np.meshgrid(np.arange(16, TRACT + APART - 10, 28.0), np.arange(16, TRACT - 10, 28.0)))
    x, y = grid.reshape(2, -1) + rng.uniform(-1.5, 1.5, (2, grid[0].size))
    return x, y


@pytest.fixture(scope="module")
def repository(truth, tmp_path_factory) -> Path:
    """Both tracts, from one image of the sky."""
    x, y = truth
    flux = np.tile([300.0, 500.0, 700.0], (len(x), 1))
    # Right ascension grows towards lower columns: the tract of the higher one has the first columns.
    sky, _ = make_scene(x, y, flux, 1.0, shape=(TRACT, TRACT + APART), bands=BANDS)
    detected = np.zeros(sky.shape, bool)
    for parent in sky.parents:
        window, footprint = parent.window(sky.shape)
        detected[window] |= footprint
    root = tmp_path_factory.mktemp("tracts") / "repo"
    first = CoaddRepository(root, BANDS, layouts(), 0.2, tract=7, centre=CENTRES[7])
    second = first.another_tract(8, layouts(), CENTRES[8])
    for tract, begin in ((first, APART), (second, 0)):
        for patch, layout in tract.patches.items():
            y0, x0 = layout.y0 - ORIGIN[0], begin + layout.x0 - ORIGIN[1]
            part = (slice(y0, y0 + 2 * CELL), slice(x0, x0 + 2 * CELL))
            tract.put_coadds(
                patch,
                sky.image[:, *part],
                sky.variance[:, *part],
                sky.psf.stamps[0],
                {"DETECTED": detected[part]},
            )
    return root


def test_inner_regions_share_the_tract_out(repository):
    times = np.zeros((TRACT, TRACT), int)
    for layout in layouts().values():
        inner = layout.inner_box
        times[
            inner.y.start - ORIGIN[0] : inner.y.stop - ORIGIN[0],
            inner.x.start - ORIGIN[1] : inner.x.stop - ORIGIN[1],
        ] += 1
    assert (times == 1).all()
    with Butler.from_config(str(repository), collections=CoaddRepository.inputs) as butler:
        for tract in CENTRES:
            for patch, layout in layouts().items():
                coadd = butler.get(
                    "deep_coadd", skymap="vaedeblend", tract=tract, patch=patch, band="r"
                )
                assert coadd.patch.inner_bbox == layout.inner_box and coadd.tract == tract


def test_the_examples_for_bps_are_whole(monkeypatch):
    """They name what is there, and ask for what bps/deblend.yaml says was measured."""
    bps = pytest.importorskip("lsst.ctrl.bps", reason="needs lsst-ctrl-bps-parsl")
    root = shipped_file()
    monkeypatch.setenv("MEAS_VAEDEBLEND_DIR", str(root))
    for name in ("deblend", "deblend_gpu", "deblend_gpu_slurm", "deblend_slurm", "local"):
        config = bps.BpsConfig(str(root / "bps" / f"{name}.yaml"))
        opt = {"curvals": {"curr_pipetask": "vaeDeblend"}, "expandEnvVars": True}
        assert Path(config.search("pipelineYaml", opt=opt)[1]).is_file(), name
        if name != "local":
            assert config.search("requestMemory", opt=opt)[1] >= 2048, name
        if name in ("deblend_slurm", "deblend_gpu_slurm", "local"):
            assert config["wmsServiceClass"].endswith("ParslService")
        if "gpu" in name:
            text = (root / "bps" / f"{name}.yaml").read_text()
            assert "gpu.py" in config.search("extraQgraphOptions", opt=opt)[1]
            assert "request_gpus: 1" in text or "--gpus=1" in text


@pytest.mark.slow
def test_bps_deblends_two_tracts_on_two_workers(repository, truth, network_path, tmp_path):
    """bps/local.yaml as it ships, with its payload filled in: eight patches, two tracts, one repository."""
    if not all(importlib.util.find_spec(name) for name in ("parsl", "lsst.ctrl.bps")):
        pytest.skip("needs lsst-ctrl-bps-parsl")
    config = yaml.safe_load(shipped_file("bps/local.yaml").read_text())
    config["payload"] |= {
        "butlerConfig": str(repository),
        "inCollection": CoaddRepository.inputs,
        "dataQuery": "skymap = 'vaedeblend' AND tract IN (7, 8)",
        "output": "out",
    }
    centres = {tract: f"{ra} {dec}" for tract, (ra, dec) in CENTRES.items()}
    (tmp_path / "join.py").write_text(f"config.tractCentres = {centres}\n")
    config["extraQgraphOptions"] = (
        f"-c vaeDeblend:network={network_path} -C vaeJoinTract:{tmp_path}/join.py"
    )
    config["operator"] = "somebody"
    (tmp_path / "submit.yaml").write_text(yaml.safe_dump(config))
    assert config["site"]["local"]["cores"] == 2
    environment = os.environ | {
        "MEAS_VAEDEBLEND_DIR": str(shipped_file()),
        # bps asks the shell where it is.
        "PWD": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.run(
        ["bps", "submit", "submit.yaml"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]

    assert list((tmp_path / "submit").rglob("vaeJoinTract*"))
    joined, single = {}, {}
    with Butler.from_config(str(repository), collections="out") as butler:
        for tract in CENTRES:
            joined[tract] = butler.get("object_vae_tract", skymap="vaedeblend", tract=tract)
            single[tract] = [
                butler.get("object_vae_deblend", skymap="vaedeblend", tract=tract, patch=patch)
                for patch in layouts()
            ]
    x, y = truth
    times = np.zeros(len(x), int)
    for tract, table in joined.items():
        assert len(table) == sum(map(len, single[tract])) > 20
        assert {PatchIds.split(i)[:2] for i in table["id"]} == {(tract, patch) for patch in layouts()}
        begin = APART if tract == 7 else 0
        primary = np.asarray(table["detect_isPrimary"])
        assert 0 < primary.sum() < np.asarray(table["detect_isPatchInner"]).sum() < len(table)
        assert not (primary & ~np.asarray(table["detect_isTractInner"])).any()
        for row in table[primary]:
            distance = np.hypot(row["x"] - ORIGIN[1] + begin - x, row["y"] - ORIGIN[0] - y)
            assert distance.min() < 1
            times[distance.argmin()] += 1
    # Every galaxy of both tracts once, whatever number of patches saw it.
    np.testing.assert_array_equal(times, 1)


def catalogue(patch: int, inner: list[bool], ra: list[float], tract: int = 3) -> Table:
    n = len(inner)
    return Table(
        {
            "id": PatchIds(tract, patch).objects(n),
            "coord_ra": ra,
            "coord_dec": np.zeros(n),
            "r_flux": np.where(np.arange(n) == 3, np.nan, 1.0),
            "detect_isPatchInner": inner,
        }
    )


def test_patches_join_in_any_order():
    one = catalogue(1, [True, False, True, True], [0.1, 359.9, 0.0, 0.2])
    two = catalogue(2, [True, False, False, True], [0.1, 0.1, 0.1, 0.1])
    joined, other = join_patches([one, two]), join_patches([two, one])
    assert joined.colnames == other.colnames
    for name in joined.colnames:
        np.testing.assert_array_equal(joined[name], other[name])
    # In the inner region and with a flux.
    assert joined["detect_isPrimary"].tolist() == [True, False, True, False, True, False, False, False]
    with pytest.raises(ValueError, match="twice"):
        join_patches([one, one])
    with pytest.raises(ValueError, match="no catalogue"):
        join_patches([])
    with pytest.raises(ValueError, match="same columns"):
        join_patches([one, two[["id", "r_flux"]]])


def test_tracts_share_the_sky_out():
    joined = join_patches([catalogue(1, [True, True, True, True], [0.1, 359.9, 0.0, 0.2])])
    centres = {3: (359.5, 0.0), 4: (0.5, 0.0)}
    mine, theirs = flag_tracts(joined, 3, centres), flag_tracts(joined, 4, centres)
    # Across right ascension 0; the middle belongs to the lower number.
    assert mine["detect_isTractInner"].tolist() == [False, True, True, False]
    assert (np.asarray(mine["detect_isTractInner"]) ^ np.asarray(theirs["detect_isTractInner"])).all()
    assert mine["detect_isPrimary"].tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="Tract 9"):
        flag_tracts(joined, 9, centres)
    config = JoinTractConfig()
    config.tractCentres = {1: "150.0 2.0", 2: "150,-2"}
    config.validate()
    assert config.centres() == {1: (150.0, 2.0), 2: (150.0, -2.0)}
    config.tractCentres = {1: "150.0"}
    with pytest.raises(FieldValidationError, match="declination"):
        config.validate()
