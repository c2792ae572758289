// SPDX-License-Identifier: MIT
// What the kernels of radial_basis share: a point, the pairs of it and its kernels, waves of features, and the choice
// of a kernel. Formulas are csrc/math's. N is the arithmetic type: a scalar S, or its dual number, with which the code
// of the first derivatives gives the second ones along a direction.
//
// A few neighbouring lanes take a point. They share out its kernels to find their weights, a block of one each, and
// then take every so many packs of their features, so that lanes read a kernel's row, and write the point's, side by
// side.
#pragma once
#include <algorithm>

#include "cuda/packs.cuh"
#include "cuda/radial_basis.h"

namespace camk::cuda {

inline constexpr int kRadialThreads = 128;
inline constexpr int kRadialMinBlocks = 1;  // leaves the assembler all registers: nothing spills

template <class S>
CAMK_DEVICE S from_lane(S number, int lane, int lanes) {
  return __shfl_sync(0xffffffffu, number, lane, lanes);
}
template <class S>
CAMK_DEVICE Dual<S> from_lane(Dual<S> number, int lane, int lanes) {
  return {from_lane(number.value, lane, lanes), from_lane(number.along, lane, lanes)};
}

// The sum over lanes that lie `step`, 2 step, ... up to `end` apart, to all of them.
template <class S>
CAMK_DEVICE S sum_of_lanes(S number, int step, int end) {
  for (int distance = step; distance < end; distance *= 2) number += __shfl_xor_sync(0xffffffffu, number, distance);
  return number;
}
template <class S>
CAMK_DEVICE Dual<S> sum_of_lanes(Dual<S> number, int step, int end) {
  return {sum_of_lanes(number.value, step, end), sum_of_lanes(number.along, step, end)};
}

template <class N>
CAMK_DEVICE N load_operand(const RadialOperand<typename scalar_of<N>::type>& from, int64_t at) {
  using S = typename scalar_of<N>::type;
  if constexpr (std::is_same_v<N, S>) {
    return load_readonly(from.value + at);
  } else {
    return {load_readonly(from.value + at), from.along ? load_readonly(from.along + at) : S(0)};
  }
}

// The waves of a pack of features from c on.
template <class N>
class RadialWaves {
 public:
  using S = typename scalar_of<N>::type;
  static constexpr int kNumbers = Pack<S>::kNumbers;

  RadialWaves() = default;
  CAMK_DEVICE RadialWaves(const RadialJob<S>& job, int64_t c) : waves_(job.frequencies ? c - job.keep : -kNumbers) {
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      rates_[n] = S(0), phase_[n] = N(0);
      if (waves_ + n < 0 || c + n >= job.width) continue;
      rates_[n] = load_readonly(job.frequencies + waves_ + n);
      if (job.phase.value) phase_[n] = load_operand<N>(job.phase, waves_ + n);
    }
  }
  // That of the n-th feature.
  CAMK_DEVICE math::RadialWave<N> operator()(int n, N u) const {
    if (waves_ + n < 0) return {u, N(1), N(0)};
    return math::radial_wave(u, N(rates_[n]), phase_[n]);
  }
  // The same without slopes.
  CAMK_DEVICE N value(int n, N u) const { return waves_ + n < 0 ? u : sine_of(u * N(rates_[n]) + phase_[n]); }

 private:
  int64_t waves_;  // the place of the first among the features that have one, negative where it has none
  Vec<S, kNumbers> rates_;
  Vec<N, kNumbers> phase_;
};

// One thread.
template <int D, class N>
class RadialThread {
 public:
  using S = typename scalar_of<N>::type;
  static constexpr int kNumbers = Pack<S>::kNumbers;

  const RadialJob<S>& job;
  int64_t i;  // the point
  int lane;
  bool there, lost;  // lost: results are NaN, and nothing is added
  N scale;           // 1 / (sum phi + eps)
  // The pair of the point and this lane's kernel in the block that is held; its value is 0 where it has none.
  int32_t kernel;
  bool has_kernel;
  math::RadialKernel<D, N> pair;

  CAMK_DEVICE RadialThread(const RadialJob<S>& work, int64_t point)
      : job(work), i(point), there(point < work.points), scale(1) {
    if (!there) i = 0;
    lane = int(threadIdx.x) & (lanes() - 1);
    lost = there && (!is_finite() || names_no_kernel());
    lost = sum_of_lanes(int(lost), 1, lanes()) != 0;
    if (!job.normalize) return;
    N total(0);
    each_block([&] { total = total + pair.value; });
    total = sum_of_lanes(total, 1, lanes());
    scale = N(1) / ((job.detach ? constant_of(total) : total) + N(job.eps));
  }

  CAMK_DEVICE int lanes() const { return 1 << job.lane_bits; }
  CAMK_DEVICE bool one_block() const { return job.per_point <= lanes(); }
  // Whether this lane has something to do for the features from c on.
  CAMK_DEVICE bool takes(int64_t c) const { return there && !lost && c < job.width; }

  // body() for blocks of kernels, held one after the other.
  template <class Body>
  CAMK_DEVICE void each_block(const Body& body) {
    for (int64_t first = 0; first < job.per_point; first += lanes()) {
      if (first != held_) hold(first);
      body();
    }
  }
  // body(lane, kernel, u) for the pairs that are held.
  template <class Body>
  CAMK_DEVICE void each_pair(const Body& body) const {
    const N u = weight();
    for (int l = 0; l < held_count(); ++l) body(l, from_lane(kernel, l, lanes()), from_lane(u, l, lanes()));
  }
  // The weight u of the pair of this lane.
  CAMK_DEVICE N weight() const { return pair.value * scale; }
  // body(u, numbers c to c + kNumbers of the kernel's features) for the pairs that are held, the next row on its way;
  // features are 0 where this lane takes none.
  template <class Body>
  CAMK_DEVICE void each_row(int64_t c, const Body& body) const {
    const N u = weight();
    const auto row_of = [&](int l) CAMK_INLINED {
      const int32_t of = from_lane(kernel, l, lanes());
      return takes(c) ? features(of, c) : Vec<N, kNumbers>{};
    };
    Vec<N, kNumbers> coming = row_of(0);
    for (int l = 0; l < held_count(); ++l) {
      const Vec<N, kNumbers> row = coming;
      if (l + 1 < held_count()) coming = row_of(l + 1);
      body(from_lane(u, l, lanes()), row);
    }
  }

  // Numbers c to c + kNumbers of a row of a tensor [*, width].
  CAMK_DEVICE PackPlace place(int64_t row, int64_t c) const {
    return {job.storage, job.words, row * job.width + c, job.width - c};
  }
  CAMK_DEVICE Vec<N, kNumbers> features(int64_t row, int64_t c) const {
    const Pack<S> value = load_pack<S>(job.features.value, place(row, c));
    if constexpr (std::is_same_v<N, S>) {
      return value;
    } else {
      const Pack<S> along = job.features.along ? load_pack<S>(job.features.along, place(row, c)) : Pack<S>(S(0));
      Vec<N, kNumbers> both;
#pragma unroll
      for (int n = 0; n < kNumbers; ++n) both[n] = {value[n], along[n]};
      return both;
    }
  }

 private:
  int64_t held_ = -1;  // the first kernel of the block that is held

  CAMK_DEVICE int held_count() const { return int(min(int64_t(lanes()), job.per_point - held_)); }

  CAMK_DEVICE bool is_finite() {
    bool finite = true;
    unroll<D>([&](int a) CAMK_INLINED {
      pair.x[a] = load_operand<N>(job.x, i * D + a);
      finite &= fabs(value_of(pair.x[a])) < S(INFINITY);
    });
    return finite;
  }
  CAMK_DEVICE int32_t kernel_at(int64_t j) const {
    return job.neighbors ? load_readonly(job.neighbors + i * job.per_point + j) : int32_t(j);
  }
  CAMK_DEVICE bool names_no_kernel() const {
    for (int64_t j = lane; job.neighbors && j < job.per_point; j += lanes()) {
      if (uint32_t(kernel_at(j)) >= uint32_t(job.count)) return true;
    }
    return false;
  }

  CAMK_DEVICE void hold(int64_t first) {
    held_ = first;
    has_kernel = there && !lost && first + lane < job.per_point;
    kernel = has_kernel ? kernel_at(first + lane) : 0;
    pair.value = N(0);
    if (!has_kernel) return;
    pair.kind = job.kind, pair.form = job.shape;
    unroll<D>([&](int a) CAMK_INLINED { pair.center[a] = load_operand<N>(job.centers, int64_t(kernel) * D + a); });
    if (math::radial_ignores_shape(job.kind, job.shape)) {
      pair.form = math::RadialShape::kIsotropic, pair.shape[0] = N(1);
    } else {
      unroll<D * D>([&](int s) CAMK_INLINED {
        if (s < job.shape_width) pair.shape[s] = load_operand<N>(job.shapes, int64_t(kernel) * job.shape_width + s);
      });
    }
    pair.evaluate();
  }
};

// The point that this thread takes first.
template <class S>
CAMK_DEVICE int64_t point_of_thread(const RadialJob<S>& job) {
  return (int64_t(blockIdx.x) * kRadialThreads + threadIdx.x) >> job.lane_bits;
}

// ---- Choice of a kernel -------------------------------------------------------------------------------------

// What the launcher sets; returns the shape of a launch in which each point has its threads.
template <class S>
LaunchShape arrange(RadialJob<S>& job, cudaStream_t stream) {
  constexpr int64_t kNumbers = Pack<S>::kNumbers;
  const int64_t packs = divide_up(job.width, kNumbers);
  job.lane_bits = 0;
  while (job.lane_bits < 5 && int64_t(2) << job.lane_bits <= packs) ++job.lane_bits;
  job.words = job.width % kNumbers == 0;
  const void* const rows[] = {job.features.value, job.features.along, job.g, job.y};
  for (const void* from : rows) job.words = job.words && is_aligned(from);
  return {dim3(unsigned(divide_up(job.points << job.lane_bits, kRadialThreads))), kRadialThreads, 0, stream};
}

// body.operator()<D, N>()
template <class S, class Body>
cudaError_t with_numbers(const RadialJob<S>& job, bool second, const Body& body) {
  return with_dims(job.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    return second ? body.template operator()<D, Dual<S>>() : body.template operator()<D, S>();
  });
}

}  // namespace camk::cuda
