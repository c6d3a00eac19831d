# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is handed back: sources, parents and residual."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ..ground.cutouts import add_cutouts, cut_out, overlaps
from ..sources import ParentSummary, SourceModels
from ._flags import source_flags
from ._state import State

__all__ = ["DeblendResult", "assemble"]

# Significance of the pixels that a source without a model from the network takes from the residual.
_FALLBACK_SIGNIFICANCE = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class DeblendResult:
    """What a deblended scene consists of.

    Parameters
    ----------
    sources : `SourceModels`
        All sources, ordered by parent.
    parents : `ParentSummary`
        All parents, in the scene's order.
    residual : `numpy.ndarray`, (B, H, W)
        Original image minus all models, nJy, float32, bands in the network's order; 0 in invalid pixels.
    """

    sources: SourceModels
    parents: ParentSummary
    residual: NDArray[np.float32]


def assemble(state: State) -> DeblendResult:
    """Put together what the procedure found, rows ordered by parent.

    The state is of no use afterwards.
    """
    state.subtract()
    r, scene = state.rows, state.scene
    alive = np.flatnonzero(r.alive)
    rows = alive[np.argsort(r.parent[alive], kind="stable")]
    active, corner, parent, measured = r.active[rows], r.corner[rows], r.parent[rows], r.measured[rows]
    flux = np.where(measured, r.flux[rows], np.nan)
    error = np.where(measured, r.error[rows], np.nan)
    position = np.where(active[:, None], r.centroids(rows), r.peak[rows])
    flags = source_flags(state, rows)
    observed, sky = r.image[rows], r.sky[rows]
    # The cubes of shapes are the bulk of the memory; they are not needed any more.
    r.image = r.sky = np.empty((0, *observed.shape[1:]), np.float32)
    observed *= np.nan_to_num(flux).astype(np.float32)[:, :, None, None]
    _fall_back(state, rows, observed, flux, error)
    sky *= np.nan_to_num(flux).astype(np.float32)[:, :, None, None]
    total = np.zeros(scene.image.shape, np.float32)
    add_cutouts(total, observed, corner[:, 0], corner[:, 1])
    state.residual = (scene.image - total) * state.valid
    blendedness, coverage, chi2 = _diagnostics(state, observed, corner, total, r.noise[rows])
    sources = SourceModels(
        bands=scene.bands,
        network=state.metadata.name,
        weights_sha256=state.metadata.weights_sha256,
        origin=scene.origin,
        id=np.arange(1, len(rows) + 1),
        parent=np.array([p.id for p in scene.parents], np.int64)[parent],
        x=position[:, 0],
        y=position[:, 1],
        peak_x=r.peak[rows, 0],
        peak_y=r.peak[rows, 1],
        corner_x=corner[:, 1],
        corner_y=corner[:, 0],
        psf_index=r.cell[rows],
        iteration=r.iteration[rows],
        latent_mean=r.mean[rows],
        latent_sigma=r.sigma[rows],
        latent_covariance=r.covariance[rows],
        flux=flux,
        flux_err=error,
        flux_network=r.network_flux[rows],
        moments=r.moments[rows],
        moments_err=r.moments_error[rows],
        model_frame=sky,
        observed=observed,
        flags=flags,
        blendedness=blendedness,
        data_coverage=coverage,
        chi2=chi2,
    )
    np.logical_or.at(state.parent_flags["failed_source"], parent, flags["fallback"])
    return DeblendResult(sources, _summarise(state, parent[active]), state.residual)


def _summarise(state: State, children: NDArray[np.int64]) -> ParentSummary:
    """Summarise the parents, given the parent of each source."""
    scene, n = state.scene, len(state.scene.parents)
    start, end, pixels = np.zeros(n), np.zeros(n), np.zeros(n, np.int64)
    for p, (window, inside) in enumerate(state.windows):
        end[p] = state.chi2(p)
        weight = state.weight[:, *window][:, inside]
        start[p] = (scene.image[:, *window][:, inside].astype(float) ** 2 * weight).sum()
        pixels[p] = np.count_nonzero(weight)
    shapes = np.array([p.footprint.shape for p in scene.parents], np.int64).reshape(-1, 2)
    return ParentSummary(
        origin=scene.origin,
        id=np.array([p.id for p in scene.parents], np.int64),
        x0=np.array([p.x0 for p in scene.parents], np.int64),
        y0=np.array([p.y0 for p in scene.parents], np.int64),
        width=shapes[:, 1],
        height=shapes[:, 0],
        area=np.array([p.area for p in scene.parents], np.int64),
        n_peaks=state.n_peaks,
        n_child=np.bincount(children, minlength=n),
        iterations=state.iterations,
        n_pixels=pixels,
        chi2_start=start,
        chi2=end,
        flags=state.parent_flags,
    )


def _fall_back(
    state: State, rows: NDArray[np.int64], observed: NDArray, flux: NDArray, error: NDArray
) -> None:
    """Add to the models, fluxes and errors of sources without a model from the network what is left."""
    r = state.rows
    failed = np.flatnonzero(r.failed[rows] & r.active[rows])
    if not len(failed):
        return
    extra = _leftovers(state, rows[failed])
    corner = r.corner[rows[failed]]
    weight = cut_out(state.weight, corner[:, 0], corner[:, 1], state.size)
    taken = (extra != 0) & (weight > 0) & r.measured[rows[failed]][:, :, None, None]
    extra *= taken
    variance = np.divide(1.0, weight, out=np.zeros_like(weight), where=taken)
    observed[failed] += extra
    flux[failed] += extra.sum(axis=(2, 3), dtype=float)
    error[failed] = np.hypot(error[failed], np.sqrt(variance.sum(axis=(2, 3), dtype=float)))


def _leftovers(state: State, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Give sources without a model from the network what the image holds, (K, B, S, S).

    What the residual shows above the noise inside the parent's footprint goes to the nearest of the parent's
    sources of this kind, on top of the template or point source that each of them is.
    """
    r, size = state.rows, state.size
    out = np.zeros((len(rows), len(state.metadata.bands), size, size), np.float32)
    for p in np.unique(r.parent[rows]).tolist():
        own = np.flatnonzero(r.parent[rows] == p)
        significance, y0, x0 = state.significance(p)
        inside = state.footprint(p, significance.shape, y0, x0)
        y, x = np.nonzero(inside & (significance > _FALLBACK_SIGNIFICANCE))
        if not len(y):
            continue
        y, x = y + y0, x + x0
        nearest = own[cKDTree(r.peak[rows[own]]).query(np.stack([x, y], axis=1))[1]]
        j, i = y - r.corner[rows[nearest], 0], x - r.corner[rows[nearest], 1]
        on = (j >= 0) & (j < size) & (i >= 0) & (i < size)
        out[nearest[on], :, j[on], i[on]] = state.residual[:, y[on], x[on]].T
    return out


def _diagnostics(
    state: State, observed: NDArray, corner: NDArray, total: NDArray, noise: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    """Blendedness, data coverage and chi-square of sources, (N,) each; NaN without a model."""
    blendedness, coverage, chi2 = np.full((3, len(observed)), np.nan)
    for i, outer, inner in overlaps(corner[:, 0], corner[:, 1], state.size, state.scene.shape):
        own = observed[i][:, *inner]
        weights = noise[i].astype(float) ** -2
        mixed = np.einsum("byx,byx->b", own, total[:, *outer]) @ weights
        if mixed > 0:
            blendedness[i] = max(1.0 - np.einsum("byx,byx->b", own, own) @ weights / mixed, 0.0)
        positive = np.maximum(own, 0.0)
        valid = state.valid[:, *outer]
        seen = np.einsum("byx,byx->b", positive, valid)
        whole = np.maximum(observed[i], 0.0).sum(axis=(1, 2))
        if whole.any():
            coverage[i] = (seen[whole > 0] / whole[whole > 0]).mean()
        if seen.any():
            squares = state.residual[:, *outer] ** 2 * state.weight[:, *outer]
            chi2[i] = np.einsum("byx,byx->", positive, squares) / seen.sum()
    return blendedness, coverage, chi2
