# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""From deblended sources to scarlet models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...ground.psf import gaussian_psf
from ...scene import Parent
from ...sources import SourceModels
from ._factorize import factorize
from ._records import (
    CubeComponent,
    FactorizedComponent,
    IsolatedSource,
    ScarletBlend,
    ScarletModels,
    ScarletParent,
    ScarletSource,
)
from ._write import check

__all__ = ["isolated_to_scarlet", "models_to_scarlet"]

_MODEL_PSF_SIZE = 15


def isolated_to_scarlet(
    bands: Sequence[str],
    psf: ArrayLike,
    isolated: Sequence[Parent],
    origin: tuple[int, int],
    *,
    model_sigma: float = 0.8,
) -> ScarletModels:
    """Make scarlet models of a patch where nothing was deblended.

    Parameters
    ----------
    bands : sequence of `str`
        Bands.
    psf : array_like, (B, h, w)
        Observed PSF of the patch in each band.
    isolated : sequence of `lsst.meas.vaedeblend.scene.Parent`
        The isolated sources, with their first peak.
    origin : `tuple` [`int`]
        Tract pixel (y, x) of the scene's pixel [0, 0].
    model_sigma : `float`, optional
        Standard deviation of the model frame's Gaussian before the integration over pixels, pixel.

    Returns
    -------
    scarlet : `ScarletModels`
        The models.

    Raises
    ------
    ValueError
        Raised if an isolated source has no peak.
    """
    y0, x0 = origin
    model_psf = gaussian_psf(model_sigma, _MODEL_PSF_SIZE).astype(np.float32)
    out = ScarletModels(tuple(bands), model_psf, np.asarray(psf, np.float32))
    for parent in isolated:
        if not len(parent.peaks):
            raise ValueError(f"The isolated source {parent.id} has no peak.")
        peak = (float(np.rint(parent.peaks[0, 1])) + y0, float(np.rint(parent.peaks[0, 0])) + x0)
        corner = (int(parent.y0 + y0), int(parent.x0 + x0))
        out.isolated[int(parent.id)] = IsolatedSource(corner, peak, parent.footprint)
    return out


def models_to_scarlet(
    models: SourceModels,
    psf: ArrayLike,
    parents: Sequence[Parent],
    isolated: Sequence[Parent] = (),
    *,
    peak_ids: ArrayLike | None = None,
    model_sigma: float = 0.8,
    tolerance: float = 1e-3,
) -> ScarletModels:
    """Turn deblended sources into scarlet models.

    Parameters
    ----------
    models : `lsst.meas.vaedeblend.sources.SourceModels`
        The sources, whose model frame has to be a Gaussian's. Ids and parents are those of the catalogues
        that go with the file.
    psf : array_like, (B, h, w)
        Observed PSF of the patch in each band; the file holds no more.
    parents : sequence of `lsst.meas.vaedeblend.scene.Parent`
        Parents of the sources; those without any are left out.
    isolated : sequence of `lsst.meas.vaedeblend.scene.Parent`, optional
        Those to be stored as isolated sources, with their first peak: single sources, sky objects, and
        whatever else was not deblended. What ``models`` has in them is left out.
    peak_ids : array_like, (N,), optional
        Identifiers of the merged detections' peaks that the sources come from; by default their own.
    model_sigma : `float`, optional
        Standard deviation of the model frame's Gaussian before the integration over pixels, pixel.
    tolerance : `float`, optional
        Error of a pixel, and of the flux in a circle, over the flux of its band, see `factorize`; the total
        flux is exact. Where the standard deviation of the flux is larger, circles may be off by a fifth of
        it, but by no more than a hundred times the tolerance, and pixels by a twentieth of it, but by no more
        than twenty times the tolerance.

    Returns
    -------
    scarlet : `ScarletModels`
        The models. A source without flux has one pixel of 0 at its peak, because measurement needs one
        component at least.

    Raises
    ------
    ValueError
        Raised if a source belongs to none of the parents, an id appears twice, a model is not finite, an
        isolated source has no peak, or the PSFs do not go with the models.
    """
    psf = np.asarray(psf, np.float32)
    y0, x0 = models.origin
    peak_ids = models.id if peak_ids is None else np.asarray(peak_ids)
    if len(peak_ids) != len(models):
        raise ValueError(f"{len(peak_ids)} peaks for {len(models)} sources.")
    # Most sources of a patch are faint: what lies far below their noise would only make the file large.
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = models.flux_err / models.flux
    relative = np.where(relative >= 0, relative, np.inf)
    circle = np.clip(0.2 * relative, tolerance, 100.0 * tolerance)
    pixel = np.clip(0.05 * relative, tolerance, 20.0 * tolerance)
    out = isolated_to_scarlet(models.bands, psf, isolated, models.origin, model_sigma=model_sigma)
    known = {int(parent.id): parent for parent in parents}
    blends: dict[int, ScarletBlend] = {}
    stored = np.flatnonzero(~np.isin(models.parent, list(out.isolated)))
    for i, model in _rendered(models, stored):
        number, parent_id = int(models.id[i]), int(models.parent[i])
        if parent_id not in known:
            raise ValueError(f"Source {number} belongs to parent {parent_id}, which is not given.")
        if parent_id not in blends:
            parent = known[parent_id]
            origin = (int(parent.y0 + y0), int(parent.x0 + x0))
            blends[parent_id] = ScarletBlend(origin, parent.footprint.shape, {})
            out.parents[parent_id] = ScarletParent(origin, parent.footprint, {parent_id: blends[parent_id]})
        if number in blends[parent_id].sources:
            raise ValueError(f"Two sources have the id {number}.")
        # Models that come from their table do not know their peaks.
        at = (models.peak_y[i], models.peak_x[i])
        at = at if np.isfinite(at).all() else (models.y[i], models.x[i])
        peak = (float(np.rint(at[0])) + y0, float(np.rint(at[1])) + x0)
        corner = (int(models.corner_y[i]) + y0, int(models.corner_x[i]) + x0)
        components: list[FactorizedComponent | CubeComponent] = [
            FactorizedComponent((corner[0] + y, corner[1] + x), peak, spectrum, morph)
            for spectrum, morph, (y, x) in factorize(model, pixel[i], circle[i])
        ]
        if not components:
            nothing = np.zeros(len(models.bands), np.float32)
            place = (int(peak[0]), int(peak[1]))
            components = [FactorizedComponent(place, peak, nothing, np.ones((1, 1), np.float32))]
        blends[parent_id].sources[number] = ScarletSource(number, int(peak_ids[i]), components)
    check(out)
    return out


def _rendered(models: SourceModels, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Render sources in pieces, so that their images need not all exist at once: rows and images (B, S,
    S)."""
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        for width in np.unique(models.images.width[part]):
            own = part[models.images.width[part] == width]
            yield from zip(own.tolist(), models.images.model_frame(own), strict=True)
