# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Simulated coadds through detection, this deblender or scarlet's, and the stack's measurement tasks."""

from __future__ import annotations

import dataclasses
import zipfile

import numpy as np
import pytest
from lsst.afw.table import IdFactory, SourceCatalog, SourceTable
from lsst.daf.butler import Butler
from lsst.geom import Point2I
from lsst.meas.base import ForcedMeasurementTask, SingleFrameMeasurementTask
from lsst.meas.extensions.scarlet.io import updateCatalogFootprints
from lsst.meas.vaedeblend.adapters import scarlet_file
from lsst.meas.vaedeblend.adapters.afw_catalog import copy_mapper, posterior_column
from lsst.meas.vaedeblend.adapters.butler_repo import CoaddRepository, PatchLayout
from lsst.meas.vaedeblend.simulation.patch import simulate_patch
from lsst.meas.vaedeblend.tasks.footprints import VaeDeblendFootprintsTask
from stack_repo import (
    BANDS,
    DETECT,
    MEASURE,
    PLUGIN,
    RETARGETED,
    SCARLET,
    SIZE,
    VAE,
    StackRepository,
)

pytestmark = pytest.mark.stack

CROWDED, SINGLE, EMPTY, SPARSE = 4, 0, 1, 2
NETWORK = "lsst_ugrizy"
PLUGINS = (
    "base_SdssShape",
    "base_PsfFlux",
    "base_GaussianFlux",
    "base_CircularApertureFlux",
    "base_SdssCentroid",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> StackRepository:
    """Coadds of four patches, with their detections."""
    repository = StackRepository(tmp_path_factory.mktemp("stack") / "repo")
    options = dict(cells=(1, 1), cell_size=SIZE)
    crowded = simulate_patch(3, n_galaxies=70, **options)
    repository.put_patch(CROWDED, crowded)
    one = simulate_patch(4, n_galaxies=1, mag_range=(21.0, 22.0), **options)
    repository.put_patch(SINGLE, one)
    # Noise alone: the mean of the image is 0, so that the variance is the sky's.
    noise = np.random.default_rng(5).normal(size=one.image.shape) * np.sqrt(
        np.median(one.variance, axis=(1, 2))[:, None, None]
    )
    flat = np.ones(one.image.shape) * np.median(one.variance, axis=(1, 2))[:, None, None]
    empty = dataclasses.replace(one, image=noise.astype(np.float32), variance=flat.astype(np.float32))
    repository.put_patch(EMPTY, empty)
    repository.put_patch(
        SPARSE, simulate_patch(6, n_galaxies=40, clustered=0.1, mag_range=(19.0, 25.0), **options)
    )
    repository.run(DETECT, [], "detections", [CROWDED, SINGLE, EMPTY, SPARSE])
    return repository


@pytest.fixture(scope="module")
def deblended(repository) -> StackRepository:
    """The same, with all patches deblended and measured."""
    repository.run(
        VAE + MEASURE.format(measure=PLUGIN), ["detections"], "vae", [CROWDED, SINGLE, EMPTY, SPARSE]
    )
    return repository


@pytest.fixture(scope="module")
def with_scarlet(deblended) -> StackRepository:
    """The same, with the crowded patch deblended by scarlet as well."""
    deblended.run(SCARLET + MEASURE.format(measure="python: ''"), ["detections"], "scarlet", [CROWDED])
    return deblended


@pytest.fixture(scope="module")
def objects(deblended):
    return deblended.get("deepCoadd_deblendedCatalog", "vae", CROWDED)


@pytest.fixture(scope="module")
def merged(repository):
    return repository.get("deepCoadd_mergeDet", "detections", CROWDED)


@pytest.fixture(scope="module")
def parents(deblended):
    return deblended.get("object_parent_patch", "vae", CROWDED)


def test_ids_and_parents_are_consistent(objects, merged, parents, deblended):
    ids, parent = np.array(objects["id"]), np.array(objects["parent"])
    assert len(set(ids)) == len(ids) and (np.diff(ids) > 0).all()
    assert (np.diff(parent) >= 0).all() and (parent == 0).any() and (parent != 0).any()
    known = {record.getId(): record for record in merged}
    assert set(ids[parent == 0]) <= set(known) and set(parent[parent != 0]) <= set(known)
    assert ids[parent != 0].min() > max(known)
    by_id = {record.getId(): record for record in parents}
    assert list(by_id) == [record.getId() for record in merged]
    for number, record in by_id.items():
        own = parent == number
        assert record["deblend_nChild"] == own.sum()
        assert record["deblend_nPeaks"] == len(known[number].getFootprint().peaks)
        sky = known[number]["merge_footprint_sky"]
        assert record["merge_peak_sky"] == sky == record["deblend_skipped_isPseudo"]
        assert record["deblend_skipped_isolatedParent"] == (number in ids and not sky)
        assert not record["deblend_skipped"]
        if own.any():
            assert own.sum() > 1
            np.testing.assert_array_equal(objects["deblend_parentNChild"][own], own.sum())
            np.testing.assert_array_equal(objects["deblend_blendNChild"][own], own.sum())
            np.testing.assert_array_equal(objects["deblend_parentNPeaks"][own], record["deblend_nPeaks"])
            assert len(set(objects["deblend_peakId"][own])) == own.sum()
            assert 0 < record["deblend_chi2"] < 100 and record["deblend_iterations"] > 0
    isolated = parent == 0
    np.testing.assert_array_equal(objects["deblend_blendNChild"][isolated], 0)
    assert np.array(objects["merge_peak_sky"]).sum() == 10
    assert set(ids[isolated]) | set(parent) - {0} == set(known)


def test_isolated_sources_keep_their_footprints_and_children_have_none(objects, merged):
    for record in objects:
        if record.getParent():
            assert record.getFootprint() is None
        else:
            whole = merged.find(record.getId()).getFootprint()
            assert record.getFootprint().spans == whole.spans
            assert record["deblend_peak_center_x"] == whole.peaks[0].getIx()
            assert record["deblend_peakId"] == whole.peaks[0].getId()


def test_children_come_from_peaks_that_were_detected_in_some_band(objects, merged):
    for record in objects:
        if record["merge_peak_sky"]:
            continue
        assert any(record[f"merge_footprint_{band}"] for band in BANDS)
        if record.getParent():
            assert any(record[f"merge_peak_{band}"] for band in BANDS)
            peaks = {p.getId(): p for p in merged.find(record.getParent()).getFootprint().peaks}
            peak = peaks.get(record["deblend_peakId"])
            if peak is not None:
                assert (peak.getIx(), peak.getIy()) == (
                    record["deblend_peak_center_x"],
                    record["deblend_peak_center_y"],
                )


def test_bands_have_the_same_objects_and_primary_ones_are_right(deblended, objects):
    reference = deblended.get("deepCoadd_ref", "vae", CROWDED)
    np.testing.assert_array_equal(reference["id"], objects["id"])
    for band in BANDS:
        for name in ("deepCoadd_meas", "deepCoadd_forced_src"):
            catalog = deblended.get(name, "vae", CROWDED, band=band)
            np.testing.assert_array_equal(catalog["id"], objects["id"])
            np.testing.assert_array_equal(catalog["parent"], objects["parent"])
    meas = deblended.get("deepCoadd_meas", "vae", CROWDED, band="i")
    child, sky = np.array(meas["parent"]) != 0, np.array(meas["merge_peak_sky"])
    np.testing.assert_array_equal(meas["detect_fromBlend"], child)
    np.testing.assert_array_equal(meas["detect_isIsolated"], ~child)
    np.testing.assert_array_equal(meas["detect_isDeblendedModelSource"], child)
    assert np.array(meas["detect_isDeblendedSource"]).all()
    inner = np.array(meas["detect_isPatchInner"]) & np.array(meas["detect_isTractInner"])
    np.testing.assert_array_equal(meas["detect_isPrimary"], inner & ~sky)
    assert np.array(meas["detect_isPrimary"])[child].mean() > 0.9


def test_isolated_sources_measure_as_without_deblending(deblended):
    meas = deblended.get("deepCoadd_meas", "vae", SPARSE, band="i")
    flux, error = meas["base_PsfFlux_instFlux"], meas["base_PsfFlux_instFluxErr"]
    isolated = (np.array(meas["parent"]) == 0) & ~np.array(meas["merge_peak_sky"]) & (flux > 20 * error)
    assert isolated.sum() >= 5
    aperture = "base_CircularApertureFlux_6_0_instFlux"
    for name in ("base_PsfFlux_instFlux", aperture):
        ratio = np.array(meas[name] / meas[f"undeblended_{name}"])[isolated]
        np.testing.assert_allclose(ratio, 1.0, atol=0.01)


def inside(catalog, coadd, margin: int) -> np.ndarray:
    """Whether peaks keep away from a coadd's border."""
    box = coadd.getBBox().erodedBy(margin)
    x, y = np.array(catalog["deblend_peak_center_x"]), np.array(catalog["deblend_peak_center_y"])
    return (x >= box.minX) & (x <= box.maxX) & (y >= box.minY) & (y <= box.maxY)


def test_deblended_pixels_add_up_to_the_coadd(deblended, parents):
    """Children share out their parent's light and no more."""
    coadd = deblended.get("deepCoadd_calexp", "detections", CROWDED, band="i")
    catalog = attach(deblended, "vae", "i", coadd)
    for record in parents:
        family = [r for r in catalog if r.getParent() == record.getId()]
        if not family:
            continue
        spans = record.getFootprint().spans
        whole = spans.flatten(coadd.image.array, coadd.getXY0()).sum()
        noise = np.sqrt(spans.flatten(coadd.variance.array, coadd.getXY0()).sum())
        shared = sum(r.getFootprint().getImageArray().sum(dtype=float) for r in family)
        assert abs(shared - whole) < 0.02 * whole + 5 * noise
        for r in family:
            assert spans.contains(r.getFootprint().spans)


def attach(repository, collection, band, coadd):
    """Objects with the heavy footprints that measurement makes."""
    catalog = repository.get("deepCoadd_deblendedCatalog", collection, CROWDED).copy(deep=True)
    models = repository.get("deepCoadd_scarletModelData", collection, CROWDED)
    updateCatalogFootprints(models, catalog, band, imageForRedistribution=coadd)
    return catalog


def test_stored_models_render_as_the_network_made_them(deblended, objects):
    """The flux of what the file holds is the flux in the catalogue, to a thousandth.

    A measured flux may be negative, the image of a source may not: it is what measurement shares light by.
    """
    models = scarlet_file.read(deblended.uri("deepCoadd_scarletModelData", "vae", CROWDED))
    assert models.bands == BANDS and models.model_psf.shape == (15, 15)
    sources = models.sources()
    assert set(sources) == {r.getId() for r in objects if r.getParent()}
    isolated = {r.getId() for r in objects if not r.getParent() and not r["merge_peak_sky"]}
    assert set(models.isolated) == isolated
    for record in objects:
        if not record.getParent():
            continue
        image, _ = scarlet_file.render(models, sources[record.getId()])
        for b, band in enumerate(BANDS):
            flux = record[posterior_column("flux", band)]
            assert image[b].sum() == pytest.approx(max(flux, 0.0), rel=1e-3, abs=1e-3)
        assert record["deblend_nComponents"] == len(sources[record.getId()].components)


def test_the_posterior_arrives_in_measurement(deblended, objects):
    for band in BANDS:
        for name in ("deepCoadd_meas", "deepCoadd_forced_src"):
            catalog = deblended.get(name, "vae", CROWDED, band=band)
            flux = np.array(catalog["ext_vaedeblend_Posterior_instFlux"])
            expected = np.array(objects[posterior_column("flux", band)])
            np.testing.assert_array_equal(flux, expected)
            np.testing.assert_array_equal(
                catalog["ext_vaedeblend_Posterior_instFluxErr"], objects[posterior_column("fluxErr", band)]
            )
            np.testing.assert_array_equal(catalog["ext_vaedeblend_Posterior_flag"], ~np.isfinite(expected))
            np.testing.assert_array_equal(
                catalog["ext_vaedeblend_Posterior_xx"], objects[posterior_column("shape", "xx")]
            )
    sky = np.array(objects["merge_peak_sky"])
    meas = deblended.get("deepCoadd_meas", "vae", CROWDED, band="i")
    np.testing.assert_array_equal(meas["ext_vaedeblend_Posterior_flag_noModel"][sky], True)
    good = ~np.array(meas["ext_vaedeblend_Posterior_flag"]) & ~sky
    assert good.sum() > 0.9 * (~sky).sum()
    # Shapes have errors; what counts as a point source has no shape.
    point = np.array(objects[posterior_column("flag", "point_source")])
    error = np.array(meas["ext_vaedeblend_Posterior_xxErr"])
    assert (error[good & ~point] > 0).all() and np.isnan(error[good & point]).all()
    # What the posterior says agrees with a measurement on the pixels.
    bright = good & (meas["base_PsfFlux_instFlux"] > 50 * meas["base_PsfFlux_instFluxErr"])
    ratio = np.array(
        meas["ext_vaedeblend_Posterior_instFlux"] / meas["base_CircularApertureFlux_12_0_instFlux"]
    )
    assert 0.8 < np.median(ratio[bright]) < 1.25


def test_measurement_plugins_run_on_heavy_footprints(deblended, merged):
    coadd = deblended.get("deepCoadd_calexp", "detections", CROWDED, band="r")
    catalog = attach(deblended, "vae", "r", coadd)
    config = SingleFrameMeasurementTask.ConfigClass()
    config.plugins.names = [*PLUGINS, "base_SkyCoord", "base_PixelFlags"]
    config.slots.calibFlux = None
    config.slots.gaussianFlux = "base_GaussianFlux"
    before = coadd.image.array.copy()
    mapper = copy_mapper(catalog.schema)
    schema = mapper.getOutputSchema()
    task = SingleFrameMeasurementTask(schema=schema, config=config)
    measured = SourceCatalog(SourceTable.make(schema))
    measured.extend(catalog, mapper)
    task.run(measured, coadd, exposureId=1)
    child = np.array(measured["parent"]) != 0
    bright = child & (np.array(measured["base_PsfFlux_instFlux"]) > 20 * measured["base_PsfFlux_instFluxErr"])
    # Closer to the border the PSF's stamp hangs over.
    bright &= inside(measured, coadd, 25)
    # Detected, not found in what models leave: these lie in others' light, where centroids fail more often.
    given = {(r.getId(), p.getId()) for r in merged for p in r.getFootprint().peaks}
    bright &= [(r.getParent(), r["deblend_peakId"]) in given for r in measured]
    assert bright.sum() >= 5
    for name in (
        "base_SdssShape_flag",
        "base_PsfFlux_flag",
        "base_SdssCentroid_flag",
        "base_GaussianFlux_flag",
    ):
        assert np.array(measured[name])[bright].mean() < 0.2, name
    # Children are measured where they are, and not where their brightest neighbour is.
    dx = measured["base_SdssCentroid_x"] - measured["deblend_peak_center_x"]
    dy = measured["base_SdssCentroid_y"] - measured["deblend_peak_center_y"]
    assert np.median(np.hypot(dx, dy)[bright]) < 1.0
    # The noise replacer puts isolated sources back; children's parents are in no catalogue.
    for record in measured:
        if not record.getParent():
            x, y = record["deblend_peak_center_x"], record["deblend_peak_center_y"]
            y0, x0 = coadd.getBBox().getMinY(), coadd.getBBox().getMinX()
            assert coadd.image.array[y - y0, x - x0] == before[y - y0, x - x0]


def test_forced_measurement_runs_on_heavy_footprints(deblended):
    coadd = deblended.get("deepCoadd_calexp", "detections", CROWDED, band="r")
    reference = deblended.get("deepCoadd_ref", "vae", CROWDED)
    config = ForcedMeasurementTask.ConfigClass()
    config.plugins.names = [*PLUGINS, "base_TransformedCentroid", "base_TransformedShape"]
    config.copyColumns = {"id": "id", "parent": "parent"}
    config.slots.shape = "base_TransformedShape"
    task = ForcedMeasurementTask(reference.schema, config=config)
    catalog = task.generateMeasCat(coadd, reference, coadd.getWcs())
    models = deblended.get("deepCoadd_scarletModelData", "vae", CROWDED)
    updateCatalogFootprints(models, catalog, "r", imageForRedistribution=coadd, updateFluxColumns=False)
    for record, ref in zip(catalog, reference, strict=True):
        if not record.getParent():
            record.setFootprint(ref.getFootprint())
    task.run(catalog, coadd, reference, coadd.getWcs(), exposureId=1)
    flux = np.array(catalog["base_PsfFlux_instFlux"])
    assert np.isfinite(flux).mean() > 0.95
    forced = deblended.get("deepCoadd_forced_src", "vae", CROWDED, band="r")
    bright = flux > 20 * np.array(catalog["base_PsfFlux_instFluxErr"])
    np.testing.assert_allclose(flux[bright], forced["base_PsfFlux_instFlux"][bright], rtol=0.02)


def test_a_patch_with_one_object(deblended):
    objects = deblended.get("deepCoadd_deblendedCatalog", "vae", SINGLE)
    real = [record for record in objects if not record["merge_peak_sky"]]
    assert len(real) >= 1 and len(deblended.get("deepCoadd_ref", "vae", SINGLE)) == len(objects)
    primary = deblended.get("deepCoadd_meas", "vae", SINGLE, band="i")["detect_isPrimary"]
    assert np.array(primary).sum() == len(real)


def test_a_patch_with_sky_objects_only(deblended):
    objects = deblended.get("deepCoadd_deblendedCatalog", "vae", EMPTY)
    assert np.array(objects["merge_peak_sky"]).all() and len(objects) == 10
    assert np.isnan(objects[posterior_column("flux", "i")]).all()
    assert not deblended.get("deepCoadd_scarletModelData", "vae", EMPTY).blends
    meas = deblended.get("deepCoadd_meas", "vae", EMPTY, band="i")
    assert not np.array(meas["detect_isPrimary"]).any()
    assert np.isfinite(meas["base_PsfFlux_instFlux"]).all()
    assert len(deblended.get("deepCoadd_ref", "vae", EMPTY)) == 10
    assert len(deblended.get("object_parent_patch", "vae", EMPTY)) == 10


def test_a_patch_with_nothing_at_all(repository):
    merged = repository.get("deepCoadd_mergeDet", "detections", EMPTY)
    with Butler.from_config(str(repository.root), run="handmade") as butler:
        nothing = SourceCatalog(SourceTable.make(merged.schema))
        butler.put(nothing, "deepCoadd_mergeDet", repository.data_id(EMPTY))
    log = repository.run(VAE, ["handmade", "detections"], "nothing", [EMPTY])
    assert "no merged detection" in log
    assert not repository.exists("deepCoadd_deblendedCatalog", "nothing", EMPTY)


def test_running_again_gives_the_same_bytes(deblended):
    deblended.run(VAE, ["detections"], "again", [CROWDED])
    assert scarlet_bytes(deblended, "vae") == scarlet_bytes(deblended, "again")
    for name in ("deepCoadd_deblendedCatalog", "object_parent_patch"):
        # The files hold the Butler's identifiers of themselves as well.
        first, second = (deblended.get(name, run, CROWDED).asAstropy() for run in ("vae", "again"))
        assert first.colnames == second.colnames
        for column in first.colnames:
            assert first[column].tobytes() == second[column].tobytes(), (name, column)


def scarlet_bytes(repository, run: str) -> dict[str, bytes]:
    """Members of a file of models; the zip archive itself has the time in it."""
    with zipfile.ZipFile(repository.uri("deepCoadd_scarletModelData", run, CROWDED)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_band_without_psf(repository):
    """Coadds of a band without any PSF: no model in it, all else as ever."""
    coadds = {b: repository.get("deepCoadd_calexp", "detections", SPARSE, band=b) for b in BANDS}
    coadds["u"].setPsf(None)
    merged = repository.get("deepCoadd_mergeDet", "detections", SPARSE)
    result = run_task(repository, merged, coadds)
    objects, models = result.deblendedCatalog, result.scarletModelData
    known = ~np.array(objects["merge_peak_sky"])
    assert np.isnan(objects[posterior_column("flux", "u")]).all()
    assert np.isfinite(objects[posterior_column("flux", "i")][known]).all()
    assert np.array(objects[posterior_column("flag", "missing_band")])[known].all()
    assert "u" not in models.metadata["bands"] and "i" in models.metadata["bands"]
    incomplete = np.array(result.objectParents["deblend_incompleteData"])
    assert incomplete[~np.array(result.objectParents["merge_peak_sky"])].all()


def make_task(repository, findNewPeaks=False, **settings):
    config = VaeDeblendFootprintsTask.ConfigClass()
    config.multibandDeblend.deblend.findNewPeaks = findNewPeaks
    for name, value in settings.items():
        setattr(config.multibandDeblend, name, value)
    init = {
        "inputSchema": repository.get("deepCoadd_mergeDet_schema", "detections"),
        "peakSchema": repository.get("deepCoadd_peak_schema", "detections"),
    }
    return VaeDeblendFootprintsTask(config=config, initInputs=init)


def run_task(repository, merged, coadds, **settings):
    task = make_task(repository, **settings)
    return task.run(mergedDetections=merged, idFactory=IdFactory.makeSimple(), coadds=coadds)


def test_parents_beyond_the_limits_are_skipped_and_marked(repository):
    coadds = {b: repository.get("deepCoadd_calexp", "detections", SPARSE, band=b) for b in BANDS}
    merged = repository.get("deepCoadd_mergeDet", "detections", SPARSE)
    several = {r.getId(): r for r in merged if len(r.getFootprint().peaks) > 1}
    assert several
    cases = {
        "tooManyPeaks": dict(maxNumberOfPeaks=1),
        "parentTooBig": dict(maxFootprintSize=1),
        "masked": dict(maskLimits={"DETECTED": 0.0}),
    }
    for reason, settings in cases.items():
        for coadd in coadds.values():
            if "NOT_DEBLENDED" in coadd.mask.getMaskPlaneDict():
                coadd.mask.clearMaskPlane(coadd.mask.getMaskPlane("NOT_DEBLENDED"))
        result = run_task(repository, merged, coadds, **settings)
        for record in result.objectParents:
            skipped = record.getId() in several
            assert record["deblend_skipped"] == record[f"deblend_skipped_{reason}"] == skipped
        assert not any(record.getParent() for record in result.deblendedCatalog)
        # As with scarlet, skipped blends have no objects, and single sources stay.
        assert {r.getId() for r in result.deblendedCatalog} == {r.getId() for r in merged} - set(several)
        assert len(result.skipped) == len(several)
        mask = coadds["r"].mask
        bit = mask.getPlaneBitMask("NOT_DEBLENDED")
        peak = next(iter(several.values())).getFootprint().peaks[0]
        assert mask[peak.getI()] & bit
        outside = mask.array & bit != 0
        assert 0 < outside.sum() < outside.size / 2


def test_peaks_of_the_residual_become_objects_if_wanted(repository):
    coadds = {b: repository.get("deepCoadd_calexp", "detections", SPARSE, band=b) for b in BANDS}
    merged = repository.get("deepCoadd_mergeDet", "detections", SPARSE)
    few = run_task(repository, merged, coadds).deblendedCatalog
    result = run_task(repository, merged, coadds, findNewPeaks=True)
    many = result.deblendedCatalog
    assert len(many) > len(few)
    ids = np.array(many["id"])
    assert (np.diff(ids) > 0).all() and (np.diff(many["parent"]) >= 0).all()
    given = {(r.getId(), p.getId()) for r in merged for p in r.getFootprint().peaks}
    found = [r for r in many if r.getParent() and (r.getParent(), r["deblend_peakId"]) not in given]
    assert found
    highest = max(number for _, number in given)
    assert len({r["deblend_peakId"] for r in found}) == len(found)
    for record in found:
        assert record["deblend_peakId"] > highest
        assert any(record[f"merge_peak_{band}"] for band in BANDS)
        footprint = merged.find(record.getParent()).getFootprint()
        assert footprint.contains(Point2I(record["deblend_peak_center_x"], record["deblend_peak_center_y"]))
    for record in result.objectParents:
        own = np.array(many["parent"]) == record.getId()
        assert record["deblend_nChild"] == own.sum() != 1


def test_both_ways_in_give_the_same(deblended):
    deblended.run(RETARGETED, ["detections"], "retargeted", [CROWDED])
    one, other = (
        deblended.get("deepCoadd_deblendedCatalog", run, CROWDED).asAstropy() for run in ("vae", "retargeted")
    )
    assert one.colnames == other.colnames and len(one) == len(other)
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert scarlet_bytes(deblended, "vae") == scarlet_bytes(deblended, "retargeted")


def test_cell_coadds_give_the_same_as_whole_ones(deblended, objects):
    cells = "\n    config:\n      useCellCoadds: true\n"
    detect = DETECT.replace("doScaleVariance: false", "doScaleVariance: false\n      useCellCoadds: true")
    deblended.run(detect + VAE.rstrip() + cells, [], "cells", [CROWDED])
    other = deblended.get("deepCoadd_deblendedCatalog", "cells", CROWDED)
    assert_same_fluxes(deblended, other, objects)


def assert_same_fluxes(repository, one, other) -> None:
    """Away from the border, where detection masks whole coadds, objects are the same.

    Peaks found near the border shift the identifiers of all that come after, so that objects are known by
    their places.
    """
    coadd = repository.get("deepCoadd_calexp", "detections", CROWDED, band="i")
    places = []
    for catalog in (one, other):
        away = np.flatnonzero(inside(catalog, coadd, 70) & ~np.array(catalog["merge_peak_sky"]))
        x, y = (np.array(catalog[f"deblend_peak_center_{axis}"])[away] for axis in "xy")
        order = np.lexsort((x, y))
        places.append((away[order], x[order], y[order]))
    (first, *here), (second, *there) = places
    assert len(first) == len(second) > 20
    np.testing.assert_array_equal(here, there)
    for band in ("g", "i"):
        name = posterior_column("flux", band)
        np.testing.assert_allclose(one[name][first], other[name][second], rtol=5e-3, atol=2.0)


def test_coadds_of_lsst_images_give_the_same(deblended, objects, merged):
    y0, x0 = deblended.corner(CROWDED)
    layout = PatchLayout(y0, x0, (4, 4), (SIZE // 4, SIZE // 4))
    repository = CoaddRepository(deblended.root.parent / "future", BANDS, {0: layout}, 0.2)
    coadds = {}
    for band in BANDS:
        whole = deblended.get("deepCoadd_calexp", "detections", CROWDED, band=band)
        kernel = whole.getPsf().computeKernelImage(whole.getBBox().getCenter()).array
        coadds[band] = repository.make_coadd(0, band, whole.image.array, whole.variance.array, kernel)
    task = make_task(deblended, findNewPeaks=True)
    factory = IdFactory.makeSimple()
    result = task.run(mergedDetections=merged, idFactory=factory, coadds_future=coadds)
    assert_same_fluxes(deblended, result.deblendedCatalog, objects)


def test_scarlet_and_this_deblender_are_read_by_the_same_code(with_scarlet, objects):
    """Same columns, same files, same measurement; the sizes of the files compare."""
    theirs = with_scarlet.get("deepCoadd_deblendedCatalog", "scarlet", CROWDED)
    missing = set(theirs.schema.getNames()) - set(objects.schema.getNames())
    assert not missing
    for name in theirs.schema.getNames():
        mine, other = objects.schema.find(name).field, theirs.schema.find(name).field
        assert mine.getTypeString() == other.getTypeString(), name
        assert mine.getUnits() == other.getUnits(), name
    parents = with_scarlet.get("object_parent_patch", "scarlet", CROWDED)
    ours = with_scarlet.get("object_parent_patch", "vae", CROWDED)
    assert set(parents.schema.getNames()) == set(ours.schema.getNames())
    isolated = np.array(theirs["id"])[np.array(theirs["parent"]) == 0]
    # What scarlet leaves alone this deblender leaves alone, unless it finds more there.
    mine = np.array(objects["id"])[np.array(objects["parent"]) == 0]
    assert set(mine) <= set(isolated)
    files = {
        run: scarlet_file.read(with_scarlet.uri("deepCoadd_scarletModelData", run, CROWDED))
        for run in ("vae", "scarlet")
    }
    assert files["scarlet"].bands == tuple(sorted(BANDS)) and files["vae"].bands == BANDS
    for band in ("g", "i"):
        one, two = (with_scarlet.get("deepCoadd_meas", run, CROWDED, band=band) for run in ("vae", "scarlet"))
        assert set(two.schema.getNames()) <= set(one.schema.getNames())
        flux = {
            (r.getParent(), r["deblend_peakId"]): r["base_PsfFlux_instFlux"] for r in two if r.getParent()
        }
        pairs = np.array(
            [
                (r["base_PsfFlux_instFlux"], flux[key], r["base_PsfFlux_instFluxErr"])
                for r in one
                if (key := (r.getParent(), r["deblend_peakId"])) in flux
            ]
        )
        assert len(pairs) >= 10
        bright = pairs[:, 0] > 20 * pairs[:, 2]
        ratio = pairs[bright, 0] / pairs[bright, 1]
        assert 0.9 < np.median(ratio) < 1.1


def test_files_are_at_most_half_again_as_large_as_scarlets(with_scarlet):
    sizes = {
        run: with_scarlet.uri("deepCoadd_scarletModelData", run, CROWDED).stat().st_size
        for run in ("vae", "scarlet")
    }
    print(f"bytes: {sizes}, ratio {sizes['vae'] / sizes['scarlet']:.2f}")
    assert sizes["vae"] < 1.5 * sizes["scarlet"]
