# SPDX-License-Identifier: MIT
"""The simulator that executes CUDA kernels on the CPU, tested by kernels that are right and kernels that are wrong.

Right ones agree with float64 in every schedule; wrong ones (a missing barrier, a copy used too early, an overrun, ...)
are found, and end as a sentence with file and line. No GPU takes part anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from sim import build, library, toolkit
from sim.selftests import (
    DIVERGENT_BARRIER,
    MIXED_OPERATIONS,
    NO_BARRIER,
    NO_FILL_BARRIER,
    NO_WAIT,
    TYPES,
    WRONG_MASK,
    dot,
    histogram,
    integers,
    matmul,
    random,
    scatter,
    scatter_other,
)

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))


@pytest.fixture(scope="module")
def sim() -> library.Library:
    return library.load(build.selftest())


@pytest.fixture(params=library.SCHEDULES)
def scheduled(sim: library.Library, request: pytest.FixtureRequest) -> Iterator[library.Library]:
    with sim.schedule(request.param):
        yield sim


# ---- Right kernels agree in every schedule -------------------------------------------------------------------------


def test_block_reduction(scheduled: library.Library) -> None:
    got, expected = dot(scheduled)
    assert got == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", range(3), ids=["float16", "bfloat16", "tf32"])
def test_matmul_on_tensor_cores(scheduled: library.Library, kind: int) -> None:
    assert matmul(scheduled, kind) < 1e-4


@pytest.mark.parametrize("kind", range(5), ids=["int", "unsigned", "64-bit", "float", "double"])
def test_histogram_by_shared_and_global_atomics(scheduled: library.Library, kind: int) -> None:
    histogram(scheduled, kind)


@pytest.mark.parametrize("features", [1, 2, 4, 8])
def test_float_reductions(scheduled: library.Library, features: int) -> None:
    scatter(scheduled, features)


@pytest.mark.parametrize("kind", range(3), ids=["half2", "bfloat162", "double"])
def test_other_reductions(scheduled: library.Library, kind: int) -> None:
    scatter_other(scheduled, kind)


def test_atomics_on_words(scheduled: library.Library) -> None:
    out = torch.tensor([0, 2**31 - 1, 0, 0], dtype=torch.int32)
    scheduled.call("selftest_words", out, 3)
    assert out.tolist() == [3 * 96 - 1, 0, -1, 3 * 96]


def test_votes_shuffles_and_barriers_with_a_vote(scheduled: library.Library) -> None:
    threads = 80  # the third warp has 16 lanes
    values = integers(0, 9, 2, threads)
    out = torch.zeros(2, threads, 14, dtype=torch.int32)
    scheduled.call("selftest_votes", values, out, 2, threads)
    for block, i in ((b, i) for b in range(2) for i in range(threads)):
        assert out[block, i].tolist() == expected_votes(values[block].tolist(), i), (block, i)


def expected_votes(everyone: list[int], i: int) -> list[int]:
    """What thread `i` of kernel `votes` writes, when the threads of its block hold the values `everyone`."""
    lane = i % 32
    warp = everyone[i - lane : i - lane + 32]

    def ballot(vote: Callable[[int, int], bool | int]) -> int:
        word = sum(1 << k for k, value in enumerate(warp) if vote(k, value))
        return word - (1 << 32) if word >> 31 else word

    expected = [ballot(lambda k, v: v > 2), 7 in warp, all(v < 7 for v in warp), ballot(lambda k, v: v == warp[lane])]
    expected += [ballot(lambda k, v: v & 1 and k % 2 == lane % 2)]
    expected += [everyone.count(3), all(v < 8 for v in everyone), 7 in everyone]
    expected += [warp[lane // 8 * 8 + 3], warp[lane - 2] if lane % 16 >= 2 else warp[lane]]
    expected += [warp[lane + 3] if lane % 8 < 5 else warp[lane], warp[lane ^ 1]]
    return [int(v) for v in expected + [ballot(lambda k, v: True), warp[lane ^ 1]]]


# ---- Register layouts, element by element --------------------------------------------------------------------------
# The simulator computes layouts from row and column formulas; here the same maps are written as strides over (lane,
# value), the way layout algebras give them, and every element of A, B and the accumulator is sent through alone.

STRIDES = {  # matrix: ((lane shape, lane strides), (value shape, value strides)), of the column-major position
    "a16": (((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128))),
    "b16": (((4, 8), (16, 1)), ((2, 2), (8, 64))),
    "a32": (((4, 8), (16, 1)), ((2, 2), (8, 64))),
    "b32": (((4, 8), (8, 1)), ((2,), (32,))),
    "d": (((4, 8), (32, 1)), ((2, 2), (16, 8))),
}


def positions(name: str) -> torch.Tensor:
    """[32, values]: the column-major position in the matrix of every register value."""

    def dotted(shape: tuple[int, ...], stride: tuple[int, ...], index: int) -> int:
        total = 0
        for extent, step in zip(shape, stride, strict=True):
            total += index % extent * step
            index //= extent
        return total

    lanes, values = STRIDES[name]
    count = torch.Size(values[0]).numel()
    return torch.tensor([[dotted(*lanes, lane) + dotted(*values, v) for v in range(count)] for lane in range(32)])


def to_registers(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """[blocks, rows, columns] -> what every lane holds; a matrix B is stored column by row."""
    flat = (matrix if name.startswith("b") else matrix.transpose(1, 2)).flatten(1)
    return flat[:, positions(name)].contiguous()


@pytest.mark.parametrize("kind", range(3), ids=["float16", "bfloat16", "tf32"])
def test_fragment_layout(sim: library.Library, kind: int) -> None:
    depth, bits = (8, 32) if TYPES[kind] is torch.float32 else (16, 16)
    ones_a, ones_b = torch.eye(16 * depth).view(-1, 16, depth), torch.eye(depth * 8).view(-1, depth, 8)
    some_a, some_b = integers(-8, 9, 16, depth).float(), integers(-8, 9, depth, 8, seed=1).float()
    a = torch.cat([ones_a, some_a.expand(len(ones_b), -1, -1)])
    b = torch.cat([some_b.expand(len(ones_a), -1, -1), ones_b])
    d = integers(-8, 9, len(a), 16, 8, seed=2).float()
    registers = to_registers(d, "d")
    arguments = to_registers(a, f"a{bits}").to(TYPES[kind]), to_registers(b, f"b{bits}").to(TYPES[kind])
    sim.call("selftest_product", *arguments, registers, len(a), kind)
    assert torch.equal(registers, to_registers(d + a @ b, "d"))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_load_layout(sim: library.Library, transposed: bool) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    sim.call("selftest_load", matrices, out, int(transposed))
    rows = matrices.transpose(1, 2) if transposed else matrices
    expected = rows.reshape(4, 32, 2).transpose(0, 1)  # lane 4 g + t holds elements 2 t, 2 t + 1 of row g
    assert torch.equal(out, expected)


# ---- Wrong kernels are found ---------------------------------------------------------------------------------------


def test_missing_barrier_in_reduction_is_found_in_some_schedule(sim: library.Library) -> None:
    wrong = 0
    for schedule in library.SCHEDULES:
        with sim.schedule(schedule):
            got, expected = dot(sim, NO_BARRIER)
            wrong += not abs(got - expected) < 1e-3
    assert wrong >= 2  # in one order the writers happen to run first, which is why there are three


@pytest.mark.parametrize("bug", [NO_WAIT, NO_FILL_BARRIER])
def test_use_before_arrival_reads_nan(scheduled: library.Library, bug: int) -> None:
    assert matmul(scheduled, 0, bug).isnan()


@pytest.mark.parametrize(
    ("bug", "sentence"),
    [
        (DIVERGENT_BARRIER, "divergent __syncthreads: 48 of 128 threads .* returned before this barrier"),
        (WRONG_MASK, "wrong mask: lane .* calls __shfl_down_sync with mask 0x0000ffff"),
        (MIXED_OPERATIONS, "meet in different operations"),
    ],
)
def test_wrong_cooperation_is_a_sentence(scheduled: library.Library, bug: int, sentence: str) -> None:
    with pytest.raises(library.SimulationError, match=rf"reduction\.cu:\d+: .*{sentence}"):
        dot(scheduled, bug)
    assert dot(scheduled)[0] == pytest.approx(dot(scheduled)[1], abs=1e-3)  # and the next launch is none the worse


def test_misaligned_vector_reduction(scheduled: library.Library) -> None:
    for features, shift in ((2, 1), (4, 2)):
        sentence = rf"atomics\.cu:\d+: vector reduction: misaligned address, {4 * features} bytes must divide it"
        with pytest.raises(library.SimulationError, match=sentence):
            scatter(scheduled, features, shift)
    scatter(scheduled, 1, shift=1)


def test_dynamic_memory_too_small_for_a_copy(scheduled: library.Library) -> None:
    a, b, c = random(64, 32).half(), random(32, 32).half(), torch.zeros(64, 32)
    sentence = r"matmul\.cu:\d+: cp\.async .* asked for too little: 4544 bytes dynamic"
    with pytest.raises(library.SimulationError, match=sentence):
        scheduled.call("selftest_matmul", a, b, c, 64, 32, 32, 0, 0, 64)


FAULTS = [  # order of `enum Fault` in broken/faults.cu
    ("illegal address", "illegal address"),
    ("null pointer", "null pointer to 'float'"),
    ("misaligned load", "misaligned address of 'const struct float4', 16 bytes"),
    ("misaligned read-only load", "load_readonly: misaligned address, 8 bytes"),
    ("array index", r"array index \d+ out of bounds"),
    ("float cast", "outside the range of the integer type"),
    ("signed overflow", "signed integer overflow"),
    ("exit before a barrier", "1 of 64 threads of block .* returned before this barrier, which 63 wait at"),
    ("different barriers", r"other threads of the block wait at .*faults\.cu"),
    ("disagreeing masks", "wrong mask"),
    ("absent lane", "reads lane 9, which is not in the mask"),
    ("incomplete warp in a product", "needs all 32 lanes"),
    ("shared address in a global sum", "needs an address in global memory"),
    ("global address in a shared sum", "needs an address in shared memory"),
    ("misaligned copy", "cp.async .source.: misaligned address, 8 bytes"),
    ("stack overflow", "stack overflow"),
]


@pytest.mark.parametrize(("number", "sentence"), [pytest.param(i, s, id=n) for i, (n, s) in enumerate(FAULTS, 1)])
def test_fault_is_a_sentence_with_file_and_line(scheduled: library.Library, number: int, sentence: str) -> None:
    with pytest.raises(library.SimulationError, match=rf"^\S*faults\.cu:\d+: .*{sentence}"):
        scheduled.call("selftest_fault", number, torch.ones(80))


@pytest.mark.parametrize("number", [17, 18], ids=["static", "dynamic"])
def test_shared_memory_starts_as_nan(scheduled: library.Library, number: int) -> None:
    data = torch.ones(80)
    scheduled.call("selftest_fault", 0, data)  # leaves numbers in the same shared memory
    assert data[:64].eq(4).all()
    scheduled.call("selftest_fault", number, data)
    assert data[:64].isnan().all()


def test_deadlock_names_the_waiting(scheduled: library.Library) -> None:
    sentence = r"faults\.cu:\d+: deadlock, .* waits in __shfl_sync with mask 0x00000003 at .*faults\.cu:"
    with pytest.raises(library.SimulationError, match=sentence):
        scheduled.call("selftest_fault", 19, torch.ones(80))


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "sentence"),
    [(1, 1025, 0, "1 to 1024"), (2**31, 32, 0, "2147483647"), (1, 64, 300_000, r"sm_90 allows 232448")],
)
def test_impossible_launch(sim: library.Library, blocks: int, threads: int, shared: int, sentence: str) -> None:
    with pytest.raises(library.SimulationError, match=sentence):
        sim.call("selftest_launch", blocks, threads, shared, torch.ones(80))


def test_schedules_are_named(sim: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="forward, reverse and random:SEED, not 'sideways'"):
        sim.set_schedule("sideways")
    sim.set_schedule(None)
    monkeypatch.setenv("CAMK_SIM_SCHEDULE", "random:x")
    with pytest.raises(library.SimulationError, match="not 'random:x'"):
        dot(sim)
    monkeypatch.setenv("CAMK_SIM_SCHEDULE", "random:5")
    assert dot(sim)[0] == dot(sim)[0]  # the same seed is the same order, to the last bit
