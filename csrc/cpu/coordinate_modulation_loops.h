// SPDX-License-Identifier: MIT
// Loops of coordinate_modulation over points. SIMD lanes run over the numbers of a node's row: those of all layers, of
// gamma and beta, and of all channels, so that each node around a point is read once.
#pragma once
#include <limits>

#include "cpu/lane_functions.h"
#include "launch/coordinate_modulation.h"

namespace camk::cpu {

template <class S>
using PackOf = std::conditional_t<std::is_same_v<S, double>, Doubles, Floats>;

// What a pass works on. Rows are packed: [planes, rows + 1, pitch], the last one of a plane and the numbers from
// `width` to `pitch` zero. Of points they are [end - begin, pitch]. Unused pointers are null.
template <class S>
struct LookupPiece {
  math::NodeGrid<S> grid;
  int dims, slots;              // axes of nodes, coordinates of a point
  int64_t pitch;                // width rounded up to whole packs
  const S* coords;              // [points, slots]
  const S* rows;                // packed grids
  int64_t begin = 0, end = 0;   // points
  const S* g = nullptr;         // rows of these points: gradient of the value
  const S* v = nullptr;         // [points, slots] cotangent of the gradient in coords
  const S* tangents = nullptr;  // packed cotangent of the gradient in the grids
  S* y = nullptr;               // rows of these points: value, or gradient in g
  S* gu = nullptr;              // [points, slots] gradient in coords
  S* sums = nullptr;            // packed gradient in the grids, added to
};

// D axes of nodes (0: any number), P lookups.
template <class S, int D, int P>
struct LookupLoops {
  using C = PackOf<S>;
  using Nodes = math::Nodes<D, S>;
  using Job = LookupPiece<S>;
  static constexpr int kLanesOf = lanes_of<C>, kCorners = 1 << Nodes::kAxes;

  struct Lookup {
    Nodes nodes;
    size_t at[kCorners];  // where the rows around the point begin
    S weight[kCorners], along[kCorners];
    C first[kCorners], curved[kCorners];  // products of these rows with the cotangents of weight and along
    Vec<S, Nodes::kAxes> v;
  };
  struct Point {
    Lookup lookup[P];
    bool broken = false;
  };

  CAMK_HD static int slot(int p, int axis) { return P == 1 ? axis : math::plane_slot(p, axis); }

  CAMK_HD static int dims(const Job& job) { return D > 0 ? D : job.dims; }

  CAMK_HD static void look_up(const Job& job, int64_t i, Point& point) {
    point.broken = false;
    for (int p = 0; p < P; ++p) {
      Lookup& l = point.lookup[p];
      Vec<S, Nodes::kAxes> u{};
      for (int a = 0; a < dims(job); ++a) u[a] = job.coords[i * job.slots + slot(p, a)];
      l.nodes = Nodes(job.grid, dims(job), u);
      point.broken |= l.nodes.broken;
      const size_t plane = size_t(p) * (job.grid.rows + size_t(1));
      l.nodes.each_corner([&](int c) CAMK_INLINED {
        l.at[c] = (plane + l.nodes.index(c)) * job.pitch;
        l.weight[c] = l.nodes.weight(c);
      });
    }
  }

  CAMK_HD static void clear_products(Point& point) {
    for (Lookup& l : point.lookup) {
      l.nodes.each_corner([&](int c) CAMK_INLINED { l.first[c] = l.curved[c] = C(S(0)); });
    }
  }

  // along_c = sum_a v_a slope_ca
  CAMK_HD static void look_along(const Job& job, int64_t i, Point& point) {
    for (int p = 0; p < P; ++p) {
      Lookup& l = point.lookup[p];
      for (int a = 0; a < dims(job); ++a) l.v[a] = job.v ? job.v[i * job.slots + slot(p, a)] : S(0);
      l.nodes.each_corner([&](int c) CAMK_INLINED { l.along[c] = l.nodes.along(c, l.v); });
    }
  }

  // sum_c coefficient_c row_c, numbers k to k + kLanesOf
  CAMK_HD static C combine(const Lookup& l, const S* rows, const S* coefficients, int64_t k) {
    C sum(S(0));
    l.nodes.each_corner([&](int c)
                            CAMK_INLINED { sum = multiply_add(C(coefficients[c]), C::load(rows + l.at[c] + k), sum); });
    return sum;
  }

  CAMK_HD static Vec<C, P> values(const Job& job, const Point& point, int64_t k) {
    Vec<C, P> y;
    for (int p = 0; p < P; ++p) y[p] = combine(point.lookup[p], job.rows, point.lookup[p].weight, k);
    return y;
  }

  CAMK_HD static S total(C lanes) {
    S sum(0);
    for (int k = 0; k < kLanesOf; ++k) sum += lanes.v[k];
    return sum;
  }

  static void fill_broken(S* row, int64_t count) { std::fill(row, row + count, std::numeric_limits<S>::quiet_NaN()); }

  // The gradient in the coordinates of a point, from the products of its rows.
  static void write_coordinates(const Job& job, int64_t i, const Point& point, bool curved) {
    S* gu = job.gu + i * job.slots;
    std::fill(gu, gu + job.slots, S(0));
    for (int p = 0; p < P; ++p) {
      const Lookup& l = point.lookup[p];
      Vec<S, Nodes::kAxes> found{};
      l.nodes.each_corner([&](int c) CAMK_INLINED {
        l.nodes.pull_back(c, total(l.first[c]), found);
        if (curved) l.nodes.pull_back_along(c, l.v, total(l.curved[c]), found);
      });
      for (int a = 0; a < dims(job); ++a) gu[slot(p, a)] += found[a];
    }
  }

  static void value(const Job& job) {
    Point point;
    for (int64_t i = job.begin; i < job.end; ++i) {
      S* y = job.y + (i - job.begin) * job.pitch;
      look_up(job, i, point);
      if (point.broken) {
        fill_broken(y, job.pitch);
        continue;
      }
      for (int64_t k = 0; k < job.pitch; k += kLanesOf) math::product(values(job, point, k)).store(y + k);
    }
  }

  static void backward(const Job& job) {
    Point point;
    for (int64_t i = job.begin; i < job.end; ++i) {
      look_up(job, i, point);
      clear_products(point);
      if (point.broken) {
        if (job.gu) fill_broken(job.gu + i * job.slots, job.slots);
        continue;
      }
      const S* g = job.g + (i - job.begin) * job.pitch;
      for (int64_t k = 0; k < job.pitch; k += kLanesOf) {
        Vec<C, P> y{};
        if constexpr (P > 1) y = values(job, point, k);
        for (int p = 0; p < P; ++p) {
          Lookup& l = point.lookup[p];
          const C part = C::load(g + k) * math::without(y, p);
          l.nodes.each_corner([&](int c) CAMK_INLINED {
            if (job.gu) l.first[c] = multiply_add(part, C::load(job.rows + l.at[c] + k), l.first[c]);
            if (job.sums) add(job.sums + l.at[c] + k, C(l.weight[c]) * part);
          });
        }
      }
      if (job.gu) write_coordinates(job, i, point, false);
    }
  }

  // Gradients of <v, gu> + <tangents, grid gradient>, which is <g, tangent of y>.
  static void second_order(const Job& job) {
    Point point;
    for (int64_t i = job.begin; i < job.end; ++i) {
      look_up(job, i, point);
      look_along(job, i, point);
      clear_products(point);
      S* gg = job.y ? job.y + (i - job.begin) * job.pitch : nullptr;
      if (point.broken) {
        if (gg) fill_broken(gg, job.pitch);
        if (job.gu) fill_broken(job.gu + i * job.slots, job.slots);
        continue;
      }
      const S* g = job.g + (i - job.begin) * job.pitch;
      for (int64_t k = 0; k < job.pitch; k += kLanesOf) second_order_of(job, point, C::load(g + k), gg, k);
      if (job.gu) write_coordinates(job, i, point, job.v != nullptr);
    }
  }

 private:
  CAMK_HD static void add(S* to, C more) { (C::load(to) + more).store(to); }

  CAMK_HD static void second_order_of(const Job& job, Point& point, C g, S* gg, int64_t k) {
    Vec<C, P> y{}, h;
    if constexpr (P > 1) y = values(job, point, k);
    for (int p = 0; p < P; ++p) {
      const Lookup& l = point.lookup[p];
      h[p] = combine(l, job.rows, l.along, k);
      if (job.tangents) h[p] = h[p] + combine(l, job.tangents, l.weight, k);
    }
    if (gg) math::tangent(y, h).store(gg + k);
    for (int p = 0; p < P; ++p) {
      Lookup& l = point.lookup[p];
      const C of_value = g * math::tangent_without(y, h, p), of_tangent = g * math::without(y, p);
      l.nodes.each_corner([&](int c) CAMK_INLINED {
        if (job.gu) {
          const C row = C::load(job.rows + l.at[c] + k);
          l.first[c] = multiply_add(of_value, row, l.first[c]);
          l.curved[c] = multiply_add(of_tangent, row, l.curved[c]);
          if (job.tangents) {
            l.first[c] = multiply_add(of_tangent, C::load(job.tangents + l.at[c] + k), l.first[c]);
          }
        }
        if (job.sums) add(job.sums + l.at[c] + k, C(l.weight[c]) * of_value + C(l.along[c]) * of_tangent);
      });
    }
  }
};

template <class S>
struct LookupKernels {
  using Loop = void (*)(const LookupPiece<S>&);
  Loop value, backward, second_order;
};

template <class S, int D, int P>
constexpr LookupKernels<S> lookup_loops() {
  using Loops = LookupLoops<S, D, P>;
  return {Loops::value, Loops::backward, Loops::second_order};
}

// The loops for these grids.
template <class S>
LookupKernels<S> kernels_for(const launch::NodeGrids& grids) {
  if (grids.planes == 3) return lookup_loops<S, 2, 3>();
  switch (grids.dims) {
    case 1:
      return lookup_loops<S, 1, 1>();
    case 2:
      return lookup_loops<S, 2, 1>();
    case 3:
      return lookup_loops<S, 3, 1>();
    default:
      return lookup_loops<S, 0, 1>();
  }
}

}  // namespace camk::cpu
