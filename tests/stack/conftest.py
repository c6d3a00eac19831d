# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of this folder are skipped, with one line, where the stack is missing: they import it on top."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import pytest

HAS_STACK = importlib.util.find_spec("lsst.afw") is not None


class _Absent(pytest.Module):
    """A module that cannot be imported."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("needs the LSST stack: lsst.afw is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Replace the modules of this folder without the stack."""
    return None if HAS_STACK else _Absent.from_parent(parent, path=module_path)
