# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measurements of two deblenders' objects side by side; the tables here are made up."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from astropy.table import Table
from lsst.meas.vaedeblend.evaluation.comparison.measured import with_measured

HEADER = ("entrant", "versus", "sample", "metric", "value", "error", "n")
KINDS = ("U", "U", "U", "U", float, float, int)
N = 12


def measurements(ids, factor: float, stretch: float) -> Table:
    """A table of one band in which fluxes and moments are larger by some factor."""
    ids = np.asarray(ids)
    table = Table({"id": ids, "base_PsfFlux_instFlux": factor * (100.0 + ids)})
    table["base_PsfFlux_flag"] = ids == 3
    table["base_SdssShape_xx"] = stretch * np.full(len(ids), 4.0)
    table["base_SdssShape_yy"] = np.full(len(ids), 4.0)
    table["base_SdssShape_xy"] = np.zeros(len(ids))
    table["base_SdssShape_flag"] = np.zeros(len(ids), bool)
    return table


@pytest.fixture
def comparison():
    order = np.arange(N)
    pair = SimpleNamespace(
        first=0,
        second=1,
        columns={"first": order, "second": order[::-1], "snr": np.where(order < N - 1, 50.0, 1.0)},
    )
    return SimpleNamespace(
        names=["one", "two"],
        bands=("r", "i"),
        pairs=[pair],
        objects=[{"id": order}, {"id": 100 + order[::-1]}],
        metrics_table=lambda: Table(rows=[("one", "", "", "n", 1.0, 0.0, 1)], names=HEADER, dtype=KINDS),
    )


def test_pairs_are_compared_by_their_ids(comparison):
    # The second table is in another order, and has no row of one object and a band more.
    ids = np.arange(N)
    second = measurements(ids[ids != 5][::-1], 1.5, 3.0)
    second["id"] += 100
    tables = {"one": {"r": measurements(ids, 1.0, 1.0)}, "two": {"r": second, "i": second}}
    metrics = with_measured(comparison, tables, "one", "two")
    assert metrics["metric"][0] == "n" and tuple(metrics.colnames) == HEADER
    value = {row["metric"]: (row["value"], row["n"]) for row in metrics}
    # Eleven are bright; one is flagged, one lacks.
    assert value["base_PsfFlux_instFlux in r, ratio - 1, median"] == (pytest.approx(0.5), 9)
    assert value["base_PsfFlux_instFlux in r, ratio - 1, nmad"][0] == pytest.approx(0, abs=1e-12)
    assert value["base_SdssShape e1 in r, difference, median"] == (pytest.approx(0.5), 10)
    assert value["base_SdssShape size in r, ratio - 1, median"][0] == pytest.approx(np.sqrt(2) - 1)
    assert not any(" in i," in name for name in value)
    assert not any("GaussianFlux" in name for name in value)


def test_without_measurements_the_numbers_are_those_of_the_models(comparison):
    metrics = with_measured(comparison, {"one": {}, "two": {}}, "one", "two")
    assert list(metrics["metric"]) == ["n"]
