# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmarks of `bench.py` share: processes that deblend, medians and ratios, files of results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A version of the package.

    Attributes
    ----------
    label : `str`
        Its commit.
    path : `pathlib.Path`
        Where it is.
    """

    label: str
    path: Path

    @classmethod
    def of(cls, path: Path) -> Checkout:
        """Find out which commit a directory holds."""

        def git(*arguments: str) -> str:
            done = subprocess.run(
                ["git", "-C", path, *arguments], capture_output=True, text=True, check=False
            )
            return done.stdout.strip()

        label = git("rev-parse", "--short=7", "HEAD") or "no commit"
        if git("status", "--porcelain", "--", "python"):
            label += " with changes"
        return cls(label, path)


class Process:
    """A process with the code of a checkout, see `bench_worker`.

    Parameters
    ----------
    checkout : `Checkout`
        The checkout.
    network : `str`, optional
        Name or path of the network.
    threads : `int`, optional
        Threads of onnxruntime.
    settings : `dict`, optional
        Settings of the procedure.
    """

    def __init__(
        self,
        checkout: Checkout,
        network: str = "lsst_ugrizy",
        threads: int = 1,
        settings: dict[str, Any] | None = None,
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout.path / "python"), "OMP_NUM_THREADS": "1"}
        arguments = {"network": network, "threads": threads, "settings": settings or {}}
        self._process = subprocess.Popen(
            [sys.executable, HERE / "bench_worker.py", str(checkout.path), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __call__(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Have a job done, a method of `bench_worker.Worker`.

        Raises
        ------
        RuntimeError
            Raised if the process ended instead; it has said why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"job": job, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"The process for the job {job!r} ended with {self._process.wait()}.")
        return json.loads(line)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some rounds."""
    return {"median": float(np.median(values)), "least": min(values), "largest": max(values)}


def ratios(these: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Ratios of others to these, round by round: median, least and largest."""
    return spread([other / this for this, other in zip(these, others, strict=True)])


def exponent(n: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Exponent of the power law that fits times best; `None` without two sizes."""
    return float(np.polyfit(np.log(n), np.log(seconds), 1)[0]) if len(set(n)) > 1 else None


def processor() -> str:
    """Name of the machine's processor."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def command(replaced: dict[str, str]) -> str:
    """The command that is running, with paths that mean nothing elsewhere replaced."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=")
        words.append(option + equals + replaced.get(value.rstrip("/"), value))
    return " ".join(["OMP_NUM_THREADS=1 python benchmarks/bench.py", *map(shlex.quote, words)])


def save(
    directory: Path, name: str, line: str, this: Checkout, other: Checkout | None, results: dict[str, Any]
) -> Path:
    """Write the results of a benchmark, with what they were taken with.

    Parameters
    ----------
    directory : `pathlib.Path`
        Directory of the results, made.
    name : `str`
        Name of the benchmark.
    line : `str`
        The command.
    this, other : `Checkout`
        The checkouts that were compared.
    results : `dict`
        The results; what is not finite becomes null.

    Returns
    -------
    path : `pathlib.Path`
        The file.
    """
    document = {
        "benchmark": name,
        "command": line,
        "processor": processor(),
        "cores": os.cpu_count(),
        "commit": this.label,
        "against": other.label if other else None,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "numba", "onnxruntime")},
        },
        "results": results,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(_plain(document), indent=1) + "\n")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
