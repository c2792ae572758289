# SPDX-License-Identifier: MIT
"""What the modulated MLP keeps for its derivatives changes no bit, and it keeps nothing that nobody needs."""

import itertools
import random

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

import camkernels
from camkernels import testing
from conftest import backends, definition_of, function_of, repeated

pytestmark = pytest.mark.skipif("cpu" not in backends("modulated_mlp"), reason="there are no CPU kernels")
KEPT, COMPUTED = "0", "1"  # of CAMKERNELS_RECOMPUTE
CASES = testing.cases("modulated_mlp")


def kept_by(y):
    """How many values the call that made y keeps."""
    node = y.grad_fn
    while not hasattr(node, "op"):
        node = node.next_functions[0][0]
    return node.saved_tensors[-1].numel()


def layer(**options):
    torch.manual_seed(0)
    return camkernels.ModulatedMLP(3, 2, width=20, activation="tanh", **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_the_same_bits_from_kept_and_from_computed_values(case, dtype, monkeypatch):
    call = repeated(case.make(dtype), 250)  # full tiles and a part of one
    found = {}
    for choice in (KEPT, COMPUTED):
        monkeypatch.setenv("CAMKERNELS_RECOMPUTE", choice)
        found[choice] = testing.evaluate(function_of(case.op, "cpu"), call, order=2)
    for name, expected in found[COMPUTED].items():
        assert torch.equal(found[KEPT][name], expected), name


@pytest.mark.parametrize("choice", [KEPT, COMPUTED, None], ids=["kept", "computed", "free"])
def test_the_environment_chooses(choice, monkeypatch):
    monkeypatch.delenv("CAMKERNELS_RECOMPUTE", raising=False)
    if choice:
        monkeypatch.setenv("CAMKERNELS_RECOMPUTE", choice)
    y = layer()(torch.rand(7, 3))
    assert kept_by(y) == (0 if choice == COMPUTED else 7 * 32)  # of two hidden layers; 20 values in a row of 32


@pytest.mark.parametrize(
    ("inputs", "width", "hidden", "skips", "kept"),
    [
        (32, 64, 4, (), 3 * 64),  # not the first, of fewest inputs
        (512, 256, 3, (), 2 * 256),  # not the second: of equals the first
        (3, 8, 1, (), 0),
        (8, 16, 8, (2,), 6 * 16),  # neither the first nor the second; the fourth takes x too
    ],
)
def test_a_quarter_of_the_layers_is_computed_again(inputs, width, hidden, skips, kept, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", KEPT)
    mlp = camkernels.ModulatedMLP(inputs, 2, width=width, hidden_layers=hidden, skips=skips)
    assert kept_by(mlp(torch.rand(5, inputs))) == 5 * kept


def test_sizes_that_are_told_are_those_that_are_made():
    """The rule stands twice, in Python for tensors without memory and in C++."""
    rng = random.Random(0)
    for _ in range(40):
        widths = [rng.choice((1, 3, 16, 17, 40, 64)) for _ in range(rng.randint(2, 7))]
        weights = [torch.rand(o, i) for i, o in itertools.pairwise(widths)]
        layers, plain = len(weights), rng.random() < 0.5
        settings = ([2] * (layers - plain) + [0] * plain, [1.0] * layers, [False] * layers, plain, False, 1e-5)
        tensors = (torch.rand(5, widths[0]), weights, [], None, None)
        operator, flags = torch.ops.camkernels.modulated_mlp, (False, False, True, False)
        made = operator(*tensors, *settings, *flags)[1]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(t) for t in (tensors[0], *weights)]
            told = operator(fakes[0], fakes[1:], [], None, None, *settings, *flags)[1]
        assert told.shape == made.shape


def test_above_a_limit_nothing_is_kept(monkeypatch):
    monkeypatch.delenv("CAMKERNELS_RECOMPUTE", raising=False)
    mlp, x, values = layer(), torch.rand(7, 3), 7 * 32
    settings = camkernels.modulated_mlp.__globals__
    for limit, kept in ((values * 4, values), (values * 4 - 1, 0)):
        monkeypatch.setitem(settings, "KEPT_BYTES", limit)
        assert kept_by(mlp(x)) == kept


@pytest.mark.parametrize("n", [0, 1, 15, 17, 31, 33, 95, 96, 97, 193, 513, 1025])
@pytest.mark.parametrize("choice", [KEPT, COMPUTED], ids=["kept", "computed"])
def test_every_size_of_batch(n, choice, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", choice)
    case = testing.cases("modulated_mlp", modulation="scalar", norm="point", hidden=2)[0]
    call = repeated(case.make(torch.float64), n)
    actual, expected = (
        testing.evaluate(f, call, order=2) for f in (function_of(case.op, "cpu"), definition_of(case.op))
    )
    for name, wanted in expected.items():
        rtol, atol = testing.tolerance(torch.float64, "second")
        testing.assert_close(actual[name], wanted, rtol=rtol, atol=atol, name=name)


def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch):
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", KEPT)
    mlp, x = layer(), torch.rand(7, 3)
    sizes = []
    operator = torch.ops.camkernels.modulated_mlp.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if func is operator:
                sizes.append(results[1].numel())
            return results

    with Watch():
        mlp(x)
        with torch.no_grad():
            mlp(x)
        mlp.requires_grad_(False)(x)
    assert sizes == [7 * 32, 0, 0]


@pytest.mark.parametrize("choice", [KEPT, COMPUTED], ids=["kept", "computed"])
def test_gradients_per_sample_find_them_of_another_size(choice, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", choice)
    mlp, x = layer(dtype=torch.float64), torch.rand(6, 5, 3, dtype=torch.float64)

    def energy(x):
        return mlp(x).square().sum()

    whole = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(whole), whole)
    torch.testing.assert_close(vmap(grad(energy))(x), expected, rtol=1e-12, atol=1e-12)


def test_two_calls_of_a_layer_do_not_meet(monkeypatch):
    """Kept values belong to their call: calls in between, of the same layer, change nothing."""
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", KEPT)
    mlp, x = layer(), torch.rand(40, 3, requires_grad=True)
    y = mlp(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    mlp(torch.rand(40, 3, requires_grad=True)).sum().backward()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_an_exported_program_keeps_nothing_and_takes_any_batch():
    mlp = layer()
    program = torch.export.export(mlp, (torch.rand(7, 3),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    calls = [node for node in program.graph.nodes if "modulated_mlp" in str(node.target)]
    assert len(calls) == 1 and calls[0].args[-2] is False
    x = torch.rand(50, 3, requires_grad=True)
    found, expected = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (program.module(), mlp))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("choice", [KEPT, COMPUTED], ids=["kept", "computed"])
def test_compiled_as_in_eager_code(choice, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", choice)
    torch._dynamo.reset()
    mlp = layer()
    compiled = torch.compile(lambda x: mlp(x), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 40):
        x = torch.rand(n, 3, requires_grad=True)
        given = [x, *mlp.parameters()]
        for a, b in zip(*(torch.autograd.grad(f(x).square().sum(), given) for f in (compiled, mlp)), strict=True):
            assert torch.equal(a, b)
