# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pictures of images, models and residuals. Nothing here opens a window."""

from __future__ import annotations

__all__ = [
    "colour",
    "colour_key",
    "new_figure",
    "residual_map",
    "rgb_bands",
    "scale_bar",
    "show_colour",
    "show_sigma",
]

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from astropy.visualization import make_lupton_rgb
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGMA_RANGE = 5.0
"""Residuals are shown between plus and minus this many standard deviations."""


def new_figure(width: float, height: float) -> Figure:
    """Make a figure that needs no display; sizes in inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rgb_bands(bands: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """Choose the bands shown as red, green and blue, with their weights in f_nu.

    i, r and g, balanced such that a galaxy of ordinary colour (g - r of 0.5, r - i of 0.4) is grey; or else
    the last, middle and first band of the list with equal weights.
    """
    bands = list(bands)
    if all(band in bands for band in "irg"):
        weights = (10 ** (-0.4 * 0.4), 1.0, 10 ** (0.4 * 0.5))
        return tuple((bands.index(band), weight) for band, weight in zip("irg", weights, strict=True))
    last = len(bands) - 1
    return (last, 1.0), (last // 2, 1.0), (0, 1.0)


def colour(
    images: ArrayLike, bands: Sequence[str], noise: ArrayLike, *, q: float = 8.0, stretch: float = 5.0
) -> NDArray[np.uint8]:
    """Make a colour image with Lupton's asinh stretch (Lupton et al. 2004, PASP 116, 133).

    Parameters
    ----------
    images : array_like, (B, H, W)
        Images, nJy.
    bands : sequence of `str`
        Their bands.
    noise : array_like, (B,)
        Background standard deviation of the images, nJy. It sets the scale, so that an image, its models and
        its residual are shown alike.
    q : `float`, optional
        Softening of the stretch.
    stretch : `float`, optional
        Linear range, in standard deviations of the noise.

    Returns
    -------
    rgb : `numpy.ndarray`, (H, W, 3)
    """
    pixels, sigma = np.nan_to_num(np.asarray(images, float)), np.asarray(noise, float)
    channels = rgb_bands(bands)
    scale = float(np.mean([sigma[i] * weight for i, weight in channels]))
    rgb = (pixels[i] * weight for i, weight in channels)
    return make_lupton_rgb(*rgb, minimum=-0.5 * scale, stretch=stretch * scale, Q=q)


def colour_key(bands: Sequence[str]) -> str:
    """Say which bands `colour` shows as which colour."""
    channels = zip(("red", "green", "blue"), rgb_bands(bands), strict=True)
    return ", ".join(f"{name} {list(bands)[i]}" for name, (i, _) in channels)


def scale_bar(axes: Axes, arcsec: float, pixel_scale: float, colour_: str = "white") -> None:
    """Draw a bar of given length into the lower left corner of an image in pixels."""
    x0, x1 = axes.get_xlim()
    y0, y1 = axes.get_ylim()
    left, low = x0 + 0.04 * (x1 - x0), y0 + 0.05 * (y1 - y0)
    axes.plot([left, left + arcsec / pixel_scale], [low, low], "-", color=colour_, linewidth=2)
    axes.text(left, low + 0.02 * (y1 - y0), f'{arcsec:g}"', color=colour_, fontsize="small", va="bottom")


def residual_map(residual: ArrayLike, variance: ArrayLike, valid: ArrayLike) -> NDArray[np.float64]:
    """Combine the residuals of all bands into one map in units of its standard deviation.

    The sum over bands of residual over standard deviation, over the root of the number of bands: unit
    variance where the residual is noise, whatever the bands, and structure that is common to the bands stands
    out.

    Parameters
    ----------
    residual, variance, valid : array_like, (B, H, W)
        Image minus models, nJy, its variance, nJy^2, and the pixels to use.

    Returns
    -------
    sigma : `numpy.ndarray`, (H, W)
        NaN where no band has a pixel to use.
    """
    valid = np.asarray(valid, bool)
    pull = np.where(valid, np.asarray(residual, float) / np.sqrt(np.where(valid, variance, 1.0)), 0.0)
    count = valid.sum(axis=0)
    return np.divide(pull.sum(axis=0), np.sqrt(count), out=np.full(count.shape, np.nan), where=count > 0)


def show_colour(axes: Axes, rgb: NDArray, title: str = "", origin: tuple[float, float] = (0, 0)) -> None:
    """Draw a colour image on axes in tract pixels, y upwards; ``origin`` is the first pixel (y, x)."""
    _show(axes, rgb, title, origin)


def show_sigma(axes: Axes, sigma: NDArray, title: str = "", origin: tuple[float, float] = (0, 0)):
    """Draw a map in units of its standard deviation; returns the image, for a colour bar."""
    return _show(axes, sigma, title, origin, cmap="RdBu_r", vmin=-SIGMA_RANGE, vmax=SIGMA_RANGE)


def _show(axes: Axes, image: NDArray, title: str, origin: tuple[float, float], **keywords):
    y0, x0 = origin
    height, width = image.shape[:2]
    extent = (x0 - 0.5, x0 + width - 0.5, y0 - 0.5, y0 + height - 0.5)
    shown = axes.imshow(image, origin="lower", extent=extent, interpolation="nearest", **keywords)
    axes.set_title(title, fontsize="medium")
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    return shown
