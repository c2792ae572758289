// SPDX-License-Identifier: MIT
// Loops of csrc/math/hash_grid.h over points. A loop handles as many points at a time as C has lanes; points beyond the
// last are padding that the caller filled with zeros.
#include "cpu/hash_grid_kernels.h"

namespace camk::cpu {
namespace {

// How far ahead coordinates and gradients are: between random rows the processor does not see that these are read in
// order. Without, the scattering pass over 16 levels takes 1.3 times as long (Zen 3); other distances were not tried.
constexpr int64_t kNumbersAhead = 128;

// What all loops share. D axes (0: any number, and nearest lookups too), F features at a time. Hot: where speed matters
// most, whole rows of F features at a constant stride and corners written out, which are 1.1 to 1.3 times faster and
// cost most of the compile time.
template <class C, class T, int D, int F, bool Hot>
struct Loop {
  using S = typename scalar_of<C>::type;
  using P = Piece<S, T>;
  using Corners = math::Stencil<D, C, false, Hot>;
  using RolledCorners = math::Stencil<D, C, false, false>;
  static constexpr int kAxes = Corners::kAxes;
  using Point = Vec<C, kAxes>;
  using Row = Vec<C, F>;
  using Rows = Vec<Row, kAxes>;

  CAMK_HD static int dims(const P& p) { return D > 0 ? D : p.dims; }
  CAMK_HD static int64_t stride(const P& p) { return Hot ? F : p.features; }
  CAMK_HD static C load_streamed(const S* from) {
    if constexpr (lanes_of<C> > 1) __builtin_prefetch(from + kNumbersAhead);
    return load_lanes<C>(from);
  }
  CAMK_HD static Point load_point(const P& p, const S* from, int64_t i) {
    Point r;
    for (int a = 0; a < dims(p); ++a) r[a] = load_streamed(from + a * p.pitch + i);
    return r;
  }
  CAMK_HD static void store_point(const P& p, S* to, int64_t i, const Point& r) {
    for (int a = 0; a < dims(p); ++a) store_lanes<C>(to + a * p.pitch + i, r[a]);
  }
  CAMK_HD static Row load_row(const P& p, const S* from, int64_t i) {
    Row r;
    for (int f = 0; f < F; ++f) r[f] = load_streamed(from + f * p.pitch + i);
    return r;
  }
  CAMK_HD static void store_row(const P& p, S* to, int64_t i, const Row& r) {
    for (int f = 0; f < F; ++f) store_lanes<C>(to + f * p.pitch + i, r[f]);
  }
  // Channel f * dims + a <-> [a][f]
  CAMK_HD static Rows load_rows_of(const P& p, const S* from, int64_t i) {
    Rows r;
    for (int f = 0; f < F; ++f) {
      for (int a = 0; a < dims(p); ++a) r[a][f] = load_lanes<C>(from + (f * dims(p) + a) * p.pitch + i);
    }
    return r;
  }
  CAMK_HD static void store_rows_of(const P& p, S* to, int64_t i, const Rows& r) {
    for (int f = 0; f < F; ++f) {
      for (int a = 0; a < dims(p); ++a) store_lanes<C>(to + (f * dims(p) + a) * p.pitch + i, r[a][f]);
    }
  }

  // What is found ahead of a block of points: the entries of its corners, which its loads then take from memory, and
  // its places in the cells.
  struct Found {
    alignas(64) uint32_t entries[1 << kAxes][lanes_of<C>];
    Point t;
  };
  template <class Stencil, class Number>
  CAMK_HD static void find(const P& p, int64_t i, const Number* rows, Found& found) {
    const Point x = load_point(p, p.x, i);
    Stencil s(p.level, dims(p), p.interpolation);
    s.each_axis([&](int d) CAMK_INLINED { found.t[d] = s.locate(p.level, d, x[d]); });
    s.each_corner([&](int c) CAMK_INLINED { store_lanes(found.entries[c], s.index(c)); });
    if (!p.beyond_cache) return;
    s.each_corner([&](int c) CAMK_INLINED { prefetch_rows<lanes_of<C>>(rows, stride(p), found.entries[c]); });
  }

  // The corners of such a block, for the formulas.
  template <class Stencil>
  struct FoundCorners : Stencil::Base {
    const Found& found;
    CAMK_HD FoundCorners(const P& p, const Found& f)
        : Stencil::Base(p.level, dims(p), f.t, p.interpolation), found(f) {}
    CAMK_HD const uint32_t* index(int corner) const { return found.entries[corner]; }
  };

  // How many blocks ahead. A block waits for its entries longer than the processor looks ahead: finding them in time
  // makes the passes over levels in the cache 1.3 to 1.7 times as fast. Rows of larger levels are prefetched at the
  // same distance (Zen 5; 4 instead of 8 blocks in 2-D cost the scattering pass 6 %, 2 blocks 30 %).
  static constexpr int kBlocksAhead = D == 2 ? 8 : 4;

  // body(i, corners) for every block of points. rows: what the body reads or adds to.
  template <class Stencil, class Number, class Body>
  CAMK_HD static void each(const P& p, const Number* rows, Body body) {
    Found ring[kBlocksAhead];
    constexpr int64_t kAhead = kBlocksAhead * lanes_of<C>;
    int slot = 0;
    for (int64_t i = p.begin - kAhead; i < p.end; i += lanes_of<C>) {
      if (i >= p.begin) body(i, FoundCorners<Stencil>(p, ring[slot]));
      if (i + kAhead < p.end) find<Stencil>(p, i + kAhead, rows, ring[slot]);
      slot = (slot + 1) % kBlocksAhead;
    }
  }
};

// Loops that read the table.
template <class C, class T, int D, int F, bool Hot>
struct ReadLoops : Loop<C, T, D, F, Hot> {
  using Base = Loop<C, T, D, F, Hot>;
  using Base::load_point, Base::load_row, Base::load_rows_of, Base::store_point, Base::store_row, Base::store_rows_of;
  using typename Base::Corners, typename Base::P, typename Base::Point, typename Base::RolledCorners,
      typename Base::Row, typename Base::Rows;

  CAMK_HD static auto fetcher(const P& p) {
    return [table = p.table, stride = Base::stride(p)](const uint32_t* entries)
               CAMK_INLINED { return load_rows<F, C, T>(table, stride, entries); };
  }

  static void value(P p) {
    Base::template each<Corners>(p, p.table, [&](int64_t i, const auto& s) CAMK_INLINED {
      Row y{};
      math::grid_value(s, fetcher(p), y);
      store_row(p, p.y, i, y);
    });
  }
  static void jacobian(P p) {
    Base::template each<Corners>(p, p.table, [&](int64_t i, const auto& s) CAMK_INLINED {
      Row y{};
      Rows j{};
      math::grid_jacobian(s, fetcher(p), y, j);
      store_row(p, p.y, i, y);
      store_rows_of(p, p.j, i, j);
    });
  }
  static void backward_x(P p) {
    Base::template each<Corners>(p, p.table, [&](int64_t i, const auto& s) CAMK_INLINED {
      Point gx = load_point(p, p.gx, i);
      math::grid_backward_x(s, load_row(p, p.g, i), fetcher(p), gx);
      store_point(p, p.gx, i, gx);
    });
  }
  static void jacobian_backward_x(P p) {
    Base::template each<RolledCorners>(p, p.table, [&](int64_t i, const auto& s) CAMK_INLINED {
      Point gx = load_point(p, p.gx, i);
      math::grid_jacobian_backward_x(s, load_rows_of(p, p.gj, i), fetcher(p), gx);
      store_point(p, p.gx, i, gx);
    });
  }
  // Adds to y, where value overwrites it.
  static void along(P p) {
    Base::template each<RolledCorners>(p, p.table, [&](int64_t i, const auto& s) CAMK_INLINED {
      Row y = load_row(p, p.y, i);
      math::grid_along(s, load_point(p, p.v, i), fetcher(p), y);
      store_row(p, p.y, i, y);
    });
  }
  static void along_backward_x(P p) {
    Base::template each<RolledCorners>(p, p.table, [&](int64_t i, const auto& s) CAMK_INLINED {
      Point gx = load_point(p, p.gx, i);
      math::grid_along_backward_x(s, load_point(p, p.v, i), load_row(p, p.g, i), fetcher(p), gx);
      store_point(p, p.gx, i, gx);
    });
  }
};

// Loops that add to the table gradient.
template <class C, class A, int D, int F, bool Hot>
struct ScatterLoops : Loop<C, A, D, F, Hot> {
  using Base = Loop<C, A, D, F, Hot>;
  using Base::load_point, Base::load_row, Base::load_rows_of;
  using typename Base::Corners, typename Base::RolledCorners;
  using P = ScatterPiece<typename Base::S, A>;

  CAMK_HD static auto adder(const P& p) { return RowAdder<F, C, A>{p.sums, Base::stride(p), p.first, p.count}; }

  static void backward_table(P p) {
    Base::template each<Corners>(p, p.sums, [&](int64_t i, const auto& s) CAMK_INLINED {
      math::grid_backward_table(s, load_row(p, p.g, i), adder(p));
    });
  }
  static void jacobian_backward_table(P p) {
    Base::template each<RolledCorners>(p, p.sums, [&](int64_t i, const auto& s) CAMK_INLINED {
      math::grid_jacobian_backward_table(s, load_rows_of(p, p.gj, i), adder(p));
    });
  }
  static void along_backward_table(P p) {
    Base::template each<RolledCorners>(p, p.sums, [&](int64_t i, const auto& s) CAMK_INLINED {
      math::grid_along_backward_table(s, load_point(p, p.v, i), load_row(p, p.g, i), adder(p));
    });
  }
};

template <class C, class T, int D, int F, bool Hot = false>
constexpr Kernels<typename scalar_of<C>::type, T> loops() {
  using R = ReadLoops<C, T, D, F, Hot>;
  using W = ScatterLoops<C, accumulator_of<T>, D, F, Hot>;
  return {F,
          R::value,
          R::jacobian,
          R::backward_x,
          R::jacobian_backward_x,
          R::along,
          R::along_backward_x,
          W::backward_table,
          W::jacobian_backward_table,
          W::along_backward_table};
}

// Few features: points fill the lanes. Many: the features of one point do; half types, whose rows are short, never get
// there.
template <class T, int D>
Kernels<float, T> specialised(int features, bool whole) {
  if constexpr (std::is_same_v<T, float>) {
    if (features >= 8) return loops<float, T, D, 8>();
    if (features >= 4) return loops<float, T, D, 4>();
  }
  if constexpr (D < 4 && !std::is_same_v<T, Half>) {
    if (features == 2 && whole) return loops<Floats, T, D, 2, true>();
  }
  if (features >= 2) return loops<Floats, T, D, 2>();
  return loops<Floats, T, D, 1>();
}

}  // namespace

// What is not specialised (float64, nearest lookups, 1 axis or more than 4) takes one feature of one point at a time.
template <class S, class T>
Kernels<S, T> kernels_for(int dims, bool nearest, int features, bool whole) {
  if constexpr (std::is_same_v<S, float>) {
    if (dims == 2 && !nearest) return specialised<T, 2>(features, whole);
    if (dims == 3 && !nearest) return specialised<T, 3>(features, whole);
    if (dims == 4 && !nearest) return specialised<T, 4>(features, whole);
  }
  return loops<S, T, 0, 1>();
}

template Kernels<float, float> kernels_for(int, bool, int, bool);
template Kernels<float, Half> kernels_for(int, bool, int, bool);
template Kernels<float, BFloat16> kernels_for(int, bool, int, bool);
template Kernels<double, double> kernels_for(int, bool, int, bool);
template Kernels<double, float> kernels_for(int, bool, int, bool);
template Kernels<double, Half> kernels_for(int, bool, int, bool);
template Kernels<double, BFloat16> kernels_for(int, bool, int, bool);

}  // namespace camk::cpu
