# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""SExtractor's detection, deblending and automatic apertures (Bertin & Arnouts 1996, A&AS 117, 393), by sep.

sep (Barbary 2016, JOSS 1, 58) is SExtractor's code as a library. Objects are detected on all bands together
and deblended by its multi-thresholding; each band is measured in the Kron ellipse of the detection image.
"""

from __future__ import annotations

__all__ = ["run_sep"]

import time

import numpy as np
from numpy.typing import NDArray

from ...scene import Scene
from .entrants import Entrant, Stamp

THRESHOLD = 1.5
"""Detection threshold, standard deviations of a pixel; SExtractor's default, as all numbers here."""
MIN_AREA = 5
DEBLEND_LEVELS, DEBLEND_CONTRAST = 32, 0.005
KRON_FACTOR, MIN_RADIUS = 2.5, 3.5
"""Factor on the Kron radius, and the least radius of the ellipse in units of its axes."""
KERNEL = np.array([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])


def run_sep(scene: Scene, name: str = "sep") -> Entrant:
    """Detect and deblend with SExtractor's defaults.

    The detection image is the mean of the bands weighted with their inverse variances. No background is
    subtracted: coadds come without. An object's image are the pixels of its Kron ellipse, those that the
    segmentation gave to another object replaced by the ones opposite the centre (``MASK_TYPE CORRECT``), so
    that its sum is the automatic flux.

    Parameters
    ----------
    scene : `lsst.meas.vaedeblend.scene.Scene`
        The patch.
    name : `str`, optional
        Name of the entrant.

    Returns
    -------
    entrant : `lsst.meas.vaedeblend.evaluation.comparison.entrants.Entrant`
        Its fluxes' errors are those of the pixels' noise.

    Raises
    ------
    ValueError
        Raised where sep is not installed.
    """
    try:
        import sep
    except ImportError as error:
        raise ValueError(
            "Running sep needs the package sep: pip install 'meas_vaedeblend[evaluate]'."
        ) from error
    start = time.perf_counter()
    weight = scene.weight.astype(np.float64)
    total = weight.sum(axis=0)
    bad = total == 0
    safe = np.where(bad, 1.0, total)
    data = np.ascontiguousarray(np.where(bad, 0.0, (scene.image * weight).sum(axis=0) / safe))
    error_map = np.ascontiguousarray(1 / np.sqrt(safe))
    # The detection of a large patch needs more than sep's default of active pixels and of members.
    sep.set_extract_pixstack(max(300_000, data.size // 4))
    sep.set_sub_object_limit(max(1024, data.size // 100))
    objects, segments = sep.extract(
        data,
        THRESHOLD,
        err=error_map,
        mask=bad,
        minarea=MIN_AREA,
        filter_kernel=KERNEL,
        filter_type="conv",
        deblend_nthresh=DEBLEND_LEVELS,
        deblend_cont=DEBLEND_CONTRAST,
        clean=True,
        segmentation_map=True,
    )
    x, y, a, b, theta = (np.asarray(objects[key], float) for key in ("x", "y", "a", "b", "theta"))
    theta = np.clip(theta, -np.pi / 2, np.pi / 2)
    number = np.arange(1, len(x) + 1)
    kron = np.zeros(len(x))
    if len(x):
        kron = sep.kron_radius(data, x, y, a, b, theta, 6.0, mask=bad, seg_id=number, segmap=segments)[0]
    reach = np.maximum(KRON_FACTOR * np.nan_to_num(kron), MIN_RADIUS)
    stamps = []
    variance = np.where(scene.valid, scene.variance, 0.0)
    flux, flux_err = np.zeros((2, len(x), len(scene.bands)))
    for i in range(len(x)):
        stamp, noise2 = _automatic(
            scene.image, variance, segments, i + 1, (x[i], y[i]), (a[i], b[i], theta[i], reach[i])
        )
        stamps.append(stamp)
        flux[i], flux_err[i] = stamp.pixels.sum(axis=(1, 2)), np.sqrt(noise2)
    return Entrant(
        name,
        scene.bands,
        id=number.astype(np.int64),
        x=x,
        y=y,
        draw=stamps.__getitem__,
        is_model=np.zeros(len(x), bool),
        flux=flux,
        flux_err=flux_err,
        seconds=time.perf_counter() - start,
    )


def _automatic(
    image: NDArray,
    variance: NDArray,
    segments: NDArray,
    number: int,
    centre: tuple[float, float],
    ellipse: tuple[float, float, float, float],
) -> tuple[Stamp, NDArray[np.float64]]:
    """The pixels of one object's Kron ellipse, and the variance of their sum, (B,)."""
    (x, y), (a, b, theta, reach) = centre, ellipse
    height, width = segments.shape
    radius = reach * a
    y0, y1 = max(0, int(np.floor(y - radius))), min(height, int(np.ceil(y + radius)) + 1)
    x0, x1 = max(0, int(np.floor(x - radius))), min(width, int(np.ceil(x + radius)) + 1)
    yy, xx = np.mgrid[y0:y1, x0:x1]
    u = (xx - x) * np.cos(theta) + (yy - y) * np.sin(theta)
    v = (yy - y) * np.cos(theta) - (xx - x) * np.sin(theta)
    inside = (u / a) ** 2 + (v / b) ** 2 <= reach**2

    def foreign(rows: NDArray, columns: NDArray) -> NDArray[np.bool_]:
        return (segments[rows, columns] != 0) & (segments[rows, columns] != number)

    # The pixel opposite the centre, itself where that is not on the image.
    opposite_y, opposite_x = np.rint(2 * y - yy).astype(int), np.rint(2 * x - xx).astype(int)
    there = (opposite_y >= 0) & (opposite_y < height) & (opposite_x >= 0) & (opposite_x < width)
    opposite_y, opposite_x = np.where(there, opposite_y, yy), np.where(there, opposite_x, xx)
    taken = foreign(yy, xx)
    rows, columns = np.where(taken, opposite_y, yy), np.where(taken, opposite_x, xx)
    use = inside & ~foreign(rows, columns)
    pixels = np.where(use, image[:, rows, columns], 0.0).astype(np.float32)
    return Stamp(pixels, y0, x0), np.where(use, variance[:, rows, columns], 0.0).sum(axis=(1, 2))
