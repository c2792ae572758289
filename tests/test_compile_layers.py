# SPDX-License-Identifier: MIT
"""torch.compile(fullgraph=True) and torch.export of layers: same numbers, one compilation for every batch size."""

import copy
import io
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import camkernels
from camkernels._modulation import NORMS
from conftest import LAYERS, Layer, backends

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BATCH = torch.export.Dim("n", min=2)
pytestmark = pytest.mark.skipif(
    not any("cpu" in backends(layer.op) for layer in LAYERS),
    reason="there are no CPU kernels, and the reference is not an operator",
)


class Field(torch.nn.Module):
    """A modulated MLP with its modulation."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.grids = camkernels.CoordinateModulation(2, (4, 5), dtype=dtype)
        self.mlp = camkernels.ModulatedMLP(2, 3, width=8, activation="silu", norm="point", dtype=dtype)

    def forward(self, x):
        return self.mlp(x, self.grids(x))


OPERATORS = [layer for layer in LAYERS if "cpu" in backends(layer.op)]
EVERY = pytest.mark.parametrize("layer", [*OPERATORS, Layer("Field", "", Field, 2, (), lambda module: [])], ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def counted(module, **options):
    """(compiled function of x, its counter of compilations)."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(lambda x: module(x), fullgraph=True, backend=counter, **options), counter


def double(layer):
    """(module, points(*leading)) in float64."""
    return layer.build(dtype=torch.float64), lambda *leading: layer.inputs(*leading, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def gradients(function, module, x):
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])]


@EVERY
def test_compiling_warns_of_nothing(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Dynamo tells so of what it follows but does not trust
        torch.compile(layer.build(), fullgraph=True, backend="aot_eager")(layer.inputs(5)).sum().backward()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(layer, dtype):
    module, x = layer.build(), layer.inputs(9)
    compiled, _ = counted(module)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, expected = compiled(x), module(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@EVERY
def test_strided_and_expanded_inputs_and_gradients(layer):
    module, points = double(layer)
    compiled, _ = counted(module)
    for x in (points(7).t().contiguous().t(), points(1).expand(5, layer.width)):
        close(compiled(x), module(x))
        found = []
        for f in (compiled, module):
            leaf = x.detach().requires_grad_()
            found.append(torch.autograd.grad(f(leaf).sum(), [leaf, *module.parameters()]))
        close(found[0], found[1])


# ---- sizes -----------------------------------------------------------------------------------------------------------


@EVERY
def test_a_new_batch_size_compiles_nothing(layer):
    module, points = double(layer)
    compiled, counter = counted(module, dynamic=True)
    gradients(compiled, module, points(7))
    first = counter.frame_count
    for n in (2, 64, 1000, 33):
        close(gradients(compiled, module, points(n)), gradients(module, module, points(n)))
    assert counter.frame_count == first


@EVERY
def test_batch_sizes_are_found_to_vary(layer):
    module, points = double(layer)
    compiled, counter = counted(module)
    for n in (7, 2, 64, 1000, 33, 15, 16):
        compiled(points(n))
    assert counter.frame_count == 2  # one for the first size, one for all others


@pytest.mark.parametrize("n", [0, 1])
@EVERY
def test_batches_of_none_and_one(layer, n):
    module, points = double(layer)
    compiled, _ = counted(module, dynamic=True)
    assert compiled(points(n)).shape == module(points(n)).shape
    close(gradients(compiled, module, points(n)), gradients(module, module, points(n)))


@pytest.mark.slow
@EVERY
def test_leading_dimensions(layer):
    module, points = double(layer)
    compiled, _ = counted(module)
    for leading in ((), (4,), (3, 4), (2, 1, 3)):
        close(compiled(points(*leading)), module(points(*leading)))


# ---- training --------------------------------------------------------------------------------------------------------


@EVERY
def test_double_backward_through_a_compiled_layer_raises(layer):
    module, points = double(layer)
    compiled, _ = counted(module)
    x = points(5).requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@EVERY
def test_training_in_compiled_form_is_training(layer):
    model, points = double(layer)
    twin = copy.deepcopy(model)
    compiled, counter = counted(model)
    x = points(32)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, twin)]
    for _ in range(5):
        for f, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            (f(x).flatten(1) - x.sum(-1, keepdim=True)).square().mean().backward()
            optimizer.step()
    assert counter.frame_count == 1
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", OPERATORS, ids=str)
def test_the_graph_holds_the_operator(layer):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(layer.build(), fullgraph=True, backend=keep)(layer.inputs(5))
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count(getattr(torch.ops.camkernels, layer.op).default) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++ with g++, which is not on the PATH")
@EVERY
def test_inductor(layer):
    module = layer.build()

    def total(x):
        return module(x.sigmoid()).sin().sum(-1)

    compiled = torch.compile(total, fullgraph=True, backend="inductor", dynamic=True)
    for n in (33, 50):
        found, expected = (gradients(f, module, layer.inputs(n)) for f in (compiled, total))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@EVERY
def test_export_with_any_batch(layer, strict):
    module, points = double(layer)
    program = torch.export.export(module, (points(9),), dynamic_shapes=({0: BATCH},), strict=strict)
    for n in (2, 100):
        close(program.module()(points(n)), module(points(n)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1)], ids=str)
def test_export_of_a_scale_that_points_share(shape, strict):
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.modulate, self.mlp = camkernels.Modulate(norm="point"), camkernels.ModulatedMLP(8, 3, 8, 2)
            self.scale = torch.nn.Parameter(torch.rand(shape))
            self.rows = torch.nn.Parameter(torch.rand(1, 2, 2))

        def forward(self, x):
            return self.mlp(self.modulate(x, self.scale, self.scale), self.rows)

    module = Shared().double()
    program = torch.export.export(module, (torch.rand(9, 8).double(),), dynamic_shapes=({0: BATCH},), strict=strict)
    for n in (2, 100):
        x = torch.rand(n, 8).double()
        close(program.module()(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_export_of_modulate(norm, strict):
    """Of any batch, and any number of samples or pixels; with a scale of each item and a shift that they share."""
    module, samples, height = (
        camkernels.Modulate(norm, activation="silu"),
        *map(torch.export.Dim, ("samples", "height")),
    )
    frames = norm == "frame"
    beta = torch.rand(8, *[1] * 2 * frames).double()

    def tensors(n, m):
        shape, scale = ((n, 8, m, 5), (n, 8, 1, 1)) if frames else ((n, m, 8), (n, m, 1))
        return torch.rand(shape).double(), torch.rand(scale).double(), beta

    axes = ({0: BATCH, 2: height}, {0: BATCH}) if frames else ({0: BATCH, 1: samples},) * 2
    program = torch.export.export(module, tensors(9, 6), dynamic_shapes=(*axes, None), strict=strict)
    for n, m in ((2, 3), (100, 7)):
        given = tensors(n, m)
        close(program.module()(*given), module(*given))


@EVERY
def test_export_saved_and_loaded(layer):
    module, points = double(layer)
    program = torch.export.export(module, (points(9),), dynamic_shapes=({0: BATCH},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert set(loaded.state_dict) == {name for name, _ in module.named_parameters()}
    x = points(17).requires_grad_()
    y = loaded.module()(x)
    close(y, module(x))
    close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(module(x).sum(), x))
