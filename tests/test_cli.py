# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.network import NetworkError, _files, read_metadata
from synthetic import write_tampered
from test_fields import FLUX, X, Y, write_field


@pytest.fixture
def runner():
    return CliRunner()


def test_help_lists_the_commands(runner):
    result = runner.invoke(main, ["--help"])
    assert result.exit_code == 0
    for command in ("info", "demo", "evaluate"):
        assert command in result.output
    nested = runner.invoke(main, ["evaluate", "-h"])
    assert "fields" in nested.output and "hsc" in nested.output


def test_info_describes_networks_and_providers(runner, network_path, tmp_path, monkeypatch):
    for path in network_path.parent.glob("*.onnx"):
        shutil.copy(path, tmp_path)
    write_tampered(tmp_path / network_path.name)
    monkeypatch.setattr(_files, "_ARTEFACTS", tmp_path)
    result = runner.invoke(main, ["info"])
    assert result.exit_code == 0
    assert "CPUExecutionProvider" in result.output
    assert "\nsynthetic\n  bands        gri\n  pixel scale  0.2 arcsec" in result.output
    assert read_metadata(network_path).weights_sha256 in result.output
    # A file that is not sound is named as such, and does not hide the others.
    assert "\ntampered\n  unusable" in result.output and "the graph was altered" in result.output


def test_info_without_networks(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_ARTEFACTS", tmp_path)
    result = runner.invoke(main, ["info"])
    assert result.exit_code == 0 and "No network ships" in result.output


HEAVY = ("torch", "lightning", "galsim", "lsst.afw", "lsst.daf.butler", "matplotlib")


@pytest.mark.parametrize("code", ["import lsst.meas.vaedeblend", "import lsst.meas.vaedeblend.cli"])
def test_light_imports(code):
    script = f"import sys; {code}; print([m for m in {HEAVY!r} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_info_needs_no_torch():
    script = (
        "import sys; sys.argv = ['vaedeblend', 'info']; sys.modules['torch'] = None\n"
        "from lsst.meas.vaedeblend.cli import main\n"
        "main()"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "onnxruntime" in process.stdout


def test_the_runtime_never_imports_torch_or_afw():
    script = (
        "import sys, lsst.meas.vaedeblend.tasks\n"
        "print([m for m in ('torch', 'lightning', 'galsim', 'onnx', 'lsst.afw') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_settings_of_the_procedure(runner, network_path, tmp_path):
    options = ["--network", str(network_path), "-c"]
    command = ["evaluate", "fields", str(tmp_path), str(tmp_path / "out"), *options]
    result = runner.invoke(main, [*command, "no_such=1"])
    assert result.exit_code == 1 and "'no_such'" in result.output and "refinementSteps" in result.output
    result = runner.invoke(main, [*command, "refinementSteps=-1"])
    assert result.exit_code == 1 and "refinementSteps" in result.output


def test_evaluate_fields(runner, network_path, tmp_path):
    write_field(tmp_path / "field_00.npz", X, Y, FLUX)
    out = tmp_path / "out"
    arguments = ["evaluate", "fields", str(tmp_path), str(out), "--detect", "--network", str(network_path)]
    result = runner.invoke(main, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mode"] == "detect" and summary["n_true"] == 4
    printed = json.loads(result.output[result.output.index("{") :])
    assert printed == {k: v for k, v in summary.items() if k != "fields"}
    with np.load(out / "field_00.npz") as data:
        assert set(data.files) == {"model", "seconds"}


def test_errors_are_one_line(runner, tmp_path, network_path):
    result = runner.invoke(main, ["evaluate", "fields", str(tmp_path), str(tmp_path / "out")])
    assert result.exit_code == 1 and result.output.startswith("Error: No field_*.npz in ")
    result = runner.invoke(main, ["demo", str(tmp_path / "out"), "--network", "nonsense"])
    assert result.exit_code == 1 and "No network 'nonsense'" in result.output
    assert "Traceback" not in result.output
    # Asked for, the details are there.
    result = runner.invoke(main, ["-v", "demo", str(tmp_path / "out"), "--network", "nonsense"])
    assert isinstance(result.exception, NetworkError)
    result = runner.invoke(main, ["evaluate", "hsc", str(tmp_path / "none"), str(tmp_path / "out")])
    assert result.exit_code == 2 and "does not exist" in result.output
