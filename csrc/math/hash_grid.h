// SPDX-License-Identifier: MIT
// One level of the multi-resolution hash grid (Mueller et al., Instant Neural Graphics Primitives, 2022) around a
// point: value, first and second derivatives, for D axes and F features.
//
//   pos_d = fma(x_d, scale_d, shift),  p = floor(pos),  t = pos - p
//   y_f   = sum over 2^D corners c of  prod_d (c_d ? g(t_d) : 1 - g(t_d))  T[index(p + c), f]
//
// The caller says how to read a table row (fetch) and how to add to a gradient row (add), so nothing here knows of
// threads, atomics, storage types or memory layout.
#pragma once
#include "interpolation.h"

namespace camk::math {

// What the host computes once per level (python: GridGeometry).
struct Level {
  double scale[kMaxDims];     // float32 values
  uint32_t stride[kMaxDims];  // dense index: sum_d p_d stride_d
  uint32_t size;              // entries
  double shift;
  bool hashed;
  bool ceil_corner;  // upper corner = ceil(pos): equals the lower one at whole positions
};

CAMK_HD uint32_t hash_prime(int axis) {
  constexpr uint32_t primes[kMaxDims] = {1u,          2654435761u, 805459861u, 3674653429u,
                                         2097192037u, 1434869437u, 2165219737u};
  return primes[axis];
}

enum class Outside : int { kClamp = 0, kZero = 1, kWrap = 2 };

// What becomes of one coordinate before it is used.
enum Status : int { kInside = 0, kClamped = 1, kZeroed = 2, kNotFinite = 3 };

// Returns the coordinate to compute with, always finite, and its status: clamped axes have derivative 0, a zeroed axis
// zeroes the point, a non-finite one makes the point NaN.
template <class C>
CAMK_HD C settle(C x, Outside mode, Status& status) {
  status = kInside;
  if (x >= C(0) && x <= C(1)) return x;
  if (x != x || (mode == Outside::kWrap && (x < C(-kFar) || x > C(kFar)))) {
    status = kNotFinite;
    return C(0);
  }
  if (mode == Outside::kWrap) return x;
  status = mode == Outside::kZero ? kZeroed : kClamped;
  return x < C(0) ? C(0) : C(1);
}

// The weights of the corners around a point, from its place t in the cell.
template <int D, class C, bool Nearest = false, bool Unrolled = (D > 0 && D <= 4)>
struct CellCorners : Corners<D, C, Nearest, Unrolled> {
  using Base = Corners<D, C, Nearest, Unrolled>;
  using Base::each_axis, Base::kAxes, Base::value, Base::first, Base::second;
  using Scalar = typename scalar_of<C>::type;

  CellCorners() = default;
  CAMK_HD CellCorners(int n_dims, Interpolation kind)
      : Base(n_dims, D > 0 ? Nearest : kind == Interpolation::kNearest) {}
  CAMK_HD CellCorners(const Level& level, int n_dims, const Vec<C, kAxes>& t, Interpolation kind)
      : CellCorners(n_dims, kind) {
    each_axis([&](int d) CAMK_INLINED { weigh(level, d, t[d], kind); });
  }

  CAMK_HD void weigh(const Level& level, int d, C t, Interpolation kind) {
    const C scale = C(Scalar(level.scale[d]));
    value[d][1] = blend(kind, t);
    value[d][0] = C(1) - value[d][1];
    first[d][1] = scale * blend_first(kind, t);
    first[d][0] = C(0) - first[d][1];
    second[d][1] = scale * scale * blend_second(kind, t);
    second[d][0] = C(0) - second[d][1];
  }
};

// The same and the entry of each corner.
template <int D, class C, bool Nearest = false, bool Unrolled = (D > 0 && D <= 4)>
struct Stencil : CellCorners<D, C, Nearest, Unrolled> {
  using Base = CellCorners<D, C, Nearest, Unrolled>;
  using Base::each_axis, Base::kAxes, Base::weigh;
  using typename Base::Scalar;
  using Index = typename index_of<C>::type;

  bool hashed;
  uint32_t size;
  Vec<Vec<Index, 2>, kAxes> term;  // per axis, lower and upper corner: coordinate times prime or stride

  Stencil() = default;
  CAMK_HD Stencil(const Level& level, int n_dims, Interpolation kind)
      : Base(n_dims, kind), hashed(level.hashed), size(level.size) {}
  CAMK_HD Stencil(const Level& level, int n_dims, const Vec<C, kAxes>& x, Interpolation kind)
      : Stencil(level, n_dims, kind) {
    each_axis([&](int d) CAMK_INLINED { weigh(level, d, locate(level, d, x[d]), kind); });
  }

  // Finds the cell along axis d; returns the place in it.
  CAMK_HD C locate(const Level& level, int d, C x) {
    const C pos = multiply_add(x, C(Scalar(level.scale[d])), C(Scalar(level.shift)));
    const C whole = round_down(pos), t = pos - whole;
    const Index step = Index(level.hashed ? hash_prime(d) : level.stride[d]);
    term[d][0] = to_cell(whole) * step;
    term[d][1] = term[d][0] + (level.ceil_corner ? where_positive(t, step) : step);
    return t;
  }

  CAMK_HD Index index(int corner) const {
    Index i = Index(0);
    each_axis([&](int d) CAMK_INLINED {
      const Index t = of_side(term[d], (corner >> d) & 1);
      i = hashed ? i ^ t : i + t;
    });
    return (size & (size - 1)) == 0 ? i & Index(size - 1) : remainder_of(i, size);
  }
};

template <int F, class C>
CAMK_HD C dot(const Vec<C, F>& a, const Vec<C, F>& b) {
  C sum = a[0] * b[0];
  unroll<F - 1>([&](int f) CAMK_INLINED { sum = sum + a[f + 1] * b[f + 1]; });
  return sum;
}

template <int F, class C>
CAMK_HD void add_scaled(Vec<C, F>& sum, C scale, const Vec<C, F>& row) {
  unroll<F>([&](int f) CAMK_INLINED { sum[f] = sum[f] + scale * row[f]; });
}

// y += sum_c weight_c T_c
template <int F, class S, class C, class Fetch>
CAMK_HD void grid_value(const S& s, Fetch fetch, Vec<C, F>& y) {
  s.each_corner([&](int c) CAMK_INLINED { add_scaled(y, s.weight(c), fetch(s.index(c))); });
}

// y as above and j[a] += d y / d x_a = sum_c slope_ca T_c
template <int F, int A, class S, class C, class Fetch>
CAMK_HD void grid_jacobian(const S& s, Fetch fetch, Vec<C, F>& y, Vec<Vec<C, F>, A>& j) {
  s.each_corner([&](int c) CAMK_INLINED {
    const Vec<C, F> row = fetch(s.index(c));
    add_scaled(y, s.weight(c), row);
    s.each_axis([&](int a) CAMK_INLINED { add_scaled(j[a], s.slope(c, a), row); });
  });
}

// Gradient of <g, y> in x: gx_a += sum_c slope_ca <g, T_c>
template <int F, int A, class S, class C, class Fetch>
CAMK_HD void grid_backward_x(const S& s, const Vec<C, F>& g, Fetch fetch, Vec<C, A>& gx) {
  s.each_corner([&](int c) CAMK_INLINED {
    const C along_row = dot(g, fetch(s.index(c)));
    s.each_axis([&](int a) CAMK_INLINED { gx[a] = gx[a] + s.slope(c, a) * along_row; });
  });
}

// Gradient of <g, y> in T: add(c, weight_c g)
template <int F, class S, class C, class Add>
CAMK_HD void grid_backward_table(const S& s, const Vec<C, F>& g, Add add) {
  s.each_corner([&](int c) CAMK_INLINED {
    Vec<C, F> row{};
    add_scaled(row, s.weight(c), g);
    add(s.index(c), row);
  });
}

// Gradient of <gj, j> in x: gx_b += sum_c sum_a curve_cab <gj_a, T_c>
template <int F, int A, class S, class C, class Fetch>
CAMK_HD void grid_jacobian_backward_x(const S& s, const Vec<Vec<C, F>, A>& gj, Fetch fetch, Vec<C, A>& gx) {
  s.each_corner([&](int c) CAMK_INLINED {
    const Vec<C, F> row = fetch(s.index(c));
    s.each_axis([&](int a) CAMK_INLINED {
      const C along_row = dot(gj[a], row);
      s.each_axis([&](int b) CAMK_INLINED { gx[b] = gx[b] + s.curve(c, a, b) * along_row; });
    });
  });
}

// Gradient of <gj, j> in T: add(c, sum_a slope_ca gj_a)
template <int F, int A, class S, class C, class Add>
CAMK_HD void grid_jacobian_backward_table(const S& s, const Vec<Vec<C, F>, A>& gj, Add add) {
  s.each_corner([&](int c) CAMK_INLINED {
    Vec<C, F> row{};
    s.each_axis([&](int a) CAMK_INLINED { add_scaled(row, s.slope(c, a), gj[a]); });
    add(s.index(c), row);
  });
}

// Second order. With gx = d<g, y>/dx and its cotangent v, <v, gx> = <g, sum_a v_a j_a> has the gradients
//   in g: sum_c along_c T_c;   in x: sum_c sum_a v_a curve_cab <g, T_c>;   in T: add(c, along_c g),
// along_c = sum_a v_a slope_ca. With gT = d<g, y>/dT and its cotangent U, <U, gT> is <g, y> of the table U: grid_value
// and grid_backward_x serve.
template <int F, int A, class S, class C, class Fetch>
CAMK_HD void grid_along(const S& s, const Vec<C, A>& v, Fetch fetch, Vec<C, F>& y) {
  s.each_corner([&](int c) CAMK_INLINED { add_scaled(y, s.along(c, v), fetch(s.index(c))); });
}

template <int F, int A, class S, class C, class Fetch>
CAMK_HD void grid_along_backward_x(const S& s, const Vec<C, A>& v, const Vec<C, F>& g, Fetch fetch, Vec<C, A>& gx) {
  s.each_corner([&](int c) CAMK_INLINED {
    const C along_row = dot(g, fetch(s.index(c)));
    s.each_axis([&](int a) CAMK_INLINED {
      s.each_axis([&](int b) CAMK_INLINED { gx[b] = gx[b] + v[a] * s.curve(c, a, b) * along_row; });
    });
  });
}

template <int F, int A, class S, class C, class Add>
CAMK_HD void grid_along_backward_table(const S& s, const Vec<C, A>& v, const Vec<C, F>& g, Add add) {
  s.each_corner([&](int c) CAMK_INLINED {
    Vec<C, F> row{};
    add_scaled(row, s.along(c, v), g);
    add(s.index(c), row);
  });
}

}  // namespace camk::math
