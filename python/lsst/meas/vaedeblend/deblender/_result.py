# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is handed back: sources, parents and residual."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ..ground.cutouts import add_cutouts
from ..inference import kernels
from ..network import Decoder, NetworkError
from ..rendering import SourceImages
from ..sources import ParentSummary, SourceModels
from ._diagnostics import borrowed_light, diagnose, total_error
from ._drawing import GridDrawing
from ._flags import source_flags
from ._state import State

__all__ = ["DeblendResult", "assemble"]

# Part of a source's flux that errors of its neighbours' models may make up before it is flagged.
_TOO_MUCH = 0.25

# Chi-square of a source above which its model is told to miss the pixels.
_POOR = 2.0

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
    """Put together what the procedure found, rows ordered by parent."""
    state.refresh()
    r, scene = state.rows, state.scene
    alive = np.flatnonzero(r.alive)
    rows = alive[np.argsort(r.parent[alive], kind="stable")]
    active, corner, parent, measured = r.active[rows], r.corner[rows], r.parent[rows], r.measured[rows]
    flux = np.where(measured, r.flux[rows], np.nan)
    error = np.where(measured, r.error[rows], np.nan)
    network_flux = np.where(r.point[rows][:, None], np.nan, r.network_flux[rows])
    width = np.maximum(r.stamps.width[rows], state.size)
    if isinstance(state.drawing, GridDrawing):
        drawn = np.flatnonzero(active & r.tried[rows] & ~r.failed[rows] & ~r.point[rows])
        if len(drawn):
            held = state.drawing.held(r.mean[rows[drawn]], width[drawn])
            for values in (flux, error, network_flux):
                values[drawn] *= held
    position = np.where((active & r.tried[rows])[:, None], r.centroid[rows], r.peak[rows])
    flags = source_flags(state, rows)
    state.restore_pixel_weights()
    templates = _fall_back(state, rows, flux, error) | _points(state, rows, flux)
    blendedness, coverage, chi2, foreign = diagnose(state, rows, templates)
    borrowed = borrowed_light(state, foreign, flux)
    error = total_error(error, chi2, borrowed)
    whole = np.nan_to_num(np.abs(flux))
    taken = (borrowed / r.noise[rows]).sum(axis=1) > _TOO_MUCH * (whole / r.noise[rows]).sum(axis=1)
    flags["bright_neighbour"] = active & taken
    flags["poor_fit"] = active & (np.nan_to_num(chi2) > _POOR)
    models = state.image - state.residual
    residual = np.where(state.valid, scene.image - models, np.float32(0.0))
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
        corner_x=corner[:, 1] + state.size // 2 - width // 2,
        corner_y=corner[:, 0] + state.size // 2 - width // 2,
        psf_index=r.cell[rows],
        iteration=r.iteration[rows],
        latent_mean=r.mean[rows],
        latent_sigma=r.sigma[rows],
        latent_covariance=r.covariance[rows],
        flux=flux,
        flux_err=error,
        flux_network=network_flux,
        moments=r.moments[rows],
        moments_err=r.moments_error[rows],
        images=SourceImages(
            _decoder(state),
            state.drawing.grids if isinstance(state.drawing, GridDrawing) else None,
            state.renderer,
            r.mean[rows],
            r.cell[rows],
            flux,
            network_flux,
            width,
            templates,
        ),
        flags=flags,
        blendedness=blendedness,
        data_coverage=coverage,
        chi2=chi2,
        point_probability=r.point_probability[rows],
    )
    np.logical_or.at(state.parent_flags["failed_source"], parent, flags["fallback"])
    return DeblendResult(sources, _summarise(state, parent[active]), residual)


def _decoder(state: State) -> Decoder | None:
    """The network's decoder; a network that has none draws nothing afterwards."""
    try:
        return state.network.decoder
    except NetworkError:
        return None


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
    state: State, rows: NDArray[np.int64], flux: NDArray, error: NDArray
) -> dict[int, tuple[NDArray, NDArray]]:
    """Images, in nJy, of sources without a model from the network: their template, and what is left.

    What is left is taken out of the residual, and added to fluxes and errors.
    """
    r = state.rows
    out: dict[int, tuple[NDArray, NDArray]] = {}
    failed = np.flatnonzero(r.failed[rows] & r.active[rows])
    if not len(failed):
        return out
    extra = _leftovers(state, rows[failed])
    y, x = np.ascontiguousarray(r.corner[rows[failed]].T)
    weight = kernels.cut(state.weight, y, x, state.size)
    taken = (extra != 0) & (weight > 0) & r.measured[rows[failed]][:, :, None, None]
    extra *= taken
    variance = np.divide(1.0, weight, out=np.zeros_like(weight), where=taken)
    for i, row in enumerate(rows[failed].tolist()):
        sky, observed = state.templates[row]
        scale = r.flux[row].astype(np.float32)[:, None, None]
        out[int(failed[i])] = sky * scale, observed * scale + extra[i]
    flux[failed] += extra.sum(axis=(2, 3), dtype=float)
    error[failed] = np.hypot(error[failed], np.sqrt(variance.sum(axis=(2, 3), dtype=float)))
    add_cutouts(state.residual, -extra, y, x)
    return out


def _points(state: State, rows: NDArray[np.int64], flux: NDArray) -> dict[int, tuple[NDArray, NDArray]]:
    """Images, in nJy, of sources whose model is the PSF."""
    r = state.rows
    index = np.flatnonzero(r.point[rows])
    own = rows[index]
    dx, dy = state.offset(own, r.centroid[own]).T
    return state.renderer.point_templates(index, dx, dy, r.cell[own], flux[index], r.stamps.width[own])


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
