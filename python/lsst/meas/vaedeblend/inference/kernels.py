# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compiled loops over the pixels of sources' squares.

A square of width W has its pixel [0, 0] at (y0, x0) of the scene and may hang over the scene's border; what
lies beyond is passed over. Images of sources come as a pool (M, B, W, W) and the number of each one's image
in it.
"""

from __future__ import annotations

__all__ = [
    "diagnostics",
    "exchange",
    "coarse_weights",
    "cross_blocks",
    "cut",
    "moments_of_products",
    "products",
    "shift",
    "signal_inside",
    "soften",
    "weighted_residual",
]

import numba
import numpy as np

# Sums may be reordered, so that they run in vectors; what is not finite stays so.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_compile = numba.njit(cache=True, fastmath=_FAST, nogil=True)


@_compile
def shift(residual, weight, pool, slot, y0, x0, scale):
    """Subtract images times fluxes from the residual; return by how much each one changes chi-square.

    Parameters
    ----------
    residual : `numpy.ndarray`, (B, H, W)
        Changed in place.
    weight : `numpy.ndarray`, (B, H, W)
        Inverse variances.
    pool, slot, y0, x0
        Images and places of K sources.
    scale : `numpy.ndarray`, (K, B)
        What to multiply the images with.

    Returns
    -------
    change : `numpy.ndarray`, (K,)
        Changes of chi-square, one source after the other.
    """
    bands, height, width = residual.shape
    size = pool.shape[2]
    change = np.zeros(len(slot))
    for k in range(len(slot)):
        first, last = max(y0[k], 0), min(y0[k] + size, height)
        left, right = max(x0[k], 0), min(x0[k] + size, width)
        if left >= right:
            continue
        for b in range(bands):
            s = np.float32(scale[k, b])
            if s == 0:
                continue
            for y in range(first, last):
                row = residual[b, y, left:right]
                w = weight[b, y, left:right]
                image = pool[slot[k], b, y - y0[k], left - x0[k] : right - x0[k]]
                total = np.float32(0.0)
                for x in range(right - left):
                    old = row[x]
                    new = old - s * image[x]
                    row[x] = new
                    # The difference of squares as a product loses nothing where both are large.
                    total += w[x] * (new - old) * (new + old)
                change[k] += total
    return change


@_compile
def exchange(residual, weight, old, old_slot, old_scale, new, new_slot, new_scale, y0, x0):
    """Take new images for old ones in the residual; return by how much each exchange changes chi-square.

    Parameters
    ----------
    residual, weight : `numpy.ndarray`, (B, H, W)
        The residual, changed in place, and inverse variances.
    old, new : `numpy.ndarray`, (M, B, V, V), (M', B, W, W)
        Images, whose middles (pixels V // 2 and W // 2) coincide.
    old_slot, new_slot : `numpy.ndarray`, (K,)
        Which of them belong to the sources.
    old_scale, new_scale : `numpy.ndarray`, (K, B)
        What to multiply them with.
    y0, x0 : `numpy.ndarray`, (K,)
        First pixel of the wider of both squares.

    Returns
    -------
    change : `numpy.ndarray`, (K,)
        Changes of chi-square, one source after the other: what two sources do to each other is in it as far
        as both change.
    """
    bands, height, width = residual.shape
    wide = max(old.shape[2], new.shape[2])
    in_old, in_new = wide // 2 - old.shape[2] // 2, wide // 2 - new.shape[2] // 2
    change = np.zeros(len(y0))
    line = np.zeros(wide, np.float32)
    for k in range(len(y0)):
        left, right = max(-x0[k], 0), min(wide, width - x0[k])
        if left >= right:
            continue
        for b in range(bands):
            s, t = np.float32(new_scale[k, b]), np.float32(old_scale[k, b])
            for j in range(max(-y0[k], 0), min(wide, height - y0[k])):
                line[:] = 0.0
                if 0 <= j - in_new < new.shape[2]:
                    image = new[new_slot[k], b, j - in_new]
                    for i in range(len(image)):
                        line[i + in_new] += s * image[i]
                if 0 <= j - in_old < old.shape[2]:
                    image = old[old_slot[k], b, j - in_old]
                    for i in range(len(image)):
                        line[i + in_old] -= t * image[i]
                row = residual[b, y0[k] + j, x0[k] + left : x0[k] + right]
                w = weight[b, y0[k] + j, x0[k] + left : x0[k] + right]
                more = line[left:right]
                total = np.float32(0.0)
                for x in range(right - left):
                    value = row[x] - more[x]
                    # The difference of squares as a product loses nothing where both are large.
                    total -= w[x] * more[x] * (value + row[x])
                    row[x] = value
                change[k] += total
    return change


@_compile
def soften(soft, weight, image, residual, y0, x0, size, error):
    """Bring weights that count a relative error of the models up to date in squares, in place."""
    bands, height, width = residual.shape
    e2 = np.float32(error * error)
    for k in range(len(y0)):
        for b in range(bands):
            for y in range(max(y0[k], 0), min(y0[k] + size, height)):
                for x in range(max(x0[k], 0), min(x0[k] + size, width)):
                    w = weight[b, y, x]
                    model = image[b, y, x] - residual[b, y, x]
                    soft[b, y, x] = w / (np.float32(1.0) + w * e2 * model * model)


@_compile
def weighted_residual(residual, weight, y0, x0, size):
    """Residual times weight in squares, (K, B, size, size), 0 beyond the border."""
    bands, height, width = residual.shape
    out = np.zeros((len(y0), bands, size, size), np.float32)
    for k in range(len(y0)):
        left, right = max(x0[k], 0), min(x0[k] + size, width)
        for b in range(bands):
            for y in range(max(y0[k], 0), min(y0[k] + size, height)):
                for x in range(left, right):
                    out[k, b, y - y0[k], x - x0[k]] = residual[b, y, x] * weight[b, y, x]
    return out


@_compile
def cut(image, y0, x0, size):
    """Squares of an image, (K, B, size, size), 0 beyond the border."""
    bands, height, width = image.shape
    out = np.zeros((len(y0), bands, size, size), image.dtype)
    for k in range(len(y0)):
        left, right = max(x0[k], 0), min(x0[k] + size, width)
        if left >= right:
            continue
        for b in range(bands):
            for y in range(max(y0[k], 0), min(y0[k] + size, height)):
                out[k, b, y - y0[k], left - x0[k] : right - x0[k]] = image[b, y, left:right]
    return out


@_compile
def coarse_weights(weight, y0, x0, pixels, stride):
    """Weights summed over coarse pixels of stride x stride, (K, B, pixels, pixels)."""
    bands, height, width = weight.shape
    out = np.zeros((len(y0), bands, pixels, pixels), np.float32)
    size = pixels * stride
    for k in range(len(y0)):
        for b in range(bands):
            for y in range(max(y0[k], 0), min(y0[k] + size, height)):
                j = (y - y0[k]) // stride
                for x in range(max(x0[k], 0), min(x0[k] + size, width)):
                    out[k, b, j, (x - x0[k]) // stride] += weight[b, y, x]
    return out


@_compile
def moments_of_products(residual, weight, pool, slot, y0, x0):
    """Sums over pixels that the fluxes of sources follow from.

    Returns
    -------
    own, seen, data : `numpy.ndarray`, (K, B)
        Sums of image^2 times weight, of image^2 where the weight is positive, and of image times residual
        times weight.
    """
    bands, height, width = residual.shape
    size = pool.shape[2]
    own = np.zeros((len(slot), bands))
    seen = np.zeros((len(slot), bands))
    data = np.zeros((len(slot), bands))
    for k in range(len(slot)):
        left, right = max(x0[k], 0), min(x0[k] + size, width)
        for b in range(bands):
            a, c, d = 0.0, 0.0, 0.0
            for y in range(max(y0[k], 0), min(y0[k] + size, height)):
                for x in range(left, right):
                    value = pool[slot[k], b, y - y0[k], x - x0[k]]
                    w = weight[b, y, x]
                    a += value * value * w
                    if w > 0:
                        c += value * value
                    d += value * w * residual[b, y, x]
            own[k, b], seen[k, b], data[k, b] = a, c, d
    return own, seen, data


@_compile
def signal_inside(weight, pool, slot, y0, x0, scale, widths):
    """Squared signal-to-noise ratio of models inside of squares about their middles, (K, number of widths).

    Widths increase; the last one stands for the whole.
    """
    bands, height, width = weight.shape
    size = pool.shape[2]
    out = np.zeros((len(slot), len(widths)))
    for k in range(len(slot)):
        for j in range(size):
            y = y0[k] + j
            if y < 0 or y >= height:
                continue
            for i in range(size):
                x = x0[k] + i
                if x < 0 or x >= width:
                    continue
                total = 0.0
                for b in range(bands):
                    value = pool[slot[k], b, j, i] * scale[k, b]
                    total += value * value * weight[b, y, x]
                # Half-width that holds the pixel: index size // 2 is the middle, squares have even widths.
                reach = max(max(size // 2 - j, j + 1 - size // 2), max(size // 2 - i, i + 1 - size // 2))
                for w in range(len(widths)):
                    if 2 * reach <= widths[w] or w == len(widths) - 1:
                        out[k, w] += total
                        break
        for w in range(1, len(widths)):
            out[k, w] += out[k, w - 1]
    return out


@_compile
def products(weight, pool_a, slot_a, ya, xa, pool_b, slot_b, yb, xb):
    """Sums over pixels of image times image times weight for pairs of sources, (P, B)."""
    bands, height, width = weight.shape
    size_a, size_b = pool_a.shape[2], pool_b.shape[2]
    out = np.zeros((len(slot_a), bands))
    for k in range(len(slot_a)):
        left = max(max(xa[k], xb[k]), 0)
        right = min(min(xa[k] + size_a, xb[k] + size_b), width)
        for b in range(bands):
            total = 0.0
            for y in range(max(max(ya[k], yb[k]), 0), min(min(ya[k] + size_a, yb[k] + size_b), height)):
                for x in range(left, right):
                    total += (
                        pool_a[slot_a[k], b, y - ya[k], x - xa[k]]
                        * pool_b[slot_b[k], b, y - yb[k], x - xb[k]]
                        * weight[b, y, x]
                    )
            out[k, b] = total
    return out


@_compile
def cross_blocks(tangent_a, index_a, ya, xa, tangent_b, index_b, yb, xb):
    """Sums over bands and coarse pixels of products of two sources' derivatives, (P, L, L).

    Parameters
    ----------
    tangent_a, tangent_b : `numpy.ndarray`, (N, B, L, V, V)
        Derivatives times the root of the weights.
    index_a, index_b : `numpy.ndarray`, (P,)
        The two sources of each pair.
    ya, xa, yb, xb : `numpy.ndarray`, (P,)
        First coarse pixel of each one.
    """
    bands, length, va = tangent_a.shape[1:4]
    vb = tangent_b.shape[3]
    out = np.zeros((len(index_a), length, length), np.float32)
    for k in range(len(index_a)):
        y1, y2 = max(ya[k], yb[k]), min(ya[k] + va, yb[k] + vb)
        x1, x2 = max(xa[k], xb[k]), min(xa[k] + va, xb[k] + vb)
        if y1 >= y2 or x1 >= x2:
            continue
        h, w = y2 - y1, x2 - x1
        one = np.empty((length, bands * h * w), np.float32)
        other = np.empty((length, bands * h * w), np.float32)
        for i in range(length):
            at = 0
            for b in range(bands):
                for y in range(y1, y2):
                    for x in range(x1, x2):
                        one[i, at] = tangent_a[index_a[k], b, i, y - ya[k], x - xa[k]]
                        other[i, at] = tangent_b[index_b[k], b, i, y - yb[k], x - xb[k]]
                        at += 1
        out[k] = np.dot(one, other.T)
    return out


@_compile
def diagnostics(residual, weight, valid, total, pool, slot, y0, x0, scale, inverse_noise2):
    """Diagnostics of sources over their squares.

    Returns
    -------
    own, mixed : `numpy.ndarray`, (K,)
        Sums of model^2 and of model times the sum of all models, bands weighted by the noise.
    whole, seen : `numpy.ndarray`, (K, B)
        Sums of the model's positive part, over all pixels and over valid ones.
    chi2 : `numpy.ndarray`, (K,)
        Sum of the model's positive part times squared residual over variance.
    foreign : `numpy.ndarray`, (K, B)
        Sum of model times all other models over the sum of model^2, both over the variance: the others' light
        under the source, in units of its own flux; 0 where nothing is seen.
    """
    bands, height, width = residual.shape
    size = pool.shape[2]
    n = len(slot)
    own, mixed, chi2 = np.zeros(n), np.zeros(n), np.zeros(n)
    whole, seen, foreign = np.zeros((n, bands)), np.zeros((n, bands)), np.zeros((n, bands))
    for k in range(n):
        for b in range(bands):
            s = scale[k, b]
            square, other = 0.0, 0.0
            for j in range(size):
                y = y0[k] + j
                for i in range(size):
                    x = x0[k] + i
                    model = pool[slot[k], b, j, i] * s
                    positive = max(model, 0.0)
                    whole[k, b] += positive
                    if y < 0 or y >= height or x < 0 or x >= width:
                        continue
                    own[k] += model * model * inverse_noise2[k, b]
                    mixed[k] += model * total[b, y, x] * inverse_noise2[k, b]
                    if valid[b, y, x]:
                        seen[k, b] += positive
                        chi2[k] += positive * residual[b, y, x] ** 2 * weight[b, y, x]
                        square += model * model * weight[b, y, x]
                        other += model * (total[b, y, x] - model) * weight[b, y, x]
            if square > 0:
                foreign[k, b] = other / square
    return own, mixed, whole, seen, chi2, foreign
