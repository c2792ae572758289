// SPDX-License-Identifier: MIT
// First derivatives of the hash grid's value on CUDA, for 2 to 4 axes and float32 coordinates; the rest:
// hash_grid_any.cu.
//
// Towards the coordinates one thread takes a point through all levels: no atomics, the same bits every time. Towards
// the table, levels go in groups as in hash_grid.cu, float32 sums by vector reductions; a level whose sums fit into
// shared memory is summed there by each block and added to global memory once.
#include "cuda/hash_grid.cuh"
#include "cuda/hash_grid_launch.h"

namespace camk::cuda {
namespace {

// Estimated, not measured: 64 KB leave room for two blocks on a multiprocessor, and hold 16^3 rows of 4 features.
constexpr int kSharedBytes = 64 << 10, kSharedThreads = 512, kSharedBlocksPerMultiprocessor = 2;
// A block must add this many times more rows than it writes back at its end.
constexpr int kSharedGain = 4;

template <class T, int D, int F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) coordinates(const __grid_constant__ Job<float> job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.points) return;
  const auto point = settle_point<D>(job, i);
  if (job.accumulate && point.levels <= 0) return;
  Vec<float, D> gx{};
#pragma unroll 1
  for (int l = 0; l < point.levels && !point.dead(); ++l) {
    const auto& record = job.level[l];
    const Corners<D> s(level_of<D>(record, D), D, point.x, job.interpolation);
#pragma unroll 1
    for (int f = 0; f < job.features; f += F) {
      const int64_t at = i * job.channels + int64_t(job.first_level + l) * job.features + f;
      const T* rows = static_cast<const T*>(job.values) + record.first_row * job.features + f;
      const Vec<float, F> g = load_row<F, float>(static_cast<const T*>(job.g) + at, job.storage);
      math::grid_backward_x(s, g, Fetch<T, F>{rows, job.features, job.storage}, gx);
    }
  }
#pragma unroll
  for (int a = 0; a < D; ++a) {
    float* to = job.gx + i * D + a;
    const float found = point.levels > 0 ? point.mend(gx[a], a) : 0.0f;
    *to = job.accumulate ? *to + found : found;
  }
}

// add: makes the adder of a feature group.
template <int D, int F, class MakeAdder>
CAMK_DEVICE void add_point(const Job<float>& job, const Point<float, D>& point, int64_t i, int l, MakeAdder adder) {
  if (l >= point.levels || point.dead()) return;
  const Corners<D> s(level_of<D>(job.level[l], D), D, point.x, job.interpolation);
#pragma unroll 1
  for (int f = 0; f < job.features; f += F) {
    const int64_t at = i * job.channels + int64_t(job.first_level + l) * job.features + f;
    math::grid_backward_table(s, load_aligned<F, float>(job.g, job.storage, at), adder(f));
  }
}

template <int D, int F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) table(const __grid_constant__ Job<float> job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.points) return;
  const auto point = settle_point<D>(job, i);
  const int first = int(blockIdx.y) * job.levels_per_thread, last = min(first + job.levels_per_thread, job.n_levels);
#pragma unroll 1
  for (int l = first; l < last; ++l) {
    if (job.level[l].in_shared) continue;
    float* rows = static_cast<float*>(job.sums) + job.level[l].first_row * job.features;
    add_point<D, F>(job, point, i, l, [&](int f) { return Add<F>{rows + f, job.features}; });
  }
}

// blockIdx.y: the level.
template <int D, int F>
__global__ void __launch_bounds__(kSharedThreads, 1) table_in_shared(const __grid_constant__ Job<float> job) {
  CAMK_DYNAMIC_SHARED(float, sums);
  const int l = int(blockIdx.y);
  if (!job.level[l].in_shared) return;
  const int count = int(job.level[l].size) * F;
  for (int k = threadIdx.x; k < count; k += kSharedThreads) sums[k] = 0.0f;
  __syncthreads();
  for (int64_t i = int64_t(blockIdx.x) * kSharedThreads + threadIdx.x; i < job.points;
       i += int64_t(gridDim.x) * kSharedThreads) {
    add_point<D, F>(job, settle_point<D>(job, i), i, l, [&](int) { return AddShared<F>{sums}; });
  }
  __syncthreads();
  constexpr int W = F == 1 ? 2 : 4;  // a level has an even number of rows
  float* rows = static_cast<float*>(job.sums) + job.level[l].first_row * F;
  for (int k = W * int(threadIdx.x); k < count; k += W * kSharedThreads) {
    bool any = false;
#pragma unroll
    for (int w = 0; w < W; ++w) any |= sums[k + w] != 0.0f;  // also where NaN
    if (any) reduce_add_n<W>(rows + k, sums + k);
  }
}

// Marks the levels to be summed in shared memory; returns how many points a block of them takes, 0 if there are none.
int64_t choose_shared(Job<float>& job, size_t& bytes) {
  int64_t points_per_block = 0;
  const int64_t corners = int64_t(1) << job.dims;
  for (int l = 0; l < std::min(job.n_levels, job.active_levels - job.first_level); ++l) {
    JobLevel<float>& level = job.level[l];
    const int64_t size = int64_t(level.size), needed = size * job.features * int64_t(sizeof(float));
    level.in_shared = needed <= kSharedBytes && job.points * corners >= kSharedGain * size;
    if (!level.in_shared) continue;
    bytes = std::max(bytes, size_t(needed));
    points_per_block = std::max(points_per_block, divide_up(kSharedGain * size, corners));
  }
  const int64_t blocks = kSharedBlocksPerMultiprocessor * device_number(cudaDevAttrMultiProcessorCount);
  return points_per_block ? std::max(points_per_block, divide_up(job.points, blocks)) : 0;
}

template <int D, int F>
cudaError_t launch_regular_table(Job<float>& job, cudaStream_t stream) {
  size_t bytes = 0;
  if (D <= 3 && job.features == F) {
    if constexpr (D <= 3) {
      if (const int64_t points_per_block = choose_shared(job, bytes)) {
        const dim3 grid(unsigned(divide_up(job.points, points_per_block)), unsigned(job.n_levels));
        const cudaError_t error = launch(table_in_shared<D, F>, {grid, kSharedThreads, bytes, stream}, job);
        if (error != cudaSuccess) return error;
      }
    }
  }
  const dim3 grid(unsigned(divide_up(job.points, kThreads)), unsigned(divide_up(job.n_levels, job.levels_per_thread)));
  return launch(table<D, F>, {grid, kThreads, 0, stream}, job);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class S>
cudaError_t add_to_table(Job<S> job, Sums sums, cudaStream_t stream) {
  job.levels_per_thread =
      levels_per_thread(job.points, job.n_levels, kSectorBytes / (job.features * bytes_of(job.storage)));
  if constexpr (std::is_same_v<S, float>) {
    if (sums == Sums::kFast && job.g && !job.gj && !job.v && is_regular(job)) {
      return with_regular<false>(job, [&]<class T, int D, int F>() { return launch_regular_table<D, F>(job, stream); });
    }
  }
  return launch_any_table(job, sums, stream);
}

}  // namespace

bool is_regular(const Job<float>& job) {
  const bool axes = job.dims >= 2 && job.dims <= 4, nearest = job.interpolation == math::Interpolation::kNearest;
  const bool features = job.features == 1 || job.features == 2 || job.features % 4 == 0;
  if (!axes || nearest || !features || job.storage == Storage::kDouble) return false;
  for (int l = 0; l < job.n_levels; ++l) {
    if (job.level[l].first_row % 2 != 0 || job.level[l].size % 2 != 0) return false;
  }
  const void* words[] = {job.values, job.g, job.y, job.j, job.sums};
  return std::all_of(words, words + 5, aligned);
}

cudaError_t launch_coordinates(Job<float> job, cudaStream_t stream) {
  if (!job.g || job.gj || job.v || !is_regular(job)) return launch_any_coordinates(job, stream);
  const dim3 grid(unsigned(divide_up(job.points, kThreads)));
  return with_regular<true>(
      job, [&]<class T, int D, int F>() { return launch(coordinates<T, D, F>, {grid, kThreads, 0, stream}, job); });
}
cudaError_t launch_coordinates(Job<double> job, cudaStream_t stream) { return launch_any_coordinates(job, stream); }

cudaError_t launch_table(Job<float> job, Sums sums, cudaStream_t stream) { return add_to_table(job, sums, stream); }
cudaError_t launch_table(Job<double> job, Sums sums, cudaStream_t stream) { return add_to_table(job, sums, stream); }

}  // namespace camk::cuda
