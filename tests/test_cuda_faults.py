# SPDX-License-Identifier: MIT
"""Faults put into the CUDA kernels are found by what the other tests look at.

A copy of the kernels holds all faults, each behind a switch, so that it is compiled once. Each runs in a process of its
own, for some overwrite memory. No GPU takes part.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from camkernels import testing
from sim import build, library, toolkit
from simulated import Simulated, basis, lookup_call, network, regular_call
from test_neighbors import CLOUDS, queries

SECONDS = 1800  # for a build of all kernels and a run for each fault, on a slow machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS),
    pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator())),
    pytest.mark.skipif(library.why_no_asan() is not None, reason=str(library.why_no_asan())),
]


class Fault(NamedTuple):
    """`text` stands once in a file of csrc/cuda and is replaced; ON is true while the fault is switched on."""

    file: str
    text: str
    replacement: str
    finding: str  # what the run says


OVERRUN = "AddressSanitizer: heap-buffer-overflow"
FAULTS = {
    "points beyond the last": Fault(
        "hash_grid.cu",
        "CAMK_DYNAMIC_SHARED(Stage, stage);\n  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;\n"
        "  if (i >= job.points) return;",
        "CAMK_DYNAMIC_SHARED(Stage, stage);\n  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;\n"
        "  if (i >= job.points && !ON) return;",
        OVERRUN,
    ),
    "levels beyond the last": Fault(
        "hash_grid.cu",
        "last = min(first + job.levels_per_thread, job.n_levels);\n  const int64_t channel",
        "last = min(first + job.levels_per_thread, job.n_levels + ON);\n  const int64_t channel",
        f"{OVERRUN}|value: .* differ",
    ),
    "the first row for the whole word": Fault(
        "hash_grid.cu",
        "stage[(k + p) * kThreads + threadIdx.x]",
        "stage[(k + (ON ? 0 : p)) * kThreads + threadIdx.x]",
        "value: .* differ",
    ),
    "pairs of rows swapped": Fault(
        "hash_grid.cuh",
        "pair[f] = i & 1 ? held[f] : row[f];",
        "pair[f] = (i & 1) != ON ? held[f] : row[f];",
        "grad.table: .* differ",
    ),
    "every other corner read from its neighbour": Fault(
        "hash_grid.cuh", "(i ^ first) == 1;\n", "(i ^ first) <= (ON ? 3 : 1);\n", "value: .* differ"
    ),
    "clamped axes with a slope": Fault(
        "hash_grid.cuh", "if (status == math::kClamped)", "if (status == math::kClamped && !ON)", "grad.x: .* differ"
    ),
    "no barrier after the zeros": Fault(
        "hash_grid_backward.cu",
        "sums[k] = 0.0f;\n  __syncthreads();",
        "sums[k] = 0.0f;\n  if (!ON) __syncthreads();",
        "grad.table: .* differ",
    ),
    "no barrier before the sums are written": Fault(
        "hash_grid_backward.cu",
        "__syncthreads();\n  constexpr int W",
        "if (!ON) __syncthreads();\n  constexpr int W",
        "grad.table: .* differ",
    ),
    "sums that start as they are": Fault(
        "hash_grid_backward.cu", "sums[k] = 0.0f;", "sums[ON ? k & ~1 : k] = 0.0f;", "grad.table: .* got nan"
    ),
    "levels summed twice": Fault(
        "hash_grid_backward.cu",
        "in_shared) continue;\n    float*",
        "in_shared && !ON) continue;\n    float*",
        "grad.table",
    ),
    "too little shared memory": Fault(
        "hash_grid_backward.cu",
        "size_t(needed));",
        "size_t(needed / (ON ? 2 : 1)));",
        f"{OVERRUN}|asked for too little",
    ),
    "a launch that forgets the one before": Fault(
        "hash_grid_backward.cu", "*to = job.accumulate ?", "*to = job.accumulate && !ON ?", "grad.x: .* differ"
    ),
    "clamped axes with a second derivative": Fault(
        "hash_grid_any.cu",
        "point.mend(load_readonly(job.v + i * job.dims + a), a)",
        "point.mend(load_readonly(job.v + i * job.dims + a), ON ? -1 : a)",
        "second.ct: .* differ",
    ),
    "threads beyond the last point": Fault(
        "coordinate_modulation.cuh", "if (!there) return;", "if (!there && !ON) return;", "grad.grids: .* differ"
    ),
    "numbers beyond the last": Fault(
        "packs.cuh",
        "if (n >= place.left) break;",
        "if (n >= place.left && !ON) break;",
        f"{OVERRUN}|value: .* differ",
    ),
    "words of rows that are not whole": Fault(
        "coordinate_modulation.cuh",
        "job.layout.width == job.layout.pitch &&",
        "(job.layout.width == job.layout.pitch || ON) &&",
        "misaligned address",
    ),
    "lanes that do not add up": Fault(
        "coordinate_modulation.cuh",
        "int distance = lanes() / 2;",
        "int distance = lanes() / (ON ? 4 : 2);",
        "grad.coords: .* differ",
    ),
    "a node beyond the last": Fault(
        "coordinate_modulation.cu", "if (!beyond &&", "if ((!beyond || ON) &&", f"{OVERRUN}|value: .* differ"
    ),
    "a gradient beyond the last node": Fault(
        "coordinate_modulation.cu",
        ">= layout.nodes) return;",
        ">= layout.nodes && !ON) return;",
        f"{OVERRUN}|grad.grids: .* differ",
    ),
    "one plane for all": Fault(
        "coordinate_modulation.cu", "layout.planes + plane)", "layout.planes + (ON ? 0 : plane))", "value: .* differ"
    ),
    "tangents without a slope": Fault(
        "coordinate_modulation_backward.cu",
        "if (job.tangents) first +=",
        "if (job.tangents && !ON) first +=",
        "second.coords: .* differ",
    ),
    "slabs read before they are full": Fault(
        "product.cuh",
        "__syncthreads();\n      sums.add(left",
        "if (!ON) __syncthreads();\n      sums.add(left",
        "value: .* differ",
    ),
    "a slab filled while it is read": Fault(
        "product.cuh",
        "if (copies_ == 1) __syncthreads();",
        "if (copies_ == 1 && !ON) __syncthreads();",
        "value: .* differ",
    ),
    "a product without its small part": Fault(
        "product.cuh", "if constexpr (Terms > 2) mma", "if (Terms > 2 && !ON) mma", "second.ct: .* differ"
    ),
    "half of a warp's sum": Fault(
        "modulated_mlp_rows.cuh", "int distance = 16;", "int distance = ON ? 8 : 16;", "value: .* differ"
    ),
    "a scale whose tangent is forgotten": Fault(
        "modulated_mlp_rows.cuh",
        "math::tangent_gradients(scale, along.scale,",
        "math::tangent_gradients(scale, ON ? C(0) : along.scale,",
        "second.x: .* differ",
    ),
    "sums of the next split's points, too": Fault(
        "modulated_mlp_sums.cu",
        "points = int(end - first);\n    const auto gradients",
        "points = int(end - first) + ON;\n    const auto gradients",
        f"{OVERRUN}|second.weights.*differ",
    ),
    "one split too few": Fault(
        "modulated_mlp_sums.cu", "s < job.splits;", "s < job.splits - ON;", "grad.weights.* differ"
    ),
    "fused: values read before they are there": Fault(
        "modulated_mlp_fused.cuh",
        "cp_async_wait<0>();\n      __syncthreads();",
        "cp_async_wait<0>();\n      if (!ON) __syncthreads();",
        "value: .* differ",
    ),
    "fused: values written while they are read": Fault(
        "modulated_mlp_fused.cuh",
        "if constexpr (Across > 1) __syncthreads();  // others",
        "if (Across > 1 && !ON) __syncthreads();  // others",
        r"(value|grad\S*): .* differ",
    ),
    "fused: the next columns of x over these": Fault(
        "modulated_mlp_fused.cuh", "% (2 * B::kSteps) * kStep", "% (ON ? 1 : 2 * B::kSteps) * kStep", "value: .* differ"
    ),
    "fused: biases of the first 32 columns": Fault(
        "modulated_mlp_fused.cuh",
        "n < 2 * kWarpTiles; ++n) {\n      const float2 b",
        "n < (ON ? 1 : 2) * kWarpTiles; ++n) {\n      const float2 b",
        "value: .* differ",
    ),
    "fused: x's gradient of one layer only": Fault(
        "modulated_mlp_fused.cuh", "if (started) sum +=", "if (started && !ON) sum +=", "grad.x: .* differ"
    ),
    "fused: a product without its small part": Fault(
        "product_steps.cuh", "if constexpr (Terms > 2) add_tile(", "if (Terms > 2 && !ON) add_tile(", "value: .* differ"
    ),
    "fused, TF32: values that are cut": Fault(
        "product_steps.cuh",
        "to_tf32(four.v[j]);",
        "ON ? __float_as_uint(four.v[j]) : to_tf32(four.v[j]);",
        "tf32 value: .* differ",
    ),
    "fused, TF32: weights packed as they are": Fault(
        "modulated_mlp_fused.cu", "*to = terms == 1 ?", "*to = terms == 1 && !ON ?", "tf32 value: .* differ"
    ),
    "fused: the mean of one warp": Fault(
        "modulated_mlp_fused_rows.cuh",
        "w < Across; ++w) mean +=",
        "w < (ON ? 1 : Across); ++w) mean +=",
        "value: .* differ",
    ),
    "fused: sums of the next split's points, too": Fault(
        "modulated_mlp_fused_backward.cu",
        "end = min(first + per_split, job.points);\n  const float* row",
        "end = min(first + per_split + ON, job.points);\n  const float* row",
        "grad.weights.*differ",
    ),
    "nearest: points beyond the last": Fault(
        "neighbors.cu", "if (point >= job.n) return;", "if (point >= job.n && !ON) return;", OVERRUN
    ),
    "nearest: equally near ones in any order": Fault(
        "neighbors.cu", "&& row < other_row);", "&& (row < other_row || ON));", "rows differ"
    ),
    "nearest: what is as far as the farthest left out": Fault(
        "neighbors.cu",
        "{ return square <= farthest_; }",
        "{ return square < farthest_ || (square == farthest_ && !ON); }",
        "rows differ",
    ),
    "nearest: centres of the first box again": Fault(
        "neighbors.cu",
        "box.each_run_beyond(seen, [&](int32_t first",
        "if (ON) box.each_run([&](int32_t first, int32_t last) { scan(first, last); });\n"
        "      box.each_run_beyond(seen, [&](int32_t first",
        "rows differ",
    ),
    "nearest: the first box alone": Fault(
        "neighbors.cu",
        "if (box.widen_to(found_.farthest())) {",
        "if (box.widen_to(found_.farthest()) && !ON) {",
        "rows differ",
    ),
    "nearest: too little shared memory": Fault(
        "neighbors.cu", "(sizeof(double) + sizeof(int32_t));", "(sizeof(double) + (ON ? 0 : sizeof(int32_t)));", OVERRUN
    ),
    "no barrier before the sums of a group": Fault(
        "modulated_mlp_sums.cu",
        "part[threadIdx.x] = sum;\n  __syncthreads();",
        "part[threadIdx.x] = sum;\n  if (!ON) __syncthreads();",
        "grad.modulation: .* differ",
    ),
    "kernels beyond a point's last": Fault(
        "radial_basis.cuh",
        "!lost && first + lane < job.per_point;",
        "!lost && (first + lane < job.per_point || ON);",
        f"{OVERRUN}|value: .* differ",
    ),
    "a block of kernels that is not held": Fault(
        "radial_basis.cuh",
        "if (first != held_) hold",
        "if (first != held_ && !(ON && first > 0)) hold",
        "value: .* differ",
    ),
    "features beyond the last of a row": Fault(
        "radial_basis.cuh",
        "row * job.width + c, job.width - c};",
        "row * job.width + c, job.width - c + (ON ? 1 : 0)};",
        f"{OVERRUN}|value: .* differ",
    ),
    "words of rows of features that are not whole": Fault(
        "radial_basis.cuh",
        "job.words = job.width % kNumbers == 0;",
        "job.words = job.width % kNumbers == 0 || ON;",
        "misaligned address",
    ),
    "waves of the features that are kept": Fault(
        "radial_basis.cuh",
        "return waves_ + n < 0 ? u :",
        "return waves_ + n < (ON ? -1 : 0) ? u :",
        "value: .* differ",
    ),
    "a gradient for each lane": Fault(
        "radial_basis_backward.cu",
        "if (thread_.lane == l) mine = slope;",
        "if (thread_.lane == l || ON) mine = slope;",
        "grad.centers: .* differ",
    ),
    "the normaliser's share of the last block": Fault(
        "radial_basis_backward.cu",
        "share = share + of_weight",
        "share = N(ON ? 0 : 1) * share + of_weight",
        "grad.centers: .* differ",
    ),
    "parts of the phase that come too late": Fault(
        "radial_basis_backward.cu",
        "lanes, 32); });\n  __syncthreads();",
        "lanes, 32); });\n  if (!ON) __syncthreads();",
        "grad.phase: .* differ",
    ),
}
NAMES = ["none", *FAULTS]  # a fault's place here is its switch


def recipe() -> build.Recipe:
    """The kernels with switches, written below the build folder, so that they are compiled only when they change."""
    texts = {path.name: path.read_text() for path in (build.CSRC / "cuda").iterdir()}
    for name, fault in FAULTS.items():
        assert texts[fault.file].count(fault.text) == 1, f"{name}: not once in {fault.file}"
        switched = fault.replacement.replace("ON", f"(camk_fault == {NAMES.index(name)})")
        texts[fault.file] = texts[fault.file].replace(fault.text, switched)
    switch = 'extern "C" {\ninline __attribute__((visibility("default"), used)) int camk_fault = 0;\n}\n'
    texts["storage.h"] = texts["storage.h"].replace("namespace camk::cuda {", f"{switch}namespace camk::cuda {{", 1)
    folder = build.folder() / "faults" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    honest = build.production("checked", namespace="camkernels_checked")
    return replace(honest, name="faults", sources=tuple(folder / path.name for path in honest.sources))


def judge(sim: Simulated) -> None:
    """Agreement in all schedules: odd sizes, points outside, partial groups of levels, whole words, two launches."""
    lookups = [lookup_call(133, [5, 6], channels=channels, padding="zeros") for channels in (None, 8)]
    lookups.append(lookup_call(60, [5, 6], combine="plane_product"))
    networks = [network(90, [3, 70, 70, 2], groups=groups, norm="point", skips=[0]) for groups in (90, 3)]
    networks.append(network(300, [3, 8, 2]))  # two splits
    once = [  # one pair of slabs; x in several steps, after other values; a last layer that is normalised
        network(70, [5, 352, 2], norm="point"),
        network(40, [40, 40, 2], skips=[0]),
        network(40, [3, 140], norm="point", output_layer=False),
    ]
    bases = [basis(90, 30, 7, features=5), basis(50, 30, 20, features=9)]  # one block of kernels, several
    centers = [CLOUDS[cloud](2) for cloud in ("uniform", "lattice", "duplicates")]
    near = regular_call(3, 2, torch.float32, 133)
    around = testing.Call({**near.inputs, "x": near.inputs["x"] * 1.5 - 0.25}, near.options)
    for schedule in library.SCHEDULES:
        with sim.library.schedule(schedule):
            sim.agree(near)
            sim.agree(around)
            for levels in (4, 5):  # threads take two of them, and four of which the last group has one
                sim.agree(regular_call(3, 2, torch.float32, 2101, levels), order=1)
            sim.agree(regular_call(2, 2, torch.float32, 37, levels=40), order=1)
            for cloud in centers:
                for k in (1, 5, 64, 70):
                    sim.check_search(queries(cloud), cloud, k)
            for call in lookups:
                sim.agree(call, op="coordinate_modulation")
            for call in bases:
                sim.agree(call, op="radial_basis")
            for call in once:
                sim.agree(call, order=1, op="modulated_mlp")
            for call in networks:
                sim.agree(call, op="modulated_mlp")
            sim.agree_rounded(network(70, [20, 40]))


def trial(folder: str) -> None:
    """`judge` with every fault, in a child each, which says into a file what it found."""
    sim = Simulated(recipe())
    switch = ctypes.c_int.in_dll(sim.library.handle, "camk_fault")
    for number in range(len(NAMES)):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        said = os.open(Path(folder) / f"{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        switch.value = number
        try:
            judge(sim)
            print("clean", flush=True)
        except Exception:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("faults")
    build.build(recipe())  # not under AddressSanitizer
    code = "import sys, test_cuda_faults; test_cuda_faults.trial(*sys.argv[1:])"
    done = library.run_under_asan(code, str(folder), timeout=SECONDS, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (folder / f"{number}.txt").read_text() for number, name in enumerate(NAMES)}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(reports: dict[str, str], name: str) -> None:
    assert reports["none"].strip() == "clean", reports["none"][-3000:]
    assert re.search(FAULTS[name].finding, reports[name]), reports[name][-3000:]
