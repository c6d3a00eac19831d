# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Scarlet's model files: reading what scarlet's own task wrote, writing ours, refusing what is neither."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from lsst.meas.vaedeblend.adapters.scarlet_file import (
    CubeComponent,
    FactorizedComponent,
    ScarletFileError,
    ScarletModels,
    _read,
    factorize,
    isolated_to_scarlet,
    models_to_scarlet,
    read,
    render,
    write,
)
from lsst.meas.vaedeblend.evaluation.comparison.entrants import load_entrants
from lsst.meas.vaedeblend.evaluation.comparison.measures import Light
from lsst.meas.vaedeblend.evaluation.comparison.patches import read_patches
from lsst.meas.vaedeblend.evaluation.fields import FieldFile
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.rendering import StoredImages
from lsst.meas.vaedeblend.scene import Parent, PsfGrid
from lsst.meas.vaedeblend.sources import SourceModels
from scipy import ndimage

SIZE = 64
FIELDS = range(12)


def sersic(dy: float, dx: float, radius: float, e1: float, e2: float, index: float) -> np.ndarray:
    """An elliptical Sersic profile of sum 1 in the model frame, (SIZE, SIZE); pixels are sampled 3 x 3."""
    fine = 3
    grid = (np.arange(SIZE * fine) - (fine - 1) / 2) / fine - SIZE // 2
    y, x = grid[:, None] - dy, grid[None, :] - dx
    r = np.hypot((1 - e1) * x - e2 * y, (1 + e1) * y - e2 * x) / np.sqrt(1 - e1**2 - e2**2)
    # The cusp of a bulge is smoothed away in the model frame anyhow.
    image = np.exp(-(2 * index - 1 / 3) * (np.hypot(r, 0.1) / radius) ** (1 / index))
    image = ndimage.gaussian_filter(image, 0.8 * fine, mode="constant", truncate=6)
    image = image.reshape(SIZE, fine, SIZE, fine).sum(axis=(1, 3))
    return image / image.sum()


def galaxy(flux, dy=0.0, dx=0.0, radius=2.0, e1=0.0, e2=0.0, rng=None) -> np.ndarray:
    """A disk with a redder bulge, and errors of 1 percent that every band has for itself, (B, SIZE, SIZE)."""
    flux = np.asarray(flux, float)
    share = np.linspace(0.1, 0.4, len(flux))[:, None, None]
    shape = (1 - share) * sersic(dy, dx, radius, e1, e2, 1.0)
    shape = shape + share * sersic(dy, dx, radius / 2, e1 / 2, e2 / 2, 4.0)
    if rng is not None:
        noise = ndimage.gaussian_filter(rng.normal(size=shape.shape), (0, 2, 2))
        shape = shape * np.clip(1 + 0.01 * noise / noise.std(), 0, None)
    return flux[:, None, None] * shape / shape.sum(axis=(1, 2), keepdims=True)


def source_models(images, ids, parents, peaks, errors, bands, origin=(3000, 9900)) -> SourceModels:
    """Sources with these images in the model frame; peaks (N, 2) are (y, x) in the scene, on [32, 32]."""
    images = np.asarray(images, np.float32)
    n, peaks = len(images), np.asarray(peaks, float)
    nothing, corner = np.zeros(n), np.rint(peaks).astype(np.int64) - SIZE // 2
    flux = images.sum(axis=(2, 3), dtype=float)
    return SourceModels(
        bands=tuple(bands),
        network="test",
        weights_sha256="",
        origin=origin,
        id=np.asarray(ids, np.int64),
        parent=np.asarray(parents, np.int64),
        x=peaks[:, 1],
        y=peaks[:, 0],
        peak_x=peaks[:, 1],
        peak_y=peaks[:, 0],
        corner_x=corner[:, 1],
        corner_y=corner[:, 0],
        psf_index=np.zeros(n, np.int64),
        iteration=np.zeros(n, np.int64),
        latent_mean=np.zeros((n, 1), np.float32),
        latent_sigma=np.zeros((n, 1), np.float32),
        latent_covariance=np.zeros((n, 1, 1), np.float32),
        flux=flux,
        flux_err=np.broadcast_to(errors, flux.shape),
        flux_network=flux,
        moments=np.zeros((*flux.shape, 3), np.float32),
        moments_err=np.zeros((*flux.shape, 3), np.float32),
        images=StoredImages(images, images),
        flags={},
        blendedness=nothing,
        data_coverage=nothing,
        chi2=nothing,
        point_probability=nothing,
    )


@pytest.fixture(scope="module")
def deblended() -> tuple[SourceModels, list[Parent], np.ndarray]:
    """Three sources in one parent, one of them without flux, and one in a parent of its own; PSFs in gri."""
    rng = np.random.default_rng(1)
    images = [
        galaxy([300, 500, 900], 0.3, -0.2, 2.0, 0.2, 0.1, rng),
        galaxy([90, 60, 50], -0.4, 0.4, 0.8, rng=rng),
        np.zeros((3, SIZE, SIZE)),
        galaxy([40, 50, 60]),
    ]
    models = source_models(
        images,
        [11, 12, 13, 14],
        [1, 1, 1, 2],
        [[40.3, 49.8], [43.6, 58.4], [38, 61], [90, 20]],
        [5.0, 4.0, 6.0],
        "gri",
    )
    parents = [
        Parent(1, 30, 40, np.hypot(*(np.indices((25, 35)) - [[[12]], [[17]]])) < 16),
        Parent(2, 85, 15, np.ones((11, 10), bool), [[20.2, 89.9]]),
    ]
    return models, parents, np.stack([gaussian_psf(sigma, 25) for sigma in (2.0, 1.6, 1.5)])


@pytest.fixture(scope="module")
def ours(deblended) -> ScarletModels:
    models, parents, psf = deblended
    return models_to_scarlet(models, psf, parents[:1], parents[1:], peak_ids=[5, 6, 7, 8])


def to_bytes(models: ScarletModels) -> bytes:
    stream = io.BytesIO()
    write(stream, models)
    return stream.getvalue()


def members(content: bytes) -> dict:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: json.loads(archive.read(name)) for name in archive.namelist()}


def pack(documents: dict, compression: int = zipfile.ZIP_STORED) -> io.BytesIO:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, document in documents.items():
            archive.writestr(name, document if isinstance(document, bytes) else json.dumps(document))
    stream.seek(0)
    return stream


def assert_same(a, b, where: str = "models") -> None:
    assert type(a) is type(b), where
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name), f"{where}.{field.name}")
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (c, d) in enumerate(zip(a, b, strict=True)):
            assert_same(c, d, f"{where}[{i}]")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(a, b, err_msg=where)
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def scarlet_paths(shared) -> list[Path]:
    return [shared / "data" / "scarlet" / f"field_{k:02d}.scarlet" for k in FIELDS]


@pytest.fixture(scope="module")
def theirs(scarlet_paths) -> list[ScarletModels]:
    return [read(path) for path in scarlet_paths]


@pytest.mark.parametrize("k", FIELDS)
def test_scarlets_files_hold_what_their_descriptions_say(k, scarlet_paths, theirs):
    models, about = theirs[k], json.loads(scarlet_paths[k].with_suffix(".json").read_text())
    assert models.bands == tuple(about["bands"])
    assert len(models.parents) + len(models.isolated) == about["parents"]
    sources = models.sources()
    assert sorted(models.isolated) == [o["id"] for o in about["objects"] if o["parent"] == 0]
    assert sorted(sources) == sorted(o["id"] for o in about["objects"] if o["parent"])
    for item in about["objects"]:
        place = (item["y"] + about["y0"], item["x"] + about["x0"])
        if item["parent"] == 0:
            lone = models.isolated[item["id"]]
            assert lone.peak == place
            assert lone.footprint[place[0] - lone.origin[0], place[1] - lone.origin[1]]
            continue
        assert any(item["id"] in blend.sources for blend in models.parents[item["parent"]].blends.values())
        source = sources[item["id"]]
        assert all(component.peak == place for component in source.components)
        image, (y0, x0) = render(models, source)
        assert (image >= 0).all() and image.sum() > 0
        assert 0 <= place[0] - y0 < image.shape[1] and 0 <= place[1] - x0 < image.shape[2]
    np.testing.assert_allclose(models.model_psf, gaussian_psf(0.8, 15), atol=1e-7)


def test_scarlets_models_explain_the_images_they_were_made_from(shared, scarlet_paths, theirs):
    models, about = theirs[4], json.loads(scarlet_paths[4].with_suffix(".json").read_text())
    field = FieldFile.read(shared / "data" / "fields" / "field_04.npz")
    np.testing.assert_allclose(models.psf, field.psf, atol=1e-5)
    total = np.zeros(field.image.shape)
    for source in models.sources().values():
        image, origin = render(models, source, observed=True)
        y0, x0 = origin[0] - about["y0"], origin[1] - about["x0"]
        y, x = (np.arange(n) + start for n, start in zip(image.shape[1:], (y0, x0), strict=True))
        rows, columns = (y >= 0) & (y < total.shape[1]), (x >= 0) & (x < total.shape[2])
        total[np.ix_(range(len(total)), y[rows], x[columns])] += image[:, rows][:, :, columns]
    ((parent),) = models.parents.values()
    y0, x0 = parent.origin[0] - about["y0"], parent.origin[1] - about["x0"]
    window = (slice(y0, y0 + parent.footprint.shape[0]), slice(x0, x0 + parent.footprint.shape[1]))
    for image, model, variance in zip(field.image, total, field.variance, strict=True):
        before = (image[window] ** 2 / variance[window])[parent.footprint].mean()
        after = ((image - model)[window] ** 2 / variance[window])[parent.footprint].mean()
        assert after < 1 + 0.05 * (before - 1)


@pytest.mark.parametrize("k", FIELDS)
def test_the_coadd_shared_out_by_scarlets_models_is_whole(k, shared, scarlet_paths):
    """What each of scarlet's sources gets sums to the pixels where any of them has light."""
    (patch,) = read_patches(shared / "data" / "fields" / f"field_{k:02d}.npz", 0.2)
    (entrant,) = load_entrants(str(scarlet_paths[k]), "scarlet", [patch])
    light, (height, width) = Light(entrant, patch), patch.scene.shape
    box = (0, 0, height, width)
    modelled = np.flatnonzero(entrant.is_model)
    total = sum(light.redistributed(i, box).astype(float) for i in modelled)
    lit = sum(np.maximum(entrant.stamp(i).on(*box), 0) for i in range(len(entrant))) > 0
    if len(modelled) < len(entrant):
        # Isolated sources take their pixels as they are.
        alone = np.flatnonzero(~entrant.is_model)
        own = np.any([entrant.stamp(i).on(*box) != 0 for i in alone], axis=0)
        lit &= ~own
        total = np.where(own, 0.0, total)
    scale = np.abs(patch.scene.image)
    assert lit.mean() > 0.05
    assert (np.abs(total - patch.scene.image)[lit] <= 1e-4 * scale[lit] + 1e-5).all()


@pytest.mark.parametrize("k", [0, 4])
def test_scarlets_files_survive_a_round_trip_and_shrink(k, scarlet_paths, theirs, tmp_path):
    path = tmp_path / "copy.scarlet"
    write(path, theirs[k])
    assert_same(read(path), theirs[k])
    assert path.stat().st_size < 0.6 * scarlet_paths[k].stat().st_size


def test_round_trip_is_exact_and_the_same_every_time(deblended, ours):
    content = to_bytes(ours)
    assert_same(read(io.BytesIO(content)), ours)
    models, parents, psf = deblended
    again = models_to_scarlet(models, psf, parents[:1], parents[1:], peak_ids=[5, 6, 7, 8])
    assert to_bytes(again) == content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["1", "2", "metadata", "version"]
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("version")) == "1.0.1"


def test_a_cube_survives_a_round_trip(ours):
    models = copy.deepcopy(ours)
    source = models.sources()[12]
    image, origin = render(models, source)
    source.components = [CubeComponent(origin, source.components[0].peak, image)]
    back = read(io.BytesIO(to_bytes(models)))
    assert_same(back, models)
    np.testing.assert_array_equal(render(back, back.sources()[12])[0], image)


def on_cutout(models: SourceModels, i: int, image: np.ndarray, origin: tuple[int, int]) -> np.ndarray:
    y = origin[0] - models.origin[0] - models.corner_y[i]
    x = origin[1] - models.origin[1] - models.corner_x[i]
    assert min(y, x) >= 0
    out = np.zeros(models.model_frame[i].shape)
    out[:, y : y + image.shape[1], x : x + image.shape[2]] = image
    return out


def circle_errors(image: np.ndarray, model: np.ndarray, flux: np.ndarray) -> np.ndarray:
    """Largest error of the flux in circles around the brightest pixel, over the band's flux, (B,)."""
    brightest = np.unravel_index(model.sum(axis=0).argmax(), model.shape[1:])
    y, x = (grid - middle for grid, middle in zip(np.indices(model.shape[1:]), brightest, strict=True))
    radius = np.hypot(y, x)
    inside = radius <= np.arange(1, 40, 0.5)[:, None, None]
    return np.abs(((image - model)[:, None] * inside).sum(axis=(2, 3))).max(axis=1) / flux


def test_sources_render_as_the_network_made_them(deblended, ours):
    models, read_back = deblended[0], read(io.BytesIO(to_bytes(ours)))
    sources = read_back.sources()
    assert list(sources) == [11, 12, 13]
    assert [source.peak_id for source in sources.values()] == [5, 6, 7]
    for i in (0, 1):
        source, flux, model = sources[i + 11], models.flux[i], models.model_frame[i].astype(float)
        assert {c.peak for c in source.components} == {[(3040, 9950), (3044, 9958)][i]}
        found = on_cutout(models, i, *render(read_back, source))
        np.testing.assert_allclose(found.sum(axis=(1, 2)), flux, rtol=1e-6)
        allowed = np.clip(0.05 * models.flux_err[i] / flux, 1e-3, 2e-2)
        assert (np.abs(found - model).max(axis=(1, 2)) <= 1.001 * allowed * flux).all()
        allowed = np.clip(0.2 * models.flux_err[i] / flux, 1e-3, 0.1)
        assert (circle_errors(found, model, flux) <= 1.2 * allowed).all()
    empty = sources[13].components
    assert [c.image().shape for c in empty] == [(3, 1, 1)]
    assert not empty[0].image().any() and empty[0].origin == empty[0].peak == (3038, 9961)


def test_isolated_sources_keep_their_footprints(deblended, ours):
    parent = deblended[1][1]
    (lone,) = ours.isolated.values()
    assert list(ours.isolated) == [2] and list(ours.parents) == [1]
    assert lone.origin == (3085, 9915) and lone.peak == (3090, 9920)
    np.testing.assert_array_equal(lone.footprint, parent.footprint)
    blended = ours.parents[1]
    assert blended.origin == (3030, 9940)
    np.testing.assert_array_equal(blended.footprint, deblended[1][0].footprint)


def test_a_patch_without_blends_has_a_file_too(deblended, ours):
    models, parents, psf = deblended
    alone = isolated_to_scarlet(models.bands, psf, parents[1:], models.origin)
    stored = read(io.BytesIO(to_bytes(alone)))
    assert not stored.parents and stored.bands == models.bands
    assert_same(stored.isolated, ours.isolated)
    with pytest.raises(ValueError, match="no peak"):
        peakless = Parent(9, 0, 0, np.ones((3, 3), bool))
        isolated_to_scarlet(models.bands, psf, [peakless], models.origin)


def test_factors_meet_their_tolerances_and_fewer_suffice_for_less():
    model = galaxy([100, 50, 200, 80], 0.2, 0.1, 2.5, 0.1, -0.2, np.random.default_rng(3))
    flux = model.sum(axis=(1, 2))
    counts, areas = [], []
    for tolerance in (1e-4, 1e-3, 1e-2):
        found = np.zeros(model.shape)
        components = factorize(model, tolerance)
        for spectrum, image, (y, x) in components:
            np.testing.assert_array_equal(image, np.rint(image))
            found[:, y : y + image.shape[0], x : x + image.shape[1]] += spectrum[:, None, None] * image
        assert (np.abs(found - model).max(axis=(1, 2)) <= 1.001 * tolerance * flux).all()
        assert (circle_errors(found, model, flux) <= 1.2 * tolerance).all()
        assert (np.abs(found - model).sum(axis=(1, 2)) <= 10.01 * tolerance * flux).all()
        counts.append(len(components))
        areas.append(components[0][1].size)
    assert counts[0] == 4 and counts[2] < 4
    assert areas[0] > areas[1] > areas[2]


def test_a_band_without_flux_stays_empty_and_one_alone_works():
    model = galaxy([0, 50, 200], radius=1.0)
    model[0] = np.random.default_rng(2).normal(size=model[0].shape)
    components = factorize(model)
    assert all(spectrum[0] == 0 for spectrum, _, _ in components)
    assert factorize(np.zeros((3, 8, 8))) == []
    ((spectrum, image, corner),) = factorize(7.0 * (np.arange(9) == 4).reshape(1, 3, 3))
    assert image.shape == (1, 1) and corner == (1, 1) and spectrum * image == pytest.approx(7.0)
    with pytest.raises(ValueError, match="finite"):
        factorize(np.full((1, 4, 4), np.nan))


def test_files_are_as_small_as_scarlets_own(shared, scarlet_paths, theirs):
    """The objects of the same patches with disks, bulges and errors of their own in each band."""
    sizes = [], []
    for k in (1, 4, 9):
        about = json.loads(scarlet_paths[k].with_suffix(".json").read_text())
        field = FieldFile.read(shared / "data" / "fields" / f"field_{k:02d}.npz")
        with np.load(shared / "data" / "fields" / f"field_{k:02d}.npz") as truth:
            flux, radius, e1, e2 = (truth[name] for name in ("flux", "hlr", "g1", "g2"))
        rng = np.random.default_rng(k)
        noise = np.sqrt(np.median(field.variance, axis=(1, 2)))
        images, peaks, errors, owners = [], [], [], []
        for number, parent in theirs[k].parents.items():
            for blend in parent.blends.values():
                for source in blend.sources.values():
                    peak = np.array(source.components[0].peak) - [about["y0"], about["x0"]]
                    i = np.argmin(np.hypot(field.y - peak[0], field.x - peak[1]))
                    r = max(radius[i] / 0.2, 0.3)
                    images.append(galaxy(flux[i], 0.3, -0.2, r, e1[i], e2[i], rng))
                    # The area that a matched filter of PSF and galaxy covers.
                    errors.append(noise * np.sqrt(4 * np.pi * (1.7**2 + (r / 1.2) ** 2)))
                    peaks.append(peak)
                    owners.append(number)
        models = source_models(
            images, list(theirs[k].sources()), owners, peaks, errors, field.bands, (about["y0"], about["x0"])
        )
        parents = [
            Parent(number, p.origin[0] - about["y0"], p.origin[1] - about["x0"], p.footprint)
            for number, p in theirs[k].parents.items()
        ]
        ours = models_to_scarlet(models, field.psf, parents)
        ours.isolated = theirs[k].isolated
        content = to_bytes(ours)
        assert len(content) < scarlet_paths[k].stat().st_size
        # On a whole patch there are many blends to one set of PSFs: they have to be small by themselves.
        for stream, total in ((io.BytesIO(content), sizes[0]), (scarlet_paths[k], sizes[1])):
            with zipfile.ZipFile(stream) as archive:
                total.extend(archive.getinfo(str(number)).file_size for number in theirs[k].parents)
    assert sum(sizes[0]) < 1.5 * sum(sizes[1])


def test_a_point_source_renders_as_the_psf(ours):
    models = copy.deepcopy(ours)
    peak = (3040, 9950)
    models.sources()[11].components = [
        FactorizedComponent((3033, 9943), peak, np.array([1, 2, 3], np.float32), models.model_psf)
    ]
    image, (y0, x0) = render(models, models.sources()[11], observed=True)
    y, x = peak[0] - 12 - y0, peak[1] - 12 - x0
    expected = models.psf * np.array([1, 2, 3])[:, None, None]
    np.testing.assert_allclose(image[:, y : y + 25, x : x + 25], expected, atol=1e-5)
    wide = np.stack([gaussian_psf(3.0, 31)] * 3)
    image, (y0, x0) = render(models, models.sources()[11], observed=True, psf=wide)
    y, x = peak[0] - 15 - y0, peak[1] - 15 - x0
    np.testing.assert_allclose(image[1, y : y + 31, x : x + 31], 2 * wide[0], atol=1e-5)
    with pytest.raises(ValueError, match="bands"):
        render(models, models.sources()[11], observed=True, psf=wide[:2])


def packed(mask: list, shape: list) -> str:
    return base64.b64encode(np.packbits(np.array(mask, bool).reshape(shape)).tobytes()).decode()


def modern(documents: dict, cells: bool = False) -> dict:
    """The same content in the layout of schema 1.0.3."""
    documents = copy.deepcopy(documents)
    documents["version"] = "1.0.3"
    old = documents["metadata"]
    psf = {"psf_type": "image", "bands": old["bands"], "padding": 3, "version": "1.0.0", "dtype": "float32"}
    psf |= {"shape": old["psf_shape"], "data": old["psf"]}
    model_psf = psf | {"bands": [], "shape": [1, *old["model_psf_shape"]], "data": old["model_psf"]}
    if cells:
        # Two cells beside each other: the second has the bands' PSFs the other way round.
        size = len(old["psf"]) // 3
        other = psf | {"data": old["psf"][2 * size :] + old["psf"][size : 2 * size] + old["psf"][:size]}
        psf = {
            "psf_type": "stitched",
            "version": "1.0.0",
            "grid": {"cell_size": [20, 50], "shape": [2, 1], "padding": 0, "min": [9935, 3010]},
            "container": {
                "shape": [2, 1],
                "offset": [0, 0],
                "cells": [{"index": [0, 0], "psf": psf}, {"index": [1, 0], "psf": other}],
            },
        }
    documents["metadata"] = {"bands": old["bands"], "psf": psf, "model_psf": model_psf}
    for document in documents.values():
        if "blend_type" in document:
            spans = document.pop("metadata")
            document |= {"blend_type": "lsst_hierarchical", "legacy_spans": False, "origin": spans["origin"]}
            document |= {
                "shape": spans["spans_shape"],
                "span_array": packed(spans["spans"], spans["spans_shape"]),
            }
        elif "source_type" in document:
            document |= {"version": "1.0.1", "span_array": packed(document["span_array"], document["shape"])}
    return documents


def test_later_schemas_read_the_same(ours):
    documents = members(to_bytes(ours))
    assert_same(read(pack(modern(documents))), ours)
    assert_same(read(pack(modern(documents), zipfile.ZIP_DEFLATED)), ours)


def test_psfs_of_cells_are_used_where_the_source_is(ours):
    models = read(pack(modern(members(to_bytes(ours)), cells=True)))
    assert isinstance(models.psf, PsfGrid) and models.psf.grid_shape == (1, 2)
    for number, order in ((11, [0, 1, 2]), (12, [2, 1, 0])):
        image, origin = render(models, models.sources()[number], observed=True)
        expected, place = render(ours, ours.sources()[number], observed=True, psf=ours.psf[order])
        assert origin == place
        np.testing.assert_allclose(image, expected, atol=1e-4)
    with pytest.raises(ValueError, match="cells"):
        write(io.BytesIO(), models)


def test_a_parent_without_footprint_takes_the_box_of_its_blends(ours):
    documents = members(to_bytes(ours))
    documents["version"] = "1.0.0"
    del documents["1"]["metadata"]
    parent = read(pack(documents)).parents[1]
    assert parent.origin == (3030, 9940)
    assert parent.footprint.shape == (25, 35) and parent.footprint.all()


def component(documents: dict) -> dict:
    return documents["1"]["children"]["1"]["sources"]["11"]["components"][0]


BROKEN = {
    "an unknown version": (lambda d: d.update(version="2.0.0"), "2.0.0.*1.0.1"),
    "no metadata": (lambda d: d.pop("metadata"), "missing"),
    "metadata that are a list": (lambda d: d.update(metadata=[]), "metadata should be an object"),
    "no bands": (lambda d: d["metadata"].pop("bands"), "lacks 'bands'"),
    "a band twice": (lambda d: d["metadata"].update(bands=["g", "g", "i"]), "different"),
    "another number of bands": (lambda d: d["metadata"].update(bands=["g", "r"]), "3 PSFs"),
    "too few PSF pixels": (lambda d: d["metadata"]["psf"].pop(), "1875 numbers .*not 1874"),
    "PSFs of text": (lambda d: d["metadata"].update(psf_dtype="U4"), "floating point"),
    "a PSF with an even side": (
        lambda d: d["metadata"].update(model_psf=[1] * 6, model_psf_shape=[2, 3]),
        "odd sides",
    ),
    "a PSF without flux": (lambda d: d["metadata"].update(model_psf=[0] * 225), "no positive sum"),
    "a name that is no id": (lambda d: d.update(spam=d["1"]), "'spam' where an identifier"),
    "a parent that is a flat blend": (lambda d: d["1"].update(blend_type="blend"), "hierarchical type"),
    "a member of no kind": (lambda d: d.update({"7": {}}), "neither a blend"),
    "a source twice": (lambda d: d.update({"3": d["1"]}), "11 appears twice"),
    "a source under another id": (
        lambda d: d["1"]["children"]["1"]["sources"]["11"]["metadata"].update(id=12),
        "identifier 12",
    ),
    "no components": (lambda d: d["1"]["children"]["1"]["sources"]["11"].pop("components"), "lacks"),
    "an image that is too short": (lambda d: component(d)["morph"].pop(), "component 0, morph should be"),
    "a spectrum of other bands": (lambda d: component(d)["spectrum"].append(1), "spectrum should be"),
    "words in the image": (lambda d: component(d)["morph"].__setitem__(0, "1.0"), "nothing but numbers"),
    "lists in the image": (lambda d: component(d)["morph"].__setitem__(0, [1]), "nothing but numbers"),
    "numbers beyond any": (lambda d: component(d)["morph"].__setitem__(0, 10**400), "nothing but numbers"),
    "numbers that are not finite": (lambda d: component(d)["morph"].__setitem__(0, np.inf), "not finite"),
    "numbers too large": (lambda d: component(d)["spectrum"].__setitem__(0, 1e300), "not finite"),
    "a negative size": (lambda d: component(d).update(shape=[-4, -4]), "not positive"),
    "a huge size": (lambda d: d["1"]["children"]["1"].update(shape=[10**6, 10**6]), "larger than"),
    "an origin between pixels": (lambda d: component(d).update(origin=[0.5, 1]), "0.5"),
    "an origin out of the world": (lambda d: component(d).update(origin=[0, 10**12]), "positions"),
    "components far apart": (lambda d: component(d).update(origin=[0, 10**8]), "too far apart"),
    "an unknown component": (lambda d: component(d).update(component_type="wavelet"), "'wavelet'"),
    "a component of the future": (lambda d: component(d).update(version="1.1.0"), "1.1.0"),
    "a footprint of other values": (lambda d: d["2"]["span_array"].__setitem__(0, 2), "0 and 1 only"),
    "a footprint of too few bits": (lambda d: d["2"].update(span_array="AAAA"), "110 bits"),
    "a footprint that is no base64": (lambda d: d["2"].update(span_array="&&&&"), "base64"),
    "a member that is no JSON": (lambda d: d.update({"1": b'{"blend_type": '}), "member 1 is not JSON"),
    "a member that is nested": (lambda d: d.update({"1": b"[" * 10**6}), "member 1 is not JSON"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_are_refused(fault, ours):
    documents = members(to_bytes(ours))
    change, message = BROKEN[fault]
    change(documents)
    with pytest.raises(ScarletFileError, match=message):
        read(pack(documents))


def test_damaged_and_foreign_files_are_refused(ours, tmp_path):
    content = to_bytes(ours)
    path = tmp_path / "broken.scarlet"
    for wrong in (content[: len(content) // 2], b"", b"no zip", content[:2000] + b"?" + content[2001:]):
        path.write_bytes(wrong)
        with pytest.raises(ScarletFileError, match="broken.scarlet"):
            read(path)
    with pytest.raises(ScarletFileError, match="these are no scarlet models"):
        read(pack({"readme": "{}"}))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.scarlet")


def test_a_member_twice_is_refused(ours):
    stream = pack(members(to_bytes(ours)))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("1", "{}")
    with pytest.raises(ScarletFileError, match="same name"):
        read(stream)


def test_files_beyond_the_limits_are_refused(ours, monkeypatch):
    content = to_bytes(ours)
    monkeypatch.setattr(_read, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(ScarletFileError, match="more than 100 bytes"):
        read(io.BytesIO(content))
    monkeypatch.setattr(_read, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(ScarletFileError, match="more than 1000 bytes"):
        read(io.BytesIO(content))


def test_what_the_pipelines_could_not_use_is_not_written(deblended, ours, tmp_path):
    models, parents, psf = deblended
    with pytest.raises(ValueError, match="Source 14 belongs to parent 2"):
        models_to_scarlet(models, psf, parents[:1])
    with pytest.raises(ValueError, match="isolated source 1 has no peak"):
        models_to_scarlet(models, psf, parents[1:], parents[:1])
    with pytest.raises(ValueError, match="do not go with the bands"):
        models_to_scarlet(models, psf[:2], parents)
    with pytest.raises(ValueError, match="id 11"):
        models_to_scarlet(dataclasses.replace(models, id=np.array([11, 11, 12, 13])), psf, parents)
    path = tmp_path / "never.scarlet"
    for number, change, message in (
        (11, lambda s: s.components.clear(), "no component"),
        (11, lambda s: s.components[0].spectrum.fill(np.nan), "finite"),
        (12, lambda s: setattr(s, "id", 11), "another id"),
    ):
        wrong = copy.deepcopy(ours)
        change(wrong.sources()[number])
        with pytest.raises(ValueError, match=message):
            write(path, wrong)
    wrong = copy.deepcopy(ours)
    wrong.parents[1].blends[1].shape = (100, 100)
    with pytest.raises(ValueError, match="beyond its box"):
        write(path, wrong)
    assert not path.exists()
