# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""PSF moments against GalSim's, and the kernels between model frame and observed frame."""

from __future__ import annotations

import galsim
import numpy as np
import pytest
from lsst.meas.vaedeblend.ground.psf import (
    adaptive_moments,
    convolve_to_observed,
    difference_kernel_ft,
    fft_size,
    gaussian_psf,
    kolmogorov_psf,
    matching_kernel_ft,
    psf_sigma,
)


def draw(profile, size=41, dtype=float):
    image = profile.drawImage(nx=size, ny=size, scale=1.0, dtype=dtype).array
    return image / image.sum()


def hsm_moments(stamp):
    """Ixx, Iyy, Ixy from the size and distortion that HSM reports."""
    found = galsim.hsm.FindAdaptiveMom(galsim.Image(stamp))
    e1, e2 = found.observed_shape.e1, found.observed_shape.e2
    half_trace = found.moments_sigma**2 / np.sqrt(1 - e1**2 - e2**2)
    return half_trace * np.array([1 + e1, 1 - e1, e2])


@pytest.mark.parametrize(
    "make", [galsim.Gaussian, galsim.Kolmogorov, lambda fwhm: galsim.Moffat(2.5, fwhm=fwhm)]
)
def test_moments_agree_with_galsim(make):
    profiles = [
        make(fwhm=fwhm).shear(g=g, beta=beta * galsim.degrees)
        for fwhm in (2.5, 4.0, 9.0)
        for g, beta in ((0.0, 0.0), (0.15, 20.0), (0.3, 75.0))
    ]
    stamps = np.stack([draw(p) for p in profiles])
    expected = np.stack([hsm_moments(stamp) for stamp in stamps])
    np.testing.assert_allclose(adaptive_moments(stamps), expected, rtol=2e-6, atol=1e-5)


def test_moments_of_a_stamp_that_is_off_centre_and_of_other_scale():
    shifted = draw(galsim.Kolmogorov(fwhm=4).shear(g1=0.1).shift(0.4, -0.3))
    centred = draw(galsim.Kolmogorov(fwhm=4).shear(g1=0.1))
    np.testing.assert_allclose(
        adaptive_moments(1e5 * shifted), adaptive_moments(centred), rtol=2e-3, atol=1e-3
    )


def test_moments_keep_leading_dimensions_and_report_failures_as_nan():
    stamps = np.empty((2, 3, 25, 25))
    stamps[:] = gaussian_psf(1.5, 25)
    stamps[0, 1] = np.nan
    stamps[1, 0] = 0.0
    stamps[1, 1, 3, 4] = np.inf
    stamps[1, 2] = -gaussian_psf(1.5, 25)
    moments = adaptive_moments(stamps)
    assert moments.shape == (2, 3, 3)
    good = np.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(np.isfinite(moments).all(axis=-1), good)
    np.testing.assert_allclose(moments[good], [[1.5**2 + 1 / 12, 1.5**2 + 1 / 12, 0.0]] * 2, atol=2e-3)
    with pytest.raises(ValueError, match="two dimensions"):
        adaptive_moments(np.zeros(5))


def test_gaussian_psf_is_integrated_over_pixels():
    fine = (np.arange(15 * 51) - 7 * 51 - 25) / 51
    line = np.exp(-0.5 * (fine / 0.8) ** 2).reshape(15, 51).sum(axis=1)
    expected = line[:, None] * line[None, :]
    np.testing.assert_allclose(gaussian_psf(0.8, 15), expected / expected.sum(), atol=1e-5)
    assert gaussian_psf(0.8, 15).sum() == pytest.approx(1.0, abs=1e-14)
    with pytest.raises(ValueError, match="odd size"):
        gaussian_psf(0.8, 14)
    with pytest.raises(ValueError, match="positive"):
        gaussian_psf(0.0, 15)


def test_kolmogorov_psf_agrees_with_galsim():
    exact = galsim.GSParams(folding_threshold=1e-4, maxk_threshold=1e-6, maximum_fft_size=16384)
    expected = draw(galsim.Kolmogorov(fwhm=3.5, gsparams=exact))
    np.testing.assert_allclose(kolmogorov_psf(3.5, 41), expected, atol=1e-4 * expected.max())
    with pytest.raises(ValueError, match="odd size"):
        kolmogorov_psf(3.5, 40)


@pytest.mark.parametrize("fwhm", [2.5, 4.0, 7.0])
def test_a_galaxy_rendered_from_the_model_frame_is_the_observed_one(fwhm):
    """The way the runtime takes, against drawing the galaxy through the PSF directly."""
    psf = galsim.Kolmogorov(fwhm=fwhm).shear(g1=0.05, g2=-0.03)
    galaxy = galsim.Exponential(half_light_radius=2.0).shear(g1=0.2).shift(0.3, -0.2)
    # GalSim draws pixel-integrated images of what the PSF convolves.
    model = galsim.Convolve(galaxy, galsim.Gaussian(sigma=0.8)).drawImage(nx=65, ny=65, scale=1.0).array
    expected = galsim.Convolve(galaxy, psf).drawImage(nx=65, ny=65, scale=1.0).array
    # Not scaled to sum 1: the stamp cuts off a part of a percent of the wings.
    stamp = psf.drawImage(nx=61, ny=61, scale=1.0, dtype=float).array
    kernel = difference_kernel_ft(stamp, 0.8, fft_size(65, 61))
    observed = convolve_to_observed(model[None, None], kernel[None])
    assert np.abs(observed[0, 0] - expected).max() < 2e-3 * expected.max()


def test_kernels_are_vectorised_and_keep_precision():
    stamps = np.stack([gaussian_psf(s, 41) for s in (1.2, 1.5, 2.5)]).reshape(3, 1, 41, 41)
    together = difference_kernel_ft(stamps, 0.8, 96)
    assert together.shape == (3, 1, 96, 49) and together.dtype == np.complex128
    np.testing.assert_allclose(together[1, 0], difference_kernel_ft(stamps[1, 0], 0.8, 96), atol=1e-14)
    single = difference_kernel_ft(stamps.astype(np.float32), 0.8, 96)
    assert single.dtype == np.complex64
    np.testing.assert_allclose(single, together, atol=1e-3)
    np.testing.assert_allclose(together[:, :, 0, 0], 1.0, atol=1e-12)
    assert np.abs(together).max() < 1 + 1e-6  # wider PSFs never amplify


def test_equal_psfs_give_the_identity_and_lost_frequencies_do_not_blow_up():
    wide = gaussian_psf(3.0, 41)
    np.testing.assert_allclose(matching_kernel_ft(wide, wide, 80), 1.0, atol=1e-12)
    narrow = matching_kernel_ft(gaussian_psf(1.5, 41), wide, 80, floor=1e-2)
    assert 1.5 < np.abs(narrow).max() < 60


def test_convolution_does_not_wrap_around():
    model = np.zeros((1, 1, 64, 64), np.float32)
    model[0, 0, 32, 0] = 1.0
    kernel = difference_kernel_ft(gaussian_psf(3.0, 41), 0.8, fft_size(64, 41))
    observed = convolve_to_observed(model, kernel[None])
    assert np.abs(observed[..., 30:]).max() < 1e-5
    assert observed[0, 0, 32, 0] > 0.01


def test_convolution_reads_the_kernel_that_the_index_says():
    models = np.zeros((3, 1, 33, 33), np.float32)
    models[:, 0] = gaussian_psf(0.8, 33)
    table = np.stack([difference_kernel_ft(gaussian_psf(s, 25), 0.8, 48)[None] for s in (1.2, 2.0)])
    observed = convolve_to_observed(models, table, [1, 0, 1])
    assert observed.dtype == np.float32
    for image, sigma in zip(observed[:, 0], (2.0, 1.2, 2.0), strict=True):
        np.testing.assert_allclose(image[4:29, 4:29], gaussian_psf(sigma, 25), atol=1e-5)
    assert convolve_to_observed(models[:0], table, []).shape == (0, 1, 33, 33)


def test_shapes_that_do_not_agree_are_refused():
    kernel = difference_kernel_ft(gaussian_psf(1.5, 25), 0.8, 48)
    with pytest.raises(ValueError, match="do not fit"):
        difference_kernel_ft(gaussian_psf(1.5, 25), 0.8, 20)
    with pytest.raises(ValueError, match="odd sizes"):
        difference_kernel_ft(np.ones((24, 24)), 0.8, 48)
    with pytest.raises(ValueError, match="do not go with"):
        convolve_to_observed(np.zeros((2, 3, 32, 32)), kernel[None])
    with pytest.raises(ValueError, match="do not fit"):
        convolve_to_observed(np.zeros((2, 1, 64, 64)), kernel[None])
    with pytest.raises(ValueError, match="or an index"):
        convolve_to_observed(np.zeros((2, 1, 32, 32)), np.stack([kernel[None]] * 3))


def test_width_of_a_psf():
    stamps = np.stack([gaussian_psf(s, 31) for s in (1.5, 2.5)])
    # A pixel adds a twelfth to the variance.
    np.testing.assert_allclose(psf_sigma(stamps), np.sqrt(np.array([1.5, 2.5]) ** 2 + 1 / 12), rtol=1e-3)
