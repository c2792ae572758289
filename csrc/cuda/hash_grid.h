// SPDX-License-Identifier: MIT
// What the hash-grid kernels are told, and the launchers. No torch and no CUDA syntax: the glue to PyTorch includes it
// too.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/storage.h"
#include "cuda/sums.h"
#include "math/hash_grid.h"

namespace camk::cuda {

// Levels of one launch: their records travel as kernel arguments, of which 4 KB are certain to exist.
inline constexpr int kLevelsPerLaunch = 32;

template <class S>
struct JobLevel {
  S scale[math::kMaxDims], shift;
  uint32_t stride[math::kMaxDims], size;
  int64_t first_row;
  bool hashed, ceil_corner;
  bool in_shared;  // its gradient is summed in shared memory
};

// One launch: some levels, all points. S: coordinate arithmetic. Null pointers stand for what is not there.
template <class S>
struct Job {
  int64_t points, channels;  // channels: levels * features, of all levels
  int dims, features;
  int first_level, n_levels;  // of this launch
  int active_levels;          // of the grid; the others give 0
  int levels_per_thread;      // of kernels that give each thread several levels of a point; set by the launcher
  math::Interpolation interpolation;
  math::Outside outside;
  Storage storage;        // of table, values, g, y
  bool accumulate;        // gx already holds what earlier launches found
  const S* x;             // [points, dims]
  const int32_t* counts;  // [points] levels of each point
  const void* values;     // [rows, features] what the value interpolates: the table, or the cotangent of its gradient
  const void* table;      // [rows, features] what gj and v are about
  const void* g;          // [points, channels] gradient of the value
  const S* gj;            // [points, channels, dims] gradient of the Jacobian
  const S* v;             // [points, dims] cotangent of the coordinate gradient
  void* y;                // [points, channels]
  S* j;                   // [points, channels, dims]
  S* gx;                  // [points, dims]
  void* sums;             // [rows, features] table gradient: float64 for a float64 table, else float32; zero at first
  int64_t* fixed;         // [rows, features] the same in fixed point; zero at first
  uint64_t* largest;      // bits of the largest finite float64 that is added to sums; zero at first
  JobLevel<S> level[kLevelsPerLaunch];
};

// y (and j): value or Jacobian of `values`, plus, where v is given, the derivative of `table` along v.
cudaError_t launch_rows(Job<float> job, cudaStream_t stream);
cudaError_t launch_rows(Job<double> job, cudaStream_t stream);

// gx: gradient of <g, value of `values`> + <gj, Jacobian of `table`>; with v, of <g, derivative of `table` along v>.
cudaError_t launch_coordinates(Job<float> job, cudaStream_t stream);
cudaError_t launch_coordinates(Job<double> job, cudaStream_t stream);

// The same gradient in the table; with v, that along v alone.
cudaError_t launch_table(Job<float> job, Sums sums, cudaStream_t stream);
cudaError_t launch_table(Job<double> job, Sums sums, cudaStream_t stream);

// Whether the kernels for 2 to 4 axes and 1, 2 or a multiple of 4 features apply: whole 16-byte words, pairs of rows.
bool is_regular(const Job<float>& job);
// The general kernels, which take everything else and the second order.
template <class S>
cudaError_t launch_any_rows(const Job<S>& job, cudaStream_t stream);
template <class S>
cudaError_t launch_any_coordinates(const Job<S>& job, cudaStream_t stream);
template <class S>
cudaError_t launch_any_table(const Job<S>& job, Sums sums, cudaStream_t stream);

}  // namespace camk::cuda
