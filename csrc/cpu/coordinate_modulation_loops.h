// SPDX-License-Identifier: MIT
// Loops of coordinate_modulation over points. SIMD lanes run over the numbers of a node's row: those of all layers, of
// gamma and beta, and of all channels, so that each node around a point is read once.
#pragma once
#include <limits>

#include "cpu/lane_functions.h"
#include "launch/coordinate_modulation.h"

namespace camk::cpu {

// What a pass works on. Rows are packed: [planes, nodes + 1, pitch], the last one of a plane and the numbers from
// `width` to `pitch` zero. Of points they are [end - begin, pitch]. Unused pointers are null.
template <class S>
struct LookupPiece {
  math::NodeGrid<S> grid;       // a row counts as many times as it has packs
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

// What is found for each of a block of points, a lane each.
template <class S>
using PointsOf = std::conditional_t<std::is_same_v<S, float>, Floats, S>;

// C: a pack of a row's numbers. D axes of nodes (0: any number), P lookups.
template <class C, int D, int P>
struct LookupLoops {
  using S = typename scalar_of<C>::type;
  using Points = PointsOf<S>;
  using Nodes = math::Nodes<D, Points>;
  using Axes = Vec<Points, Nodes::kAxes>;
  using Job = LookupPiece<S>;
  static constexpr int kBlock = lanes_of<Points>, kCorners = 1 << Nodes::kAxes;
  static constexpr int kSlots = P == 3 ? 3 : Nodes::kAxes;

  // A number per point.
  struct alignas(64) Column {
    S v[kBlock];
    CAMK_HD S& operator[](int n) { return v[n]; }
    CAMK_HD S operator[](int n) const { return v[n]; }
  };
  struct Lookup {
    Nodes nodes;
    Axes v;
    alignas(64) uint32_t at[kCorners][kBlock];  // the first packs of the rows around a point
    Column weight[kCorners], along[kCorners];
    Column first[kCorners], curved[kCorners];  // products of these rows with the cotangents of weight and along
  };
  struct Block {
    int64_t begin;
    int count;
    alignas(64) uint32_t broken[kBlock];
    Lookup lookup[P];
  };

  CAMK_HD static int slot(int p, int axis) { return P == 1 ? axis : math::plane_slot(p, axis); }

  CAMK_HD static int dims(const Job& job) { return D > 0 ? D : job.dims; }

  CAMK_HD static int slots(const Job& job) { return D > 0 ? kSlots : job.slots; }

  CAMK_HD static Vec<Points, kSlots> load_points(const Job& job, const Block& block, const S* from) {
    from += block.begin * slots(job);
    S copies[kBlock * kSlots] = {};
    if (block.count < kBlock) from = static_cast<S*>(std::memcpy(copies, from, block.count * slots(job) * sizeof(S)));
    Column columns[kSlots];
    for (int n = 0; n < kBlock; ++n) {
      for (int a = 0; a < slots(job); ++a) columns[a][n] = from[n * slots(job) + a];
    }
    Vec<Points, kSlots> points;
    for (int a = 0; a < slots(job); ++a) points[a] = load_lanes<Points>(columns[a].v);
    return points;
  }

  CAMK_HD static void store_points(const Job& job, const Block& block, const Vec<Points, kSlots>& points, S* to) {
    Column columns[kSlots];
    for (int a = 0; a < slots(job); ++a) store_lanes(columns[a].v, points[a]);
    to += block.begin * slots(job);
    for (int n = 0; n < block.count; ++n) {
      for (int a = 0; a < slots(job); ++a) to[n * slots(job) + a] = columns[a][n];
    }
  }

  CAMK_HD static Axes axes_of(const Job& job, const Vec<Points, kSlots>& points, int p) {
    Axes axes{};
    for (int a = 0; a < dims(job); ++a) axes[a] = points[slot(p, a)];
    return axes;
  }

  CAMK_HD static void look_up(const Job& job, Block& block) {
    const Vec<Points, kSlots> points = load_points(job, block, job.coords);
    typename Nodes::Index broken(0u);
    for (int p = 0; p < P; ++p) {
      Lookup& l = block.lookup[p];
      new (&l.nodes) Nodes(job.grid, dims(job), axes_of(job, points, p));  // a copy would be many bytes
      broken = broken | l.nodes.broken;
      const typename Nodes::Index plane(uint32_t(p * (job.grid.rows + job.pitch / lanes_of<C>)));
      l.nodes.each_corner([&](int c) CAMK_INLINED {
        store_lanes(l.at[c], plane + l.nodes.index(c));
        store_lanes(l.weight[c].v, l.nodes.weight(c));
      });
    }
    store_lanes(block.broken, broken);
  }

  // along_c = sum_a v_a slope_ca
  CAMK_HD static void look_along(const Job& job, Block& block) {
    Vec<Points, kSlots> v{};
    if (job.v) v = load_points(job, block, job.v);
    for (int p = 0; p < P; ++p) {
      Lookup& l = block.lookup[p];
      l.v = axes_of(job, v, p);
      l.nodes.each_corner([&](int c) CAMK_INLINED { store_lanes(l.along[c].v, l.nodes.along(c, l.v)); });
    }
  }

  // The gradient in the coordinates, from the products of rows.
  CAMK_HD static void write_coordinates(const Job& job, const Block& block, bool curved) {
    Vec<Points, kSlots> gu{};
    for (int p = 0; p < P; ++p) {
      const Lookup& l = block.lookup[p];
      Axes found{};
      l.nodes.each_corner([&](int c) CAMK_INLINED {
        l.nodes.pull_back(c, load_lanes<Points>(l.first[c].v), found);
        if (curved) l.nodes.pull_back_along(c, l.v, load_lanes<Points>(l.curved[c].v), found);
      });
      for (int a = 0; a < dims(job); ++a) gu[slot(p, a)] = gu[slot(p, a)] + found[a];
    }
    const auto broken = load_lanes<typename Nodes::Index>(block.broken);
    const typename Nodes::Index one(1u);
    for (int a = 0; a < slots(job); ++a) {
      gu[a] = choose_below(broken, one, gu[a], Points(std::numeric_limits<S>::quiet_NaN()));
    }
    store_points(job, block, gu, job.gu);
  }

  // body(block, point, where its numbers begin) for every point whose coordinates are numbers, then finish(block, where
  // those of its points begin), block by block; along: look_along, too. Nodes are found a block ahead, as the processor
  // would wait for them: the value takes 13 % less time (a Xeon with AMX).
  template <class Body, class Finish>
  CAMK_HD static void each(const Job& job, bool along, const Body& body, const Finish& finish) {
    Block blocks[2];
    int turn = 0;
    for (int64_t i = job.begin - kBlock; i < job.end; i += kBlock) {
      Block &block = blocks[turn], &next = blocks[turn ^= 1];
      if (i + kBlock < job.end) {
        next.begin = i + kBlock, next.count = int(std::min<int64_t>(kBlock, job.end - next.begin));
        look_up(job, next);
        if (along) look_along(job, next);
      }
      if (i < job.begin) continue;
      const int64_t row = (i - job.begin) * job.pitch;
      for (int n = 0; n < block.count; ++n) {
        if (!block.broken[n]) body(block, n, row + n * job.pitch);
      }
      finish(block, row);
    }
  }

  // body(k) for the packs of a row, which is no longer than half a pack where C is one
  template <class Body>
  CAMK_HD static void each_pack(const Job& job, const Body& body) {
    if constexpr (lanes_of<C> < lanes_of<Lanes<S>>) return body(0);
    for (int64_t k = 0; k < job.pitch; k += lanes_of<C>) body(k);
  }

  // Numbers k to k + lanes_of<C> of a row around point n.
  template <class Number>
  CAMK_HD static Number* numbers(Number* rows, const Lookup& l, int c, int n, int64_t k) {
    return rows + size_t(l.at[c][n]) * lanes_of<C> + k;
  }

  // sum_c coefficient_c row_c
  CAMK_HD static C combine(const Lookup& l, const S* rows, const Column* coefficients, int n, int64_t k) {
    C sum(S(0));
    l.nodes.each_corner([&](int c) CAMK_INLINED {
      sum = multiply_add(C(coefficients[c][n]), C::load(numbers(rows, l, c, n, k)), sum);
    });
    return sum;
  }

  CAMK_HD static Vec<C, P> values(const Job& job, const Block& block, int n, int64_t k) {
    Vec<C, P> y;
    for (int p = 0; p < P; ++p) y[p] = combine(block.lookup[p], job.rows, block.lookup[p].weight, n, k);
    return y;
  }

  // NaN in the rows of points with NaN coordinates, of the block whose rows begin at `rows`.
  CAMK_HD static void fill_broken(const Job& job, const Block& block, S* rows) {
    uint32_t any = 0;
    for (int n = 0; n < kBlock; ++n) any |= block.broken[n];
    if (!any) return;
    for (int n = 0; n < block.count; ++n) {
      if (block.broken[n]) std::fill_n(rows + n * job.pitch, job.pitch, std::numeric_limits<S>::quiet_NaN());
    }
  }

  static void value(Job job) {
    const auto body = [&](Block& block, int n, int64_t row) CAMK_INLINED {
      each_pack(job, [&](int64_t k) CAMK_INLINED { math::product(values(job, block, n, k)).store(job.y + row + k); });
    };
    each(job, false, body, [&](Block& block, int64_t row) CAMK_INLINED { fill_broken(job, block, job.y + row); });
  }

  // Products of the rows around a point, summed over its packs.
  struct Products {
    C first[P][kCorners], curved[P][kCorners];

    CAMK_HD explicit Products(const Block& block) {
      each_of(block, [&](int p, int c) CAMK_INLINED { first[p][c] = curved[p][c] = C(S(0)); });
    }
    CAMK_HD void finish(Block& block, int n) const {
      each_of(block, [&](int p, int c) CAMK_INLINED {
        block.lookup[p].first[c][n] = sum_of_lanes(first[p][c]);
        block.lookup[p].curved[c][n] = sum_of_lanes(curved[p][c]);
      });
    }
    template <class Body>
    CAMK_HD static void each_of(const Block& block, const Body& body) {
      for (int p = 0; p < P; ++p) block.lookup[p].nodes.each_corner([&](int c) CAMK_INLINED { body(p, c); });
    }
  };

  static void backward(Job job) {
    const auto body = [&](Block& block, int n, int64_t row) CAMK_INLINED {
      Products products(block);
      each_pack(job, [&](int64_t k) CAMK_INLINED {
        Vec<C, P> y{};
        if constexpr (P > 1) y = values(job, block, n, k);
        for (int p = 0; p < P; ++p) {
          const Lookup& l = block.lookup[p];
          const C part = C::load(job.g + row + k) * math::without(y, p);
          l.nodes.each_corner([&](int c) CAMK_INLINED {
            if (job.gu) {
              C& sum = products.first[p][c];
              sum = multiply_add(part, C::load(numbers(job.rows, l, c, n, k)), sum);
            }
            if (job.sums) add(numbers(job.sums, l, c, n, k), C(l.weight[c][n]) * part);
          });
        }
      });
      if (job.gu) products.finish(block, n);
    };
    each(job, false, body, [&](Block& block, int64_t) CAMK_INLINED {
      if (job.gu) write_coordinates(job, block, false);
    });
  }

  // Gradients of <v, gu> + <tangents, grid gradient>, which is <g, tangent of y>.
  static void second_order(Job job) {
    const auto body = [&](Block& block, int n, int64_t row) CAMK_INLINED {
      Products products(block);
      S* gg = job.y ? job.y + row : nullptr;
      each_pack(job, [&](int64_t k)
                         CAMK_INLINED { second_order_of(job, block, n, C::load(job.g + row + k), gg, k, products); });
      products.finish(block, n);
    };
    each(job, true, body, [&](Block& block, int64_t row) CAMK_INLINED {
      if (job.y) fill_broken(job, block, job.y + row);
      if (job.gu) write_coordinates(job, block, job.v != nullptr);
    });
  }

 private:
  CAMK_HD static void add(S* to, C more) { (C::load(to) + more).store(to); }

  CAMK_HD static void second_order_of(const Job& job, const Block& block, int n, C g, S* gg, int64_t k,
                                      Products& products) {
    Vec<C, P> y{}, h;
    if constexpr (P > 1) y = values(job, block, n, k);
    for (int p = 0; p < P; ++p) {
      const Lookup& l = block.lookup[p];
      h[p] = combine(l, job.rows, l.along, n, k);
      if (job.tangents) h[p] = h[p] + combine(l, job.tangents, l.weight, n, k);
    }
    if (gg) math::tangent(y, h).store(gg + k);
    for (int p = 0; p < P; ++p) {
      const Lookup& l = block.lookup[p];
      const C of_value = g * math::tangent_without(y, h, p), of_tangent = g * math::without(y, p);
      l.nodes.each_corner([&](int c) CAMK_INLINED {
        if (job.gu) {
          C &first = products.first[p][c], &curved = products.curved[p][c];
          const C row = C::load(numbers(job.rows, l, c, n, k));
          first = multiply_add(of_value, row, first);
          curved = multiply_add(of_tangent, row, curved);
          if (job.tangents) first = multiply_add(of_tangent, C::load(numbers(job.tangents, l, c, n, k)), first);
        }
        if (job.sums) {
          add(numbers(job.sums, l, c, n, k), C(l.weight[c][n]) * of_value + C(l.along[c][n]) * of_tangent);
        }
      });
    }
  }
};

template <class S>
struct LookupKernels {
  using Loop = void (*)(LookupPiece<S>);
  int64_t lanes;  // of a pack of a row's numbers
  Loop value, backward, second_order;
};

template <class C, int D, int P, class S = typename scalar_of<C>::type>
constexpr LookupKernels<S> lookup_loops() {
  using Loops = LookupLoops<C, D, P>;
  return {lanes_of<C>, Loops::value, Loops::backward, Loops::second_order};
}

template <class C, class S = typename scalar_of<C>::type>
LookupKernels<S> kernels_with(const launch::NodeGrids& grids) {
  if (grids.planes == 3) return lookup_loops<C, 2, 3>();
  switch (grids.dims) {
    case 1:
      return lookup_loops<C, 1, 1>();
    case 2:
      return lookup_loops<C, 2, 1>();
    case 3:
      return lookup_loops<C, 3, 1>();
    default:
      return lookup_loops<C, 0, 1>();
  }
}

// The loops for these grids.
template <class S>
LookupKernels<S> kernels_for(const launch::NodeGrids& grids) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    if (grids.width() <= lanes_of<HalfFloats>) return kernels_with<HalfFloats>(grids);
  }
#endif
  return kernels_with<Lanes<S>>(grids);
}

}  // namespace camk::cpu
