# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What coadds hold besides galaxies in white noise: stars, masked cores, sky left over, empty bands."""

from __future__ import annotations

import galsim
import numpy as np
import pytest
from lsst.meas.vaedeblend import DeblendConfig, PsfGrid, Scene, deblend, load_network
from lsst.meas.vaedeblend.adapters.footprints import parents_from_peaks
from lsst.meas.vaedeblend.deblender import DeblendResult
from lsst.meas.vaedeblend.ground.psf import gaussian_psf, wings
from lsst.meas.vaedeblend.simulation.surveys import get_survey_info
from lsst.meas.vaedeblend.sources import SourceModels

SCALE, SIZE, KERNEL = 0.2, 160, 41
SURVEY = get_survey_info("LSST")
NOISE = np.array([band.noise for band in SURVEY.bands])
COLOURS = np.array([0.3, 0.6, 1.0, 1.3, 1.5, 1.6])


@pytest.fixture(scope="module")
def network():
    return load_network("lsst_ugrizy", threads=1)


def source(x, y, r, hlr=None, sersic=1.0, colours=COLOURS, reach=12) -> dict:
    """A star, or a galaxy with a half-light radius in arcsec; fluxes in nJy, footprints of some radius."""
    return dict(x=x, y=y, flux=r * np.asarray(colours), hlr=hlr, sersic=sersic, reach=reach)


def simulate(sources, *, beta=3.0, masked=(), sky=0.0, seed=0) -> Scene:
    """Coadds of sources through Moffat PSFs whose wings go on beyond the kernels that are known."""
    psfs = [galsim.Moffat(beta=beta, fwhm=fwhm) for fwhm in (0.85, 0.8, 0.75, 0.72, 0.7, 0.7)]
    kernels = np.stack([p.drawImage(nx=KERNEL, ny=KERNEL, scale=SCALE).array for p in psfs])
    image = np.zeros((len(psfs), SIZE, SIZE))
    yy, xx = np.mgrid[:SIZE, :SIZE]
    footprint = np.zeros((SIZE, SIZE), bool)
    for s in sources:
        footprint |= np.hypot(xx - s["x"], yy - s["y"]) < s["reach"]
        for b, psf in enumerate(psfs):
            if s["flux"][b] > 0:
                profile = psf
                if s["hlr"]:
                    galaxy = galsim.Sersic(s["sersic"], half_light_radius=s["hlr"]).shear(g1=0.1)
                    profile = galsim.Convolve(galaxy, psf)
                stamp = galsim.ImageD(SIZE, SIZE, scale=SCALE)
                centre = galsim.PositionD(s["x"] + 1, s["y"] + 1)
                image[b] += (profile * s["flux"][b]).drawImage(stamp, center=centre).array
    deviation = NOISE[:, None, None]
    image += deviation * (np.random.default_rng(seed).standard_normal(image.shape) + sky)
    valid = np.ones(image.shape, bool)
    for x, y, radius in masked:
        valid &= np.hypot(xx - x, yy - y) > radius
    return Scene(
        SURVEY.band_names,
        image,
        np.broadcast_to(deviation**2, image.shape),
        valid,
        psf=PsfGrid.constant(kernels),
        pixel_scale=SCALE,
        parents=parents_from_peaks(footprint, np.array([[s["x"], s["y"]] for s in sources], float)),
    )


def run(sources, network, new=True, **scene) -> tuple[DeblendResult, list[int]]:
    """Deblend simulated sources; give the result, and which of its rows belongs to each of them."""
    config = DeblendConfig()
    config.findNewPeaks = new
    result = deblend(simulate(sources, **scene), network, config)
    found = result.sources
    rows = [int(np.argmin(np.hypot(found.peak_x - s["x"], found.peak_y - s["y"]))) for s in sources]
    return result, rows


def relative(result: DeblendResult, row: int, true: dict) -> np.ndarray:
    """Errors of the fluxes g to y over the true ones."""
    return result.sources.flux[row, 1:] / true["flux"][1:] - 1


@pytest.mark.parametrize(("flux", "radius", "distance"), [(6e5, 3.2, 20), (5.75e6, 6.0, 25), (2e4, 0.0, 6)])
def test_a_star_and_a_galaxy_beside_it_keep_their_fluxes_with_and_without_a_masked_core(
    network, flux, radius, distance
):
    star, galaxy = source(80, 80, flux, reach=45), source(80 + distance, 80, 4000, hlr=0.4)
    result, (a, b) = run([star, galaxy], network, masked=[(80, 80, radius)] if radius else [])
    assert len(result.sources) == 2
    assert result.sources.flags["point_source"][[a, b]].tolist() == [True, False]
    assert result.sources.point_probability[a] > 0.99
    assert np.abs(relative(result, a, star)).max() < 0.005
    assert np.abs(relative(result, b, galaxy)[:4]).max() < 0.05


def test_wings_beyond_the_kernel_do_not_brighten_what_lies_in_them(network):
    offsets = [(30, 0), (0, 40), (-50, 0), (25, -25)]
    galaxies = [source(80 + dx, 80 + dy, 1000, hlr=0.3) for dx, dy in offsets]
    result, rows = run([source(80, 80, 5.75e5, reach=45), *galaxies], network, beta=2.5)
    assert len(result.sources) == 5
    pulls = [
        (result.sources.flux[row, 2] - g["flux"][2]) / result.sources.flux_err[row, 2]
        for row, g in zip(rows[1:], galaxies, strict=True)
    ]
    assert np.abs(pulls).max() < 3
    errors = [relative(result, row, g)[1] for row, g in zip(rows[1:], galaxies, strict=True)]
    assert np.abs(errors).max() < 0.06


def test_compact_galaxies_are_no_stars(network):
    galaxies = [source(x, y, 3000, hlr=0.2) for x, y in ((40, 40), (110, 50), (50, 120))]
    result, rows = run(galaxies, network)
    assert not result.sources.flags["point_source"][rows].any()


def test_a_sky_left_over_moves_no_flux(network):
    galaxies = [source(80, 80, 150, hlr=0.3), source(40, 40, 300, hlr=0.3), source(120, 40, 800, hlr=0.3)]
    clean, rows = run(galaxies, network, new=False)
    skewed, again = run(galaxies, network, new=False, sky=0.1)
    moved = skewed.sources.flux[again, 2] / clean.sources.flux[rows, 2] - 1
    assert np.abs(moved).max() < 0.05
    # It would, were it not for the subtraction.
    config = DeblendConfig()
    config.findNewPeaks = config.subtractSky = False
    untreated = deblend(simulate(galaxies, sky=0.1), network, config).sources.flux[again, 2]
    assert untreated[0] / clean.sources.flux[rows[0], 2] - 1 > 0.3


@pytest.mark.parametrize("missing", [[0], [0, 1], [0, 1, 3, 4, 5]])
def test_a_band_without_light_has_no_flux_and_the_error_of_the_data(network, missing):
    colours = COLOURS.copy()
    colours[missing] = 0.0
    result, (row,) = run([source(80, 80, 1500, hlr=0.3, colours=colours)], network)
    flux, error = result.sources.flux[row, missing], result.sources.flux_err[row, missing]
    assert np.abs(flux / error).max() < 3
    # A point source of no flux has the error 2 sqrt(pi) sigma_PSF times the noise; a galaxy's is larger.
    least = 2 * np.sqrt(np.pi) * 1.2 * NOISE[missing]
    assert (error > least).all() and (error < 6 * least).all()


def test_pixels_with_next_to_no_variance_are_no_measurements(network):
    galaxies = [source(60, 80, 3000, hlr=0.3, reach=25), source(72, 80, 2000, hlr=0.3, reach=25)]
    scene = simulate(galaxies)
    sound = deblend(scene, network).sources
    scene.variance[:, 80:83, 64:68] *= 1e-12
    odd = deblend(
        Scene(
            scene.bands,
            scene.image,
            scene.variance,
            psf=scene.psf,
            pixel_scale=SCALE,
            parents=scene.parents,
        ),
        network,
    ).sources
    assert len(odd) == len(sound) == 2
    assert np.abs((odd.flux - sound.flux) / sound.flux_err).max() < 1.5


def test_points_come_back_from_their_table(network):
    star, galaxy = source(80, 80, 2e4, reach=25), source(90, 80, 4000, hlr=0.4)
    scene = simulate([star, galaxy])
    sources = deblend(scene, network).sources
    assert sources.flags["point_source"].tolist() == [True, False]
    again = SourceModels.from_table(sources.to_table(), network, scene.psf)
    assert again.flags["point_source"].tolist() == [True, False]
    images = sources.observed
    np.testing.assert_allclose(again.observed[0], images[0], atol=1e-4 * images[0].max())
    np.testing.assert_allclose(images[0].sum(axis=(1, 2)), sources.flux[0], rtol=1e-3)


def test_an_error_knows_of_light_that_neighbours_have_under_a_source(network):
    pair = [source(80, 80, 1e5, hlr=0.5, reach=30), source(86, 80, 500, hlr=0.2)]
    _, rows = run(pair, network, new=False)
    config = DeblendConfig()
    config.findNewPeaks = False
    config.neighbourError = 0.0
    scene = simulate(pair)
    naive = deblend(scene, network, config).sources
    config.neighbourError = 0.03
    told = deblend(scene, network, config).sources
    assert told.flags["bright_neighbour"][rows].tolist() == [False, True]
    assert not naive.flags["bright_neighbour"].any()
    assert told.flux_err[rows[1], 2] > 1.5 * naive.flux_err[rows[1], 2]
    np.testing.assert_allclose(told.flux_err[rows[0], 2], naive.flux_err[rows[0], 2], rtol=0.01)


@pytest.mark.parametrize("distance", [4.1, 5.6, 7.0])
def test_a_neighbour_without_a_peak_is_found_before_its_light_is_taken(network, distance):
    first = source(80, 80, 1000, hlr=0.4, reach=22)
    second = source(80 + distance, 80, 900, hlr=0.35, reach=22)
    scene = simulate([first, second])
    scene.parents[0].peaks = scene.parents[0].peaks[:1]
    sources = deblend(scene, network).sources
    assert len(sources) == 2
    pull = (sources.flux[:, 2] - [first["flux"][2], second["flux"][2]]) / sources.flux_err[:, 2]
    assert np.abs(pull).max() < 3


@pytest.mark.parametrize("beta", [2.5, 3.5])
def test_wings_of_a_moffat_profile_fall_as_its_power_law(beta):
    scale_radius = 4.0 / (2 * np.sqrt(2 ** (1 / beta) - 1))

    def profile(distance):
        return (1 + (distance / scale_radius) ** 2) ** -beta

    y, x = np.mgrid[-20:21, -20:21]
    level, slope = wings(profile(np.hypot(x, y)))
    # The slope of the profile itself, 16 pixels from the centre; half as far again as the stamp reaches the
    # profile is as steep as its asymptote, which a power law fitted farther in is not yet.
    assert slope == pytest.approx(2 * beta * 16**2 / (16**2 + scale_radius**2), rel=0.02)
    assert level * (30 / 20.5) ** -slope == pytest.approx(profile(30), rel=0.2)


def test_a_gaussian_has_no_wings():
    assert wings(gaussian_psf(1.5, 41))[0] == 0


@pytest.mark.parametrize(("sersic", "hlr"), [(1.0, 1.2), (1.0, 2.4), (4.0, 0.3), (4.0, 0.6), (4.0, 1.2)])
def test_a_bright_galaxy_keeps_its_light_and_stays_one(network, sersic, hlr):
    galaxy = source(80, 80, 20000, hlr=hlr, sersic=sersic, reach=60)
    result, (row,) = run([galaxy], network)
    found = result.sources
    assert len(found) == 1
    width = int(found.images.width[row])
    assert (width > network.metadata.cutout_size) == (hlr > 1)
    profile = galsim.Convolve(
        galsim.Sersic(sersic, half_light_radius=hlr).shear(g1=0.1), galsim.Moffat(beta=3.0, fwhm=0.75)
    )
    stamp = profile.drawImage(nx=width, ny=width, scale=SCALE).array
    assert found.flux[row, 2] / (20000 * stamp.sum()) == pytest.approx(1, abs=0.05)
    # What measurement sees has the same light, and comes back from the table on the same square.
    image = found.images.observed([row])[0]
    assert image.shape == (6, width, width)
    np.testing.assert_allclose(image.sum(axis=(1, 2)), found.flux[row], rtol=0.02)
    again = SourceModels.from_table(found.to_table(), network, simulate([galaxy]).psf)
    np.testing.assert_allclose(again.observed[row], image, atol=1e-4 * image.max())
    assert again.corner_x[row] == found.corner_x[row] == 80 - width // 2


def test_faint_sources_beyond_the_cutout_of_a_large_galaxy_keep_their_fluxes(network):
    large = source(80, 80, 60000, hlr=2.2, sersic=2.0, reach=75)
    faint = [source(80 + dx, 80 + dy, 800, hlr=0.3) for dx, dy in ((36, 0), (0, -40), (-30, 30))]
    result, rows = run([large, *faint], network, new=False)
    pulls = [
        (result.sources.flux[row, 2] - one["flux"][2]) / result.sources.flux_err[row, 2]
        for row, one in zip(rows[1:], faint, strict=True)
    ]
    assert np.abs(pulls).max() < 4
    errors = [relative(result, row, one)[1] for row, one in zip(rows[1:], faint, strict=True)]
    assert np.abs(errors).max() < 0.25


@pytest.mark.parametrize("flux", [5.75e6, 2e4])
def test_the_square_of_a_star_ends_where_its_wings_do_not_matter(network, flux):
    star = source(80, 80, flux, reach=45)
    result, (row,) = run([star], network, new=False, beta=2.5)
    width, size = int(result.sources.images.width[row]), network.metadata.cutout_size
    assert (width > size) == (flux > 1e6)
    images = result.sources.images.observed([row])[0]
    np.testing.assert_allclose(images.sum(axis=(1, 2)), result.sources.flux[row], rtol=0.01)


def test_images_of_different_widths_lie_on_one_square_about_the_same_pixel(network):
    small = source(40, 40, 800, hlr=0.3)
    large = source(90, 90, 30000, hlr=2.2, reach=55)
    scene = simulate([small, large])
    result, rows = run([small, large], network, new=False)
    found = result.sources
    wide = int(found.images.width.max())
    assert found.images.width[rows].tolist() == [64, wide] and wide > 64
    both, (y, x) = found.images.observed(rows), found.corners(rows)
    alone = found.images.observed([rows[0]])[0]
    shift = found.corner_y[rows[0]] - y[0]
    np.testing.assert_allclose(both[0][:, shift : shift + 64, shift : shift + 64], alone, atol=1e-6)
    # Shared out, both have their places, and nothing of the image is lost where they have light.
    from lsst.meas.vaedeblend import redistribute

    shared = redistribute(scene, found, footprints=False)
    total = np.zeros_like(scene.image)
    for image, top, left in zip(shared, y, x, strict=True):
        down, along = (
            slice(max(start, 0), min(start + image.shape[-1], SIZE)) for start in (int(top), int(left))
        )
        own = (slice(down.start - top, down.stop - top), slice(along.start - left, along.stop - left))
        total[:, down, along] += image[:, *own]
    np.testing.assert_allclose(total[:, 70:110, 70:110], scene.image[:, 70:110, 70:110], rtol=1e-4, atol=1e-3)
