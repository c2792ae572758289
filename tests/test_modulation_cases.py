# SPDX-License-Identifier: MIT
"""The inputs of the modulated MLP family cover every pair of options, and what judges them catches what is wrong."""

import itertools

import pytest
import torch

from camkernels import testing
from camkernels._cases import modulated_mlp as cases
from camkernels.reference import coordinate_modulation, modulate, modulated_mlp

FACTORS = {
    "modulated_mlp": cases.MLP_FACTORS,
    "modulate": cases.MODULATE_FACTORS,
    "coordinate_modulation": cases.LOOKUP_FACTORS,
}
ABSENT = {
    *(("dims", dims, "combine", "plane_product") for dims in (1, 2, 4)),
    *(("activation", name, "output", "hidden") for name in ("residual_sine", "mixed")),
}  # pairs
ALL = [case for op in FACTORS for case in testing.cases(op)]
DEFINITIONS = {f.__name__: f for f in (modulated_mlp, modulate, coordinate_modulation)}


@pytest.mark.parametrize("op", FACTORS)
def test_every_pair_of_options_is_covered(op):
    factors = FACTORS[op]
    pairs = {frozenset(pair) for c in testing.cases(op) for pair in itertools.combinations(c.options.items(), 2)}
    for a, b in itertools.combinations(factors, 2):
        for u, v in itertools.product(factors[a], factors[b]):
            absent = (a, u, b, v) in ABSENT
            assert (frozenset([(a, u), (b, v)]) in pairs) != absent, f"{a}={u}, {b}={v}"


@pytest.mark.parametrize("op", FACTORS)
def test_names_are_unique_and_select(op):
    assert len({case.name for case in testing.cases(op)}) == len(testing.cases(op)) < 70
    factor, values = next(iter(FACTORS[op].items()))
    assert testing.cases(op, **{factor: values[0]})


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.op}-{case}")
def test_a_case_is_reproducible_small_and_typed(case):
    for points in ("mixed", "safe"):
        call, again = (case.make(torch.float16, points=points) for _ in range(2))
        for name, tensor in call.inputs.items():
            torch.testing.assert_close(tensor, again.inputs[name], rtol=0, atol=0, equal_nan=True)
            wide = name == call.points and case.op != "modulate"
            assert tensor.dtype == (torch.float32 if wide else torch.float16) and tensor.numel() < 3000
        assert call.run(DEFINITIONS[case.op]).dtype == torch.float16
    assert all(t.dtype == torch.float64 for t in case.make(torch.float64).inputs.values())


@pytest.mark.parametrize("points", ["mixed", "safe"])
@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
def test_no_value_lies_on_a_kink(dtype, points):
    seen = 0
    for case in testing.cases("modulated_mlp"):
        call = case.make(dtype, points=points)
        for values in cases.values_before_kinks(call.inputs, call.options):
            assert ((values.abs() >= cases.CLEARANCE) | (values == 0)).all()
            seen += values.numel()
    assert seen > 200


def test_inputs_on_a_kink_are_drawn_anew():
    drawn = []

    def make(seed):
        drawn.append(seed)
        return {"x": torch.full((3,), 1e-9 if len(drawn) < 3 else 1.0)}, {}

    inputs, _ = cases._clear(make, lambda inputs, rest: [inputs["x"]], seed=5)
    assert drawn == [5, 1005, 2005] and inputs["x"][0] == 1
    with pytest.raises(RuntimeError, match="no inputs clear of the kinks"):
        cases._clear(lambda seed: ({"x": torch.full((3,), 1e-9)}, {}), lambda inputs, rest: [inputs["x"]], seed=0)


@pytest.mark.parametrize("case", testing.cases("coordinate_modulation"), ids=str)
def test_coordinates_that_are_safe_and_those_that_are_not(case):
    safe = case.make(torch.float64, points="safe")
    distance = cases.node_distance(safe.inputs["coords"], safe.inputs["grids"], safe.options)
    assert distance.min() > cases.FACE_CLEARANCE and len(distance) >= 6
    mixed = case.make()
    coords = mixed.inputs["coords"]
    assert coords.isnan().any() and coords.isinf().any() and (coords.abs() == 1).any()
    near, _ = cases.near_faces(mixed.inputs, mixed.options)
    assert 3 <= near.sum() < len(near)


# ---- tolerances ------------------------------------------------------------------------------------------------------


def order(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def reordered(x, weights, biases=None, modulation=None, **options):
    """modulated_mlp with the features of every layer in another order: every sum has another order."""
    first = columns = order(x.shape[-1], 0)
    hidden = len(weights) - options["output_layer"]
    if modulation is not None and modulation.ndim == x.ndim + 2:
        modulation = modulation[..., order(modulation.shape[-1], 1)]
    if "frequencies" in options:
        options["frequencies"] = options["frequencies"][order(len(options["frequencies"]), 1)]
    layers = []
    for i, weight in enumerate(weights):
        out = len(weight)
        rows = order(out, 1) if i < hidden else torch.arange(out)
        layers.append((weight[rows][:, columns], None if biases is None else biases[i][rows]))
        columns = torch.cat([rows, out + first]) if i in options["skips"] else rows
    changed, moved = ([layer[k] for layer in layers] for k in (0, 1))
    y = modulated_mlp(x[..., first], changed, None if biases is None else moved, modulation, **options)
    return y if options["output_layer"] else y[..., columns.argsort()]


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
@pytest.mark.parametrize("case", testing.cases("modulated_mlp"), ids=str)
def test_another_order_of_summation_is_within_the_tolerance(case, dtype):
    testing.check(case, reordered, modulated_mlp, dtype=dtype, order=2)


# ---- wrong implementations are caught --------------------------------------------------------------------------------


def without_norm(x, *rest, norm=None, **options):
    return modulated_mlp(x, *rest, **options)


def with_nothing_skipped(x, weights, *rest, skips=(), **options):
    weights = [torch.cat([w[:, : weights[0].shape[0]], 0 * w[:, weights[0].shape[0] :]], 1) for w in weights[1:]]
    return modulated_mlp(x, weights, *rest, skips=skips, **options)


def rounding_hidden_values(x, weights, biases=None, modulation=None, **options):
    return modulated_mlp(x.bfloat16(), weights, biases, modulation, **options)


def freezing_weights(x, weights, *rest, **options):
    return modulated_mlp(x, [w.detach() for w in weights], *rest, **options) + 0 * sum(w.sum() for w in weights)


def with_modulation_swapped(x, weights, biases=None, modulation=None, **options):
    return modulated_mlp(x, weights, biases, modulation.flip(x.ndim), **options)


def frozen_second_order(x, weights, biases=None, modulation=None, **options):
    constants = [w.detach() for w in weights], [b.detach() for b in biases], modulation.detach()
    frozen = modulated_mlp(x, *constants, **options)  # the mixed terms of x and the parameters are missing
    return frozen + modulated_mlp(x.detach(), weights, biases, modulation, **options) - frozen.detach()


@pytest.mark.parametrize(
    ("function", "options", "sentence"),
    [
        (without_norm, {"norm": "point"}, "value"),
        (rounding_hidden_values, {"norm": None}, "value"),
        (with_modulation_swapped, {"modulation": "channel"}, "value"),
        (freezing_weights, {"activation": "tanh"}, r"grad\.weights\.0"),
        (frozen_second_order, {"activation": "tanh", "bias": True, "modulation": "channel"}, r"second\."),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_wrong_mlp_is_caught(function, options, sentence):
    case = next(c for c in testing.cases("modulated_mlp", **options) if c.options["hidden"] == 2)
    with pytest.raises(AssertionError, match=f"modulated_mlp .* torch.float32 {sentence}.* items differ"):
        testing.check(case, function, modulated_mlp, order=2)


def with_unbiased_variance(h, gamma, beta, norm=None, **options):
    axes = {"point": (-1,), "ray": (-2, -1), "frame": (-2, -1)}[norm]
    n = (h - h.mean(axes, keepdim=True)) / (h.var(axes, keepdim=True) + options["eps"]).sqrt()
    return modulate(n, gamma, beta, norm=None, **options)


@pytest.mark.parametrize("norm", ["point", "ray"])
def test_a_wrong_norm_is_caught(norm):
    case = testing.cases("modulate", norm=norm)[0]
    with pytest.raises(AssertionError, match=r"modulate .* value: .* items differ"):
        testing.check(case, with_unbiased_variance, modulate)


def with_axes_swapped(coords, grids, **options):
    return coordinate_modulation(coords.flip(-1), grids, **options)


def with_other_padding(coords, grids, padding, **options):
    return coordinate_modulation(coords, grids, padding="zeros" if padding == "border" else "border", **options)


def with_flatter_coords(coords, grids, **options):
    coords = coords.clone()
    coords.register_hook(lambda gradient: 0.99 * gradient)
    return coordinate_modulation(coords, grids, **options)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [(with_axes_swapped, "value"), (with_other_padding, "value"), (with_flatter_coords, r"grad\.coords")],
)
def test_a_wrong_lookup_is_caught(function, sentence):
    case = testing.cases("coordinate_modulation", dims=3, nodes="uneven")[0]
    with pytest.raises(AssertionError, match=rf"coordinate_modulation .* {sentence}: .* items differ"):
        testing.check(case, function, coordinate_modulation)


# ---- nodes, where the derivative jumps -------------------------------------------------------------------------------

ON_NODES = testing.cases("coordinate_modulation", dims=2)[0]


def seeing_the_left(points):
    """A lookup that sees the given points a little to the left."""

    def function(coords, grids, **options):
        left = torch.zeros_like(coords)
        left[points] = -2 * torch.finfo(coords.dtype).eps
        return coordinate_modulation(coords + left, grids, **options)

    return function


def inner_nodes(call):
    """Points on a node between others."""
    coords = call.inputs["coords"].reshape(-1, 2)
    near, _ = cases.near_faces(call.inputs, call.options)
    return (near & (coords.abs() < 0.9).all(-1)).nonzero().squeeze(-1)


def of_one_shape(call):
    inputs = call.inputs | {"coords": call.inputs["coords"].reshape(-1, 2)}
    return testing.Call(inputs, call.options, call.points)


def test_a_point_on_a_node_may_show_either_side_and_nothing_else():
    call = of_one_shape(ON_NODES.make())
    point = inner_nodes(call)[:1]
    expected = testing.evaluate(coordinate_modulation, call)
    actual = testing.evaluate(seeing_the_left(point), call)
    assert not torch.allclose(actual["grad.coords"][point], expected["grad.coords"][point], rtol=1e-3)
    testing.compare(ON_NODES, call, actual, expected)
    actual["grad.coords"][point] += 0.1 * expected["grad.coords"].nan_to_num(0.0).abs().max()
    with pytest.raises(AssertionError, match=r"grad\.coords \(neither side of a cell face\)"):
        testing.compare(ON_NODES, call, actual, expected)


def test_a_point_away_from_nodes_may_not():
    call = of_one_shape(ON_NODES.make())
    expected = testing.evaluate(coordinate_modulation, call)
    actual = dict(expected)
    actual["grad.coords"] = expected["grad.coords"].clone()
    actual["grad.coords"][0] *= 1.01
    assert not cases.near_faces(call.inputs, call.options)[0][0]
    with pytest.raises(AssertionError, match=r"grad\.coords: .* items differ"):
        testing.compare(ON_NODES, call, actual, expected)
