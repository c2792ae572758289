// SPDX-License-Identifier: MIT
// Value and Jacobian of the hash grid on CUDA, for 2 to 4 axes and float32 coordinates; the rest: hash_grid_any.cu.
//
// blockIdx.x counts tiles of points, blockIdx.y groups of levels, so that blocks go through the levels in order and the
// tables of a few levels at a time stay in the L2 cache. A thread takes one point through the levels of a group, as
// many as fill a 32-byte sector of its output row.
#include "cuda/hash_grid.cuh"
#include "cuda/hash_grid_launch.h"

namespace camk::cuda {
namespace {

// The output rows of a thread, gathered in shared memory and written in words of 16 bytes; launch_regular stages only
// where they fill whole words.
template <class T, int F>
struct Staged {
  Row<T, F>* stage;
  T* out;
  Storage kind;

  CAMK_DEVICE void put(int k, const Vec<float, F>& row) const {
    if (stage != nullptr) {
      stage[k * kThreads + threadIdx.x] = pack_row<T, F>(row, kind);
    } else {
      store_row<T, F>(out + k * F, row, kind);
    }
  }
  CAMK_DEVICE void flush(int count) const {
    if constexpr (F * sizeof(T) < 16) {
      if (stage == nullptr) return;
      constexpr int kPerWord = 16 / int(sizeof(Row<T, F>));
#pragma unroll 1
      for (int k = 0; k < count; k += kPerWord) {
        Row<T, F * kPerWord> word;
#pragma unroll
        for (int p = 0; p < kPerWord; ++p) {
          memcpy(word.v + p * F, stage[(k + p) * kThreads + threadIdx.x].v, sizeof(Row<T, F>));
        }
        store_streaming(reinterpret_cast<Row<T, F * kPerWord>*>(out + k * F), word);
      }
    }
  }
};

// What a level gives for a point: nothing, NaN, or what the formula adds to the zeros it is given.
enum class Outcome { kZero, kNan, kFormula };

template <class P>
CAMK_DEVICE Outcome outcome(const P& point, int level) {
  if (level >= point.levels || (point.zeroed && !point.broken)) return Outcome::kZero;
  return point.broken ? Outcome::kNan : Outcome::kFormula;
}

template <int F>
CAMK_DEVICE void fill(Vec<float, F>& row, float number) {
#pragma unroll
  for (int f = 0; f < F; ++f) row[f] = number;
}

template <class T, int D, int F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) value(const __grid_constant__ Job<float> job, int staged) {
  using Stage = Row<T, F>;
  CAMK_DYNAMIC_SHARED(Stage, stage);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.points) return;
  const auto point = settle_point<D>(job, i);
  const int first = int(blockIdx.y) * job.levels_per_thread, last = min(first + job.levels_per_thread, job.n_levels);
  const int64_t channel = int64_t(job.first_level + first) * job.features;
  const Staged<T, F> out{staged ? stage : nullptr, static_cast<T*>(job.y) + i * job.channels + channel, job.storage};
  int k = 0;
#pragma unroll 1
  for (int l = first; l < last; ++l) {
    const auto& record = job.level[l];
    const Corners<D> s(level_of<D>(record, D), D, point.x, job.interpolation);
    const Outcome what = outcome(point, l);
#pragma unroll 1
    for (int f = 0; f < job.features; f += F, ++k) {
      Vec<float, F> y{};
      if (what == Outcome::kNan) fill(y, NAN);
      if (what == Outcome::kFormula) {
        const T* rows = static_cast<const T*>(job.values) + record.first_row * job.features + f;
        math::grid_value(s, Fetch<T, F>{rows, job.features, job.storage}, y);
      }
      out.put(k, y);
    }
  }
  out.flush(k);
}

// N numbers at an address that N numbers divide.
template <int N>
CAMK_DEVICE void store_numbers(float* to, const Vec<float, N>& numbers) {
  constexpr int W = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < N; k += W) {
    Row<float, W> word;
#pragma unroll
    for (int w = 0; w < W; ++w) word.v[w] = numbers[k + w];
    store_streaming(reinterpret_cast<Row<float, W>*>(to + k), word);
  }
}

template <class T, int D, int F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) jacobian(const __grid_constant__ Job<float> job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.points) return;
  const auto point = settle_point<D>(job, i);
  const int first = int(blockIdx.y) * job.levels_per_thread, last = min(first + job.levels_per_thread, job.n_levels);
#pragma unroll 1
  for (int l = first; l < last; ++l) {
    const auto& record = job.level[l];
    const Corners<D> s(level_of<D>(record, D), D, point.x, job.interpolation);
    const Outcome what = outcome(point, l);
#pragma unroll 1
    for (int f = 0; f < job.features; f += F) {
      Vec<float, F> y{};
      Vec<Vec<float, F>, D> slopes{};
      if (what == Outcome::kNan) {
        fill(y, NAN);
        for (int a = 0; a < D; ++a) fill(slopes[a], NAN);
      }
      if (what == Outcome::kFormula) {
        const T* rows = static_cast<const T*>(job.values) + record.first_row * job.features + f;
        math::grid_jacobian(s, Fetch<T, F>{rows, job.features, job.storage}, y, slopes);
      }
      const int64_t at = i * job.channels + int64_t(job.first_level + l) * job.features + f;
      store_row<T, F>(static_cast<T*>(job.y) + at, y, job.storage);
      Vec<float, F * D> flat;  // [F][D]
#pragma unroll
      for (int k = 0; k < F * D; ++k) {
        flat[k] = point.clamped >> (k % D) & 1 && what == Outcome::kFormula ? 0.0f : slopes[k % D][k / D];
      }
      store_numbers(job.j + at * D, flat);
    }
  }
}

template <class T, int D, int F>
cudaError_t launch_regular(const Job<float>& job, cudaStream_t stream) {
  const unsigned tiles = unsigned(divide_up(job.points, kThreads)),
                 groups = unsigned(divide_up(job.n_levels, job.levels_per_thread));
  const dim3 grid(tiles, groups);
  if constexpr (D <= 3) {
    if (job.j) return launch(jacobian<T, D, F>, {grid, kThreads, 0, stream}, job);
  }
  const int64_t row = int64_t(job.features) * int64_t(sizeof(T)), group = job.levels_per_thread * row;
  // A last group of fewer levels is whole words too, for all levels are, and those of an earlier launch.
  const bool words = group % 16 == 0 && job.channels * int64_t(sizeof(T)) % 16 == 0;
  // A level of more than a sector fills sectors anyway, and many features would ask for more shared memory than exists.
  const bool staged = words && group <= kSectorBytes && F * sizeof(T) < 16;
  const size_t bytes = staged ? size_t(kThreads * group) : 0;
  return launch(value<T, D, F>, {grid, kThreads, bytes, stream}, job, int(staged));
}

}  // namespace

template <class S>
static cudaError_t rows(Job<S> job, cudaStream_t stream) {
  const int row = job.features * bytes_of(job.storage);
  job.levels_per_thread = levels_per_thread(job.points, job.n_levels, kSectorBytes / row);
  if constexpr (std::is_same_v<S, float>) {
    if (job.values && !job.v && !(job.j && job.dims == 4) && is_regular(job)) {
      return with_regular<true>(job, [&]<class T, int D, int F>() { return launch_regular<T, D, F>(job, stream); });
    }
  }
  return launch_any_rows(job, stream);
}

cudaError_t launch_rows(Job<float> job, cudaStream_t stream) { return rows(job, stream); }
cudaError_t launch_rows(Job<double> job, cudaStream_t stream) { return rows(job, stream); }

}  // namespace camk::cuda
