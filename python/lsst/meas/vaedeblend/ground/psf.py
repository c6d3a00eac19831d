# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Point spread functions: moments, and the way from the model frame to the observed frame.

A network's models live in a *model frame*, the sky seen through a PSF that is the same everywhere: a narrow
Gaussian integrated over pixels, or one fixed wide PSF per band. What a coadd shows is the same sky through
the local PSF of each band. The two are joined by the difference kernel, whose Fourier transform is the ratio
of the transforms of the two PSFs.

PSF stamps are images: they include the pixel, have odd sizes, are centred on their middle pixel and sum to 1.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

__all__ = [
    "FWHM_PER_SIGMA",
    "adaptive_moments",
    "convolve_to_observed",
    "difference_kernel_ft",
    "fft_size",
    "gaussian_psf",
    "kolmogorov_psf",
    "matching_kernel_ft",
    "moments_sigma",
    "psf_sigma",
    "wings",
]

FWHM_PER_SIGMA = 2.0 * np.sqrt(2.0 * np.log(2.0))
"""Full width at half maximum of a Gaussian of unit standard deviation."""

# What the fit of a power law to wings starts from.
_FIRST_SLOPE = 5.0

# Stamps that adaptive_moments treats at once: bounds its scratch memory to some tens of MB.
_CHUNK = 1024


def gaussian_psf(sigma: float, size: int) -> NDArray[np.float64]:
    """Make a circular Gaussian PSF integrated over pixels.

    Parameters
    ----------
    sigma : `float`
        Standard deviation of the Gaussian before the integration over pixels, pixel.
    size : `int`
        Width of the stamp, pixel; odd.

    Returns
    -------
    psf : `numpy.ndarray`, (size, size)
        The PSF, centred on the middle pixel, with sum 1.

    Raises
    ------
    ValueError
        Raised if ``size`` is not odd or ``sigma`` not positive.
    """
    if size % 2 != 1 or not sigma > 0:
        raise ValueError(f"A PSF stamp needs an odd size and a positive sigma, not {size} and {sigma}.")
    edges = np.arange(size + 1) - size / 2.0
    line = np.diff(erf(edges / (np.sqrt(2.0) * sigma)))
    psf = line[:, None] * line[None, :]
    return psf / psf.sum()


def kolmogorov_psf(fwhm: float, size: int) -> NDArray[np.float64]:
    """Make a Kolmogorov PSF integrated over pixels.

    The transfer function of long exposures through Kolmogorov turbulence is exp(-3.4419 (lambda f /
    r0)^(5/3)) (Fried 1966, J. Opt. Soc. Am. 56, 1372), whose profile has a full width at half maximum of
    0.975865 lambda / r0.

    Parameters
    ----------
    fwhm : `float`
        Full width at half maximum before the integration over pixels, pixel.
    size : `int`
        Width of the stamp, pixel; odd.

    Returns
    -------
    psf : `numpy.ndarray`, (size, size)
        The PSF, centred on the middle pixel, with sum 1.

    Raises
    ------
    ValueError
        Raised if ``size`` is not odd or ``fwhm`` not positive.
    """
    if size % 2 != 1 or not fwhm > 0:
        raise ValueError(f"A PSF stamp needs an odd size and a positive FWHM, not {size} and {fwhm}.")
    # A grid much wider than the stamp keeps the profile's wings from wrapping into it. Sampling the profile
    # at pixel centres folds the frequencies beyond Nyquist back; two replicas on each side hold all of them
    # for a FWHM above a pixel.
    grid = 4 * size
    base = scipy.fft.fftfreq(grid)
    transfer = np.zeros((grid, grid))
    for fold_y in range(-2, 3):
        for fold_x in range(-2, 3):
            fy, fx = base[:, None] + fold_y, base[None, :] + fold_x
            atmosphere = np.exp(-3.4419 * (np.hypot(fy, fx) * fwhm / 0.975865) ** (5.0 / 3.0))
            transfer += atmosphere * np.sinc(fy) * np.sinc(fx)
    image = scipy.fft.fftshift(scipy.fft.ifft2(transfer).real)
    low = grid // 2 - size // 2
    psf = image[low : low + size, low : low + size]
    return psf / psf.sum()


def adaptive_moments(stamps: ArrayLike, max_iterations: int = 200, tolerance: float = 1e-7) -> NDArray:
    """Measure adaptive second moments, many stamps at once.

    The moments are those of the elliptical Gaussian weight that matches the object, found by iteration
    (Bernstein & Jarvis 2002, AJ 123, 583, section 3; Hirata & Seljak 2003, MNRAS 343, 459). With weight of
    covariance M, an object that were a Gaussian of covariance C has weighted moments (M^-1 + C^-1)^-1, so
    that each step takes M to the C which the weighted moments imply. The fixed point, weighted moments equal
    to M/2, does not depend on the object being a Gaussian.

    Parameters
    ----------
    stamps : array_like, (..., h, w)
        Images of single objects near the centre of the stamp, any unit.
    max_iterations : `int`, optional
        Iterations after which a stamp is given up.
    tolerance : `float`, optional
        Relative change of the moments, and shift of the centroid in units of the size, that ends the
        iteration.

    Returns
    -------
    moments : `numpy.ndarray`, (..., 3)
        Ixx, Iyy and Ixy, pixel^2. NaN for stamps that are not finite or that the iteration fails on.

    Raises
    ------
    ValueError
        Raised if the stamps have fewer than two dimensions.
    """
    stamps = np.asarray(stamps)
    if stamps.ndim < 2:
        raise ValueError(f"Stamps need at least two dimensions, these have shape {stamps.shape}.")
    lead, (h, w) = stamps.shape[:-2], stamps.shape[-2:]
    flat = stamps.reshape(-1, h, w)
    out = np.empty((len(flat), 3))
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        out[start : start + _CHUNK] = _adaptive_moments(chunk, max_iterations, tolerance)
    return out.reshape(*lead, 3)


def moments_sigma(moments: ArrayLike) -> NDArray:
    """Compute the width of a PSF, the fourth root of the determinant of its second moments.

    Parameters
    ----------
    moments : array_like, (..., 3)
        Ixx, Iyy and Ixy, pixel^2.

    Returns
    -------
    sigma : `numpy.ndarray`, (...)
        Standard deviation of the circular Gaussian of equal area, pixel; 0 for a negative determinant.
    """
    ixx, iyy, ixy = np.moveaxis(np.asarray(moments), -1, 0)
    return np.maximum(ixx * iyy - ixy**2, 0.0) ** 0.25


def _adaptive_moments(stamps: NDArray, max_iterations: int, tolerance: float) -> NDArray:
    n, h, w = stamps.shape
    out = np.full((n, 3), np.nan)
    grid_y = np.arange(h) - (h - 1) / 2.0
    grid_x = np.arange(w) - (w - 1) / 2.0
    active = np.flatnonzero(np.isfinite(stamps).all(axis=(1, 2)))
    image = stamps[active]
    # A start of 2 pixels is within a factor 2 of the PSFs of ground-based coadds.
    m = np.tile([4.0, 4.0, 0.0], (len(active), 1))
    centre = np.zeros((len(active), 2))
    largest = (max(h, w) / 2.0) ** 2
    for _ in range(max_iterations):
        if not len(active):
            break
        dy, dx = grid_y - centre[:, :1], grid_x - centre[:, 1:]
        det = m[:, 0] * m[:, 1] - m[:, 2] ** 2
        ixx, iyy, ixy = m[:, 1] / det, m[:, 0] / det, -m[:, 2] / det
        rho = (ixy[:, None] * dy)[:, :, None] * dx[:, None, :]
        rho += (0.5 * iyy[:, None] * dy**2)[:, :, None]
        rho += (0.5 * ixx[:, None] * dx**2)[:, None, :]
        np.negative(rho, out=rho)
        np.exp(rho, out=rho)
        rho *= image
        along_x = rho.sum(axis=1)
        along_y = rho.sum(axis=2)
        norm = along_x.sum(axis=1)
        # A stamp of zeros, or one whose weighted sum is negative, has no moments: it drops out below.
        with np.errstate(all="ignore"):
            shift_y = (along_y * dy).sum(axis=1) / norm
            shift_x = (along_x * dx).sum(axis=1) / norm
            oyy = (along_y * dy**2).sum(axis=1) / norm - shift_y**2
            oxx = (along_x * dx**2).sum(axis=1) / norm - shift_x**2
            oxy = (np.matmul(rho, dx[:, :, None])[:, :, 0] * dy).sum(axis=1) / norm - shift_x * shift_y
            odet = oxx * oyy - oxy**2
            jxx, jyy, jxy = oyy / odet - ixx, oxx / odet - iyy, -oxy / odet - ixy
            jdet = jxx * jyy - jxy**2
            deweighted = np.stack([jyy / jdet, jxx / jdet, -jxy / jdet], axis=1)
            doubled = 2.0 * np.stack([oxx, oyy, oxy], axis=1)
            # Far from the fixed point the implied covariance may not exist or overshoot; doubling the
            # weighted moments has the same fixed point and always shrinks or grows by a bounded factor.
            trace = m[:, 0] + m[:, 1]
            sound = (jdet > 0) & (jxx + jyy > 0) & (deweighted[:, :2].sum(axis=1) < 4.0 * trace)
            new = np.where(sound[:, None], deweighted, doubled)
            change = np.abs(new - m).max(axis=1) / trace
            shift = np.hypot(shift_x, shift_y) / np.sqrt(trace)
            centre = centre + 2.0 * np.stack([shift_y, shift_x], axis=1)
            alive = (
                (norm > 0)
                & np.isfinite(new).all(axis=1)
                & (new[:, 0] * new[:, 1] > new[:, 2] ** 2)
                & (new[:, 0] > 0)
                & (new[:, :2].sum(axis=1) < 2 * largest)
                & (np.abs(centre[:, 0]) < h / 4.0)
                & (np.abs(centre[:, 1]) < w / 4.0)
            )
        done = alive & (change < tolerance) & (shift < tolerance)
        out[active[done]] = new[done]
        keep = alive & ~done
        m, centre = new[keep], centre[keep]
        if not keep.all():
            active, image = active[keep], image[keep]
    return out


def psf_sigma(stamps: ArrayLike) -> NDArray[np.float64]:
    """Return the width of PSFs, the fourth root of the determinant of their adaptive moments, pixel.

    Parameters
    ----------
    stamps : array_like, (..., h, w)
        PSF images.

    Returns
    -------
    sigma : `numpy.ndarray`, (...)
    """
    return moments_sigma(adaptive_moments(stamps))


def wings(stamps: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit how PSFs fall off at the border of their stamps.

    A stamp ends where its PSF does not: the wings of Moffat's profile follow a power law (Moffat 1969, A&A
    3, 455), and so do those of what dust and optics scatter, with a flatter one. Means over two rings give
    level and slope.

    Parameters
    ----------
    stamps : array_like, (..., h, w)
        PSF images of odd sizes.

    Returns
    -------
    level : `numpy.ndarray`, (...)
        Value at a distance of half of the stamp's smaller side, in the stamps' unit; 0 where the outer ring
        does not exceed its own scatter, and nothing is known of wings.
    slope : `numpy.ndarray`, (...)
        Exponent of the power law with which they fall, between 3 (flatter ones would hold any amount of
        light) and 8.
    """
    stamps = np.nan_to_num(np.asarray(stamps, dtype=np.float64))
    h, w = stamps.shape[-2:]
    reach = min(h, w) / 2
    distance = np.hypot(np.arange(h)[:, None] - h // 2, np.arange(w) - w // 2)
    inner = (distance >= 0.55 * reach) & (distance < 0.75 * reach)
    outer = (distance >= 0.75 * reach) & (distance <= reach)
    if not (inner.any() and outer.any()):
        return np.zeros(stamps.shape[:-2]), np.full(stamps.shape[:-2], 8.0)
    near, far = stamps[..., inner].mean(axis=-1), stamps[..., outer].mean(axis=-1)
    scatter = stamps[..., outer].std(axis=-1) / np.sqrt(outer.sum())
    known = (far > 3 * scatter) & (near > far)
    slope = np.full(far.shape, _FIRST_SLOPE)
    for _ in range(3):
        # A power law has its mean over a ring at a radius that depends on its slope.
        r_near, r_far = (
            (distance[ring] ** -slope[..., None]).mean(axis=-1) ** (-1 / slope) for ring in (inner, outer)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(known, np.log(near / far) / np.log(r_far / r_near), 8.0)
    # Faster than that are no wings but the flank of the core: it leaves nothing to speak of.
    known &= slope <= 8.0
    slope = np.clip(slope, 3.0, 8.0)
    return np.where(known, far * (reach / r_far) ** -slope, 0.0), slope


def fft_size(cutout_size: int, stamp_size: int) -> int:
    """Give the width of a grid on which cutouts convolve without wrapping around.

    Parameters
    ----------
    cutout_size : `int`
        Width of the cutouts, pixel.
    stamp_size : `int`
        Larger side of the PSF stamps, pixel.

    Returns
    -------
    size : `int`
        A width that the Fourier transform likes, at least the cutout and the radius of the stamp.
    """
    return scipy.fft.next_fast_len(max(cutout_size + stamp_size // 2, stamp_size), real=True)


def _transform(stamps: NDArray, size: int) -> NDArray:
    """Transform stamps with their middle pixel as the origin: (..., h, w) -> (..., size, size // 2 + 1)."""
    h, w = stamps.shape[-2:]
    if h % 2 != 1 or w % 2 != 1:
        raise ValueError(f"PSF stamps need odd sizes to have a middle pixel, these are {h} x {w}.")
    if max(h, w) > size:
        raise ValueError(f"PSF stamps of {h} x {w} do not fit on a grid of width {size}.")
    padded = np.zeros((*stamps.shape[:-2], size, size), stamps.dtype)
    padded[..., :h, :w] = stamps
    padded = np.roll(padded, (-(h // 2), -(w // 2)), axis=(-2, -1))
    return scipy.fft.rfft2(padded, axes=(-2, -1))


def _as_floating(stamps: ArrayLike) -> NDArray:
    stamps = np.asarray(stamps)
    return stamps if stamps.dtype == np.float32 else stamps.astype(np.float64)


def matching_kernel_ft(stamps: ArrayLike, source: ArrayLike, size: int, floor: float = 1e-4) -> NDArray:
    """Transform of the kernel that takes an image seen through one PSF to another PSF.

    With P and Q the transforms of the wanted and of the present PSF the kernel is P/Q where that attenuates,
    and 1 + (P - Q) Q* / (|Q|^2 + floor^2) where it amplifies: regularised as Wiener's filter is, and the
    identity at frequencies that the present PSF has lost. The two join continuously, and where the PSFs agree
    both are 1.

    Parameters
    ----------
    stamps : array_like, (..., h, w)
        The wanted PSFs.
    source : array_like, (..., h', w')
        The PSFs of the image as it is; leading dimensions broadcast with those of ``stamps``.
    size : `int`
        Width of the grid, pixel.
    floor : `float`, optional
        Transfer |Q| below which a frequency counts as lost, when it comes to amplifying it.

    Returns
    -------
    kernel : `numpy.ndarray`, (..., size, size // 2 + 1)
        Complex; single precision if ``stamps`` are, to multiply ``rfft2`` of images zero-padded to ``size``.

    Raises
    ------
    ValueError
        Raised if a stamp has an even size or is larger than the grid.
    """
    stamps = _as_floating(stamps)
    wanted = _transform(stamps, size)
    present = _transform(np.asarray(source, dtype=stamps.dtype), size)
    power = np.abs(present) ** 2
    power = power + np.where(np.abs(wanted) ** 2 > power, np.asarray(floor**2, power.dtype), 0)
    # A transfer that is zero to rounding divides noise by noise; its square may even underflow.
    power = np.maximum(power, np.finfo(power.dtype).tiny)
    wanted -= present
    wanted *= present.conj() / power
    wanted += 1
    return wanted


def difference_kernel_ft(stamps: ArrayLike, sigma: float, size: int) -> NDArray:
    """Transform of the kernel that takes a model in the Gaussian model frame to the observed frame.

    The ratio P/G of the transforms of the observed PSF and of the pixel-integrated Gaussian. At sigma of 0.8
    pixel G is 0.05 at the Nyquist frequency along an axis and 0.003 in the corner, so that the ratio is well
    behaved for any PSF; see `matching_kernel_ft` for what bounds it in other cases.

    Parameters
    ----------
    stamps : array_like, (..., h, w)
        Observed PSFs.
    sigma : `float`
        Standard deviation of the model frame's Gaussian, before the integration over pixels, pixel.
    size : `int`
        Width of the grid, pixel.

    Returns
    -------
    kernel : `numpy.ndarray`, (..., size, size // 2 + 1)
        Complex; single precision if ``stamps`` are, to multiply ``rfft2`` of images zero-padded to ``size``.

    Raises
    ------
    ValueError
        Raised if a stamp has an even size or is larger than the grid.
    """
    # Ten sigma hold the Gaussian to 1e-20; the stamp must still fit on the grid.
    width = min(2 * int(np.ceil(10 * sigma)) + 1, size - 1 + size % 2)
    return matching_kernel_ft(stamps, gaussian_psf(sigma, width), size)


def convolve_to_observed(models: ArrayLike, kernels_ft: NDArray, index: ArrayLike | None = None) -> NDArray:
    """Convolve models with their difference kernels.

    The convolution is linear as long as the grid of the kernels is as large as `fft_size` says: nothing wraps
    around into the cutout. Flux that the kernel moves out of the cutout is lost.

    Parameters
    ----------
    models : array_like, (N, B, S, S)
        Model images in the model frame, nJy.
    kernels_ft : `numpy.ndarray`, (P, B, F, F // 2 + 1) or (B, F, F // 2 + 1)
        Transforms of the kernels, one set per model, one for all, or a table that ``index`` reads.
    index : array_like, (N,), optional
        Row of ``kernels_ft`` that belongs to each model.

    Returns
    -------
    observed : `numpy.ndarray`, (N, B, S, S)
        Images in the observed frame, nJy, float32.

    Raises
    ------
    ValueError
        Raised if the shapes do not agree or the cutouts are larger than the grid.
    """
    models = np.asarray(models, dtype=np.float32)
    if models.ndim != 4 or kernels_ft.shape[-3] != models.shape[1]:
        raise ValueError(
            f"Models of shape {models.shape} do not go with kernels of shape {kernels_ft.shape}."
        )
    n, _, h, w = models.shape
    size = kernels_ft.shape[-2]
    if max(h, w) > size:
        raise ValueError(f"Models of {h} x {w} do not fit on the kernels' grid of width {size}.")
    if kernels_ft.ndim == 3:
        kernels_ft, index = kernels_ft[None], np.zeros(n, dtype=np.int64)
    elif index is None:
        if len(kernels_ft) != n:
            raise ValueError(f"{n} models need {n} sets of kernels or an index, not {len(kernels_ft)} sets.")
        index = np.arange(n)
    index = np.asarray(index)
    out = np.empty_like(models)
    # Chunks keep the transforms in the processor's cache, which is worth more than long vectors.
    for start in range(0, n, 16):
        part = slice(start, min(start + 16, n))
        spectrum = scipy.fft.rfft2(models[part], s=(size, size), axes=(-2, -1))
        spectrum *= kernels_ft[index[part]]
        out[part] = scipy.fft.irfft2(spectrum, s=(size, size), axes=(-2, -1))[..., :h, :w]
    return out
