// SPDX-License-Identifier: MIT
// Centres sorted into cells, and boxes of cells that hold a point's nearest centres, exactly.
//
// Every axis is cut into slabs, and so the space into cells; the centres of a cell lie side by side. A box starts as
// the cell of its point, grows towards what is nearest until it holds k centres, then takes all slabs within the
// distance of the k-th. What is beyond a box lies beyond one of its cuts, and is no nearer than that, also after
// rounding, because rounding is monotone.
#pragma once
#include "math/portable.h"

namespace camk::math {

inline constexpr int kMostNeighborDims = 4;

// d * d, rounded: the compiler must not fuse it with a sum, which would break ties of mirrored centres.
CAMK_HD double rounded_square(double d) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(d, d);
#elif defined(FP_FAST_FMA)
  return std::fma(d, d, 0.0);
#else
  return d * d;
#endif
}

// The slabs of one axis: slab j holds coordinates from cuts[j - 1] up to but not cuts[j].
struct Slabs {
  int32_t count;
  const double* cuts;  // [count - 1]
};

// How many of some cuts, in order, are not above a coordinate.
CAMK_HD int32_t cuts_up_to(const double* cuts, int32_t count, double at) {
  const double* base = cuts;
  while (count > 0) {
    const int32_t half = (count + 1) / 2;
    base += base[half - 1] <= at ? half : 0;
    count -= half;
  }
  return int32_t(base - cuts);
}

template <class S>
struct Cells {
  int64_t count;          // of centres
  const S* points;        // [d, count] in the order of cells
  const int32_t* rows;    // [count] where the points stood
  const int32_t* starts;  // [cells + 1] where each begins
  Slabs axes[kMostNeighborDims];
};

// Slabs low to high of each axis. Axes: D times Slabs, by index; they must outlive the box.
template <int D, class Axes>
class Box {
 public:
  CAMK_HD Box(const Axes& axes, const Vec<double, D>& at, const Vec<int32_t, D>& slab)
      : axes_(axes), at_(at), low_(slab), high_(slab) {}

  // Extends the box to what is nearest, until it holds k centres or all.
  CAMK_HD void grow_to(int64_t k, const int32_t* starts) {
    while (count(starts) < k && grow()) {
    }
  }

  // Extends the box to all centres that may be within a squared distance; whether that changes it.
  CAMK_HD bool widen_to(double limit) {
    bool wider = false;
    unroll<D>([&](auto i) CAMK_INLINED {
      while (!ends_above(i) && above(i) <= limit) ++high_[i], wider = true;
      while (!ends_below(i) && below(i) <= limit) --low_[i], wider = true;
    });
    return wider;
  }

  // body(first cell, the one behind the last) for each run of cells in the box.
  template <class Body>
  CAMK_HD void each_run(const Body& body) const {
    runs<0>(0, false, *this, body);
  }
  // The same without the cells of a box inside.
  template <class Body>
  CAMK_HD void each_run_beyond(const Box& inner, const Body& body) const {
    runs<0>(0, true, inner, body);
  }

 private:
  // Squared distances to the sides of the box.
  CAMK_HD double above(int i) const { return rounded_square(axes_[i].cuts[high_[i]] - at_[i]); }
  CAMK_HD double below(int i) const { return rounded_square(axes_[i].cuts[low_[i] - 1] - at_[i]); }
  CAMK_HD bool ends_above(int i) const { return high_[i] + 1 == axes_[i].count; }
  CAMK_HD bool ends_below(int i) const { return low_[i] == 0; }

  CAMK_HD int64_t count(const int32_t* starts) const {
    int64_t sum = 0;
    each_run([&](int32_t begin, int32_t end) CAMK_INLINED { sum += starts[end] - starts[begin]; });
    return sum;
  }

  // By one slab; false if there is none.
  CAMK_HD bool grow() {
    int nearest = -1;  // 2 i: below on axis i, 2 i + 1: above
    double least = 0;
    const auto consider = [&](int side, double square) CAMK_INLINED {
      if (nearest < 0 || square < least) least = square, nearest = side;
    };
    unroll<D>([&](auto i) CAMK_INLINED {
      if (!ends_above(i)) consider(2 * i + 1, above(i));
      if (!ends_below(i)) consider(2 * i, below(i));
    });
    unroll<D>([&](auto i) CAMK_INLINED { high_[i] += nearest == 2 * i + 1, low_[i] -= nearest == 2 * i; });
    return nearest >= 0;
  }

  // Of the slabs from axis I on, in those that were chosen before, which are within the inner box or not.
  template <int I, class Body>
  CAMK_HD void runs(int32_t chosen, bool within, const Box& inner, const Body& body) const {
    const int32_t first = chosen * axes_[I].count;
    if constexpr (I + 1 < D) {
      for (int32_t slab = low_[I]; slab <= high_[I]; ++slab) {
        runs<I + 1>(first + slab, within && inner.low_[I] <= slab && slab <= inner.high_[I], inner, body);
      }
    } else {
      body(first + low_[I], first + (within ? inner.low_[I] : high_[I] + 1));
      if (within) body(first + inner.high_[I] + 1, first + high_[I] + 1);
    }
  }

  const Axes& axes_;
  Vec<double, D> at_;
  Vec<int32_t, D> low_, high_;
};

}  // namespace camk::math
