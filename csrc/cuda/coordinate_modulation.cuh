// SPDX-License-Identifier: MIT
// What the kernels of coordinate_modulation share: a thread's point and nodes, packs of numbers, and the choice of a
// kernel. Formulas are csrc/math's.
//
// A few neighbouring lanes take a point; each finds its nodes, and takes every so many packs of 16 bytes of their rows,
// so that lanes read a row, and write the results of their point, side by side.
#pragma once
#include "cuda/coordinate_modulation.h"
#include "cuda/packs.cuh"

namespace camk::cuda {

inline constexpr int kLookupThreads = 128;
inline constexpr int kLookupMinBlocks = 1;  // leaves the assembler all registers: nothing spills

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
  CAMK_DEVICE C load_numbers(const void* from, int64_t k) const { return load_pack<S>(from, place(k)); }
  CAMK_DEVICE void store_numbers(void* to, int64_t k, const C& numbers) const { store_pack(to, place(k), numbers); }
  CAMK_DEVICE PackPlace place(int64_t k) const {
    return {job.storage, job.words, i * job.layout.width + k, job.layout.width - k};
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
