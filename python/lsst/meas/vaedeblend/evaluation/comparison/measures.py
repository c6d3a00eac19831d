# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is measured of every object: alone, against another deblender's, and against the truth."""

from __future__ import annotations

__all__ = [
    "APERTURE",
    "Light",
    "colour_bands",
    "measure_objects",
    "measure_pairs",
    "measure_truth",
    "true_properties",
]

import numpy as np
from numpy.typing import NDArray

from ...ground.bands import reference_band
from ...ground.statistics import stamp_snr
from ..metrics import blendedness_total, magnitude
from .entrants import Entrant, Stamp
from .matching import Matches, match_lists, separations
from .patches import Patch, Truth

APERTURE = 7.0
"""Radius of the circles that light is measured in, pixel: what a measurement of deblended images would do."""

_HALF = 32
"""Half the width of the square on which two deblenders' images of an object are compared, pixel."""


def colour_bands(bands: tuple[str, ...]) -> tuple[int, int]:
    """Choose the two bands, by index, whose colour is compared: g and r, or else the reference band's and
    the one before it (after, if it is the first)."""
    if "g" in bands and "r" in bands:
        return bands.index("g"), bands.index("r")
    b = bands.index(reference_band(bands))
    return (b - 1, b) if b else (0, min(1, len(bands) - 1))


def _circle(box: tuple[int, int, int, int], x: float, y: float) -> NDArray[np.bool_]:
    """Pixels of a rectangle (y0, x0, height, width) in the aperture around a position."""
    y0, x0, height, width = box
    yy, xx = np.mgrid[0:height, 0:width]
    return np.hypot(xx + x0 - x, yy + y0 - y) < APERTURE


def _ratio(a: NDArray | float, b: NDArray | float) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(a, float) / np.asarray(b, float)


class Light:
    """An entrant's images with what they sum up to, and the coadd shared out among them.

    Parameters
    ----------
    entrant : `Entrant`
        The entrant.
    patch : `Patch`
        Its patch.
    """

    def __init__(self, entrant: Entrant, patch: Patch) -> None:
        scene = patch.scene
        self.entrant, self.scene = entrant, scene
        self.total = entrant.total(scene.shape)
        positive = entrant.total(scene.shape, positive=True)
        # As in lsst.meas.vaedeblend.redistribution: each pixel goes by the positive parts of the models.
        self.ratio = np.divide(scene.image, positive, out=np.zeros_like(positive), where=positive > 0)
        self.image = Stamp(scene.image, 0, 0)
        self.weight = Stamp(scene.weight, 0, 0)

    def redistributed(self, i: int, box: tuple[int, int, int, int]) -> NDArray[np.float32]:
        """The coadd's light that is object i's, on a box (y0, x0, h, w)."""
        own = self.entrant.stamp(i).on(*box)
        if not self.entrant.is_model[i]:
            return own
        return np.maximum(own, 0) * Stamp(self.ratio, 0, 0).on(*box)

    def chi2(self, x: float, y: float) -> float:
        """Mean of squared residual over variance over valid pixels of all bands in the circle at (x, y)."""
        box = _box(x, y, int(np.ceil(APERTURE)))
        inside = _circle(box, x, y)
        weight = self.weight.on(*box) * inside
        used = weight > 0
        residual = self.image.on(*box) - Stamp(self.total, 0, 0).on(*box)
        return float((residual[used] ** 2 * weight[used]).mean()) if used.any() else np.nan


def _box(x: float, y: float, half: int = _HALF) -> tuple[int, int, int, int]:
    """The square (y0, x0, height, width) around a position."""
    return round(y) - half, round(x) - half, 2 * half + 1, 2 * half + 1


def _centroid(pixels: NDArray, y0: int, x0: int, x: float, y: float) -> tuple[float, float]:
    """Centroid (x, y) of an image (h, w) in the circle around (x, y); NaN without light there."""
    light = np.where(
        _circle((y0, x0, pixels.shape[0], pixels.shape[1]), x, y), np.maximum(pixels, 0), 0
    ).astype(float)
    total = light.sum()
    if not total > 0:
        return np.nan, np.nan
    yy, xx = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]]
    return float((light * xx).sum() / total) + x0, float((light * yy).sum() / total) + y0


def measure_objects(light: Light) -> dict[str, NDArray]:
    """Measure an entrant's objects.

    Parameters
    ----------
    light : `Light`
        The entrant on its patch.

    Returns
    -------
    columns : `dict` [`str`, `numpy.ndarray`]
        By object: ``id``, ``x``, ``y`` (scene coordinates), ``flux``, ``flux_err`` (N, B; its own, nJy),
        ``aperture``, ``redistributed`` (N, B; sums in the circle of `APERTURE` around it, of the image and of
        the coadd's light that is its share, nJy), ``mag`` and ``snr`` (reference band; of the image for an
        optimal filter), ``deblend_blendedness`` (1 - sum(I_i^2) / sum(I_tot I_i), bands weighted by their
        noise), ``chi2`` (over valid pixels of the circle, all bands; NaN where the image is the coadd's own
        pixels), ``centroid_x``, ``centroid_y`` (of the light in the circle, reference band), ``separation``
        (to the nearest other object, pixel).
    """
    entrant, scene = light.entrant, light.scene
    n, bands = len(entrant), len(scene.bands)
    b = scene.bands.index(reference_band(scene.bands))
    out = {key: np.full(n, np.nan) for key in ("snr", "deblend_blendedness", "chi2")}
    out |= {key: np.full(n, np.nan) for key in ("centroid_x", "centroid_y")}
    sums = {key: np.full((n, bands), np.nan) for key in ("aperture", "redistributed")}
    weight = np.nan_to_num(1 / scene.noise**2)[:, None, None]
    for i in range(n):
        x, y = float(entrant.x[i]), float(entrant.y[i])
        pixels, y0, x0 = entrant.stamp(i)
        box = (y0, x0, pixels.shape[1], pixels.shape[2])
        circle = _circle(box, x, y)
        sums["aperture"][i] = pixels[:, circle].sum(axis=1)
        sums["redistributed"][i] = light.redistributed(i, box)[:, circle].sum(axis=1)
        inverse = light.weight.on(*box)
        out["snr"][i] = np.sqrt((pixels[b].astype(float) ** 2 * inverse[b]).sum())
        total = Stamp(light.total, 0, 0).on(*box)
        overlap = float((weight * pixels * total).sum(dtype=float))
        own = float((weight * pixels.astype(float) ** 2).sum())
        out["deblend_blendedness"][i] = 1 - own / overlap if overlap > 0 else np.nan
        if entrant.is_model[i]:
            out["chi2"][i] = light.chi2(x, y)
        out["centroid_x"][i], out["centroid_y"][i] = _centroid(pixels[b], y0, x0, x, y)
    flux = entrant.own_flux
    return {
        "id": entrant.id,
        "x": entrant.x,
        "y": entrant.y,
        "flux": flux,
        "flux_err": np.full(flux.shape, np.nan) if entrant.flux_err is None else entrant.flux_err,
        **sums,
        "mag": magnitude(flux[:, b]),
        **out,
        "separation": separations(np.column_stack([entrant.x, entrant.y])),
    }


def measure_pairs(light_a: Light, light_b: Light, radius: float) -> tuple[Matches, dict[str, NDArray]]:
    """Compare two entrants object by object.

    Parameters
    ----------
    light_a, light_b : `Light`
        The entrants on their patch.
    radius : `float`
        Largest distance of a pair, pixel.

    Returns
    -------
    matches : `Matches`
        Pairs, and what is merged, split, or lacking; of entrants that both go by the truth's rows, pairs are
        those of the same row.
    columns : `dict` [`str`, `numpy.ndarray`]
        By pair: ``flux``, ``aperture``, ``redistributed`` (K, B; second over first, minus 1; the latter two
        in the circle around the first), ``colour`` (second minus first, mag), ``overlap`` (cosine of the
        images, bands weighted with their variances), ``disagreement`` (root of the sum of their squared
        difference over variance, over that of the brighter one: 0 for equal images), ``shift`` (distance of
        the positions, pixel), ``snr`` (of the first, reference band), ``mag`` (of the first).
    """
    a, b, scene = light_a.entrant, light_b.entrant, light_a.scene
    if a.truth_row is not None and b.truth_row is not None:
        both, first, second = np.intersect1d(a.truth_row, b.truth_row, return_indices=True)
        nothing = np.empty(0, np.int64)
        matches = Matches(
            first,
            second,
            nothing,
            np.setdiff1d(np.arange(len(a)), first),
            nothing,
            np.setdiff1d(np.arange(len(b)), second),
        )
    else:
        matches = match_lists(np.column_stack([a.x, a.y]), np.column_stack([b.x, b.y]), radius)
    count, bands = len(matches.first), len(scene.bands)
    r = scene.bands.index(reference_band(scene.bands))
    c0, c1 = colour_bands(scene.bands)
    weight = np.nan_to_num(1 / scene.noise**2)[:, None, None]
    flux_a, flux_b = a.own_flux[matches.first], b.own_flux[matches.second]
    sums = {key: np.full((count, bands), np.nan) for key in ("aperture", "redistributed")}
    out = {key: np.full(count, np.nan) for key in ("overlap", "disagreement", "snr")}
    for k, (i, j) in enumerate(zip(matches.first.tolist(), matches.second.tolist(), strict=True)):
        x, y = float(a.x[i]), float(a.y[i])
        box = _box(x, y)
        circle = _circle(box, x, y)
        first, second = a.stamp(i).on(*box).astype(float), b.stamp(j).on(*box).astype(float)
        sums["aperture"][k] = _ratio(second[:, circle].sum(axis=1), first[:, circle].sum(axis=1)) - 1
        shared_a, shared_b = light_a.redistributed(i, box), light_b.redistributed(j, box)
        sums["redistributed"][k] = (
            _ratio(shared_b[:, circle].sum(axis=1), shared_a[:, circle].sum(axis=1)) - 1
        )
        norm = [float((weight * image**2).sum()) for image in (first, second)]
        out["overlap"][k] = _ratio((weight * first * second).sum(), np.sqrt(norm[0] * norm[1]))
        out["disagreement"][k] = np.sqrt(_ratio((weight * (first - second) ** 2).sum(), max(norm)))
        out["snr"][k] = np.sqrt((first[r] ** 2 * light_a.weight.on(*box)[r]).sum())
    return matches, {
        "flux": _ratio(flux_b, flux_a) - 1,
        **sums,
        "colour": (magnitude(flux_b[:, c0]) - magnitude(flux_b[:, c1]))
        - (magnitude(flux_a[:, c0]) - magnitude(flux_a[:, c1])),
        **out,
        "shift": np.hypot(a.x[matches.first] - b.x[matches.second], a.y[matches.first] - b.y[matches.second]),
        "mag": magnitude(flux_a[:, r]),
    }


def true_properties(patch: Patch, truth: Truth) -> dict[str, NDArray]:
    """Give what is true of each object whoever deblends: ``mag``, ``snr``, ``blendedness``, ``separation``
    (pixel), ``star``, ``large``, ``e`` (N, 2; KSB), ``flux`` (N, B; sum of the stamp, nJy)."""
    from ...simulation.ksb import ksb_shape

    scene, size = patch.scene, truth.stamp.shape[-1]
    b = scene.bands.index(reference_band(scene.bands))
    total = np.zeros(scene.image.shape, np.float64)
    whole = []
    for i in range(len(truth)):
        stamp = Stamp(truth.stamp[i], int(truth.stamp_y0[i]), int(truth.stamp_x0[i]))
        whole.append(stamp)
        total += stamp.on(0, 0, *scene.shape)
    snr, blendedness = np.full((2, len(truth)), np.nan)
    shapes = np.full((len(truth), 2), np.nan)
    variance = Stamp(scene.variance, 0, 0)
    psf = scene.psf.filled()
    for i, (pixels, y0, x0) in enumerate(whole):
        box = (y0, x0, size, size)
        own, all_light = pixels[b].astype(float), Stamp(total, 0, 0).on(*box)[b]
        noise = variance.on(*box)[b]
        snr[i] = stamp_snr(own, np.where(noise > 0, noise, np.inf))
        blendedness[i] = blendedness_total(own, all_light)
        shapes[i] = ksb_shape(own, psf.stamps[int(psf.index(truth.x[i], truth.y[i])), b])
    flux = truth.stamp.sum(axis=(2, 3), dtype=float)
    return {
        "mag": magnitude(flux[:, b]),
        "snr": snr,
        "blendedness": blendedness,
        "separation": separations(np.column_stack([truth.x, truth.y])),
        "star": truth.star,
        "large": truth.radius > 1.0,
        "e": shapes,
        "flux": flux,
    }


def measure_truth(
    light: Light, truth: Truth, true: dict[str, NDArray], radius: float
) -> tuple[Matches, dict[str, NDArray]]:
    """Measure an entrant's errors against the truth.

    Parameters
    ----------
    light : `Light`
        The entrant on its patch.
    truth : `Truth`
        The true objects.
    true : `dict` [`str`, `numpy.ndarray`]
        What `true_properties` gave.
    radius : `float`
        Largest distance of a match, pixel.

    Returns
    -------
    matches : `Matches`
        True objects matched with the entrant's.
    columns : `dict` [`str`, `numpy.ndarray`]
        By true object, NaN where it was not found or its model has no positive flux in the reference band.
        On the truth's stamp and in the reference band unless said otherwise: ``row`` (of the entrant, -1),
        ``found``, ``flux`` (sum of the image over the true one, minus 1), ``aperture`` and
        ``redistributed`` (the same in the circle around the true centre, of the image and of the coadd's
        light that is its share), ``colour`` (error of the colour, mag), ``cosine`` (of the images), ``e``
        (N, 2; error of the KSB ellipticity), ``shift`` (of the light's centroid in the circle, pixel),
        ``band_flux`` (N, B; as ``flux``), ``pull`` (N, B; error of its own flux over its standard deviation).
    """
    from ...simulation.ksb import ksb_shape

    entrant, scene = light.entrant, light.scene
    n, bands, size = len(truth), len(scene.bands), truth.stamp.shape[-1]
    b = scene.bands.index(reference_band(scene.bands))
    c0, c1 = colour_bands(scene.bands)
    if entrant.truth_row is not None:
        nothing = np.empty(0, np.int64)
        missed = np.setdiff1d(np.arange(n), entrant.truth_row)
        matches = Matches(entrant.truth_row, np.arange(len(entrant)), nothing, missed, nothing, nothing)
    else:
        position = np.column_stack([entrant.x, entrant.y])
        matches = match_lists(np.column_stack([truth.x, truth.y]), position, radius)
    psf = scene.psf.filled()
    out = {key: np.full(n, np.nan) for key in ("flux", "aperture", "redistributed", "colour", "cosine")}
    out["shift"] = np.full(n, np.nan)
    out |= {"e": np.full((n, 2), np.nan), "band_flux": np.full((n, bands), np.nan)}
    out["pull"] = np.full((n, bands), np.nan)
    row, found = np.full(n, -1, np.int64), np.zeros(n, bool)
    for t, i in zip(matches.first.tolist(), matches.second.tolist(), strict=True):
        row[t] = i
        y0, x0 = int(truth.stamp_y0[t]), int(truth.stamp_x0[t])
        box = (y0, x0, size, size)
        # The same single precision arrays in, so that the numbers are those of any other reader of the files.
        model, own = entrant.stamp(i).on(*box), truth.stamp[t]
        mine, right = model[b].astype(float), own[b].astype(float)
        if not mine.sum() > 0:
            continue
        found[t] = True
        circle = _circle(box, truth.x[t], truth.y[t])
        out["band_flux"][t] = _ratio(model.sum(axis=(1, 2), dtype=float), true["flux"][t]) - 1
        out["flux"][t] = mine.sum() / right.sum() - 1
        out["aperture"][t] = mine[circle].sum() / right[circle].sum() - 1
        shared = light.redistributed(i, box)[b]
        out["redistributed"][t] = shared[circle].sum() / right[circle].sum() - 1
        ratio = _ratio(model[c0].sum() / model[c1].sum(), own[c0].sum() / own[c1].sum())
        # Light that is not positive has no magnitude: it counts as a very large error.
        out["colour"][t] = -2.5 * np.log10(max(float(ratio), 1e-9))
        out["cosine"][t] = (mine * right).sum() / np.sqrt((mine**2).sum() * (right**2).sum())
        stamp = psf.stamps[int(psf.index(truth.x[t], truth.y[t])), b]
        out["e"][t] = np.array(ksb_shape(mine, stamp)) - true["e"][t]
        centres = [_centroid(image, y0, x0, truth.x[t], truth.y[t]) for image in (mine, right)]
        (x1, y1), (x2, y2) = centres
        out["shift"][t] = np.hypot(x1 - x2, y1 - y2)
        if entrant.flux_err is not None:
            out["pull"][t] = _ratio(entrant.own_flux[i] - true["flux"][t], entrant.flux_err[i])
    return matches, {"row": row, "found": found, **out}
