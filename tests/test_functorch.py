# SPDX-License-Identifier: MIT
"""torch.func: gradients of gradients, vmap over points in every form, and a refusal, never a zero, for the rest."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import camkernels
from camkernels import _backends
from conftest import (
    FIRST,
    LAYERS,
    PAIRED,
    WITH_JACOBIAN,
    along,
    definition_of,
    each,
    function_of,
    make,
    repeated,
    some,
    who_refuses,
)

SOME = each([*some(5), *PAIRED], reference=False)
ONE = each(FIRST, reference=False)
JACOBIANS = each([case for case in some(5) if case in WITH_JACOBIAN], reference=False)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
POINTS = 24


def parts(case, backend):
    """(function of points and parameters, the points {name: [n, ...]}, the parameters {name: tensor}).

    The points are all inputs that have their axes. Options per point are left out.
    """
    call = repeated(make(case, backend, points="safe"), POINTS)
    names = along(call)
    options = {name: o for name, o in call.options.items() if name not in names}
    points = {name: call.inputs[name] for name in names if name in call.inputs}
    parameters = {name: t for name, t in call.inputs.items() if name not in points}
    function = definition_of(case.op) if backend is None else function_of(case.op, backend)

    def of_points(points, parameters, **extra):
        return function(**dataclasses.replace(call, options=options).arguments(points | parameters), **extra)

    return of_points, points, parameters


def energy_of(function):
    return lambda points, parameters: function(points, parameters).square().sum()


def item(points, n):
    """The points at an index or in a slice."""
    return tree_map(lambda t: t[n], points)


def folded(points, *shape):
    return tree_map(lambda t: t.unflatten(0, shape), points)


def ones_like(points):
    return tree_map(torch.ones_like, points)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_grad_and_grad_of_grad_equal_autograd(case, backend):
    function, points, parameters = parts(case, backend)
    energy = energy_of(function)

    def steepness(*tensors):
        return sum(g.square().sum() for g in tree_leaves(grad(energy, argnums=(0, 1))(*tensors)))

    given = points, parameters
    leaves = tree_map(lambda t: t.clone().requires_grad_(), given)
    first = torch.autograd.grad(energy(*leaves), tree_leaves(leaves), create_graph=True)
    close(tree_leaves(grad(energy, argnums=(0, 1))(*given)), [g.detach() for g in first])
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tree_leaves(leaves), materialize_grads=True)
    close(tree_leaves(grad(steepness, argnums=(0, 1))(*given)), list(second))


@pytest.mark.parametrize(("case", "backend"), ONE)
def test_third_order_is_refused(case, backend):
    function, points, parameters = parts(case, backend)

    def once(f):
        return lambda p: sum(g.square().sum() for g in grad(f)(p).values())

    with pytest.raises(RuntimeError, match=rf"^{who_refuses(case.op)}: no derivatives beyond \1_backward_backward"):
        grad(once(once(lambda p: energy_of(function)(p, parameters))))(points)


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_jacrev_of_points_equals_that_of_the_definition(case, backend):
    (function, points, parameters), (definition, *_) = parts(case, backend), parts(case, None)
    for n in (0, POINTS - 1):
        close(jacrev(function)(item(points, n), parameters), jacrev(definition)(item(points, n), parameters))
    few = item(points, slice(4))
    whole = jacrev(function)(few, parameters)
    value = function(few, parameters)
    for name, jacobian in whole.items():
        by_point = jacobian.reshape(4, value[0].numel(), 4, -1)
        expected = jacrev(definition)(few, parameters)[name]
        close(jacobian, expected)
        for i, j in ((i, j) for i in range(4) for j in range(4) if i != j):
            assert not by_point[i, :, j].any()  # no point depends on another


@pytest.mark.parametrize(("case", "backend"), JACOBIANS)
def test_jacrev_equals_the_jacobian(case, backend):
    function, points, parameters = parts(case, backend)

    def jacobian(points):
        return jacrev(function)(points, parameters)["x"]

    for n in range(3):
        close(jacobian(item(points, n)), function(item(points, n), parameters, return_jacobian=True)[1])
    whole = jacobian(item(points, slice(4)))
    own = torch.stack([whole[i, :, i] for i in range(4)])
    close(own, function(item(points, slice(4)), parameters, return_jacobian=True)[1])
    assert whole.abs().sum() == pytest.approx(own.abs().sum().item())


def energy_at(function, points, parameters):
    """(energy as a function of x, h or coords alone, their value)."""
    name, *_ = points
    return lambda t: energy_of(function)(points | {name: t}, parameters), points[name]


def hessian(function, points, parameters):
    energy, at = energy_at(function, points, parameters)
    return jacrev(grad(energy))(at)


@pytest.mark.parametrize(("case", "backend"), ONE)
def test_jacrev_of_a_gradient_is_the_hessian(case, backend):
    function, points, parameters = parts(case, backend)
    for n in range(2):
        expected = torch.autograd.functional.hessian(*energy_at(function, item(points, n), parameters))
        close(hessian(function, item(points, n), parameters), expected)


@pytest.mark.parametrize(("case", "backend"), SOME[:3] + ONE)
def test_jacrev_in_the_parameters(case, backend):
    function, points, parameters = parts(case, backend)
    if not parameters:
        pytest.skip("everything that the op takes belongs to points")
    few = item(points, slice(2))
    jacobians = jacrev(function, argnums=1)(few, parameters)
    value = function(few, parameters)
    for i in range(2):
        for k in (0, value[0].numel() - 1):
            row = grad(lambda p, i=i, k=k: function(few, p)[i].flatten()[k])(parameters)
            for name, jacobian in jacobians.items():
                close(jacobian[i].reshape(-1, *row[name].shape)[k], row[name])


# ---- vmap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
@pytest.mark.parametrize(("case", "backend"), SOME)
def test_vmap_over_points(case, backend, in_dim):
    function, points, parameters = parts(case, backend)
    batch = folded(points, 4, 6)
    expected = function(batch, parameters)
    moved = tree_map(lambda t: t.movedim(0, in_dim), batch)
    close(vmap(function, (in_dim, None))(moved, parameters), expected)
    close(vmap(vmap(function, (0, None)), (0, None))(batch, parameters), expected)
    close(vmap(function, (0, None), out_dims=-1)(batch, parameters), expected.movedim(0, -1))


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_vmap_over_one_of_the_inputs_of_points(case, backend):
    function, points, parameters = parts(case, backend)
    batch, shared = folded(points, 4, 6), item(folded(points, 4, 6), 0)
    for name in points:
        given, dims = shared | {name: batch[name]}, {other: 0 if other == name else None for other in points}
        wide = {other: t if other == name else t.expand(4, *t.shape) for other, t in given.items()}
        close(vmap(function, (dims, None))(given, parameters), function(wide, parameters))
        found = vmap(grad(energy_of(function)), (dims, None))(given, parameters)
        close(found, grad(energy_of(function))(wide, parameters))


@pytest.mark.parametrize(("case", "backend"), JACOBIANS)
def test_vmap_of_the_jacobian(case, backend):
    function, points, parameters = parts(case, backend)
    batch = folded(points, 4, 6)
    expected = function(batch, parameters, return_jacobian=True)
    found = vmap(lambda p: function(p, parameters, return_jacobian=True))(batch)
    for a, b in zip(found, expected, strict=True):
        close(a, b)

    def stretch(points, parameters):
        return function(points, parameters, return_jacobian=True)[1].square().sum()

    close(vmap(grad(stretch), (0, None))(points, parameters), grad(stretch)(points, parameters))


@pytest.mark.parametrize(("case", "backend"), SOME)
def test_gradients_per_sample(case, backend):
    function, points, parameters = parts(case, backend)
    energy, few = energy_of(function), item(points, slice(5))
    close(vmap(grad(energy), (0, None))(points, parameters), grad(energy)(points, parameters))
    in_parameters = vmap(grad(energy, argnums=1), (0, None))(few, parameters)
    for n in range(5):
        close(item(in_parameters, n), grad(energy, argnums=1)(item(few, n), parameters))
    second = vmap(lambda p: hessian(function, p, parameters))(few)
    close(second[1], torch.autograd.functional.hessian(*energy_at(function, item(few, 1), parameters)))


@pytest.mark.parametrize(("case", "backend"), each(FIRST))
def test_both_gradients_per_sample_at_once(case, backend):
    function, points, parameters = parts(case, backend)
    energy, few = energy_of(function), item(points, slice(3))
    found = vmap(grad(energy, argnums=(0, 1)), (0, None))(few, parameters)
    for n in range(3):
        close(item(found, n), grad(energy, argnums=(0, 1))(item(few, n), parameters))


def with_several(case, parameters):
    """(name of a parameter of the case, the parameters with two of that one, where to find the two) or a skip."""
    names = [name for name in parameters if name not in make(case, "reference").beside]
    if not names:
        pytest.skip("everything that the op takes may belong to points")
    name = names[0]
    dims = {other: 0 if other == name else None for other in parameters}
    return name.partition(".")[0], parameters | {name: torch.stack([parameters[name]] * 2)}, dims


@pytest.mark.parametrize(("case", "backend"), ONE)
def test_batched_parameters_are_refused(case, backend):
    function, points, parameters = parts(case, backend)
    name, several, dims = with_several(case, parameters)
    refused = rf"^{who_refuses(case.op)}: torch\.vmap over {name} is not supported"
    sentence = f"{refused}, only over points; loop over the parameters, or use"
    with pytest.raises(RuntimeError, match=sentence):
        vmap(function, (None, dims))(points, several)
    with pytest.raises(RuntimeError, match=sentence):
        vmap(function, (0, dims))(item(points, slice(2)), several)
    ensemble, points, parameters = parts(case, "reference")
    found = vmap(ensemble, (None, dims))(points, several)  # the remedy it names
    close(found[1], function(points, parameters))


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


@pytest.mark.parametrize(("case", "backend"), ONE)
def test_an_empty_batch(case, backend):
    function, points, parameters = parts(case, backend)
    none = tree_map(lambda t: t[:4].unsqueeze(1)[:, :0], points)
    assert vmap(function, (0, None))(none, parameters).shape[:2] == (4, 0)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_functional_calls_and_gradients_per_sample_of_a_layer(layer):
    module, x = layer.build(dtype=torch.float64), layer.inputs(5, dtype=torch.float64)
    parameters = {name: p.detach() + 0.1 for name, p in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    found, in_x = (vmap(grad(loss, argnums=k), (None, 0))(parameters, x) for k in (0, 1))
    other = layer.build(dtype=torch.float64)
    other.load_state_dict(parameters)
    for n in range(5):
        point = x[n].clone().requires_grad_()
        *wanted, wanted_in_x = torch.autograd.grad(other(point).square().sum(), [*other.parameters(), point])
        close([found[name][n] for name in parameters], wanted)
        close(in_x[n], wanted_in_x)


def test_a_field_mapped_over_points():
    """Modulation and x batched together, the modulation itself computed under vmap."""
    grids = camkernels.CoordinateModulation(2, (4, 5), dtype=torch.float64)
    torch.nn.init.uniform_(grids.grids)
    mlp = camkernels.ModulatedMLP(2, 3, width=8, norm="point", activation="tanh", dtype=torch.float64)
    x = torch.rand(7, 2, dtype=torch.float64)

    def field(x):
        return mlp(x, grids(x))

    close(vmap(field)(x), field(x))
    whole = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(field(whole).square().sum(), whole)
    close(vmap(grad(lambda p: field(p).square().sum()))(x), expected)


# ---- forward mode ----------------------------------------------------------------------------------------------------


def refuses_forward_mode(function, points, parameters):
    for k, given in enumerate((points, parameters)):
        if given:

            def of_one(p, k=k):
                return function(*((p, parameters), (points, p))[k])

            with pytest.raises(RuntimeError, match="jvp"):
                jvp(of_one, (given,), (ones_like(given),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        function(tree_map(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), points), parameters)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jacfwd(lambda p: function(p, parameters))(points)


@pytest.mark.parametrize(("case", "backend"), ONE)
def test_forward_mode_raises_and_is_never_zero(case, backend):
    refuses_forward_mode(*parts(case, backend))


@pytest.mark.parametrize(("case", "backend"), ONE)
def test_forward_mode_of_a_derivative_raises_though_no_graph_is_wanted(case, backend):
    function, points, parameters = parts(case, backend)
    inputs = [t.detach().requires_grad_() for t in tree_leaves((points, parameters))]
    y = function(*tree_unflatten(inputs, tree_flatten((points, parameters))[1]))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        torch.autograd.grad(y, inputs, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)), allow_unused=True)


@pytest.mark.parametrize(("case", "backend"), each(WITH_JACOBIAN[:1], reference=False))
def test_forward_mode_of_the_jacobian_raises(case, backend):
    function, points, parameters = parts(case, backend)
    refuses_forward_mode(partial(function, return_jacobian=True), points, parameters)


@pytest.mark.parametrize("case", WITH_JACOBIAN[:1], ids=str)
def test_forward_mode_of_the_reference(case):
    function, points, parameters = parts(case, "reference")
    tangent = jvp(lambda p: function(p, parameters), (points,), (ones_like(points),))[1]
    close(tangent, function(points, parameters, return_jacobian=True)[1].sum(-1))


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()  # the code of every op is the same to it, which it compiles a few times only


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("case", "backend"), ONE)
def test_compiled_vmap_is_one_call(case, backend):
    function, points, parameters = parts(case, backend)
    batch = folded(points, 4, 6)
    operators, counts = _backends.PAIRS.get(case.op, (case.op,)), []

    def count(graph, inputs):  # below vmap and autograd: what is executed
        targets = [str(node.target) for node in graph.graph.nodes]
        counts.append([sum(f"camkernels.{op}." in target for target in targets) for op in operators])
        return make_boxed_func(graph.forward)

    mapped = vmap(function, (0, None))
    compiled = torch.compile(lambda p, q: mapped(p, q), fullgraph=True, backend=aot_autograd(fw_compiler=count))
    close(compiled(batch, parameters), function(batch, parameters))
    assert counts == [[1] * len(operators)]
    given = tree_map(lambda t: t.clone().requires_grad_(), (batch, parameters))
    found, expected = (torch.autograd.grad(f(*given).square().sum(), tree_leaves(given)) for f in (compiled, function))
    close(list(found), list(expected))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("case", "backend"), ONE)
def test_compiled_vmap_over_parameters_is_refused(case, backend):
    function, points, parameters = parts(case, backend)
    name, several, dims = with_several(case, parameters)
    with pytest.raises(Exception, match=rf"torch\.vmap over {name} is not supported"):
        torch.compile(lambda p, q: vmap(function, (None, dims))(p, q), fullgraph=True, backend="aot_eager")(
            points, several
        )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("case", "backend"), ONE)
def test_compiled_torch_func_grad_is_refused_by_pytorch(case, backend):
    function, points, parameters = parts(case, backend)
    gradient = grad(lambda p: energy_of(function)(p, parameters))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.compile(lambda p: gradient(p), fullgraph=True, backend="aot_eager")(points)
