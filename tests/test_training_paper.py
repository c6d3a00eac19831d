# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The simulations and networks of Arcelin et al. (2020), against its numbers and direct GalSim drawings."""

import csv
import dataclasses
from pathlib import Path

import galsim
import numpy as np
import onnx
import pytest
import scipy.stats
import torch
from lsst.meas.vaedeblend.network import Network, NetworkError
from lsst.meas.vaedeblend.simulation import blends as bl
from lsst.meas.vaedeblend.simulation import population as pop
from lsst.meas.vaedeblend.simulation.banks import draw_sources, make_banks, sample_banks, survey_of
from lsst.meas.vaedeblend.simulation.config import BETA, TrainingConfig, load_config
from lsst.meas.vaedeblend.simulation.galaxies import component_profile, galaxy_profile
from lsst.meas.vaedeblend.training.convolutional import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    _PReLU,
    denormalise,
    normalise,
)
from lsst.meas.vaedeblend.training.export import export_network
from lsst.meas.vaedeblend.training.fit import VaeModule, _response, fit_step
from lsst.meas.vaedeblend.training.losses import bernoulli_loss, logarithmic
from lsst.meas.vaedeblend.training.weights import load_weights

CONFIGS = Path(__file__).parents[1] / "config" / "training"


def _config(name: str, n: int = 40) -> TrainingConfig:
    config = load_config(CONFIGS / f"{name}.py")
    config.population.n_train = config.population.n_validation = config.population.n_test = n
    return config


@pytest.fixture(scope="module")
def euclid():
    config = _config("arcelin2020_lsst_euclid")
    population = draw_sources(config.population, survey_of(config))["train"]
    return config, population, sample_banks(config, population, np.random.default_rng(1))


def test_processes_render_the_same(euclid):
    config, population, banks = euclid
    shared = sample_banks(config, population[:3], np.random.default_rng(1), processes=2)
    alone = sample_banks(config, population[:3], np.random.default_rng(1))
    for role, instruments in shared.banks.items():
        assert [b.bands for b in instruments] == [b.bands for b in banks.banks[role]]
        for found, expected in zip(instruments, alone.banks[role], strict=True):
            assert (found.stamps == expected.stamps).all() and (found.offset == expected.offset).all()


def _composer(config, banks, seed=0, **options):
    rng = np.random.default_rng(seed)
    return bl.BlendComposer(banks, survey_of(config), config.blend, 64, rng, **options)


def test_surveys_have_the_papers_exposures(euclid):
    survey = survey_of(euclid[0])
    assert survey.band_names == ("u", "g", "r", "i", "z", "y", "IE", "YE", "JE", "HE")
    assert [round(i.pixel_scale, 3) for i in survey.instruments] == [0.2, 0.1, 0.3]
    # Visits of 30 s: 1 nJy is 31.4 mag, and surveycodex's zeropoints give 1 electron/s.
    zeropoints = [26.44, 28.29, 28.13, 27.81, 27.42, 26.59, 25.92, 24.99, 25.17, 25.11]
    seconds = [30 * n for n in (56, 80, 184, 184, 160, 160)] + [1800] * 4
    for band, zeropoint, s in zip(survey.bands, zeropoints, seconds, strict=True):
        assert band.counts_per_njy == pytest.approx(s * 10 ** (-0.4 * (31.4 - zeropoint)), rel=1e-6)
    # VIS: sky of 22.3203 mag per square arcsec on pixels of 0.01 square arcsec.
    sky = 1800 * 0.01 * 10 ** (-0.4 * (22.3203 - 25.92))
    assert survey.bands[6].sky_counts == pytest.approx(sky, rel=1e-4)


def test_population_is_the_papers(euclid):
    _, population, _ = euclid
    assert (population.magnitude("r") < 27.5).all()
    assert not np.isin(population.kind, (pop.KNOTS, pop.STAR)).any()
    # Without colour gradients every component has the colour of the whole.
    share = population.flux / population.total_flux[:, None]
    assert np.ptp(share, axis=2).max() < 1e-12
    np.testing.assert_allclose(share.sum(axis=1), 1.0)


def test_samples_share_no_galaxy(tmp_path):
    config = _config("arcelin2020_lsst", 15)
    samples = draw_sources(config.population, survey_of(config))
    ids = np.concatenate([s.source_id for s in samples.values()])
    assert len(ids) == len(np.unique(ids)) == 45


def test_targets_are_what_galsim_draws(euclid):
    """In the middle of 64 pixels, at each instrument's scale and with its PSF."""
    config, population, banks = euclid
    bands = {"r": (2, 0.2), "IE": (6, 0.1), "JE": (8, 0.3)}
    psfs = {
        "r": galsim.Kolmogorov(fwhm=0.65),
        "IE": galsim.Moffat(beta=2.5, fwhm=0.18),
        "JE": galsim.Moffat(beta=2.5, fwhm=0.22),
    }
    for row in (0, 11, 25):
        found = np.concatenate([b.stamps[row] * b.flux[row][:, None, None] for b in banks.banks["target"]])
        for band, (index, scale) in bands.items():
            profile = galsim.Convolve(galaxy_profile(population, row, band), psfs[band])
            image = profile.drawImage(nx=64, ny=64, scale=scale).array
            assert np.abs(found[index] - image).max() < 1e-3 * image.max()


def test_neighbours_are_in_the_annulus_in_all_instruments(euclid):
    config, _, banks = euclid
    places = [b.offset * b.pixel_scale for b in banks.banks["neighbour"]]
    distance = np.hypot(*places[0].T)
    assert distance.min() >= 0.325 - 1e-6 and distance.max() <= 2.0 + 1e-6
    for place in places[1:]:
        np.testing.assert_allclose(place, places[0], atol=1e-5)
    # The light is where the offset says: VIS, whose stamps are the sharpest.
    bank = banks.banks["neighbour"][1]
    y, x = np.mgrid[:64, :64] - 31.5
    inner = np.hypot(*(bank.offset).T) < 15
    weights = bank.stamps[inner] * (
        np.hypot(x - bank.offset[inner, :1, None], y - bank.offset[inner, 1:, None]) < 8
    )
    centroid = np.stack([(weights * a).sum((1, 2)) for a in (x, y)], axis=1) / weights.sum((1, 2))[:, None]
    assert np.abs(centroid - bank.offset[inner]).max() < 0.2


def test_blends_are_the_papers(euclid):
    config, _, banks = euclid
    composer = _composer(config, banks)
    blends = [composer.blend() for _ in range(400)]
    counts = np.bincount([len(b.rows) for b in blends], minlength=5)[1:]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    flux = banks.total_flux[:, 2]
    for blend in blends:
        assert len(set(blend.rows)) == len(blend.rows)
        assert flux[blend.rows[0]] == flux[blend.rows].max()
        assert not blend.position[0].any()
        distance = np.hypot(*blend.position[1:].T)
        assert ((distance > 0.324) & (distance < 2.001)).all()
        if len(blend.rows) > 1:
            assert distance[blend.closest - 1] == distance.min()
        else:
            assert blend.closest is None
    isolated = _composer(config, banks, isolated=True).blend()
    assert len(isolated.rows) == 1


@pytest.mark.parametrize("sky", [200.0, 2000.0])
def test_noise_is_that_of_sky_and_source(euclid, sky):
    """Variance (source + sky) in electrons, mean without the sky; on both sides of the Gaussian limit."""
    import dataclasses

    band = dataclasses.replace(survey_of(euclid[0]).bands[6], sky_counts=sky, counts_per_njy=10.0)
    noisy = bl.poisson_noise(np.full((300, 300), 50.0), band, np.random.default_rng(0))
    assert noisy.mean() == pytest.approx(50.0, abs=4 * np.sqrt(sky + 500) / 10 / 300)
    assert noisy.var() == pytest.approx((sky + 500) / 100, rel=0.03)
    assert scipy.stats.skew(noisy.ravel()) == pytest.approx((sky + 500) ** -0.5, abs=0.04)


def _centroid(image: np.ndarray) -> np.ndarray:
    """Adaptively weighted centroid (x, y) of a 64-pixel image, arcsec from its middle."""
    found = galsim.hsm.FindAdaptiveMom(galsim.Image(image, xmin=0, ymin=0))
    return 0.2 * (np.array([found.moments_centroid.x, found.moments_centroid.y]) - 31.5)


def test_flips_and_turns_keep_targets_centred(euclid):
    config, _, banks = euclid
    composer = _composer(config, banks)
    for _ in range(20):
        target = composer.blend().target
        for band in (2, 6, 8):
            assert np.abs(_centroid(target[band])).max() < 0.005


@pytest.fixture(scope="module")
def uniform():
    config = _config("arcelin2020_decentred_uniform", 30)
    population = draw_sources(config.population, survey_of(config))["train"]
    return config, sample_banks(config, population, np.random.default_rng(2))


def test_uniform_decentring_fills_one_pixel(uniform):
    config, banks = uniform
    composer = _composer(config, banks)
    blends = [composer.blend() for _ in range(200)]
    places = np.array([b.position[0] for b in blends])
    assert np.abs(places).max() <= 0.1
    for axis in (0, 1):
        assert scipy.stats.kstest(places[:, axis], scipy.stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    for blend in blends[:40]:
        np.testing.assert_allclose(_centroid(blend.target[2]), blend.position[0], atol=0.01)
        # The neighbours are in the annulus about the target, wherever that is.
        distance = np.hypot(*(blend.position[1:] - blend.position[0]).T)
        assert ((distance > 0.324) & (distance < 2.001)).all()


def test_shifted_images_are_what_galsim_draws_there():
    profile = galsim.Convolve(galsim.Exponential(half_light_radius=0.3), galsim.Kolmogorov(fwhm=0.65))
    image, there = (p.drawImage(nx=96, ny=96, scale=0.2).array for p in (profile, profile.shift(0.08, -0.03)))
    found = bl._shifted(image[None], np.array([0.4, -0.15]))[0]
    assert np.abs(found - there).max() < 1e-3 * there.max()


def test_decentring_needs_well_sampled_pixels(euclid):
    config, _, banks = euclid
    decentred = TrainingConfig()
    decentred.blend.decentring = "uniform"
    with pytest.raises(ValueError, match="one instrument"):
        bl.BlendComposer(banks, survey_of(config), decentred.blend, 64, np.random.default_rng(0))


def test_brightest_peak_is_found_to_part_of_a_pixel():
    y, x = np.mgrid[:64, :64]
    image = 5 * np.exp(-0.5 * ((x - 20.3) ** 2 + (y - 31.8) ** 2) / 2.0)
    image += 3 * np.exp(-0.5 * ((x - 40) ** 2 + (y - 10) ** 2) / 2.0)
    np.testing.assert_allclose(bl.brightest_peak(image, 1.0, 5), [20.3, 31.8], atol=0.1)
    assert bl.brightest_peak(image, 6.0, 5) is None


def test_beta_prime_draws_follow_their_fit():
    """The fit finds the parameters of its own draws, and the draws point everywhere."""
    truth = {"a": 3.0, "b": 4.0, "scale": 0.05}
    rng = np.random.default_rng(6)
    drawn = np.array([bl.draw_centring_error(truth, rng) for _ in range(4000)])
    length = np.hypot(*drawn.T)
    assert scipy.stats.kstest(length, scipy.stats.betaprime(**truth).cdf).pvalue > 1e-3
    fit = bl.fit_centring_error(length)
    grid = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(
        scipy.stats.betaprime(**fit).ppf(grid), scipy.stats.betaprime(**truth).ppf(grid), rtol=0.1
    )
    angle = np.arctan2(drawn[:, 1], drawn[:, 0])
    assert scipy.stats.kstest(angle, scipy.stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


def test_peaks_centre_the_galaxy_they_belong_to(tmp_path):
    config = _config("arcelin2020_decentred_peaks", 25)
    config.blend.centring_blends = 60
    make_banks(config, tmp_path)
    survey = survey_of(config)
    banks = bl.BlendBanks.load(tmp_path, "train", survey)
    assert set(banks.centring) == {"a", "b", "scale"}
    composer = _composer(config, banks)
    for _ in range(40):
        blend = composer.blend()
        assert blend.image.shape == (6, 64, 64)
        # The crop is made at the corner nearest to the centroid, which is nearest to the target's centre.
        assert np.abs(blend.centroid).max() <= 0.1 + 1e-9
        distance = np.hypot(*(blend.position - blend.centroid).T)
        assert distance.argmin() == 0
        np.testing.assert_allclose(_centroid(blend.target[2]), blend.position[0], atol=0.02)
    isolated = _composer(config, banks, isolated=True)
    errors = [np.hypot(*isolated.blend().position[0]) for _ in range(50)]
    assert 0.02 < np.median(errors) < 0.5
    banks.centring = None
    with pytest.raises(ValueError, match="centring"):
        _composer(config, banks, isolated=True)


@pytest.mark.parametrize("bands", [6, 10])
def test_parameters_are_those_of_figure_2(bands):
    """2.5 and 3.3 million; to the unit, by hand, for the layers that the paper lists."""
    encoder, decoder = ConvolutionalEncoder(bands, 64, 32), ConvolutionalDecoder(bands, 64, 32)
    widths = (32, 64, 128, 256)
    count, channels, grid = 0, bands, 64
    for w in widths:
        count += (9 * channels + 1) * w + w * grid**2 + (9 * w + 1) * w + w * (grid // 2) ** 2
        channels, grid = w, grid // 2
    count += (256 * 16 + 1) * 256 + 256 + 2 * (256 + 1) * 32
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert round(count / 1e6, 1) == 2.5 if bands == 6 else round(count / 1e6, 2) == 2.55
    decoded = sum(p.numel() for p in decoder.parameters())
    assert round(decoded / 1e6, 1) == 3.3


def test_signals_keep_their_size_through_fresh_networks():
    """What differs between images, or between latents, reaches the last layer hardly weaker."""
    torch.manual_seed(6)
    encoder, decoder = ConvolutionalEncoder(6, 64, 32).eval(), ConvolutionalDecoder(6, 64, 32).eval()
    with torch.no_grad():
        features = encoder.body(torch.randn(16, 6, 64, 64))
        drawn = decoder.body(torch.randn(16, 32))
        latent, sigma = encoder(torch.randn(2, 6, 64, 64))
    for signal in (features, drawn):
        assert 0.1 < signal.std(dim=0).mean() < 3.0
    assert torch.isfinite(latent).all() and (sigma < 1.0).all()
    # The drawing itself starts as sky, nearly the same everywhere.
    logits = decoder.logits(torch.randn(4, 32))
    assert -6.0 < logits.mean() < -4.0 and logits.std() < 1.0


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_rectifier_has_the_gradient_of_its_definition(order):
    """max(0, x) + slope min(0, x), whatever the order of the pixels in memory."""
    torch.manual_seed(7)
    layer = _PReLU(3, 4, 4).double()
    layer.weight.data.normal_()
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64).contiguous(memory_format=order).requires_grad_()
    direction = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    found = layer(x)
    expected = x.clamp(min=0) + layer.weight * x.clamp(max=0)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad((found * direction).sum(), [x, layer.weight])
    theirs = torch.autograd.grad((expected * direction).sum(), [x, layer.weight])
    torch.testing.assert_close(ours, theirs)


def test_normalisation_is_equation_4():
    scale = torch.tensor([10.0, 300.0], dtype=torch.float64)
    image = torch.tensor([[-3.0, 2.0, 40.0], [-3.0, 200.0, 4000.0]], dtype=torch.float64)[None, :, None]
    expected = np.tanh(np.arcsinh(BETA * image.numpy() / scale.numpy()[:, None, None]))
    found = normalise(image, scale)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    bright = image[..., 1:]
    again = denormalise(torch.logit(normalise(bright, scale)), scale)
    np.testing.assert_allclose(again.numpy(), bright.numpy(), rtol=1e-9)


def test_bernoulli_loss_by_hand():
    """Two pixels, expected 0.5 and 0.2 for targets 1 and 0.2; latent mean 1, sigma 1: divergence 1/2."""
    logits = torch.logit(torch.tensor([0.5, 0.2]))[None, None, None]
    target = torch.tensor([1.0, 0.2])[None, None, None]
    terms = bernoulli_loss(logits, target, torch.ones(1, 1), torch.ones(1, 1), kl_weight=0.01)
    assert terms.total.item() == pytest.approx(np.log(2) + 0.005, rel=1e-5)
    assert terms.kl.item() == pytest.approx(0.5)


def test_exposures_of_a_blend_count_by_their_mean():
    """Two exposures of one pixel, expected 0.2 and 0.6 for a target of 0.4: no loss but the divergence's."""
    logits = torch.logit(torch.tensor([0.2, 0.6, 0.9, 0.5]))[:, None, None, None].requires_grad_()
    target = torch.tensor([0.4, 0.2])[:, None, None, None]
    mean = torch.tensor([[1.0], [2.0], [0.0], [0.0]])
    terms = bernoulli_loss(logits, target, mean, torch.ones(4, 1), kl_weight=0.1, exposures=2)
    second = 0.2 * np.log(0.2 / 0.7) + 0.8 * np.log(0.8 / 0.3)
    assert terms.total.tolist() == pytest.approx([0.1 * (0.5 + 2.0) / 2, second], rel=1e-5)
    terms.total.sum().backward()
    assert logits.grad[:2].abs().max() < 1e-6 and (logits.grad[2:] > 0.01).all()


def test_one_exposure_is_the_loss_of_each_image():
    generator = torch.Generator().manual_seed(5)
    logits = 5 * torch.randn(3, 2, 4, 4, generator=generator)
    target = torch.rand(3, 2, 4, 4, generator=generator)
    same = torch.zeros(6, 1), torch.ones(6, 1), 0.01
    twice = bernoulli_loss(logits.repeat_interleave(2, 0), target, *same, exposures=2)
    once = bernoulli_loss(logits, target, *(x[:3] for x in same[:2]), 0.01)
    torch.testing.assert_close(twice.total, once.total, rtol=1e-4, atol=1e-4)


def test_noise_of_the_truth_pulls_nothing_in_the_mean():
    """Two noisy truths of a pixel, -0.1 and 0.3, ask for what their mean 0.1 asks for; clipped, for 0.15."""
    logits = torch.logit(torch.tensor(0.1)).repeat(2)[:, None, None, None].requires_grad_()
    target = torch.tensor([-0.1, 0.3])[:, None, None, None]
    same = torch.zeros(2, 1), torch.ones(2, 1), 0.01
    for exposures in (1, 2):
        images = logits.repeat_interleave(exposures, 0)
        terms = bernoulli_loss(images, target, *(x.repeat(exposures, 1) for x in same[:2]), 0.01, exposures)
        (gradient,) = torch.autograd.grad(terms.total.sum(), logits)
        assert gradient.flatten().tolist() == pytest.approx([0.2, -0.2], abs=1e-6)


def test_exposures_differ_in_their_noise_alone(euclid):
    config, _, banks = euclid
    batch = next(_composer(config, banks, exposures=3).batches(6))
    assert len(batch) == 6
    for i in (0, 3):
        assert (batch.target[i : i + 3] == batch.target[i]).all()
        difference = batch.image[i + 1] - batch.image[i]
        corner = difference[:6, :8, :8].std(axis=(1, 2)) / batch.noise[i, :6]
        assert corner == pytest.approx(np.full(6, 2**0.5), rel=0.3)
    assert (batch.target[0] != batch.target[3]).any()


def test_exposures_fill_a_batch_of_blends():
    config = _config("arcelin2020_lsst")
    config.deblender.batch_size, config.deblender.exposures = 32, 5
    with pytest.raises(ValueError, match="multiple"):
        config.validate()


def test_large_losses_count_by_their_logarithm():
    """knee log(1 + L / knee): slope 1 for small losses, knee / (knee + L) for others; negative ones stay."""
    loss = torch.tensor([-30.0, 1e-6, 2.0, 18.0], dtype=torch.float64, requires_grad=True)
    value = logarithmic(loss, 2.0)
    assert value.tolist() == pytest.approx([-30.0, 1e-6, 2 * np.log(2), 2 * np.log(10)], rel=1e-6)
    value.sum().backward()
    assert loss.grad.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.1], rel=1e-6)


def test_response_of_colours():
    """1 for models with the galaxies' colours, 0 for the mean colours, whatever an offset."""
    truth = torch.randn(50, 5, generator=torch.Generator().manual_seed(2)).double()
    assert _response(truth + 0.7, truth).item() == pytest.approx(1.0)
    assert _response(truth.mean(dim=0).expand_as(truth), truth).item() == pytest.approx(0.0, abs=1e-12)
    assert _response(0.4 * truth, truth).item() == pytest.approx(0.4)


def test_knee_of_the_loss_is_that_of_the_training_step():
    config = _config("arcelin2020_lsst")
    pixels = torch.rand(2, 6, 64, 64, generator=torch.Generator().manual_seed(1))
    batch = {"image": pixels, "target": pixels, "valid": torch.ones(2, 6, 64, 64)}
    batch |= {"noise": torch.ones(2, 6), "psf_moments": torch.ones(2, 6, 3)}
    values = {}
    for knee in (None, 5.0):
        config.prior.loss_knee = knee
        torch.manual_seed(3)
        module = VaeModule(config, "prior", torch.zeros(0))
        module.log = lambda *args, **kwargs: None
        values[knee] = module.training_step(batch, 0).item()
        torch.manual_seed(4)
        losses = module._forward(batch, sample=True)[0].total.detach()
        torch.manual_seed(4)
        expected = losses.mean() if knee is None else (5 * torch.log1p(losses / 5)).mean()
        assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-4)
    assert values[5.0] < values[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both steps of the paper's training, very short, and their files."""
    where = tmp_path_factory.mktemp("paper")
    torch.set_num_threads(1)
    config = _config("arcelin2020_lsst", 60)
    for step in (config.prior, config.deblender):
        step.batch_size, step.samples = 16, 16 * 12
        step.validation_batches, step.validation_every = 2, 4
        step.precision = "32-true"
    make_banks(config, where / "data")
    options = dict(accelerator="cpu", workers=0, progress=False)
    for step in ("prior", "deblender"):
        fit_step(config, step, where / "data", where / "run", **options)
    for step in ("prior", "deblender"):
        export_network(config, where / "data", where / "run", where / "out", "pytest", step, samples=30)
    return config, where


def test_training_lowers_the_loss(trained):
    _, where = trained
    with open(where / "run" / "prior" / "version_0" / "metrics.csv", newline="") as stream:
        loss = [float(row["val_loss"]) for row in csv.DictReader(stream) if row.get("val_loss")]
    assert len(loss) == 3 and loss[-1] < 0.9 * loss[0]


def test_scale_is_the_mean_maximum_and_stays(trained):
    config, where = trained
    weights = torch.load(where / "run" / "prior" / "final.ckpt", weights_only=True)["state_dict"]
    banks = bl.BlendBanks.load(where / "data", "train", survey_of(config))
    composer = _composer(config, banks, seed=4, isolated=True)
    expected = np.mean([composer.blend().image.max(axis=(1, 2)) for _ in range(2000)], axis=0)
    np.testing.assert_allclose(weights["decoder.scale"].numpy(), expected, rtol=1e-4)
    again = torch.load(where / "run" / "deblender" / "final.ckpt", weights_only=True)["state_dict"]
    for name in ("encoder.scale", "decoder.scale"):
        assert torch.equal(weights["decoder.scale"], again[name])
    decoder = [k for k in weights if k.startswith("decoder.")]
    assert all(torch.equal(weights[k], again[k]) for k in decoder)


def test_artefact_takes_image_and_epsilon(trained):
    config, where = trained
    network = Network.load(where / "out" / "arcelin2020_lsst.onnx", bands=tuple("ugrizy"), pixel_scale=0.2)
    assert network._inputs == ("image", "epsilon")
    m = network.metadata
    assert m.centre == (31.5, 31.5) and m.frame["fwhm"]["r"] == 0.65
    assert m.figures_of_merit["onnx_torch_difference"] < 1e-4
    prior = Network.load(where / "out" / "arcelin2020_lsst_prior.onnx")
    assert prior.metadata.name == "arcelin2020_lsst_prior"
    banks = bl.BlendBanks.load(where / "data", "test", survey_of(config))
    batch = next(_composer(config, banks).batches(4))
    output = network.deblend(batch.image, batch.valid, batch.noise, batch.psf_moments)
    assert output.finite.all() and (output.model > 0).all()
    drawn = network.deblend(
        batch.image, batch.valid, batch.noise, batch.psf_moments, np.ones((4, 32), np.float32)
    )
    assert np.abs(drawn.model - output.model).max() > 0
    np.testing.assert_allclose(
        network.decoder.render(drawn.latent_mean + drawn.latent_sigma), drawn.model, rtol=1e-3, atol=1e-4
    )


def test_weights_are_stored_in_half_precision(trained):
    """Half of the bytes of the many weights; that nothing is lost is what the export's own check says."""
    config, where = trained
    module = VaeModule(config, "deblender", torch.zeros(0))
    count = sum(p.numel() for p in module.parameters())
    assert count > 5e6
    for kind, part in (("", module), ("_decoder", module.decoder)):
        path = where / "out" / f"arcelin2020_lsst{kind}.onnx"
        size = sum(p.numel() for p in part.parameters())
        assert 2 * size < path.stat().st_size < 2.1 * size
    stored = onnx.load(where / "out" / "arcelin2020_lsst.onnx").graph.initializer
    single = [t for t in stored if t.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in single) < 4096


def test_artefacts_hold_the_weights_by_name(trained):
    """But for the digits that half precision does not have."""
    _, where = trained
    kept = load_weights(where / "run" / "deblender" / "final.ckpt")
    found = load_weights(where / "out" / "arcelin2020_lsst.onnx")
    assert found.keys() == kept.keys()
    for name, weights in kept.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("source", ["run/deblender/final.ckpt", "out/arcelin2020_lsst.onnx"])
def test_transfer_starts_from_a_deblender_and_keeps_its_decoder(trained, tmp_path, source):
    config, where = trained
    short = _config("arcelin2020_lsst", 60)
    short.deblender.batch_size, short.deblender.samples = 8, 16
    short.deblender.validation_batches = 1
    short.deblender.precision = "32-true"
    initial = where / source
    options = dict(accelerator="cpu", workers=0, progress=False)
    final = fit_step(short, "deblender", where / "data", tmp_path, initial=initial, **options)
    before, after = load_weights(initial), load_weights(final)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("decoder."))
    assert before.keys() == after.keys()
    moved = [(before[k] - after[k]).abs().max() for k in before if k.startswith("encoder.body")]
    # Two small steps from where the other one ended.
    assert 0 < max(moved) < 0.05


def test_networks_and_samples_must_fit(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text('config.composition = "blends"\n')
    with pytest.raises(ValueError, match="model frame"):
        load_config(path)


def test_several_pixel_scales_are_refused_by_scenes(trained, tmp_path):
    """An artefact whose bands have pixels of their own cannot read a coadd."""
    import dataclasses

    from lsst.meas.vaedeblend.network import embed_metadata

    path = trained[1] / "out" / "arcelin2020_lsst.onnx"
    m = Network.load(path).metadata
    scales = dict(m.frame["pixel_scale"], y=0.1)
    mixed = dataclasses.replace(m, frame={**m.frame, "pixel_scale": scales})
    (tmp_path / "mixed.onnx").write_bytes(embed_metadata(path.read_bytes(), mixed))
    with pytest.raises(NetworkError, match="0.1"):
        Network.load(tmp_path / "mixed.onnx", pixel_scale=0.2)


def test_real_galaxies_join_the_bank(shared, tmp_path):
    """Images of a galsim.RealGalaxyCatalog, in disjoint samples, with the catalogue's magnitudes."""
    config = _config("arcelin2020_lsst", 20)
    config.population.real_catalogue = str(shared / "data" / "cosmos_real" / "catalog.fits")
    config.population.real_fraction = 0.5
    survey = survey_of(config)
    samples = draw_sources(config.population, survey)
    real = {k: v.source_id[v.source_id < 0] for k, v in samples.items()}
    assert [len(v) for v in real.values()] == [10, 10, 10]
    assert len(set(np.concatenate(list(real.values())))) == 30
    every = pop.read_real(config.population.real_catalogue, survey, np.random.default_rng(0))
    catalog = galsim.RealGalaxyCatalog("catalog.fits", dir=str(shared / "data" / "cosmos_real"))
    np.testing.assert_allclose(every.magnitude("i"), catalog.mag, atol=1e-3)
    row = int(np.argmin(every.magnitude("i")))
    bank = sample_banks(config, every[[row]], np.random.default_rng(0)).banks["target"][0]
    profile = galsim.RealGalaxy(catalog, index=row, flux=1.0)
    psf = galsim.Kolmogorov(fwhm=0.65)
    image = galsim.Convolve(profile, psf).drawImage(nx=64, ny=64, scale=0.2).array
    assert np.abs(bank.stamps[0] - image).max() < 2e-3 * image.max()
    # A quarter of a turn first, then the shear.
    distorted = dataclasses.replace(every[[row]], g1=-every.g1[[row]], shear=np.array([[0.2, -0.1]]))
    found = component_profile(distorted, 0, 0)
    expected = (
        galsim.RealGalaxy(catalog, index=row, flux=1.0).rotate(90 * galsim.degrees).shear(g1=0.2, g2=-0.1)
    )
    images = [galsim.Convolve(p, psf).drawImage(nx=64, ny=64, scale=0.2).array for p in (found, expected)]
    np.testing.assert_allclose(*images, atol=1e-4 * image.max())


def test_real_galaxies_are_sheared_but_in_the_test(shared):
    config = _config("arcelin2020_lsst", 200)
    config.population.real_catalogue = str(shared / "data" / "cosmos_real" / "catalog.fits")
    config.population.real_fraction, config.population.real_shear = 0.5, 0.3
    samples = draw_sources(config.population, survey_of(config))
    for sample in ("train", "validation"):
        size = np.hypot(*samples[sample].shear.T)
        real = samples[sample].source_id < 0
        assert not size[~real].any() and size.max() < 0.3
        # The mean of a disc is two thirds of its radius.
        assert size[real].mean() == pytest.approx(0.2, abs=0.03)
        assert np.abs(samples[sample].shear[real].mean(axis=0)).max() < 0.06
    assert not samples["test"].shear.any()
