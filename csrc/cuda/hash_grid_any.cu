// SPDX-License-Identifier: MIT
// The hash grid on CUDA for every number of axes and features, float64, any alignment, nearest lookups; and the second
// order, of which a backward pass through a gradient or a Jacobian consists. One kernel per kind of output; what is
// asked for is decided at run time, corners are a loop, and features go in groups of F.
#include "cuda/hash_grid.cuh"
#include "cuda/hash_grid_launch.h"
#include "cuda/sums.cuh"

namespace camk::cuda {
namespace {

// What the kernels below share: one thread, one point. D = 0 leaves the axes, and nearest lookups, to run time.
template <class C, int D, int F>
struct Thread {
  using Corners = math::Stencil<D, C, false, false>;
  static constexpr int kAxes = Corners::kAxes;
  using Axes = Vec<C, kAxes>;
  using Numbers = Vec<C, F>;
  using Slopes = Vec<Numbers, kAxes>;

  const Job<C>& job;
  int64_t i;
  Point<C, D> point;

  CAMK_DEVICE Thread(const Job<C>& work, int64_t index) : job(work), i(index), point(settle_point<D>(work, index)) {}

  CAMK_DEVICE Corners corners(int l) const {
    return Corners(level_of<D>(job.level[l], job.dims), job.dims, point.x, job.interpolation);
  }
  CAMK_DEVICE int64_t channel(int l, int f) const {
    return i * job.channels + int64_t(job.first_level + l) * job.features + f;
  }
  CAMK_DEVICE FetchAny<F, C> fetch(const void* rows, int l, int f) const {
    return {rows, job.storage, job.level[l].first_row * job.features + f, job.features};
  }
  CAMK_DEVICE Numbers gradient(int l, int f) const { return load_any<F, C>(job.g, job.storage, channel(l, f)); }
  // [axis][feature]; 0 along clamped axes
  CAMK_DEVICE Slopes jacobian_gradient(int l, int f) const {
    Slopes gj{};
    for (int k = 0; k < F; ++k) {
      each_axis<D>(job.dims, [&](int a) {
        gj[a][k] = point.mend(load_readonly(job.gj + (channel(l, f) + k) * job.dims + a), a);
      });
    }
    return gj;
  }
  CAMK_DEVICE Axes direction() const {
    Axes v{};
    if (job.v) each_axis<D>(job.dims, [&](int a) { v[a] = point.mend(load_readonly(job.v + i * job.dims + a), a); });
    return v;
  }
};

template <class C, int D, int F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) any_rows(const __grid_constant__ Job<C> job) {
  using T = Thread<C, D, F>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.points) return;
  const T thread(job, i);
  const auto& point = thread.point;
  const auto v = thread.direction();
  const int first = int(blockIdx.y) * job.levels_per_thread, last = min(first + job.levels_per_thread, job.n_levels);
  for (int l = first; l < last; ++l) {
    const auto s = thread.corners(l);
    const bool evaluated = l < point.levels;
    for (int f = 0; f < job.features; f += F) {
      typename T::Numbers y{};
      typename T::Slopes slopes{};
      if (evaluated && !point.dead()) {
        if (job.j) {
          math::grid_jacobian(s, thread.fetch(job.values, l, f), y, slopes);
        } else if (job.values) {
          math::grid_value(s, thread.fetch(job.values, l, f), y);
        }
        if (job.v) math::grid_along(s, v, thread.fetch(job.table, l, f), y);
      }
      const auto mended = [&](C number, int axis) { return evaluated ? point.mend(number, axis) : C(0); };
      for (int k = 0; k < F; ++k) y[k] = mended(y[k], -1);
      store_any(job.y, job.storage, thread.channel(l, f), y);
      for (int k = 0; k < F && job.j; ++k) {
        each_axis<D>(job.dims, [&](int a) {
          store_streaming(job.j + (thread.channel(l, f) + k) * job.dims + a, mended(slopes[a][k], a));
        });
      }
    }
  }
}

template <class C, int D, int F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) any_coordinates(const __grid_constant__ Job<C> job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.points) return;
  const Thread<C, D, F> thread(job, i);
  const auto& point = thread.point;
  if (job.accumulate && point.levels <= 0) return;
  const auto v = thread.direction();
  typename Thread<C, D, F>::Axes gx{};
  for (int l = 0; l < point.levels && !point.dead(); ++l) {
    const auto s = thread.corners(l);
    for (int f = 0; f < job.features; f += F) {
      if (job.g && job.values) {
        math::grid_backward_x(s, thread.gradient(l, f), thread.fetch(job.values, l, f), gx);
      }
      if (job.gj) {
        math::grid_jacobian_backward_x(s, thread.jacobian_gradient(l, f), thread.fetch(job.table, l, f), gx);
      }
      if (job.v) {
        math::grid_along_backward_x(s, v, thread.gradient(l, f), thread.fetch(job.table, l, f), gx);
      }
    }
  }
  each_axis<D>(job.dims, [&](int a) {
    C* to = job.gx + i * job.dims + a;
    const C found = point.levels <= 0 ? C(0) : point.mend(gx[a], a);
    *to = job.accumulate ? *to + found : found;
  });
}

// ---- Sums over points: three ways to add -------------------------------------------------------------------

// To float32 or float64 sums, in any order.
template <int F, class C>
struct AddFast {
  const Job<C>& job;
  CAMK_DEVICE void operator()(int64_t at, const Vec<C, F>& row) const {
    for (int f = 0; f < F; ++f) {
      if (job.storage == Storage::kDouble) {
        reduce_add(static_cast<double*>(job.sums) + at + f, double(row[f]));
      } else {
        reduce_add(static_cast<float*>(job.sums) + at + f, float(row[f]));
      }
    }
  }
};

// Nowhere: the first pass of a repeatable sum looks for the largest finite number.
template <int F, class C>
struct FindLargest {
  const Job<C>& job;
  CAMK_DEVICE void operator()(int64_t, const Vec<C, F>& row) const {
    for (int f = 0; f < F; ++f) find_largest(job.largest, double(row[f]));
  }
};

template <int F, class C>
struct AddFixed {
  const Job<C>& job;
  FixedPoint sum;
  CAMK_DEVICE explicit AddFixed(const Job<C>& work)
      : job(work), sum(work.fixed, *work.largest, work.points << work.dims) {}
  CAMK_DEVICE void operator()(int64_t at, const Vec<C, F>& row) const {
    for (int f = 0; f < F; ++f) {
      if (job.storage == Storage::kDouble) {
        sum.add(static_cast<double*>(job.sums), at + f, double(row[f]));
      } else {
        sum.add(static_cast<float*>(job.sums), at + f, double(row[f]));
      }
    }
  }
};

template <class C, int D, int F, template <int, class> class Adder>
__global__ void __launch_bounds__(kThreads, kMinBlocks) any_table(const __grid_constant__ Job<C> job) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.points) return;
  const Thread<C, D, F> thread(job, i);
  if (thread.point.dead()) return;
  const Adder<F, C> adder{job};
  const auto v = thread.direction();
  const int first = int(blockIdx.y) * job.levels_per_thread, last = min(first + job.levels_per_thread, job.n_levels);
  for (int l = first; l < min(last, thread.point.levels); ++l) {
    const auto s = thread.corners(l);
    for (int f = 0; f < job.features; f += F) {
      const int64_t rows = job.level[l].first_row * job.features + f;
      const auto add = [&](uint32_t row, const Vec<C, F>& numbers) {
        adder(rows + int64_t(row) * job.features, numbers);
      };
      if (job.v) {
        math::grid_along_backward_table(s, v, thread.gradient(l, f), add);
      } else if (job.g) {
        math::grid_backward_table(s, thread.gradient(l, f), add);
      }
      if (job.gj) math::grid_jacobian_backward_table(s, thread.jacobian_gradient(l, f), add);
    }
  }
}

// ---- Choice of the kernel ----------------------------------------------------------------------------------

// body.operator()<D, F>(): two or three axes are known at compile time, and two features at a time go where they are
// even.
template <class S, class Body>
cudaError_t with_any(const Job<S>& job, Body body) {
  const auto with_features = [&]<int D>() {
    return job.features % 2 == 0 ? body.template operator()<D, 2>() : body.template operator()<D, 1>();
  };
  if constexpr (std::is_same_v<S, float>) {
    if (job.interpolation != math::Interpolation::kNearest) {
      if (job.dims == 2) return with_features.template operator()<2>();
      if (job.dims == 3) return with_features.template operator()<3>();
    }
  }
  return body.template operator()<0, 1>();
}

template <class S>
dim3 tiles(const Job<S>& job, bool levels) {
  const int64_t groups = levels ? divide_up(job.n_levels, job.levels_per_thread) : 1;
  return dim3(unsigned(divide_up(job.points, kThreads)), unsigned(groups));
}

}  // namespace

template <class S>
cudaError_t launch_any_rows(const Job<S>& job, cudaStream_t stream) {
  return with_any(
      job, [&]<int D, int F>() { return launch(any_rows<S, D, F>, {tiles(job, true), kThreads, 0, stream}, job); });
}

template <class S>
cudaError_t launch_any_coordinates(const Job<S>& job, cudaStream_t stream) {
  return with_any(job, [&]<int D, int F>() {
    return launch(any_coordinates<S, D, F>, {tiles(job, false), kThreads, 0, stream}, job);
  });
}

template <class S>
cudaError_t launch_any_table(const Job<S>& job, Sums sums, cudaStream_t stream) {
  const LaunchShape shape{tiles(job, true), kThreads, 0, stream};
  return with_any(job, [&]<int D, int F>() {
    switch (sums) {
      case Sums::kLargest:
        return launch(any_table<S, 0, 1, FindLargest>, shape, job);
      case Sums::kFixed:
        return launch(any_table<S, 0, 1, AddFixed>, shape, job);
      default:
        return launch(any_table<S, D, F, AddFast>, shape, job);
    }
  });
}

template cudaError_t launch_any_rows(const Job<float>&, cudaStream_t);
template cudaError_t launch_any_rows(const Job<double>&, cudaStream_t);
template cudaError_t launch_any_coordinates(const Job<float>&, cudaStream_t);
template cudaError_t launch_any_coordinates(const Job<double>&, cudaStream_t);
template cudaError_t launch_any_table(const Job<float>&, Sums, cudaStream_t);
template cudaError_t launch_any_table(const Job<double>&, Sums, cudaStream_t);

}  // namespace camk::cuda
