# SPDX-License-Identifier: MIT
"""Cotangents whose rows lie apart, as a slice's do: read where they lie by the kernels that can, else copied."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import camkernels
from conftest import backends

LAYOUTS = {
    "slice": lambda g: torch.cat([g.new_zeros(len(g), 3), g, g], 1)[:, 3 : 3 + g.shape[1]],
    "every other row": lambda g: g.repeat_interleave(2, 0)[::2],
    "columns": lambda g: g.t().contiguous().t(),
    "one row for all": lambda g: g[:1].expand(len(g), -1),
    "overlapping": lambda g: torch.as_strided(g.contiguous(), g.shape, (1, 1)),
}


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(x, width, dtype):
    """(y of that width, the features)"""
    features = (rand(40, width, seed=1) - 0.5).to(dtype).requires_grad_()
    centers, shapes = rand(40, 2, seed=2).to(x.dtype), torch.full((40, 1), 9.0, dtype=x.dtype)
    neighbors = (rand(len(x), 4, seed=3) * 40).int()
    options = {"shape": "isotropic", "backend": "cpu"}
    return camkernels.radial_basis(x, centers, shapes, features, neighbors, **options), features


def grid(x, width, dtype, **options):
    """(y of that width, or y and the Jacobian; the table)"""
    features = 1 if width % 2 else 2
    geometry = camkernels.GridGeometry.build(2, width // features, features, log2_hashmap_size=8, base_resolution=4)
    table = (rand(geometry.n_entries, features, seed=1) - 0.5).to(dtype).requires_grad_()
    return camkernels.hash_grid(x, table, geometry, interpolation="smoothstep", backend="cpu", **options), table


def grid_and_jacobian(x, width, dtype):
    (y, _), table = grid(x, width, dtype, return_jacobian=True)
    return y, table


OPS = [
    pytest.param(make, name, id=name)
    for make, name in ((basis, "radial_basis"), (grid, "hash_grid"), (grid_and_jacobian, "hash_grid_jacobian"))
    if "cpu" in backends(name.removesuffix("_jacobian"))
]


@pytest.mark.parametrize("make, name", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cotangents_may_lie_apart(layout, width, dtype, make, name):
    x = rand(300, 2).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    y, parameter = make(x, width, dtype)
    given = LAYOUTS[layout]((rand(300, width, seed=4) - 0.5).to(dtype))
    twice = not name.endswith("jacobian")  # that has first derivatives only

    def gradients(cotangent):
        cotangent = cotangent.detach().requires_grad_()
        first = torch.autograd.grad(y, (x, parameter), cotangent, create_graph=twice, retain_graph=True)
        return *first, *(torch.autograd.grad(first[0].sum(), (cotangent, x, parameter)) if twice else ())

    for got, wanted in zip(gradients(given), gradients(given.contiguous()), strict=True):
        assert torch.equal(got, wanted)


class BackwardCalls(TorchDispatchMode):
    """(function, arguments) of the derivative's operator, below autograd."""

    def __init__(self, name):
        super().__init__()
        self.name, self.seen = name, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if f"{self.name}_backward" in str(function):
            self.seen.append((function, arguments))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("make, name", OPS)
def test_only_rows_with_gaps_inside_are_copied(make, name):
    y, parameter = make(rand(50, 2).float(), 5, torch.float32)
    g = rand(50, 5, seed=4).float()
    arrived = {}
    with BackwardCalls(name) as calls:
        for layout, lay in LAYOUTS.items():
            torch.autograd.grad(y, parameter, lay(g), retain_graph=True)
            function, (grad, *rest) = calls.seen.pop()
            arrived[layout] = grad.stride()
    assert arrived.pop("slice") == (13, 1) and arrived.pop("every other row") == (10, 1)
    assert set(arrived.values()) == {(5, 1)}
    for layout in arrived:
        with pytest.raises(RuntimeError, match="rows of grad_y"):
            function(LAYOUTS[layout](g), *rest)
