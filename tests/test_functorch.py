# SPDX-License-Identifier: MIT
"""torch.func: gradients of gradients, vmap over points in every form, and a refusal, never a zero, for the rest."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, jacrev, jvp, vmap

import camkernels
from camkernels import testing
from conftest import CASES, each, function_of, make

SOME = each(CASES[::6], reference=False)
FIRST = each(CASES[:1], reference=False)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def parts(case, backend):
    """(function of points and parameters, points [n, d], parameters); options per point left out."""
    call = make(case, backend, points="safe")
    options = {name: o for name, o in call.options.items() if not torch.is_tensor(o)}
    names = [name for name in call.inputs if name != call.points]
    function = function_of(case.op, backend)

    def of_points(x, *parameters, **extra):
        return function(**{call.points: x}, **dict(zip(names, parameters, strict=True)), **options, **extra)

    x = call.inputs[call.points]
    return of_points, x.reshape(-1, x.shape[-1]), [call.inputs[name] for name in names]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_grad_and_grad_of_grad_equal_autograd(case, backend):
    function, x, parameters = parts(case, backend)

    def energy(*tensors):
        return function(*tensors).square().sum()

    def steepness(*tensors):
        return sum(g.square().sum() for g in grad(energy, argnums=(0, 1))(*tensors))

    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    first = torch.autograd.grad(energy(*leaves), leaves[:2], create_graph=True)
    for a, b in zip(grad(energy, argnums=(0, 1))(x, *parameters), first, strict=True):
        close(a, b.detach())
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:2])
    for a, b in zip(grad(steepness, argnums=(0, 1))(x, *parameters), second, strict=True):
        close(a, b)


@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_third_order_is_refused(case, backend):
    function, x, parameters = parts(case, backend)

    def once(f):
        return lambda x: grad(lambda x: f(x).square().sum())(x)

    with pytest.raises(RuntimeError, match=f"^{case.op}: no derivatives beyond {case.op}_backward_backward"):
        once(once(once(lambda x: function(x, *parameters))))(x)


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_jacrev_equals_the_jacobian(case, backend):
    function, x, parameters = parts(case, backend)
    for n in range(3):
        close(jacrev(function)(x[n], *parameters), function(x[n], *parameters, return_jacobian=True)[1])
    whole = jacrev(function)(x[:4], *parameters)
    own = torch.stack([whole[i, :, i] for i in range(4)])
    close(own, function(x[:4], *parameters, return_jacobian=True)[1])
    assert whole.abs().sum() == pytest.approx(own.abs().sum().item())  # no point depends on another


@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_jacrev_of_a_gradient_is_the_hessian(case, backend):
    function, x, parameters = parts(case, backend)

    def energy(x):
        return function(x, *parameters).square().sum()

    for n in range(2):
        close(jacrev(grad(energy))(x[n]), torch.autograd.functional.hessian(energy, x[n]))


@pytest.mark.parametrize(("case", "backend"), SOME[:3])
def test_jacrev_in_the_parameters(case, backend):
    function, x, parameters = parts(case, backend)
    jacobian = jacrev(function, argnums=1)(x[:2], *parameters)
    for i in range(2):
        for k in (0, jacobian.shape[1] - 1):
            row = grad(lambda p, i=i, k=k: function(x[:2], p, *parameters[1:])[i, k])(parameters[0])
            close(jacobian[i, k], row)


# ---- vmap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
@pytest.mark.parametrize(("case", "backend"), SOME)
def test_vmap_over_points(case, backend, in_dim):
    function, x, parameters = parts(case, backend)
    batch = x[:24].reshape(4, 6, -1)
    found = vmap(function, (in_dim, *[None] * len(parameters)))(batch.movedim(0, in_dim), *parameters)
    close(found, function(batch, *parameters))
    nested = vmap(vmap(function, (0, None)), (0, None))(batch, *parameters)
    close(nested, function(batch, *parameters))
    moved = vmap(function, (0, None), out_dims=-1)(batch, *parameters)
    close(moved, function(batch, *parameters).movedim(0, -1))


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_vmap_of_the_jacobian(case, backend):
    function, x, parameters = parts(case, backend)
    batch = x[:24].reshape(4, 6, -1)
    expected = function(batch, *parameters, return_jacobian=True)
    found = vmap(lambda x: function(x, *parameters, return_jacobian=True))(batch)
    for a, b in zip(found, expected, strict=True):
        close(a, b)

    def stretch(x, p):
        return function(x, p, *parameters[1:], return_jacobian=True)[1].square().sum()

    per_sample = vmap(grad(stretch), (0, None))(x, parameters[0])
    close(per_sample, grad(stretch)(x, parameters[0]))


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_gradients_per_sample(case, backend):
    function, x, parameters = parts(case, backend)

    def energy(x, p):
        return function(x, p, *parameters[1:]).square().sum()

    in_x = vmap(grad(energy), (0, None))(x, parameters[0])
    close(in_x, grad(energy)(x, parameters[0]))
    in_parameters = vmap(grad(energy, argnums=1), (0, None))(x[:5], parameters[0])
    assert in_parameters.shape == (5, *parameters[0].shape)
    for n in range(5):
        close(in_parameters[n], grad(energy, argnums=1)(x[n], parameters[0]))
    second = vmap(jacrev(grad(energy)), (0, None))(x[:5], parameters[0])
    close(second[1], torch.autograd.functional.hessian(lambda x: energy(x, parameters[0]), x[1]))


@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_both_gradients_per_sample_at_once(case, backend):
    function, x, parameters = parts(case, backend)

    def energy(x, p):
        return function(x, p, *parameters[1:]).square().sum()

    in_x, in_parameters = vmap(grad(energy, argnums=(0, 1)), (0, None))(x[:3], parameters[0])
    for n in range(3):
        for a, b in zip((in_x[n], in_parameters[n]), grad(energy, argnums=(0, 1))(x[n], parameters[0]), strict=True):
            close(a, b)


@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_batched_parameters_are_refused(case, backend):
    function, x, parameters = parts(case, backend)
    several = torch.stack([parameters[0]] * 2)
    sentence = (
        rf"^{case.op}: torch\.vmap over table is not supported, only over points; loop over the parameters, or use"
    )
    with pytest.raises(RuntimeError, match=sentence):
        vmap(function, (None, 0))(x, several)
    with pytest.raises(RuntimeError, match=sentence):
        vmap(function, (0, 0))(x[:2], several)
    ensemble, x, parameters = parts(case, "reference")
    found = vmap(ensemble, (None, 0))(x, several)  # the remedy it names
    close(found[1], function(x, *parameters))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("batched", ["points", "levels", "both"])
def test_vmap_with_a_level_per_point(batched, backend):
    geometry = camkernels.GridGeometry.build(2, 4, 2, 8, base_resolution=4, per_level_scale=1.5)
    table = torch.randn(geometry.n_entries, 2, dtype=torch.float64)
    x, m = torch.rand(3, 5, 2, dtype=torch.float64), torch.rand(3, 5)

    def function(x, m):
        return camkernels.hash_grid(x, table, geometry, max_level=m, backend=backend)

    if batched == "points":
        close(vmap(function, (0, None))(x, m[0]), function(x, m[0].expand(3, 5)))
    elif batched == "levels":
        close(vmap(function, (None, 0))(x[0], m), function(x[0].expand(3, 5, 2), m))
    else:
        close(vmap(function)(x, m), function(x, m))
        close(vmap(vmap(function))(x, m), function(x, m))
        close(vmap(function, (1, 1), 1)(x, m), function(x, m))


@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_an_empty_batch(case, backend):
    function, x, parameters = parts(case, backend)
    assert vmap(function, (0, None))(x[:4].reshape(4, 1, -1)[:, :0], *parameters).shape[:2] == (4, 0)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_gradients_per_sample_of_a_layer():
    layer = camkernels.HashGrid(dims=2, n_levels=3, log2_hashmap_size=8, init_scale=1.0, dtype=torch.float64)
    x, parameters = torch.rand(5, 2, dtype=torch.float64), dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)["table"]
    for n in range(5):
        close(found[n], torch.autograd.grad(layer(x[n]).square().sum(), layer.table)[0])


# ---- forward mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_forward_mode_raises_and_is_never_zero(case, backend, jacobian):
    function, x, parameters = parts(case, backend)
    extra = {"return_jacobian": True} if jacobian else {}
    with pytest.raises(RuntimeError, match="jvp"):
        jvp(lambda x: function(x, *parameters, **extra), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="jvp"):
        jvp(lambda p: function(x, p, **extra), (parameters[0],), (torch.ones_like(parameters[0]),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        function(forward_ad.make_dual(x, torch.ones_like(x)), *parameters, **extra)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jacfwd(lambda x: function(x, *parameters, **extra))(x)


def test_forward_mode_of_the_reference():
    case = testing.cases("hash_grid")[0]
    function, x, parameters = parts(case, "reference")
    tangent = jvp(lambda x: function(x, *parameters), (x,), (torch.ones_like(x),))[1]
    close(tangent, function(x, *parameters, return_jacobian=True)[1].sum(-1))


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_compiled_vmap_is_one_call(case, backend):
    function, x, parameters = parts(case, backend)
    batch = x[:24].reshape(4, 6, -1)
    counts = []

    def count(graph, inputs):  # below vmap and autograd: what is executed
        counts.append(sum(case.op in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    mapped = vmap(function, (0, None))
    compiled = torch.compile(lambda x, p: mapped(x, p), fullgraph=True, backend=aot_autograd(fw_compiler=count))
    close(compiled(batch, parameters[0]), function(batch, parameters[0]))
    assert counts == [1]
    leaves = [t.clone().requires_grad_() for t in (batch, parameters[0])]
    found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(function(*leaves).square().sum(), leaves), strict=True):
        close(a, b)
    with pytest.raises(Exception, match=r"torch\.vmap over table is not supported"):
        torch.compile(lambda x, p: vmap(function, (None, 0))(x, p), fullgraph=True, backend="aot_eager")(
            x, torch.stack([parameters[0]] * 2)
        )


@pytest.mark.parametrize(("case", "backend"), FIRST)
def test_compiled_torch_func_grad_is_refused_by_pytorch(case, backend):
    function, x, parameters = parts(case, backend)
    gradient = grad(lambda x: function(x, *parameters).square().sum())
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.compile(lambda x: gradient(x), fullgraph=True, backend="aot_eager")(x)
