# SPDX-License-Identifier: MIT
"""The operators are what PyTorch's dispatcher expects: opcheck, exact fakes, stable schemas, any size on meta."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import camkernels
from camkernels import _ops, testing
from conftest import DTYPES, OPS, backends, function_of, make, require

GRID = (
    "float[] scales, float shift, int[] layout, bool ceil_corner, int outside, int interpolation, int active_levels, "
    "bool deterministic"
)
MLP = (
    "Tensor x, Tensor[] weights, Tensor[] biases, Tensor? modulation, Tensor? frequencies, "
    "{}int[] activations, float[] omegas, bool[] skips, bool output_layer, bool point_norm, float eps, bool tf32, "
    "bool bfloat16, bool keep, bool deterministic"
)
LOOKUP = "Tensor coords, Tensor grids, bool zeros, bool align_corners, bool planes, bool deterministic"
GROUPS = (
    "Tensor h, Tensor gamma, Tensor beta, Tensor? frequencies, "
    "int activation, float omega, bool norm, float eps, bool frequency_per_group"
)
BASIS = (
    "Tensor x, Tensor centers, Tensor shapes, Tensor features, Tensor? phase, Tensor? neighbors, Tensor? frequencies, "
    "int kind, int shape, bool normalize, bool detach_normalizer, float eps, int keep, "
    "bool deterministic"
)
SCHEMAS = {
    "hash_grid": f"(Tensor x, Tensor table, Tensor? level_counts, {GRID}) -> Tensor",
    "hash_grid_backward": f"(Tensor grad_y, Tensor x, Tensor table, Tensor? level_counts, {GRID}, bool[] mask)"
    " -> (Tensor, Tensor)",
    "hash_grid_backward_backward": "(Tensor? grad_x, Tensor? grad_table, Tensor grad_y, Tensor x, Tensor table, "
    f"Tensor? level_counts, {GRID}, bool[] mask) -> (Tensor, Tensor, Tensor)",
    "hash_grid_jacobian": f"(Tensor x, Tensor table, Tensor? level_counts, {GRID}) -> (Tensor, Tensor)",
    "hash_grid_jacobian_backward": "(Tensor? grad_y, Tensor? grad_jacobian, Tensor x, Tensor table, "
    f"Tensor? level_counts, {GRID}, bool[] mask) -> (Tensor, Tensor)",
    "modulated_mlp": f"({MLP.format('')}) -> (Tensor, Tensor)",
    "modulated_mlp_backward": f"(Tensor grad_y, {MLP.format('Tensor hidden, ')}, bool[] mask)"
    " -> (Tensor, Tensor[], Tensor[], Tensor)",
    "modulated_mlp_backward_backward": "(Tensor? grad_x, Tensor[] grad_weights, Tensor[] grad_biases, "
    f"Tensor? grad_modulation, Tensor grad_y, {MLP.format('Tensor hidden, ')}, bool[] mask)"
    " -> (Tensor, Tensor, Tensor[], Tensor[], Tensor)",
    "coordinate_modulation": f"({LOOKUP}) -> Tensor",
    "coordinate_modulation_backward": f"(Tensor grad_y, {LOOKUP}, bool[] mask) -> (Tensor, Tensor)",
    "coordinate_modulation_backward_backward": "(Tensor? grad_coords, Tensor? grad_grids, Tensor grad_y, "
    f"{LOOKUP}, bool[] mask) -> (Tensor, Tensor, Tensor)",
    "modulate": f"({GROUPS}) -> Tensor",
    "modulate_backward": f"(Tensor grad_y, {GROUPS}, bool[] mask) -> (Tensor, Tensor, Tensor)",
    "modulate_backward_backward": "(Tensor? grad_h, Tensor? grad_gamma, Tensor? grad_beta, Tensor grad_y, "
    f"{GROUPS}, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)",
    "radial_basis": f"({BASIS}) -> Tensor",
    "radial_basis_backward": f"(Tensor grad_y, {BASIS}, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "radial_basis_backward_backward": "(Tensor? grad_x, Tensor? grad_centers, Tensor? grad_shapes, "
    f"Tensor? grad_features, Tensor? grad_phase, Tensor grad_y, {BASIS}, bool[] mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


CONSTANT = ("level_counts", "neighbors", "frequencies", "hidden")  # what has no gradient


class Recorder(TorchDispatchMode):
    """Notes every call of an operator of this package: {operator: [arguments]}."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == _ops.NAMESPACE:
            self.calls.setdefault(func, []).append([detached(a) for a in args])
        return func(*args, **(kwargs or {}))


def detached(value):
    if isinstance(value, (list, tuple)):
        return [detached(v) for v in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def recorded(case, dtype):
    """Calls of every operator of an op: value, first and second order, Jacobian and its gradient."""
    call = make(case, "cpu", dtype, points="safe")
    function = function_of(case.op, "cpu")
    with Recorder() as recorder:
        testing.evaluate(function, call, order=2)
        if testing.has_jacobian(case.op):
            inputs = require(call, "both")
            value, jacobian = function(**call.arguments(inputs), return_jacobian=True)
            torch.autograd.grad(value.double().sum() + jacobian.sum(), list(inputs.values()))
    return recorder.calls


def samples():
    """One case for every dtype, of different options, and one more in float64."""
    chosen = [
        (testing.cases(op)[place % len(testing.cases(op))], dtype)
        for op in OPS
        if "cpu" in backends(op)
        for place, dtype in ((0, DTYPES[0]), *((1 + i * 13, dtype) for i, dtype in enumerate(DTYPES)))
    ]
    return [pytest.param(case, dtype, id=f"{case.op}-{case}-{dtype}") for case, dtype in chosen]


def last(operator):
    return not any(name == f"{operator._schema.name}_backward" for name in registered())


def masked(operator):
    return operator._schema.arguments[-1].name == "mask"


def registered():
    return [str(s.name) for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{_ops.NAMESPACE}::")]


def belongs(name, op):
    """Whether an operator of this name is one of an op's."""
    return name == op or name.startswith(f"{op}_")


def on_tensors(function, value):
    """The function of a tensor, or of each tensor of a list; anything else as it is."""
    if isinstance(value, list):
        return [on_tensors(function, v) for v in value]
    return function(value) if isinstance(value, torch.Tensor) else value


def results_of(operator, arguments):
    """What an operator returns, one item for each of its outputs: a tensor or a list of tensors."""
    results = operator(*arguments)
    return list(results) if isinstance(results, tuple) else [results]


def differentiable(operator, arguments):
    """Places of the arguments that may require a gradient: frequencies and what is kept may not."""
    named = zip(operator._schema.arguments, arguments, strict=True)
    tensors = [
        isinstance(a, torch.Tensor) or (isinstance(a, list) and a and isinstance(a[0], torch.Tensor)) for a in arguments
    ]
    return [
        i for i, ((s, _), is_some) in enumerate(zip(named, tensors, strict=True)) if is_some and s.name not in CONSTANT
    ]


@pytest.mark.parametrize(("case", "dtype"), samples())
def test_opcheck(case, dtype):
    calls = recorded(case, dtype)
    assert len(calls) == len([name for name in SCHEMAS if belongs(name, case.op)])
    for operator, (arguments, *_) in calls.items():
        places = differentiable(operator, arguments)
        every = [(), places[-2:-1], places[-1:], places] if dtype == torch.float64 else [places]
        for wanted in [()] if last(operator) else every:
            inputs = [on_tensors(requiring, a) if i in wanted else a for i, a in enumerate(arguments)]
            torch.library.opcheck(operator, inputs)


def requiring(tensor):
    return tensor.clone().requires_grad_()


def wishes(operator, arguments):
    """The arguments under every mask that the operator could be given: nothing is wished of what is not there."""
    if not masked(operator):
        return [arguments]
    masks = itertools.product(*((True, False) if there else (False,) for there in arguments[-1]))
    return [[*arguments[:-1], list(mask)] for mask in masks if any(mask)]


def fullest(calls):
    """The call of an operator that asks for the most gradients."""
    return max(calls, key=lambda arguments: sum(arguments[-1]) if isinstance(arguments[-1], list) else 0)


@pytest.mark.parametrize(("case", "dtype"), samples())
def test_every_gradient_of_what_is_there_is_asked_for(case, dtype):
    """So that what is checked below is all there is to check."""
    wanted = {name.partition(".")[0] for name in make(case, "cpu", dtype).inputs}
    for operator, calls in recorded(case, dtype).items():
        if masked(operator):
            twice = operator._schema.name.endswith("_backward_backward")  # with the cotangent of the value
            assert sum(fullest(calls)[-1]) == len(wanted) + twice


@pytest.mark.parametrize(("case", "dtype"), samples())
def test_fakes_are_exact(case, dtype):
    for operator, calls in recorded(case, dtype).items():
        for arguments in wishes(operator, fullest(calls)):
            real = results_of(operator, arguments)
            with FakeTensorMode() as mode:
                fake = results_of(operator, [on_tensors(mode.from_tensor, a) for a in arguments])
            assert len(real) == len(fake)
            for a, b in zip(real, fake, strict=True):
                assert on_tensors(form, a) == on_tensors(form, b)


def form(tensor):
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


@pytest.mark.parametrize(("case", "dtype"), samples())
def test_unwanted_gradients_are_empty_and_change_nothing(case, dtype):
    for operator, calls in recorded(case, dtype).items():
        if not masked(operator):
            continue
        most = fullest(calls)
        full = results_of(operator, most)
        for arguments in wishes(operator, most):
            for wish, some, every in zip(arguments[-1], results_of(operator, arguments), full, strict=True):
                if wish:
                    torch.testing.assert_close(some, every, rtol=0, atol=0)
                else:
                    assert some == [] if isinstance(every, list) else some.shape == (0,)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_stay(name):  # exported programs hold them
    assert str(getattr(_ops.operators, name).default._schema) == f"{_ops.NAMESPACE}::{name}{SCHEMAS[name]}"


def test_every_operator_is_listed():
    ours = {name.removeprefix(f"{_ops.NAMESPACE}::") for name in registered()}
    public = {name for name in ours if any(belongs(name, op) for op in OPS)}
    assert public == set(SCHEMAS)


def test_only_the_optimizer_writes_to_its_arguments():
    names = [name.split("::")[1] for name in registered()]
    writing = [name for name in names if getattr(_ops.operators, name).default._schema.is_mutable]
    assert writing == ["sparse_row_adam"]


@pytest.mark.parametrize("argument", [0, 1])
def test_an_operator_itself_refuses_strided_tensors(argument):
    if "cpu" not in backends("hash_grid"):
        pytest.skip("there are no CPU kernels that could read a tensor")
    calls = recorded(testing.cases("hash_grid")[0], torch.float32)
    arguments = calls[_ops.operators.hash_grid.default][0]
    strided = arguments[argument].t().contiguous().t()
    assert not strided.is_contiguous()
    arguments[argument] = strided
    with pytest.raises(RuntimeError, match=rf"hash_grid: {('x', 'table')[argument]} must be contiguous"):
        _ops.operators.hash_grid(*arguments)


def damaged_settings():
    """What no geometry gives, each beside the settings of a grid of 2 axes."""
    geometry = camkernels.GridGeometry.build(2, 4, 2, 8, finest_resolution=64)
    scales, shift, layout, ceil_corner, outside, interpolation, levels, deterministic = settings_of(geometry)
    rest = (ceil_corner, outside, interpolation, levels, deterministic)
    far, empty_level = [*layout], [*layout]
    far[8], empty_level[2] = 1 << 40, 0  # an offset, a size
    yield "no scales", ([], shift, layout, *rest)
    yield "an odd layout", (scales, shift, [*layout, 1], *rest)
    yield "no levels", ([], shift, [], *rest)
    yield "an offset beyond the table", (scales, shift, far, *rest)
    yield "a level of no size", (scales, shift, empty_level, *rest)
    yield "unknown outside", (scales, shift, layout, ceil_corner, 9, *rest[2:])
    yield "unknown interpolation", (scales, shift, layout, ceil_corner, outside, 7, *rest[3:])


def settings_of(geometry):
    return camkernels.hash_grid.__globals__["_settings"](geometry, "linear", geometry.n_levels)


@pytest.mark.parametrize("name", dict(damaged_settings()))
def test_an_operator_itself_refuses_settings_that_describe_no_grid(name):
    if "cpu" not in backends("hash_grid"):
        pytest.skip("there are no CPU kernels that could read a table")
    geometry = camkernels.GridGeometry.build(2, 4, 2, 8, finest_resolution=64)
    with pytest.raises(RuntimeError, match="hash_grid: the settings describe no grid of 2 axes"):
        _ops.operators.hash_grid(
            torch.rand(5, 2), torch.rand(geometry.n_entries, 2), None, *dict(damaged_settings())[name]
        )


def test_an_operator_itself_refuses_axes_and_masks_that_do_not_fit():
    if "cpu" not in backends("hash_grid"):
        pytest.skip("there are no CPU kernels that could read a table")
    geometry = camkernels.GridGeometry.build(2, 4, 2, 8, finest_resolution=64)
    x, table, settings = torch.rand(5, 2), torch.rand(geometry.n_entries, 2), settings_of(geometry)
    with pytest.raises(RuntimeError, match="hash_grid: the settings describe no grid of 40 axes"):
        _ops.operators.hash_grid(torch.rand(5, 40), table, None, *settings)
    y = _ops.operators.hash_grid(x, table, None, *settings)
    for mask in ([], [True], [True] * 3):
        with pytest.raises(RuntimeError, match="hash_grid: mask must have one entry for each gradient"):
            _ops.operators.hash_grid_backward(y, x, table, None, *settings, mask)
        with pytest.raises(RuntimeError, match="hash_grid: mask must have one entry for each gradient"):
            _ops.operators.hash_grid_backward_backward(x, None, y, x, table, None, *settings, mask[:2])


# ---- tensors without memory ------------------------------------------------------------------------------------------


def huge():
    """(x, table, geometry) on the meta device: 2^28 points, 2^35 numbers of output."""
    geometry = camkernels.GridGeometry.build(3, 16, 8, 19)
    return torch.empty(1 << 28, 3, device="meta"), torch.empty(geometry.n_entries, 8, device="meta"), geometry


def test_meta_tensors_of_any_size():
    x, table, geometry = huge()
    x.requires_grad_(), table.requires_grad_()
    y = camkernels.hash_grid(x, table, geometry)
    assert y.device.type == "meta" and y.shape == (1 << 28, 128) and y.numel() > 1 << 31
    gradients = torch.autograd.grad(y.sum(), (x, table))
    assert [g.shape for g in gradients] == [x.shape, table.shape]
    _, jacobian = camkernels.hash_grid(x, table, geometry, return_jacobian=True)
    assert jacobian.shape == (1 << 28, 128, 3)


def test_meta_tensors_through_the_operators():
    x, table, geometry = huge()
    settings = settings_of(geometry)
    y = _ops.operators.hash_grid(x, table, None, *settings)
    assert y.shape == (1 << 28, 128) and y.stride() == (128, 1)
    gx, gtable = _ops.operators.hash_grid_backward(y, x, table, None, *settings, [True, True])
    assert gx.shape == x.shape and gtable.shape == table.shape
    jacobian = _ops.operators.hash_grid_jacobian(x, table, None, *settings)[1]
    assert jacobian.numel() == 3 << 35 and jacobian.stride() == (384, 3, 1)


def test_fake_tensors_of_any_size():
    with FakeTensorMode():
        layer = camkernels.HashGrid(dims=3, n_features_per_level=8)
        x = torch.rand(1 << 28, 3, requires_grad=True)
        y = layer(x)
        assert y.shape == (1 << 28, 128) and y.device.type == "cpu" and y.dtype == torch.float32
        (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        gx.sum().backward()
        assert layer.table.grad.shape == layer.table.shape and x.grad.shape == x.shape


def test_a_layer_on_meta_becomes_real():
    layer = camkernels.HashGrid(dims=2, n_levels=2, log2_hashmap_size=8, device="meta")
    assert layer.table.is_meta and layer(torch.empty(5, 2, device="meta")).shape == (5, 4)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.rand(5, 2)).isfinite().all()


def test_the_operators_of_the_mlp_refuse_masks_and_lists_that_do_not_fit():
    if "cpu" not in backends("modulated_mlp"):
        pytest.skip("there are no CPU kernels that could read a weight")
    x, w, y = torch.rand(5, 3), torch.rand(2, 3), torch.rand(5, 2)
    settings = ([1], [1.0], [False], False, False, 1e-5, False, False, False, False)
    first = (y, x, [w], [], None, None, torch.empty(0))
    for mask in ([], [True] * 3, [True] * 5):
        with pytest.raises(RuntimeError, match="modulated_mlp: mask must have one entry for each gradient"):
            _ops.operators.modulated_mlp_backward(*first, *settings, mask)
        with pytest.raises(RuntimeError, match="modulated_mlp: mask must have one entry for each gradient"):
            _ops.operators.modulated_mlp_backward_backward(x, [], [], None, *first, *settings, [*mask, *mask])
    for lists in (([w, w], []), ([], [w[:, 0]])):
        with pytest.raises(RuntimeError, match=r"modulated_mlp: grad_(weights|biases) of another number of layers"):
            _ops.operators.modulated_mlp_backward_backward(x, *lists, None, *first, *settings, [True] * 5)


def test_kept_values_of_another_dtype_are_not_read():
    if "cpu" not in backends("modulated_mlp"):
        pytest.skip("there are no CPU kernels that keep values")
    x, weights, g = torch.rand(5, 3), [torch.rand(2, 3), torch.rand(2, 2)], torch.rand(5, 2)
    settings = ([2, 2], [1.0, 1.0], [False, False], False, False, 1e-5, False, False, True, False)
    _, kept = _ops.operators.modulated_mlp(x, weights, [], None, None, *settings)
    assert kept.numel() > 0
    wanted = [True, True, False, False]
    results = [
        _ops.operators.modulated_mlp_backward(g, x, weights, [], None, None, hidden, *settings, wanted)
        for hidden in (kept, torch.full_like(kept, torch.nan, dtype=torch.float64))
    ]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1][0], results[1][1][0])
