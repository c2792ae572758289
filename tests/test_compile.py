# SPDX-License-Identifier: MIT
"""torch.compile(fullgraph=True) and torch.export: same numbers, one compilation for every batch size."""

import copy
import io
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import camkernels
from camkernels import testing
from conftest import CASES, OPS, backends, function_of, make, positional, require

SOME = [pytest.param(case, id=f"{case.op}-{case}") for case in CASES[::8] if "cpu" in backends(case.op)]
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


@pytest.mark.parametrize("case", SOME)
def test_value_and_gradients(case):
    call = make(case, "cpu", points="safe")
    function = positional(function_of(case.op), call)
    compiled, counter = counted(function)
    inputs = list(call.inputs.values())
    close(compiled(*inputs), function(*inputs))
    for a, b in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        close(a, b)
    assert counter.frame_count == 2  # without and with gradients


def test_compiling_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Dynamo tells so of what it follows but does not trust
        torch.compile(layer(), fullgraph=True, backend="aot_eager")(torch.rand(5, 2)).sum().backward()


@pytest.mark.parametrize("case", SOME)
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
def test_one_gradient_alone(mask):
    case = CASES[0]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype):
    grid = layer(dtype=torch.float32)
    x = torch.rand(9, 2)
    compiled, _ = counted(lambda x: grid(x))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, expected = compiled(x), grid(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_strided_and_expanded_inputs_and_gradients():
    grid = layer()
    compiled, _ = counted(lambda x: grid(x))
    base = torch.rand(2, 7, dtype=torch.float64)
    for x in (base.t(), torch.rand(1, 2, dtype=torch.float64).expand(5, 2)):
        close(compiled(x), grid(x))
        found = []
        for f in (compiled, grid):
            leaf = x.detach().requires_grad_()
            found.append(torch.autograd.grad(f(leaf).sum(), [leaf, grid.table]))
        close(found[0], found[1])


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_new_batch_size_compiles_nothing():
    grid = layer()
    compiled, counter = counted(lambda x: grid(x), dynamic=True)
    compiled(torch.rand(7, 2, dtype=torch.float64))
    first = counter.frame_count
    for n in (2, 64, 1000, 33):
        x = torch.rand(n, 2, dtype=torch.float64)
        close(compiled(x), grid(x))
        compiled(x).sum().backward()
    assert counter.frame_count == first


def test_batch_sizes_are_found_to_vary():
    grid = layer()
    compiled, counter = counted(lambda x: grid(x))
    for n in (7, 2, 64, 1000, 33, 15, 16):
        compiled(torch.rand(n, 2, dtype=torch.float64))
    assert counter.frame_count == 2  # one for the first size, one for all others


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_none_and_one(n):
    grid = layer()
    compiled, _ = counted(lambda x: grid(x), dynamic=True)
    x = torch.rand(n, 2, dtype=torch.float64, requires_grad=True)
    y = compiled(x)
    assert y.shape == (n, grid.output_dim)
    close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(grid(x).sum(), x)[0])


@pytest.mark.slow
def test_leading_dimensions():
    grid = layer()
    compiled, _ = counted(lambda x: grid(x))
    for shape in ((2,), (4, 2), (3, 4, 2), (2, 1, 3, 2)):
        x = torch.rand(shape, dtype=torch.float64)
        close(compiled(x), grid(x))


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


def test_double_backward_through_a_compiled_layer_raises():
    grid = layer()
    compiled, _ = counted(lambda x: grid(x))
    x = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_training_in_compiled_form_is_training():
    torch.manual_seed(0)
    grid = layer()
    model = torch.nn.Sequential(grid, torch.nn.Linear(grid.output_dim, 1, dtype=torch.float64))
    twin = copy.deepcopy(model)
    compiled, counter = counted(model)
    x = torch.rand(32, 2, dtype=torch.float64)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, twin)]
    for _ in range(5):
        for f, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            (f(x) - x.sum(-1, keepdim=True)).square().mean().backward()
            optimizer.step()
    assert counter.frame_count == 1
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_graph_holds_the_operator():
    grid = layer()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(grid, fullgraph=True, backend=keep)(torch.rand(5, 2, dtype=torch.float64))
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.camkernels.hash_grid.default) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++ with g++, which is not on the PATH")
def test_inductor():
    torch.manual_seed(0)
    grid = layer(dtype=torch.float32)
    compiled = torch.compile(
        lambda x: grid(x.sigmoid()).sin().sum(-1), fullgraph=True, backend="inductor", dynamic=True
    )
    for n in (33, 50):
        x = torch.randn(n, 2, requires_grad=True)
        found = torch.autograd.grad(compiled(x).sum(), [x, grid.table])
        expected = torch.autograd.grad(grid(x.sigmoid()).sin().sum(-1).sum(), [x, grid.table])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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
@pytest.mark.parametrize("max_level", [None, 2, 0.5], ids=str)
def test_export_with_any_batch(max_level, strict):
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


def test_export_saved_and_loaded():
    model = Field()
    program = torch.export.export(model, (torch.rand(9, 2, dtype=torch.float64),), dynamic_shapes=({0: BATCH},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert set(loaded.state_dict) == {"grid.table", "head.weight", "head.bias"}
    x = torch.rand(17, 2, dtype=torch.float64, requires_grad=True)
    close(loaded.module()(x), model(x))
    close(torch.autograd.grad(loaded.module()(x).sum(), x), torch.autograd.grad(model(x).sum(), x))


def test_export_of_the_jacobian():
    grid = layer()

    class Normals(torch.nn.Module):
        def forward(self, x, table):
            return camkernels.hash_grid(x, table, grid.geometry, return_jacobian=True)

    arguments = torch.rand(9, 2, dtype=torch.float64), grid.table.detach()
    program = torch.export.export(Normals(), arguments, dynamic_shapes=({0: BATCH}, None))
    x = torch.rand(17, 2, dtype=torch.float64)
    close(program.module()(x, arguments[1]), Normals()(x, arguments[1]))
