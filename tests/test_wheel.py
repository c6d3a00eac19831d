# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wheel: small enough to publish, and with everything that an installed user needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from lsst.meas.vaedeblend.ground.files import shipped_files

pytest.importorskip("setuptools_scm", reason="needs setuptools-scm, which builds the wheel")

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "lsst/meas/vaedeblend"
NETWORKS = ("lsst_ugrizy", "hsc_grizy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy of the sources, without what the build leaves among them."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "COPYRIGHT"):
        shutil.copy(REPOSITORY / name, sources)
    left = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "python", sources / "python", ignore=left)
    # Building is setuptools' business, and done with what is installed: nothing is fetched.
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 15e6


def test_the_wheel_has_what_users_need(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for network in NETWORKS:
        kinds = ("", "_decoder", "_render", "_linearise")
        assert {f"{PACKAGE}/artefacts/{network}{kind}.onnx" for kind in kinds} <= names
        assert f"{PACKAGE}/artefacts/{network}.md" in names
    assert len(shipped_files()) > 10
    assert {f"{PACKAGE}/{name}" for name in shipped_files()} <= names
    modules = (REPOSITORY / "python").joinpath(PACKAGE).rglob("*.py")
    assert {str(path.relative_to(REPOSITORY / "python")) for path in modules} <= names
    assert f"{PACKAGE}/py.typed" in names
    assert {Path(n).name for n in names if "/licenses/" in n} == {"LICENSE", "COPYRIGHT"}


def test_the_wheel_has_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [n for n in names if not n.startswith((f"{PACKAGE}/", "meas_vaedeblend-"))]
    assert not [n for n in names if "arcelin2020" in n and "/config/" not in n]
    assert not [n for n in names if "__pycache__" in n]
