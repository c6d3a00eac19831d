# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
"""The optimiser: orthogonal steps for matrices, AdamW for the rest."""

import pytest

torch = pytest.importorskip("torch")

from lsst.meas.vaedeblend.training.optimizer import Muon, orthogonalise  # noqa: E402


def _matrix(rows, columns, singular_values, seed=1):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(singular_values), generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, len(singular_values), generator=generator))[0]
    return u, v, (u * torch.tensor(singular_values)) @ v.T


@pytest.mark.parametrize("shape", [(20, 90), (90, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalise_keeps_vectors_and_levels_values(shape, dtype):
    u, v, matrix = _matrix(*shape, [50.0, 20.0, 5.0, 1.0])
    core = u.T @ orthogonalise(matrix, dtype=dtype) @ v
    values = torch.linalg.svdvals(core)
    assert values.min() > 0.6 and values.max() < 1.3
    mixed = core - torch.diag(torch.diagonal(core))
    assert mixed.abs().max() < (1e-3 if dtype == torch.float32 else 0.05)


def test_matrices_move_by_the_root_mean_square_of_the_rule():
    p = torch.nn.Parameter(torch.zeros(16, 64))
    optimizer = Muon([p], lr=1e-2, dtype=torch.float32)
    p.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    # 16 singular values of about 1 in 16 x 64 numbers, times 0.2 lr sqrt(64): 0.2 lr, as a step of AdamW.
    assert p.square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.2)
    # Against the gradient.
    assert (p * p.grad).sum() < 0


def test_vectors_maps_and_thin_matrices_move_as_with_adamw():
    generator = torch.Generator().manual_seed(3)
    shapes = [(7,), (5, 6, 6), (6, 32, 3, 3), (32, 6, 3, 3)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_order_of_memory_makes_no_difference():
    kernel = torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(4))
    gradient = torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(5))
    moved = []
    for order in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(kernel.clone(memory_format=order))
        optimizer = Muon([p], lr=0.1, dtype=torch.float32)
        p.grad = gradient.clone(memory_format=order)
        optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-5)
    assert (moved[0] - kernel).abs().max() > 1e-3


def test_goes_on_where_it_was_left():
    """State saved and read after two of four steps, as when a training is interrupted."""
    gradients = [torch.randn(20, 20, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    biases = [g[0].clone() for g in gradients]

    def run(interrupt):
        parameters = [torch.nn.Parameter(torch.ones(20, 20)), torch.nn.Parameter(torch.ones(20))]
        optimizer = Muon(parameters, lr=0.1)
        for i, grads in enumerate(zip(gradients, biases, strict=True)):
            if i == 2 and interrupt:
                state = optimizer.state_dict()
                optimizer = Muon(parameters, lr=0.1)
                optimizer.load_state_dict(state)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g
            optimizer.step()
        return parameters

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)
