# SPDX-License-Identifier: MIT
"""SparseRowAdam: Adam where every row is touched, nothing elsewhere, its formula row by row."""

import copy

import pytest
import torch

from camkernels import HashGrid, _gpu
from camkernels.optim import SparseRowAdam

NO_GPU = _gpu.no_gpu()
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]),
]
BETAS, EPS = (0.9, 0.99), 1e-15


def table(*shape, device="cpu", dtype=torch.float64):
    return torch.nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device))


def gradients(steps, rows, *tail):
    """Dense gradients, each of some of the rows, and none at all in the last step."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(steps, rows, *tail, generator=generator, dtype=torch.float64)
    used = torch.rand(steps, rows, generator=generator) < 0.4
    used[-1] = False
    return drawn * used.reshape(steps, rows, *[1] * len(tail))


def by_the_formula(p, gradient_list, lr):
    """The documented definition, one row at a time."""
    p = p.detach().clone()
    for row in range(len(p)):
        m, v, t = torch.zeros_like(p[row]), torch.zeros_like(p[row]), 0
        for gradient in gradient_list:
            g = gradient[row]
            if not g.any():
                continue
            t, m, v = t + 1, BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            p[row] -= lr * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return p


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tail", [(), (2,), (3, 2)])
def test_the_formula(tail, sparse, device):
    parameter, given = table(7, *tail, device=device), gradients(9, 7, *tail).to(device)
    expected = by_the_formula(parameter, given, lr=0.1)
    optimizer = SparseRowAdam([parameter], lr=0.1)
    for gradient in given:
        parameter.grad = gradient.to_sparse(1) if sparse else gradient
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-13)


def test_where_every_row_is_touched_it_is_adam():
    one, other = table(5, 3), table(5, 3)
    ours = SparseRowAdam([one], lr=0.1, betas=BETAS, eps=1e-8)
    theirs = torch.optim.Adam([other], lr=0.1, betas=BETAS, eps=1e-8)
    for gradient in torch.randn(10, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64):
        one.grad = other.grad = gradient
        ours.step()
        theirs.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_other_rows_keep_parameter_and_moments():
    parameter = table(6, 2)
    optimizer = SparseRowAdam([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = parameter.detach().clone(), copy.deepcopy(optimizer.state[parameter])
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[2, 1] = 3.0
    optimizer.step()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(parameter[others], before[0][others]) and (parameter[2, 1] != before[0][2, 1])
    state = optimizer.state[parameter]
    assert state["step"].tolist() == [1, 1, 2, 1, 1, 1]
    assert all(torch.equal(state[name][others], before[1][name][others]) for name in state)


def test_rows_listed_several_times_are_summed():
    one, other = table(4, 2), table(4, 2)
    index, values = torch.tensor([[1, 3, 1]]), torch.arange(1.0, 7.0, dtype=torch.float64).reshape(3, 2)
    one.grad = torch.sparse_coo_tensor(index, values, (4, 2), check_invariants=True)
    other.grad = one.grad.to_dense()
    for parameter in (one, other):
        SparseRowAdam([parameter], lr=0.1).step()
    assert torch.equal(one, other)


def test_a_run_goes_on_from_its_state():
    whole, part, given = table(7, 2), table(7, 2), gradients(8, 7, 2)
    optimizer, first = SparseRowAdam([whole], lr=0.1), SparseRowAdam([part], lr=0.1)
    for gradient in given:
        whole.grad = gradient
        optimizer.step()
    for gradient in given[:4]:
        part.grad = gradient
        first.step()
    second = SparseRowAdam([part], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in given[4:]:
        part.grad = gradient
        second.step()
    assert torch.equal(whole, part)
    assert second.state[part]["step"].dtype == torch.int32


def test_a_hash_grid_learns():
    torch.manual_seed(0)
    grid = HashGrid(2, n_levels=4, log2_hashmap_size=10, finest_resolution=64)
    optimizer = SparseRowAdam(grid.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.rand(64, 2)
        loss = (grid(x).sum(-1) - torch.sin(9 * x[:, 0])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"lr": -1.0}, "SparseRowAdam: lr must be"),
        ({"betas": (0.9, 1.0)}, "SparseRowAdam: betas must be at least 0 and below 1"),
        ({"params": [torch.nn.Parameter(torch.tensor(1.0))]}, "SparseRowAdam: parameters must have rows"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        SparseRowAdam(**{"params": [table(2, 2)]} | arguments)


def test_a_gradient_of_two_sparse_axes_is_refused():
    parameter = table(2, 2)
    parameter.grad = torch.ones(2, 2, dtype=torch.float64).to_sparse(2)
    with pytest.raises(ValueError, match="one sparse axis, got 2"):
        SparseRowAdam([parameter]).step()
