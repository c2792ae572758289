// SPDX-License-Identifier: MIT
// Scales and shifts of a modulated layer, read from coordinate grids. Definition: camkernels.reference.
// coordinate_modulation. With the 2^D nodes c around a point, their linear weights w_c(u) and rows T_c of numbers,
//
//   y = sum_c w_c T_c
//
// Rows are wide and their number is a run-time one, so a kernel loops over parts of them with the coefficients that
// this file finds, and hands back one number per node: the product of its row with a cotangent.
#pragma once
#include "math/interpolation.h"

namespace camk::math {

// One axis of nodes: position = (u + 1) scale + shift.
template <class S>
struct NodeAxis {
  S scale, shift;
  uint32_t nodes, stride;
};

// A grid of nodes; axis[d] belongs to coordinate slot d.
template <class S>
struct NodeGrid {
  NodeAxis<S> axis[kMaxDims];
  uint32_t rows;  // nodes in all; row number `rows`, of zeros, stands for nodes beyond
  bool zeros;     // padding: nodes beyond count as 0, else positions are moved onto the outer nodes
};

// `inside` where low <= x < high; not where x is NaN.
template <class C, class V>
CAMK_HD V choose_within(C x, C low, C high, V inside, V outside) {
  return choose_below(x, high, choose_below(x, low, outside, inside), outside);
}

// The nodes around a point.
template <int D, class C>
struct Nodes : Corners<D, C, false, (D > 0 && D <= 3)> {
  using Base = Corners<D, C, false, (D > 0 && D <= 3)>;
  using Base::each_axis, Base::each_corner, Base::kAxes, Base::value, Base::first, Base::second;
  using S = typename scalar_of<C>::type;
  using Index = typename index_of<C>::type;

  Vec<Index, kAxes> term;  // of the lower node
  Vec<uint32_t, kAxes> stride;
  uint32_t rows;
  Index absent;  // bit 2 d + side is set where axis d has no node on that side
  Index broken;  // 1: a coordinate is NaN: so are the value and its derivative, and no row is touched; else 0

  Nodes() = default;
  CAMK_HD Nodes(const NodeGrid<S>& grid, int n_dims, const Vec<C, kAxes>& u)
      : Base(n_dims, false), rows(grid.rows), absent(0u), broken(0u) {
    const Index none(0u), one(1u), all(~0u);
    const C zero(0), far = C(S(kFar));
    Index lost = none;  // 1: no node is near
    each_axis([&](int d) CAMK_INLINED {
      const NodeAxis<S>& axis = grid.axis[d];
      // inf times a scale of 0 would be NaN
      const C x = choose_below(far, u[d], far, choose_below(u[d], -far, -far, u[d]));
      const C end = C(S(axis.nodes)), last = C(S(axis.nodes - 1));
      C pos = multiply_add(x + C(1), C(axis.scale), C(axis.shift)), slope = C(axis.scale);
      broken = broken | choose_below(x, far + far, none, one);
      if (grid.zeros) {
        lost = lost | choose_within(pos, C(-1), end, none, one);
      } else {
        slope = choose_below(zero, pos, choose_below(pos, last, slope, zero), zero);
        pos = choose_below(zero, pos, choose_below(pos, last, pos, last), zero);
      }
      pos = choose_within(pos, C(-1), end, pos, zero);
      const C whole = round_down(pos), t = pos - whole;
      const Index node = to_word(whole), nodes(axis.nodes);
      absent = absent | choose_below(node, nodes, none, Index(1u << (2 * d)));
      absent = absent | choose_below(node + one, nodes, none, Index(2u << (2 * d)));
      term[d] = node * Index(axis.stride);
      stride[d] = axis.stride;
      value[d][0] = C(1) - t, value[d][1] = t;
      first[d][0] = -slope, first[d][1] = slope;
      second[d][0] = second[d][1] = zero;
    });
    absent = choose_below(broken | lost, one, absent, all);
  }

  CAMK_HD Index index(int corner) const {
    Index i(0u);
    uint32_t wanted = 0;  // bits of `absent`
    each_axis([&](int d) CAMK_INLINED {
      const int side = (corner >> d) & 1;
      wanted |= 1u << (2 * d + side);
      i = i + (side ? term[d] + Index(stride[d]) : term[d]);
    });
    return choose_below(absent & Index(wanted), Index(1u), i, Index(rows));
  }

  // gu_a += slope_ca dot: what a corner c adds to the gradient in u of sum_c w_c dot_c
  CAMK_HD void pull_back(int c, C dot, Vec<C, kAxes>& gu) const {
    each_axis([&](int a) CAMK_INLINED { gu[a] = gu[a] + this->slope(c, a) * dot; });
  }

  // gu_b += sum_a v_a curve_cab dot: the same of sum_c along_c(v) dot_c
  CAMK_HD void pull_back_along(int c, const Vec<C, kAxes>& v, C dot, Vec<C, kAxes>& gu) const {
    each_axis([&](int a) CAMK_INLINED {
      each_axis([&](int b) CAMK_INLINED { gu[b] = gu[b] + v[a] * this->curve(c, a, b) * dot; });
    });
  }
};

// ---- a product of P lookups: y = prod_p y_p, P = 1 or 3
// --------------------------------------------------------------

template <int P, class C>
CAMK_HD C product(const Vec<C, P>& y) {
  if constexpr (P == 1) {
    return y[0];
  } else {
    return y[0] * y[1] * y[2];
  }
}

// dy / dy_p: the gradient of <g, y> in y_p is g times this.
template <int P, class C>
CAMK_HD C without(const Vec<C, P>& y, int p) {
  if constexpr (P == 1) {
    return C(1);
  } else {
    return y[(p + 1) % 3] * y[(p + 2) % 3];
  }
}

// sum_p h_p dy / dy_p: the tangent of y where those of the y_p are h_p.
template <int P, class C>
CAMK_HD C tangent(const Vec<C, P>& y, const Vec<C, P>& h) {
  C sum = h[0] * without(y, 0);
  unroll<P - 1>([&](int p) CAMK_INLINED { sum = sum + h[p + 1] * without(y, p + 1); });
  return sum;
}

// The derivative of that tangent in y_p.
template <int P, class C>
CAMK_HD C tangent_without(const Vec<C, P>& y, const Vec<C, P>& h, int p) {
  if constexpr (P == 1) {
    return C(0);
  } else {
    const int q = (p + 1) % 3, r = (p + 2) % 3;
    return h[q] * y[r] + y[q] * h[r];
  }
}

// The coordinate slots of the planes xy, xz, yz.
CAMK_HD int plane_slot(int plane, int axis) { return axis == 0 ? plane / 2 : plane == 0 ? 1 : 2; }

}  // namespace camk::math
