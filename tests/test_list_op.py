# SPDX-License-Identifier: MIT
"""The pattern of _autograd.py serves an operator with lists of tensors and an optional tensor, written here in Python.

    toy(x, modulation?, weights[], biases[]):  h = x;  for each layer  h = sin(modulation_i * (W_i h) + b_i)

Its three operators are stand-ins for kernels: they compute with plain PyTorch, below autograd.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from camkernels import _ops
from camkernels._autograd import Argument, Operator

ARGUMENTS = (
    Argument("x", points=True),
    Argument("modulation", "Tensor?", points=True),
    Argument("weights", "Tensor[]"),
    Argument("biases", "Tensor[]"),
)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def formula(x, modulation, weights, biases, omega):
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        z = x @ weight.t()
        x = torch.sin(omega * (z if modulation is None else z * modulation[:, i : i + 1]) + bias)
    return x


def fake(x, modulation, weights, biases, omega):
    return x.new_empty(x.shape[0], weights[-1].shape[0])


TOY = Operator("toy", ARGUMENTS, "float omega", [Argument("y", points=True)], fake)
TOY.differentiate().differentiate()


def leaf(value):
    if isinstance(value, (list, tuple)):
        return [leaf(v) for v in value]
    return None if value is None else value.detach().requires_grad_()


def flat(values):
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]


def backward_kernel(grad_y, x, modulation, weights, biases, omega, mask):
    """Gradients of <grad_y, toy>, as an operator returns them: empty(0), or an empty list, where unwanted."""
    with torch.enable_grad():
        inputs = leaf([x, modulation, weights, biases])
        total = (formula(*inputs, omega) * grad_y).sum()
    return pack(total, inputs, mask, x)


def second_kernel(grad_x, grad_modulation, grad_weights, grad_biases, grad_y, *rest):
    """Gradients of the inner product of cotangents and first-order gradients."""
    x, modulation, weights, biases, omega, mask = rest
    along = [grad_x, grad_modulation, grad_weights, grad_biases]
    with torch.enable_grad():
        inputs = leaf([grad_y, x, modulation, weights, biases])
        value = formula(*inputs[1:], omega)
        tensors = [t for t in flat(inputs[1:]) if t is not None]
        first = iter(torch.autograd.grad(value, tensors, inputs[0], create_graph=True, materialize_grads=True))
        total = x.new_zeros(())
        for cotangent, tensor in zip(along, inputs[1:], strict=True):
            for v, t in itertools.zip_longest(flat([cotangent]), flat([tensor])):  # an absent cotangent is None or []
                gradient = None if t is None else next(first)
                if v is not None:
                    total = total + (v * gradient).sum()
    return pack(total, inputs, mask, x)


def pack(total, inputs, mask, like):
    tensors = [t for t in flat(inputs) if t is not None]
    found = iter(torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True))
    packed = []
    for value, wish in zip(inputs, mask, strict=True):
        if isinstance(value, list):
            grads = [next(found) for _ in value]
            packed.append(grads if wish else [])
        else:
            gradient = None if value is None else next(found)
            packed.append(gradient if wish else like.new_empty(0))
    return tuple(packed)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    library = torch.library.Library(_ops.NAMESPACE, "IMPL")
    for name, kernel in (("toy", formula), ("toy_backward", backward_kernel), ("toy_backward_backward", second_kernel)):
        library.impl(name, below_autograd(kernel), "CPU")
    yield
    library._destroy()


def below_autograd(kernel):
    """The kernel as one in C++ would be: it gives plain numbers, whatever it uses to find them.

    PyTorch calls a kernel with autograd switched off in the calling thread; another one can still differentiate.
    """

    def call(*arguments):
        with ThreadPoolExecutor(1) as thread:
            results = thread.submit(kernel, *arguments).result()
        if isinstance(results, tuple):
            return tuple([t.detach() for t in r] if isinstance(r, list) else r.detach() for r in results)
        return results.detach()

    return call


def toy(x, modulation, weights, biases, omega=1.5):
    return TOY(x, modulation, list(weights), list(biases), settings=(omega,))


def inputs(n=5, modulated=True, layers=2):
    generator = torch.Generator().manual_seed(0)
    widths = [3, 4, 2][: layers + 1]

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [random(b, a) for a, b in itertools.pairwise(widths)]
    biases = [random(b) for b in widths[1:]]
    return random(n, 3), random(n, layers) if modulated else None, weights, biases


def requiring(tensors, frozen=()):
    """(leaves of which the frozen require no gradient, a function of those that do)."""
    x, modulation, weights, biases = tensors
    named = {"x": x, "modulation": modulation, "w0": weights[0], "w1": weights[1], "b0": biases[0], "b1": biases[1]}
    trained = {name: t.clone().requires_grad_() for name, t in named.items() if t is not None and name not in frozen}

    def function(*leaves):
        now = named | dict(zip(trained, leaves, strict=True))
        return toy(now["x"], now["modulation"], [now["w0"], now["w1"]], [now["b0"], now["b1"]])

    return tuple(trained.values()), function


FROZEN = [
    (),
    ("x",),
    ("modulation",),
    ("w0", "w1"),
    ("w0",),
    ("w1", "b0"),
    ("w0", "w1", "b0", "b1"),
    ("x", "modulation", "b0", "b1"),
    ("x", "modulation", "w0", "b0", "b1"),
]


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_first_and_second_order(frozen, modulated):
    leaves, function = requiring(inputs(modulated=modulated), frozen)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("modulated", [True, False])
def test_values_and_gradients_are_those_of_the_formula(modulated):
    tensors = inputs(modulated=modulated)
    leaves = leaf(list(tensors))
    torch.testing.assert_close(toy(*tensors), formula(*tensors, 1.5), **CLOSE)
    wanted = [t for t in flat(leaves) if t is not None]
    found = torch.autograd.grad(toy(*leaves).sum(), wanted)
    for a, b in zip(found, torch.autograd.grad(formula(*leaves, 1.5).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_frozen_weights_get_no_gradient_and_lose_no_second_order():
    x, modulation, weights, biases = inputs()
    norms = []
    for train in (True, False):
        leaves = x.clone().requires_grad_(), [w.clone().requires_grad_(train) for w in weights]
        y = toy(leaves[0], modulation, leaves[1], biases)
        (slope,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
        slope.square().sum().backward()
        assert all((w.grad is not None) == train for w in leaves[1])
        norms.append(leaves[0].grad)
    torch.testing.assert_close(norms[0], norms[1], **CLOSE)


def test_third_order_is_refused():
    leaves, function = requiring(inputs())
    (first,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^toy: no derivatives beyond toy_backward_backward"):
        second.sum().backward()


def test_a_list_of_one_and_strided_members():
    x, modulation, weights, biases = inputs(layers=1)
    strided = weights[0].t().contiguous().t()
    torch.testing.assert_close(toy(x, modulation, [strided], biases), formula(x, modulation, weights, biases, 1.5))


@pytest.mark.slow
@pytest.mark.parametrize("modulated", [True, False])
def test_opcheck(modulated):
    x, modulation, weights, biases = inputs(modulated=modulated)
    y = torch.randn(5, 2, dtype=torch.float64)
    full = [True, modulated, True, True]
    calls = [
        (_ops.operators.toy.default, [x, modulation, weights, biases, 1.5]),
        (_ops.operators.toy_backward.default, [y, x, modulation, weights, biases, 1.5, full]),
        (_ops.operators.toy_backward.default, [y, x, modulation, weights, biases, 1.5, [False, False, True, False]]),
        (
            _ops.operators.toy_backward_backward.default,
            [x, modulation, weights, biases, y, x, modulation, weights, biases, 1.5, [True, *full]],
        ),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)
        if operator is not calls[-1][0]:
            torch.library.opcheck(operator, [leaf(a) if is_tensors(a) else a for a in arguments])


def is_tensors(value):
    return isinstance(value, torch.Tensor) or (isinstance(value, list) and isinstance(value[0], torch.Tensor))


@pytest.mark.parametrize("frozen", [(), ("w0",), ("x", "modulation"), ("w0", "w1", "b0", "b1")], ids="-".join)
@pytest.mark.parametrize("modulated", [True, False])
def test_compiled_in_one_graph(modulated, frozen):
    torch._dynamo.reset()
    leaves, function = requiring(inputs(modulated=modulated), frozen)
    compiled = torch.compile(lambda *leaves: function(*leaves), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), function(*leaves), **CLOSE)
    found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(function(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_exported():
    x, modulation, weights, biases = inputs()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.biases = (torch.nn.ParameterList(p) for p in (weights, biases))

        def forward(self, x, modulation):
            return toy(x, modulation, self.weights, self.biases)

    batch = torch.export.Dim("n", min=2)
    program = torch.export.export(Model(), (x, modulation), dynamic_shapes=({0: batch}, {0: batch}))
    more = torch.randn(11, 3, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)
    torch.testing.assert_close(program.module()(*more), formula(*more, weights, biases, 1.5), **CLOSE)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def test_grad_and_grad_of_grad():
    x, modulation, weights, biases = inputs()

    def energy(x, weights, f):
        return f(x, modulation, weights, biases).square().sum()

    def plain(x, modulation, weights, biases):
        return formula(x, modulation, weights, biases, 1.5)

    def steepness(x, weights, f):
        return grad(lambda x: energy(x, weights, f))(x).square().sum()

    for function in (energy, steepness):
        found, expected = (grad(partial(function, f=f), argnums=(0, 1))(x, weights) for f in (toy, plain))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("modulated", [True, False])
def test_vmap_over_points(modulated):
    x, modulation, weights, biases = inputs(n=12, modulated=modulated)
    batch = x.reshape(3, 4, 3)
    expected = formula(x, modulation, weights, biases, 1.5).reshape(3, 4, 2)
    if modulated:
        found = vmap(lambda x, m: toy(x, m, weights, biases))(batch, modulation.reshape(3, 4, 2))
    else:
        found = vmap(lambda x: toy(x, None, weights, biases))(batch)
    torch.testing.assert_close(found, expected, **CLOSE)
    shared = None if modulation is None else modulation[:4]
    found = vmap(lambda x: toy(x, shared, weights, biases), in_dims=1)(batch.movedim(0, 1))
    wide = None if shared is None else shared.repeat(3, 1)
    torch.testing.assert_close(found, formula(x, wide, weights, biases, 1.5).reshape(3, 4, 2), **CLOSE)


def test_gradients_per_sample():
    x, modulation, weights, biases = inputs()

    def energy(x, m, weights):
        return toy(x.unsqueeze(0), m.unsqueeze(0), weights, biases).square().sum()

    in_x = vmap(grad(energy), (0, 0, None))(x, modulation, weights)
    in_weights = vmap(grad(energy, argnums=2), (0, 0, None))(x, modulation, weights)
    for n in range(len(x)):
        gx, gw = grad(energy, argnums=(0, 2))(x[n], modulation[n], weights)
        torch.testing.assert_close(in_x[n], gx, **CLOSE)
        for a, b in zip(in_weights, gw, strict=True):
            torch.testing.assert_close(a[n], b, **CLOSE)


def test_batched_members_of_a_list_are_refused():
    x, modulation, weights, biases = inputs()
    several = torch.stack([weights[1]] * 2)
    with pytest.raises(RuntimeError, match=r"^toy: torch\.vmap over weights is not supported, only over points"):
        vmap(lambda w: toy(x, modulation, [weights[0], w], biases))(several)
