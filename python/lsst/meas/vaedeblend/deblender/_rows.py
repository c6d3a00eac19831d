# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sources while the procedure runs."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..inference import Stamps

__all__ = ["Rows", "Saved"]


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """What sources were before a change that may have to be taken back."""

    rows: NDArray[np.int64]
    fields: dict[str, NDArray]
    # Index into `rows`, and images, of each width.
    images: list[tuple[NDArray[np.int64], NDArray[np.float32]]]


@dataclasses.dataclass(eq=False)
class Rows:
    """The sources, one row each; rows stay where they are, dead ones are dropped in the end.

    `stamps` are the models as observed, of unit flux but for light beyond their squares. Only `State` changes
    `alive`, `flux` and `stamps`, with the residual.
    """

    parent: NDArray[np.int64]  # index into the scene's parents
    peak: NDArray[np.float64]  # (N, 2), x and y
    corner: NDArray[np.int64]  # (N, 2), y and x, of the network's cutout
    cell: NDArray[np.int64]
    iteration: NDArray[np.int64]
    given: NDArray[np.bool_]
    crowded: NDArray[np.bool_]  # left out because its parent has too many
    alive: NDArray[np.bool_]
    active: NDArray[np.bool_]  # deblended at all
    tried: NDArray[np.bool_]  # has been through the network
    failed: NDArray[np.bool_]  # has no model from the network
    point: NDArray[np.bool_]  # the PSF is its model, see `_points`
    point_probability: NDArray[np.float64]  # NaN where it was not asked
    unsound: NDArray[np.bool_]  # the network's last output was no good
    settled: NDArray[np.bool_]  # refinement has nothing left to gain
    stuck: NDArray[np.bool_]  # no step makes its group any better, though the models promise one
    damping: NDArray[np.float64]  # of the next step of refinement
    promise: NDArray[np.float64]  # decrease of chi-square by an undamped step, over what counts as settled
    noise: NDArray[np.float32]
    flux: NDArray[np.float64]  # 0 where not measured
    error: NDArray[np.float64]
    network_flux: NDArray[np.float64]
    measured: NDArray[np.bool_]
    centroid: NDArray[np.float64]  # (N, 2), x and y, of the model
    wanted: NDArray[np.int64]  # width that the model's light asks for, pixel
    mean: NDArray[np.float32]
    sigma: NDArray[np.float32]
    covariance: NDArray[np.float32]  # of the posterior; NaN unless it is known
    moments: NDArray[np.float32]  # intrinsic second moments, and errors; NaN unless they are known
    moments_error: NDArray[np.float32]
    stamps: Stamps

    # What a pass or a step changes, and a trial that is rejected has to put back.
    _CHANGING = (
        "alive",
        "tried",
        "failed",
        "point",
        "point_probability",
        "unsound",
        "settled",
        "stuck",
        "damping",
        "promise",
        "flux",
        "error",
        "network_flux",
        "measured",
        "centroid",
        "wanted",
        "mean",
        "sigma",
    )

    @classmethod
    def new(
        cls,
        parent: NDArray[np.int64],
        peak: NDArray[np.float64],
        corner: NDArray[np.int64],
        cell: NDArray[np.int64],
        noise: NDArray[np.float32],
        *,
        latent_size: int,
        given: ArrayLike,
        iteration: int,
    ) -> Rows:
        """Make rows that have not been through the network."""
        (n, b), length = noise.shape, latent_size
        stamps = Stamps(b)
        stamps.extend(n)
        return cls(
            parent=parent,
            peak=peak,
            corner=corner,
            cell=cell,
            iteration=np.full(n, iteration),
            given=np.full(n, given),
            crowded=np.zeros(n, bool),
            alive=np.ones(n, bool),
            active=np.ones(n, bool),
            tried=np.zeros(n, bool),
            failed=np.zeros(n, bool),
            point=np.zeros(n, bool),
            point_probability=np.full(n, np.nan),
            unsound=np.zeros(n, bool),
            settled=np.zeros(n, bool),
            stuck=np.zeros(n, bool),
            damping=np.zeros(n),
            promise=np.full(n, np.nan),
            noise=noise,
            flux=np.zeros((n, b)),
            error=np.full((n, b), np.nan),
            network_flux=np.full((n, b), np.nan),
            measured=np.zeros((n, b), bool),
            centroid=peak.copy(),
            wanted=np.zeros(n, np.int64),
            mean=np.zeros((n, length), np.float32),
            sigma=np.zeros((n, length), np.float32),
            covariance=np.full((n, length, length), np.nan, np.float32),
            moments=np.full((n, b, 3), np.nan, np.float32),
            moments_error=np.full((n, b, 3), np.nan, np.float32),
            stamps=stamps,
        )

    def __len__(self) -> int:
        return len(self.parent)

    def append(self, other: Rows) -> None:
        """Add rows that have not been through the network."""
        for field in dataclasses.fields(self):
            if field.name != "stamps":
                both = np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                setattr(self, field.name, both)
        self.stamps.extend(len(other))

    def save(self, rows: NDArray[np.int64]) -> Saved:
        """Copy what a pass or a step changes."""
        fields = {name: getattr(self, name)[rows] for name in self._CHANGING}
        images = [(index, self.stamps.images(rows[index])) for _, index in self.stamps.by_width(rows)]
        return Saved(rows, fields, images)

    def restore(self, saved: Saved, part: NDArray[np.bool_]) -> None:
        """Put back those of the saved rows that are in a part of them."""
        rows = saved.rows[part]
        for name, values in saved.fields.items():
            getattr(self, name)[rows] = values[part]
        empty = np.ones(len(saved.rows), bool)
        for index, images in saved.images:
            empty[index] = False
            chosen = part[index]
            if chosen.any():
                self.stamps.set(saved.rows[index[chosen]], images[chosen])
        self.stamps.clear(saved.rows[part & empty])
