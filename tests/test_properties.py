# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What holds for whatever comes in: scenes, tables and files that hypothesis makes up."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import synthetic
from astropy.table import Table
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lsst.meas.vaedeblend.adapters.scarlet_file import ScarletFileError, read
from lsst.meas.vaedeblend.catalog import models_table, object_table, parent_table
from lsst.meas.vaedeblend.deblender import DeblendConfig, deblend
from lsst.meas.vaedeblend.network import NetworkError
from lsst.meas.vaedeblend.posterior import sample_posterior
from lsst.meas.vaedeblend.redistribution import redistribute
from lsst.meas.vaedeblend.scene import PsfGrid, Scene, find_parents
from lsst.meas.vaedeblend.sources import SourceModels
from test_scarlet_file import deblended, members, ours, pack, to_bytes  # noqa: F401

BANDS = ("g", "r", "i")
MAX = float(np.finfo(np.float32).max)
SENTINELS = [np.nan, np.inf, -np.inf, MAX, -MAX, 1e30, -1e30, 1e10, -9999.0, 0.0, 1e-45]
# The same examples each time: what fails for one fails for all. Sessions of onnxruntime make numbers too
# small for full precision zero in their process, so that strategies must not make any.
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    # Most of a scene is one seed, of which nothing simpler can be made.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def scenes(draw, hostile: bool = True) -> Scene:
    """Scenes of a few Gaussians, with what coadds have and should not have."""
    shape = (draw(st.integers(3, 70)), draw(st.integers(3, 70)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(0, 5))
    x, y = rng.uniform(-3, shape[1] + 3, n), rng.uniform(-3, shape[0] + 3, n)
    flux = rng.uniform(0, 1, (n, 3)) * 10.0 ** draw(st.integers(0, 5))
    scene, _ = synthetic.make_scene(x, y, flux, rng.uniform(0.3, 3, n), shape=shape, seed=1, peaks=False)
    image, variance, valid = scene.image.copy(), scene.variance.copy(), scene.valid.copy()
    if draw(st.booleans()):
        valid &= rng.random(valid.shape) > draw(st.sampled_from([0.02, 0.3, 0.95, 1.0]))
    if draw(st.booleans()):
        valid[draw(st.integers(0, 2))] = False
    stamps = scene.psf.stamps[0].copy()
    if hostile:
        for array in (image, variance):
            for value in draw(st.lists(st.sampled_from(SENTINELS), max_size=4)):
                band, row, column = rng.integers(3), rng.integers(shape[0]), rng.integers(shape[1])
                size = draw(st.sampled_from([1, 2, 70]))
                array[band, row : row + size, column : column + size] = value
        kind = draw(st.sampled_from(["sound", "sound", "one missing", "none", "point", "negative", "huge"]))
        if kind == "one missing":
            stamps[draw(st.integers(0, 2))] = np.nan
        elif kind == "none":
            stamps[:] = np.nan
        elif kind == "point":
            stamps[:] = 0.0
            stamps[:, 12, 12] = 1.0
        elif kind == "negative":
            stamps -= 0.001
        elif kind == "huge":
            stamps *= 1e300
    detected = np.zeros(shape, bool)
    for parent in scene.parents:
        window, inside = parent.window(shape)
        detected[window] |= inside
    peaks = None
    if draw(st.booleans()):
        near = st.floats(-10, 80, allow_subnormal=False)
        far = st.sampled_from([1e19, -1e19, 1e9, -3e9, 2.0**31, 2.0**62])
        place = st.one_of(near, far) if hostile else near
        peaks = np.array(draw(st.lists(st.tuples(place, place), max_size=6)), float).reshape(-1, 2)
    parents = find_parents(detected, peaks)
    return Scene(
        BANDS, image, variance, valid, psf=PsfGrid.constant(stamps), pixel_scale=0.2, parents=parents
    )


@settings(SETTINGS, max_examples=30)
@given(scene=scenes())
def test_scenes_are_deblended_or_refused(network, gaussian_network, scene):
    """Every given peak is accounted for, and what has no flag has numbers."""
    for used in (network, gaussian_network):
        with warnings.catch_warnings():
            # Sentinels overflow what they are in; a place that fits into no integer would be anywhere.
            warnings.filterwarnings("error", message=".*in cast")
            try:
                result = deblend(scene, used)
            except (ValueError, NetworkError):
                # Refused with a reason, and only where nothing in it can be used.
                psfs = np.isfinite(scene.psf.moments).all(axis=2)
                assert not scene.valid.any() or not psfs.any()
                continue
        sources = result.sources
        assert {p.id for p in scene.parents} == set(result.parents.id.tolist())
        given_peaks = sum(len(parent.peaks) for parent in scene.parents)
        assert len(sources) >= given_peaks
        bad = np.zeros(len(sources), bool)
        for name in ("peak_outside", "masked", "not_finite", "fallback", "no_psf", "too_many_peaks"):
            bad |= sources.flags[name]
        missing = sources.flags["missing_band"]
        sound = ~bad & ~missing
        assert np.isfinite(sources.flux[sound]).all() and (sources.flux_err[sound] > 0).all()
        assert np.isfinite(sources.latent_mean).all() and np.isfinite(sources.x).all()
        assert result.residual.shape == scene.image.shape
        posterior = sample_posterior(sources, used, scene.psf, 2)
        for table in (
            object_table(sources, result.parents, posterior=posterior),
            parent_table(result.parents),
            models_table(sources),
        ):
            stream = io.BytesIO()
            table.write(stream, format="fits")
            assert len(Table.read(io.BytesIO(stream.getvalue()))) == len(table)


@settings(SETTINGS, max_examples=40)
@given(scene=scenes(hostile=False))
def test_redistributed_images_sum_to_the_coadd(network, scene):
    """Where a parent's models have light its pixels are given away whole, and nowhere else."""
    result = deblend(scene, network)
    models = result.sources
    images = redistribute(scene, models).astype(float)
    seen = np.maximum(models.observed, 0)
    total, light = np.zeros(scene.image.shape), np.zeros(scene.image.shape)
    size = images.shape[-1]
    for k in range(len(models)):
        inside = np.zeros(scene.shape, bool)
        window, footprint = next(p for p in scene.parents if p.id == models.parent[k]).window(scene.shape)
        inside[window] = footprint
        y0, x0 = int(models.corner_y[k]), int(models.corner_x[k])
        rows = slice(max(y0, 0), max(min(y0 + size, scene.shape[0]), 0))
        columns = slice(max(x0, 0), max(min(x0 + size, scene.shape[1]), 0))
        own = (
            slice(rows.start - y0, max(rows.stop, rows.start) - y0),
            slice(columns.start - x0, max(columns.stop, columns.start) - x0),
        )
        total[:, rows, columns] += images[k][:, *own]
        light[:, rows, columns] += seen[k][:, *own] * inside[rows, columns]
    lit = (light > 0) & scene.valid
    scale = np.abs(scene.image).astype(float) + np.abs(total)
    # Float32 shares of a pixel, of a few members.
    np.testing.assert_array_less(np.abs(total - scene.image)[lit], 1e-5 * scale[lit] + 1e-6)
    assert (total[~lit] == 0).all()


columns = st.sampled_from(
    ["x", "y", "parent", "flux", "corner_x", "latent_mean", "network", "fallback", "id"]
)
values = st.one_of(
    st.floats(allow_subnormal=False),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.text(max_size=3),
    st.none(),
)


@settings(SETTINGS, max_examples=150)
@given(column=columns, value=values, drop=st.booleans(), whole=st.booleans())
def test_altered_tables_of_models_are_refused_or_read(network, column, value, drop, whole):
    scene, _ = synthetic.make_scene([20.0, 30.0], [20.0, 40.0], [[300] * 3, [500] * 3], shape=(60, 60))
    table = _table(scene, network).copy()
    if column not in table.colnames:
        return
    if drop:
        table.remove_column(column)
    else:
        cells = [value] * len(table) if whole else [value, *list(table[column])[1:]]
        try:
            table.replace_column(column, Table({"c": cells})["c"])
        except (TypeError, ValueError, OverflowError):
            return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models = SourceModels.from_table(table, network, scene.psf, scene.origin)
    except ValueError as error:
        assert str(error)
        return
    assert len(models) == len(table) and models.latent_mean.shape == (2, network.metadata.latent_size)


_TABLES: dict[int, Table] = {}


def _table(scene: Scene, network) -> Table:
    """The models' table of a scene, deblended once."""
    if id(network) not in _TABLES:
        _TABLES[id(network)] = models_table(deblend(scene, network).sources)
    return _TABLES[id(network)]


numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(allow_subnormal=False),
    st.integers(-(10**30), 10**30),
    st.text(max_size=4),
)
junk = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@settings(SETTINGS, max_examples=200, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_altered_scarlet_files_are_refused_or_read(ours, data):  # noqa: F811
    documents = members(to_bytes(ours))
    for _ in range(data.draw(st.integers(1, 3))):
        where = documents
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            inner = where[key]
            if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 4)):
                where = inner
                continue
            if data.draw(st.booleans()):
                where[key] = data.draw(junk)
            elif isinstance(where, dict) or where is not documents:
                del where[key]
            break
    try:
        models = read(pack(documents))
    except ScarletFileError as error:
        assert str(error)
        return
    for source in models.sources().values():
        for component in source.components:
            assert np.isfinite(component.image()).all()


@settings(SETTINGS, max_examples=150, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_scarlet_files_are_refused_or_read(ours, at, bit, cut):  # noqa: F811
    content = bytearray(to_bytes(ours))
    place = at % len(content)
    if cut:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    try:
        models = read(io.BytesIO(bytes(content)))
    except ScarletFileError as error:
        assert str(error)
    else:
        # zip keeps times and the like that nobody reads.
        assert not cut and models.sources().keys() == ours.sources().keys()


@pytest.mark.parametrize("change", ["batch", "threads", "order"])
def test_the_same_input_gives_the_same_bytes(gaussian_path, change):
    """To the bit for the same call; to a hundredth of the errors where float32 sums take another order."""
    from lsst.meas.vaedeblend.network import Network

    rng = np.random.default_rng(1)
    x, y = rng.uniform(10, 118, 14), rng.uniform(10, 118, 14)
    scene, _ = synthetic.make_scene(x, y, rng.uniform(200, 900, (14, 3)), 1.2, shape=(128, 128))
    one = Network.load(gaussian_path, threads=1)
    config, other_config, other, same = DeblendConfig(), DeblendConfig(), one, scene
    if change == "batch":
        other_config.batchSize = 3
    elif change == "threads":
        other = Network.load(gaussian_path, threads=2)
    else:
        parts = ("bands", "image", "variance", "valid")
        same = Scene(
            *(getattr(scene, name) for name in parts),
            psf=scene.psf,
            pixel_scale=0.2,
            parents=scene.parents[::-1],
        )
    a, again = deblend(scene, one, config).sources, deblend(scene, one, config).sources
    b = deblend(same, other, other_config).sources
    order, match = np.lexsort((a.peak_x, a.parent)), np.lexsort((b.peak_x, b.parent))
    for name in ("flux", "flux_err", "latent_mean", "latent_sigma", "x", "y", "chi2"):
        assert getattr(a, name).tobytes() == getattr(again, name).tobytes(), name
    assert len(a) == len(b) > 10
    np.testing.assert_array_equal(a.peak_x[order], b.peak_x[match])
    flux, error = a.flux[order], a.flux_err[order]
    assert np.nanmax(np.abs(b.flux[match] - flux) / error) <= 0.01
    assert np.abs((b.latent_mean[match] - a.latent_mean[order]) / a.latent_sigma[order]).max() <= 0.01
    for name in a.flags:
        np.testing.assert_array_equal(a.flags[name][order], b.flags[name][match], err_msg=name)
