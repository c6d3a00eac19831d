# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The notebook of doc/tutorial, run as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "doc" / "tutorial" / "tutorial.ipynb"


def test_the_notebook_is_kept_without_results():
    for cell in nbformat.read(PATH, as_version=4).cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@pytest.fixture(scope="module")
def outputs():
    """What each cell that computes printed, and its pictures."""
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def printed(outputs) -> str:
    return "".join(out.text for cell in outputs for out in cell if "text" in out)


def test_the_tutorial_finds_most_galaxies_and_what_it_injects(outputs):
    text = printed(outputs)
    found = re.findall(r"found (\d+) of (\d+); objects that match no galaxy: (\d+)", text)
    assert len(found) == 3 and found[0] == found[2]  # this deblender twice, sep between them
    n, of, false = map(int, found[0])
    assert n > 0.75 * of > 20 and false < 0.2 * n
    back, of = map(int, re.search(r"(\d+) of (\d+) come back", text).groups())
    assert back >= of - 1 == 5


def test_the_tutorial_draws_its_figures(outputs):
    pictures = [
        len(out.data["image/png"]) for cell in outputs for out in cell if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == 4 and min(pictures) > 10_000
