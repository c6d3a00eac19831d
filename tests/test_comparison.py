# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deblenders compared: who takes part, what is matched and measured, and who is called better."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from lsst.meas.vaedeblend.adapters.scarlet_file import read, render
from lsst.meas.vaedeblend.catalog import models_table, object_table
from lsst.meas.vaedeblend.deblender import deblend
from lsst.meas.vaedeblend.evaluation.comparison.entrants import (
    Stamp,
    from_stamps,
    load_entrants,
    parse_entrant,
)
from lsst.meas.vaedeblend.evaluation.comparison.matching import match_lists, separations
from lsst.meas.vaedeblend.evaluation.comparison.measures import Light, measure_objects, measure_pairs
from lsst.meas.vaedeblend.evaluation.comparison.patches import load_npz, read_patches
from lsst.meas.vaedeblend.evaluation.comparison.repository import is_tables, load_tables
from lsst.meas.vaedeblend.evaluation.comparison.result import compare_entrants
from lsst.meas.vaedeblend.evaluation.comparison.run import compare, score_stamps
from lsst.meas.vaedeblend.evaluation.comparison.sextractor import run_sep
from lsst.meas.vaedeblend.evaluation.comparison.statistics import (
    completeness,
    decide,
    median,
    spread,
    truth_verdicts,
    with_error,
)
from lsst.meas.vaedeblend.evaluation.fields import FieldFile
from lsst.meas.vaedeblend.evaluation.metrics import match
from lsst.meas.vaedeblend.ground.statistics import nmad
from test_fields import BANDS, FLUX, X, Y, write_field


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A field, and two deblenders: one that knows the truth, and one that gives all a half more light."""
    path = tmp_path_factory.mktemp("compare")
    arrays = write_field(path / "field_00.npz", X, Y, FLUX)
    for name, factor in (("right", 1.0), ("wrong", 1.5)):
        (path / name).mkdir()
        np.savez(path / name / "field_00.npz", model=arrays["stamp"] * np.float32(factor), seconds=2.0)
    return path


@pytest.fixture(scope="module")
def patch(directory):
    return read_patches(directory, 0.2)[0]


@pytest.fixture(scope="module")
def both(directory, patch):
    return [load_entrants(str(directory / name), name, [patch])[0] for name in ("right", "wrong")]


def test_stamps_move_between_squares():
    stamp = Stamp(np.arange(12, dtype=np.float32).reshape(1, 3, 4), 5, -2)
    np.testing.assert_array_equal(stamp.on(5, -2, 3, 4), stamp.pixels)
    np.testing.assert_array_equal(stamp.on(6, 0, 2, 3)[0], [[6, 7, 0], [10, 11, 0]])
    assert not stamp.on(50, 50, 2, 2).any()


def test_names_of_entrants():
    assert parse_entrant("mine=/some/where") == ("mine", "/some/where")
    assert parse_entrant("sep") == ("sep", "sep")
    assert parse_entrant("/a=b/field_00.scarlet") == ("field_00", "/a=b/field_00.scarlet")


def test_large_lists_match_as_small_ones():
    rng = np.random.default_rng(2)
    a = rng.uniform(0, 60, (150, 2))
    b = np.concatenate([a[:100] + rng.normal(0, 1.0, (100, 2)), rng.uniform(0, 60, (40, 2))])
    found = match_lists(a, b, 3.0)
    rows, other = match(a, b, 3.0)
    distance = np.hypot(*(a[found.first] - b[found.second]).T)
    assert len(found.first) == len(rows) and distance.max() <= 3.0
    assert (distance**2).sum() == pytest.approx((np.hypot(*(a[rows] - b[other]).T) ** 2).sum())
    # Everything is somewhere, once.
    assert sorted([*found.first, *found.merged, *found.missed]) == list(range(150))
    assert sorted([*found.second, *found.split, *found.added]) == list(range(140))


def test_what_has_no_partner():
    a = np.array([[10.0, 10.0], [14.5, 10.0], [50.0, 50.0]])
    found = match_lists(a, [[10.0, 10.5], [90.0, 90.0]], 3.0)
    assert (found.first.tolist(), found.second.tolist()) == ([0], [0])
    assert (found.merged.tolist(), found.missed.tolist()) == ([1], [2])
    assert (found.split.tolist(), found.added.tolist()) == ([], [1])
    assert match_lists(a, np.empty((0, 2)), 3.0).missed.tolist() == [0, 1, 2]
    np.testing.assert_allclose(separations(a), [4.5, 4.5, np.hypot(35.5, 40.0)])
    assert separations(a[:1]) == [np.inf]


def test_the_truth_leaves_noise_and_has_its_blendedness(patch, both):
    right = measure_objects(Light(both[0], patch))
    np.testing.assert_allclose(right["chi2"], 1.0, atol=0.15)
    np.testing.assert_allclose(right["flux"], FLUX, rtol=1e-3)
    total = np.hypot(X[0] - X[1], Y[0] - Y[1])
    assert right["separation"][0] == pytest.approx(total)
    # The two that overlap, the one alone.
    assert (right["deblend_blendedness"][:2] > 0.003).all() and abs(right["deblend_blendedness"][2]) < 1e-4
    np.testing.assert_allclose(right["centroid_x"][:3], X[:3], atol=0.1)
    assert measure_objects(Light(both[1], patch))["chi2"][0] > 2


def test_pairs_know_by_how_much_they_differ(patch, both):
    matches, columns = measure_pairs(*(Light(e, patch) for e in both), 3.0)
    assert matches.first.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(columns["flux"], 0.5, rtol=1e-4)
    np.testing.assert_allclose(columns["aperture"], 0.5, rtol=1e-4)
    # A factor for all objects alike shares out the coadd as before: measurement sees no difference.
    np.testing.assert_allclose(columns["redistributed"], 0, atol=1e-4)
    np.testing.assert_allclose(columns["colour"], 0, atol=1e-4)
    np.testing.assert_allclose(columns["overlap"], 1, atol=1e-6)
    np.testing.assert_allclose(columns["disagreement"], 1 / 3, rtol=1e-4)


def test_sep_measures_what_sextractor_does(patch):
    import sep

    entrant = run_sep(patch.scene)
    matches = match_lists(np.column_stack([X, Y]), np.column_stack([entrant.x, entrant.y]), 3.0)
    assert set(matches.first) == {0, 1, 2} and not len(matches.added)
    alone = int(matches.second[matches.first.tolist().index(2)])
    stamp = entrant.stamp(alone).pixels
    # Kron's ellipse loses little of a Gaussian, and the pixels' noise is its error.
    assert np.abs(entrant.flux[alone] / np.array(FLUX[2]) - 1).max() < 0.1
    np.testing.assert_allclose(entrant.flux_err[alone], np.sqrt((stamp[0] != 0).sum()), rtol=0.02)
    # sep's own sum over the same ellipse differs by pixels that the edge cuts.
    image = np.ascontiguousarray(patch.scene.image[1])
    data = np.ascontiguousarray(patch.scene.image.mean(axis=0))
    shape = [entrant.x[[alone]], entrant.y[[alone]]]
    moments = sep.extract(data, 1.5, err=1 / np.sqrt(3), filter_type="conv")
    row = [np.argmin(np.hypot(moments["x"] - shape[0], moments["y"] - shape[1]))]
    ellipse = [moments[key][row] for key in ("a", "b", "theta")]
    radius = sep.kron_radius(data, *shape, *ellipse, 6.0)[0]
    own = sep.sum_ellipse(image, *shape, *ellipse, 2.5 * radius, subpix=0)[0]
    assert entrant.flux[alone, 1] == pytest.approx(float(own[0]), rel=0.02)


def test_who_is_better_is_said_only_where_it_is_known():
    assert decide(0.3, 0.1) == "first" and decide(-0.3, 0.1) == "second"
    assert decide(0.15, 0.1) == "" and decide(0.0, 0.0) == "" and decide(np.nan, 0.1) == ""
    rng = np.random.default_rng(3)
    n = 120
    true = {"snr": np.full(n, 50.0), "blendedness": np.full(n, 0.1), "e": rng.normal(0, 0.2, (n, 2))}
    true |= {"star": np.zeros(n, bool), "large": np.zeros(n, bool)}

    def entrant(noise: float) -> dict[str, np.ndarray]:
        keys = ("flux", "aperture", "redistributed", "colour", "shift")
        columns = {key: rng.normal(0, noise, n) for key in keys}
        cosine = 1 - np.abs(rng.normal(0, noise, n))
        return {**columns, "cosine": cosine, "e": rng.normal(0, noise, (n, 2)), "found": np.ones(n, bool)}

    good, bad, equal = entrant(0.05), entrant(0.3), entrant(0.05)
    true["snr"][:2] = 7.0
    every = truth_verdicts(true, [good, bad, equal], repeats=60)
    count, verdicts = every["all"]
    n = 118
    by_name = {v.quantity: v for v in verdicts}
    assert count == n and set(every) == {"all", "blended", "galaxies"}
    for quantity in ("flux_meanabs", "flux_nmad", "gr_nmad", "cos_mean", "de_nmad"):
        first, same, last = by_name[quantity].pairs
        assert first["better"] == "first" and last["better"] == "second" and first["n"] == n
        assert abs(same["difference"]) < 4 * same["error"]
    # The error is that of a sample of this size.
    assert by_name["flux_median"].error[0] == pytest.approx(0.05 * np.sqrt(np.pi / 2 / n), rel=0.4)
    # Too few in common: nothing is said.
    bad["found"][8:] = False
    few = truth_verdicts(true, [good, bad], repeats=60)["all"][1]
    assert [v.pairs[0]["better"] for v in few[1:]] == [""] * (len(few) - 1)
    assert few[0].pairs[0]["better"] == "first"


def test_short_medians_are_numpys():
    for n in (1, 2, 7, 40):
        values = np.random.default_rng(n).normal(size=n)
        assert median(values) == np.median(values) and spread(values) == nmad(values)
    assert np.isnan(median(np.array([]))) and np.isnan(median(np.array([1.0, np.nan, 2.0])))


def test_errors_of_a_mean():
    values = np.random.default_rng(4).normal(3, 2, 400)
    value, error = with_error(np.mean, values)
    assert value == values.mean() and error == pytest.approx(0.1, rel=0.2)
    assert np.isnan(with_error(np.mean, np.array([np.nan]))[0])


def test_completeness_in_bins():
    count, share, interval = completeness(
        np.array([0.1, 0.2, 1.0, 1.5, 7.0]), np.array([True, False, True, True, True]), np.arange(4.0)
    )
    assert count.tolist() == [2, 2, 0] and share[:2].tolist() == [0.5, 1.0] and np.isnan(share[2])
    assert interval[0, 0] < 0.5 < interval[1, 0] and interval[1, 1] == pytest.approx(1.0)


def test_the_command_and_its_tables(directory, tmp_path):
    from astropy.table import Table

    spec = [f"right={directory / 'right'}", f"wrong={directory / 'wrong'}", "sep"]
    comparison = compare(spec, tmp_path, truth=str(directory))
    assert comparison.fates[0] == {"matched": 4, "merged": 0, "missed": 0, "split": None, "added": None}
    assert comparison.fates[2]["matched"] == 3 and comparison.fates[2]["missed"] == 1
    assert comparison.costs[0]["seconds"] == 0.5
    np.testing.assert_allclose(comparison.errors[1]["flux"], 0.5, rtol=1e-4)
    np.testing.assert_allclose(comparison.errors[0]["cosine"], 1, rtol=1e-6)
    metrics = Table.read(tmp_path / "metrics.ecsv")
    row = metrics[(metrics["versus"] == "wrong") & (metrics["metric"] == "flux in r, ratio - 1, median")]
    assert row["value"][0] == pytest.approx(0.5, rel=1e-4) and row["n"][0] == 3
    objects = Table.read(tmp_path / "objects.ecsv")
    assert set(objects["entrant"]) == {"right", "wrong", "sep"} and objects["r_flux"].unit == "nJy"
    # Given the truth's own pixels, pulls are those of noise; this is a matter of sep alone here.
    assert {c["entrant"] for c in comparison.coverages} == {2}


def test_without_truth_only_residuals_are_judged(directory, patch, both):
    bare = read_patches(directory, 0.2, truth=False)
    assert bare[0].truth is None
    arrays = load_npz(directory / "right" / "field_00.npz")
    with pytest.raises(ValueError, match="no positions, and there is no truth"):
        from_stamps("x", arrays, bare[0], "x.npz")
    truth = patch.truth
    own = {"x": truth.x, "y": truth.y, "stamp_x0": truth.stamp_x0, "stamp_y0": truth.stamp_y0}
    made = [
        [from_stamps(name, {"model": factor * arrays["model"], **own}, bare[0], "x.npz")]
        for name, factor in (("a", 1.0), ("b", 1.5))
    ]
    comparison = compare_entrants(bare, made)
    assert comparison.true is None and not comparison.verdicts and not comparison.fates
    (verdict,) = comparison.residual_verdicts()
    assert verdict["n"] == 3 and verdict["difference"] > 1
    with pytest.raises(ValueError, match="names of their own"):
        compare_entrants(bare, [made[0], made[0]])


def test_tables_of_this_deblender_take_part(directory, patch, network, network_path, tmp_path):
    field = FieldFile.read(directory / "field_00.npz")
    scene = field.scene(0.2, detect=False)
    result = deblend(scene, network)
    object_table(result.sources, result.parents).write(tmp_path / "objects.parquet")
    models_table(result.sources).write(tmp_path / "latents.parquet")
    assert is_tables(str(tmp_path)) and not is_tables(str(directory))
    (entrant,) = load_tables(str(tmp_path), "vae", [patch], str(network_path))
    np.testing.assert_allclose(entrant.flux, result.sources.flux, rtol=1e-6)
    np.testing.assert_allclose(entrant.flux_err, result.sources.flux_err, rtol=1e-6)
    for i in range(len(entrant)):
        own = result.sources.observed[i]
        np.testing.assert_allclose(entrant.stamp(i).pixels, own, atol=1e-3 * own.max())
    assert entrant.n_bytes == (tmp_path / "latents.parquet").stat().st_size
    (tmp_path / "objects.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*objects\.parquet"):
        load_tables(str(tmp_path), "vae", [patch])


def test_files_that_are_not_sound_are_refused(directory, patch, tmp_path):
    model = np.zeros((4, 3, 64, 64), np.float32)
    for arrays, message in (
        ({"modle": model}, "has no array 'model'"),
        ({"model": model[:, :2]}, r"should be \(N, 3, S, S\)"),
        ({"model": model[:3]}, r"the truth \(4, 3, 64, 64\)"),
        ({"model": model, "x": np.zeros(4)}, "own positions need"),
        ({"model": model, "flux": np.zeros((4, 2))}, "flux should be"),
        (
            {"model": model, **dict.fromkeys(("x", "y", "stamp_x0", "stamp_y0"), np.full(4, np.nan))},
            "should hold 4 positions",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_stamps("x", arrays, patch, "x.npz")
    path = tmp_path / "field_00.npz"
    np.savez(path, model=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_entrants(str(tmp_path), "x", [patch])
    path.write_bytes(b"no zip file")
    with pytest.raises(ValueError, match="no npz file"):
        load_entrants(str(tmp_path), "x", [patch])
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no field_00.npz and no field_00.scarlet"):
        load_entrants(str(tmp_path / "none"), "x", [patch])
    with pytest.raises(ValueError, match="what images to compare on"):
        compare(["sep", str(directory / "right")], tmp_path)
    np.savez(path, bands=np.array(BANDS))
    with pytest.raises(ValueError, match="this is no field file"):
        read_patches(path, 0.2)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_who_finds_nothing_takes_part_and_dead_bands_do_no_harm(directory, tmp_path):
    arrays = load_npz(directory / "field_00.npz")
    arrays["bands"] = np.array(["J", "$H_", "K<"])
    arrays["variance"][0] = np.inf
    arrays["image"][:, :40] = np.nan
    for name, model in (("none", np.nan * arrays["stamp"]), ("dark", -arrays["stamp"])):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "field_00.npz", model=model)
    np.savez(tmp_path / "field_00.npz", **arrays)
    spec = [str(tmp_path / "none"), str(tmp_path / "dark"), "sep"]
    comparison = compare(spec, tmp_path / "out", truth=str(tmp_path))
    assert comparison.costs[0]["objects"] == 0 and comparison.fates[0]["missed"] == 4
    assert comparison.fates[1]["matched"] == 4 and not comparison.errors[1]["found"].any()
    text = (tmp_path / "out" / "compare.html").read_text()
    assert "K&lt;" in text and "K<" not in text and "No verdict" in text


def test_huge_files_are_refused(directory, monkeypatch):
    from lsst.meas.vaedeblend.evaluation.comparison import patches

    monkeypatch.setattr(patches, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than the 1000"):
        read_patches(directory, 0.2)


def test_scarlet_files_take_part(shared):
    name = "field_01"
    patches = read_patches(shared / "data" / "fields" / f"{name}.npz", 0.2)
    path = shared / "data" / "scarlet" / f"{name}.scarlet"
    (entrant,) = load_entrants(str(path), "scarlet", patches)
    notes = json.loads(path.with_suffix(".json").read_text())
    assert len(entrant) == len(notes["objects"])
    place = {o["id"]: (o["x"], o["y"]) for o in notes["objects"]}
    for number, x, y in zip(entrant.id.tolist(), entrant.x, entrant.y, strict=True):
        assert place[number] == pytest.approx((x, y), abs=1.0)
    assert entrant.n_bytes == path.stat().st_size and 0 < entrant.seconds < 60
    models = read(path)
    source = next(iter(models.sources().values()))
    image, (y0, x0) = render(models, source, observed=True)
    stamp = entrant.stamp(0)
    assert (stamp.y0, stamp.x0) == (y0 - notes["y0"], x0 - notes["x0"])
    np.testing.assert_array_equal(stamp.pixels, image)
    # An isolated source is the coadd in its footprint, and no model.
    assert entrant.is_model.sum() == len(models.sources())
    lone = measure_objects(Light(entrant, patches[0]))["chi2"][len(models.sources()) :]
    assert len(lone) == len(models.isolated) and np.isnan(lone).all()


def test_scores_are_the_benchmarks_own(shared, tmp_path):
    fields, results = tmp_path / "fields", tmp_path / "results"
    for folder, source in ((fields, "fields"), (results, "fields_scarlet")):
        folder.mkdir()
        for name in ("field_01.npz", "field_05.npz"):
            (folder / name).symlink_to(shared / "data" / source / name)
    score = score_stamps(fields, results, tmp_path / "out")
    script = [sys.executable, shared / "tools" / "score.py", fields, results, "--json", tmp_path / "s.json"]
    subprocess.run(script, check=True, capture_output=True)
    theirs = json.loads((tmp_path / "s.json").read_text())
    ours = json.loads((tmp_path / "out" / "score.json").read_text())
    assert ours == score and ours["seconds_per_object"] == pytest.approx(theirs["seconds_per_source"])
    compared = 0
    for name, numbers in ours["classes"].items():
        for key in set(numbers) & set(theirs[name]) - {"n"}:
            assert numbers[key][0] == pytest.approx(theirs[name][key], abs=1e-6), (name, key)
            compared += 1
    assert compared > 40
