// SPDX-License-Identifier: MIT
// What the loops of radial_basis work on: the problem, pairs of a point and a kernel, and sums over them. N is the
// arithmetic type: a scalar S, or its dual number, with which the loops of the first derivatives give the second ones
// along a direction.
#pragma once
#include "cpu/parallel.h"
#include "cpu/radial_basis_packs.h"

namespace camk::cpu {

// What the loops work on. Rows of features are padded to `pitch` numbers.
template <class S>
struct RadialProblem {
  math::RadialKind kind;
  math::RadialShape shape;
  bool normalize, detach;
  S eps, fast_below;  // fast_below: weights below it have phases within the bound of the fast waves
  int64_t points, count, per_point, width, pitch, keep;
  int dims, shape_width;
  Operand<S> x, centers, shapes, features, phase;
  const S* rates;                   // [pitch], as phase; their first `keep` numbers are not read
  const int32_t* neighbors;         // [points, per_point]; null: all kernels, those in `all`
  const std::vector<int32_t>& all;  // 0, 1, ...
  const int32_t* order;             // [points], in which points are taken; null: their own

  int kernel_width() const { return dims + shape_width; }  // numbers of a kernel's parameters
  int64_t point_at(int64_t i) const { return order ? order[i] : i; }
  const int32_t* kernels_of(int64_t point) const { return neighbors ? neighbors + point * per_point : all.data(); }
};

// Division of 32-bit numbers by one from 2 on that is known at run time only: by a product, exact, as 2^64 / divisor is
// rounded up by less than 2^-32 of itself.
class Divider {
 public:
  explicit Divider(uint32_t divisor) : factor_(~uint64_t(0) / divisor + 1) {}
  CAMK_HD friend uint32_t operator/(uint32_t number, const Divider& by) {
    return uint32_t(uint64_t((static_cast<unsigned __int128>(by.factor_) * number) >> 64));
  }

 private:
  uint64_t factor_;
};

// Pairs in the order of a list, or without one in their own.
struct PairOrder {
  const int32_t* sorted = nullptr;
  CAMK_HD uint32_t operator()(int64_t at) const { return sorted ? uint32_t(sorted[at]) : uint32_t(at); }
};

// Gradients, added to; null where they are not wanted.
template <class S>
struct RadialSums {
  S *centers = nullptr, *shapes = nullptr, *features = nullptr;  // rows as those of the problem
  bool phase = false;
};

// The pairs of points that are taken one after the other, in blocks of as many as a pack has lanes: pair (i, j) is lane
// i % lanes of pack i / lanes * per_point + j.
template <class N>
struct RadialPairs {
  using C = typename pack_of<N>::type;
  using Pack = Lanes<typename scalar_of<N>::type>;
  static constexpr int kWidth = lanes_of<Pack>;

  int64_t begin = 0, end = 0;    // points
  std::vector<int32_t> kernels;  // -1 where the point has no value
  std::vector<C> u, gradient;    // the weight, and the gradient in it, then in phi
  std::vector<C> scale;          // of blocks: 1 / (sum phi + eps)
  std::vector<uint8_t> within;   // of blocks: whether all phases are within the bound of the fast waves
  std::vector<Pack> parts;       // of packs: the gradients in centres and shapes, number by number
  Binned pieces;                 // the pairs by the pieces of their kernels
  Divider block;                 // divides by the pairs of a block

  RadialPairs(int64_t points, int64_t per_point)
      : kernels(round_up(points, kWidth) * per_point),
        u(kernels.size() / kWidth),
        scale(round_up(points, kWidth) / kWidth),
        within(scale.size()),
        block(uint32_t(per_point * kWidth)) {}
  bool has_value(int64_t point, int64_t per_point) const {
    const int64_t at = point - begin;
    return kernels[at / kWidth * per_point * kWidth + at % kWidth] >= 0;
  }
};

}  // namespace camk::cpu
