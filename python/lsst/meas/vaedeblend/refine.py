# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Refinement of latent variables on the pixels.

An encoder answers at a glance; what it leaves on the table is fitted here. With z the latent variables of all
sources, the negative log posterior

    (sum over pixels of (image - models(z))^2 / variance + p |z|^2) / 2

is minimised by Gauss-Newton steps that treat overlapping sources jointly: J^T W J + p is assembled from
blocks, one for each source and each overlapping pair, J being the derivatives of the models, W the weights,
and p the precision of the latent variables' prior, 1 for the standard normal one. The inverse of the same
matrix is the covariance of the posterior (Laplace's approximation). MADNESS (Biswas et al. 2024) refines the
latents of a trained decoder by gradient descent.
"""

from __future__ import annotations

__all__ = ["LinearisedModels", "choose_widths"]

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from .network import Jacobian

WIDTHS = (24, 40, 64)
"""Widths of the squares on which models are differentiated, pixel; light farther out hardly matters."""

MAX_STEP = 2.0
"""Longest step of one source, in standard deviations of the prior: the models are linear no farther."""

_MIN_OVERLAP = 6  # pixels on both axes below which two squares count as apart
_CG_TOLERANCE = 1e-3
_CG_ITERATIONS = 50


def choose_widths(observed: NDArray, weight: NDArray) -> NDArray[np.int64]:
    """Choose the square on which to differentiate each source: the smallest that holds its information.

    Parameters
    ----------
    observed : `numpy.ndarray`, (K, B, S, S)
        Models as observed, nJy.
    weight : `numpy.ndarray`, (K, B, S, S)
        Inverse variances, nJy^-2; 0 where the image is not valid.

    Returns
    -------
    widths : `numpy.ndarray`, (K,)
        One of `WIDTHS`, at most S, for each source: less than 25 (five sigma), or less than a hundredth, of
        its squared signal-to-noise ratio lies outside.
    """
    size = observed.shape[-1]
    signal = np.einsum("kbyx,kbyx,kbyx->kyx", observed, observed, weight)
    total = signal.sum(axis=(1, 2))
    possible = [w for w in WIDTHS if w < size] + [size]
    widths = np.full(len(observed), possible[-1], np.int64)
    for width in reversed(possible[:-1]):
        low = size // 2 - width // 2
        inside = signal[:, low : low + width, low : low + width].sum(axis=(1, 2))
        widths[total - inside < np.maximum(25.0, 0.01 * total)] = width
    return widths


class LinearisedModels:
    """Models of sources that overlap, linearised about their latent variables.

    Parameters
    ----------
    jacobian : `lsst.meas.vaedeblend.network.Jacobian`
        Derivatives of the decoder.
    latent : `numpy.ndarray`, (K, L)
        Latent variables of the sources.
    psf_moments : `numpy.ndarray`, (K, B, 3)
        Ixx, Iyy, Ixy of the PSF at each source, pixel^2.
    corner : `numpy.ndarray`, (K, 2)
        Scene coordinates (y, x) of pixel [0, 0] of the cutouts.
    widths : `numpy.ndarray`, (K,)
        Widths of the squares, see `choose_widths`.
    residual : `numpy.ndarray`, (B, H, W)
        The image minus all models, nJy.
    weight : `numpy.ndarray`, (B, H, W)
        Inverse variances, nJy^-2; 0 where the image is not valid.
    prior : `float`, optional
        Precision of the normal prior of each latent variable.

    Attributes
    ----------
    starts, stops : `numpy.ndarray`, (K, 2)
        First pixel (y, x) of each square in the scene, and the first one beyond it.
    pairs : `numpy.ndarray`, (P, 2)
        Sources whose squares overlap.
    """

    def __init__(
        self,
        jacobian: Jacobian,
        latent: NDArray,
        psf_moments: NDArray,
        corner: NDArray,
        widths: NDArray,
        residual: NDArray,
        weight: NDArray,
        prior: float = 1.0,
    ) -> None:
        k, length = latent.shape
        size = jacobian.metadata.cutout_size
        self.latent = latent.astype(np.float64)
        gradient = -prior * self.latent
        blocks = np.tile(prior * np.eye(length), (k, 1, 1))
        low = corner + size // 2 - widths[:, None] // 2
        high = low + widths[:, None]
        shape = np.array(residual.shape[1:])
        tangents: list[NDArray] = []
        starts = np.clip(low, 0, shape)
        stops = np.clip(high, starts, shape)
        for i in range(k):
            (y0, x0), (y1, x1) = starts[i], stops[i]
            rows = jacobian.images(latent[i : i + 1], psf_moments[i : i + 1], int(widths[i]))[0]
            (dy, dx) = starts[i] - low[i]
            rows = rows[:, :, dy : dy + y1 - y0, dx : dx + x1 - x0]
            root = np.sqrt(weight[:, y0:y1, x0:x1])
            rows = rows * root[:, None]
            # Latents that overflow must not spoil the steps of other sources.
            if not np.isfinite(rows).all():
                rows = np.zeros_like(rows)
            tangents.append(rows)
            flat = rows.reshape(*rows.shape[:2], -1)
            blocks[i] += np.matmul(flat, flat.transpose(0, 2, 1)).sum(axis=0)
            data = (residual[:, y0:y1, x0:x1] * root).reshape(len(root), -1, 1)
            gradient[i] += np.matmul(flat, data).sum(axis=0)[:, 0]
        self.gradient, self.blocks = gradient, blocks
        self.starts, self.stops = starts, stops
        self.pairs, self.cross = self._pairs(starts, stops, tangents)

    @staticmethod
    def _pairs(starts: NDArray, stops: NDArray, tangents: list[NDArray]) -> tuple[NDArray, NDArray]:
        """Indices (P, 2) of overlapping sources, and their blocks (P, L, L)."""
        middle = 0.5 * (starts + stops)
        reach = float((stops - starts).max(initial=0))
        found = cKDTree(middle).query_pairs(reach, p=np.inf, output_type="ndarray").reshape(-1, 2)
        length = tangents[0].shape[1]
        first = np.maximum(starts[found[:, 0]], starts[found[:, 1]])
        last = np.minimum(stops[found[:, 0]], stops[found[:, 1]])
        keep = (last - first >= _MIN_OVERLAP).all(axis=1)
        found, first, last = found[keep], first[keep], last[keep]
        cross = np.empty((len(found), length, length))
        for n, (i, j) in enumerate(found.tolist()):
            sides = []
            for m in (i, j):
                (y0, x0), (y1, x1) = first[n] - starts[m], last[n] - starts[m]
                part = tangents[m][:, :, y0:y1, x0:x1]
                sides.append(part.reshape(*part.shape[:2], -1))
            cross[n] = np.matmul(sides[0], sides[1].transpose(0, 2, 1)).sum(axis=0)
        return found, cross

    def step(self, damping: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Take a Gauss-Newton step, damped as by Levenberg and Marquardt.

        Parameters
        ----------
        damping : `numpy.ndarray`, (K,)
            Factor by which the diagonal of the matrix grows, minus 1, for each source.

        Returns
        -------
        latent : `numpy.ndarray`, (K, L)
            New latent variables; no source goes farther than `MAX_STEP`.
        gain : `numpy.ndarray`, (K,)
            Decrease of chi-square that the linear models promise, shared out among the sources.
        """
        diagonal = self.blocks.copy()
        axis = np.arange(diagonal.shape[1])
        diagonal[:, axis, axis] *= 1.0 + damping[:, None]
        inverse = np.linalg.inv(diagonal)
        change = _conjugate_gradients(self._assemble(diagonal), inverse, self.gradient)
        distance = np.sqrt((change**2).sum(axis=1, keepdims=True))
        gain = (change * self.gradient).sum(axis=1)
        return self.latent + change * np.minimum(1.0, MAX_STEP / np.maximum(distance, 1e-12)), gain

    def groups(self) -> NDArray[np.int64]:
        """Number the connected groups of overlapping sources, (K,)."""
        k, (i, j) = len(self.latent), self.pairs.T
        graph = scipy.sparse.coo_array((np.ones(len(i)), (i, j)), shape=(k, k))
        return scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)

    def _assemble(self, diagonal: NDArray) -> scipy.sparse.bsr_matrix:
        """The symmetric matrix of all sources, sparse in blocks."""
        k, length = self.latent.shape
        own, (i, j) = np.arange(k), self.pairs.T
        rows, columns = np.concatenate([own, i, j]), np.concatenate([own, j, i])
        data = np.concatenate([diagonal, self.cross, self.cross.transpose(0, 2, 1)])
        order = np.lexsort((columns, rows))
        indptr = np.searchsorted(rows[order], np.arange(k + 1))
        shape = (k * length, k * length)
        return scipy.sparse.bsr_matrix((data[order], columns[order], indptr), shape=shape)

    def covariances(self) -> NDArray[np.float64]:
        """Covariances of the posteriors, (K, L, L): those of each source with its neighbours left free.

        Sources that overlap with a neighbour but not with the source itself are held fixed.
        """
        k, length = self.latent.shape
        neighbours: list[list[int]] = [[] for _ in range(k)]
        entry: dict[tuple[int, int], NDArray] = {}
        for (i, j), block in zip(self.pairs.tolist(), self.cross, strict=True):
            neighbours[i].append(j)
            neighbours[j].append(i)
            entry[i, j], entry[j, i] = block, block.T
        out = np.empty_like(self.blocks)
        for i in range(k):
            group = [i, *neighbours[i]]
            n = len(group)
            matrix = np.zeros((n, length, n, length))
            for a, one in enumerate(group):
                for b, other in enumerate(group):
                    if one == other:
                        matrix[a, :, b] = self.blocks[one]
                    elif (one, other) in entry:
                        matrix[a, :, b] = entry[one, other]
            unit = np.zeros((n * length, length))
            unit[:length] = np.eye(length)
            # Positive definite: a sum of squares of the data plus the prior's unit matrix.
            out[i] = np.linalg.solve(matrix.reshape(n * length, n * length), unit)[:length]
        return 0.5 * (out + out.transpose(0, 2, 1))


def _conjugate_gradients(
    matrix: scipy.sparse.bsr_matrix, inverse: NDArray, rhs: NDArray
) -> NDArray[np.float64]:
    """Solve matrix x = rhs, (K, L), with the inverse of the diagonal blocks as preconditioner."""
    solution = np.zeros(rhs.shape)
    left = rhs.copy()
    scaled = np.einsum("kij,kj->ki", inverse, left)
    direction, square = scaled, float((left * scaled).sum())
    goal = _CG_TOLERANCE**2 * square
    for _ in range(_CG_ITERATIONS):
        if square <= goal:
            break
        image = (matrix @ direction.ravel()).reshape(rhs.shape)
        length = square / float((direction * image).sum())
        solution += length * direction
        left -= length * image
        scaled = np.einsum("kij,kj->ki", inverse, left)
        square, old = float((left * scaled).sum()), square
        direction = scaled + (square / old) * direction
    return solution
