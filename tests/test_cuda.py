# SPDX-License-Identifier: MIT
"""On a GPU: backends cuda and triton compute what the definition says; test_cuda_citizenship.py: as PyTorch's own do.

`make gpu` runs these tests; without a GPU they are skipped. What needs none is tested elsewhere: results in the
simulator (test_cuda_simulated.py) and in Triton's interpreter, the library in test_cuda_library.py.

With REHEARSAL=1 in the environment the tests that ask for no stream run on backend `cpu`, so that those who have no GPU
see that the tests themselves are right (test_gpu_command.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import _gpu, testing
from conftest import CASES, DTYPES, WITH_JACOBIAN, definition_of, function_of, positional, reason_against

REHEARSAL = os.environ.get("REHEARSAL") == "1"
DEVICE, BACKENDS = ("cpu", ("cpu",)) if REHEARSAL else ("cuda", ("cuda", "triton"))
NO_GPU = pytest.mark.skipif(_gpu.no_gpu() is not None, reason=str(_gpu.no_gpu()))
pytestmark = [pytest.mark.cuda, *([] if REHEARSAL else [NO_GPU])]
TEN_MILLION = 10_000_000
SLEEP = 200_000_000  # cycles, a tenth of a second


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """One that can compute the op of the test's case, or `hash_grid` where it has none."""
    case = request.node.callspec.params.get("case")
    reason = reason_against(request.param, case.op if case else "hash_grid")
    if reason is not None:
        pytest.skip(reason)
    return request.param


def make_call(
    n: int, dims: int = 3, features: int = 2, dtype: torch.dtype = torch.float32, **sizes: Any
) -> testing.Call:
    """Random points and a small grid with coarse levels and hashed ones, made on the device."""
    sizes = {"n_levels": 4, "log2_hashmap_size": 12, "base_resolution": 4, "finest_resolution": 64} | sizes
    geometry = camkernels.GridGeometry.build(dims, n_features_per_level=features, **sizes)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.rand(n, dims, generator=generator, device=DEVICE)
    table = torch.rand(geometry.n_entries, features, generator=generator, device=DEVICE) * 2 - 1
    return testing.Call({"x": x, "table": table.to(dtype)}, {"geometry": geometry})


def both_ways(function: Callable[..., Tensor], call: testing.Call, ct: Tensor | None = None) -> dict[str, Tensor]:
    """The value, and the gradients of the inputs, which are read where they are, by name."""
    leaves = [t.detach().requires_grad_() for t in call.inputs.values()]
    y = positional(function, call)(*leaves)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) if ct is None else ct)
    return {"value": y.detach()} | {f"grad.{name}": g for name, g in zip(call.inputs, gradients, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        testing.assert_close(tensor, expected[name], rtol=rtol, atol=rtol, name=name)


# ---- agreement with the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: testing.Case, dtype: torch.dtype, backend: str) -> None:
    order = 2 if dtype in (torch.float64, torch.float32) else 1
    testing.check(case, function_of(case.op, backend), definition_of(case.op), dtype=dtype, device=DEVICE, order=order)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_networks_of_the_widths_in_use(width: int, dtype: torch.dtype, activation: str, backend: str) -> None:
    """Of whole tiles, unlike those of the registry. ReLU's derivative jumps, so that its gradients differ by more."""
    differences = distance_of_networks(width, dtype, activation, backend)
    allowed = {torch.float32: 2e-2 if activation == "relu" else 1e-4}.get(dtype, 4e-2)
    for number, difference in enumerate(differences):
        assert difference <= (allowed if number else min(allowed, 1e-2)), f"result {number}: {difference}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_tf32_where_pytorch_allows_it(width: int, dtype: torch.dtype, backend: str) -> None:
    exact = distance_of_networks(width, dtype, "silu", backend)
    with testing.tf32(True):
        rounded = distance_of_networks(width, dtype, "silu", backend)
    for number, (one, other) in enumerate(zip(exact, rounded, strict=True)):
        assert other <= max(1e-2, 2 * one), f"result {number}: {other}"
        is_product = number < len(exact) - 1  # the gradient of the last bias is a sum of what is given
        if is_product and dtype == torch.float32 and backend != "cpu":
            assert other > 10 * one, f"result {number}: {other} under TF32, {one} without"


def distance_of_networks(width: int, dtype: torch.dtype, activation: str, backend: str) -> list[float]:
    """Of a network's value and gradients from those in float64, relative to their size."""
    generator = torch.Generator(DEVICE).manual_seed(width)
    shapes = [(width, 32), (width, width), (width, width), (3, width)]
    points = (1000, 32), (1000, 3, 2)
    sizes = [*points, *shapes, *((out,) for out, _ in shapes)]
    drawn = [torch.randn(size, generator=generator, device=DEVICE) / size[-1] ** 0.5 for size in sizes]
    leaves = [t.to(dtype).requires_grad_() for t in drawn]
    g = torch.randn(1000, 3, generator=generator, device=DEVICE).to(dtype)

    def run(backend: str, *inputs: Tensor) -> list[Tensor]:
        x, modulation, *rest = inputs
        y = camkernels.modulated_mlp(
            x, rest[:4], rest[4:], modulation, norm="point", activation=activation, backend=backend
        )
        return [y, *torch.autograd.grad(y, inputs, g.to(y.dtype))]

    expected = run("reference", *(t.detach().double().requires_grad_() for t in leaves))
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(run(backend, *leaves), expected, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", WITH_JACOBIAN, ids=str)
def test_jacobian_of_every_case(case: testing.Case, dtype: torch.dtype, backend: str) -> None:
    functions = function_of(case.op, backend), definition_of(case.op)
    testing.check(case, *functions, dtype=dtype, device=DEVICE, order=1, jacobian=True)


@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_many_points(dims: int, features: int, backend: str) -> None:
    """Enough points for whole and partial blocks, and for threads that take several levels."""
    call = make_call(50_001, dims, features)
    assert_same(both_ways(function_of("hash_grid", backend), call), both_ways(definition_of("hash_grid"), call), 1e-4)


# ---- sizes and addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", [False, True])
def test_no_points(jacobian: bool, backend: str) -> None:
    call = make_call(0)
    leaves = [t.requires_grad_() for t in call.inputs.values()]
    result = camkernels.hash_grid(*leaves, **call.options, backend=backend, return_jacobian=jacobian)
    y = result[0] if jacobian else result
    assert y.shape == (0, 8) and y.device.type == DEVICE
    gx, gtable = torch.autograd.grad(y.sum(), leaves)
    assert gx.shape == (0, 3) and gtable.eq(0).all()


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, one number behind an aligned address."""
    moved = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)
    assert moved.data_ptr() % 16 != 0 and moved.is_contiguous()
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_addresses_that_are_not_aligned(dtype: torch.dtype, backend: str) -> None:
    call = make_call(1000, dtype=dtype)
    moved = testing.Call({name: shifted(t) for name, t in call.inputs.items()}, call.options)
    ct = torch.rand(1000, 8, device=DEVICE).to(dtype)
    function = function_of("hash_grid", backend)
    rtol = 1e-5 if dtype == torch.float32 else 2e-3
    assert_same(both_ways(function, moved, shifted(ct)), both_ways(function, call, ct), rtol)


@NO_GPU
def test_ten_million_points(backend: str) -> None:
    call = make_call(TEN_MILLION, n_levels=2)
    geometry, x, table = call.options["geometry"], *call.inputs.values()
    leaf = table.clone().requires_grad_()
    y = camkernels.hash_grid(x, leaf, geometry, backend=backend)
    rows = torch.cat([torch.randint(TEN_MILLION, (2000,)), torch.tensor([0, TEN_MILLION - 1])]).to(DEVICE)
    expected = camkernels.reference.hash_grid(x[rows], table, geometry)
    testing.assert_close(y[rows].detach(), expected, rtol=2e-6, atol=2e-6)
    y.sum().backward()
    # A row is a sum of 80 000 weights in float32. "cuda" adds up blocks first; "triton" adds weight by weight, and most
    # weights that are below half of the sum's last bit, 2^-8 of a weight, are lost: 7e-4 of the sum on an H100.
    rtol = 1e-4 if backend == "cuda" else 2e-3
    for level in range(2):  # every point spreads a weight of 1 over each level
        total = leaf.grad[geometry.offsets[level] : geometry.offsets[level + 1]].double().sum(0)
        torch.testing.assert_close(total, torch.full_like(total, TEN_MILLION), rtol=rtol, atol=0)


@NO_GPU
def test_more_than_two_to_the_31_outputs(backend: str) -> None:
    n, needed = (1 << 26) + 3, 14 << 30
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    call = make_call(n, n_levels=16, dtype=torch.float16, log2_hashmap_size=8)
    with torch.no_grad():
        y = call.run(function_of("hash_grid", backend))
        assert y.numel() > 1 << 31
        last = testing.Call({"x": call.inputs["x"][-1000:], "table": call.inputs["table"]}, call.options)
        expected = last.run(definition_of("hash_grid"))
    testing.assert_close(y[-1000:], expected, rtol=1e-3, atol=1e-3)


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_the_layer_chooses_the_best_backend_that_can_run() -> None:
    able = [b for b in (*BACKENDS, "reference") if reason_against(b, "hash_grid") is None]
    layer = camkernels.HashGrid(dims=3, n_levels=4, log2_hashmap_size=10, init_scale=1.0, device=DEVICE)
    x = torch.rand(100, 3, device=DEVICE)
    expected = camkernels.hash_grid(x, layer.table, layer.geometry, backend=able[0])
    assert torch.equal(layer(x), expected)
