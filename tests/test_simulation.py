# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Galaxies, banks and scenes against analytic truth and against GalSim drawing the same thing directly."""

import shutil

import galsim
import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.psf import difference_kernel_ft
from lsst.meas.vaedeblend.simulation import population as pop
from lsst.meas.vaedeblend.simulation.banks import draw_sources
from lsst.meas.vaedeblend.simulation.config import PopulationConfig, SceneConfig
from lsst.meas.vaedeblend.simulation.galaxies import MODEL_SIGMA, GalaxyBank, galaxy_profile, render_bank
from lsst.meas.vaedeblend.simulation.scenes import PsfBank, SceneComposer, quarter_turn, turn_offset
from lsst.meas.vaedeblend.simulation.surveys import get_survey_info, survey_of


@pytest.fixture(scope="module")
def lsst():
    return get_survey_info("LSST")


@pytest.fixture(scope="module")
def bank(lsst):
    rng = np.random.default_rng(3)
    galaxies = pop.draw_population(60, lsst, rng, mag_range=(20, 26))
    return render_bank(pop.concatenate([galaxies, pop.draw_stars(6, lsst, rng)]), lsst.pixel_scale, rng)


def test_survey_noise_is_that_of_its_sky(lsst):
    """Sky of 21.2 mag/arcsec^2 and a zeropoint of 28.13 in r, 5520 s: worked out by hand."""
    r = lsst.bands[2]
    sky_per_s = 10 ** (-0.4 * (21.2 - 28.13)) * 0.2**2
    electrons_per_njy = 10 ** (-0.4 * (31.4 - 28.13)) * 5520
    assert r.counts_per_njy == pytest.approx(electrons_per_njy, rel=1e-6)
    assert r.noise == pytest.approx(np.sqrt(sky_per_s * 5520) / electrons_per_njy, rel=1e-4)
    assert lsst.band_names == ("u", "g", "r", "i", "z", "y")


def test_unknown_survey_and_band_are_refused():
    with pytest.raises(ValueError, match="LSSTT"):
        get_survey_info("LSSTT")
    with pytest.raises(ValueError, match="no band q"):
        get_survey_info("LSST", ("q",))


def test_the_survey_of_bands_and_pixels():
    assert survey_of("ugrizy", 0.2) == "LSST" and survey_of(("g", "r"), 0.168) == "HSC"
    with pytest.raises(ValueError, match=r"bands u, g in pixels of 0.168"):
        survey_of("ug", 0.168)


def test_population_follows_its_number_counts(lsst):
    galaxies = pop.draw_population(
        20000, lsst, np.random.default_rng(1), mag_range=(20, 26), colour_scatter=0
    )
    mag = galaxies.magnitude("i")
    assert mag.min() >= 20 and mag.max() <= 26
    counts, edges = np.histogram(mag, np.arange(21, 26.1, 0.5))
    slope = np.polyfit(edges[:-1], np.log10(counts), 1)[0]
    assert slope == pytest.approx(0.3, abs=0.03)
    # Redder light from older stars: an elliptical's g - r at z = 0.3 is well above an irregular's.
    table = pop._sed_fluxes(lsst, "i")
    colours = pop._component_colours(np.array([0.0, 3.0]), np.array([0.3, 0.3]), table)
    g_minus_r = -2.5 * np.log10(colours[:, 1] / colours[:, 2])
    assert g_minus_r[0] > g_minus_r[1] + 0.8


def test_samples_share_no_galaxy(lsst):
    config = PopulationConfig()
    config.n_train, config.n_validation, config.n_test = 50, 20, 20
    samples = draw_sources(config, lsst)
    galaxies = {k: v.source_id[v.kind[:, 0] != pop.STAR] for k, v in samples.items()}
    assert [len(v) for v in galaxies.values()] == [50, 20, 20]
    assert len(np.unique(np.concatenate(list(galaxies.values())))) == 90


def test_bank_draws_what_galsim_draws(bank, lsst):
    rng = np.random.default_rng(3)
    galaxies = pop.draw_population(60, lsst, rng, mag_range=(20, 26))
    for row in (0, 7, 31):
        for b, band in ((1, "g"), (4, "z")):
            profile = galsim.Convolve(
                galaxy_profile(galaxies, row, band), galsim.Gaussian(sigma=MODEL_SIGMA * 0.2)
            )
            dx, dy = bank.offset[row].astype(float) * 0.2
            image = profile.shift(dx, dy).drawImage(nx=97, ny=97, scale=0.2).array
            parts = slice(bank.first[row], bank.first[row] + bank.count[row])
            ours = np.tensordot(bank.flux[parts, b], bank.stamps[parts], axes=1)
            assert np.abs(ours - image).max() < 1e-3 * image.max()


def test_bank_round_trip(bank, tmp_path):
    bank.save(tmp_path / "bank.npz")
    again = GalaxyBank.load(tmp_path / "bank.npz")
    assert again.bands == bank.bands and again.pixel_scale == bank.pixel_scale
    np.testing.assert_array_equal(again.stamps, bank.stamps)
    np.testing.assert_array_equal(again.total_flux, bank.total_flux)


def test_even_stamps_are_refused(lsst):
    with pytest.raises(ValueError, match="odd"):
        render_bank(
            pop.draw_stars(1, lsst, np.random.default_rng(0)), 0.2, np.random.default_rng(0), stamp_size=64
        )


@pytest.mark.parametrize("turn", range(8))
def test_offsets_turn_with_their_images(turn):
    y, x = np.mgrid[-10:11, -10:11]
    offset = np.array([0.3, -0.2])
    image = np.exp(-0.5 * ((x - offset[0]) ** 2 + (y - offset[1]) ** 2) / 2.0)
    turned = quarter_turn(image, turn)
    centroid = np.array([(turned * x).sum(), (turned * y).sum()]) / turned.sum()
    np.testing.assert_allclose(turn_offset(offset, turn), centroid, atol=1e-6)


def _quiet_config() -> SceneConfig:
    config = SceneConfig()
    config.psf_bank_size = 20
    config.mask_fraction = config.band_dropout = config.noise_band_scatter = 0.0
    return config


def test_isolated_cutout_is_its_target_convolved(bank, lsst):
    """Without noise, the cutout of an isolated source is its target convolved with the difference kernel."""
    config = _quiet_config()
    config.noise_range = [1e-4, 1.0001e-4]
    rng = np.random.default_rng(8)
    psfs = PsfBank(config, 0.2, rng)
    composer = SceneComposer(bank, psfs, lsst, config, rng, isolated=True)
    batch = next(composer.batches(18))
    assert batch.valid.all()
    kernels = difference_kernel_ft(psfs.stamps, MODEL_SIGMA, 64)
    for k in range(18):
        # Light of sources that reach beyond their cutout wraps and leaks: compare small ones.
        if batch.target[k, 2].sum() < 0.999 * batch.target_flux[k, 2]:
            continue
        convolved = np.fft.irfft2(np.fft.rfft2(batch.target[k]) * kernels[batch.psf_index[k]], s=(64, 64))
        middle = np.s_[:, 20:44, 20:44]
        assert np.abs(batch.image[k][middle] - convolved[middle]).max() < 0.01 * convolved.max()


def test_targets_sit_in_the_central_pixel(bank, lsst):
    config = _quiet_config()
    rng = np.random.default_rng(9)
    composer = SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng)
    batch = next(composer.batches(64))
    y, x = np.mgrid[-3:4, -3:4]
    centre = batch.target[:, 2, 29:36, 29:36]
    weight = np.exp(-0.5 * (x**2 + y**2) / 1.5**2) * centre
    centroid = np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))]) / weight.sum((1, 2))
    # A Gaussian weight halves offsets at most; knots may pull a centroid a little.
    assert np.abs(centroid).max() < 0.8
    assert np.abs(np.median(centroid, axis=1)).max() < 0.15
    assert batch.image.shape == batch.target.shape == (64, 6, 64, 64)


@pytest.mark.parametrize("power, low, high", [(0.0, 0.0, 0.3), (5.0, 0.6, 1.0)])
def test_clusters_form_about_bright_sources_if_wanted(bank, lsst, power, low, high):
    """Most sources are placed 1.5 pixels from a host: with a large power the host is the brightest one."""
    config = _quiet_config()
    config.clustered_fraction, config.cluster_scale, config.host_flux_power = 0.8, 1e-6, power
    config.density_range = [100.0, 101.0]
    rng = np.random.default_rng(15)
    composer = SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng)
    rows, x, y = composer._place()
    near = np.hypot(x[:, None] - x, y[:, None] - y) < 5
    assert len(rows) > 30
    assert low <= near.mean(axis=1).max() <= high


def test_noise_has_the_depth_it_states(bank, lsst):
    config = _quiet_config()
    config.density_range = [1.0, 1.01]
    rng = np.random.default_rng(10)
    composer = SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng)
    batch = next(composer.batches(8))
    scaled = batch.image[:, :, :12, :12] / batch.noise[:, :, None, None]
    mad = 1.4826 * np.median(np.abs(scaled - np.median(scaled)))
    assert mad == pytest.approx(1.0, abs=0.05)


def test_noise_is_correlated_as_configured_and_keeps_its_depth(bank, lsst):
    config = _quiet_config()
    config.noise_correlation = [0.25, 0.25]
    rng = np.random.default_rng(16)
    composer = SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng)
    noise = composer._unit_noise((6, 192, 192))
    assert noise.dtype == np.float32
    assert noise.std() == pytest.approx(1.0, abs=0.01)
    for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        assert (a * b).mean() == pytest.approx(0.25, abs=0.01)


def test_sky_is_left_over_either_way(bank, lsst):
    config = _quiet_config()
    config.density_range, config.sky_error = [1.0, 1.01], 5.0
    rng = np.random.default_rng(17)
    composer = SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng)
    batch = next(composer.batches(24))
    sky = np.median(batch.image[:, :, :12, :12], axis=(2, 3)) / batch.noise
    assert np.abs(sky).max() <= 5.5 and sky.max() > 2 and sky.min() < -2


def test_cores_are_masked_the_more_the_brighter_they_are(bank, lsst):
    """Stars saturate at 18 mag: a bright one loses its middle and its column, a fainter one less."""
    config = _quiet_config()
    config.saturation_mag_range = [18.0, 18.0]
    rng = np.random.default_rng(18)
    psfs = PsfBank(config, 0.2, rng)
    composer = SceneComposer(bank, psfs, lsst, config, rng)
    masked = []
    for mag in (18.5, 17.5, 15.0):
        observed = np.zeros((6, 192, 192))
        observed[:, 76:117, 76:117] = 10 ** (-0.4 * (mag - 31.4)) * psfs.stamps[0]
        bad = composer._saturated(observed, np.zeros(6, int), np.array([96]), np.array([96]))
        assert bad[:, 96, 96].all() == (mag < 18)
        masked.append(bad[2].sum())
        if mag == 15.0:
            assert np.ptp(np.flatnonzero(bad[2].any(axis=1))) > np.ptp(np.flatnonzero(bad[2].any(axis=0)))
    assert masked[0] == 0 < masked[1] < masked[2]


def test_wide_psfs_keep_the_sum_that_networks_are_told(lsst):
    config = _quiet_config()
    narrow = PsfBank(config, 0.2, np.random.default_rng(3))
    config.psf_size = 121
    wide = PsfBank(config, 0.2, np.random.default_rng(3))
    np.testing.assert_allclose(wide.stamps.sum(axis=(1, 2)), 1.0)
    np.testing.assert_allclose(wide.moments, narrow.moments, rtol=2e-3, atol=2e-3)
    wings = wide.wide.sum(axis=(1, 2)) - 1
    assert (wings > 0).all() and wings.max() > 0.003
    np.testing.assert_allclose(wide.kernels(192)[:, 0, 0].real, 1 + wings, rtol=1e-3)
    assert wide.kernels(64).shape == narrow.kernels(64).shape


def test_boosted_sources_and_odd_colours(bank, lsst):
    config = _quiet_config()
    config.boosted_fraction, config.odd_colour_fraction, config.min_snr = 0.5, 0.5, 0.0
    rng = np.random.default_rng(19)
    composer = SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng)
    rows = rng.integers(0, len(bank), 2000)
    gain, boosted = composer._gains(rows)
    flux = bank.total_flux[rows] * gain
    assert 0.4 < boosted.mean() < 0.6
    assert np.median(gain[boosted].max(axis=1)) > 10 and flux[boosted].max() < 10 * 10 ** (0.4 * (31.4 - 15))
    dark = flux == 0
    assert dark[:, 0].any() and (dark.sum(axis=1) == 5).any() and not dark.all(axis=1).any()
    batch = next(composer.batches(64))
    assert (batch.target_flux == 0).any()
    # Targets are what the bank has: nothing in them is brighter.
    assert batch.target_flux.max() <= 10 * bank.total_flux.max()
    # Without noise in the truth, a band without light has none.
    assert not batch.target[batch.target_flux == 0].any()


def test_subtracted_sources_leave_dipoles_of_their_light(bank, lsst):
    config = _quiet_config()
    config.subtraction_error, config.subtraction_shift = 0.0, 0.1
    rng = np.random.default_rng(20)
    composer = SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng)
    star = slice(bank.first[-1], bank.first[-1] + 1)
    left = composer._residual(bank.flux[star], bank.stamps[star])
    whole = bank.flux[star].T[..., None] * bank.stamps[star]
    assert np.abs(left.sum(axis=(1, 2))).max() < 1e-3 * whole.sum(axis=(1, 2)).max()
    assert 0 < np.abs(left).max() < 0.3 * whole.max()


def test_masked_pixels_are_zero_and_bands_drop(bank, lsst):
    config = _quiet_config()
    config.mask_fraction = config.band_dropout = 1.0
    rng = np.random.default_rng(11)
    batch = next(SceneComposer(bank, PsfBank(config, 0.2, rng), lsst, config, rng).batches(32))
    assert not batch.image[~batch.valid].any()
    absent = ~batch.valid.any(axis=(2, 3))
    assert absent.any(axis=1).all() and not absent.all(axis=1).any()


def test_composer_is_reproducible(bank, lsst):
    config = _quiet_config()
    psfs = PsfBank(config, 0.2, np.random.default_rng(0))
    a, b = (
        next(SceneComposer(bank, psfs, lsst, config, np.random.default_rng(4)).batches(16)) for _ in range(2)
    )
    np.testing.assert_array_equal(a.image, b.image)


def test_bank_of_another_survey_is_refused(bank):
    config = _quiet_config()
    hsc = get_survey_info("HSC")
    psfs = PsfBank(config, 0.2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="bands"):
        SceneComposer(bank, psfs, hsc, config, np.random.default_rng(0))


def test_cosmos_catalogue_is_read(shared, lsst, tmp_path):
    """The catalogue's parametric galaxies agree in flux and shape with those that GalSim makes of it."""
    source = shared / "data" / "cosmos_real"
    shutil.copy(source / "parametric_catalog_23.5.fits", tmp_path / "cat.fits")
    shutil.copy(source / "parametric_fits_23.5.fits", tmp_path / "cat_fits.fits")
    galaxies = pop.read_cosmos(tmp_path, lsst, file_name="cat.fits", exclusion_level="none")
    catalog = galsim.COSMOSCatalog(
        dir=str(tmp_path), file_name="cat.fits", use_real=False, exclusion_level="none"
    )
    assert len(galaxies) == catalog.nobjects > 50
    checked = 0
    for row in range(0, catalog.nobjects, 9):
        record = catalog.getParametricRecord(row)
        assert galaxies.magnitude("i")[row] == pytest.approx(record["mag_auto"], abs=1e-3)
        theirs = catalog.makeGalaxy(row, gal_type="parametric")
        ours = galaxy_profile(galaxies, row, "i")
        images = [
            galsim.Convolve(g.withFlux(1.0), galsim.Gaussian(sigma=0.3)).drawImage(nx=64, ny=64, scale=0.1)
            for g in (theirs, ours)
        ]
        a, b = (galsim.hsm.FindAdaptiveMom(i, strict=False) for i in images)
        if a.moments_status == 0 and b.moments_status == 0:
            checked += 1
            assert b.observed_shape.g1 == pytest.approx(a.observed_shape.g1, abs=0.02)
            assert b.observed_shape.g2 == pytest.approx(a.observed_shape.g2, abs=0.02)
            assert b.moments_sigma == pytest.approx(a.moments_sigma, rel=0.03)
    assert checked > 4
