# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.ground.files import shipped_files
from lsst.meas.vaedeblend.network import NetworkError, _files, read_metadata
from synthetic import metadata, write_network, write_tampered
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
    monkeypatch.setattr(_files, "_other_folders", lambda: ())
    result = runner.invoke(main, ["info"])
    assert result.exit_code == 0
    assert "CPUExecutionProvider" in result.output
    assert "\nsynthetic\n  bands        gri\n  pixel scale  0.2 arcsec" in result.output
    assert read_metadata(network_path).weights_sha256 in result.output
    # A file that is not sound is named as such, and does not hide the others.
    assert "\ntampered\n  unusable" in result.output and "the graph was altered" in result.output


def test_info_without_networks(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_ARTEFACTS", tmp_path)
    monkeypatch.setattr(_files, "_other_folders", lambda: ())
    result = runner.invoke(main, ["info"])
    assert result.exit_code == 0 and "No network ships" in result.output


def test_files_that_ship_are_found(runner):
    result = runner.invoke(main, ["path", "pipelines/deblend.yaml"])
    assert result.exit_code == 0 and "VaeDeblendTask" in Path(result.output.strip()).read_text()
    folder = Path(runner.invoke(main, ["path"]).output.strip())
    assert (folder / "bps" / "deblend.yaml").is_file() and (folder / "config" / "gpu.py").is_file()
    for name in ("pipelines/none.yaml", "network", "config/../artefacts"):
        result = runner.invoke(main, ["path", name])
        assert result.exit_code == 1 and "pipelines/LSSTCam/DRP-vaedeblend.yaml" in result.output
    assert all((folder / name).is_file() for name in shipped_files())


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
    assert result.exit_code == 1 and "out of range" in result.output or "valid range" in result.output
    for wrong in ("x", "", "("):
        result = runner.invoke(main, [*command, f"refinementSteps={wrong}"])
        assert result.exit_code == 1 and f"{wrong!r} is no value" in result.output


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
        assert set(data.files) == {"model", "flux", "flux_err", "seconds"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "0", "0"], "0 is not in the range x>=1"),
        (["--galaxies", "0"], "0 is not in the range x>=1"),
        (["--network", "hsc_grizy", "--survey", "LSST"], "0.168 arcsec wide, the data's 0.2 arcsec"),
        (["--survey", "DES"], "Unknown survey 'DES'; known are Euclid_NISP, Euclid_VIS, HSC, LSST"),
    ],
)
def test_a_demonstration_that_cannot_be(runner, tmp_path, arguments, message):
    result = runner.invoke(main, ["demo", str(tmp_path / "out"), *arguments])
    assert result.exit_code in (1, 2) and message in result.output
    assert isinstance(result.exception, SystemExit) and not (tmp_path / "out").exists()


def test_a_demonstration_with_a_prior(runner, tmp_path):
    path = write_network(tmp_path, metadata(name="n_prior", training={"samples": {"prior": 9}}))
    result = runner.invoke(main, ["demo", str(tmp_path / "out"), "--network", str(path)])
    assert result.exit_code == 1 and "The deblender that belongs to it is n." in result.output


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "train"), ("galsim", "evaluate"), ("onnxruntime", "cpu")]
)
def test_what_is_not_installed_is_named_with_its_extra(tmp_path, module, extra):
    commands = {
        "torch": ["train", "config.py", ".", "run"],
        "galsim": ["demo", "out"],
        "onnxruntime": ["info"],
    }
    (tmp_path / "config.py").write_text("")
    script = f"""
import sys
sys.modules[{module!r}] = None
from lsst.meas.vaedeblend.cli import main
main({commands[module]!r})
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert process.returncode == 1
    assert process.stderr == f"Error: {module} is not installed: pip install 'meas_vaedeblend[{extra}]'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nconfig.nonsense = 1\n", r"bad.py, line 2: AttributeError: .* has no attribute nonsense"),
        ("config.survey = (\n", r"bad.py: SyntaxError: '\(' was never closed"),
        ("import no_such_module\n", r"bad.py, line 1: ModuleNotFoundError"),
        ("config.prior.samples = 'many'\n", r"bad.py, line 1: FieldValidationError"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named_with_the_line(runner, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    result = runner.invoke(main, ["simulate", str(tmp_path / "bad.py"), str(tmp_path / "data")])
    assert result.exit_code == 1 and re.search(message, result.output), result.output
    assert isinstance(result.exception, SystemExit)


def test_first_weights_are_looked_for_before_the_first_step(runner, tmp_path, monkeypatch):
    from lsst.meas.vaedeblend.training import fit

    called = []
    monkeypatch.setattr(fit, "fit_step", lambda *args, **keywords: called.append(args))
    (tmp_path / "config.py").write_text("")
    arguments = ["train", str(tmp_path / "config.py"), str(tmp_path), str(tmp_path / "run"), "--initial"]
    result = runner.invoke(main, [*arguments, "nowhere.ckpt"])
    assert result.exit_code == 1 and "No network 'nowhere.ckpt'" in result.output and not called
    (tmp_path / "weights.ckpt").write_bytes(b"0")
    assert runner.invoke(main, [*arguments, str(tmp_path / "weights.ckpt")]).exit_code == 0
    assert len(called) == 2


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c 'from lsst.meas.vaedeblend.cli import main; main()' info | head -1"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert process.stdout.startswith("onnxruntime") and process.stderr == ""


def test_errors_of_lightning_are_one_line(runner, tmp_path, monkeypatch):
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lsst.meas.vaedeblend.training import fit

    def fail(*args, **keywords):
        raise MisconfigurationException("No supported gpu backend found!")

    monkeypatch.setattr(fit, "fit_step", fail)
    (tmp_path / "config.py").write_text("")
    arguments = ["train", str(tmp_path / "config.py"), str(tmp_path), str(tmp_path / "run")]
    result = runner.invoke(main, [*arguments, "--accelerator", "gpu"])
    assert result.exit_code == 1 and result.output == "Error: No supported gpu backend found!\n"


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
