# SPDX-License-Identifier: MIT
"""On a GPU: ops behave as PyTorch's own do. They run on the caller's stream, wait for nothing, can be captured, keep to
their device, add up the same bits where that is asked for, and follow autocast and the compiler.

What they compute there is in test_cuda.py, which tells what REHEARSAL=1 is for.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from camkernels import NeighborIndex, testing
from camkernels.optim import SparseRowAdam
from conftest import OPS, definition_of, deterministic, function_of, reason_against, repeated, rows, some
from test_cuda import BACKENDS, DEVICE, NO_GPU, REHEARSAL, SLEEP, assert_same, both_ways
from test_gradients import DIFFERENCES, prepare

pytestmark = [pytest.mark.cuda, *([] if REHEARSAL else [NO_GPU])]
POINTS = 5000
ATOMIC = ("hash_grid", "coordinate_modulation")  # gradients that Triton's kernels add up in any order only
FIXED_POINT = (*ATOMIC, "radial_basis")  # those of the CUDA kernels that have the same bits in every order


def able(names: Iterable[Any], backends: Sequence[str] = BACKENDS) -> list[Any]:
    """Parameters (name or case, backend), skipped where that backend cannot compute the op here."""
    found = []
    for name in names:
        for backend in backends:
            reason = reason_against(backend, getattr(name, "op", name))
            skip = pytest.mark.skipif(reason is not None, reason=str(reason))
            found.append(pytest.param(name, backend, id=f"{name}-{backend}", marks=skip))
    return found


every_op = pytest.mark.parametrize(("op", "backend"), able(OPS))


# ---- what the device is asked for ------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def call_of(op: str, n: int = POINTS, dtype: torch.dtype = torch.float32, seed: int = 0) -> testing.Call:
    """The first case of an op on n points, none where a derivative jumps."""
    return repeated(testing.cases(op)[0].make(dtype, DEVICE, seed, points="safe"), n)


def cotangent(op: str, call: testing.Call) -> Tensor:
    """Of its value."""
    y = call.run(definition_of(op))
    return drawn(*y.shape, seed=1).to(y.dtype)


@dataclass(frozen=True)
class Work:
    """What reads, and may change, some tensors; the results are new ones, by name."""

    tensors: list[Tensor]
    results: Callable[[], dict[str, Tensor]]

    def values(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def run(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        self.load(values)
        return self.results()


def passes(op: str, backend: str, seed: int) -> Work:
    """Value and gradients, and the Jacobian where the op has one."""
    function, call = function_of(op, backend), call_of(op, seed=seed)
    ct = cotangent(op, call)

    def results() -> dict[str, Tensor]:
        found = both_ways(function, call, ct)
        return found | {"jacobian": call.run(function, return_jacobian=True)[1]} if testing.has_jacobian(op) else found

    return Work(list(call.inputs.values()), results)


def search(seed: int) -> Work:
    """Nearest centres, of an index that is there."""
    index, x = NeighborIndex(drawn(2000, 3, seed=2)), drawn(POINTS, 3, seed=seed)
    return Work([x], lambda: dict(zip(("rows", "squares"), index.search(x, 8), strict=True)))


def step(seed: int) -> Work:
    """Of SparseRowAdam, in place."""
    table = torch.nn.Parameter(drawn(POINTS, 4, seed=seed))
    table.grad = drawn(POINTS, 4, seed=seed + 2) * (drawn(POINTS, 1, seed=seed + 4) < 0.3)
    optimizer = SparseRowAdam([table], lr=0.1)
    optimizer.step()  # which makes the state
    state = optimizer.state[table]

    def results() -> dict[str, Tensor]:
        optimizer.step()
        return {"table": table.detach().clone()} | {name: t.clone() for name, t in state.items()}

    return Work([table, table.grad, *state.values()], results)


OTHERS = {"nearest": search, "sparse_row_adam": step}
every_work = pytest.mark.parametrize(("op", "backend"), able(OPS) + able(OTHERS, BACKENDS[:1]))


def work_of(op: str, backend: str, seed: int = 0) -> Work:
    return OTHERS[op](seed) if op in OTHERS else passes(op, backend, seed)


# ---- streams, graphs, devices ----------------------------------------------------------------------------------------


@NO_GPU
@every_work
def test_the_current_stream_is_used(op: str, backend: str) -> None:
    """On a stream that first sleeps and then fills the tensors: kernels of any other stream would read zeros."""
    work = work_of(op, backend)
    given = work.values()
    expected = work.run(given)
    work.load([torch.zeros_like(t) for t in given])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        found = work.run(given)
    stream.synchronize()
    assert_same(found, expected)


@NO_GPU
@every_work
def test_nothing_waits_for_the_device(op: str, backend: str) -> None:
    work = work_of(op, backend)
    given = work.values()
    expected = work.run(given)
    work.run(given)  # the first calls compile, copy what is constant and allocate
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(5 * SLEEP)
        asleep = torch.cuda.Event()
        asleep.record()
        found = work.run(given)
        assert not asleep.query(), "the calls came back after the device had woken up"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected)


@NO_GPU
@every_work
def test_capture_and_replay_of_a_cuda_graph(op: str, backend: str) -> None:
    work, other = work_of(op, backend), work_of(op, backend, seed=1)
    given = [w.values() for w in (work, other)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work.results()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work.results()
    for values in (given[0], given[1], given[0]):
        work.load(values)
        graph.replay()
        torch.cuda.synchronize()
        replayed = {name: t.clone() for name, t in results.items()}
        assert_same(replayed, work.run(values))


def moved(call: testing.Call, device: str) -> testing.Call:
    inputs, options = (
        {name: v.to(device) if torch.is_tensor(v) else v for name, v in part.items()}
        for part in (call.inputs, call.options)
    )
    return dataclasses.replace(call, inputs=inputs, options=options)


def torn(call: testing.Call, device: str) -> testing.Call:
    """The points stay, all else is moved."""
    there = moved(call, device)
    return dataclasses.replace(there, inputs=there.inputs | {call.points: call.inputs[call.points]})


@NO_GPU
@every_op
def test_a_second_device(op: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    call, function = call_of(op), function_of(op, backend)
    ct = cotangent(op, call)
    assert torch.cuda.current_device() == 0
    found = both_ways(function, moved(call, "cuda:1"), ct.to("cuda:1"))
    assert {t.device for t in found.values()} == {torch.device("cuda:1")} and torch.cuda.current_device() == 0
    assert_same({name: t.to("cuda:0") for name, t in found.items()}, both_ways(function, call, ct))
    with pytest.raises(ValueError, match=f"^{op}: .* one device, got {call.points} on cuda:0, .* on cuda:1"):
        torn(call, "cuda:1").run(function)


@NO_GPU
@every_op
def test_tensors_of_host_and_device_do_not_mix(op: str, backend: str) -> None:
    call, function = call_of(op, 5), function_of(op, backend)
    with pytest.raises(ValueError, match=f"^{op}: .* one device, got {call.points} on cuda:0, .* on cpu.*; move them"):
        torn(call, "cpu").run(function)
    with pytest.raises(RuntimeError, match=f"^{op}: .* cannot run: the tensors are on cpu"):
        moved(call, "cpu").run(function)


# ---- repeatable sums -------------------------------------------------------------------------------------------------


def parameter_gradients(function: Callable[..., Tensor], call: testing.Call, ct: Tensor) -> dict[str, Tensor]:
    found = both_ways(function, call, ct)
    return {name: found[f"grad.{name}"] for name in call.inputs if name != call.points}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_op
def test_deterministic_gradients_have_the_same_bits(op: str, backend: str, dtype: torch.dtype) -> None:
    """The CUDA kernels' sums in fixed point also where the points come in another order."""
    call, function = call_of(op, 50_000, dtype), function_of(op, backend)
    ct = cotangent(op, call)
    with deterministic():
        if backend == "triton" and op in ATOMIC:
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                both_ways(function, call, ct)
            return
        first, *others = (parameter_gradients(function, call, ct) for _ in range(2))
        if backend == "cuda" and op in FIXED_POINT:
            order = torch.randperm(len(ct), device=DEVICE)
            others.append(parameter_gradients(function, rows(call, order), ct[order]))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    rtol, atol = testing.tolerance(dtype, "grad.parameters")
    for name, fast in parameter_gradients(function, call, ct).items():
        testing.assert_close(fast, first[name], rtol=10 * rtol, atol=10 * atol, name=name)


@every_op
def test_values_are_repeatable_without_asking(op: str, backend: str) -> None:
    """And gradients of the points; those of the parameters are sums that may use atomics."""
    call = call_of(op, 50_000)
    ct = cotangent(op, call)
    first, second = (both_ways(function_of(op, backend), call, ct) for _ in range(2))
    for name in ("value", f"grad.{call.points}"):
        assert torch.equal(first[name], second[name]), name


# ---- what PyTorch puts around a call ---------------------------------------------------------------------------------


@every_op
def test_autocast(op: str, backend: str) -> None:
    call = call_of(op, 100)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = call.run(function_of(op, backend))
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, call.run(definition_of(op)).half(), rtol=2e-3, atol=1e-4)


@every_op
def test_under_the_compiler(op: str, backend: str) -> None:
    call, function = call_of(op, 1000), function_of(op, backend)
    ct = cotangent(op, call)
    torch._dynamo.reset()  # which else counts how often the same lambda is compiled
    compiled = torch.compile(lambda **arguments: function(**arguments) * 2, fullgraph=True)
    twice = both_ways(compiled, call, ct)
    assert_same(twice, {name: 2 * t for name, t in both_ways(function, call, ct).items()})


@pytest.mark.parametrize(("case", "backend"), able(case for case in some(13) if case in DIFFERENCES))
def test_gradcheck(case: testing.Case, backend: str) -> None:
    function, inputs, eps = prepare(case, backend, "both", points=6)
    settings = {"eps": eps, "fast_mode": True, "nondet_tol": 1e-10}  # atomic additions come in any order
    assert gradcheck(function, inputs, **settings)
    assert gradgradcheck(function, inputs, **settings)


# ---- NVIDIA's own checker --------------------------------------------------------------------------------------------


def exercise() -> None:
    """Cases of every op with their derivatives, in turns with repeatable sums; searches; steps of the optimizer."""
    for k, case in enumerate(some(13)):
        function, dtype = function_of(case.op, BACKENDS[0]), (torch.float32, torch.float16, torch.float64)[k // 2 % 3]
        call = repeated(case.make(dtype, DEVICE), 777)
        with (deterministic if k % 2 else nullcontext)():
            testing.evaluate(function, call, order=2)
            if testing.has_jacobian(case.op):
                testing.evaluate(function, call, jacobian=True)
    for dims, k in ((1, 1), (2, 4), (3, 65), (4, 8)):
        NeighborIndex(drawn(500, dims, seed=0)).search(drawn(777, dims, seed=1), k)
    for shape, sparse in (((777,), False), ((777, 3), True), ((77, 40), False)):
        table = torch.nn.Parameter(drawn(*shape, seed=0))
        table.grad = drawn(*shape, seed=1).to_sparse(1) if sparse else drawn(*shape, seed=1)
        SparseRowAdam([table]).step()
    print("done")


@NO_GPU
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    for name in (*OPS, *OTHERS):
        if (reason := reason_against("cuda", name)) is not None:
            pytest.skip(reason)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-c", "import test_cuda_citizenship; test_cuda_citizenship.exercise()"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    # Without PyTorch's cache, or tensors lie in one large block, side by side.
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer took more than 90 s")
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
