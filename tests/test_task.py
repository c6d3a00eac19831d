# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The task on coadds of synthetic galaxies, in the process and through a real `pipetask run`."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import astropy.units as u
import numpy as np
import pytest
from astropy.table import Table
from lsst.daf.butler import Butler
from lsst.meas.vaedeblend.adapters.butler_repo import (
    CoaddRepository,
    PatchLayout,
    pipeline_path,
    run_pipetask,
)
from lsst.meas.vaedeblend.adapters.cell_coadd import scene_from_cell_coadds
from lsst.meas.vaedeblend.deblender import deblend
from lsst.meas.vaedeblend.ground.flags import SOURCE_FLAGS
from lsst.meas.vaedeblend.ground.identifiers import PatchIds
from lsst.meas.vaedeblend.network import NetworkError, load_network
from lsst.meas.vaedeblend.posterior import sample_posterior
from lsst.meas.vaedeblend.rendering import render
from lsst.meas.vaedeblend.sources import SourceModels
from lsst.meas.vaedeblend.tasks import VaeDeblendConfig, VaeDeblendConnections, VaeDeblendTask
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import NoWorkFound
from scipy.spatial import cKDTree
from synthetic import make_scene, metadata, write_network, write_tampered

BANDS = ("g", "r", "i")
LAYOUTS = {
    3: PatchLayout(500, 900, (2, 2), (64, 64)),
    4: PatchLayout(500, 1100, (2, 2), (64, 64)),
    5: PatchLayout(500, 1300, (2, 2), (64, 64)),
    6: PatchLayout(500, 1500, (2, 2), (64, 64)),
}
X = np.array([30.0, 37.0, 90.3, 60.0])
Y = np.array([40.0, 42.0, 100.6, 64.0])
FLUX = np.array([[300, 500, 700], [600, 400, 200], [900, 900, 900], [250, 500, 500]], float)


@dataclasses.dataclass
class Arrays:
    """A scene as arrays per band, to be spoilt before it becomes coadds."""

    image: np.ndarray
    variance: np.ndarray
    psf: np.ndarray
    detected: np.ndarray
    saturated: np.ndarray


def arrays(x=X, y=Y, flux=FLUX, **keywords) -> Arrays:
    scene, _ = make_scene(x, y, flux, 1.0, psf_sigma=(1.6, 1.4, 1.5), bands=BANDS, **keywords)
    detected = np.zeros(scene.shape, bool)
    for parent in scene.parents:
        window, footprint = parent.window(scene.shape)
        detected[window] |= footprint
    psf = np.broadcast_to(scene.psf.stamps[0][:, None, None], (3, 2, 2, *scene.psf.stamps.shape[2:])).copy()
    return Arrays(scene.image, scene.variance, psf, detected, np.zeros(scene.shape, bool))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> CoaddRepository:
    return CoaddRepository(tmp_path_factory.mktemp("repo") / "repo", (*BANDS, "z"), LAYOUTS, 0.2)


@pytest.fixture
def task(network_path) -> VaeDeblendTask:
    return make_task(network_path)


def make_task(path, procedure=None, **fields) -> VaeDeblendTask:
    config = VaeDeblendConfig()
    config.network = str(path)
    config.deblend.update(**(procedure or {}))
    for name, value in fields.items():
        setattr(config, name, value)
    config.validate()
    return VaeDeblendTask(config=config)


def make_coadds(repository, a: Arrays, bands=BANDS, patch=3):
    planes = {"DETECTED": a.detected, "SATURATED": a.saturated}
    return {
        band: repository.make_coadd(patch, band, a.image[b], a.variance[b], a.psf[b], planes)
        for b, band in enumerate(bands)
    }


IDS = PatchIds(0, 3)


def test_objects_come_out_where_they_are(repository, task):
    coadds = make_coadds(repository, arrays())
    result = task.run(coadds, IDS)
    objects = result.objects
    assert result.n_objects == len(objects) == 4
    for x, y, flux in zip(X, Y, FLUX, strict=True):
        distance = np.hypot(objects["x"] - 900 - x, objects["y"] - 500 - y)
        row = objects[np.argmin(distance)]
        assert distance.min() < 0.5
        np.testing.assert_allclose([row[f"{b}_flux"] for b in BANDS], flux, rtol=0.15)
        # The coordinates are those of the coadds' projection.
        sky = coadds["r"].sky_projection.pixel_to_sky(x=float(row["x"]), y=float(row["y"]))
        assert float(row["coord_ra"]) == pytest.approx(sky.ra.deg, abs=1e-9)
        assert float(row["coord_dec"]) == pytest.approx(sky.dec.deg, abs=1e-9)
    assert (
        objects["r_flux"].unit == u.nJy and objects["x"].unit == u.pix and objects["coord_ra"].unit == u.deg
    )
    # Two of the galaxies share a parent.
    assert sorted(np.asarray(result.parents["deblend_nChild"])) == [1, 1, 2]
    assert set(objects["parent"]) == set(result.parents["id"])
    assert task.metadata["n_objects"] == 4 and task.metadata["n_parents"] == 3
    assert task.metadata["n_flag_not_finite"] == 0


def test_identifiers(repository, task):
    coadds = make_coadds(repository, arrays())
    first = task.run(coadds, IDS)
    for i, row in enumerate(first.objects["id"]):
        assert PatchIds.split(row) == (0, 3, False, i + 1)
    assert [PatchIds.split(row)[2] for row in first.parents["id"]] == [True] * 3
    assert list(first.models["id"]) == list(first.objects["id"])
    # Again, and as another patch: the same tables, other identifiers.
    again, other = task.run(coadds, IDS), task.run(coadds, PatchIds(0, 4))
    for name in first.objects.colnames:
        np.testing.assert_array_equal(first.objects[name], again.objects[name], err_msg=name)
    assert not set(first.objects["id"]) & set(other.objects["id"])
    assert not (set(first.parents["id"]) | set(first.objects["id"])) & set(other.parents["id"])


@pytest.mark.parametrize(("tract", "patch"), [(0, 0), (18937, 99), (2**22 - 1, 2**16 - 1)])
def test_identifier_scheme(tract, patch):
    ids = PatchIds(tract, patch)
    objects, parents = ids.objects(3), ids.parents(2)
    assert objects.dtype == np.int64 and (objects > 0).all() and (parents > 0).all()
    assert [PatchIds.split(i) for i in objects] == [(tract, patch, False, k) for k in (1, 2, 3)]
    assert [PatchIds.split(i) for i in parents] == [(tract, patch, True, k) for k in (1, 2)]
    with pytest.raises(ValueError, match="more than"):
        ids.objects(2**24)


def test_identifiers_that_do_not_fit():
    with pytest.raises(ValueError, match="patch 65536"):
        PatchIds(0, 2**16)
    with pytest.raises(ValueError, match="tract -1"):
        PatchIds(-1, 0)


def test_bands_in_another_order(repository, task):
    coadds = make_coadds(repository, arrays())
    expected = task.run(coadds, IDS).objects
    shuffled = task.run({band: coadds[band] for band in ("i", "g", "r")}, IDS).objects
    for name in expected.colnames:
        np.testing.assert_array_equal(expected[name], shuffled[name], err_msg=name)


def test_a_band_missing(repository, network_path, task, caplog):
    coadds = make_coadds(repository, arrays())
    del coadds["r"]
    strict = make_task(network_path, {"allowMissingBands": False})
    text = "No coadd in band r for patch 3 of tract 0: the network needs gri"
    with caplog.at_level("WARNING"), pytest.raises(NoWorkFound, match=f"{text}.*allowMissingBands"):
        strict.run(coadds, IDS)
    assert text in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        objects = task.run(coadds, IDS).objects
    assert text in caplog.text and "allowMissingBands" in caplog.text
    assert len(objects) >= 4
    assert np.isnan(objects["r_flux"]).all() and np.asarray(objects["deblend_flag_missing_band"]).all()
    assert np.isfinite(objects["g_flux"]).all() and np.isfinite(objects["i_flux"]).all()


def test_a_band_that_the_network_does_not_know(repository, task):
    coadds = make_coadds(repository, arrays())
    coadds["z"] = make_coadds(repository, arrays(), ("z",))["z"]
    with pytest.raises(NetworkError, match=r"has bands \['g', 'r', 'i'\]; there are coadds in \['z'\] too"):
        task.run(coadds, IDS)


def test_another_pixel_scale(tmp_path, network_path, task):
    other = CoaddRepository(tmp_path / "repo", BANDS, {3: LAYOUTS[3]}, 0.168)
    coadds = make_coadds(other, arrays())
    with pytest.raises(NetworkError, match=r"0\.2 arcsec wide, the data's 0\.168"):
        task.run(coadds, IDS)
    assert make_task(network_path, {"allowOtherPixelScale": True}).run(coadds, IDS).n_objects == 4


def test_pixels_that_are_not_finite(repository, network_path):
    a = arrays()
    a.image[0, 100, 88:92] = np.nan
    a.image[1, 41, 31] = np.inf
    a.variance[2, 64, 60] = np.nan
    a.variance[2, 65, 60] = 0.0
    result = make_task(network_path, doWriteResidual=True).run(make_coadds(repository, a), IDS)
    assert result.n_objects == 4 and result.n_not_finite == 0
    for band in BANDS:
        assert np.isfinite(np.asarray(result.objects[f"{band}_flux"])).all()
        assert np.isfinite(result.residual[band].image.array).all()
    row = result.objects[np.argmin(np.abs(result.objects["x"] - 990.3))]
    assert float(row["g_flux"]) == pytest.approx(900, rel=0.2)


def test_a_parent_wholly_masked(repository, task):
    a = arrays()
    a.saturated[80:120, 70:110] = True
    result = task.run(make_coadds(repository, a), IDS)
    assert len(result.parents) == 3
    masked = np.asarray(result.parents["deblend_flag_masked"])
    assert masked.sum() == 1
    np.testing.assert_array_equal(result.parents["deblend_skipped_masked"], masked)
    assert not set(result.parents["id"][masked]) & set(result.objects["parent"])
    # The others are as they would be without it.
    assert np.sum(np.asarray(result.parents["deblend_nChild"])[~masked]) == 3
    near = np.hypot(result.objects["x"] - 930, result.objects["y"] - 540)
    assert float(result.objects["r_flux"][np.argmin(near)]) == pytest.approx(500, rel=0.15)


def test_a_psf_missing_in_a_cell(repository, task):
    a = arrays()
    a.psf[1, 1, 1] = np.nan  # the cell of the third galaxy, in r
    objects = task.run(make_coadds(repository, a), IDS).objects
    row = objects[np.argmin(np.abs(objects["x"] - 990.3))]
    assert bool(row["deblend_flag_no_psf"])
    assert float(row["g_flux"]) == pytest.approx(900, rel=0.15)
    first = objects[np.argmin(np.abs(objects["x"] - 930))]
    assert not bool(first["deblend_flag_no_psf"])


def test_given_peaks_in_and_outside_the_patch(repository, task):
    coadds = make_coadds(repository, arrays())
    peaks = Table({"x": np.append(X, [-20.0]) + 900, "y": np.append(Y, [64.0]) + 500})
    result = task.run(coadds, IDS, peaks=peaks)
    outside = np.asarray(result.objects["deblend_flag_peak_outside"])
    assert len(result.objects) == 5 and outside.sum() == 1
    row = result.objects[int(np.flatnonzero(outside)[0])]
    assert float(row["deblend_peak_center_x"]) == 880 and float(row["deblend_peak_center_y"]) == 564
    given = result.objects[~outside]
    np.testing.assert_allclose(np.sort(given["deblend_peak_center_x"]) - 900, np.sort(X))


def test_no_detected_pixel(repository, task, caplog):
    a = arrays()
    a.detected[:] = False
    with (
        caplog.at_level("WARNING"),
        pytest.raises(NoWorkFound, match="No DETECTED pixel in patch 3 of tract"),
    ):
        task.run(make_coadds(repository, a), IDS)
    assert "No DETECTED pixel" in caplog.text
    # With a peak there is work.
    peaks = Table({"x": X[2:3] + 900, "y": Y[2:3] + 500})
    assert task.run(make_coadds(repository, a), IDS, peaks=peaks).n_objects == 1


def test_one_object(repository, task):
    result = task.run(make_coadds(repository, arrays(X[2:3], Y[2:3], FLUX[2:3])), IDS)
    assert (len(result.parents), len(result.objects), len(result.models)) == (1, 1, 1)


def test_five_hundred_peaks_in_one_parent(repository, task):
    rng = np.random.default_rng(2)
    a = arrays()
    a.detected[:] = True
    peaks = Table({"x": 900 + rng.uniform(3, 124, 500), "y": 500 + rng.uniform(3, 124, 500)})
    result = task.run(make_coadds(repository, a), IDS, peaks=peaks)
    assert len(result.parents) == 1 and int(result.parents["deblend_nPeaks"][0]) == 500
    # Every given peak has its row.
    rows = np.column_stack([result.objects["deblend_peak_center_x"], result.objects["deblend_peak_center_y"]])
    distance, row = cKDTree(rows).query(np.column_stack([peaks["x"], peaks["y"]]))
    assert distance.max() < 1e-9 and len(set(row)) == 500
    for band in BANDS:
        flux = np.asarray(result.objects[f"{band}_flux"])
        assert np.isfinite(flux).all()
        # Fluxes that were solved for are not negative; a fallback takes what the image holds.
        assert (flux[~np.asarray(result.objects["deblend_flag_fallback"])] >= 0).all()


def test_parents_beyond_the_limits_are_skipped(repository, network_path, task):
    coadds = make_coadds(repository, arrays())
    peaks = Table({"x": X + 900, "y": Y + 500})
    every = task.run(coadds, IDS, peaks=peaks)
    blend = np.asarray(every.parents["deblend_nChild"]) == 2
    assert not np.asarray(every.parents["deblend_skipped"]).any() and blend.sum() == 1
    cases = {
        "tooManyPeaks": {"maxNumberOfPeaks": 1},
        "parentTooBig": {"maxFootprintSize": 1},
        "masked": {"maskLimits": {"DETECTED": 0.0}},
    }
    for reason, limits in cases.items():
        task = make_task(network_path, **limits)
        result = task.run(coadds, IDS, peaks=peaks)
        # Parents keep their rows and ids; those with a single peak need no splitting.
        np.testing.assert_array_equal(result.parents["id"], every.parents["id"])
        for name in cases:
            expected = blend if name == reason else np.zeros(3, bool)
            np.testing.assert_array_equal(result.parents[f"deblend_skipped_{name}"], expected)
        np.testing.assert_array_equal(result.parents["deblend_skipped"], blend)
        row = result.parents[int(np.flatnonzero(blend)[0])]
        assert (int(row["deblend_nPeaks"]), int(row["deblend_nChild"])) == (2, 0)
        assert (
            row["deblend_chi2"] == row["deblend_chi2_start"] == every.parents["deblend_chi2_start"][blend][0]
        )
        assert len(result.objects) == 2 and len(result.models) == 2
        assert not set(result.parents["id"][blend]) & set(result.objects["parent"])
        assert task.metadata["n_skipped"] == 1 and task.metadata["n_parents"] == 3


def test_all_parents_skipped(repository, network_path):
    result = make_task(network_path, maxFootprintSize=1).run(make_coadds(repository, arrays()), IDS)
    assert len(result.parents) == 3 and np.asarray(result.parents["deblend_skipped_parentTooBig"]).all()
    assert len(result.objects) == len(result.models) == 0


def test_new_peaks_are_looked_for_beside_given_ones_unless_forbidden(repository, network_path, task):
    coadds = make_coadds(repository, arrays())
    given = Table({"x": X[1:] + 900, "y": Y[1:] + 500})  # a peak is missing
    assert task.run(coadds, IDS, peaks=given).n_objects == 4
    content = make_task(network_path, {"findNewPeaks": False})
    assert content.run(coadds, IDS, peaks=given).n_objects == 3


def test_errors_are_those_of_the_posterior(repository, network_path, task):
    coadds = make_coadds(repository, arrays())
    objects = task.run(coadds, IDS).objects
    network = load_network(network_path)
    scene = scene_from_cell_coadds(coadds, BANDS)
    sources = deblend(scene, network).sources
    posterior = sample_posterior(sources, network, scene.psf)
    for b, band in enumerate(BANDS):
        np.testing.assert_array_equal(objects[f"{band}_fluxErr"], posterior.flux_err[:, b])
        assert (objects[f"{band}_fluxErr"] > sources.flux_err[:, b]).all()
    for k, name in enumerate(("xx", "yy", "xy")):
        np.testing.assert_array_equal(objects[f"shape_{name}"], posterior.shape[:, k])
        np.testing.assert_array_equal(objects[f"shape_{name}Err"], posterior.shape_err[:, k])
    without = make_task(network_path, posteriorSamples=0).run(coadds, IDS).objects
    np.testing.assert_array_equal(without["r_fluxErr"], sources.flux_err[:, 1])
    assert np.isnan(without["shape_xxErr"]).all()


def test_what_concerns_most_objects_is_warned_about(repository, tmp_path, caplog):
    narrow = dataclasses.replace(
        metadata(), training_range={"noise": dict.fromkeys(BANDS, [5.0, 6.0]), "psf_fwhm": [0.3, 2.0]}
    )
    task = make_task(write_network(tmp_path, narrow))
    with caplog.at_level("INFO"):
        result = task.run(make_coadds(repository, arrays()), IDS)
    assert np.asarray(result.objects["deblend_flag_outside_training_range"]).all()
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert warning.startswith("4 of 4 objects have noise or seeing outside of what network synthetic was")
    assert "in the bands g r i with network synthetic (gri) on CPUExecutionProvider" in caplog.text


def test_patches_that_do_not_settle_are_warned_about(repository, network_path, caplog):
    task = make_task(
        network_path, {"maxIterations": 1, "fluxTolerance": 1e-9, "subtractSky": False}
    )
    with caplog.at_level("WARNING"):
        objects = task.run(make_coadds(repository, arrays()), IDS).objects
    count = int(np.sum(objects["deblend_flag_no_convergence"]))
    assert 2 < count <= 4
    assert f"{count} of 4 objects had not settled at the limit (deblend.maxIterations)" in caplog.text


def test_models_render_again_from_the_table(repository, network_path):
    task = make_task(network_path, doWriteResidual=True)
    coadds = make_coadds(repository, arrays())
    result = task.run(coadds, IDS)
    scene = scene_from_cell_coadds(coadds, BANDS)
    models = SourceModels.from_table(result.models, load_network(network_path), scene.psf, scene.origin)
    total = render(models, scene.shape)
    for b, band in enumerate(BANDS):
        residual = result.residual[band]
        assert residual.bbox == coadds[band].bbox and residual.unit == u.nJy
        np.testing.assert_allclose(residual.image.array, scene.image[b] - total[b], atol=2e-2)
        np.testing.assert_array_equal(residual.mask.get("DETECTED"), coadds[band].mask.get("DETECTED"))


def test_without_residual_none_is_made(repository, task):
    assert task.run(make_coadds(repository, arrays()), IDS).residual == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("network", "  ", "A network must be named"),
        ("executionProviders", ["cuda"], "'cuda' is no execution provider"),
        ("badMaskPlanes", ["DETECTED"], "nothing is left to deblend"),
        ("threads", -1, "threads"),
        ("posteriorSamples", 3, "must be even, not 3"),
        # A string is no list of letters.
        ("executionProviders", "cuda", r"'cuda' is no .* executionProviders=\['CUDAExecutionProvider', 'CPU"),
        ("executionProviders", "CudaExecutionProvider", "the right form is .*CUDAExecutionProvider"),
        ("executionProviders", ["NoSuchExecutionProvider"], "no execution provider of onnxruntime"),
        ("executionProviders", "", "executionProviders"),
    ],
)
def test_configuration_is_validated(field, value, message):
    config = VaeDeblendConfig()
    with pytest.raises(FieldValidationError, match=message):
        setattr(config, field, value)
        config.validate()


@pytest.mark.parametrize(
    "value",
    [
        "CUDAExecutionProvider,CPUExecutionProvider",
        "['CUDAExecutionProvider', 'CPUExecutionProvider']",
        ["CUDAExecutionProvider", "CPUExecutionProvider"],
    ],
)
def test_providers_may_come_as_a_string(value, tmp_path):
    config = VaeDeblendConfig()
    config.executionProviders = value
    config.validate()
    expected = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert list(config.executionProviders) == expected
    config.save(tmp_path / "config.py")
    again = VaeDeblendConfig()
    again.load(tmp_path / "config.py")
    assert list(again.executionProviders) == expected
    again.executionProviders = "CUDAExecutionProvider"
    assert list(again.executionProviders) == expected[:1]


def test_the_overrides_for_gpus_are_valid():
    config = VaeDeblendConfig()
    config.load(pipeline_path().parents[1] / "config" / "gpu.py")
    config.validate()
    assert config.executionProviders[0] == "CUDAExecutionProvider" and config.requireProvider


def test_connections_follow_the_configuration():
    config = VaeDeblendConfig()
    connections = VaeDeblendConnections(config=config)
    assert "peaks" not in connections.inputs and "residual" not in connections.outputs
    config.usePeaks = config.doWriteResidual = True
    connections = VaeDeblendConnections(config=config)
    assert "peaks" in connections.inputs and "residual" in connections.outputs
    assert connections.coadds.name == "deep_coadd"
    assert connections.residual.name == "deep_coadd_vae_residual"
    assert set(connections.dimensions) == {"skymap", "tract", "patch"}


def test_a_required_provider_that_is_absent(repository, network_path):
    task = make_task(network_path, executionProviders="TensorrtExecutionProvider", requireProvider=True)
    with pytest.raises(NetworkError, match="'TensorrtExecutionProvider' is required"):
        task.run(make_coadds(repository, arrays()), IDS)


# Through pipetask


@pytest.fixture(scope="module")
def filled(repository, network_path):
    """Patch 3 with all bands and one more, 4 without r, 5 without detection, 6 good and with peaks."""
    a = arrays()
    planes = {"DETECTED": a.detected}
    for patch, bands in ((3, BANDS), (4, ("g", "i")), (6, BANDS)):
        use = [BANDS.index(b) for b in bands]
        repository.put_coadds(patch, a.image[use], a.variance[use], a.psf[use], planes, bands=bands)
    repository.put_coadds(3, a.image[:1], a.variance[:1], a.psf[:1], planes, bands=("z",))
    repository.put_coadds(5, a.image, a.variance, a.psf, bands=BANDS)
    layout = LAYOUTS[6]
    repository.put_peaks(6, X + layout.x0, Y + layout.y0, [1, 1, 2, 3])
    return repository


@pytest.fixture(scope="module")
def run(filled, network_path):
    config = {
        "network": network_path,
        "doWriteResidual": True,
        "deblend.allowMissingBands": False,
        "executionProviders": "CPUExecutionProvider",
    }
    return run_pipetask(filled.root, "test/run", config=config)


def test_pipetask_outputs_come_back(filled, run, network_path):
    task = make_task(network_path)
    coadds = {b: filled.get("deep_coadd", 3, filled.inputs, band=b) for b in BANDS}
    expected = task.run(coadds, IDS)
    for name, dataset in (
        ("objects", "object_vae_deblend"),
        ("parents", "object_vae_parent"),
        ("models", "object_vae_models"),
    ):
        table, reference = filled.get(dataset, 3, "test/run"), getattr(expected, name)
        assert table.colnames == reference.colnames
        for column in table.colnames:
            np.testing.assert_array_equal(table[column], reference[column], err_msg=column)
            unit = reference[column].unit
            assert table[column].unit == (None if unit == u.dimensionless_unscaled else unit), column
    assert len(filled.get("object_vae_deblend", 3, "test/run")) == 4
    with Butler.from_config(str(filled.root), collections="test/run") as butler:
        bands = {
            ref.dataId["band"]
            for ref in butler.query_datasets("deep_coadd_vae_residual")
            if ref.dataId["patch"] == 3
        }
    assert bands == set(BANDS)  # and not z, which the network does not know
    residual = filled.get("deep_coadd_vae_residual", 3, "test/run", band="r")
    inside = coadds["r"].mask.get("DETECTED")
    assert np.std(residual.image.array[inside]) < 0.5 * np.std(coadds["r"].image.array[inside])


def test_pipetask_metadata(filled, run):
    metadata = filled.get("vaeDeblend_metadata", 3, "test/run")["vaeDeblend"]
    assert metadata["n_objects"] == 4 and metadata["n_parents"] == 3
    assert metadata["network"] == "synthetic" and metadata["execution_provider"] == "CPUExecutionProvider"
    assert all(f"n_flag_{flag}" in metadata for flag in SOURCE_FLAGS)


def test_patches_without_work_are_no_failure(filled, run):
    assert run.returncode == 0
    for patch in (4, 5):
        assert not filled.exists("object_vae_deblend", patch, "test/run")
    assert "No coadd in band r" in run.stdout
    assert "No DETECTED pixel in patch 5 of tract 0" in run.stdout


def test_ids_are_unique_across_patches(filled, run):
    ids = [filled.get("object_vae_deblend", patch, "test/run")["id"] for patch in (3, 6)]
    assert not set(ids[0]) & set(ids[1])


def test_pipetask_with_a_peak_table(filled, run, network_path):
    config = {"network": network_path, "usePeaks": True}
    run_pipetask(filled.root, "test/peaks", config=config, query="patch = 6")
    objects = filled.get("object_vae_deblend", 6, "test/peaks")
    layout = LAYOUTS[6]
    np.testing.assert_allclose(np.sort(objects["deblend_peak_center_x"]), np.sort(X + layout.x0))


def failing(repository, name, network):
    process = run_pipetask(repository.root, name, config={"network": network}, query="patch = 3", check=False)
    assert process.returncode != 0
    assert not repository.exists("object_vae_deblend", 3, name)
    return process.stdout


def test_pipetask_refuses_a_tampered_network(filled, network_path, tmp_path):
    copy = write_tampered(write_network(tmp_path))
    assert "tampered.onnx: the graph was altered" in failing(filled, "test/tampered", copy)


def test_pipetask_refuses_a_network_that_is_not_there(filled):
    text = failing(filled, "test/absent", "no_such_network")
    assert "No network 'no_such_network': it is neither a file nor one of the shipped" in text


def test_pipetask_refuses_another_pixel_scale(filled, tmp_path):
    path = write_network(tmp_path, dataclasses.replace(metadata(), pixel_scale=0.168))
    text = failing(filled, "test/scale", path)
    assert "the network's pixels are 0.168 arcsec wide, the data's 0.199" in text


def test_a_network_without_any_finite_output_is_a_failure_that_leaves_its_tables(filled, tmp_path):
    path = write_network(tmp_path, nan_above=-1.0)
    process = run_pipetask(filled.root, "test/nan", config={"network": path}, query="patch = 3", check=False)
    assert process.returncode != 0
    assert "gave no finite model for any of the" in process.stdout
    objects = filled.get("object_vae_deblend", 3, "test/nan")
    assert len(objects) and np.asarray(objects["deblend_flag_not_finite"]).all()


def test_the_pipeline_definition_expands():
    command = [sys.executable, "-c", "from lsst.ctrl.mpexec.cli.pipetask import main; main()", "build"]
    command += ["-p", os.fspath(pipeline_path()), "--show", "pipeline", "--show", "config"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "class: lsst.meas.vaedeblend.tasks.VaeDeblendTask" in process.stdout
    assert "config.network='lsst_ugrizy'" in process.stdout
    assert "deblend" in process.stdout
