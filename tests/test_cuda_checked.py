# SPDX-License-Identifier: MIT
"""One run of the CUDA kernels in the simulator reaches their lines, and no byte beyond their memory.

Both are seen by one build, with AddressSanitizer and line counters, in a process of its own. No GPU takes part.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camkernels import _neighbor_cells, testing
from conftest import deterministic
from sim import build, coverage, library, toolkit
from simulated import CASES, Simulated, basis, lookup_call, network, regular_call, shifted
from test_cuda_simulated_optim import ROWS, drawn
from test_cuda_simulated_optim import run as adam_step
from test_neighbors import CLOUDS, queries
from test_optim import WIDTHS, random_state

SECONDS = 1800  # for a build of all kernels, perhaps after another one, and a run of them, on a slow machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS),
    pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator())),
    pytest.mark.skipif(library.why_no_asan() is not None, reason=str(library.why_no_asan())),
]
FILES = {
    "hash_grid": ("hash_grid.cu", "hash_grid_any.cu", "hash_grid_backward.cu", "hash_grid.cuh", "hash_grid_launch.h"),
    "coordinate_modulation": (
        "coordinate_modulation.cu",
        "coordinate_modulation_backward.cu",
        "coordinate_modulation.cuh",
    ),
    "modulated_mlp": (
        "modulated_mlp.cu",
        "modulated_mlp_backward.cu",
        "modulated_mlp_sums.cu",
        "modulated_mlp.cuh",
        "modulated_mlp_rows.cuh",
        "product.cuh",
    ),
    "fused modulated_mlp": (
        "modulated_mlp_fused.cu",
        "modulated_mlp_fused_backward.cu",
        "modulated_mlp_fused.cuh",
        "modulated_mlp_fused_rows.cuh",
        "modulated_mlp_fused_launch.h",
        "product_steps.cuh",
    ),
    "radial_basis": ("radial_basis.cu", "radial_basis_backward.cu", "radial_basis.cuh"),
    "nearest": ("neighbors.cu",),
    "optim": ("optim.cu",),
    "shared": ("sums.cu", "sums.cuh", "storage.cuh", "packs.cuh"),
}


def recipe() -> build.Recipe:
    return build.production("checked", namespace="camkernels_checked")


def infinite_gradients(sim: Simulated, dtype: torch.dtype) -> None:
    call = regular_call(2, 1, dtype, 30)
    x, table = call.inputs["x"].to(dtype), call.inputs["table"].requires_grad_()
    with deterministic():
        y = sim.hash_grid(x, table, call.options["geometry"])
        (gradient,) = torch.autograd.grad(y, table, torch.full_like(y, torch.inf))
    assert gradient.isinf().any()


def take_turns(sim: Simulated, cases: Sequence[testing.Case]) -> None:
    """Cases, each in one schedule and dtype, half of them with repeatable sums."""
    for k, case in enumerate(cases):
        with sim.library.schedule(library.SCHEDULES[k % 3]), (deterministic if k % 2 else nullcontext)():
            sim.check(case, (torch.float32, torch.float16, torch.float64)[k // 2 % 3])


def exercise_hash_grid(sim: Simulated) -> None:
    take_turns(sim, CASES[::5])
    for dims in (2, 3, 4):
        for features in (1, 2, 3, 4, 8):
            for dtype in (torch.float32, torch.bfloat16):
                sim.agree(regular_call(dims, features, dtype, 133))
    sim.agree(regular_call(3, 2, torch.float32, 2101), order=1)  # threads that take several levels
    sim.agree(regular_call(2, 2, torch.float32, 37, levels=40))  # several launches
    for n in (0, 1):
        sim.agree(regular_call(3, 2, torch.float32, n))
    call = regular_call(3, 2, torch.float32, 50)
    sim.agree(testing.Call({**call.inputs, "table": shifted(call.inputs["table"])}, call.options))
    for dtype in (torch.float32, torch.float64):
        infinite_gradients(sim, dtype)


def exercise_coordinate_modulation(sim: Simulated) -> None:
    op = "coordinate_modulation"
    take_turns(sim, testing.cases(op))
    for nodes in ([7], [5, 6], [3, 4, 2], [3, 2, 2, 3]):
        for channels in (None, 8):
            for dtype in (torch.float32, torch.bfloat16):
                sim.agree(lookup_call(133, nodes, dtype, channels=channels, padding="zeros"), op=op)
    for dtype in (torch.float32, torch.float64):
        sim.agree(lookup_call(37, [5, 6], dtype, combine="plane_product"), op=op)
    for n in (0, 1):
        sim.agree(lookup_call(n, [5, 6]), op=op)
    call = lookup_call(50, [5, 6], channels=4)
    sim.agree(replace(call, inputs={name: shifted(t) for name, t in call.inputs.items()}), op=op)


def exercise_modulated_mlp(sim: Simulated) -> None:
    op = "modulated_mlp"
    take_turns(sim, testing.cases(op)[::3])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        sim.agree(
            network(70, [5, 450, 270, 3], dtype, norm="point", skips=[0]), order=0, op=op
        )  # rows in global memory
    sim.agree(network(70, [5, 352, 2], norm="point"), order=0, op=op)  # one pair of slabs
    for width in (33, 100, 250):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            sim.agree(network(70, [20, width, width, 3], dtype, norm="point", skips=[0]), order=1, op=op)
    sim.agree(
        network(70, [70, 24, 24], skips=[1], output_layer=False), order=1, op=op
    )  # x where it cannot be read in words
    sim.agree(network(1100, [3, 20, 5], groups=2), order=1, op=op)  # several launches
    for channels in (False, True):  # more layers than arguments hold; groups of points in several launches
        sim.agree(network(270, [3, *[26] * 29, 2], torch.float64, groups=3, channels=channels, norm="point"), op=op)
    for groups in (70, 1):
        sim.agree(network(70, [3, 40, 24, 2], torch.float16, groups=groups), op=op)
    for n in (0, 1):
        sim.agree(network(n, [3, 8, 8, 2], groups=n), op=op)
    call = network(50, [3, 17, 2], groups=50)
    sim.agree(replace(call, inputs={name: shifted(t) for name, t in call.inputs.items()}), op=op)


def exercise_radial_basis(sim: Simulated) -> None:
    op = "radial_basis"
    take_turns(sim, testing.cases(op))
    for dims in (1, 2, 3, 4):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for context in (nullcontext, deterministic):
                with context():
                    sim.agree(basis(50, 20, 7, dtype, dims=dims), op=op)
    for features in (5, 160):  # rows that are not whole packs; several packs per lane
        sim.agree(basis(50, 20, 30, features=features), op=op)
    sim.agree(basis(50, 20, 3, torch.float16, wide=True), op=op)
    for n in (0, 1):
        sim.agree(basis(n, 20, 3), op=op)
    call = basis(50, 20, 3)
    sim.agree(replace(call, inputs={name: shifted(t) for name, t in call.inputs.items()}), op=op)


def exercise_nearest(sim: Simulated) -> None:
    for cloud in ("uniform", "duplicates", "clusters"):
        for dims in (1, 2, 3, 4):
            for dtype in (torch.float32, torch.float64):
                centers = CLOUDS[cloud](dims).to(dtype)
                for k in (1, 64, 65):
                    sim.check_search(queries(centers).to(dtype), centers, k)
    for k in (3, 70):
        x = torch.full((2, 3), torch.nan)
        assert sim.search(x, *_neighbor_cells.build(torch.rand(90, 3)), k)[0].eq(-1).all()
    sim.check_search(torch.rand(0, 3), torch.rand(90, 3), 4)


def exercise_optim(sim: Simulated) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for width in WIDTHS:
            for rows in (None, torch.tensor([5, 0, 300])):
                gradient = drawn(width, dtype, 0.3) if rows is None else drawn(width, dtype, 0.3)[rows]
                adam_step(sim, random_state(ROWS, width, dtype), gradient, rows)


def exercise() -> None:
    """Every kernel: forward, backward, Jacobian, second order; odd sizes, tensors that begin anywhere."""
    sim = Simulated(recipe())
    exercise_hash_grid(sim)
    exercise_coordinate_modulation(sim)
    exercise_modulated_mlp(sim)
    exercise_radial_basis(sim)
    exercise_nearest(sim)
    exercise_optim(sim)
    sim.library.write_coverage()
    print("clean")


@pytest.fixture(scope="module")
def built() -> Path:
    path = build.build(recipe())
    coverage.forget(path)
    return path


@pytest.fixture(scope="module")
def run(built: Path) -> subprocess.CompletedProcess[str]:
    return library.run_under_asan(
        "import test_cuda_checked; test_cuda_checked.exercise()", timeout=SECONDS, OMP_NUM_THREADS="1"
    )


def test_address_sanitizer(run: subprocess.CompletedProcess[str]) -> None:
    assert run.stdout.strip() == "clean", run.stderr[-6000:]


@pytest.mark.skipif(coverage.gcov() is None, reason="line coverage needs gcov beside g++")
@pytest.mark.parametrize("names", FILES.values(), ids=FILES)
def test_line_coverage(built: Path, run: subprocess.CompletedProcess[str], names: tuple[str, ...]) -> None:
    files = {file.path.name: file for file in coverage.read(built) if file.path.name in names}
    assert sorted(files) == sorted(names)
    total, missed = (sum(n) for n in zip(*((f.lines, len(f.uncovered)) for f in files.values()), strict=True))
    assert 100 * (total - missed) / total >= 95, "\n".join(map(str, files.values()))
