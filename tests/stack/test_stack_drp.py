# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The data release pipelines with this deblender in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import LabelSpecifier, Pipeline

pytestmark = pytest.mark.stack

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"

V2 = {
    "merge": "mergeObjectDetection",
    "deblend": "deblendCoaddFootprints",
    "measure": "measureObjectUnforced",
    "forced": "measureObjectForced",
    "objects": "object_deblend",
    "models": "object_scarlet_models",
    "merged": "object_detection_merged",
    "schema": "object_deblend_schema",
    "deconvolved": "deconvolved_deep_coadd",
    "network": "lsst_ugrizy",
}
V1 = {
    "merge": "mergeDetections",
    "deblend": "deblend",
    "measure": "measure",
    "forced": "forcedPhotCoadd",
    "objects": "deepCoadd_deblendedCatalog",
    "models": "deepCoadd_scarletModelData",
    "merged": "deepCoadd_mergeDet",
    "schema": "deepCoadd_deblendedFlux_schema",
    "deconvolved": "deconvolved_deep_coadd",
    "network": "hsc_grizy",
}
CASES = [
    ("LSSTCam", "lsst.obs.lsst", V2, True),
    ("LSSTComCam", "lsst.obs.lsst", V2, False),
    ("HSC", "lsst.obs.subaru", V1, False),
]


@pytest.fixture(autouse=True)
def directories():
    needed = ("DRP_PIPE_DIR", "ANALYSIS_TOOLS_DIR", "MEAS_EXTENSIONS_MULTIPROFIT_DIR", "PIPE_TASKS_DIR")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} in the environment, as EUPS sets them")


def usable(pipeline: Pipeline) -> set[str]:
    """Labels of the tasks that can be configured: an environment may lack packages or plugins of DRP, or
    have one that is of another week than ``drp_pipe`` and does not know a field.
    """
    found = set()
    for label in pipeline.task_labels:
        try:
            pipeline.subsetFromLabels(LabelSpecifier(labels={label})).to_graph()
        except (ImportError, AttributeError, FieldValidationError):
            continue
        found.add(label)
    return found


@pytest.mark.parametrize(("instrument", "package", "names", "cells"), CASES, ids=[c[0] for c in CASES])
def test_every_connection_is_resolved(instrument, package, names, cells):
    pytest.importorskip(package)
    pipeline = Pipeline.from_uri(str(PIPELINES / instrument / "DRP-vaedeblend.yaml"))
    labels = usable(pipeline)
    print(f"{instrument}: {len(labels)} of {len(list(pipeline.task_labels))} tasks")
    assert {names[key] for key in ("merge", "deblend", "measure", "forced")} <= labels
    assert "deconvolve" not in pipeline.task_labels
    subset = pipeline.subsetFromLabels(LabelSpecifier(labels=labels))
    # Making the graph checks contracts and storage classes, and reads the configuration of each task.
    graph = subset.to_graph()
    graph.sort()
    node = graph.tasks[names["deblend"]]
    assert node.task_class_name.endswith("VaeDeblendFootprintsTask")
    assert node.config.multibandDeblend.network == names["network"]
    assert node.config.useCellCoadds == cells
    assert graph.producer_of(names["objects"]).label == names["deblend"]
    assert graph.producer_of(names["merged"]).label == names["merge"]
    readers = {task.label for task in graph.consumers_of(names["models"])}
    assert {names["measure"], names["forced"]} <= readers
    assert names["measure"] in {task.label for task in graph.consumers_of(names["objects"])}
    assert names["deconvolved"] not in graph.dataset_types
    for key in ("measure", "forced"):
        assert "ext_vaedeblend_Posterior" in graph.tasks[names[key]].config.measurement.plugins.names
    # All that the task reads, but for coadds from steps before, comes from tasks of the pipeline.
    for edge in node.inputs.values():
        assert graph.producer_of(edge.parent_dataset_type_name) is not None, edge.connection_name


@pytest.mark.parametrize(("instrument", "package", "names", "cells"), CASES, ids=[c[0] for c in CASES])
def test_pipetask_builds_it(instrument, package, names, cells):
    pytest.importorskip(package)
    path = PIPELINES / instrument / "DRP-vaedeblend.yaml"
    labels = ",".join(names[key] for key in ("merge", "deblend", "measure", "forced"))
    code = "from lsst.ctrl.mpexec.cli.pipetask import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", code, "build", "-p", f"{path}#{labels}", "--show", "pipeline-graph"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert names["deblend"] in process.stdout and names["objects"] in process.stdout
