// SPDX-License-Identifier: MIT
// Blend weight of the upper corner along one axis as a function of the fractional position t in [0, 1), and its first
// two derivatives. Linear: t. Smoothstep: 3 t^2 - 2 t^3. Nearest has no upper corner: the caller reads the lower one
// alone. And from these, the weights of the 2^D corners of a cell.
#pragma once
#include "portable.h"

namespace camk::math {

enum class Interpolation : int { kLinear = 0, kSmoothstep = 1, kNearest = 2 };

template <class C>
CAMK_HD C blend(Interpolation kind, C t) {
  return kind == Interpolation::kSmoothstep ? t * t * (C(3) - C(2) * t) : t;
}

template <class C>
CAMK_HD C blend_first(Interpolation kind, C t) {
  return kind == Interpolation::kSmoothstep ? C(6) * t * (C(1) - t) : C(1);
}

template <class C>
CAMK_HD C blend_second(Interpolation kind, C t) {
  return kind == Interpolation::kSmoothstep ? C(6) - C(12) * t : C(0);
}

inline constexpr int kMaxDims = 7;

// How far a coordinate may be: times the largest scale, which is below 2^31, it is still a finite float32.
inline constexpr float kFar = 1e28f;

// The corners of the cell around a point: their weights, products of one factor per axis, and the derivatives of these.
// D = 0 leaves the number of axes, and whether the lookup is a nearest one, to run time. Unrolled writes the corners
// out.
template <int D, class C, bool Nearest, bool Unrolled>
struct Corners {
  static constexpr int kAxes = D > 0 ? D : kMaxDims;  // room for so many

  int dims;
  bool nearest;
  Vec<Vec<C, 2>, kAxes> value, first, second;  // per axis, lower and upper corner: factors, derivatives of these in x

  Corners() = default;
  CAMK_HD Corners(int n_dims, bool is_nearest) : dims(n_dims), nearest(is_nearest) {}

  template <class Body>
  CAMK_HD void each_axis(Body&& body) const {
    if constexpr (D > 0) {
      unroll<D>(body);
    } else {
      for (int d = 0; d < dims; ++d) body(d);
    }
  }

  template <class Body>
  CAMK_HD void each_corner(Body&& body) const {
    if constexpr (Unrolled) {
      unroll<(Nearest ? 1 : 1 << D)>(body);
    } else {
      const int corners = nearest ? 1 : 1 << (D > 0 ? D : dims);
      for (int c = 0; c < corners; ++c) body(c);
    }
  }

  // The derivative of this corner's weight along axes a and b; -1 stands for no axis.
  CAMK_HD C derivative(int corner, int a, int b) const {
    if (nearest) return a < 0 ? C(1) : C(0);
    C product = C(1);
    each_axis([&](int d) CAMK_INLINED {
      const int order = (a == d) + (b == d), side = (corner >> d) & 1;
      const Vec<C, 2>& pair = order == 0 ? value[d] : order == 1 ? first[d] : second[d];
      const C factor = of_side(pair, side);
      product = d == 0 ? factor : product * factor;
    });
    return product;
  }

  CAMK_HD C weight(int corner) const { return derivative(corner, -1, -1); }
  CAMK_HD C slope(int corner, int a) const { return derivative(corner, a, -1); }
  CAMK_HD C curve(int corner, int a, int b) const { return derivative(corner, a, b); }

  // sum_a v_a d weight / d x_a
  CAMK_HD C along(int corner, const Vec<C, kAxes>& v) const {
    C sum = C(0);
    each_axis([&](int a) CAMK_INLINED { sum = sum + v[a] * slope(corner, a); });
    return sum;
  }
};

}  // namespace camk::math
