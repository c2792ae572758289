// SPDX-License-Identifier: MIT
// First and second derivatives of coordinate_modulation on CUDA. Towards the coordinates the lanes of a point add up
// what they found: no atomics, the same bits every time. Towards the grids sums are packed as the grids are, float32 by
// vector reductions of 16 bytes, or in fixed point where they must not depend on the order.
#include "cuda/coordinate_modulation.cuh"
#include "cuda/sums.cuh"

namespace camk::cuda {
namespace {

// ---- Sums over points: three ways to add a pack -------------------------------------------------------------

template <class S>
struct AddPack {
  const LookupJob<S>& job;
  CAMK_DEVICE void operator()(int64_t at, const Pack<S>& numbers) const {
    if constexpr (sizeof(S) == 4) {
      reduce_add_n<Pack<S>::kNumbers>(job.sums + at, numbers.v);
    } else {
      for (int n = 0; n < Pack<S>::kNumbers; ++n) reduce_add(job.sums + at + n, numbers[n]);
    }
  }
};

// Nowhere: the first pass of a repeatable sum looks for the largest finite number.
template <class S>
struct FindLargestOfPack {
  const LookupJob<S>& job;
  CAMK_DEVICE void operator()(int64_t, const Pack<S>& numbers) const {
    for (int n = 0; n < Pack<S>::kNumbers; ++n) find_largest(job.largest, double(numbers[n]));
  }
};

template <class S>
struct AddPackFixed {
  const LookupJob<S>& job;
  FixedPoint sum;
  CAMK_DEVICE explicit AddPackFixed(const LookupJob<S>& work)
      : job(work), sum(work.fixed, *work.largest, work.points << work.dims) {}
  CAMK_DEVICE void operator()(int64_t at, const Pack<S>& numbers) const {
    for (int n = 0; n < Pack<S>::kNumbers; ++n) sum.add(job.sums, at + n, double(numbers[n]));
  }
};

// ---- Kernels ------------------------------------------------------------------------------------------------

template <class S, int D, int P, template <class> class Adder>
__global__ void __launch_bounds__(kLookupThreads, kLookupMinBlocks)
    lookup_backward(const __grid_constant__ LookupJob<S> job) {
  using Thread = LookupThread<S, D, P>;
  using C = Pack<S>;
  const Thread thread(job);
  const Adder<S> add{job};
  Vec<typename Thread::Axes, P> found{};
  thread.each_pack([&](int64_t k) {
    if (thread.broken) return;
    const C g = thread.load_numbers(job.g, k);
    Vec<C, P> y{};
    if constexpr (P > 1) y = thread.values(k);
    unroll<P>([&](int p) CAMK_INLINED {
      const auto& nodes = thread.nodes[p];
      const C part = g * math::without(y, p);
      nodes.each_corner([&](int c) CAMK_INLINED {
        if (job.gu) nodes.pull_back(c, dot(part, thread.load(job.rows, p, c, k)), found[p]);
        if (job.sums && thread.has_row(p, c)) add(thread.row(p, c) + k, C(nodes.weight(c)) * part);
      });
    });
  });
  if (job.gu) thread.store_coordinates(found);
}

template <class S, int D, int P, template <class> class Adder>
__global__ void __launch_bounds__(kLookupThreads, kLookupMinBlocks)
    lookup_second_order(const __grid_constant__ LookupJob<S> job) {
  using Thread = LookupThread<S, D, P>;
  using C = Pack<S>;
  const Thread thread(job);
  const Adder<S> add{job};
  Vec<typename Thread::Axes, P> v{}, found{};
  if (job.v) unroll<P>([&](int p) CAMK_INLINED { v[p] = thread.axes_of(job.v, p); });
  thread.each_pack([&](int64_t k) {
    if (thread.broken) {
      if (job.y) thread.store_numbers(job.y, k, C(S(NAN)));
      return;
    }
    const C g = thread.load_numbers(job.g, k);
    Vec<C, P> y{}, h{};
    if constexpr (P > 1) y = thread.values(k);
    unroll<P>([&](int p) CAMK_INLINED {
      const auto& nodes = thread.nodes[p];
      if (job.v) {
        h[p] = thread.combine(job.rows, p, k, h[p], [&](int c) CAMK_INLINED { return nodes.along(c, v[p]); });
      }
      if (job.tangents) {
        h[p] = thread.combine(job.tangents, p, k, h[p], [&](int c) CAMK_INLINED { return nodes.weight(c); });
      }
    });
    if (job.y) thread.store_numbers(job.y, k, math::tangent(y, h));
    unroll<P>([&](int p) CAMK_INLINED {
      const auto& nodes = thread.nodes[p];
      const C of_value = g * math::tangent_without(y, h, p), of_tangent = g * math::without(y, p);
      nodes.each_corner([&](int c) CAMK_INLINED {
        if (job.gu) {
          const C row = thread.load(job.rows, p, c, k);
          S first = dot(of_value, row);
          if (job.tangents) first += dot(of_tangent, thread.load(job.tangents, p, c, k));
          nodes.pull_back(c, first, found[p]);
          if (job.v) nodes.pull_back_along(c, v[p], dot(of_tangent, row), found[p]);
        }
        if (job.sums && thread.has_row(p, c)) {
          add(thread.row(p, c) + k, C(nodes.weight(c)) * of_value + C(nodes.along(c, v[p])) * of_tangent);
        }
      });
    });
  });
  if (job.gu) thread.store_coordinates(found);
}

// body.operator()<D, P, Adder>(); repeatable sums leave the axes to run time.
template <class S, class Body>
cudaError_t with_sums(const LookupJob<S>& job, Sums way, const Body& body) {
  const auto repeatable = [&]<template <class> class Adder>() {
    return job.layout.planes == 3 ? body.template operator()<0, 3, Adder>() : body.template operator()<0, 1, Adder>();
  };
  switch (way) {
    case Sums::kLargest:
      return repeatable.template operator()<FindLargestOfPack>();
    case Sums::kFixed:
      return repeatable.template operator()<AddPackFixed>();
    default:
      return with_axes(job, [&]<int D, int P>() { return body.template operator()<D, P, AddPack>(); });
  }
}

}  // namespace

template <class S>
cudaError_t launch_lookup_backward(LookupJob<S> job, Sums way, cudaStream_t stream) {
  const LaunchShape shape = arrange(job, stream);
  return with_sums(job, way, [&]<int D, int P, template <class> class Adder>() {
    return launch(lookup_backward<S, D, P, Adder>, shape, job);
  });
}
template <class S>
cudaError_t launch_lookup_second_order(LookupJob<S> job, Sums way, cudaStream_t stream) {
  const LaunchShape shape = arrange(job, stream);
  return with_sums(job, way, [&]<int D, int P, template <class> class Adder>() {
    return launch(lookup_second_order<S, D, P, Adder>, shape, job);
  });
}

template cudaError_t launch_lookup_backward(LookupJob<float>, Sums, cudaStream_t);
template cudaError_t launch_lookup_backward(LookupJob<double>, Sums, cudaStream_t);
template cudaError_t launch_lookup_second_order(LookupJob<float>, Sums, cudaStream_t);
template cudaError_t launch_lookup_second_order(LookupJob<double>, Sums, cudaStream_t);

}  // namespace camk::cuda
