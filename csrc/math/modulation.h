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

// The nodes around a point. S: float or double.
template <int D, class S>
struct Nodes : Corners<D, S, false, (D > 0 && D <= 3)> {
  using Base = Corners<D, S, false, (D > 0 && D <= 3)>;
  using Base::each_axis, Base::each_corner, Base::kAxes, Base::value, Base::first, Base::second;

  Vec<uint32_t, kAxes> term;  // of the lower node
  Vec<uint32_t, kAxes> stride;
  uint32_t rows, absent;  // absent: bit 2 d + side is set where axis d has no node on that side
  bool broken;            // a coordinate is NaN: so are the value and its derivative, and no row is touched

  Nodes() = default;
  CAMK_HD Nodes(const NodeGrid<S>& grid, int n_dims, const Vec<S, kAxes>& u)
      : Base(n_dims, false), rows(grid.rows), absent(0), broken(false) {
    bool seen = true;
    each_axis([&](int d) CAMK_INLINED {
      const NodeAxis<S>& axis = grid.axis[d];
      const S far(kFar), x = u[d] > far ? far : u[d] < -far ? -far : u[d];  // inf times a scale of 0 would be NaN
      S pos = multiply_add(x + S(1), axis.scale, axis.shift), slope = axis.scale;
      const S last = S(axis.nodes - 1);
      broken |= x != x;
      if (grid.zeros) {
        seen &= pos >= S(-1) && pos < S(axis.nodes);
      } else if (!(pos > S(0) && pos < last)) {
        pos = pos > S(0) ? last : S(0);
        slope = S(0);
      }
      if (!(pos >= S(-1) && pos < S(axis.nodes))) pos = S(0);
      const S whole = round_down(pos), t = pos - whole;
      const int32_t node = int32_t(whole);
      if (node < 0) absent |= 1u << (2 * d);
      if (uint32_t(node + 1) >= axis.nodes) absent |= 2u << (2 * d);
      term[d] = uint32_t(node) * axis.stride;
      stride[d] = axis.stride;
      value[d][0] = S(1) - t, value[d][1] = t;
      first[d][0] = -slope, first[d][1] = slope;
      second[d][0] = second[d][1] = S(0);
    });
    if (broken || !seen) absent = ~0u;
  }

  CAMK_HD uint32_t index(int corner) const {
    uint32_t i = 0;
    bool there = true;
    each_axis([&](int d) CAMK_INLINED {
      const int side = (corner >> d) & 1;
      there &= !(absent >> (2 * d + side) & 1u);
      i += term[d] + (side ? stride[d] : 0u);
    });
    return there ? i : rows;
  }

  // gu_a += slope_ca dot: what a corner c adds to the gradient in u of sum_c w_c dot_c
  CAMK_HD void pull_back(int c, S dot, Vec<S, kAxes>& gu) const {
    each_axis([&](int a) CAMK_INLINED { gu[a] = gu[a] + this->slope(c, a) * dot; });
  }

  // gu_b += sum_a v_a curve_cab dot: the same of sum_c along_c(v) dot_c
  CAMK_HD void pull_back_along(int c, const Vec<S, kAxes>& v, S dot, Vec<S, kAxes>& gu) const {
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
