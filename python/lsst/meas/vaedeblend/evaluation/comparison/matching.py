# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which object of one list is which of the other, and what happened to the rest."""

from __future__ import annotations

__all__ = ["Matches", "match_lists", "separations"]

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from ..metrics import match


@dataclasses.dataclass(eq=False)
class Matches:
    """Two lists matched one to one.

    Parameters
    ----------
    first, second : `numpy.ndarray`, (K,)
        The pairs, as rows of both lists; ``first`` ascends.
    merged : `numpy.ndarray`
        Rows of the first list without a partner, but with a paired object of the second list beside them,
        which probably holds their light.
    missed : `numpy.ndarray`
        Rows of the first list without any object of the second one beside them.
    split : `numpy.ndarray`
        Rows of the second list without a partner, but with a paired object of the first list beside them, of
        which they probably are a part.
    added : `numpy.ndarray`
        Rows of the second list without any object of the first one beside them.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    merged: NDArray[np.int64]
    missed: NDArray[np.int64]
    split: NDArray[np.int64]
    added: NDArray[np.int64]


def match_lists(xy: ArrayLike, other_xy: ArrayLike, radius: float) -> Matches:
    """Match two lists of positions as `lsst.meas.vaedeblend.evaluation.metrics.match` does.

    Objects that no chain of pairs within the radius connects cannot compete for partners: each such group is
    matched by itself, so that large patches take no more memory than their most crowded place. *Beside* means
    within twice the radius.

    Parameters
    ----------
    xy, other_xy : array_like, (N, 2) and (M, 2)
        Positions, pixel.
    radius : `float`
        Largest distance of a pair, pixel.

    Returns
    -------
    matches : `Matches`
    """
    a, b = (np.asarray(v, float).reshape(-1, 2) for v in (xy, other_xy))
    first: list[int] = []
    second: list[int] = []
    if len(a) and len(b):
        near = cKDTree(a).query_ball_tree(cKDTree(b), radius)
        rows = np.repeat(np.arange(len(a)), [len(n) for n in near])
        columns = np.array([c for n in near for c in n], np.int64)
        size = len(a) + len(b)
        graph = coo_array((np.ones(len(rows)), (rows, len(a) + columns)), shape=(size, size))
        label = connected_components(graph, directed=False)[1]
        linked = np.unique(label[rows])
        order_a, order_b = np.argsort(label[: len(a)], kind="stable"), np.argsort(label[len(a) :])
        sorted_a, sorted_b = label[: len(a)][order_a], label[len(a) :][order_b]
        for group in linked:
            i = order_a[slice(*np.searchsorted(sorted_a, [group, group + 1]))]
            j = order_b[slice(*np.searchsorted(sorted_b, [group, group + 1]))]
            mine, other = match(a[i], b[j], radius)
            first += i[mine].tolist()
            second += j[other].tolist()
    order = np.argsort(first, kind="stable")
    pairs = (np.array(first, np.int64)[order], np.array(second, np.int64)[order])
    merged, missed = _rest(a, b, *pairs, 2 * radius)
    split, added = _rest(b, a, *pairs[::-1], 2 * radius)
    return Matches(*pairs, merged, missed, split, added)


def _rest(
    a: NDArray, b: NDArray, paired_a: NDArray, paired_b: NDArray, radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a without partner: those beside a paired object of b, and the others."""
    rest = np.setdiff1d(np.arange(len(a)), paired_a)
    if not len(rest) or not len(paired_b):
        return rest[:0], rest
    beside = cKDTree(b[paired_b]).query(a[rest])[0] <= radius
    return rest[beside], rest[~beside]


def separations(xy: ArrayLike) -> NDArray[np.float64]:
    """Distance of each position to the nearest other one, (N,), pixel; infinite for a single one."""
    xy = np.asarray(xy, float).reshape(-1, 2)
    if len(xy) < 2:
        return np.full(len(xy), np.inf)
    return cKDTree(xy).query(xy, k=2)[0][:, 1]
