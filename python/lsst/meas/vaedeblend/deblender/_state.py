# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The scene, the sources found in it so far, and the residual, kept in step."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ground.cutouts import overlaps
from ..ground.flags import PARENT_FLAGS
from ..ground.peaks import detection_image
from ..ground.psf import moments_sigma
from ..network import Network
from ..rendering import Renderer
from ..scene import Scene
from ._config import DeblendConfig
from ._rows import Rows

__all__ = ["State"]


class State:
    """Where one run of the procedure stands, on one scene whose bands are the network's.

    The residual is the image minus the models of all living sources. Who changes a flux goes through
    `set_fluxes`; who changes a shape takes the old model out of the residual and the new one into it with
    `change`.
    """

    def __init__(self, scene: Scene, network: Network, config: DeblendConfig) -> None:
        self.scene, self.network, self.config = scene, network, config
        self.metadata = network.metadata
        self.size = self.metadata.cutout_size
        self.renderer = Renderer(self.metadata, scene.psf)
        psf = self.renderer.psf
        # Without a PSF nothing can be rendered in a band, so nothing can be learnt from it either.
        has_psf = psf.valid.any(axis=0)
        self.valid = scene.valid & has_psf[:, None, None]
        self.weight = scene.weight * has_psf[:, None, None]
        self.usable = self.valid.any(axis=(1, 2))
        moments = psf.moments
        known = np.isfinite(moments).all(axis=2)
        stand_in = moments[known].mean(axis=0) if known.any() else np.full(3, np.nan)
        if not np.isfinite(stand_in).all():
            raise ValueError("The scene's PSFs are no PSFs: none has adaptive moments.")
        self.moments = np.where(np.isfinite(moments), moments, stand_in)
        self.psf_sigma = moments_sigma(self.moments)
        self.detection_sigma = np.median(self.psf_sigma, axis=0)
        # Decrease of chi-square that a source must bring.
        self.cost = config.costPerParameter * (int(self.usable.sum()) + 5)
        # Of the parents.
        n = len(scene.parents)
        self.parent_flags = {name: np.zeros(n, bool) for name in PARENT_FLAGS}
        self.windows = [parent.window(scene.shape) for parent in scene.parents]
        self.iterations = np.zeros(n, np.int64)
        self.n_peaks = np.zeros(n, np.int64)
        # Peaks that were tried and rejected, or dropped: not to be tried again.
        self.rejected: list[list[NDArray]] = [[] for _ in range(n)]
        # Of the sources.
        self.rows = self.new_rows(np.empty((0, 2)), np.empty(0, np.int64), given=True, iteration=0)
        self.residual = scene.image.copy()
        # Weights of the refinement, see `soften`.
        self.soft_weight = self.weight.copy()

    def new_rows(self, peaks: NDArray, parent: NDArray, *, given: ArrayLike, iteration: int) -> Rows:
        """Make rows for peaks (x, y), with what does not depend on the network."""
        corner = np.floor(peaks[:, ::-1] - np.array(self.metadata.centre) + 0.5).astype(np.int64)
        return Rows.new(
            parent,
            peaks,
            corner,
            self.scene.psf.index(peaks[:, 0], peaks[:, 1]),
            self._noise(corner),
            latent_size=self.metadata.latent_size,
            cutout_size=self.size,
            given=given,
            iteration=iteration,
        )

    def _noise(self, corner: NDArray) -> NDArray[np.float32]:
        """Background standard deviation around sources, (N, B): the median over the cutout."""
        general = self.scene.noise.copy()
        ranges = self.metadata.training_range.get("noise") or {}
        for i, band in enumerate(self.metadata.bands):
            if not np.isfinite(general[i]):
                # A band without data: any number the network knows will do.
                low, high = ranges.get(band, (1.0, 1.0))
                general[i] = np.sqrt(low * high) if low * high > 0 else 1.0
        out = np.tile(general, (len(corner), 1)).astype(np.float32)
        for i, outer, _ in overlaps(corner[:, 0], corner[:, 1], self.size, self.scene.shape):
            variance, valid = self.scene.variance[:, *outer], self.valid[:, *outer]
            for band in range(len(out[i])):
                good = variance[band][valid[band]]
                if len(good):
                    out[i, band] = np.sqrt(np.median(good))
        return out

    def outside(self, peak: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether peaks (x, y) lie outside of the scene."""
        (height, width), (x, y) = self.scene.shape, np.floor(peak + 0.5).T
        return (x < 0) | (x >= width) | (y < 0) | (y >= height)

    def members(self, parents: list[int]) -> list[NDArray[np.int64]]:
        """Rows of the sources that are deblended, by parent."""
        r = self.rows
        wanted = np.flatnonzero(r.alive & r.active)
        # A stable sort by parent, then one search per parent, costs less than a comparison per parent.
        order = wanted[np.argsort(r.parent[wanted], kind="stable")]
        sorted_parent = r.parent[order]
        starts = np.searchsorted(sorted_parent, parents, side="left")
        stops = np.searchsorted(sorted_parent, parents, side="right")
        return [order[i:j] for i, j in zip(starts, stops, strict=True)]

    def subtract(self) -> None:
        """Compute the residual afresh: the original image minus all current models.

        Between two such computations the residual follows every change of a model; this one rids it of what
        rounding has left, so that a state that was put back has exactly the residual it had.
        """
        r = self.rows
        self.residual = self.scene.image.copy()
        live = np.flatnonzero(r.alive & r.tried)
        self.change(live, r.flux[live])

    def change(self, rows: NDArray[np.int64], flux: NDArray[np.float64]) -> None:
        """Subtract shapes times fluxes from the residual.

        What the residual holds in invalid pixels means nothing: all that reads it has weights or masks them.
        """
        r = self.rows
        corner, scale = r.corner[rows], flux.astype(np.float32)[:, :, None, None]
        used, scratch = flux.any(axis=1), np.empty(r.image.shape[1:], np.float32)
        for i, outer, inner in overlaps(corner[:, 0], corner[:, 1], self.size, self.scene.shape):
            if used[i]:
                np.multiply(r.image[rows[i]], scale[i], out=scratch)
                self.residual[:, *outer] -= scratch[:, *inner]

    def set_fluxes(self, rows: NDArray[np.int64], flux: NDArray[np.float64] | float) -> None:
        """Give sources other fluxes at the same shapes."""
        self.change(rows, flux - self.rows.flux[rows])
        self.rows.flux[rows] = flux

    def chi2(self, p: int, weight: NDArray | None = None) -> float:
        """Chi-square of the residual over a parent's footprint."""
        window, inside = self.windows[p]
        weight = self.weight[:, *window] if weight is None else weight
        residual = self.residual[:, *window]
        return float(np.einsum("byx,byx,byx,yx->", residual, residual, weight, inside, dtype=np.float64))

    def significance(self, p: int, model_error: float = 0.0) -> tuple[NDArray, int, int]:
        """Significance map of the residual in a parent's window with a margin, and its corner (y, x)."""
        (rows, columns), _ = self.windows[p]
        margin = int(np.ceil(5 * self.detection_sigma.max()))
        y, x = max(rows.start - margin, 0), max(columns.start - margin, 0)
        window = (slice(y, rows.stop + margin), slice(x, columns.stop + margin))
        variance = self.softened(window, model_error)
        residual, valid = self.residual[:, *window], self.valid[:, *window]
        return detection_image(residual, variance, valid, self.detection_sigma), y, x

    def softened(self, window: tuple[slice, slice], model_error: float) -> NDArray[np.float32]:
        """Variance of the image, and of the models by their relative error, in a window (y, x)."""
        variance = self.scene.variance[:, *window]
        if model_error == 0:
            return variance
        models = self.scene.image[:, *window] - self.residual[:, *window]
        return variance + (model_error * models) ** 2

    def softened_weight(self, window: tuple[slice, slice], model_error: float) -> NDArray[np.float32]:
        """Inverse of the softened variance, 0 where pixels are not valid."""
        return np.where(self.valid[:, *window], 1.0 / self.softened(window, model_error), 0.0)

    def soften(self, rows: NDArray[np.int64]) -> None:
        """Bring the refinement's weights around sources up to date: the models have errors of their own."""
        corner = self.rows.corner[rows]
        for _, outer, _ in overlaps(corner[:, 0], corner[:, 1], self.size, self.scene.shape):
            self.soft_weight[:, *outer] = self.softened_weight(outer, self.config.refinementModelError)

    def footprint(self, p: int, shape: tuple[int, int], y: int, x: int) -> NDArray[np.bool_]:
        """A parent's footprint on an array of some shape whose corner is at (y, x)."""
        (rows, columns), inside = self.windows[p]
        out = np.zeros(shape, bool)
        out[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = inside
        return out
