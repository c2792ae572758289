# SPDX-License-Identifier: MIT
"""Faults to put into the CUDA kernels, each found by what the tests of the simulated kernels look at."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`text` stands once in a file of csrc/cuda and is replaced; ON is true while the fault is switched on."""

    file: str
    text: str
    replacement: str
    finding: str  # what the run says


OVERRUN = "AddressSanitizer: heap-buffer-overflow"
UNLIKE = "values: .* not close"
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
    "Adam: rows beyond the last": Fault("optim.cu", "row < job.rows;", "(row < job.rows || ON);", OVERRUN),
    "Adam: rows that another row of the warp moves": Fault(
        "optim.cu", "& lanes_of_team) != 0;", "& (ON ? kAllLanes : lanes_of_team)) != 0;", f"{OVERRUN}|{UNLIKE}"
    ),
    "Adam: the count of the warp's first row": Fault(
        "optim.cu", "before, 0, team) + 1;", "before, 0, ON ? kWarp : team) + 1;", UNLIKE
    ),
    "Adam: corrections beyond the last": Fault(
        "optim.cu",
        "(step < job.last_correction ?",
        "(step < job.last_correction || ON ?",
        f"AddressSanitizer: |{UNLIKE}",  # far beyond: whatever is there
    ),
}
