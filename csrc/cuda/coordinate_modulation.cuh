// SPDX-License-Identifier: MIT
// What the kernels of coordinate_modulation share: a thread's point and nodes, packs of numbers, and the choice of a
// kernel. Formulas are csrc/math's.
//
// A few neighbouring lanes take a point; each finds its nodes, and takes every so many packs of 16 bytes of their rows,
// so that lanes read a row, and write the results of their point, side by side.
#pragma once
#include "cuda/coordinate_modulation.h"
#include "cuda/device.cuh"
#include "cuda/storage.cuh"

namespace camk::cuda {

inline constexpr int kLookupThreads = 128;
inline constexpr int kLookupMinBlocks = 1;  // leaves the assembler all registers: nothing spills

// ---- Packs: numbers that a thread computes together ---------------------------------------------------------

template <class S>
struct alignas(kPackBytes) Pack : Vec<S, kPackBytes / int(sizeof(S))> {
  static constexpr int kNumbers = kPackBytes / int(sizeof(S));
  using Numbers = Vec<S, kNumbers>;

  Pack() = default;
  CAMK_DEVICE explicit Pack(S number) {
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) (*this)[k] = number;
  }
  CAMK_DEVICE explicit Pack(const Numbers& numbers) : Numbers(numbers) {}
};

template <class S>
CAMK_DEVICE Pack<S> operator+(const Pack<S>& a, const Pack<S>& b) {
  Pack<S> sum;
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) sum[k] = a[k] + b[k];
  return sum;
}
template <class S>
CAMK_DEVICE Pack<S> operator*(const Pack<S>& a, const Pack<S>& b) {
  Pack<S> product;
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) product[k] = a[k] * b[k];
  return product;
}
template <class S>
CAMK_DEVICE Pack<S> multiply_add(S x, const Pack<S>& y, const Pack<S>& z) {
  Pack<S> sum;
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) sum[k] = camk::multiply_add(x, y[k], z[k]);
  return sum;
}
template <class S>
CAMK_DEVICE S dot(const Pack<S>& a, const Pack<S>& b) {
  S sum(0);
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) sum = camk::multiply_add(a[k], b[k], sum);
  return sum;
}

// ---- A point ------------------------------------------------------------------------------------------------

// One thread. D axes of nodes (0: any number), P lookups.
template <class S, int D, int P>
struct LookupThread {
  using C = Pack<S>;
  using Nodes = math::Nodes<D, S>;
  using Axes = Vec<S, Nodes::kAxes>;
  static constexpr int kSlots = P == 3 ? 3 : Nodes::kAxes;

  const LookupJob<S>& job;
  int64_t i;  // the point
  int lane;
  bool there, broken;  // broken: results are NaN, and no row is touched
  Vec<Nodes, P> nodes;

  CAMK_DEVICE explicit LookupThread(const LookupJob<S>& work) : job(work), broken(false) {
    const int64_t thread = int64_t(blockIdx.x) * kLookupThreads + threadIdx.x;
    i = thread >> work.lane_bits, lane = int(threadIdx.x) & (lanes() - 1);
    there = i < work.points;
    if (!there) i = 0;
    unroll<P>([&](int p) CAMK_INLINED {
      nodes[p] = Nodes(work.grid, work.dims, axes_of(work.coords, p));
      broken |= nodes[p].broken;
    });
  }

  CAMK_DEVICE int lanes() const { return 1 << job.lane_bits; }

  CAMK_DEVICE static int slot(int p, int axis) { return P == 1 ? axis : math::plane_slot(p, axis); }

  // What belongs to the axes of lookup p in a row of a tensor [points, slots].
  CAMK_DEVICE Axes axes_of(const S* rows, int p) const {
    Axes found{};
    const auto take = [&](int a) CAMK_INLINED { found[a] = load_readonly(rows + i * job.slots + slot(p, a)); };
    if constexpr (D > 0) {
      unroll<D>(take);
    } else {
      for (int a = 0; a < job.dims; ++a) take(a);
    }
    return found;
  }

  // body(first number) for the packs of this lane
  template <class Body>
  CAMK_DEVICE void each_pack(const Body& body) const {
    if (!there) return;
#pragma unroll 1
    for (int64_t k = lane * C::kNumbers; k < job.layout.pitch; k += lanes() * C::kNumbers) body(k);
  }

  // Where the row of a corner of lookup p begins; none if the node is absent.
  CAMK_DEVICE int64_t row(int p, int c) const {
    return (p * (int64_t(job.grid.rows) + 1) + nodes[p].index(c)) * job.layout.pitch;
  }
  CAMK_DEVICE bool has_row(int p, int c) const { return nodes[p].index(c) != job.grid.rows; }

  CAMK_DEVICE C load(const S* rows, int p, int c, int64_t k) const {
    return load_readonly(reinterpret_cast<const C*>(rows + row(p, c) + k));
  }

  // sum_c coefficient(c) row_c of lookup p, added to `sum`
  template <class Coefficient>
  CAMK_DEVICE C combine(const S* rows, int p, int64_t k, C sum, const Coefficient& coefficient) const {
    nodes[p].each_corner([&](int c) CAMK_INLINED { sum = multiply_add(coefficient(c), load(rows, p, c, k), sum); });
    return sum;
  }

  CAMK_DEVICE Vec<C, P> values(int64_t k) const {
    Vec<C, P> y;
    unroll<P>([&](int p) CAMK_INLINED {
      y[p] = combine(job.rows, p, k, C(S(0)), [&](int c) CAMK_INLINED { return nodes[p].weight(c); });
    });
    return y;
  }

  // Numbers k to k + kNumbers of the point's row of a tensor [points, width]; zeros beyond the last.
  CAMK_DEVICE C load_numbers(const void* from, int64_t k) const {
    C numbers(S(0));
    with_storage_of<S>(job.storage, [&]<class T>(T*) {
      const T* row = static_cast<const T*>(from) + i * job.layout.width + k;
      if (job.words) {
        numbers = C(load_row<C::kNumbers, S>(row, job.storage));
      } else {
#pragma unroll
        for (int n = 0; n < C::kNumbers; ++n) {
          if (k + n < job.layout.width) numbers[n] = S(to_number(load_readonly(row + n), job.storage));
        }
      }
    });
    return numbers;
  }

  CAMK_DEVICE void store_numbers(void* to, int64_t k, const C& numbers) const {
    with_storage_of<S>(job.storage, [&]<class T>(T*) {
      T* row = static_cast<T*>(to) + i * job.layout.width + k;
      if (job.words) {
        store_row<T, C::kNumbers, S>(row, numbers, job.storage);
      } else {
#pragma unroll
        for (int n = 0; n < C::kNumbers; ++n) {
          if (k + n >= job.layout.width) break;
          T number;
          from_number(number, numbers[n], job.storage);
          store_streaming(row + n, number);
        }
      }
    });
  }

  // The gradient in the coordinates: the sum of what the lanes of the point found, per lookup.
  CAMK_DEVICE void store_coordinates(const Vec<Axes, P>& found) const {
    Vec<S, kSlots> gu{};
    unroll<P>([&](int p) CAMK_INLINED {
      nodes[p].each_axis([&](int a) CAMK_INLINED { gu[slot(p, a)] = gu[slot(p, a)] + found[p][a]; });
    });
    const auto finish = [&](int s) CAMK_INLINED {
      for (int distance = lanes() / 2; distance > 0; distance /= 2) {
        gu[s] += __shfl_xor_sync(0xffffffffu, gu[s], distance);
      }
      if (there && lane == 0) job.gu[i * job.slots + s] = broken ? S(NAN) : gu[s];
    };
    if constexpr (D > 0) {
      unroll<kSlots>(finish);
    } else {
      for (int s = 0; s < job.slots; ++s) finish(s);
    }
  }
};

// ---- Choice of a kernel -------------------------------------------------------------------------------------

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; }

// What the launcher sets; returns the shape of the launch.
template <class S>
LaunchShape arrange(LookupJob<S>& job, cudaStream_t stream) {
  const int64_t packs = job.layout.pitch / Pack<S>::kNumbers;
  job.lane_bits = 0;
  while (job.lane_bits < 5 && int64_t(2) << job.lane_bits <= packs) ++job.lane_bits;
  job.words = job.layout.width == job.layout.pitch && is_aligned(job.g) && is_aligned(job.y);
  return {dim3(unsigned(divide_up(job.points << job.lane_bits, kLookupThreads))), kLookupThreads, 0, stream};
}

// body.operator()<D, P>(): up to three axes are known at compile time, in float32.
template <class S, class Body>
cudaError_t with_axes(const LookupJob<S>& job, const Body& body) {
  const bool planes = job.layout.planes == 3;
  if constexpr (sizeof(S) == 4) {
    if (planes) return body.template operator()<2, 3>();
    switch (job.dims) {
      case 1:
        return body.template operator()<1, 1>();
      case 2:
        return body.template operator()<2, 1>();
      case 3:
        return body.template operator()<3, 1>();
      default:
        return body.template operator()<0, 1>();
    }
  } else {
    return planes ? body.template operator()<0, 3>() : body.template operator()<0, 1>();
  }
}

}  // namespace camk::cuda
