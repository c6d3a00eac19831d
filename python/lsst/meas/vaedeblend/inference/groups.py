# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sources that see each other, and the linear systems of their latents.

With z the latent variables of all sources of a group, the negative log posterior

    (sum over pixels of (image - models(z))^2 / variance + p |z|^2) / 2

is minimised by Gauss-Newton steps that treat overlapping sources jointly: J^T W J + p is assembled from
blocks, one for each source and each overlapping pair, J being the derivatives of the models, W the weights,
and p the precision of the latent variables' prior, 1 for the standard normal one. The inverse of the same
matrix is the covariance of the posterior (Laplace's approximation). MADNESS (Biswas et al. 2024) refines the
latents of a trained decoder by gradient descent.

Groups are solved one by one: what happens in one of them changes nothing in another.
"""

from __future__ import annotations

from functools import cached_property

import numba
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["GaussNewton", "connected_groups", "overlapping_pairs"]

_DIRECT = 12
"""Most sources of a group that is solved directly."""

_RIDGES = 4
"""Most times that steps are solved for again because some were too long."""

_CG_TOLERANCE = 1e-4
_CG_ITERATIONS = 200


def overlapping_pairs(start: NDArray, width: NDArray, least: int = 1) -> NDArray[np.int64]:
    """Find the pairs of squares that overlap.

    Parameters
    ----------
    start : `numpy.ndarray`, (K, 2)
        First pixel (y, x) of each square.
    width : `numpy.ndarray`, (K,)
        Widths, pixel.
    least : `int`, optional
        Pixels on both axes that two squares must share.

    Returns
    -------
    pairs : `numpy.ndarray`, (P, 2)
        Indices, the smaller first, sorted.
    """
    if len(start) < 2:
        return np.empty((0, 2), np.int64)
    found = []
    middle = start + 0.5 * width[:, None]
    # By widths, since one wide square would make a search for all of them wide.
    classes = [(w, np.flatnonzero(width == w)) for w in np.unique(width)]
    trees = [cKDTree(middle[rows]) for _, rows in classes]
    for i, (wi, own) in enumerate(classes):
        for j, (wj, other) in enumerate(classes[: i + 1]):
            reach = (wi + wj) / 2 - least
            if i == j:
                pairs = trees[i].query_pairs(reach, p=np.inf, output_type="ndarray")
                found.append(own[pairs.reshape(-1, 2)])
            else:
                near = trees[i].query_ball_tree(trees[j], reach, p=np.inf)
                first = np.repeat(own, [len(n) for n in near])
                second = other[np.array([m for n in near for m in n], np.int64)]
                found.append(np.stack([first, second], 1))
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def connected_groups(n: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the connected groups of n sources, (n,), given which pairs overlap."""
    graph = scipy.sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)


class GaussNewton:
    """The quadratic approximation of the negative log posterior of sources about their latents.

    Parameters
    ----------
    gradient : `numpy.ndarray`, (K, L)
        Downhill gradient with respect to the latents, the prior's included.
    block : `numpy.ndarray`, (K, L, L)
        Diagonal blocks of the matrix, the prior's precision included.
    pairs : `numpy.ndarray`, (P, 2)
        Sources that overlap.
    cross : `numpy.ndarray`, (P, L, L)
        Their blocks, rows of the first and columns of the second.

    Attributes
    ----------
    groups : `numpy.ndarray`, (K,)
        Number of the connected group of each source.
    """

    def __init__(self, gradient: NDArray, block: NDArray, pairs: NDArray[np.int64], cross: NDArray) -> None:
        self.gradient = np.asarray(gradient, np.float64)
        self.block = np.asarray(block, np.float64)
        self.pairs, self.cross = pairs, np.asarray(cross, np.float64)
        self.groups = connected_groups(len(gradient), pairs)

    @cached_property
    def members(self) -> list[NDArray[np.int64]]:
        """Sources of each group, in order."""
        order = np.argsort(self.groups, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.groups[order])) + 1) if len(order) else []

    def step(
        self, damping: NDArray, longest: float = np.inf
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Solve for the step, damped as by Levenberg and Marquardt.

        Parameters
        ----------
        damping : `numpy.ndarray`, (K,)
            Factor by which the diagonal of the matrix grows, minus 1; the same for all members of a group.
        longest : `float`, optional
            Longest step of one source. Longer ones are held back by a precision of their own, about which the
            neighbours know: to cut a step after it was solved for would leave them with what they were to
            take over.

        Returns
        -------
        change : `numpy.ndarray`, (K, L)
            Changes of the latents; NaN for groups whose system cannot be solved.
        gain : `numpy.ndarray`, (K,)
            Decrease of chi-square that the linear models promise for the whole step, shared out among the
            sources.
        """
        length = self.gradient.shape[1]
        axis = np.arange(length)
        block = self.block.copy()
        block[:, axis, axis] *= 1.0 + np.asarray(damping)[:, None]
        change = self._solve(block, self.members) if np.any(damping) else self.newton.copy()
        ridge = np.zeros(len(block))
        for _ in range(_RIDGES):
            square = (change**2).sum(axis=1)
            long = square > (1.1 * longest) ** 2
            if not long.any():
                break
            # Curvature along the step that was solved for; in proportion to it steps get shorter.
            curvature = (change[long] * self.gradient[long]).sum(axis=1) / square[long]
            ridge[long] += np.maximum(curvature, 1e-3) * (np.sqrt(square[long]) / longest - 1.0)
            held = block.copy()
            held[:, axis, axis] += ridge[:, None]
            touched = np.unique(self.groups[long])
            members = [rows for rows in self.members if self.groups[rows[0]] in touched]
            again = self._solve(held, members)
            solved = np.concatenate(members)
            change[solved] = again[solved]
        return change, (change * self.gradient).sum(axis=1)

    @cached_property
    def newton(self) -> NDArray[np.float64]:
        """The undamped step, (K, L); NaN for groups whose system cannot be solved."""
        return self._solve(self.block, self.members)

    @property
    def promise(self) -> NDArray[np.float64]:
        """Decrease of chi-square that the undamped step promises, shared out among the sources, (K,)."""
        return (self.newton * self.gradient).sum(axis=1)

    def _solve(self, block: NDArray, members: list[NDArray[np.int64]]) -> NDArray[np.float64]:
        """Solve the systems of some groups, with diagonal blocks as given."""
        change = np.full(self.gradient.shape, np.nan)
        alone = np.array([rows[0] for rows in members if len(rows) == 1], np.int64)
        change[alone] = _solve_blocks(block[alone], self.gradient[alone])
        inside = self._pairs_of_groups
        for rows in members:
            if len(rows) > 1:
                pairs = inside[self.groups[rows[0]]]
                local = np.searchsorted(rows, self.pairs[pairs])
                solve = _solve_dense if len(rows) <= _DIRECT else _solve_sparse
                change[rows] = solve(block[rows], local, self.cross[pairs], self.gradient[rows])
        return change

    def covariances(self) -> NDArray[np.float64]:
        """Covariances of the posteriors, (K, L, L): those of each source with its neighbours left free.

        Sources that overlap with a neighbour but not with the source itself are held fixed. NaN where the
        matrix is not positive definite.
        """
        k, length = self.gradient.shape
        neighbours: list[list[tuple[int, int, bool]]] = [[] for _ in range(k)]
        for p, (i, j) in enumerate(self.pairs.tolist()):
            neighbours[i].append((j, p, False))
            neighbours[j].append((i, p, True))
        between = {(i, j): p for p, (i, j) in enumerate(self.pairs.tolist())}
        out = np.full((k, length, length), np.nan)
        alone = np.array([not n for n in neighbours], bool)
        out[alone] = _covariance_blocks(self.block[alone])
        for i in np.flatnonzero(~alone).tolist():
            own = [i, *(j for j, _, _ in neighbours[i])]
            n = len(own)
            matrix = np.zeros((n, length, n, length))
            for a, one in enumerate(own):
                matrix[a, :, a] = self.block[one]
                for b in range(a):
                    other = own[b]
                    pair = between.get((min(one, other), max(one, other)))
                    if pair is not None:
                        part = self.cross[pair] if one < other else self.cross[pair].T
                        matrix[a, :, b], matrix[b, :, a] = part, part.T
            flat = matrix.reshape(n * length, n * length)
            out[i] = _leading_inverse(flat, length)
        return 0.5 * (out + out.transpose(0, 2, 1))

    @cached_property
    def _pairs_of_groups(self) -> list[NDArray[np.int64]]:
        """Indices of the pairs of each group."""
        n = int(self.groups.max(initial=-1)) + 1
        of_pair = self.groups[self.pairs[:, 0]] if len(self.pairs) else np.empty(0, np.int64)
        order = np.argsort(of_pair, kind="stable")
        starts = np.searchsorted(of_pair[order], np.arange(n + 1))
        return [order[starts[g] : starts[g + 1]] for g in range(n)]


def _solve_blocks(block: NDArray, rhs: NDArray) -> NDArray[np.float64]:
    """Solve many small systems; NaN where one has no solution."""
    if not len(block):
        return np.empty(rhs.shape)
    try:
        return np.linalg.solve(block, rhs[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        return np.stack(
            [
                _solve_dense(b[None], np.empty((0, 2), int), b[:0], r[None])[0]
                for b, r in zip(block, rhs, strict=True)
            ]
        )


def _inverse_blocks(block: NDArray) -> NDArray[np.float64]:
    if not len(block):
        return np.empty(block.shape)
    try:
        return np.linalg.inv(block)
    except np.linalg.LinAlgError:
        return np.stack([_inverse(b) for b in block])


def _inverse(block: NDArray) -> NDArray[np.float64]:
    try:
        return np.linalg.inv(block)
    except np.linalg.LinAlgError:
        return np.full(block.shape, np.nan)


def _covariance_blocks(block: NDArray) -> NDArray[np.float64]:
    """Inverses of many symmetric matrices; NaN where one is not positive definite."""
    try:
        np.linalg.cholesky(block)
        return np.linalg.inv(block)
    except np.linalg.LinAlgError:
        return np.stack([_leading_inverse(b, len(b)) for b in block])


def _leading_inverse(matrix: NDArray, length: int) -> NDArray[np.float64]:
    """First block of the inverse of a symmetric matrix; NaN where it is not positive definite."""
    unit = np.zeros((len(matrix), length))
    unit[:length] = np.eye(length)
    try:
        factor = scipy.linalg.cho_factor(matrix, lower=True, check_finite=False)
        return scipy.linalg.cho_solve(factor, unit, check_finite=False)[:length]
    except np.linalg.LinAlgError:
        return np.full((length, length), np.nan)


def _solve_dense(block: NDArray, pairs: NDArray, cross: NDArray, rhs: NDArray) -> NDArray[np.float64]:
    """Solve the system of one group directly, (n, L)."""
    n, length = rhs.shape
    matrix = np.zeros((n, length, n, length))
    index = np.arange(n)
    matrix[index, :, index] = block
    for (i, j), part in zip(pairs.tolist(), cross, strict=True):
        matrix[i, :, j], matrix[j, :, i] = part, part.T
    try:
        return np.linalg.solve(matrix.reshape(n * length, n * length), rhs.ravel()).reshape(n, length)
    except np.linalg.LinAlgError:
        return np.full(rhs.shape, np.nan)


def _solve_sparse(block: NDArray, pairs: NDArray, cross: NDArray, rhs: NDArray) -> NDArray[np.float64]:
    """Solve the system of one large group by conjugate gradients, preconditioned by the diagonal blocks."""
    inverse = _inverse_blocks(block)
    if not (np.isfinite(inverse).all() and np.isfinite(rhs).all()):
        return np.full(rhs.shape, np.nan)
    return _conjugate_gradients(block, inverse, pairs, cross, rhs, _CG_TOLERANCE, _CG_ITERATIONS)


@numba.njit(cache=True, nogil=True)
def _conjugate_gradients(block, inverse, pairs, cross, rhs, tolerance, iterations):
    n, length = rhs.shape
    solution = np.zeros((n, length))
    left = rhs.copy()
    scaled = np.empty((n, length))
    image = np.empty((n, length))
    for i in range(n):
        scaled[i] = np.dot(inverse[i], left[i])
    direction = scaled.copy()
    square = (left * scaled).sum()
    goal = tolerance**2 * square
    for _ in range(iterations):
        if square <= goal:
            break
        for i in range(n):
            image[i] = np.dot(block[i], direction[i])
        for p in range(len(pairs)):
            i, j = pairs[p, 0], pairs[p, 1]
            image[i] += np.dot(cross[p], direction[j])
            image[j] += np.dot(direction[i], cross[p])
        along = (direction * image).sum()
        if not along > 0:
            # Not positive definite: the data are no good.
            return np.full((n, length), np.nan)
        factor = square / along
        solution += factor * direction
        left -= factor * image
        for i in range(n):
            scaled[i] = np.dot(inverse[i], left[i])
        old = square
        square = (left * scaled).sum()
        direction = scaled + (square / old) * direction
    return solution
