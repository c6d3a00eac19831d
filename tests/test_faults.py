# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs that are killed, starved or doubled go on to the result of an undisturbed one; doc/.../trust.rst."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from lsst.daf.butler import Butler
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout, pipeline_path
from synthetic import make_scene, write_network

BANDS = ("g", "r", "i")
TABLES = ("object_vae_deblend", "object_vae_parent", "object_vae_models")
RESIDUAL = "deep_coadd_vae_residual"
GO_ON = ("--extend-run", "--skip-existing", "--clobber-outputs")
SOME_KILLS = [
    {"point": "after", "dataset": TABLES[2]},
    {"point": "half", "dataset": RESIDUAL},
]
ALL_KILLS = [
    {"point": "before", "dataset": "vaeDeblend_config"},
    {"point": "after", "dataset": "vaeDeblend_config"},
    {"point": "deblended"},
    *(
        {"point": point, "dataset": dataset}
        for dataset in (TABLES[0], TABLES[2], RESIDUAL)
        for point in ("before", "half", "after")
    ),
    {"point": "before", "dataset": "vaeDeblend_metadata"},
    {"point": "after", "dataset": "vaeDeblend_metadata"},
    {"point": "before", "dataset": "vaeDeblend_log"},
]


@pytest.fixture(scope="module")
def where():
    """A folder that other users may enter, for the one that may not write."""
    folder = Path(tempfile.mkdtemp(prefix="vaedeblend"))
    folder.chmod(0o755)
    yield folder
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def repository(where) -> CoaddRepository:
    """Two patches of three galaxies."""
    layouts = {k: PatchLayout(500, 900 + 128 * k, (1, 1), (128, 128)) for k in range(2)}
    repository = CoaddRepository(where / "repo", BANDS, layouts, 0.2)
    flux = [[300, 500, 700], [600, 400, 200], [900, 900, 900]]
    for patch in layouts:
        scene, _ = make_scene(
            [30.0, 37.0, 90.3], [40.0, 42.0, 100.6], flux, 1.0, psf_sigma=(1.6, 1.4, 1.5), seed=patch
        )
        detected = np.zeros(scene.shape, bool)
        for parent in scene.parents:
            window, footprint = parent.window(scene.shape)
            detected[window] |= footprint
        repository.put_coadds(
            patch, scene.image, scene.variance, scene.psf.stamps[0], {"DETECTED": detected}
        )
    return repository


class Runs:
    """Runs of pipetask on the repository, each output in a collection of its own name."""

    def __init__(self, repository: CoaddRepository, where: Path) -> None:
        self.repository, self.where, self.count = repository, where, 0
        self.network = write_network(where)
        os.chmod(self.network, 0o644)

    def one(self, run: str, *options: str, **more) -> dict:
        root = str(more.pop("root", self.repository.root))
        arguments = ["-b", root, "-p", str(pipeline_path()), "-i", CoaddRepository.inputs]
        arguments += ["--output-run", run, "--register-dataset-types", *options]
        arguments += ["-c", f"vaeDeblend:network={self.network}", "-c", "vaeDeblend:doWriteResidual=True"]
        return {"arguments": arguments, **more}

    def __call__(self, *steps: list[dict]) -> list[list[dict]]:
        self.count += 1
        job = self.where / f"job{self.count}.json"
        job.write_text(json.dumps(steps))
        driver = Path(__file__).with_name("faults.py")
        process = subprocess.run(
            [sys.executable, str(driver), str(job)], capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        return json.loads(job.with_suffix(".out").read_text())

    def bytes_of(self, run: str, root: Path | None = None) -> dict[str, bytes]:
        """Values of what a run has written; what cannot be read raises."""
        out = {}
        with Butler.from_config(str(root or self.repository.root), collections=run) as butler:
            for name in (*TABLES, RESIDUAL):
                for ref in sorted(butler.query_datasets(name, explain=False), key=lambda ref: ref.dataId):
                    if not butler.stored(ref):
                        continue
                    value, key = butler.get(ref), f"{name} {ref.dataId}"
                    if name == RESIDUAL:
                        arrays = {
                            "image": value.image.array,
                            "mask": value.mask.array,
                            "variance": value.variance.array,
                        }
                    else:
                        arrays = {column: np.asarray(value[column]) for column in value.colnames}
                    for part, array in arrays.items():
                        out[f"{key} {part}"] = array.tobytes()
        return out


@pytest.fixture(scope="module")
def runs(repository, where) -> Runs:
    return Runs(repository, where)


@pytest.fixture(scope="module")
def undisturbed(runs) -> dict[str, bytes]:
    ((end,),) = runs([runs.one("calm")])
    assert end["status"] == 0, end["log"][-3000:]
    result = runs.bytes_of("calm")
    assert len({key.split(" ")[0] for key in result}) == 4 and len(result) > 100
    return result


@pytest.mark.parametrize(
    "kills", [SOME_KILLS, pytest.param(ALL_KILLS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_killed_runs_go_on(runs, undisturbed, kills):
    """kill -9 at stages of a quantum: before, within and after the writing of its datasets."""
    names = [f"killed{k}of{len(kills)}" for k in range(len(kills))]
    # The first steps end where they are killed; what can be read then has to be whole.
    ends = runs(*[[runs.one(name, fault=fault)] for name, fault in zip(names, kills, strict=True)])
    for (end,), fault in zip(ends, kills, strict=True):
        assert end["status"] == -9, (fault, end["log"][-2000:])
    for name in names:
        for key, value in runs.bytes_of(name).items():
            assert value == undisturbed[key], (name, key)
    ends = runs(*[[runs.one(name, *GO_ON)] for name in names])
    for (end,), fault, name in zip(ends, kills, names, strict=True):
        assert end["status"] == 0, (fault, end["log"][-3000:])
        assert runs.bytes_of(name) == undisturbed, fault
    # What was being written is nobody's dataset: it has a name that no other is written to.
    left = [path.name for path in runs.repository.root.rglob("*") if ".tmp." in path.name]
    with Butler.from_config(str(runs.repository.root)) as butler:
        known = {
            butler.getURI(ref).basename()
            for name in (*TABLES, RESIDUAL)
            for ref in butler.query_datasets(name, collections="*", find_first=False)
        }
    assert left and len(known) >= 5 and not known & set(left)


@pytest.mark.parametrize("dataset", [pytest.param(TABLES[0], marks=pytest.mark.slow), RESIDUAL])
def test_a_full_disk_fails_the_quantum_and_leaves_nothing_behind(runs, undisturbed, dataset):
    name = f"full_{dataset}"
    fault = {"point": "full", "dataset": dataset, "bytes": 2000}
    (first,), (second,) = runs([runs.one(name, fault=fault)], [runs.one(name, *GO_ON)])
    assert first["status"] == 1 and "File too large" in first["log"], first["log"][-3000:]
    assert second["status"] == 0, second["log"][-3000:]
    assert runs.bytes_of(name) == undisturbed


def test_a_repository_that_may_not_be_written_to_is_refused(runs, undisturbed, where):
    root = where / "closed"
    shutil.copytree(runs.repository.root, root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    subprocess.run(["chmod", "-R", "a-w", str(root)], check=True)
    user = {"user": 65534} if os.getuid() == 0 else {}
    # Permissions do not bind the superuser, and another user has to get at the code.
    code = (Path(sys.prefix).resolve(), Path(__file__).resolve())
    folders = [folder for path in code for folder in path.parents]
    if user and not all(folder.stat().st_mode & stat.S_IXOTH for folder in folders):
        pytest.skip("run by the superuser, in a folder that others may not enter")
    ((end,),) = runs([runs.one("closed", root=root, **user)])
    assert end["status"] not in (0, -9) and "readonly database" in end["log"], end["log"][-3000:]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    assert not any(path.stat().st_mode & stat.S_IWUSR for path in before)
    # It can be read still.
    assert runs.bytes_of("calm", root) == undisturbed


def test_two_runs_at_once_into_one_collection(runs, undisturbed):
    # Going on needs a collection to go on in.
    begun = runs.one("twice", fault={"point": "deblended"})
    _, both, (last,) = runs(
        [begun], [runs.one("twice", *GO_ON), runs.one("twice", *GO_ON)], [runs.one("twice", *GO_ON)]
    )
    # One of them may find the other's outputs in its way, and says so.
    for end in both:
        assert end["status"] == 0 or "Error" in end["log"], end["log"][-3000:]
    # Nothing may be left to do, which is an empty graph.
    assert last["status"] == 0 or "empty" in last["log"], last["log"][-3000:]
    assert runs.bytes_of("twice") == undisturbed


def test_processes_change_nothing(runs, undisturbed):
    ((end,),) = runs([runs.one("two", "-j", "2")])
    assert end["status"] == 0, end["log"][-3000:]
    assert runs.bytes_of("two") == undisturbed
