// SPDX-License-Identifier: MIT
// Scalar probes of csrc/math, and of the lanes and number types of csrc/cpu, for the tests (tests/test_math.py builds
// them): formulas are checked without a tensor in sight. No part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <map>
#include <stdexcept>
#include <vector>

#include "cpu/lane_functions.h"
#include "cpu/storage.h"
#include "math/activation.h"
#include "math/hash_grid.h"
#include "math/modulation.h"
#include "math/neighbors.h"
#include "math/radial_basis.h"

namespace py = pybind11;
using namespace camk;
using Numbers = std::vector<double>;
using Rows = std::vector<Numbers>;
using RowSums = std::map<uint32_t, Numbers>;

namespace {

#ifndef CAMK_PROBE_LANES_ONLY  // what depends on no instruction set is built once
constexpr int kFeatures = 2;
using Row = Vec<double, kFeatures>;

struct Point {
  math::Level level;
  int dims;
  math::Interpolation kind;
  Numbers x;
};

Point make_point(const Numbers& scale, const std::vector<uint32_t>& stride, uint32_t size, double shift, bool hashed,
                 bool ceil_corner, int kind, const Numbers& x) {
  math::Level level{};
  for (size_t d = 0; d < x.size(); ++d) level.scale[d] = scale[d], level.stride[d] = stride[d];
  level.size = size, level.shift = shift, level.hashed = hashed, level.ceil_corner = ceil_corner;
  return {level, int(x.size()), math::Interpolation(kind), x};
}

// body(stencil) with the stencil of a fixed number of axes, or with the one that learns it at run time (general).
template <class C, class Body>
void with_stencil(const Point& p, bool general, const Body& body) {
  const auto run = [&]<int D, bool Nearest>() {
    using Stencil = math::Stencil<D, C, Nearest, (D == 1 || D == 2)>;  // more unrolled corners only take compile time
    Vec<C, Stencil::kAxes> x{};
    for (int d = 0; d < p.dims; ++d) x[d] = C(p.x[d]);
    body(Stencil(p.level, p.dims, x, p.kind));
  };
  const bool nearest = p.kind == math::Interpolation::kNearest;
  if (general || p.dims > 4) return run.template operator()<0, false>();
  const auto fixed = [&]<bool Nearest>() {
    if (p.dims == 1) return run.template operator()<1, Nearest>();
    if (p.dims == 2) return run.template operator()<2, Nearest>();
    if (p.dims == 3) return run.template operator()<3, Nearest>();
    run.template operator()<4, Nearest>();
  };
  nearest ? fixed.template operator()<true>() : fixed.template operator()<false>();
}

// Per corner: table row, weight, slope [D], curve [D * D].
template <class C>
py::tuple corners(const Point& p, bool general) {
  std::vector<uint32_t> index;
  Numbers weight;
  Rows slope, curve;
  with_stencil<C>(p, general, [&](const auto& s) {
    s.each_corner([&](int c) {
      index.push_back(s.index(c));
      weight.push_back(s.weight(c));
      Numbers first, second;
      for (int a = 0; a < p.dims; ++a) {
        first.push_back(s.slope(c, a));
        for (int b = 0; b < p.dims; ++b) second.push_back(s.curve(c, a, b));
      }
      slope.push_back(first), curve.push_back(second);
    });
  });
  return py::make_tuple(index, weight, slope, curve);
}

Row row_of(const Numbers& v) { return {{v.at(0), v.at(1)}}; }

template <int A>
Vec<double, A> vector_of(const Numbers& v) {
  Vec<double, A> r{};
  for (size_t i = 0; i < v.size(); ++i) r[i] = v[i];
  return r;
}

template <int A>
Numbers list_of(const Vec<double, A>& v, int n) {
  return Numbers(v.v, v.v + n);
}

// Everything that one point needs of one level, by name: g [F] cotangent of the value, gj [D][F] of the Jacobian, v [D]
// of the coordinate gradient. What would be added to table rows comes as {row: [F]}.
py::dict formulas(const Point& p, bool general, const Rows& table, const Numbers& g, const Rows& gj, const Numbers& v) {
  py::dict out;
  with_stencil<double>(p, general, [&](const auto& s) {
    constexpr int A = std::decay_t<decltype(s)>::kAxes;
    const auto fetch = [&](uint32_t i) { return row_of(table.at(i)); };
    const auto collect = [&](const char* name, const auto& formula) {
      RowSums sums;
      formula([&](uint32_t i, const Row& row) {
        Numbers& sum = sums.try_emplace(i, Numbers(kFeatures)).first->second;
        for (int f = 0; f < kFeatures; ++f) sum[f] += row[f];
      });
      out[name] = sums;
    };
    Row y{}, y_too{}, along{};
    Vec<Row, A> j{}, gjs{};
    for (int a = 0; a < p.dims; ++a) gjs[a] = row_of(gj.at(a));
    Vec<double, A> gx{}, gx_jacobian{}, gx_along{};
    const Vec<double, A> vs = vector_of<A>(v);
    math::grid_value(s, fetch, y);
    math::grid_jacobian(s, fetch, y_too, j);
    math::grid_backward_x(s, row_of(g), fetch, gx);
    math::grid_jacobian_backward_x(s, gjs, fetch, gx_jacobian);
    math::grid_along(s, vs, fetch, along);
    math::grid_along_backward_x(s, vs, row_of(g), fetch, gx_along);
    Rows jacobian;
    for (int a = 0; a < p.dims; ++a) jacobian.push_back(list_of(j[a], kFeatures));
    out["value"] = list_of(y, kFeatures), out["value again"] = list_of(y_too, kFeatures), out["jacobian"] = jacobian;
    out["backward_x"] = list_of(gx, p.dims), out["jacobian_backward_x"] = list_of(gx_jacobian, p.dims);
    out["along"] = list_of(along, kFeatures), out["along_backward_x"] = list_of(gx_along, p.dims);
    collect("backward_table", [&](auto add) { math::grid_backward_table(s, row_of(g), add); });
    collect("jacobian_backward_table", [&](auto add) { math::grid_jacobian_backward_table(s, gjs, add); });
    collect("along_backward_table", [&](auto add) { math::grid_along_backward_table(s, vs, row_of(g), add); });
  });
  return out;
}

// phi of numbers (x [2], centre [2], shape [4]), its gradient in them and, along directions, the second derivatives.
py::tuple radial_kernel(int kind, int form, const Numbers& numbers, const Numbers& along) {
  using Number = Dual<double>;
  math::RadialKernel<2, Number> kernel{};
  kernel.kind = math::RadialKind(kind), kernel.form = math::RadialShape(form);
  const auto number = [&](int i) { return Number(numbers.at(i), along.at(i)); };
  for (int i = 0; i < 2; ++i) kernel.x[i] = number(i), kernel.center[i] = number(2 + i);
  for (int i = 0; i < 4; ++i) kernel.shape[i] = number(4 + i);
  kernel.evaluate();
  const auto found = kernel.pull_back(Number(1.0));
  Numbers first, second;
  const auto note = [&](Number x) { first.push_back(x.value), second.push_back(x.along); };
  for (int i = 0; i < 2; ++i) note(found.x[i]);
  for (int i = 0; i < 2; ++i) note(found.center[i]);
  for (int i = 0; i < 4; ++i) note(found.shape[i]);
  return py::make_tuple(kernel.value.value, kernel.value.along, first, second);
}

// Per node around u, in a grid of these sizes whose first axis is contiguous: row, weight, slope [D], curve [D * D];
// and whether a coordinate is NaN.
template <int D>
py::tuple nodes(const Numbers& u, const std::vector<uint32_t>& sizes, bool zeros, bool align_corners) {
  math::NodeGrid<double> grid{};
  grid.rows = 1, grid.zeros = zeros;
  const int dims = int(u.size());
  for (int d = 0; d < dims; ++d) {
    grid.axis[d] = {(sizes[d] - align_corners) / 2.0, align_corners ? 0.0 : -0.5, sizes[d], grid.rows};
    grid.rows *= sizes[d];
  }
  const math::Nodes<D, double> found(grid, dims, vector_of<math::Nodes<D, double>::kAxes>(u));
  std::vector<uint32_t> index;
  Numbers weight;
  Rows slope, curve;
  found.each_corner([&](int c) {
    index.push_back(found.index(c)), weight.push_back(found.weight(c));
    slope.emplace_back(), curve.emplace_back();
    for (int a = 0; a < dims; ++a) {
      slope.back().push_back(found.slope(c, a));
      for (int b = 0; b < dims; ++b) curve.back().push_back(found.curve(c, a, b));
    }
  });
  return py::make_tuple(index, weight, slope, curve, found.broken != 0);
}

// What a product of three lookups y needs, for tangents h, per factor.
py::tuple products(const Numbers& y, const Numbers& h) {
  const Vec<double, 3> ys = vector_of<3>(y), hs = vector_of<3>(h);
  Numbers without, tangent_without;
  for (int p = 0; p < 3; ++p) {
    without.push_back(math::without(ys, p)), tangent_without.push_back(math::tangent_without(ys, hs, p));
  }
  return py::make_tuple(math::product(ys), without, math::tangent(ys, hs), tangent_without);
}

template <class C>
py::tuple settle(double x, int mode) {
  math::Status status;
  const C settled = math::settle(C(x), math::Outside(mode), status);
  return py::make_tuple(double(settled), int(status));
}

// The cells of a box around a point once it holds k centres, and those added by widening it to a squared distance.
template <int D>
py::tuple box_cells(const Rows& cuts, const std::vector<int32_t>& starts, const Numbers& at, int64_t k, double limit) {
  std::vector<math::Slabs> axes;
  Vec<double, D> x;
  Vec<int32_t, D> slab;
  for (int i = 0; i < D; ++i) {
    axes.push_back({int32_t(cuts[i].size()) + 1, cuts[i].data()});
    x[i] = at[i];
    slab[i] = math::cuts_up_to(cuts[i].data(), int32_t(cuts[i].size()), x[i]);
  }
  math::Box<D, std::vector<math::Slabs>> box(axes, x, slab);
  box.grow_to(k, starts.data());
  const auto grown = box;
  std::vector<int32_t> first, added;
  const auto into = [](std::vector<int32_t>& cells) {
    return [&cells](int32_t cell, int32_t end) {
      for (; cell < end; ++cell) cells.push_back(cell);
    };
  };
  box.each_run(into(first));
  if (box.widen_to(limit)) box.each_run_beyond(grown, into(added));
  return py::make_tuple(first, added);
}

#endif  // CAMK_PROBE_LANES_ONLY

// f(items of the inputs) for arrays of equal size, item by item or kLanes at a time.
template <class Out, class In, class F>
py::array_t<Out> map_items(const py::array_t<In>& x, F f) {
  py::array_t<Out> y(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) y.mutable_data()[i] = f(x.data()[i]);
  return y;
}

template <class Out, class In, class F>
py::array_t<Out> map_lanes(F f, const py::array_t<In>& first, const auto&... rest) {
  if (first.size() % kLanes != 0) throw std::invalid_argument("the size must be a multiple of the lanes");
  py::array_t<Out> y(first.size());
  for (py::ssize_t i = 0; i < first.size(); i += kLanes) {
    f(Lanes<In>::load(first.data() + i), Lanes<In>::load(rest.data() + i)...).store(y.mutable_data() + i);
  }
  return y;
}

// An activation with its derivatives at z, in the arithmetic C: as many at a time as C has lanes.
template <class C, class T = typename scalar_of<C>::type>
py::tuple activation(int kind, double rate, const py::array_t<T>& z) {
  if (z.size() % lanes_of<C> != 0) throw std::invalid_argument("the size must be a multiple of the lanes");
  py::array_t<T> value(z.size()), first(z.size()), second(z.size());
  math::with_activation(math::Activation(kind), [&](auto a) {
    for (py::ssize_t i = 0; i < z.size(); i += lanes_of<C>) {
      const auto f = math::activate<2>(a, load_lanes<C>(z.data() + i), C(T(rate)));
      store_lanes<C>(value.mutable_data() + i, f.value);
      store_lanes<C>(first.mutable_data() + i, f.first);
      store_lanes<C>(second.mutable_data() + i, f.second);
    }
  });
  return py::make_tuple(value, first, second);
}

// Virtual memory of which only the touched pages exist, for rows far behind 2^31.
struct Far {
  void* base;
  size_t bytes;
  explicit Far(size_t n) : bytes(n) {
    base = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
  }
  ~Far() { munmap(base, bytes); }
};

// Adds the numbers 1 .. F to one row through RowAdder and reads it back through load_rows; every lane but one at row 0.
template <class C, class T, int F>
Numbers far_row(uint32_t row, int64_t stride) {
  using A = accumulator_of<T>;
  const Far memory((size_t(row) + 1) * stride * sizeof(T) + 64), sums((size_t(row) + 1) * stride * sizeof(A) + 64);
  T* table = static_cast<T*>(memory.base);
  A* to = static_cast<A*>(sums.base);
  Vec<C, F> values{};
  uint32_t entries[lanes_of<C>] = {};
  entries[lanes_of<C> - 1] = row;
  if constexpr (lanes_of<C> == 1) {
    for (int f = 0; f < F; ++f) values[f] = C(f + 1);
  } else {
    for (int f = 0; f < F; ++f) values[f].v[kLanes - 1] = float(f + 1);
  }
  RowAdder<F, C, A>{to, stride, 0, row + 1}(entries, values);
  for (int f = 0; f < F; ++f) table[size_t(row) * stride + f] = from_number<T>(to[size_t(row) * stride + f]);
  const Vec<C, F> loaded = load_rows<F, C, T>(table, stride, entries);
  Numbers out;
  for (int f = 0; f < F; ++f) {
    if constexpr (lanes_of<C> == 1) {
      out.push_back(double(loaded[f]));
    } else {
      out.push_back(loaded[f].v[kLanes - 1]);
    }
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(CAMK_PROBE, m) {
  m.attr("lanes") = kLanes;
#ifndef CAMK_PROBE_LANES_ONLY
  m.def("blend", [](int kind, double t) { return math::blend(math::Interpolation(kind), t); });
  m.def("blend_first", [](int kind, double t) { return math::blend_first(math::Interpolation(kind), t); });
  m.def("blend_second", [](int kind, double t) { return math::blend_second(math::Interpolation(kind), t); });
  m.def("settle", settle<double>);
  m.def("settle_float", settle<float>);
  m.def("hash_prime", [](int axis) { return math::hash_prime(axis); });

  py::class_<Point>(m, "Point").def(py::init(&make_point));
  m.def("corners", corners<double>);
  m.def("formulas", formulas);
  m.def("nodes",
        [](const Numbers& u, const std::vector<uint32_t>& sizes, bool zeros, bool align_corners, bool general) {
          if (general || u.size() > 3) return nodes<0>(u, sizes, zeros, align_corners);
          if (u.size() == 1) return nodes<1>(u, sizes, zeros, align_corners);
          return u.size() == 2 ? nodes<2>(u, sizes, zeros, align_corners) : nodes<3>(u, sizes, zeros, align_corners);
        });
  m.def("products", products);
  m.def("radial_kernel", radial_kernel);
  m.def("box_cells", [](const Rows& cuts, const std::vector<int32_t>& starts, const Numbers& at, int64_t k,
                        double limit) {
    return with_dims(int64_t(at.size()), [&]<int D>(Constant<D>) { return box_cells<D>(cuts, starts, at, k, limit); });
  });
#endif

  using Floats1 = py::array_t<float>;
  using Words1 = py::array_t<uint32_t>;
  m.def("to_cell",
        [](const py::array_t<double>& x) { return map_items<uint32_t>(x, [](double v) { return to_cell(v); }); });
  m.def("to_cell_float", [](const Floats1& x) { return map_items<uint32_t>(x, [](float v) { return to_cell(v); }); });
  m.def("remainder_of", [](uint32_t i, uint32_t size) { return remainder_of(i, size); });
  m.def("multiply_add", [](const Floats1& x, float y, float z) {
    return map_items<float>(x, [=](float a) { return multiply_add(a, y, z); });
  });

  m.def("lanes_to_cell", [](const Floats1& x) { return map_lanes<uint32_t>([](Floats v) { return to_cell(v); }, x); });
  m.def("lanes_round_down",
        [](const Floats1& x) { return map_lanes<float>([](Floats v) { return round_down(v); }, x); });
  m.def("lanes_where_positive",
        [](const Floats1& x) { return map_lanes<uint32_t>([](Floats v) { return where_positive(v, Words(3u)); }, x); });
  m.def("lanes_remainder_of", [](const Words1& i, uint32_t size) {
    return map_lanes<uint32_t>([=](Words v) { return remainder_of(v, size); }, i);
  });
  m.def("lanes_multiply_add", [](const Floats1& x, const Floats1& y, const Floats1& z) {
    return map_lanes<float>([](Floats a, Floats b, Floats c) { return multiply_add(a, b, c); }, x, y, z);
  });

  m.def("activation", activation<double>);
  m.def("activation_float", activation<float>);
  m.def("lanes_activation", activation<Floats>);
  m.def("lanes_activation_double", activation<Doubles>);

  using Bits = py::array_t<uint16_t>;
  using Doubles1 = py::array_t<double>;
  m.def("from_half", [](const Bits& x) { return map_items<float>(x, [](uint16_t b) { return to_number(Half{b}); }); });
  m.def("from_bfloat16",
        [](const Bits& x) { return map_items<float>(x, [](uint16_t b) { return to_number(BFloat16{b}); }); });
  m.def("to_half",
        [](const Doubles1& x) { return map_items<uint16_t>(x, [](double v) { return from_number<Half>(v).bits; }); });
  m.def("to_bfloat16", [](const Doubles1& x) {
    return map_items<uint16_t>(x, [](double v) { return from_number<BFloat16>(v).bits; });
  });

  m.def("far_row", [](uint32_t row, const std::string& kind) {
    if (kind == "one float64") return far_row<double, double, 1>(row, 1);
    if (kind == "8 of 8 float32") return far_row<float, float, 8>(row, 8);
    if (kind == "lanes of 2 float32") return far_row<Floats, float, 2>(row, 2);
    if (kind == "lanes of 2 of 3 float32") return far_row<Floats, float, 2>(row, 3);
    if (kind == "lanes of 1 float16") return far_row<Floats, Half, 1>(row, 1);
    if (kind == "lanes of 2 bfloat16") return far_row<Floats, BFloat16, 2>(row, 2);
    throw std::invalid_argument(kind);
  });
}
