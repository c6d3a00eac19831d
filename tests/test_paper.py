# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report on Arcelin et al. (2020), with networks whose errors are known."""

import json
import shutil
from pathlib import Path

import galsim
import numpy as np
import pytest
from click.testing import CliRunner
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.evaluation import paper
from lsst.meas.vaedeblend.evaluation.paper_sample import SampleMaker
from lsst.meas.vaedeblend.network import Network, NetworkError, NetworkMetadata, embed_metadata
from lsst.meas.vaedeblend.simulation.banks import draw_sources, survey_of
from lsst.meas.vaedeblend.simulation.config import load_config
from synthetic import _Graph

CONFIGS = Path(__file__).parents[1] / "config" / "training"
LSST = tuple("ugrizy")
ALL = (*LSST, "IE", "YE", "JE", "HE")
SHAPE = 0.15
"""Ellipticity g1 of everything that the networks draw."""

SIGMA = 0.1
"""Width of their posterior, in the logarithm of the flux."""


def _write(directory: Path, name: str, bands: tuple[str, ...]) -> Path:
    """Write a network that always draws the same galaxy, with the flux in r within an aperture."""
    profile = galsim.Convolve(
        galsim.Exponential(half_light_radius=0.4).shear(g1=SHAPE), galsim.Kolmogorov(fwhm=0.65)
    )
    image = profile.drawImage(nx=64, ny=64, scale=0.2).array
    y, x = np.mgrid[:64, :64] - 31.5
    aperture = (np.hypot(x, y) < 8).astype(np.float32)
    b = len(bands)
    weights = np.zeros((b, 64, 64), np.float32)
    weights[2] = aperture / (aperture * image).sum()

    def decode(g: _Graph, latent: str) -> str:
        flux = g("Unsqueeze", g("Exp", latent), g.axes(2, 3))
        return g("Mul", flux, np.tile(image, (1, b, 1, 1)))

    g = _Graph()
    flux = g("Max", g("ReduceSum", g("Mul", "image", weights), g.axes(1, 2, 3), keepdims=0), 1.0)
    mean = g("Unsqueeze", g("Log", flux), g.axes(1))
    sigma = g("Add", g("Mul", mean, 0.0), SIGMA)
    model = decode(g, g("Add", mean, g("Mul", sigma, "epsilon")))
    inputs = {"image": ["N", b, 64, 64], "epsilon": ["N", 1]}
    outputs = {
        "model": (model, ["N", b, 64, 64]),
        "latent_mean": (mean, ["N", 1]),
        "latent_sigma": (sigma, ["N", 1]),
    }
    fields = dict(
        name=name,
        bands=bands,
        pixel_scale=0.2,
        cutout_size=64,
        latent_size=1,
        frame={"type": "observed", "fwhm": dict.fromkeys(bands, 0.65)},
        centre=(31.5, 31.5),
        training_range={},
        training={"samples": {"prior": 5000, "deblender": 7000}, "base": {"deblender": "another"}},
        figures_of_merit={},
        licence="GPL-3.0-or-later",
    )
    path = directory / f"{name}.onnx"
    deblender = NetworkMetadata(kind="deblender", **fields)
    path.write_bytes(embed_metadata(g.model(name, inputs, outputs), deblender))
    g = _Graph()
    drawn = {"model": (decode(g, "latent"), ["N", b, 64, 64])}
    graph = g.model(name, {"latent": ["N", 1]}, drawn)
    decoder = NetworkMetadata(kind="decoder", **fields)
    (directory / f"{name}_decoder.onnx").write_bytes(embed_metadata(graph, decoder))
    return path


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    where = tmp_path_factory.mktemp("artefacts")
    for name in ("lsst", "lsst_prior", "decentred_uniform", "decentred_peaks"):
        _write(where, f"arcelin2020_{name}", LSST)
    for name in ("lsst_euclid", "lsst_euclid_prior", "transfer"):
        _write(where, f"arcelin2020_{name}", ALL)
    return where


@pytest.fixture(scope="module")
def sample(artefacts):
    config = load_config(CONFIGS / "arcelin2020_lsst_euclid.py")
    maker = SampleMaker(config, 30)
    return maker, maker.run({"lsst": Network.load(artefacts / "arcelin2020_lsst.onnx")}, 120, examples=2)


def test_test_galaxies_are_in_no_training_sample(sample):
    maker, _ = sample
    config = load_config(CONFIGS / "arcelin2020_lsst.py")
    config.population.n_train, config.population.n_validation = 2000, 100
    train = draw_sources(config.population, survey_of(config))["train"]
    assert not np.isin(maker.population.hlr[:, 0], train.hlr[:, 0]).any()


def test_truth_is_that_of_the_blends(sample):
    maker, found = sample
    isolated = ~np.isfinite(found.b_closest)
    assert 10 < isolated.sum() < 60
    assert (found.b_total[isolated] == 0).all() and (found.b_total[~isolated] > 0).all()
    # The target is the brightest.
    assert (found.mag_difference[~isolated] > 0).all()
    magnitudes = maker.population.magnitude("r")
    # Light beyond the cutout is not summed; most galaxies have little there.
    nearest = np.abs(found.mag[:, None] - magnitudes).min(axis=1)
    assert np.median(nearest) < 0.01
    blend, models = found.examples[0]
    np.testing.assert_allclose(models["lsst"][0], models["lsst"][5], rtol=1e-6)
    assert blend.image.shape == (10, 64, 64)


def test_errors_are_those_of_the_network(sample):
    """All outputs have one shape, so nothing of the targets' is left: m = -1, and c = the shape drawn."""
    _, found = sample
    numbers = paper._numbers(found, "lsst", np.random.default_rng(0))
    for i in (1, 2):
        assert numbers[f"m{i}"] == pytest.approx(-1, abs=1e-3)
    assert numbers["m"] == pytest.approx(-1, abs=1e-3) and numbers["m_err"] < 1e-3
    assert numbers["c1"] == pytest.approx(SHAPE, abs=0.01)
    assert numbers["c2"] == pytest.approx(0, abs=1e-3)
    assert numbers["failed_shapes"] < 0.1
    isolated = ~np.isfinite(found.b_closest) & (found.mag < 24)
    assert np.abs(np.median(found.mag_error("lsst")[isolated])) < 0.3
    # Neighbours' light in the aperture makes blends too bright.
    assert np.median(found.mag_error("lsst")[~isolated]) < 0


def test_networks_of_other_bands_are_refused(sample, tmp_path):
    maker, _ = sample
    path = _write(tmp_path, "other", LSST[::-1])
    with pytest.raises(NetworkError, match="bands"):
        maker.run({"other": Network.load(path)}, 1)


def test_draws_have_the_posteriors_width(sample, artefacts):
    maker, found = sample
    network = Network.load(artefacts / "arcelin2020_lsst.onnx")
    blend, models = found.examples[0]
    drawn = paper._measured_draws(network, blend, maker, 300, np.random.default_rng(0))
    assert drawn[:, 2].std() == pytest.approx(2.5 / np.log(10) * SIGMA, rel=0.15)
    assert drawn[:, 0].std() < 1e-4
    flux = models["lsst"][2].sum()
    assert np.median(drawn[:, 2]) == pytest.approx(31.4 - 2.5 * np.log10(flux), abs=0.03)


def test_calibration_counts_the_truths_inside():
    rank = (np.arange(1000) + 0.5) / 1000
    (one, error), (two, _) = paper._inside(rank)
    assert (one, two) == (pytest.approx(0.68), pytest.approx(0.95))
    assert error == pytest.approx(np.sqrt(0.68 * 0.32 / 1000), rel=1e-3)
    assert paper._inside(np.full(10, 0.999))[1][0] == 0


def test_remarks_are_the_items_of_a_list(tmp_path):
    path = tmp_path / "remarks.md"
    assert paper._remarks(path) == []
    path.write_text(
        "# Title\n\nIntroduction.\n\n- *One*, over\n  two lines.\n- Two `more`.\n\nNot in the list.\n"
    )
    assert paper._remarks(path) == ["One, over two lines.", "Two more."]


def test_rows_say_by_how_much_a_number_is_missed():
    report = paper._Report()
    report.row("met", None, -0.02, within=0.03)
    report.row("missed", None, -0.05, within=0.03)
    report.row("too small", None, 1.5, at_least=2)
    report.row("large enough", None, 3.0, at_least=2)
    report.row("unknown", None, None, within=0.03)
    report.row("nothing wanted", 0.1, 5.0)
    missed = [row["missed_by"] for row in report.rows]
    assert missed == [None, pytest.approx(0.02), 0.5, None, None, None]
    wanted = ["within 0.03", "within 0.03", "at least 2", "at least 2", "within 0.03", None]
    assert [row["wanted"] for row in report.rows] == wanted


OPTIONS = [
    "--configs",
    str(CONFIGS),
    "--samples",
    "150",
    "--galaxies",
    "12",
    "--draws",
    "20",
    "--threads",
    "1",
]


def test_report_with_everything(artefacts, shared, tmp_path):
    real = shared / "data" / "cosmos_real" / "catalog.fits"
    arguments = ["evaluate", "paper", str(tmp_path), "--artefacts", str(artefacts), *OPTIONS]
    result = CliRunner().invoke(main, [*arguments, "--real-catalogue", str(real)])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "paper.json").read_text())
    assert summary["missing"] == []
    for key in ("lsst", "lsst_euclid", "decentred_uniform", "decentred_peaks", "transfer"):
        assert {"m", "m_err", "e_median_max", "mag_median_max"} <= set(summary[key])
        assert summary[key]["m"] == pytest.approx(-1, abs=0.01)
    rows = {row["name"]: row for row in summary["table"]}
    assert rows["m, LSST"]["paper"] == -0.056 and rows["m, LSST"]["ours"] == summary["lsst"]["m"]
    assert rows["m, LSST"]["wanted"] == "within 0.03"
    assert rows["m, LSST"]["missed_by"] == pytest.approx(0.97, abs=0.01)
    text = (tmp_path / "paper.html").read_text()
    figures = ["1", "3", "4", "5", "6", "7", "8", "9", "A1", "B1", "C1"]
    assert [f for f in figures if f"<h2>Figure {f}</h2>" not in text] == []
    assert "Calibration" in text and text.count("<img") == len(figures) + 1
    assert "What is missing" not in text
    for name in ("arcelin2020_lsst", "arcelin2020_lsst_prior", "arcelin2020_transfer"):
        line = f"Samples in the training of {name}: prior 5000, deblender 7000 from the weights of another."
        assert text.count(line) == 1


def test_report_says_what_is_missing(artefacts, tmp_path, monkeypatch):
    monkeypatch.setattr("lsst.meas.vaedeblend.network._files._ARTEFACTS", tmp_path / "nothing ships")
    monkeypatch.setattr("lsst.meas.vaedeblend.network._files._other_folders", lambda: ())
    (tmp_path / "some").mkdir()
    for path in artefacts.glob("arcelin2020_lsst.onnx"):
        shutil.copy(path, tmp_path / "some")
    shutil.copy(artefacts / "arcelin2020_lsst_decoder.onnx", tmp_path / "some")
    out = tmp_path / "out"
    arguments = ["evaluate", "paper", str(out), "--artefacts", str(tmp_path / "some"), *OPTIONS]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "paper.json").read_text())
    assert summary["lsst"]["m"] == pytest.approx(-1, abs=0.01)
    assert summary["transfer"] is None and summary["decentred_peaks"] is None
    missing = "\n".join(summary["missing"])
    assert "pip install meas_vaedeblend_paper" in missing
    for name in ("arcelin2020_lsst_prior", "arcelin2020_lsst_euclid", "arcelin2020_decentred_uniform"):
        assert name in missing
    text = (out / "paper.html").read_text()
    assert "Real galaxies" in missing
    assert "What is missing" in text and "Figure 6" in text and "Figure 9" not in text


def test_missing_configurations_are_one_line(tmp_path):
    arguments = ["evaluate", "paper", str(tmp_path), "--configs", str(tmp_path / "none")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "--configs" in result.output and "Traceback" not in result.output
