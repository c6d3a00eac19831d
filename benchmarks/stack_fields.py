# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Crowded fields with truth through the stack's detection, scarlet or this deblender, and its measurement.

usage: python benchmarks/stack_fields.py REPO FIELDS [FIELDS ...] [--out results.json]

Runs in the LSST stack. Each field of the directories FIELDS, in the format that `vaedeblend evaluate fields`
reads, becomes a patch of the new repository REPO. Detection and merging are those of the stack; scarlet, this
deblender and this deblender without new peaks work on the same detections, and the stack's measurement,
as it is, on what they make. The truth of each galaxy is the same measurement on its noiseless image alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lsst.afw.detection as afwDetection
import lsst.afw.geom as afwGeom
import numpy as np
from lsst.afw.table import SourceCatalog, SourceTable
from lsst.daf.butler import Butler
from lsst.geom import Box2I, Extent2I, Point2D, Point2I, SpherePoint, arcseconds, degrees
from lsst.meas.base import SingleFrameMeasurementTask
from lsst.meas.vaedeblend.evaluation.metrics import MATCH_RADIUS, match
from lsst.meas.vaedeblend.ground.statistics import nmad
from lsst.pipe.tasks.multiBand import MeasureMergedCoaddSourcesTask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "stack"))
from stack_repo import DETECT, INPUTS, MEASURE, SCARLET, VAE, StackRepository, make_exposure  # noqa: E402

METHODS = {
    "scarlet": SCARLET,
    "default": VAE,
    "findNewPeaks=False": VAE + "    config:\n      multibandDeblend.deblend.findNewPeaks: false\n",
}
LABELS = ("deconvolve", "deblend")
# Colours and sizes are compared in these; others need not be measured.
MEASURED = ("g", "r")
MEASUREMENT = MEASURE.split("  mergeMeasurements:")[0].format(measure="python: ''")
APERTURE = "base_CircularApertureFlux_9_0_instFlux"
PSF = "base_PsfFlux_instFlux"
PLUGINS = ("base_SdssCentroid", "base_SdssShape", "base_PsfFlux", "base_CircularApertureFlux")
GAP = 32
"""Pixels between the stamps of the truth, more than half of the largest aperture or PSF."""

Field = Mapping[str, np.ndarray]


def put_field(repository: StackRepository, patch: int, field: Field) -> None:
    """Store a field's images as the coadds of a patch."""
    with Butler.from_config(str(repository.root), run=INPUTS) as butler:
        for b, band in enumerate(field["bands"]):
            exposure = make_exposure(
                field["image"][b],
                field["variance"][b],
                field["psf"][b],
                repository.wcs,
                repository.corner(patch),
                str(band),
            )
            butler.put(exposure, "deepCoadd", repository.data_id(patch, band=str(band)))


def measurement_task() -> tuple[SingleFrameMeasurementTask, Any]:
    """Make the pipelines' measurement with the plugins that are compared, and its schema."""
    config = MeasureMergedCoaddSourcesTask.ConfigClass().measurement.value
    config.plugins.names = list(PLUGINS)
    config.undeblended.names = []
    for slot in ("gaussianFlux", "calibFlux", "modelFlux", "psfShape"):
        setattr(config.slots, slot, None)
    # Every galaxy is alone.
    config.doReplaceWithNoise = False
    schema = SourceTable.makeMinimalSchema()
    return SingleFrameMeasurementTask(schema=schema, config=config), schema


def measure_truth(field: Field, band: str) -> dict[str, np.ndarray]:
    """Measure each galaxy's noiseless image alone, one row of an image for each of them."""
    b = list(field["bands"]).index(band)
    stamps = field["stamp"][:, b]
    n, height, width = stamps.shape
    step = width + GAP
    image = np.zeros((height + 2 * GAP, n * step + GAP), np.float32)
    for i, stamp in enumerate(stamps):
        image[GAP : GAP + height, GAP + i * step : GAP + i * step + width] = stamp
    variance = np.full(image.shape, np.median(field["variance"][b]), np.float32)
    wcs = afwGeom.makeSkyWcs(
        Point2D(0, 0), SpherePoint(150, 2, degrees), afwGeom.makeCdMatrix(scale=0.2 * arcseconds)
    )
    exposure = make_exposure(image, variance, field["psf"][b], wcs, (0, 0), band)
    task, schema = measurement_task()
    catalog = SourceCatalog(SourceTable.make(schema))
    for i in range(n):
        box = Box2I(Point2I(GAP + i * step, GAP), Extent2I(width, height))
        footprint = afwDetection.Footprint(afwGeom.SpanSet(box))
        x = field["x"][i] - field["stamp_x0"][i] + box.getMinX()
        y = field["y"][i] - field["stamp_y0"][i] + box.getMinY()
        footprint.addPeak(float(x), float(y), float(image[round(y), round(x)]))
        catalog.addNew().setFootprint(footprint)
    task.run(catalog, exposure, exposureId=1)
    return columns(catalog)


def columns(catalog: Any) -> dict[str, np.ndarray]:
    """Take what is compared out of a catalogue of measurements."""
    xx, yy, xy = (np.array(catalog[f"base_SdssShape_{name}"], float) for name in ("xx", "yy", "xy"))
    e = np.stack([xx - yy, 2 * xy], axis=1) / (xx + yy)[:, None]
    e[np.array(catalog["base_SdssShape_flag"])] = np.nan
    return {"aperture": np.array(catalog[APERTURE]), "psf": np.array(catalog[PSF]), "e": e}


def measure_method(repository: StackRepository, run: str, patch: int, field: Field) -> dict[str, Any]:
    """Match the objects of a patch with the true galaxies and take their measurements."""
    catalogs = {b: repository.get("deepCoadd_meas", run, patch, band=b) for b in MEASURED}
    merged = repository.get("deepCoadd_mergeDet", run, patch)
    several = {record.getId() for record in merged if len(record.getFootprint().peaks) > 1}
    y0, x0 = repository.corner(patch)
    catalog = catalogs["r"]
    real = np.flatnonzero(~np.array(catalog["merge_peak_sky"]))
    xy = np.stack([np.array(catalog[f"deblend_peak_center_{axis}"], float) for axis in "xy"], axis=1)[real]
    truth = np.stack([field["x"] + x0, field["y"] + y0], axis=1)
    mine, true = match(xy, truth, MATCH_RADIUS)
    row = np.full(len(truth), -1)
    row[true] = real[mine]
    top = np.where(np.array(catalog["parent"]) != 0, catalog["parent"], catalog["id"])
    return {
        "row": row,
        "blended": np.array([r >= 0 and int(top[r]) in several for r in row]),
        "extra": len(real) - len(mine),
        "bands": {band: columns(catalog) for band, catalog in catalogs.items()},
    }


def costs(repository: StackRepository, run: str, patches: Sequence[int]) -> dict[str, float]:
    """Give the seconds that deblending took in all patches, and the largest memory of its process."""
    cpu = wall = memory = 0.0
    with Butler.from_config(str(repository.root), collections=[run]) as butler:
        for label in LABELS:
            if not butler.registry.queryDatasetTypes(f"{label}_metadata"):
                continue
            for ref in butler.registry.queryDatasets(f"{label}_metadata", collections=[run]):
                if ref.dataId["patch"] not in patches:
                    continue
                quantum = butler.get(ref)["quantum"]
                cpu += quantum["endCpuTime"] - quantum["startCpuTime"]
                ends = [datetime.fromisoformat(_last(quantum[key])) for key in ("startUtc", "endUtc")]
                wall += (ends[1] - ends[0]).total_seconds()
                memory = max(memory, quantum["endMaxResidentSetSize"])
    return {"cpu_s": cpu, "wall_s": wall, "peak_MiB": memory / 2**20}


def _last(value: Any) -> str:
    return value if isinstance(value, str) else list(value)[-1]


def gather(found: Sequence[dict[str, Any]], take: Callable[[dict[str, Any]], np.ndarray]) -> np.ndarray:
    """Join the values of all galaxies of all fields; those without an object have NaN."""
    parts = []
    for one in found:
        values = take(one["bands"])
        out = np.full((len(one["row"]), *values.shape[1:]), np.nan)
        has = one["row"] >= 0
        out[has] = values[one["row"][has]]
        parts.append(out)
    return np.concatenate(parts)


def colour(bands: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return -2.5 * np.log10(bands["g"]["psf"] / bands["r"]["psf"])


QUANTITIES: dict[str, Callable[[dict[str, Any]], np.ndarray]] = {
    "aperture": lambda bands: bands["r"]["aperture"],
    "e": lambda bands: bands["r"]["e"],
    "colour": colour,
}


def score(
    found: Mapping[str, Sequence[dict[str, Any]]], truths: Sequence[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Make the rows of the table; errors are those of the galaxies that all deblenders have."""
    true = {key: np.concatenate([take(t) for t in truths]) for key, take in QUANTITIES.items()}
    values = {
        name: {key: gather(own, take) for key, take in QUANTITIES.items()} for name, own in found.items()
    }
    has = {name: np.concatenate([one["row"] >= 0 for one in own]) for name, own in found.items()}
    common = np.all(list(has.values()), axis=0)
    first = next(iter(found.values()))
    blended = common & np.concatenate([one["blended"] for one in first])
    table: dict[str, dict[str, float]] = {}
    # One sample for all: an object that one of them failed to measure is left out everywhere.
    good = {
        key: np.all(
            [np.isfinite(v[key] - true[key]).reshape(len(common), -1).all(1) for v in values.values()], 0
        )
        for key in QUANTITIES
    }
    for name, own in found.items():
        value = values[name]
        error = value["aperture"] / true["aperture"] - 1

        def mean(errors: np.ndarray, which: np.ndarray) -> float:
            return float(np.abs(errors[which]).mean())

        e = (value["e"] - true["e"])[common & good["e"]]
        alone = has[name] & np.isfinite(error)
        table[name] = {
            "galaxies": len(common),
            "matched": int(has[name].sum()),
            "objects that match none": int(sum(one["extra"] for one in own)),
            "galaxies that all have": int(common.sum()),
            "r aperture 9 px, mean abs": mean(error, common & good["aperture"]),
            "same, NMAD": nmad(error[common & good["aperture"]]),
            "same, of all that it matched, mean abs": mean(error, alone),
            "blended galaxies that all have": int(blended.sum()),
            "r aperture 9 px of blended ones, mean abs": mean(error, blended & good["aperture"]),
            "e of SdssShape r, NMAD": nmad(e.ravel()),
            "g-r of PSF fluxes, mean abs": mean(value["colour"] - true["colour"], common & good["colour"]),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("fields", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="JSON file of the table")
    arguments = parser.parse_args()
    paths = [path for folder in arguments.fields for path in sorted(folder.glob("field_*.npz"))]
    fields = [dict(np.load(path)) for path in paths]
    repository = StackRepository(arguments.repository, size=fields[0]["image"].shape[1])
    patches = range(len(fields))
    for patch, field in enumerate(fields):
        put_field(repository, patch, field)
    repository.run(DETECT, [], "detections", patches)
    truths = [{band: measure_truth(field, band) for band in MEASURED} for field in fields]
    found, spent = {}, {}
    for name, tasks in METHODS.items():
        repository.run(tasks, ["detections"], name, patches)
        spent[name] = costs(repository, name, patches)
        measured = f"{name}_measured"
        repository.run(MEASUREMENT, [name, "detections"], measured, patches, bands=MEASURED)
        found[name] = [measure_method(repository, measured, p, f) for p, f in enumerate(fields)]
    table = score(found, truths)
    for name, row in table.items():
        row |= spent[name]
    for key in next(iter(table.values())):
        print(f"{key:45s}" + "".join(f"{row[key]:12.4g}" for row in table.values()))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
