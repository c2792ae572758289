# SPDX-License-Identifier: MIT
"""torch.compile(fullgraph=True) and torch.export of the functions: the same numbers as in eager code."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import camkernels
from camkernels import testing
from conftest import FIRST, OPS, PAIRED, WITH_JACOBIAN, backends, function_of, make, positional, require, some


def on_cpu(cases):
    return [pytest.param(case, id=f"{case.op}-{case}") for case in cases if "cpu" in backends(case.op)]


SOME = [*some(7), *PAIRED]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
pytestmark = pytest.mark.skipif(
    not any("cpu" in backends(op) for op in OPS),
    reason="there are no CPU kernels, and the reference is not an operator",
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(function, **options):
    """(compiled function, its counter of compilations)."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def layer(**options):
    settings = {"dims": 2, "n_levels": 3, "log2_hashmap_size": 8, "init_scale": 1.0, "dtype": torch.float64}
    return camkernels.HashGrid(**settings | options)


def gradients(function, inputs):
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


# ---- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", on_cpu(SOME))
def test_value_and_gradients(case):
    call = make(case, "cpu", points="safe")
    function = positional(function_of(case.op), call)
    compiled, counter = counted(function)
    inputs = list(call.inputs.values())
    close(compiled(*inputs), function(*inputs))
    for a, b in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        close(a, b)
    assert counter.frame_count == 2  # without and with gradients


@pytest.mark.parametrize("case", on_cpu(case for case in SOME if case in WITH_JACOBIAN))
def test_value_and_jacobian(case):
    call = make(case, "cpu", points="safe")
    call.options["return_jacobian"] = True
    function = positional(function_of(case.op), call)

    def total(*tensors):
        value, jacobian = function(*tensors)
        return torch.cat([value.double().flatten(), jacobian.sin().flatten()])

    compiled, _ = counted(total)
    inputs = list(call.inputs.values())
    close(compiled(*inputs), total(*inputs))
    for a, b in zip(gradients(compiled, inputs), gradients(total, inputs), strict=True):
        close(a, b)


@pytest.mark.parametrize("mask", ["points", "parameters"])
@pytest.mark.parametrize("case", on_cpu(FIRST))
def test_one_gradient_alone(case, mask):
    call = make(case, "cpu", points="safe")
    function = positional(function_of(case.op), call)
    compiled, _ = counted(function)
    found = []
    for f in (compiled, function):
        inputs = require(call, mask)
        f(*inputs.values()).square().sum().backward()
        found.append([t.grad for t in inputs.values()])
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    close([g for g in found[0] if g is not None], [g for g in found[1] if g is not None])


# ---- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_level", [None, 0, 2, 3, 0.0, 0.5, 1.0], ids=str)
def test_max_level_of_a_call(max_level):
    grid = layer()
    compiled, _ = counted(lambda x, m: grid(x, m))
    x = torch.rand(9, 2, dtype=torch.float64)
    close(compiled(x, max_level), grid(x, max_level))


@pytest.mark.slow
def test_max_level_of_a_point():
    grid = layer()
    compiled, counter = counted(lambda x, m: grid(x, m), dynamic=True)
    counts = []
    for n in (5, 8, 21):
        x, m = torch.rand(n, 2, dtype=torch.float64), torch.rand(n)
        close(compiled(x, m), grid(x, m))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.slow
def test_a_schedule_of_levels_compiles_once_for_each():
    grid = layer()
    compiled, counter = counted(lambda x, m: grid(x, m))
    x = torch.rand(9, 2, dtype=torch.float64)
    for m in (1, 1, 2, 2, 3, 3, 2, 1):
        close(compiled(x, m), grid(x, m))
    assert counter.frame_count <= 3


# ---- second order ----------------------------------------------------------------------------------------------------


def distance_field():
    torch.manual_seed(0)
    grid = layer(interpolation="smoothstep")
    head = torch.nn.Linear(grid.output_dim, 1, dtype=torch.float64)
    return grid, head, testing.safe_points(grid.geometry, 20)


def test_eikonal_loss_equals_double_backward():
    grid, head, x = distance_field()
    parameters = [grid.table, *head.parameters()]

    def loss(x):
        y, jacobian = camkernels.hash_grid(
            x, grid.table, grid.geometry, interpolation="smoothstep", return_jacobian=True
        )
        slope = head.weight @ jacobian  # [n, 1, dims]
        return head(y).square().mean() + (slope.norm(dim=-1) - 1).square().mean()

    def eager_loss(x):
        distance = head(grid(x))
        (slope,) = torch.autograd.grad(distance.sum(), x, create_graph=True)
        return distance.square().mean() + (slope.norm(dim=-1) - 1).square().mean()

    compiled, counter = counted(loss)
    expected = eager_loss(x.requires_grad_())
    close(compiled(x), expected)
    found = torch.autograd.grad(compiled(x), [*parameters, x])
    for a, b in zip(found, torch.autograd.grad(expected, [*parameters, x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 1


def test_a_new_batch_size_of_values_and_jacobians_compiles_nothing():
    grid, head, x = distance_field()
    parameters = [grid.table, *head.parameters()]

    def loss(x):
        y, jacobian = camkernels.hash_grid(x, grid.table, grid.geometry, return_jacobian=True)
        return head(y).square().mean() + (head.weight @ jacobian).norm(dim=-1).mean()

    compiled, counter = counted(loss, dynamic=True)
    counts = []
    for n in (7, 20, 12, 2):
        found, expected = (torch.autograd.grad(f(x[:n]), parameters) for f in (compiled, loss))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 4


# ---- export ----------------------------------------------------------------------------------------------------------

BATCH = torch.export.Dim("n", min=2)


class Field(torch.nn.Module):
    def __init__(self, max_level=None):
        super().__init__()
        self.grid, self.max_level = layer(), max_level
        self.head = torch.nn.Linear(self.grid.output_dim, 1, dtype=torch.float64)

    def forward(self, x, levels=None):
        return self.head(self.grid(x, self.max_level if levels is None else levels))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("max_level", [2, 0.5], ids=str)
def test_export_with_levels_and_any_batch(max_level, strict):
    model = Field(max_level)
    example = torch.rand(9, 2, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: BATCH},), strict=strict)
    for n in (2, 100):
        x = torch.rand(n, 2, dtype=torch.float64)
        close(program.module()(x), model(x))


def test_export_with_a_level_per_point():
    model = Field()
    arguments = torch.rand(9, 2, dtype=torch.float64), torch.rand(9)
    program = torch.export.export(model, arguments, dynamic_shapes=({0: BATCH}, {0: BATCH}))
    x, m = torch.rand(30, 2, dtype=torch.float64), torch.rand(30)
    close(program.module()(x, m), model(x, m))


def test_export_of_the_jacobian():
    grid = layer()

    class Normals(torch.nn.Module):
        def forward(self, x, table):
            return camkernels.hash_grid(x, table, grid.geometry, return_jacobian=True)

    arguments = torch.rand(9, 2, dtype=torch.float64), grid.table.detach()
    program = torch.export.export(Normals(), arguments, dynamic_shapes=({0: BATCH}, None))
    x = torch.rand(17, 2, dtype=torch.float64)
    close(program.module()(x, arguments[1]), Normals()(x, arguments[1]))
