# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sources while the procedure runs."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["FIRST_DAMPING", "Rows"]

# Damping of the first step of a refinement, where the models are not yet close.
FIRST_DAMPING = 0.01


@dataclasses.dataclass(eq=False)
class Rows:
    """The sources, one row each; rows stay where they are, dead ones are dropped in the end.

    `image` and `sky` are the shapes of the models, sum 1, as observed and in the network's frame.
    """

    parent: NDArray[np.int64]  # index into the scene's parents
    peak: NDArray[np.float64]  # (N, 2), x and y
    corner: NDArray[np.int64]  # (N, 2), y and x
    cell: NDArray[np.int64]
    iteration: NDArray[np.int64]
    given: NDArray[np.bool_]
    crowded: NDArray[np.bool_]  # left out because its parent has too many
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
        cutout_size: int,
        given: ArrayLike,
        iteration: int,
    ) -> Rows:
        """Make rows that have not been through the network."""
        (n, b), s, length = noise.shape, cutout_size, latent_size
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
            settled=np.zeros(n, bool),
            damping=np.full(n, FIRST_DAMPING),
            unsound=np.zeros(n, bool),
            noise=noise,
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

    def __len__(self) -> int:
        return len(self.parent)

    def append(self, other: Rows) -> None:
        for field in dataclasses.fields(self):
            both = np.concatenate([getattr(self, field.name), getattr(other, field.name)])
            setattr(self, field.name, both)

    def save(self, rows: NDArray[np.int64]) -> dict[str, NDArray]:
        """Copy what a pass changes."""
        return {name: getattr(self, name)[rows] for name in self._CHANGING}

    def restore(self, rows: NDArray[np.int64], saved: dict[str, NDArray], part: NDArray | slice) -> None:
        """Put back a part of what was saved."""
        for name, values in saved.items():
            getattr(self, name)[rows] = values[part]

    def centroids(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Centroids (x, y) of models in scene coordinates, (K, 2); the peak where there is no model."""
        out = self.peak[rows].copy()
        pixels = np.arange(self.sky.shape[-1])
        for i, row in enumerate(rows):
            scale = self.flux[row] / self.noise[row]
            image = np.maximum(np.einsum("byx,b->yx", self.sky[row], scale.astype(np.float32)), 0.0)
            total = image.sum(dtype=np.float64)
            if total > 0:
                corner_y, corner_x = self.corner[row]
                out[i, 0] = corner_x + (image.sum(axis=0, dtype=np.float64) @ pixels) / total
                out[i, 1] = corner_y + (image.sum(axis=1, dtype=np.float64) @ pixels) / total
        return out
