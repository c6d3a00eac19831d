# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""A short training lowers the loss, resumes, exports, and the artefact does what torch does."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lsst.meas.vaedeblend.cli import main
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.inference import Grids
from lsst.meas.vaedeblend.network import Network, NetworkError, read_metadata
from lsst.meas.vaedeblend.simulation.banks import make_banks
from lsst.meas.vaedeblend.simulation.config import TrainingConfig, load_config, training_length
from lsst.meas.vaedeblend.training import losses
from lsst.meas.vaedeblend.training.export import export_network, write_fit_graphs
from lsst.meas.vaedeblend.training.fit import SceneData, VaeModule, _start_from, fit_step, settle_norms
from lsst.meas.vaedeblend.training.history import run_history
from lsst.meas.vaedeblend.training.networks import Deblender
from lsst.meas.vaedeblend.training.weights import load_weights

REPOSITORY = Path(__file__).parents[1]


def _small_config() -> TrainingConfig:
    config = TrainingConfig()
    config.name = "small_gri"
    config.bands = ["g", "r", "i"]
    config.population.n_train, config.population.n_validation, config.population.n_test = 250, 60, 60
    config.scene.psf_bank_size = 30
    config.network.widths = [16, 24, 32]
    config.network.hidden, config.network.latent_size = 48, 12
    for step in (config.prior, config.deblender):
        step.batch_size, step.samples = 32, 32 * 50
        step.validation_batches, step.validation_every = 2, 10
        step.precision = "32-true"
        # A short run has no time for the warm-up that a long one affords.
        step.learning_rate = 4e-3
    return config


def _column(run: Path, step: str, name: str) -> list[float]:
    values = []
    for path in sorted((run / step).glob("version_*/metrics.csv")):
        with open(path, newline="") as stream:
            values += [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]
    return values


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Banks, a run of both steps and the exported files of a very small network."""
    where = tmp_path_factory.mktemp("training")
    torch.set_num_threads(1)
    config = _small_config()
    make_banks(config, where / "data")
    options = dict(accelerator="cpu", workers=0, progress=False)
    fit_step(config, "prior", where / "data", where / "run", **options)
    fit_step(config, "deblender", where / "data", where / "run", **options)
    path = export_network(config, where / "data", where / "run", where / "out", command="pytest")
    return config, where, path


def test_training_lowers_the_loss(trained):
    _, where, _ = trained
    prior = _column(where / "run", "prior", "val_loss")
    assert len(prior) == 5
    assert prior[-1] < 0.8 * prior[0]
    deblender = _column(where / "run", "deblender", "val_loss")
    assert deblender[-1] < deblender[0]


def test_decoder_is_frozen_in_the_second_step(trained):
    _, where, _ = trained
    prior, deblender = (
        torch.load(where / "run" / step / "final.ckpt", weights_only=True)["state_dict"]
        for step in ("prior", "deblender")
    )
    decoder = [k for k in prior if k.startswith("decoder.")]
    assert decoder and all(torch.equal(prior[k], deblender[k]) for k in decoder)
    encoder = [k for k in prior if k.startswith("encoder.") and k.endswith("weight")]
    assert any(not torch.equal(prior[k], deblender[k]) for k in encoder)


def test_artefact_states_what_it_is(trained):
    config, where, path = trained
    network = Network.load(path, bands=("g", "r", "i"), pixel_scale=0.2)
    m = network.metadata
    assert (m.name, m.cutout_size, m.latent_size, m.centre) == ("small_gri", 64, 12, (32.0, 32.0))
    assert m.figures_of_merit["onnx_torch_difference"] < 1e-4
    assert m.figures_of_merit["command"] == "pytest"
    again = TrainingConfig()
    again.loadFromString(m.training["config"])
    assert again == config
    card = (where / "out" / "small_gri.md").read_text()
    assert m.training["config_sha256"] in card and "shear_response_m" in card
    with pytest.raises(NetworkError, match="bands"):
        Network.load(path, bands=("r", "g", "i"))


def test_artefact_holds_no_path_of_the_machine(trained):
    _, where, path = trained
    package = str(Path(losses.__file__).parents[1]).encode()
    files = sorted(path.parent.glob("*.onnx"))
    assert [file.stem for file in files] == [
        "small_gri",
        *(f"small_gri_{k}" for k in ("decoder", "linearise", "render")),
    ]
    for file in files:
        data = file.read_bytes()
        assert b'File "' not in data and package not in data and str(where).encode() not in data


def test_artefact_takes_any_batch_size(trained):
    _, _, path = trained
    network = Network.load(path)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(7, 3, 64, 64)).astype(np.float32)
    valid, noise = np.ones_like(image), np.ones((7, 3), np.float32)
    moments = np.tile(np.float32([2, 2, 0]), (7, 3, 1))
    together = network.deblend(image, valid, noise, moments)
    apart = network.deblend(image, valid, noise, moments, batch_size=3)
    np.testing.assert_allclose(apart.model, together.model, rtol=1e-4, atol=1e-5 * together.model.max())
    drawn = network.decoder.render(together.latent_mean)
    np.testing.assert_allclose(drawn, together.model, rtol=1e-3, atol=1e-4 * together.model.max())


def test_graphs_for_fitting_draw_what_the_decoder_draws(trained):
    """In seeing that is the model frame's, so that the kernel does nothing."""
    _, _, path = trained
    network = Network.load(path)
    assert network.can_fit
    psf = np.tile(gaussian_psf(0.8, 25), (1, 3, 1, 1))
    grids = Grids(network.render, network.linearise, psf, np.tile([0.8**2, 0.8**2, 0.0], (1, 3, 1)))
    latent, cell = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32), np.zeros(5, np.int64)
    images, mixture = grids.draw(latent, cell, 40)
    expected = network.decoder.render(latent)[..., 12:52, 12:52]
    images = images * mixture.weight.sum(axis=2)[..., None, None]
    np.testing.assert_allclose(images, expected, atol=2e-3 * expected.max())
    flux, slope = grids.parameters(latent)
    np.testing.assert_allclose(np.exp(flux[..., 0]), mixture.weight.sum(axis=2), rtol=1e-4)
    assert slope.shape == (5, 3, 6, 12)


def test_graphs_for_fitting_are_written_anew(trained, tmp_path):
    config, _, path = trained
    write_fit_graphs(path, config, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "small_gri_linearise.onnx",
        "small_gri_render.onnx",
    ]
    for kind in ("render", "linearise"):
        old, new = (read_metadata(p.with_name(f"small_gri_{kind}.onnx")) for p in (path, tmp_path / "x"))
        assert new.kind == kind and new.weights_sha256 == old.weights_sha256


def test_interrupted_training_goes_on(trained, tmp_path):
    config, where, _ = trained
    short = _small_config()
    options = dict(accelerator="cpu", workers=0, progress=False)
    final = tmp_path / "prior" / "final.ckpt"
    # More than once: each time from where the last one was left, not the first.
    for run, steps in enumerate((10, 20, 30)):
        # What an interruption leaves: the last checkpoint without the final one.
        final.unlink(missing_ok=True)
        short.prior.samples = 32 * steps
        fit_step(short, "prior", where / "data", tmp_path, **options)
        assert torch.load(final, weights_only=True)["global_step"] == steps
        with open(tmp_path / "prior" / f"version_{run}" / "metrics.csv", newline="") as stream:
            logged = [int(row["step"]) for row in csv.DictReader(stream)]
        assert min(logged) >= steps - 10
    # A finished step is not run again.
    before = final.stat().st_mtime_ns
    fit_step(short, "prior", where / "data", tmp_path, **options)
    assert final.stat().st_mtime_ns == before


def test_training_starts_from_an_artefact(trained, tmp_path):
    """The graph of sums of Gaussians, too, keeps every weight by its name."""
    config, where, path = trained
    kept = load_weights(where / "run" / "deblender" / "final.ckpt")
    found = load_weights(path)
    counters = {name for name in kept if name.endswith("num_batches_tracked")}
    assert all(torch.equal(found[name], kept[name]) for name in kept.keys() - counters)
    short = _small_config()
    short.deblender.samples, short.deblender.learning_rate = 32, 1e-5
    options = dict(accelerator="cpu", workers=0, progress=False)
    final = fit_step(short, "deblender", where / "data", tmp_path, initial=path, **options)
    moved = load_weights(final)["encoder.dense.weight"] - kept["encoder.dense.weight"]
    assert 0 < moved.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["lsst_ugrizy", "hsc_grizy"])
def test_simplified_artefacts_give_first_weights(name):
    """What torch computes with their weights is what their graphs compute, on random cutouts with masks."""
    config = load_config(REPOSITORY / "config" / "training" / f"{name}.py")
    bands = len(config.bands)
    module = VaeModule(config, "prior", torch.zeros(0))
    _start_from(module, name)
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:64, :64] - 32.0
    light = rng.uniform(10, 1000, (6, bands, 1, 1)) * np.exp(-np.hypot(x, y) / 3)
    noise = rng.uniform(1, 8, (6, bands)).astype(np.float32)
    image = (light + noise[..., None, None] * rng.normal(size=light.shape[:2] + (64, 64))).astype(np.float32)
    valid = (rng.random(image.shape) > 0.1).astype(np.float32)
    moments = np.tile(np.float32([3.0, 3.3, 0.1]), (6, bands, 1))
    epsilon = rng.normal(size=(6, config.network.latent_size)).astype(np.float32)
    inputs = (image, valid, noise, moments, epsilon)
    found = Network.load(name).deblend(*inputs)
    with torch.no_grad():
        ours = Deblender(module.encoder, module.decoder).eval()(*map(torch.from_numpy, inputs))
    for a, b in zip(ours, (found.model, found.latent_mean, found.latent_sigma), strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-4 * np.abs(b).max())


def test_normalisations_get_statistics_without_changing_the_network(trained, tmp_path):
    """Batches are then normalised in training as they are afterwards."""
    config, where, path = trained
    scenes = SceneData(config, where / "data", "deblender", 0)
    module = VaeModule(config, "deblender", scenes.kernel_power())
    _start_from(module, path)
    norm = module.encoder.body[3]
    # As a simplified graph has it: folded into the convolution before.
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    with torch.no_grad():
        module.encoder.body[2].weight.mul_(scale[:, None, None, None])
        norm.bias.sub_(scale * norm.running_mean)
        norm.running_var.fill_(1.0 - norm.eps)
        norm.running_mean.zero_()
        norm.weight.fill_(1.0)
    batch = next(scenes.composer("validation")(np.random.default_rng(1)).batches(64))
    inputs = [
        torch.from_numpy(a) for a in (batch.image, np.float32(batch.valid), batch.noise, batch.psf_moments)
    ]
    with torch.no_grad():
        before = module.encoder.eval()(*inputs)
        settle_norms(module, scenes, 256)
        after = module.encoder.eval()(*inputs)
    np.testing.assert_allclose(after[0], before[0], atol=1e-3)
    assert norm.running_mean.abs().max() > 1e-3
    np.testing.assert_allclose(norm.weight.detach(), torch.sqrt(norm.running_var + norm.eps), rtol=1e-4)


def test_other_configurations_are_refused(trained, tmp_path):
    config, where, _ = trained
    options = dict(accelerator="cpu", workers=0, progress=False)
    other = _small_config()
    other.scene.min_snr = 7.0
    with pytest.raises(ValueError, match="final.ckpt was made with another configuration"):
        export_network(other, where / "data", where / "run", tmp_path, command="pytest")
    with pytest.raises(ValueError, match="final.ckpt was made with another configuration"):
        fit_step(other, "prior", where / "data", where / "run", **options)
    interrupted = tmp_path / "run" / "prior"
    interrupted.mkdir(parents=True)
    shutil.copy(where / "run" / "prior" / "last.ckpt", interrupted)
    with pytest.raises(ValueError, match="go on from was made with another configuration"):
        fit_step(other, "prior", where / "data", tmp_path / "run", **options)
    other = _small_config()
    other.population.mag_range = [19.0, 26.0]
    with pytest.raises(ValueError, match="npz was made with another configuration"):
        make_banks(other, where / "data")
    with pytest.raises(ValueError, match="npz was made with another configuration"):
        fit_step(other, "prior", where / "data", tmp_path / "new", **options)


def test_artefacts_tell_the_samples_that_were(trained, tmp_path):
    """Not those that were asked for: a run may end early, and start from weights that have seen others."""
    config, where, path = trained
    assert read_metadata(path).training["samples"] == {"prior": 1600, "deblender": 1600}
    long = _small_config()
    long.deblender.samples, long.deblender.validation_every = 32 * 10**6, 5
    options = dict(accelerator="cpu", workers=0, progress=False, command="vaedeblend train")
    fit_step(long, "deblender", where / "data", tmp_path, initial=path, hours=1e-3, **options)
    history = run_history(tmp_path, long, "deblender")["deblender"]
    assert history["samples"] % 32 == 0 and 0 < history["samples"] < 32 * 10**6
    assert history["hours"] > 1e-3 and history["commands"] == ["vaedeblend train"]
    assert history["initial"] == "small_gri.onnx"
    assert history["initial_samples"] == {"prior": 1600, "deblender": 1600}
    # The learning rate has come down.
    state = torch.load(tmp_path / "deblender" / "final.ckpt", weights_only=True)
    assert 0 < state["lr_schedulers"][0]["_last_lr"][0] < 0.1 * long.deblender.learning_rate
    again = export_network(long, where / "data", tmp_path, tmp_path / "out", command="pytest", samples=64)
    training = read_metadata(again).training
    assert training["samples"] == {"prior": 1600, "deblender": history["samples"]}
    assert "small_gri.onnx (1600 samples)" in training_length(training)


def test_weights_of_other_networks_are_refused(trained, tmp_path):
    config, where, path = trained
    options = dict(accelerator="cpu", workers=0, progress=False)
    with pytest.raises(ValueError, match="lsst_ugrizy does not fit"):
        fit_step(config, "prior", where / "data", tmp_path, initial="lsst_ugrizy", **options)
    decoder = path.with_name("small_gri_decoder.onnx")
    with pytest.raises(ValueError, match="does not fit .* encoder"):
        fit_step(config, "prior", where / "data", tmp_path, initial=decoder, **options)


def test_deblender_needs_its_prior(trained, tmp_path):
    config, where, _ = trained
    with pytest.raises(FileNotFoundError, match="prior"):
        fit_step(config, "deblender", where / "data", tmp_path, accelerator="cpu", workers=0, progress=False)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "config" / "training").glob("*.py")), ids=lambda p: p.stem
)
def test_shipped_configurations_load(path):
    assert load_config(path).name == path.stem


def test_cutouts_must_fit_the_encoder(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("config.scene.cutout_size = 60\n")
    with pytest.raises(ValueError, match="multiple of 16"):
        load_config(path)


def test_the_commands_make_a_network(tmp_path):
    """What the README says: simulate, train, export, each on its own."""
    config = _small_config()
    config.population.n_train, config.population.n_validation, config.population.n_test = 120, 40, 60
    for step in (config.prior, config.deblender):
        step.samples, step.validation_every, step.validation_batches = 64, 2, 1
    file, data, run, out = (tmp_path / name for name in ("tiny.py", "data", "run", "out"))
    config.save(str(file))
    runner = CliRunner()
    calls = (
        ["simulate", file, data],
        ["train", file, data, run, "--accelerator", "cpu", "--workers", "0", "--no-progress"],
        ["export", file, data, run, out],
    )
    for call in calls:
        result = runner.invoke(main, [str(word) for word in call])
        assert result.exit_code == 0, result.output
    metadata = Network.load(out / "small_gri.onnx").metadata
    assert metadata.training["command"].splitlines()[0] == "vaedeblend simulate config/training/tiny.py DATA"
    again = runner.invoke(main, ["simulate", str(file), str(data)])
    assert again.exit_code == 0


def test_a_missing_bank_is_one_clear_line(tmp_path):
    file = REPOSITORY / "config" / "training" / "lsst_ugrizy.py"
    result = CliRunner().invoke(main, ["train", str(file), str(tmp_path), str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "train.npz; `vaedeblend simulate` makes it." in result.output and "Traceback" not in result.output
