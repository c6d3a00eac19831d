# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The scene, the sources found in it so far, and the residual, kept in step."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from ..ground.cutouts import nearest_pixel
from ..ground.flags import PARENT_FLAGS
from ..ground.noise import noise_correlation, noise_factor
from ..ground.peaks import significance_map
from ..ground.psf import moments_sigma
from ..ground.sky import local_sky
from ..inference import kernels
from ..network import Network
from ..rendering import Renderer, square
from ..scene import Scene
from ._config import DeblendConfig
from ._drawing import Drawn, choose_drawing
from ._rows import Rows, Saved

__all__ = ["State"]

_LARGEST = 1e15
"""Largest pixel, in standard deviations, that counts as a measurement: squares must not overflow."""


_GROWTH = 4
"""Pixels around footprints that are not free of the light of sources."""

_STEP = 0.1
"""Steps of the factors of correlated noise: finer ones are not measured, and would let far pixels matter."""


def _stepwise(factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round factors, at least to 1: coadds have no anticorrelated noise."""
    return np.maximum(np.rint(factor / _STEP) * _STEP, 1.0)


_PRECISE = 1e4
"""Inverse variance, in units of the band's median, above which a pixel's variance is an error."""


class State:
    """Where one run of the procedure stands, on one scene whose bands are the network's.

    The residual is the image, without the sky left over, minus the models of all living sources, whatever
    a method does: sources are killed, given other models or fluxes, and put back by methods that change the
    residual as well. What it holds in invalid pixels means nothing: all that reads it has weights or masks
    them.
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
        self._mask_absurd()
        self.usable = self.valid.any(axis=(1, 2))
        moments = psf.moments
        known = np.isfinite(moments).all(axis=2)
        stand_in = moments[known].mean(axis=0) if known.any() else np.full(3, np.nan)
        if not np.isfinite(stand_in).all():
            raise ValueError("The scene's PSFs are no PSFs: none has adaptive moments.")
        self.moments = np.where(np.isfinite(moments), moments, stand_in)
        self.psf_sigma = moments_sigma(self.moments)
        self.detection_sigma = np.median(self.psf_sigma, axis=0)
        self._measure_background()
        self.drawing = choose_drawing(network, self.renderer, self.moments)
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
        # Shapes of those that the network fails on, on the network's cutout, in its frame and as observed.
        self.templates: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._starts: NDArray[np.int64] = np.zeros(n + 1, np.int64)
        self.residual = self.image.copy()
        # Weights of the refinement, see `soften`.
        self.soft_weight = self.weight.copy()

    def _mask_absurd(self) -> None:
        """Leave out pixels whose values are no measurements, and keep a copy of the image without them."""
        with np.errstate(over="ignore", invalid="ignore"):
            wild = self.valid & ~(np.abs(self.scene.image) * np.sqrt(self.weight) < _LARGEST)
        for band, weight in enumerate(self.weight):
            if self.valid[band].any():
                wild[band] |= weight > _PRECISE * np.median(weight[self.valid[band]])
        self.image = self.scene.image
        if wild.any():
            self.valid &= ~wild
            self.weight[wild] = 0.0
            self.image = np.where(wild, np.float32(0.0), self.image)

    def _measure_background(self) -> None:
        """Take the sky left over out of the image, and what correlated noise costs into the weights.

        From here on a weight is that of a pixel in a sum over a source as wide as the PSF: what is done with
        white noise then gives the significance and the errors of correlated noise, for such sources.
        """
        config, bands = self.config, len(self.valid)
        self.noise_factor: NDArray[np.float64] = np.ones(bands)
        free = ~self._near_footprints()
        spread = np.ones(bands)
        if config.measureNoiseCorrelation:
            correlation, _ = noise_correlation(self.image, self.weight, free)
            self.noise_factor = _stepwise(noise_factor(correlation, self.detection_sigma))
            spread = _stepwise(noise_factor(correlation, np.inf))
        if config.subtractSky and free.any():
            sky, _ = local_sky(self.image, self.weight, free, spread, prior=config.skyPrior)
            self.image = np.where(self.valid, np.subtract(self.image, sky, out=sky), np.float32(0.0))
        self.weight /= self.noise_factor[:, None, None].astype(np.float32)

    def _near_footprints(self) -> NDArray[np.bool_]:
        """Pixels in or next to a footprint, (H, W)."""
        detected = np.zeros(self.scene.shape, np.uint8)
        for parent in [*self.scene.parents, *self.scene.others]:
            window, inside = parent.window(self.scene.shape)
            detected[window][inside] = 1
        return ndimage.maximum_filter(detected, 2 * _GROWTH + 1).astype(bool)

    def restore_pixel_weights(self) -> None:
        """Make weights the inverse variances of single pixels again, for statistics of pixels in the end."""
        self.weight *= self.noise_factor[:, None, None].astype(np.float32)
        self.noise_factor = np.ones(len(self.weight))

    # Rows

    def new_rows(self, peaks: NDArray, parent: NDArray, *, given: ArrayLike, iteration: int) -> Rows:
        """Make rows for peaks (x, y), with what does not depend on the network."""
        corner = nearest_pixel(peaks[:, ::-1] - np.array(self.metadata.centre))
        return Rows.new(
            parent,
            peaks,
            corner,
            self.scene.psf.index(peaks[:, 0], peaks[:, 1]),
            self._noise(corner),
            latent_size=self.metadata.latent_size,
            given=given,
            iteration=iteration,
        )

    def add(self, rows: Rows) -> NDArray[np.int64]:
        """Add rows; return their numbers."""
        first = len(self.rows)
        self.rows.append(rows)
        self._order = np.argsort(self.rows.parent, kind="stable")
        parents = self.rows.parent[self._order]
        self._starts = np.searchsorted(parents, np.arange(len(self.scene.parents) + 1))
        return np.arange(first, len(self.rows))

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
        y, x = np.ascontiguousarray(corner.T)
        for start in range(0, len(corner), 256):
            part = slice(start, start + 256)
            # One pixel in sixteen is enough for a median, and a sixteenth of the time.
            weight = kernels.cut(self.weight, y[part], x[part], self.size)[:, :, 1::4, 1::4]
            weight = np.where(weight > 0, weight, np.nan).reshape(*out[part].shape, -1)
            middle = np.median(weight, axis=2)
            some = np.isnan(middle) & np.isfinite(weight).any(axis=2)
            middle[some] = np.nanmedian(weight[some], axis=1)
            middle = middle * self.noise_factor
            out[part] = np.where(np.isfinite(middle), 1.0 / np.sqrt(middle), out[part])
        return out

    def outside(self, peak: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether peaks (x, y) lie outside of the scene."""
        (height, width), (x, y) = self.scene.shape, np.floor(peak + 0.5).T
        return (x < 0) | (x >= width) | (y < 0) | (y >= height)

    def members(self, p: int) -> NDArray[np.int64]:
        """Rows of the sources of a parent that are deblended."""
        rows = self._order[self._starts[p] : self._starts[p + 1]]
        return rows[self.rows.alive[rows] & self.rows.active[rows]]

    def members_of(self, parents: list[int]) -> NDArray[np.int64]:
        """Rows of the sources of some parents that are deblended, one parent after the other."""
        own = [self.members(p) for p in parents]
        return np.concatenate(own) if own else np.empty(0, np.int64)

    # Models and residual

    def start(self, rows: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """Scene coordinates (y, x) of pixel [0, 0] of squares of some width, (K, 2)."""
        return self.rows.corner[rows] + (self.size // 2 - width // 2)

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same of the squares that sources have."""
        width = self.rows.stamps.width[rows]
        return self.rows.corner[rows] + (self.size // 2 - width // 2)[:, None]

    def _shift(self, rows: NDArray[np.int64], flux: NDArray[np.float64]) -> NDArray[np.float64]:
        """Subtract shapes times fluxes from the residual; return how chi-square (softened) changes, (K,)."""
        change, stamps = np.zeros(len(rows)), self.rows.stamps
        for width, index in stamps.by_width(rows):
            own = rows[index]
            y, x = self.start(own, width).T
            change[index] = kernels.shift(
                self.residual,
                self.soft_weight,
                stamps.pool(width),
                stamps.slot[own],
                np.ascontiguousarray(y),
                np.ascontiguousarray(x),
                np.ascontiguousarray(flux[index], np.float64),
            )
        return change

    def refresh(self) -> None:
        """Compute the residual afresh, which rids it of what rounding has left.

        Sources are subtracted in the order of their rows, so that the result does not depend on the way here.
        """
        r = self.rows
        np.copyto(self.residual, self.image)
        live = np.flatnonzero(r.alive & r.tried)
        self._shift(live, r.flux[live])

    def set_fluxes(self, rows: NDArray[np.int64], flux: NDArray[np.float64]) -> None:
        """Give living sources other fluxes at the same shapes."""
        self._shift(rows, flux - self.rows.flux[rows])
        self.rows.flux[rows] = flux

    def replace(
        self, rows: NDArray[np.int64], drawn: Drawn, flux: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Give living sources other shapes and fluxes, where they were drawn well.

        Parameters
        ----------
        rows : `numpy.ndarray`, (K,)
            The sources.
        drawn : `Drawn`
            Their shapes.
        flux : `numpy.ndarray`, (K, B)
            Their fluxes, nJy, finite.

        Returns
        -------
        change : `numpy.ndarray`, (K,)
            Changes of chi-square with softened weights, which add up over sources.
        """
        r, change = self.rows, np.zeros(len(rows))
        none = np.zeros((1, flux.shape[1], 2, 2), np.float32)
        for index, images in drawn.images:
            kept = np.flatnonzero(drawn.good[index])
            index, old = index[kept], r.stamps.width[rows[index[kept]]]
            for width in np.unique(old).tolist():
                here = np.flatnonzero(old == width)
                own = rows[index[here]]
                y, x = np.ascontiguousarray(self.start(own, max(width, images.shape[-1])).T)
                change[index[here]] = kernels.exchange(
                    self.residual,
                    self.soft_weight,
                    r.stamps.pool(width) if width else none,
                    r.stamps.slot[own] if width else np.zeros(len(own), np.int64),
                    r.flux[own] if width else np.zeros((len(own), flux.shape[1])),
                    images,
                    kept[here],
                    flux[index[here]],
                    y,
                    x,
                )
            r.stamps.set(rows[index], images[kept])
        own = rows[drawn.good]
        r.flux[own] = flux[drawn.good]
        r.network_flux[own] = drawn.flux[drawn.good]
        r.wanted[own] = drawn.wanted[drawn.good]
        r.centroid[own] = self.target(own) + drawn.offset[drawn.good]
        return change

    def target(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Scene coordinates (x, y) of the pixel in the middle of sources' cutouts, (K, 2)."""
        middle = np.floor(np.array(self.metadata.centre) + 0.5).astype(np.int64)
        return (self.rows.corner[rows] + middle)[:, ::-1]

    def models(self, rows: NDArray[np.int64], width: int) -> NDArray[np.float32]:
        """Models of sources, nJy, on squares of some width, 0 where they have none, (K, B, width, width)."""
        r = self.rows
        out = np.zeros((len(rows), len(self.metadata.bands), width, width), np.float32)
        for _, index in r.stamps.by_width(rows):
            scale = r.flux[rows[index]].astype(np.float32)[:, :, None, None]
            out[index] = square(r.stamps.images(rows[index]), width) * scale
        return out

    def draw_points(
        self, rows: NDArray[np.int64], position: NDArray[np.float64], width: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Draw points (x, y) on sources' cutouts or larger squares, in the network's frame and as observed,
        (K, B, width, width)."""
        dx, dy = self.offset(rows, position).T
        return self.renderer.points(dx, dy, self.rows.cell[rows], width)

    def offset(self, rows: NDArray[np.int64], position: NDArray[np.float64]) -> NDArray[np.float64]:
        """Offsets (x, y) of positions from the centres of sources' cutouts, (K, 2)."""
        return position - (self.rows.corner[rows] + self.metadata.centre)[:, ::-1]

    def put_back(self, saved: Saved, part: NDArray[np.bool_] | None = None) -> None:
        """Put back sources as they were when they were saved, all or a part of them."""
        r = self.rows
        part = np.ones(len(saved.rows), bool) if part is None else part
        rows = saved.rows[part]
        live = rows[r.alive[rows]]
        self._shift(live, -r.flux[live])
        r.restore(saved, part)
        live = rows[r.alive[rows]]
        self._shift(live, r.flux[live])

    def kill(self, rows: NDArray[np.int64]) -> None:
        """Take sources out, with their light."""
        live = rows[self.rows.alive[rows]]
        self._shift(live, -self.rows.flux[live])
        self.rows.alive[live] = False
        self.rows.flux[live] = 0.0

    # Weights, chi-square and significance

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
        weight = self.softened_weight(window, model_error)
        out = significance_map(self.residual[:, *window], weight, self.detection_sigma)
        if model_error:
            # What a decoder cannot draw of a galaxy, it misses in many pixels alike.
            models = self.image[:, *window] - self.residual[:, *window]
            light = significance_map(models, weight, self.detection_sigma)
            out /= np.sqrt(1.0 + (self.config.coherentModelError * light) ** 2)
        return out, y, x

    def softened_weight(self, window: tuple[slice, slice], model_error: float) -> NDArray[np.float32]:
        """Inverse variance of the image and of the models by their relative error, 0 in invalid pixels."""
        weight = self.weight[:, *window]
        if model_error == 0:
            return weight
        models = self.image[:, *window] - self.residual[:, *window]
        return (weight / (1.0 + weight * (model_error * models) ** 2)).astype(np.float32, copy=False)

    def soften(self, rows: NDArray[np.int64]) -> None:
        """Bring the refinement's weights around sources up to date: the models have errors of their own."""
        error = self.config.refinementModelError
        for width, index in self.rows.stamps.by_width(rows):
            y, x = np.ascontiguousarray(self.start(rows[index], width).T)
            kernels.soften(self.soft_weight, self.weight, self.image, self.residual, y, x, width, error)

    def footprint(self, p: int, shape: tuple[int, int], y: int, x: int) -> NDArray[np.bool_]:
        """A parent's footprint on an array of some shape whose corner is at (y, x)."""
        (rows, columns), inside = self.windows[p]
        out = np.zeros(shape, bool)
        out[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = inside
        return out
