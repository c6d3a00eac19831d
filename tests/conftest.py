# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lsst.meas.vaedeblend.network import Network
from synthetic import write_network


@pytest.fixture(scope="session")
def network_path(tmp_path_factory) -> Path:
    """A synthetic deblender in gri with 64 pixel cutouts; its decoder is beside it."""
    return write_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="session")
def network(network_path) -> Network:
    """The same, loaded."""
    return Network.load(network_path, threads=1)


@pytest.fixture(scope="session")
def gaussian_path() -> Path:
    """A small deblender in gri that draws Gaussians and can be fitted to pixels; see
    synthetic_gaussians.py."""
    return Path(__file__).parent / "data" / "gaussians.onnx"


@pytest.fixture(scope="session")
def gaussian_network(gaussian_path) -> Network:
    """The same, loaded."""
    return Network.load(gaussian_path, threads=1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The benchmark data, which a user may not have: beside the repository, or $VAEDEBLEND_SHARED."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("VAEDEBLEND_SHARED", beside))
    if not (path / "data").is_dir():
        pytest.skip("needs the benchmark data: a folder shared/ beside the repository, or $VAEDEBLEND_SHARED")
    return path
