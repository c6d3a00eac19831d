# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The iterative procedure: peaks, network, joint fluxes, new peaks in the residual.

Peak detection and peak-centred deblending alternate, as Arcelin et al. (2021, MNRAS 500, 531, section 5.1)
propose. The residual is always the original image minus the current models of all sources. All parents of a
scene share the batches that go through the network, and a source never loses its row: what went wrong with it
is in its flags.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
from lsst.pex.config import Config, Field, RangeField
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from .catalog import PARENT_FLAGS, SOURCE_FLAGS
from .fluxes import joint_fluxes
from .models import ParentSummary, Renderer, SourceModels, add_cutouts, cut_out, overlaps, unit_shapes
from .network import Network
from .peaks import detection_image, find_peaks
from .psf import moments_sigma
from .refine import WIDTHS, LinearisedModels, choose_widths
from .scene import Scene

__all__ = ["DeblendConfig", "DeblendResult", "deblend"]

_LOG = logging.getLogger("lsst.meas.vaedeblend.deblender")

# Part of a model's squared shape that must lie on valid pixels for its flux to count as measured.
_MIN_COVERAGE = 0.01

# Relative excess over the training range that is not flagged: noise and seeing are estimates themselves.
_RANGE_TOLERANCE = 0.1

# Significance of the pixels that a source without a model from the network takes from the residual.
_FALLBACK_SIGNIFICANCE = 2.0

# Damping of the first step of a refinement, where the models are not yet close.
_FIRST_DAMPING = 0.01

# Steps of refinement before new peaks are judged.
_TRIAL_STEPS = 2


class DeblendConfig(Config):
    """Configuration of the iterative procedure."""

    min_passes = RangeField[int](
        doc="Passes through the network at the start and, without refinement, for a trial of new peaks. From "
        "the second on, cutouts have their neighbours subtracted.",
        default=3,
        min=1,
    )
    max_iterations = RangeField[int](
        doc="Rounds of refinement and peak search after the first passes. A parent that still changes then "
        "is flagged no_convergence.",
        default=6,
        min=0,
    )
    flux_tolerance = RangeField[float](
        doc="Fluxes have settled when none changes by more than this times its standard deviation, or by "
        "more than this times a tenth of itself.",
        default=0.1,
        min=0.0,
        inclusiveMin=False,
    )
    refinement_steps = RangeField[int](
        doc="Gauss-Newton steps in which the latents are refined on the pixels after the first passes, after "
        "new peaks were accepted, and in the end; 0 keeps the network's own answers. Networks without a "
        "Jacobian are not refined.",
        default=4,
        min=0,
    )
    refinement_tolerance = RangeField[float](
        doc="A source has settled when a step promises to lower chi-square by less than this.",
        default=0.3,
        min=0.0,
    )
    refinement_prior = RangeField[float](
        doc="Precision of the latents' normal prior in the refinement. Below 1 shapes of faint sources are "
        "less round, and all that is measured of them is noisier.",
        default=0.25,
        min=0.0,
        inclusiveMin=False,
    )
    posterior_scale = RangeField[float](
        doc="Factor on the widths of the refined posterior. The linear approximation knows neither the "
        "errors of the decoder nor tails of the population; the default is what held-out fields ask for.",
        default=1.25,
        min=0.0,
        inclusiveMin=False,
    )
    flux_systematic = RangeField[float](
        doc="Relative error of the fluxes of refined sources that is added in quadrature: what the "
        "decoder cannot draw.",
        default=0.015,
        min=0.0,
    )
    refinement_batch = RangeField[int](
        doc="Sources that are refined jointly; bounds the memory, about half a megabyte each.",
        default=512,
        min=1,
    )
    find_new_peaks = Field[bool](doc="Look for further peaks in the residuals?", default=True)
    peak_threshold = RangeField[float](
        doc="Significance of the peaks to start from in parents that come without any.", default=5.0, min=0.0
    )
    new_peak_threshold = RangeField[float](
        doc="Significance that a peak in the residual needs to be tried.", default=6.0, min=0.0
    )
    min_separation = RangeField[float](
        doc="Distance that found peaks keep from each other and from existing sources, pixel.",
        default=3.0,
        min=0.0,
    )
    model_error = RangeField[float](
        doc="Relative error of the models. In the search and the trial of new peaks it is added in "
        "quadrature to the noise, so that what is left of a bright galaxy does not pass for sources.",
        default=0.2,
        min=0.0,
    )
    max_new_peaks = RangeField[int](doc="Peaks tried at once in one parent.", default=8, min=1)
    max_peaks = RangeField[int](
        doc="Sources in one parent. Of more given peaks only the brightest are deblended; the others keep "
        "a row without a model.",
        default=1000,
        min=1,
    )
    cost_per_parameter = RangeField[float](
        doc="Decrease of chi-square that a source must bring for each of its parameters: a flux per band, "
        "two coordinates, size and two ellipticities.",
        default=4.0,
        min=0.0,
    )
    drop_given_peaks = Field[bool](
        doc="Drop given peaks too when they bring less? Otherwise they are kept and flagged insignificant.",
        default=False,
    )
    flux_prior = RangeField[float](
        doc="Weight of the network's own flux in the joint solution, relative to that of the data. A small "
        "one keeps sources that almost coincide from trading flux.",
        default=1e-4,
        min=1e-9,
    )
    edge_distance = RangeField[int](
        doc="A peak closer than this to the border or to a pixel marked as edge is flagged, pixel.",
        default=5,
        min=0,
    )
    batch_size = RangeField[int](
        doc="Cutouts that go through the network at once; bounds the memory it takes.", default=128, min=1
    )
    allow_missing_bands = Field[bool](
        doc="Deblend scenes that lack some of the network's bands? Their fluxes are NaN and flagged.",
        default=False,
    )
    allow_other_pixel_scale = Field[bool](
        doc="Deblend scenes with another pixel scale than the network's?", default=False
    )


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


def deblend(scene: Scene, network: Network, config: DeblendConfig | None = None) -> DeblendResult:
    """Deblend all parents of a scene.

    Parameters
    ----------
    scene : `Scene`
        The scene; its bands are brought into the network's order, and those the network does not know left
        out.
    network : `Network`
        The network.
    config : `DeblendConfig`, optional
        Configuration.

    Returns
    -------
    result : `DeblendResult`
        Sources, parents and residual.

    Raises
    ------
    NetworkError
        Raised if the pixel scales differ (unless allowed), or if onnxruntime fails.
    ValueError
        Raised if the scene lacks bands of the network (unless allowed), or has no PSF at all.
    """
    config = DeblendConfig() if config is None else config
    bands = network.metadata.bands
    if not set(bands) & set(scene.bands):
        raise ValueError(
            f"The scene has bands {list(scene.bands)}, the network {list(bands)}: none in common."
        )
    scene = scene.reordered(bands, allow_missing=config.allow_missing_bands)
    if not config.allow_other_pixel_scale:
        network.check(pixel_scale=scene.pixel_scale)
    if not scene.psf.valid.any():
        raise ValueError("The scene has no PSF in any cell and band.")
    return _Procedure(scene, network, config).run()


@dataclasses.dataclass(eq=False)
class _Rows:
    """The sources while the procedure runs; rows stay where they are, dead ones are dropped in the end.

    `image` and `sky` are the shapes of the models, sum 1, as observed and in the network's frame.
    """

    parent: NDArray[np.int64]  # index into the scene's parents
    peak: NDArray[np.float64]  # (N, 2), x and y
    corner: NDArray[np.int64]  # (N, 2), y and x
    cell: NDArray[np.int64]
    iteration: NDArray[np.int64]
    given: NDArray[np.bool_]
    alive: NDArray[np.bool_]
    active: NDArray[np.bool_]  # deblended at all
    tried: NDArray[np.bool_]  # has been through the network
    failed: NDArray[np.bool_]  # has no model from the network
    settled: NDArray[np.bool_]  # refinement has nothing left to gain
    damping: NDArray[np.float64]  # of the next step of refinement
    unsound: NDArray[np.bool_]  # the network's last output was no good
    noise: NDArray[np.float32]
    flux: NDArray[np.float64]  # 0 where not measured
    error: NDArray[np.float64]
    network_flux: NDArray[np.float64]
    measured: NDArray[np.bool_]
    mean: NDArray[np.float32]
    sigma: NDArray[np.float32]
    covariance: NDArray[np.float32]  # of the posterior; NaN unless it is known
    moments: NDArray[np.float32]  # intrinsic second moments, and errors; NaN unless they are known
    moments_error: NDArray[np.float32]
    image: NDArray[np.float32]
    sky: NDArray[np.float32]

    # What a pass changes, and a trial that is rejected has to put back.
    _CHANGING = (
        "tried",
        "failed",
        "unsound",
        "flux",
        "error",
        "network_flux",
        "measured",
        "mean",
        "sigma",
        "settled",
        "damping",
        "image",
        "sky",
    )

    def __len__(self) -> int:
        return len(self.parent)

    def append(self, other: _Rows) -> None:
        for field in dataclasses.fields(self):
            both = np.concatenate([getattr(self, field.name), getattr(other, field.name)])
            setattr(self, field.name, both)

    def save(self, rows: NDArray[np.int64]) -> dict[str, NDArray]:
        return {name: getattr(self, name)[rows] for name in self._CHANGING}

    def restore(self, rows: NDArray[np.int64], saved: dict[str, NDArray], part: NDArray) -> None:
        for name, values in saved.items():
            getattr(self, name)[rows] = values[part]


class _Procedure:
    """One run of the procedure on one scene, whose bands are the network's."""

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
        self.cost = config.cost_per_parameter * (int(self.usable.sum()) + 5)
        self.parent_flags = {name: np.zeros(len(scene.parents), bool) for name in PARENT_FLAGS}
        self.windows = [parent.window(scene.shape) for parent in scene.parents]
        self.iterations = np.zeros(len(scene.parents), np.int64)
        self.n_peaks = np.zeros(len(scene.parents), np.int64)
        # Peaks that were tried and rejected, or dropped: not to be tried again.
        self.rejected: list[list[NDArray]] = [[] for _ in scene.parents]
        self.refines = config.refinement_steps > 0 and network.jacobian is not None
        self.rows = self._new_rows(np.empty((0, 2)), np.empty(0, np.int64), given=True, iteration=0)
        self.crowded = np.zeros(0, bool)
        self.residual = scene.image.copy()

    def _new_rows(self, peaks: NDArray, parent: NDArray, given: bool, iteration: int) -> _Rows:
        """Make rows for peaks, with what does not depend on the network."""
        n, b, s, length = len(peaks), len(self.metadata.bands), self.size, self.metadata.latent_size
        corner = np.floor(peaks[:, ::-1] - np.array(self.metadata.centre) + 0.5).astype(np.int64)
        return _Rows(
            parent=parent,
            peak=peaks,
            corner=corner,
            cell=self.scene.psf.index(peaks[:, 0], peaks[:, 1]),
            iteration=np.full(n, iteration),
            given=np.full(n, given),
            alive=np.ones(n, bool),
            active=np.ones(n, bool),
            tried=np.zeros(n, bool),
            failed=np.zeros(n, bool),
            settled=np.zeros(n, bool),
            damping=np.full(n, _FIRST_DAMPING),
            unsound=np.zeros(n, bool),
            noise=self._noise(corner),
            flux=np.zeros((n, b)),
            error=np.full((n, b), np.nan),
            network_flux=np.full((n, b), np.nan),
            measured=np.zeros((n, b), bool),
            mean=np.zeros((n, length), np.float32),
            sigma=np.zeros((n, length), np.float32),
            covariance=np.full((n, length, length), np.nan, np.float32),
            moments=np.full((n, b, 3), np.nan, np.float32),
            moments_error=np.full((n, b, 3), np.nan, np.float32),
            image=np.zeros((n, b, s, s), np.float32),
            sky=np.zeros((n, b, s, s), np.float32),
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

    def _significance(self, p: int, residual: NDArray, total: NDArray | None) -> tuple[NDArray, int, int]:
        """Significance map of a parent's window with a margin, and its corner (y, x)."""
        (rows, columns), _ = self.windows[p]
        margin = int(np.ceil(5 * self.detection_sigma.max()))
        y, x = max(rows.start - margin, 0), max(columns.start - margin, 0)
        window = (slice(y, rows.stop + margin), slice(x, columns.stop + margin))
        variance = self.scene.variance[:, *window]
        if total is not None and self.config.model_error > 0:
            variance = variance + (self.config.model_error * total[:, *window]) ** 2
        map_ = detection_image(residual[:, *window], variance, self.valid[:, *window], self.detection_sigma)
        return map_, y, x

    def _footprint(self, p: int, shape: tuple[int, int], y: int, x: int) -> NDArray[np.bool_]:
        """A parent's footprint on an array of some shape whose corner is at (y, x)."""
        (rows, columns), inside = self.windows[p]
        out = np.zeros(shape, bool)
        out[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = inside
        return out

    def _start(self) -> None:
        """Make the rows of the first peaks."""
        height, width = self.scene.shape
        peaks, parents, given, keep = [], [], [], []
        for p, parent in enumerate(self.scene.parents):
            window, inside = self.windows[p]
            data = self.valid[:, *window] & inside
            self.parent_flags["masked"][p] = not data.any()
            self.parent_flags["incomplete_data"][p] = not data[:, inside].all() or inside.sum() < parent.area
            self.parent_flags["parent_too_big"][p] = max(parent.footprint.shape) > self.size
            first = parent.peaks
            if len(first) > self.config.max_peaks:
                self.parent_flags["too_many_peaks"][p] = True
                chosen = np.zeros(len(first), bool)
                chosen[self._brightest(p, first)] = True
            elif len(first):
                chosen = np.ones(len(first), bool)
            else:
                first = self._find_first(p)
                chosen = np.ones(len(first), bool)
            self.n_peaks[p] = max(len(parent.peaks), len(first))
            peaks.append(first)
            parents.append(np.full(len(first), p))
            given.append(np.full(len(first), len(parent.peaks) > 0))
            keep.append(chosen)
        if not peaks:
            return
        rows = self._new_rows(np.concatenate(peaks), np.concatenate(parents), given=True, iteration=0)
        rows.given = np.concatenate(given)
        self.crowded = ~np.concatenate(keep)
        x, y = np.floor(rows.peak + 0.5).T
        outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
        rows.active = ~self.crowded & ~outside & ~self.parent_flags["masked"][rows.parent]
        self.rows = rows

    def _brightest(self, p: int, peaks: NDArray) -> NDArray[np.int64]:
        """The brightest peaks that a parent may have, in their given order."""
        significance, y0, x0 = self._significance(p, self.residual, None)
        x, y = (np.floor(peaks + 0.5).astype(np.int64) - [x0, y0]).T
        inside = (x >= 0) & (y >= 0) & (x < significance.shape[1]) & (y < significance.shape[0])
        brightness = np.full(len(peaks), -np.inf)
        brightness[inside] = significance[y[inside], x[inside]]
        return np.sort(np.argsort(-brightness, kind="stable")[: self.config.max_peaks])

    def _find_first(self, p: int) -> NDArray[np.float64]:
        """Find the peaks of a parent that came without any; there is always one."""
        parent = self.scene.parents[p]
        if not self.parent_flags["masked"][p]:
            significance, y, x = self._significance(p, self.residual, None)
            inside = self._footprint(p, significance.shape, y, x)
            found = find_peaks(significance, self.config.peak_threshold, inside, self.config.min_separation)
            if len(found) > self.config.max_peaks:
                self.parent_flags["too_many_peaks"][p] = True
                found = found[: self.config.max_peaks]
            if len(found):
                return found + [x, y]
            row, column = np.unravel_index(np.argmax(np.where(inside, significance, -np.inf)), inside.shape)
            found = np.array([[column + x, row + y]], dtype=float)
        else:
            # Nothing to see: the footprint's pixel closest to its centre stands for the object.
            ys, xs = np.nonzero(parent.footprint)
            nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
            found = np.array([[parent.x0 + xs[nearest], parent.y0 + ys[nearest]]], dtype=float)
        self.parent_flags["no_peak"][p] = True
        return found

    def _members(self, parents: list[int]) -> list[NDArray[np.int64]]:
        """Rows of the sources that are deblended, by parent."""
        r = self.rows
        wanted = np.flatnonzero(r.alive & r.active)
        # A stable sort by parent, then one search per parent, costs less than a comparison per parent.
        order = wanted[np.argsort(r.parent[wanted], kind="stable")]
        sorted_parent = r.parent[order]
        starts = np.searchsorted(sorted_parent, parents, side="left")
        stops = np.searchsorted(sorted_parent, parents, side="right")
        return [order[i:j] for i, j in zip(starts, stops, strict=True)]

    def _subtract(self) -> None:
        """Compute the residual afresh: the original image minus all current models.

        Between two such computations the residual follows every change of a model; this one rids it of what
        rounding has left, so that a state that was put back has exactly the residual it had.
        """
        r = self.rows
        self.residual = self.scene.image.copy()
        live = np.flatnonzero(r.alive & r.tried)
        self._change(live, r.flux[live])

    def _change(self, rows: NDArray[np.int64], flux: NDArray[np.float64]) -> None:
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

    def _chi2(self, p: int, weight: NDArray | None = None) -> float:
        """Chi-square of the residual over a parent's footprint."""
        window, inside = self.windows[p]
        weight = self.weight[:, *window] if weight is None else weight
        residual = self.residual[:, *window]
        return float(np.einsum("byx,byx,byx,yx->", residual, residual, weight, inside, dtype=np.float64))

    def _pass(self, parents: list[int]) -> None:
        """Take all members of some parents through the network, then solve for their fluxes."""
        members = self._members(parents)
        rows = np.concatenate(members) if members else np.empty(0, np.int64)
        # Bounded pieces, so that the cutouts of a rich patch need not all exist at once.
        piece = 8 * self.config.batch_size
        for start in range(0, len(rows), piece):
            self._shapes(rows[start : start + piece])
        for own in members:
            self._solve(own)
        self.iterations[parents] += 1

    def _shapes(self, rows: NDArray[np.int64]) -> None:
        """Deblend cutouts: what is left of the image plus the source's own model."""
        r = self.rows
        corner_y, corner_x = r.corner[rows].T
        valid = cut_out(self.valid, corner_y, corner_x, self.size)
        image = cut_out(self.residual, corner_y, corner_x, self.size)
        image += r.image[rows] * r.flux[rows, :, None, None].astype(np.float32)
        image *= valid
        output = self.network.deblend(
            image, valid, r.noise[rows], self.moments[r.cell[rows]], batch_size=self.config.batch_size
        )
        sky, flux, sound = unit_shapes(output.model)
        good = output.finite & sound
        new = ~r.tried[rows]
        # Once the network has given a sound model, a later failure leaves that one in place.
        failed = np.flatnonzero(~good & (new | r.failed[rows]))
        if len(failed):
            centre = np.array(self.metadata.centre)
            dy, dx = (r.peak[rows[failed], ::-1] - r.corner[rows[failed]] - centre).T
            sky[failed] = self.renderer.point_sources(dx, dy)
            templates = self._templates(rows[failed], image[failed])
        flux = np.where(good[:, None], flux, np.nan)
        change = good.copy()
        change[failed] = True
        target = rows[change]
        self._change(target, -r.flux[target])
        r.sky[target] = sky[change]
        r.image[target] = self.renderer.observed(sky[change], r.cell[target])
        if len(failed):
            found = templates.any(axis=(2, 3))[:, :, None, None]
            r.image[rows[failed]] = np.where(found, templates, r.image[rows[failed]])
        r.mean[target], r.sigma[target] = output.latent_mean[change], output.latent_sigma[change]
        r.network_flux[target] = flux[change]
        r.failed[target] = ~good[change]
        r.unsound[rows] = ~good
        # Until it has been solved for, a new source's flux is the network's, so that other parents see it.
        first = change & new
        r.flux[rows[first]] = np.maximum(np.nan_to_num(flux[first]), 0.0)
        r.tried[target] = True
        self._change(target, r.flux[target])

    def _templates(self, rows: NDArray[np.int64], image: NDArray) -> NDArray[np.float32]:
        """Shapes of sources that the network fails on, from the image alone, (K, B, S, S); 0 if it shows
        none.

        The lesser of each pixel and the one opposite to it across the peak: neighbours are rarely symmetric
        about a source, which keeps their light out of its template (Lupton's deblender of the SDSS; Bosch et
        al. 2018, PASJ 70, S5, section 4.8.1).
        """
        r, s = self.rows, self.size
        out = np.zeros(image.shape, np.float32)
        for i, row in enumerate(rows):
            opposite = np.rint(2 * (r.peak[row, ::-1] - r.corner[row])).astype(np.int64)[:, None] - np.arange(
                s
            )
            on = (opposite >= 0) & (opposite < s)
            turned = image[i][:, np.clip(opposite[0], 0, s - 1)][:, :, np.clip(opposite[1], 0, s - 1)]
            least = np.minimum(image[i], turned * (on[0][:, None] & on[1]))
            (ys, xs), inside = self.windows[r.parent[row]]
            least *= cut_out(inside[None], r.corner[row, :1] - ys.start, r.corner[row, 1:] - xs.start, s)[0]
            # Of noise alone hardly a pixel in two thousand and its opposite are both above two sigma; fewer
            # pixels than a point source covers say nothing about the shape.
            least *= least > 2 * r.noise[row][:, None, None]
            least *= (np.count_nonzero(least, axis=(1, 2)) >= 9)[:, None, None]
            total = least.sum(axis=(1, 2))
            out[i] = least / np.where(total > 0, total, 1.0)[:, None, None]
        return out

    def _solve(self, rows: NDArray[np.int64]) -> None:
        """Solve jointly for the fluxes of a parent's members, all other models subtracted."""
        r = self.rows
        if not len(rows):
            return
        corner = r.corner[rows]
        near = np.abs(corner[:, None, :] - corner[None, :, :]).max(axis=2) < self.size
        if near.all():
            self._solve_group(rows)
            return
        count, group = connected_components(near, directed=False)
        for number in range(count):
            self._solve_group(rows[group == number])

    def _solve_group(self, rows: NDArray[np.int64]) -> None:
        r, k, s = self.rows, len(rows), self.size
        corner = r.corner[rows]
        weight = cut_out(self.weight, corner[:, 0], corner[:, 1], s)
        shapes = r.image[rows]
        weighted = shapes * weight
        bands = shapes.shape[1]
        normal = np.zeros((bands, k, k))
        flat = (k, bands, s * s)
        diagonal = np.einsum("kbp,kbp->bk", weighted.reshape(flat), shapes.reshape(flat))
        squares = np.einsum("kbp,kbp->bk", shapes.reshape(flat), shapes.reshape(flat))
        # Where only the far wings of a model are valid, its flux would be a wild extrapolation.
        valid_squares = np.einsum("kbp,kbp->bk", (shapes * (weight > 0)).reshape(flat), shapes.reshape(flat))
        measured = (valid_squares > _MIN_COVERAGE * squares) & (diagonal > 0)
        first, second = np.triu_indices(k, 1)
        shift = corner[second] - corner[first]
        near = (np.abs(shift) < s).all(axis=1)
        for i, j, (dy, dx) in zip(
            first[near].tolist(), second[near].tolist(), shift[near].tolist(), strict=True
        ):
            a = weighted[i, :, max(dy, 0) : s + min(dy, 0), max(dx, 0) : s + min(dx, 0)]
            b = shapes[j, :, max(-dy, 0) : s + min(-dy, 0), max(-dx, 0) : s + min(-dx, 0)]
            normal[:, i, j] = normal[:, j, i] = np.einsum("byx,byx->b", a, b)
        index = np.arange(k)
        normal[:, index, index] = diagonal
        left = cut_out(self.residual, corner[:, 0], corner[:, 1], s)
        old = r.flux[rows].T
        # The data are the residual plus the members' own models: b = <w s, residual> + N f.
        rhs = np.einsum("kbp,kbp->bk", weighted.reshape(flat), left.reshape(flat), dtype=np.float64)
        rhs += np.einsum("bij,bj->bi", normal, old)
        for band in range(bands):
            normal[band][:, ~measured[band]] = 0.0
            normal[band][~measured[band]] = 0.0
        normal[:, index, index] = np.where(measured, diagonal, 0.0)
        flux, error = joint_fluxes(normal, rhs, r.network_flux[rows].T, self.config.flux_prior)
        flux, error = flux.T, error.T
        new = np.nan_to_num(flux)
        self._change(rows, new - r.flux[rows])
        r.flux[rows], r.error[rows], r.measured[rows] = new, error, measured.T

    def _refine(self, rows: NDArray[np.int64], steps: int) -> None:
        """Fit the latents of sources to the pixels, see `refine`, until they settle.

        Overlapping sources whose posterior gets less probable go back to where they were, and take shorter
        steps.
        """
        r = self.rows
        rows = rows[~r.failed[rows]]
        # From here on the fluxes are those of the latents.
        flux = np.where(r.measured[rows], r.network_flux[rows], 0.0)
        self._change(rows, flux - r.flux[rows])
        r.flux[rows] = flux
        for batch in self._batches(rows):
            for _ in range(steps):
                active = batch[~r.settled[batch]]
                if not len(active):
                    break
                saved = r.save(active)
                models = self._linearise(active)
                groups = models.groups()
                before = self._objective(active, models, groups)
                latent, gain = models.step(r.damping[active])
                self._draw(active, latent)
                worse = self._objective(active, models, groups) > before
                back, damping = worse[groups], r.damping[active]
                self._change(active[back], -r.flux[active[back]])
                r.restore(active[back], saved, back)
                self._change(active[back], r.flux[active[back]])
                r.damping[active] = np.where(back, np.maximum(10.0 * damping, 0.1), 0.2 * damping)
                r.settled[active] = (gain < self.config.refinement_tolerance) & ~back

    def _refine_parents(self, parents: list[int]) -> list[int]:
        """Refine the members of some parents; return the parents that have not settled."""
        members = self._members(parents)
        if not members:
            return []
        rows = np.concatenate(members)
        self._refine(rows, self.config.refinement_steps)
        return np.unique(self.rows.parent[rows[~self.rows.settled[rows] & ~self.rows.failed[rows]]]).tolist()

    def _batches(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Rows that are refined at once: whole parents as long as they fit."""
        size, pieces = self.config.refinement_batch, []
        rows = rows[np.argsort(self.rows.parent[rows], kind="stable")]
        while len(rows):
            stop = min(size, len(rows))
            if stop < len(rows):
                parent = self.rows.parent[rows]
                first = int(np.searchsorted(parent, parent[stop]))
                stop = first if first > 0 else stop
            pieces.append(rows[:stop])
            rows = rows[stop:]
        return pieces

    def _objective(
        self, rows: NDArray[np.int64], models: LinearisedModels, groups: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Minus twice the log posterior of groups of overlapping sources, up to constants."""
        (y0, x0), (y1, x1) = models.starts.min(axis=0), models.stops.max(axis=0)
        owner = np.full((y1 - y0, x1 - x0), groups.max() + 1)
        for group, start, stop in zip(groups, models.starts - [y0, x0], models.stops - [y0, x0], strict=True):
            owner[start[0] : stop[0], start[1] : stop[1]] = group
        residual, weight = self.residual[:, y0:y1, x0:x1], self.weight[:, y0:y1, x0:x1]
        chi2 = np.einsum("byx,byx,byx->yx", residual, residual, weight)
        n = int(groups.max()) + 2
        out = np.bincount(owner.ravel(), weights=chi2.ravel(), minlength=n)[: n - 1]
        prior = self.config.refinement_prior * (self.rows.mean[rows].astype(float) ** 2).sum(axis=1)
        return out + np.bincount(groups, weights=prior, minlength=n - 1)

    def _linearise(self, rows: NDArray[np.int64]) -> LinearisedModels:
        r = self.rows
        corner = r.corner[rows]
        models = r.image[rows] * r.flux[rows].astype(np.float32)[:, :, None, None]
        widths = choose_widths(models, cut_out(self.weight, corner[:, 0], corner[:, 1], self.size))
        return LinearisedModels(
            self.network.jacobian,
            r.mean[rows],
            self.moments[r.cell[rows]],
            corner,
            widths,
            self.residual,
            self.weight,
            self.config.refinement_prior,
        )

    def _draw(self, rows: NDArray[np.int64], latent: NDArray[np.float64]) -> None:
        """Give sources new latents, and the models and fluxes that go with them."""
        r = self.rows
        sky, flux, good = unit_shapes(self.network.decoder.render(latent))
        good &= np.isfinite(flux).all(axis=1)
        rows, sky, flux = rows[good], sky[good], flux[good]
        self._change(rows, -r.flux[rows])
        r.mean[rows], r.sky[rows], r.network_flux[rows] = latent[good], sky, flux
        r.image[rows] = self.renderer.observed(sky, r.cell[rows])
        r.flux[rows] = np.where(r.measured[rows], flux, 0.0)
        self._change(rows, r.flux[rows])

    def _posterior(self) -> None:
        """Widths of the posterior, and what follows from them for fluxes and second moments."""
        r = self.rows
        rows = np.flatnonzero(r.alive & r.active & r.tried & ~r.failed)
        for part in self._batches(rows):
            r.covariance[part] = self.config.posterior_scale**2 * self._linearise(part).covariances()
        if len(rows):
            covariance = r.covariance[rows]
            r.sigma[rows] = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
            values, slope = self.network.jacobian.parameters(r.mean[rows])
            variance = np.einsum("kbpi,kij,kbpj->kbp", slope, covariance, slope, optimize=True)
            deviation = np.sqrt(np.maximum(variance, 0.0))
            relative = np.hypot(deviation[:, :, 0], self.config.flux_systematic)
            r.error[rows] = relative * r.network_flux[rows]
            r.moments[rows], r.moments_error[rows] = values[:, :, 3:], deviation[:, :, 3:]

    def _improve(self, parents: list[int]) -> list[int]:
        """Another pass for some parents; return those that got better and have not settled.

        A parent whose chi-square rises goes back to where it was.
        """
        if not parents:
            return []
        members = self._members(parents)
        rows = np.concatenate(members)
        saved, flux = self.rows.save(rows), self.rows.flux[rows].copy()
        self._subtract()
        before = [self._chi2(p) for p in parents]
        self._pass(parents)
        after = [self._chi2(p) for p in parents]
        r, moving, start = self.rows, [], 0
        for p, own, old, new in zip(parents, members, before, after, strict=True):
            part = slice(start, start + len(own))
            start += len(own)
            if new > old:
                r.restore(own, saved, part)
                continue
            allowed = self.config.flux_tolerance * np.maximum(np.nan_to_num(r.error[own]), 0.1 * r.flux[own])
            if (np.abs(r.flux[own] - flux[part]) > allowed).any():
                moving.append(p)
        return moving

    def _candidates(self, p: int, total: NDArray, members: NDArray, tree: cKDTree) -> NDArray[np.float64]:
        """Peaks in the residual of a parent that are worth a trial."""
        room = min(self.config.max_new_peaks, self.config.max_peaks - len(members))
        if room <= 0:
            return np.empty((0, 2))
        significance, y, x = self._significance(p, self.residual, total)
        inside = self._footprint(p, significance.shape, y, x)
        # A maximum where no band has data is the work of the filter.
        height, width = inside.shape
        inside &= self.valid[:, y : y + height, x : x + width].any(axis=0)
        found = find_peaks(
            significance, self.config.new_peak_threshold, inside, self.config.min_separation
        ) + [x, y]
        if len(found):
            near = tree.query(found)[0] < self.config.min_separation
            if self.rejected[p]:
                old = cKDTree(np.array(self.rejected[p])).query(found)[0]
                near |= old < max(self.config.min_separation, 1.0)
            found = found[~near]
        return found[:room]

    def _try_peaks(self, parents: list[int], iteration: int) -> list[int]:
        """Look for peaks in the residuals, try them, keep those that earn it; return parents that got any."""
        r = self.rows
        self._subtract()
        total = self.scene.image - self.residual
        live = np.flatnonzero(r.alive & r.active)
        tree = cKDTree(np.concatenate([r.peak[live], self._centroids(live)]))
        members = self._members(parents)
        trials = []
        for p, own in zip(parents, members, strict=True):
            found = self._candidates(p, total, own, tree)
            if len(found):
                window, _ = self.windows[p]
                softened = (
                    self.scene.variance[:, *window] + (self.config.model_error * total[:, *window]) ** 2
                )
                weight = np.where(self.valid[:, *window], 1.0 / softened, 0.0)
                trials.append((p, own, found, weight, self._chi2(p, weight)))
        if not trials:
            return []
        tried = [trial[0] for trial in trials]
        old = np.concatenate([trial[1] for trial in trials])
        saved, before = r.save(old), len(r)
        r.append(
            self._new_rows(
                np.concatenate([trial[2] for trial in trials]),
                np.concatenate([np.full(len(trial[2]), trial[0]) for trial in trials]),
                given=False,
                iteration=iteration,
            )
        )
        self.crowded = np.concatenate([self.crowded, np.zeros(len(r) - before, bool)])
        if self.refines:
            self._shapes(np.arange(before, len(r)))
            for own in self._members(tried):
                self._solve(own)
            # Only those that can see a new source have a reason to change.
            own, new = np.concatenate(self._members(tried)), np.arange(before, len(r))
            near = cKDTree(r.corner[new]).query(r.corner[own], p=np.inf)[0] < WIDTHS[0]
            r.settled[own[near]], r.damping[own[near]] = False, _FIRST_DAMPING
            self._refine(own, _TRIAL_STEPS)
        else:
            for _ in range(self.config.min_passes):
                self._pass(tried)
        accepted, start, first = [], 0, before
        for p, own, found, weight, chi2 in trials:
            new = np.arange(first, first + len(found))
            part = slice(start, start + len(own))
            start, first = start + len(own), first + len(found)
            r.alive[new[r.failed[new]]] = False
            self._weed(p, new, weight)
            kept = new[r.alive[new]]
            if len(kept) and chi2 - self._chi2(p, weight) > self.cost * len(kept):
                accepted.append(p)
            else:
                r.alive[new] = False
                # The exact state from before, but the residual only follows with the next subtraction.
                r.restore(own, saved, part)
            self.rejected[p].extend(r.peak[new[~r.alive[new]]])
        if accepted:
            self._subtract()
            for p in accepted:
                self._drop(p)
        return accepted

    def _worth(self, rows: NDArray[np.int64], p: int | None = None, weight: NDArray | None = None) -> NDArray:
        """By how much chi-square would rise if a source were removed and the others solved for again.

        In linear least squares that is exactly the square of flux over standard deviation. With softened
        weights on a parent's window, what the source can bring there bounds it.
        """
        r = self.rows
        with np.errstate(invalid="ignore", divide="ignore"):
            worth = np.where(r.measured[rows], (r.flux[rows] / r.error[rows]) ** 2, 0.0)
        if weight is not None:
            (ys, xs), _ = self.windows[p]
            corner = r.corner[rows] - [ys.start, xs.start]
            soft = cut_out(weight.astype(np.float32), corner[:, 0], corner[:, 1], self.size)
            worth = np.minimum(
                worth, r.flux[rows] ** 2 * np.einsum("kbyx,kbyx->kb", r.image[rows] ** 2, soft)
            )
        return np.nan_to_num(worth).sum(axis=1)

    def _weed(self, p: int, new: NDArray[np.int64], weight: NDArray) -> None:
        """Take back the new sources of a parent that do not earn their place, the least useful first."""
        r = self.rows
        while True:
            # Sources may have died without their light having been put back.
            dead = new[~r.alive[new] & (r.flux[new] != 0).any(axis=1)]
            if len(dead):
                self._remove(dead)
                self._solve(self._members([p])[0])
            live = new[r.alive[new]]
            if not len(live):
                return
            worth = self._worth(live, p, weight)
            if worth.min() >= self.cost:
                return
            r.alive[live[np.argmin(worth)]] = False

    def _remove(self, rows: NDArray[np.int64]) -> None:
        """Put the light of dead sources back into the residual."""
        self._change(rows, -self.rows.flux[rows])
        self.rows.flux[rows] = 0.0

    def _drop(self, p: int) -> None:
        """Drop members of a parent that no longer earn their place, the least useful first."""
        r = self.rows
        while True:
            members = self._members([p])[0]
            free = members if self.config.drop_given_peaks else members[~r.given[members]]
            # A parent keeps a source.
            if not len(free) or len(members) < 2:
                return
            worth = self._worth(free)
            weakest = free[np.argmin(worth)]
            if worth.min() >= self.cost:
                return
            r.alive[weakest] = False
            self._remove(np.array([weakest]))
            self._solve(members[members != weakest])
            self.rejected[p].append(r.peak[weakest])

    def run(self) -> DeblendResult:
        """Run the procedure."""
        self._start()
        everything = list(range(len(self.scene.parents)))
        parents = [p for p, own in zip(everything, self._members(everything), strict=True) if len(own)]
        for _ in range(self.config.min_passes):
            self._pass(parents)
        if self.refines:
            moving = self._refine_parents(parents)
        else:
            moving = parents
        open_ = parents if self.config.find_new_peaks else []
        for iteration in range(1, self.config.max_iterations + 1):
            if not moving and not open_:
                break
            if not self.refines:
                moving = self._improve(moving)
            open_ = self._try_peaks(open_, iteration)
            if self.refines:
                moving = self._refine_parents(sorted(set(moving) | set(open_)))
            moving = sorted(set(moving) | set(open_))
            _LOG.debug(
                "Iteration %d: %d parents gained sources, %d not settled.", iteration, len(open_), len(moving)
            )
        if self.config.max_iterations > 0:
            self.parent_flags["no_convergence"][sorted(set(moving) | set(open_))] = True
        self._subtract()
        for p in parents:
            self._drop(p)
        if self.refines:
            self._posterior()
        return self._result()

    def _centroids(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Centroids (x, y) of models in scene coordinates, (K, 2); the peak where there is no model."""
        r = self.rows
        out = r.peak[rows].copy()
        pixels = np.arange(self.size)
        for i, row in enumerate(rows):
            scale = r.flux[row] / r.noise[row]
            image = np.maximum(np.einsum("byx,b->yx", r.sky[row], scale.astype(np.float32)), 0.0)
            total = image.sum(dtype=np.float64)
            if total > 0:
                corner_y, corner_x = r.corner[row]
                out[i, 0] = corner_x + (image.sum(axis=0, dtype=np.float64) @ pixels) / total
                out[i, 1] = corner_y + (image.sum(axis=1, dtype=np.float64) @ pixels) / total
        return out

    def _fall_back(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Give sources without a model from the network what the image holds, (K, B, S, S).

        What the residual shows above the noise inside the parent's footprint goes to the nearest of the
        parent's sources of this kind, on top of the template or point source that each of them is.
        """
        r = self.rows
        out = np.zeros((len(rows), len(self.metadata.bands), self.size, self.size), np.float32)
        for p in np.unique(r.parent[rows]).tolist():
            own = np.flatnonzero(r.parent[rows] == p)
            significance, y0, x0 = self._significance(p, self.residual, None)
            inside = self._footprint(p, significance.shape, y0, x0)
            y, x = np.nonzero(inside & (significance > _FALLBACK_SIGNIFICANCE))
            if not len(y):
                continue
            y, x = y + y0, x + x0
            nearest = own[cKDTree(r.peak[rows[own]]).query(np.stack([x, y], axis=1))[1]]
            j, i = y - r.corner[rows[nearest], 0], x - r.corner[rows[nearest], 1]
            on = (j >= 0) & (j < self.size) & (i >= 0) & (i < self.size)
            out[nearest[on], :, j[on], i[on]] = self.residual[:, y[on], x[on]].T
        return out

    def _edge(self, peaks: NDArray) -> NDArray[np.bool_]:
        """Whether peaks are close to the border or to pixels marked as edge."""
        d, (height, width) = self.config.edge_distance, self.scene.shape
        x, y = np.floor(peaks + 0.5).astype(np.int64).T
        out = (x < d) | (y < d) | (x >= width - d) | (y >= height - d)
        if self.scene.edge is not None:
            for i in np.flatnonzero(~out):
                out[i] = self.scene.edge[y[i] - d : y[i] + d + 1, x[i] - d : x[i] + d + 1].any()
        return out

    def _outside_range(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether noise or seeing are outside what the network was trained on, in any band that has data."""
        r, ranges, out = self.rows, self.metadata.training_range, np.zeros(len(rows), bool)

        def beyond(values: NDArray, low: float, high: float) -> NDArray[np.bool_]:
            return (values < low * (1 - _RANGE_TOLERANCE)) | (values > high * (1 + _RANGE_TOLERANCE))

        for i, band in enumerate(self.metadata.bands):
            if self.usable[i]:
                if ranges.get("noise") is not None:
                    out |= beyond(r.noise[rows, i], *ranges["noise"][band])
                if ranges.get("psf_fwhm") is not None:
                    fwhm = 2.3548 * self.psf_sigma[r.cell[rows], i] * self.scene.pixel_scale
                    out |= beyond(fwhm, *ranges["psf_fwhm"])
        return out

    def _result(self) -> DeblendResult:
        """Put together what the procedure found, rows ordered by parent."""
        self._subtract()
        r, scene, n_parents = self.rows, self.scene, len(self.scene.parents)
        alive = np.flatnonzero(r.alive)
        rows = alive[np.argsort(r.parent[alive], kind="stable")]
        n, active = len(rows), r.active[rows]
        peak, corner, cell, parent = r.peak[rows], r.corner[rows], r.cell[rows], r.parent[rows]
        measured = r.measured[rows]
        flux = np.where(measured, r.flux[rows], np.nan)
        error = np.where(measured, r.error[rows], np.nan)
        worth = self._worth(rows)
        position = np.where(active[:, None], self._centroids(rows), peak)
        observed, sky = r.image[rows], r.sky[rows]
        # The cubes of shapes are the bulk of the memory; they are not needed any more.
        r.image = r.sky = np.empty((0, *observed.shape[1:]), np.float32)
        scale = np.nan_to_num(flux).astype(np.float32)[:, :, None, None]
        observed *= scale
        failed = np.flatnonzero(r.failed[rows] & active)
        if len(failed):
            extra = self._fall_back(rows[failed])
            weight = cut_out(self.weight, corner[failed, 0], corner[failed, 1], self.size)
            taken = (extra != 0) & (weight > 0) & measured[failed][:, :, None, None]
            extra *= taken
            variance = np.divide(1.0, weight, out=np.zeros_like(weight), where=taken)
            observed[failed] += extra
            flux[failed] += extra.sum(axis=(2, 3), dtype=float)
            error[failed] = np.hypot(error[failed], np.sqrt(variance.sum(axis=(2, 3), dtype=float)))
        sky *= np.nan_to_num(flux).astype(np.float32)[:, :, None, None]
        total = np.zeros(scene.image.shape, np.float32)
        add_cutouts(total, observed, corner[:, 0], corner[:, 1])
        residual = (scene.image - total) * self.valid
        self.residual = residual
        blendedness, coverage, chi2 = self._diagnostics(observed, corner, total, r.noise[rows])
        x, y = np.floor(peak + 0.5).astype(np.int64).T
        outside = (x < 0) | (x >= scene.shape[1]) | (y < 0) | (y >= scene.shape[0])
        masked_centre = np.zeros(n, bool)
        masked_centre[~outside] = ~self.valid[self.usable][:, y[~outside], x[~outside]].all(axis=0)
        has_data = scene.valid.any(axis=(1, 2))
        flags = {name: np.zeros(n, bool) for name in SOURCE_FLAGS}
        flags["edge"] = self._edge(peak)
        flags["masked_centre"] = masked_centre
        flags["peak_outside"] = outside
        flags["masked"] = self.parent_flags["masked"][parent]
        flags["too_many_peaks"] = self.crowded[rows]
        flags["not_finite"] = r.unsound[rows] & active
        flags["fallback"] = r.failed[rows] & active
        flags["no_psf"] = ~scene.psf.valid[cell][:, has_data].all(axis=1)
        flags["missing_band"] = active & ~measured.all(axis=1)
        flags["outside_training_range"] = self._outside_range(rows)
        flags["insignificant"] = active & (worth < self.cost)
        flags["no_convergence"] = active & self.parent_flags["no_convergence"][parent]
        np.logical_or.at(self.parent_flags["failed_source"], parent, flags["fallback"])
        origin_ids = np.array([p.id for p in scene.parents], np.int64)
        sources = SourceModels(
            bands=scene.bands,
            network=self.metadata.name,
            weights_sha256=self.metadata.weights_sha256,
            origin=scene.origin,
            id=np.arange(1, n + 1),
            parent=origin_ids[parent],
            x=position[:, 0],
            y=position[:, 1],
            peak_x=peak[:, 0],
            peak_y=peak[:, 1],
            corner_x=corner[:, 1],
            corner_y=corner[:, 0],
            psf_index=cell,
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
        start, end, pixels = np.zeros(n_parents), np.zeros(n_parents), np.zeros(n_parents, np.int64)
        for p, (window, inside) in enumerate(self.windows):
            end[p] = self._chi2(p)
            weight = self.weight[:, *window][:, inside]
            start[p] = (scene.image[:, *window][:, inside].astype(float) ** 2 * weight).sum()
            pixels[p] = np.count_nonzero(weight)
        shapes = np.array([p.footprint.shape for p in scene.parents], np.int64).reshape(-1, 2)
        parents = ParentSummary(
            origin=scene.origin,
            id=origin_ids,
            x0=np.array([p.x0 for p in scene.parents], np.int64),
            y0=np.array([p.y0 for p in scene.parents], np.int64),
            width=shapes[:, 1],
            height=shapes[:, 0],
            area=np.array([p.area for p in scene.parents], np.int64),
            n_peaks=self.n_peaks,
            n_child=np.bincount(parent[active], minlength=n_parents),
            iterations=self.iterations,
            n_pixels=pixels,
            chi2_start=start,
            chi2=end,
            flags=self.parent_flags,
        )
        return DeblendResult(sources, parents, residual)

    def _diagnostics(
        self, observed: NDArray, corner: NDArray, total: NDArray, noise: NDArray
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Blendedness, data coverage and chi-square of sources, (N,) each; NaN without a model."""
        blendedness, coverage, chi2 = np.full((3, len(observed)), np.nan)
        for i, outer, inner in overlaps(corner[:, 0], corner[:, 1], self.size, self.scene.shape):
            own = observed[i][:, *inner]
            weights = noise[i].astype(float) ** -2
            mixed = np.einsum("byx,byx->b", own, total[:, *outer]) @ weights
            if mixed > 0:
                blendedness[i] = max(1.0 - np.einsum("byx,byx->b", own, own) @ weights / mixed, 0.0)
            positive = np.maximum(own, 0.0)
            valid = self.valid[:, *outer]
            seen = np.einsum("byx,byx->b", positive, valid)
            whole = np.maximum(observed[i], 0.0).sum(axis=(1, 2))
            if whole.any():
                coverage[i] = (seen[whole > 0] / whole[whole > 0]).mean()
            if seen.any():
                squares = self.residual[:, *outer] ** 2 * self.weight[:, *outer]
                chi2[i] = np.einsum("byx,byx->", positive, squares) / seen.sum()
        return blendedness, coverage, chi2
