# SPDX-License-Identifier: MIT
"""On a GPU: backends cuda and triton compute what the definition says, on the caller's stream, without waiting for it.

`make gpu` runs these tests; without a GPU they are skipped. What needs none is tested elsewhere: results in the
simulator (test_cuda_simulated.py) and in Triton's interpreter, the library in test_cuda_library.py.

With REHEARSAL=1 in the environment the tests that ask for no stream run on backend `cpu`, so that those who have no GPU
see that the tests themselves are right (test_gpu_command.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import camkernels
from camkernels import _gpu, testing
from conftest import CASES, DTYPES, WITH_JACOBIAN, definition_of, function_of, positional, reason_against, require

REHEARSAL = os.environ.get("REHEARSAL") == "1"
DEVICE, BACKENDS = ("cpu", ("cpu",)) if REHEARSAL else ("cuda", ("cuda", "triton"))
GRIDS = testing.cases("hash_grid")
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


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_call(
    n: int, dims: int = 3, features: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any
) -> testing.Call:
    """Random points and a small grid with coarse levels and hashed ones, made on the device."""
    sizes = {"n_levels": 4, "log2_hashmap_size": 12, "base_resolution": 4, "finest_resolution": 64} | sizes
    geometry = camkernels.GridGeometry.build(dims, n_features_per_level=features, **sizes)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.rand(n, dims, generator=generator, device=DEVICE)
    table = torch.rand(geometry.n_entries, features, generator=generator, device=DEVICE) * 2 - 1
    return testing.Call({"x": x, "table": table.to(dtype)}, {"geometry": geometry})


def both_ways(function: Callable[..., Tensor], call: testing.Call, ct: Tensor | None = None) -> tuple[Tensor, ...]:
    """(y, gradient of x, gradient of the table)."""
    leaves = [t.detach().requires_grad_() for t in call.inputs.values()]
    y = positional(function, call)(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if ct is None else ct))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float = 1e-5) -> None:
    for a, b, name in zip(actual, expected, ("y", "gradient of x", "gradient of the table"), strict=True):
        testing.assert_close(a, b, rtol=rtol, atol=rtol, name=name)


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


@pytest.mark.parametrize("case", GRIDS[::14], ids=str)
def test_gradcheck(case: testing.Case, backend: str) -> None:
    call = case.make(torch.float64, DEVICE, points="safe")
    unit = max(map(max, call.options["geometry"].scales))  # in cells, derivatives are of order 1
    x = call.inputs["x"].reshape(-1, call.inputs["x"].shape[-1])[:6]
    options = {k: v.reshape(-1)[:6] if torch.is_tensor(v) else v for k, v in call.options.items()}
    inputs = require(testing.Call({"x": x * unit, "table": call.inputs["table"]}, options), "both")

    def function(points: Tensor, table: Tensor) -> Tensor:
        return camkernels.hash_grid(points / unit, table, **options, backend=backend)

    settings = {"eps": 1e-4, "fast_mode": True, "nondet_tol": 1e-10}  # atomic additions come in any order
    assert gradcheck(function, tuple(inputs.values()), **settings)
    assert gradgradcheck(function, tuple(inputs.values()), **settings)


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


# ---- streams, graphs, devices ----------------------------------------------------------------------------------------


@NO_GPU
def test_the_current_stream_is_used(backend: str) -> None:
    """On a stream that first sleeps and then fills the table: kernels of any other stream would read zeros."""
    call = make_call(5000)
    function = function_of("hash_grid", backend)
    expected = both_ways(function, call)
    late = testing.Call({"x": call.inputs["x"], "table": torch.zeros_like(call.inputs["table"])}, call.options)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        late.inputs["table"].copy_(call.inputs["table"])
        found = both_ways(function, late)
    stream.synchronize()
    assert_same(found, expected)


@NO_GPU
def test_nothing_waits_for_the_device(backend: str) -> None:
    call = make_call(5000)
    function = function_of("hash_grid", backend)
    jacobian = function(**call.inputs, **call.options, return_jacobian=True)[1]
    both_ways(function, call)  # the first calls compile, copy the geometry and allocate
    del jacobian
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10 * SLEEP)
        asleep = torch.cuda.Event()
        asleep.record()
        both_ways(function, call)
        jacobian = function(**call.inputs, **call.options, return_jacobian=True)[1]
        assert not asleep.query(), "the calls came back after the device had woken up"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert jacobian.isfinite().all()


@NO_GPU
def test_capture_and_replay_of_a_cuda_graph(backend: str) -> None:
    function = function_of("hash_grid", backend)
    call, other = make_call(5000), make_call(5000, seed=1)
    leaves = [t.clone().requires_grad_() for t in call.inputs.values()]

    def step() -> tuple[Tensor, ...]:
        y = positional(function, call)(*leaves)
        return (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for inputs in (call, other, call):
        with torch.no_grad():
            for leaf, given in zip(leaves, inputs.inputs.values(), strict=True):
                leaf.copy_(given)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(tuple(t.detach() for t in results), both_ways(function, inputs))


@NO_GPU
def test_a_second_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    call = make_call(5000)
    there = testing.Call({name: t.to("cuda:1") for name, t in call.inputs.items()}, call.options)
    function = function_of("hash_grid", backend)
    assert torch.cuda.current_device() == 0
    found = both_ways(function, there)
    assert {t.device for t in found} == {torch.device("cuda:1")} and torch.cuda.current_device() == 0
    assert_same(tuple(t.to("cuda:0") for t in found), both_ways(function, call))
    with pytest.raises(ValueError, match="one device, got x on cuda:0, table on cuda:1"):
        function(call.inputs["x"], there.inputs["table"], **call.options)


@NO_GPU
def test_tensors_of_host_and_device_do_not_mix(backend: str) -> None:
    call = make_call(5)
    with pytest.raises(ValueError, match="one device, got x on cuda:0, table on cpu; move them"):
        function_of("hash_grid", backend)(call.inputs["x"], call.inputs["table"].cpu(), **call.options)
    with pytest.raises(RuntimeError, match="cannot run: the tensors are on cpu"):
        function_of("hash_grid", backend)(*(t.cpu() for t in call.inputs.values()), **call.options)


# ---- repeatable sums -------------------------------------------------------------------------------------------------


@NO_GPU
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_deterministic_gradients_have_the_same_bits_in_any_order(dtype: torch.dtype, backend: str) -> None:
    call = make_call(200_000, dtype=dtype)
    function, ct = function_of("hash_grid", backend), torch.rand(200_000, 8, device=DEVICE).to(dtype)
    if dtype == torch.float64:
        call.inputs["x"] = call.inputs["x"].double()
    with deterministic():
        if backend == "triton":
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                both_ways(function, call, ct)
            return
        first = both_ways(function, call, ct)
        order = torch.randperm(200_000, device=DEVICE)
        shuffled = testing.Call(call.inputs | {"x": call.inputs["x"][order]}, call.options)
        for other in (both_ways(function, call, ct), both_ways(function, shuffled, ct[order])):
            assert torch.equal(first[2], other[2])
    fast = both_ways(function, call, ct)
    rtol, atol = testing.tolerance(dtype, "grad.parameters")
    testing.assert_close(fast[2], first[2], rtol=10 * rtol, atol=10 * atol)


def test_values_are_repeatable_without_asking(backend: str) -> None:
    call = make_call(200_000)
    first, second = (both_ways(function_of("hash_grid", backend), call) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])  # the table's sums use atomics


# ---- the layer in its surroundings -----------------------------------------------------------------------------------


def test_the_layer_chooses_the_best_backend_that_can_run() -> None:
    able = [b for b in (*BACKENDS, "reference") if reason_against(b, "hash_grid") is None]
    layer = camkernels.HashGrid(dims=3, n_levels=4, log2_hashmap_size=10, init_scale=1.0, device=DEVICE)
    x = torch.rand(100, 3, device=DEVICE)
    expected = camkernels.hash_grid(x, layer.table, layer.geometry, backend=able[0])
    assert torch.equal(layer(x), expected)


@NO_GPU
def test_autocast(backend: str) -> None:
    call = make_call(100)
    with torch.autocast("cuda", dtype=torch.float16):
        y = call.run(function_of("hash_grid", backend))
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, call.run(definition_of("hash_grid")).half(), rtol=2e-3, atol=1e-4)


def test_under_the_compiler(backend: str) -> None:
    call = make_call(1000)
    function = function_of("hash_grid", backend)
    compiled = torch.compile(lambda x, table: function(x, table, **call.options) * 2, fullgraph=True)
    twice = both_ways(lambda x, table, geometry: compiled(x, table), call)
    assert_same(twice, tuple(2 * t for t in both_ways(function, call)))


# ---- NVIDIA's own checker --------------------------------------------------------------------------------------------

SANITIZED = """
import torch, camkernels
kinds = (2, 1, torch.float32), (3, 2, torch.float16), (4, 4, torch.float32), (5, 3, torch.float64)
for dims, features, dtype in kinds:
    geometry = camkernels.GridGeometry.build(dims, 4, features, 10, base_resolution=4, finest_resolution=40)
    x = torch.rand(777, dims, device="cuda", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    table = torch.rand(geometry.n_entries, features, device="cuda").to(dtype)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        leaves = x.clone().requires_grad_(), table.clone().requires_grad_()
        y, j = camkernels.hash_grid(*leaves, geometry, backend="cuda", return_jacobian=True)
        torch.autograd.grad(y.sum() + j.sum(), leaves)
        y = camkernels.hash_grid(*leaves, geometry, backend="cuda")
        (slope,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
        slope.sum().backward()
torch.cuda.synchronize()
print("done")
"""


@NO_GPU
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    if (reason := reason_against("cuda", "hash_grid")) is not None:
        pytest.skip(reason)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-c", SANITIZED]
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
    }  # or tensors lie in one large block, side by side
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer took more than 90 s")
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
