# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks that ship: sound, documented, and good for something."""

import numpy as np
import pytest
from lsst.meas.vaedeblend.deblender import DeblendConfig, deblend
from lsst.meas.vaedeblend.evaluation import paper
from lsst.meas.vaedeblend.evaluation.metrics import match, shear_bias
from lsst.meas.vaedeblend.evaluation.paper_sample import SampleMaker
from lsst.meas.vaedeblend.ground.files import shipped_file
from lsst.meas.vaedeblend.ground.psf import gaussian_psf
from lsst.meas.vaedeblend.inference import Grids
from lsst.meas.vaedeblend.network import Network, load_network, resolve, shipped_networks
from lsst.meas.vaedeblend.rendering import Renderer, square
from lsst.meas.vaedeblend.scene import Parent, PsfGrid
from lsst.meas.vaedeblend.simulation.config import TrainingConfig, load_config
from lsst.meas.vaedeblend.simulation.patch import simulate_patch

PAPER = sorted({case.config for case in paper.CASES.values()} | {"arcelin2020_lsst", *paper.PRIORS.values()})
"""All that `vaedeblend evaluate paper` needs."""

needs_paper = pytest.mark.skipif(
    not set(PAPER) <= set(shipped_networks()), reason="needs the distribution packages/meas_vaedeblend_paper"
)
SURVEYS = {"lsst_ugrizy": ("LSST", "ugrizy", 0.2), "hsc_grizy": ("HSC", "grizy", 0.168)}


def test_the_first_networks_ship():
    assert set(SURVEYS) <= set(shipped_networks())


@pytest.mark.parametrize("name", shipped_networks())
def test_files_are_documented_and_of_bounded_size(name):
    folder = resolve(name).parent
    card = (folder / f"{name}.md").read_text()
    metadata = Network.load(name, threads=1).metadata
    assert metadata.training["config_sha256"] in card
    assert metadata.figures_of_merit["command"].splitlines()[0] in card
    for key, value in metadata.figures_of_merit.items():
        assert key == "command" or (f"{value:.4g}" if isinstance(value, float) else str(value)) in card
    config = TrainingConfig()
    config.loadFromString(metadata.training["config"])
    assert tuple(config.bands) == metadata.bands and name in (config.name, f"{config.name}_prior")
    for path in folder.glob(f"{name}*.onnx"):
        assert path.stat().st_size < 10e6
        assert b'File "' not in path.read_bytes()


@needs_paper
def test_the_papers_networks_ship_with_one_decoder_for_each_prior():
    folders = {resolve(name).resolve().parent for name in PAPER}
    assert len(PAPER) == 7 and len(folders) == 1
    (folder,) = folders
    assert folder != resolve("lsst_ugrizy").resolve().parent
    networks = {name: Network.load(name, threads=1) for name in PAPER}
    decoders = {network.decoder.path for network in networks.values()}
    assert decoders == set(folder.glob("*_decoder.onnx")) and len(decoders) == 4
    own, prior = networks["arcelin2020_lsst"], networks["arcelin2020_lsst_prior"]
    assert own.decoder.path == prior.decoder.path
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < 35e6


@needs_paper
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_were_changed_little_by_packing(name):
    """Less than two percent of the models and half a percent of the fluxes, on blends that pack.py drew."""
    figures = Network.load(name, threads=1).metadata.figures_of_merit
    assert figures["packing_model_rms"] < 0.02 and figures["packing_latent_median"] < 0.05
    assert abs(figures["packing_flux_median"]) < 0.005 and figures["packing_flux_std"] < 0.005


@needs_paper
def test_the_papers_network_keeps_the_shape_of_the_brightest_galaxy():
    """Blends of galaxies that no training has seen: the central one comes out, with shape and colours."""
    config = load_config(shipped_file("config/training/arcelin2020_lsst.py"))
    network = load_network("arcelin2020_lsst", threads=1, bands=config.bands, pixel_scale=0.2)
    maker = SampleMaker(config, 60, seed=3)
    sample = maker.run({"network": network}, 300)
    bias = shear_bias(sample.shape, sample.outputs["network"].shape, np.random.default_rng(0))
    # A network that draws every galaxy round has -1, one that draws the whole blend hundreds of percent.
    assert -0.35 < bias.mean < 0.1
    bright = sample.snr > 50
    assert bright.sum() > 50
    assert np.abs(np.median(sample.mag_error("network")[bright])) < 0.2
    # Of a few edge-on galaxies, bright ones among them, the model has no KSB shape though the truth has one.
    error = sample.shape_error("network")[bright]
    assert np.isnan(error).mean() < 0.03 and np.nanmedian(np.abs(error)) < 0.1


@pytest.mark.parametrize("name", SURVEYS)
def test_decoder_draws_what_the_deblender_drew(name):
    network = load_network(name, threads=1)
    m = network.metadata
    survey, bands, scale = SURVEYS[name]
    assert (m.bands, m.pixel_scale) == (tuple(bands), scale)
    rng = np.random.default_rng(1)
    shape = (3, len(m.bands), m.cutout_size, m.cutout_size)
    image = rng.normal(size=shape).astype(np.float32)
    image[:, :, 30:35, 30:35] += 20.0
    out = network.deblend(
        image,
        np.ones_like(image),
        np.ones(shape[:2], np.float32),
        np.tile(np.float32([2, 2, 0]), (*shape[:2], 1)),
    )
    assert out.finite.all() and (out.latent_sigma > 0).all()
    drawn = network.decoder.render(out.latent_mean)
    np.testing.assert_allclose(drawn, out.model, rtol=1e-3, atol=1e-4 * out.model.max())


@pytest.mark.parametrize("name", SURVEYS)
def test_graphs_for_fitting_draw_what_the_coadd_shows(name):
    """On squares, as the decoder's image convolved whole."""
    network = load_network(name, threads=1)
    m = network.metadata
    assert network.can_fit
    for part in (network.render, network.linearise):
        assert part.metadata.training == m.training
    psf = PsfGrid.constant(np.stack([gaussian_psf(1.5 + 0.1 * i, 31) for i in range(len(m.bands))])).filled()
    grids = Grids(network.render, network.linearise, psf.stamps, psf.moments)
    latent = np.random.default_rng(2).normal(size=(4, m.latent_size)).astype(np.float32)
    cell = np.zeros(4, np.int64)
    model = network.decoder.render(latent)
    observed = Renderer(m, psf).observed(model, cell)
    for width in (40, 64):
        images, mixture = grids.draw(latent, cell, width)
        images = images * mixture.weight.sum(axis=2)[..., None, None]
        expected = square(observed, width)
        # Farther out light from beyond the square is missing.
        middle = (..., slice(8, -8), slice(8, -8))
        scale = expected.max(axis=(2, 3), keepdims=True)
        assert np.abs((images - expected) / scale)[middle].max() < 2e-3


@pytest.mark.parametrize("name", SURVEYS)
def test_simulated_galaxies_come_out_with_their_fluxes(name):
    """One field of the survey, true centres: refinement fits the pixels, and its errors are about right."""
    survey, bands, _ = SURVEYS[name]
    network = load_network(name, threads=1)
    patch = simulate_patch(
        7, survey=survey, bands=tuple(bands), n_galaxies=50, cells=(1, 2), mag_range=(20.0, 25.0)
    )
    height, width = patch.image.shape[1:]
    peaks = np.column_stack([patch.x, patch.y])
    scene = patch.scene([Parent(1, 0, 0, np.ones((height, width), bool), peaks)])
    band = bands.index("r")
    chi2 = {}
    for steps in (0, 4):
        config = DeblendConfig()
        config.refinementSteps = steps
        result = deblend(scene, network, config)
        chi2[steps], sources = result.parents.chi2[0] / result.parents.n_pixels[0], result.sources
        index, truth = match(np.column_stack([sources.peak_x, sources.peak_y]), peaks, 1e-6)
        assert len(index) == 50
        bright = patch.snr[truth, band] > 20
        assert bright.sum() > 10
        error = (sources.flux[index, band] - patch.flux[truth, band])[bright]
        assert np.median(np.abs(error) / patch.flux[truth, band][bright]) < 0.12
    # Most pixels are sky: what is left above 1 is the models' fault.
    assert chi2[4] - 1 < 0.7 * (chi2[0] - 1)
    # Of a normal distribution 68 percent lie within one standard deviation, and the median at 0.67.
    assert 0.3 < np.median(np.abs(error) / sources.flux_err[index[bright], band]) < 1.5
    galaxy = index[bright & ~sources.flags["point_source"][index]]
    assert len(galaxy) >= 0.8 * bright.sum()
    moments, deviation = sources.moments[galaxy, band], sources.moments_err[galaxy, band]
    assert (moments[:, :2] > 0).all() and (deviation > 0).all()
