# SPDX-License-Identifier: MIT
"""Layers and functions behave as PyTorch's own: autocast, determinism, copies, sizes, gradient modes."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch

import camkernels
from camkernels import testing
from conftest import LAYERS, PAIRED, WITH_JACOBIAN, backends, definition_of, function_of, repeated, some

SIZES = (1, 15, 16, 17, 255, 256, 257)
SHAPES = ((2, 1), (2, 8), (3, 2), (3, 4), (4, 2), (1, 2), (5, 3))  # (dims, features): specialised kernels and others
GRID_BACKENDS = backends("hash_grid")


def grid(dims=3, features=2, **options):
    return camkernels.GridGeometry.build(dims, 3, features, 8, base_resolution=4, per_level_scale=1.5, **options)


def arguments(n, geometry, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, geometry.dims, generator=generator)
    table = torch.rand(geometry.n_entries, geometry.n_features_per_level, generator=generator) * 2 - 1
    return x.double() if dtype == torch.float64 else x, table.to(dtype)


def gradients(function, x, table, ct=None):
    leaves = x.detach().requires_grad_(), table.detach().requires_grad_()
    y = function(*leaves)
    return torch.autograd.grad(y, leaves, torch.ones_like(y) if ct is None else ct)


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_autocast_rounds_the_output_and_nothing_else(layer, dtype, inside):
    if inside and layer.name == "ModulatedMLP" and backends(layer.op) == ["reference"]:
        pytest.skip("the products in PyTorch's own backward follow autocast where that runs inside it")
    module, x = layer.build(), layer.inputs(20).requires_grad_()
    expected = module(x)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
        assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    with torch.autocast("cpu", dtype=dtype, enabled=inside):
        y.square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters()) and x.grad.dtype == torch.float32
    wanted = torch.autograd.grad(expected, list(module.parameters()), 2 * y.detach().float())
    for parameter, gradient in zip(
        module.parameters(), wanted, strict=True
    ):  # the cotangent is rounded, the sum is not
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_autocast_leaves_float64_alone(layer):
    module = layer.build(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(layer.inputs(5, dtype=torch.float64)).dtype == torch.float64


def test_autocast_and_the_jacobian():
    geometry = grid()
    x, table = arguments(9, geometry)
    for backend in GRID_BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, jacobian = camkernels.hash_grid(x, table, geometry, return_jacobian=True, backend=backend)
        assert y.dtype == torch.bfloat16 and jacobian.dtype == torch.float32


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", [*some(13), *PAIRED], ids=str)
def test_the_same_bits_for_any_number_of_threads(case, deterministic, threads):
    if "cpu" not in backends(case.op):
        pytest.skip("there are no CPU kernels")
    call = repeated(case.make(torch.float32), 1700)  # enough for three threads
    function = function_of(case.op, "cpu")
    results = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for count in (1, 2, 3, 1):
            threads(count)
            results.append(testing.evaluate(function, call, order=2))
            if case in WITH_JACOBIAN:
                results[-1]["j"] = call.run(function, return_jacobian=True)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor.nan_to_num(7.0), other[name].nan_to_num(7.0)), name


# ---- copying and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_registered_names(layer):
    module = layer.build()
    assert tuple(name for name, _ in module.named_parameters()) == layer.parameters
    assert not list(module.named_buffers())
    assert set(module.state_dict()) == {*layer.parameters, *(["_extra_state"] if layer.extra_state else [])}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_copies_are_equal_and_independent(layer, clone):
    module, x = layer.build(), layer.inputs(7)
    module(x).sum().backward()
    twin = clone(module)
    assert torch.equal(twin(x), module(x)) and repr(twin) == repr(module)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), module(x))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_saved_and_loaded_without_trusting_pickle(layer):
    module, other = layer.build(), layer.build()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert other.load_state_dict(state) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(other(layer.inputs(7)), module(layer.inputs(7)))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_bare_parameter_is_accepted(layer):
    module, other = torch.nn.Sequential(layer.build()), torch.nn.Sequential(layer.build())
    bare = {name: t for name, t in module.state_dict().items() if "_extra_state" not in name}
    keys = set(bare)
    other.load_state_dict(bare)
    assert torch.equal(other(layer.inputs(7)), module(layer.inputs(7))) and set(bare) == keys


def test_another_geometry_is_refused():
    layer = LAYERS[0]
    state = layer.build().state_dict()
    for options in ({"outside": "wrap"}, {"convention": "torch-ngp"}, {"n_levels": 3}, {"n_features_per_level": 4}):
        with pytest.raises(
            ValueError, match=r"^HashGrid: the state_dict is of another geometry: GridGeometry\(.*from_dict"
        ):
            layer.build(**options).load_state_dict(state)
    geometry = camkernels.GridGeometry.from_dict(state["_extra_state"])  # the remedy it names
    camkernels.HashGrid(geometry=geometry).load_state_dict(state)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_moved_to_another_dtype_or_device(layer):
    x = layer.inputs(9)
    for convert, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.float16), torch.float16),
    ):
        module = layer.build()
        expected = module(x)
        module = convert(module)
        y = module(x)
        assert y.dtype == dtype and next(module.parameters()).dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
        y.sum().backward()
        assert next(module.parameters()).grad.dtype == dtype
    assert next(layer.build().to("meta").parameters()).is_meta


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_construction_draws_what_it_documents_and_a_call_nothing(layer):
    state = random.getstate(), np.random.get_state()[1].tolist()
    torch.manual_seed(3)
    module = layer.build()
    after = torch.rand(1)
    torch.manual_seed(3)
    drawn = layer.draws(module)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(a, b) for a, b in zip(drawn, module.parameters(), strict=True))
    torch.manual_seed(3)
    x = layer.inputs(9).requires_grad_()
    module(x).sum().backward()
    copy.deepcopy(module)
    first = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(1))
    assert state == (random.getstate(), np.random.get_state()[1].tolist())


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("dims", "features"), SHAPES)
def test_every_size_of_batch(dims, features, n):
    geometry = grid(dims, features)
    x, table = arguments(n, geometry)
    call = testing.Call({"x": x, "table": table}, {"geometry": geometry})
    actual, expected = (
        testing.evaluate(f, call, order=2) for f in (function_of("hash_grid"), definition_of("hash_grid"))
    )
    for name, wanted in expected.items():
        testing.assert_close(actual[name], wanted, rtol=2e-5, atol=2e-5, name=name)


# ---- gradient modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gradient_modes(layer):
    module, x = layer.build(), layer.inputs(5)
    assert module(x).requires_grad and not module.requires_grad_(False)(x).requires_grad
    leaf = x.clone().requires_grad_()
    module(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0 and all(p.grad is None for p in module.parameters())
    module.requires_grad_(True)
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        y = module(x)
    assert y.is_inference() and torch.equal(y, module(x).detach())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_parameter_changed_between_forward_and_backward_is_noticed_or_does_not_matter(layer):
    module, x = layer.build(), layer.inputs(5)
    before = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    y = module(x.requires_grad_())
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before, strict=True))


# ---- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", GRID_BACKENDS)
@pytest.mark.parametrize(("max_level", "count"), [(0, 0), (1, 1), (3, 3), (0.0, 1), (0.34, 2), (1 / 3, 2), (1.0, 3)])
def test_levels_beyond_are_zero_and_get_no_gradient(max_level, count, backend):
    geometry = grid()
    x, table = arguments(11, geometry, torch.float64)
    function = function_of("hash_grid", backend)
    y = function(x, table, geometry, max_level=max_level)
    full = function(x, table, geometry)
    assert torch.equal(y[:, : 2 * count], full[:, : 2 * count]) and (y[:, 2 * count :] == 0).all()
    _, gtable = gradients(lambda x, t: function(x, t, geometry, max_level=max_level), x, table)
    assert gtable[: geometry.offsets[count]].any() == (count > 0) and not gtable[geometry.offsets[count] :].any()
    per_point = function(x, table, geometry, max_level=torch.tensor(float(max_level)))
    if isinstance(max_level, float):
        assert torch.equal(per_point, y)


@pytest.mark.parametrize("backend", GRID_BACKENDS)
def test_levels_of_each_point(backend):
    geometry = grid()
    x, table = arguments(6, geometry, torch.float64)
    m = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0, 0.34])
    function = function_of("hash_grid", backend)
    y = function(x.reshape(2, 3, 3), table, geometry, max_level=m.reshape(2, 3))
    for n in range(6):
        wanted = function(x[n], table, geometry, max_level=m[n].item())
        assert torch.allclose(y.reshape(6, -1)[n], wanted, rtol=1e-14, atol=0)
    row = function(x.reshape(2, 3, 3), table, geometry, max_level=m[:3])  # broadcast over the first axis
    assert torch.equal(row[1, 2], function(x[5], table, geometry, max_level=0.5))


@pytest.mark.parametrize("backend", GRID_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_levels_of_each_point_at_the_edge_of_a_level(backend, dtype):
    """m L + 1e-3 next to a whole number: read in the dtype of the computation, as the definition reads it."""
    geometry = grid()
    x, table = arguments(60, geometry, dtype)
    x = x.to(dtype)
    m = ((torch.arange(60, dtype=torch.float64) % 3 - 1e-3) / 3 + torch.linspace(-1e-8, 1e-8, 60).double()).clamp(0, 1)
    y = function_of("hash_grid", backend)(x, table, geometry, max_level=m)
    expected = camkernels.reference.hash_grid(x, table, geometry, max_level=m)
    assert torch.equal(y == 0, expected == 0)
    if dtype == torch.float64:
        wanted = [camkernels.hash_grid(a, table, geometry, max_level=b.item()) for a, b in zip(x, m, strict=True)]
        assert torch.equal(y == 0, torch.stack(wanted) == 0)
