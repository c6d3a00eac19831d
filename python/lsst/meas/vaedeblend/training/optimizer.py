# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""Muon: steps that move every direction of a weight matrix alike."""

from __future__ import annotations

__all__ = ["Muon", "orthogonalise"]

from collections.abc import Iterable

import torch
from torch import Tensor

_MOMENTUM = 0.95
_BETAS = 0.9, 0.999
_EPSILON = 1e-8
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the odd polynomial that takes singular values to about 1 (Jordan et al. 2024)."""

_FEW = 12
"""Matrices of up to so many rows or columns, the bands of the first and the last layer, are left to AdamW."""


def orthogonalise(matrix: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Replace the singular values of a matrix by values between about 0.7 and 1.2, and keep its vectors.

    Newton-Schulz iteration with the quintic of Jordan et al. (2024), https://kellerjordan.github.io/posts/muon.

    Parameters
    ----------
    matrix : `torch.Tensor`, (M, N)
    iterations : `int`, optional
        Five reach singular values down to some thousandths of the norm; smaller ones stay smaller.
    dtype : `torch.dtype`, optional
        Arithmetic of the products.

    Returns
    -------
    orthogonal : `torch.Tensor`, (M, N)
        In the type of ``matrix``.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype).contiguous()
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for weight matrices and kernels, AdamW for everything else.

    In the mean gradient of a batch few directions dominate: here the brightness of a galaxy, which all bands
    share. AdamW, which scales every number on its own, leaves the colours at a standstill for 100 000 samples
    (doc/experiments/009). Steps whose singular values are all alike move them as fast as the rest.

    `torch.optim.Muon` takes matrices only, and lightning one optimiser: this one takes the kernels of
    convolutions as matrices, one row for every output, and all other parameters.

    Parameters
    ----------
    parameters : iterable of `torch.nn.Parameter`
    lr : `float`
        Learning rate of AdamW. Matrices move by 0.2 lr sqrt(max(M, N)) times the orthogonal matrix, which has
        the root mean square of AdamW's steps (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
    weight_decay : `float`, optional
        Decoupled, as in AdamW.
    dtype : `torch.dtype`, optional
        Arithmetic of `orthogonalise`.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                # Maps of slopes have three dimensions, biases one.
                matrix = p.dim() in (2, 4) and min(p.shape[:2]) > _FEW
                (self._move_matrix if matrix else self._move_numbers)(p, group["lr"])
        return loss

    def _move_matrix(self, p: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        assert p.grad is not None
        momentum = state["momentum"].mul_(_MOMENTUM).add_(p.grad)
        # Nesterov's form: the momentum one step ahead.
        update = torch.add(p.grad, momentum, alpha=_MOMENTUM).flatten(1)
        scale = 0.2 * max(update.shape) ** 0.5
        p.add_(orthogonalise(update, dtype=self._dtype).view(p.shape), alpha=-lr * scale)

    def _move_numbers(self, p: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        assert p.grad is not None
        state["step"] += 1
        t = state["step"].item()
        mean = state["mean"].lerp_(p.grad, 1.0 - _BETAS[0])
        square = state["square"].lerp_(p.grad.square(), 1.0 - _BETAS[1])
        scale = (square / (1.0 - _BETAS[1] ** t)).sqrt_().add_(_EPSILON)
        p.addcdiv_(mean, scale, value=-lr / (1.0 - _BETAS[0] ** t))
