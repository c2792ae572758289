// SPDX-License-Identifier: MIT
// What a layer of the modulated MLP does to the rows of a tile between its products: norm, scale, shift, activation,
// and their derivatives. Rows are padded to whole packs of lanes with zeros, or with values that nobody reads.
#pragma once
#include "cpu/rows.h"
#include "math/modulate.h"
#include "math/norm.h"

namespace camk::cpu {

// Scale and shift of each row of a tile, `values` of both: one, or per channel one per column. Stride 0: all rows
// alike.
template <class C>
struct Modulation {
  Rows<C> rows;
  int64_t values = 0;
  CAMK_HD C* scale(int64_t row) const { return rows[row]; }
  CAMK_HD C* shift(int64_t row) const { return rows[row] + values; }
};

template <class C>
struct RowLayer {
  int64_t width, padded;
  math::Activation activation;
  C omega;
  const C* frequencies;  // [padded], of a residual sine
  bool norm, per_channel;
  C eps;
  C share() const { return C(1) / C(width); }  // of a column in a mean
};

// The scale or shift of the columns from `column` on.
template <bool PerChannel, class C>
CAMK_HD Lanes<C> columns_of(const C* values, int64_t column) {
  if constexpr (PerChannel) return Lanes<C>::load(values + column);
  return Lanes<C>(*values);
}

template <int I, class C>
CAMK_HD Lanes<C> rate_of(const RowLayer<C>& layer, int64_t column) {
  if constexpr (math::Activation{I} == math::Activation::kResidualSine) {
    return Lanes<C>::load(layer.frequencies + column);
  }
  return Lanes<C>(layer.omega);
}

// body(Constant<per channel>)
template <class Body>
void with_form(bool per_channel, const Body& body) {
  per_channel ? body(Constant<1>{}) : body(Constant<0>{});
}

// A row of a tile in memory, as products.h has it in registers.
template <class C>
struct MemoryRow {
  C* at;
  CAMK_HD Lanes<C> load(int64_t column) const { return Lanes<C>::load(at + column); }
  CAMK_HD void store(int64_t column, Lanes<C> pack) const { pack.store(at + column); }
};

// body(column) for every pack of columns.
template <class C, class Body>
CAMK_HD void each_pack(const RowLayer<C>& layer, const Body& body) {
  for (int64_t o = 0; o < layer.padded; o += lanes_of<Lanes<C>>) body(o);
}
template <class C, class Body>
CAMK_HD void each_pack(const RowLayer<C>& layer, MemoryRow<C>, const Body& body) {
  each_pack(layer, body);
}
template <class C, class Pack, int Packs, class Body>
CAMK_HD void each_pack(const RowLayer<C>&, RegisterRow<Pack, Packs> row, const Body& body) {
  row.each_column(body);
}

// The squares of a row's packs, added up in two chains that take turns.
template <class C, class Row>
CAMK_HD Lanes<C> sum_of_squares(const RowLayer<C>& layer, Row row) {
  Lanes<C> sum(C(0)), other(C(0));
  each_pack(layer, row, [&](int64_t o) CAMK_INLINED {
    const Lanes<C> z = row.load(o), more = multiply_add(z, z, sum);
    sum = other, other = more;
  });
  return sum + other;
}

// Rows whose sums are taken together, a lane for each.
template <class C>
inline constexpr int kRowBlock = lanes_of<Lanes<C>>;

// body(first row, number of rows) for blocks of a tile's rows.
template <class C, class Body>
CAMK_HD void each_block(int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; i += kRowBlock<C>) body(i, std::min<int64_t>(kRowBlock<C>, count - i));
}

// r of the rows of z; 1 where there is no norm. r has room for whole blocks.
template <class C>
void deviations(const RowLayer<C>& layer, int64_t count, Rows<C> z, C* r) {
  using Pack = Lanes<C>;
  if (!layer.norm) {
    std::fill_n(r, count, C(1));
    return;
  }
  each_block<C>(count, [&](int64_t first, int64_t rows) CAMK_INLINED {
    Pack squares[kRowBlock<C>];
    for (int64_t i = rows; i < kRowBlock<C>; ++i) squares[i] = Pack(C(0));
    for (int64_t i = 0; i < rows; ++i) squares[i] = sum_of_squares(layer, MemoryRow<C>{z[first + i]});
    const Pack mean = sums_of_lanes(squares) * Pack(layer.share());
    math::inverse_deviation(mean, Pack(layer.eps)).store(r + first);
  });
}

// Zeros behind the last column: what is there has been activated too, and where its slope is infinite, the sums of a
// row would have none.
template <class C>
void clear_padding(const RowLayer<C>& layer, int64_t count, Rows<C> rows) {
  for (int64_t i = 0; i < count && layer.width < layer.padded; ++i) {
    std::fill(rows[i] + layer.width, rows[i] + layer.padded, C(0));
  }
}

// f(scale n + shift) of a pack of columns, n = r z.
template <int Order, bool PerChannel, int I, class C>
CAMK_HD math::Jet<Lanes<C>> activate_pack(const RowLayer<C>& layer, Constant<I> activation, Lanes<C> z, Lanes<C> r,
                                          const C* scale, const C* shift, int64_t column) {
  const Lanes<C> factor = columns_of<PerChannel>(scale, column) * r;
  const Lanes<C> s = multiply_add(z, factor, columns_of<PerChannel>(shift, column));
  return math::activate<Order>(activation, s, rate_of<I>(layer, column));
}

// y = f(scale n + shift), n = r z, where y may be z; Order 1: also slope = f'. Under a norm z has mean 0. Layer and
// pointers are copies: what is stored might be any that are read through a reference.
template <int Order, class C>
void activate_rows(RowLayer<C> layer, int64_t count, Rows<C> z, const Modulation<C>& modulation, C* r, Rows<C> y,
                   Rows<C> slope) {
  using Pack = Lanes<C>;
  deviations(layer, count, z, r);
  math::with_activation(layer.activation, [&](auto activation) {
    with_form(layer.per_channel, [&](auto per_channel) {
      constexpr bool kChannels = decltype(per_channel)::value;
      for (int64_t i = 0; i < count; ++i) {
        const C *from = z[i], *scale = modulation.scale(i), *shift = modulation.shift(i);
        C *to = y[i], *to_slope = slope[i];
        const Pack deviation(r[i]);
        each_pack(layer, [=](int64_t o) CAMK_INLINED {
          const auto f =
              activate_pack<Order, kChannels>(layer, activation, Pack::load(from + o), deviation, scale, shift, o);
          f.value.store(to + o);
          if constexpr (Order > 0) f.first.store(to_slope + o);
        });
      }
    });
  });
  if constexpr (Order > 0) clear_padding(layer, count, slope);
}

// body(Constant<activation>) for those of an instruction or two; nothing for the others, whose code would be long where
// it is written out for every register of a block.
template <class Body>
void with_light_activation(math::Activation activation, const Body& body) {
  using enum math::Activation;
  if (activation == kRelu) body(Constant<int(kRelu)>{});
  if (activation == kLeakyRelu) body(Constant<int(kLeakyRelu)>{});
}

// y of a row z in registers. share: the layer's, of which a row needs no division of its own.
template <bool PerChannel, int I, class C, class Pack, int Packs>
CAMK_HD void activate_row(RowLayer<C> layer, Constant<I> activation, C share, RegisterRow<Pack, Packs> z,
                          const C* scale, const C* shift, C* y) {
  const Pack r(layer.norm ? math::inverse_deviation(sum_of_lanes(sum_of_squares(layer, z)) * share, layer.eps) : C(1));
  z.each_column([&](int64_t o) CAMK_INLINED {
    activate_pack<0, PerChannel>(layer, activation, z.load(o), r, scale, shift, o).value.store(y + o);
  });
}

// d: gradient of y -> of z, for a row; to_scale, to_shift: gradients of scale and shift, if they are wanted. Its packs
// add up w per channel, else g, which is w / scale; and n times that. Without a norm, and where nobody asks for those
// gradients, there are no sums over a row.
template <bool PerChannel, class C, class Row>
CAMK_HD void deactivate_row(RowLayer<C> layer, C share, const C* z, const C* slope, C r, const C* scale, Row d,
                            C* to_scale, C* to_shift, bool wants_change) {
  using Pack = Lanes<C>;
  if (!layer.norm && !wants_change) {
    return each_pack(layer, d, [=](int64_t o) CAMK_INLINED {
      const Pack factor = columns_of<PerChannel>(scale, o);
      d.store(o, math::modulate_gradients(factor, Pack(C(0)), d.load(o), Pack::load(slope + o)).n);
    });
  }
  Pack sum(C(0)), sum_n(C(0));
  each_pack(layer, d, [&](int64_t o) CAMK_INLINED {
    const Pack n = Pack::load(z + o) * Pack(r), factor = columns_of<PerChannel>(scale, o);
    const auto of = math::modulate_gradients(factor, n, d.load(o), Pack::load(slope + o));
    d.store(o, of.n);
    if constexpr (PerChannel) of.scale.store(to_scale + o), of.shift.store(to_shift + o);
    const Pack added = PerChannel ? of.n : of.shift;
    sum = sum + added, sum_n = multiply_add(n, added, sum_n);
  });
  const C total = sum_of_lanes(sum), total_n = sum_of_lanes(sum_n);
  if constexpr (!PerChannel) *to_scale = total_n, *to_shift = total;
  if (!layer.norm) return;
  const C part = PerChannel ? share : share * *scale;
  const Pack mean(total * part), mean_n(total_n * part);
  each_pack(layer, d, [=](int64_t o) CAMK_INLINED {
    const Pack n = Pack::load(z + o) * Pack(r);
    d.store(o, math::norm_jacobian(d.load(o), n, Pack(r), mean, mean_n));
  });
}

// ---- second order: a layer together with its tangent along given directions -----------------------------------------

template <class C>
struct TangentRows {
  Rows<C> n, dn;                        // z and dz until they are activated
  Rows<C> dz;                           // as it came
  Rows<C> slope, bend;                  // f', and f'' times the tangent of its argument
  C *r, *mean_ndz;                      // per row
  Modulation<C> modulation, direction;  // scale and shift, and their tangents
};

// y = f(scale n + shift) and its tangent dy.
template <class C>
void activate_tangents(const RowLayer<C>& layer, int64_t count, const TangentRows<C>& t, Rows<C> y, Rows<C> dy) {
  using Pack = Lanes<C>;
  deviations(layer, count, t.n, t.r);
  math::with_activation(layer.activation, [&](auto activation) {
    with_form(layer.per_channel, [&](auto per_channel) {
      constexpr bool kChannels = decltype(per_channel)::value;
      for (int64_t i = 0; i < count; ++i) {
        const Pack r(t.r[i]), zero(C(0));
        Pack sum = zero;
        each_pack(layer, [&](int64_t o) CAMK_INLINED {
          sum = multiply_add(Pack::load(t.n[i] + o) * r, Pack::load(t.dn[i] + o), sum);
        });
        t.mean_ndz[i] = sum_of_lanes(sum) / C(layer.width);
        each_pack(layer, [&](int64_t o) CAMK_INLINED {
          const Pack n = Pack::load(t.n[i] + o) * r, dz = Pack::load(t.dn[i] + o);
          const Pack dn = layer.norm ? math::norm_jacobian(dz, n, r, zero, Pack(t.mean_ndz[i])) : dz;
          const Pack scale = columns_of<kChannels>(t.modulation.scale(i), o);
          const Pack s = multiply_add(scale, n, columns_of<kChannels>(t.modulation.shift(i), o));
          const math::ScaleShift<Pack> along{columns_of<kChannels>(t.direction.scale(i), o),
                                             columns_of<kChannels>(t.direction.shift(i), o)};
          const Pack ds = math::modulate_tangent(scale, along, n, dn);
          const auto f = math::activate<2>(activation, s, rate_of<decltype(activation)::value>(layer, o));
          n.store(t.n[i] + o), dn.store(t.dn[i] + o), dz.store(t.dz[i] + o);
          f.first.store(t.slope[i] + o), (f.second * ds).store(t.bend[i] + o);
          f.value.store(y[i] + o), (f.first * ds).store(dy[i] + o);
        });
      }
    });
  });
  clear_padding(layer, count, t.slope), clear_padding(layer, count, t.bend);
}

// d, e: gradients of y and dy -> of z and dz; change: of scale and shift.
template <class C>
void deactivate_tangents(const RowLayer<C>& layer, int64_t count, const TangentRows<C>& t, Rows<C> d, Rows<C> e,
                         const Modulation<C>& change) {
  using Pack = Lanes<C>;
  const auto mean = [&](Pack sum) { return Pack(sum_of_lanes(sum) / C(layer.width)); };
  with_form(layer.per_channel, [&](auto per_channel) {
    constexpr bool kChannels = decltype(per_channel)::value;
    for (int64_t i = 0; i < count; ++i) {
      const Pack zero(C(0)), r(t.r[i]), mean_ndz(t.mean_ndz[i]);
      Pack sum_scale = zero, sum_shift = zero, sum_v = zero, sum_nv = zero, sum_vdn = zero;
      each_pack(layer, [&](int64_t o) CAMK_INLINED {
        const Pack n = Pack::load(t.n[i] + o), dn = Pack::load(t.dn[i] + o), slope = Pack::load(t.slope[i] + o);
        const Pack of_ds = slope * Pack::load(e[i] + o);
        const Pack of_s =
            math::add_present(Pack::load(d[i] + o), slope, Pack::load(t.bend[i] + o) * Pack::load(e[i] + o));
        const Pack scale = columns_of<kChannels>(t.modulation.scale(i), o);
        const Pack along = columns_of<kChannels>(t.direction.scale(i), o);
        const auto of = math::tangent_gradients(scale, along, n, dn, of_s, of_ds);
        const Pack v = of.dn;
        of.n.store(d[i] + o), v.store(e[i] + o);
        sum_v = sum_v + v, sum_nv = multiply_add(n, v, sum_nv), sum_vdn = multiply_add(v, dn, sum_vdn);
        if constexpr (kChannels) {
          of.scale.store(change.scale(i) + o), of.shift.store(change.shift(i) + o);
        } else {
          sum_scale = sum_scale + of.scale, sum_shift = sum_shift + of.shift;
        }
      });
      if (!kChannels) *change.scale(i) = sum_of_lanes(sum_scale), *change.shift(i) = sum_of_lanes(sum_shift);
      if (!layer.norm) continue;
      const Pack mean_v = mean(sum_v), mean_nv = mean(sum_nv), rest = math::norm_second_order_rest(r, mean(sum_vdn));
      Pack sum_w = zero, sum_nw = zero;
      each_pack(layer, [&](int64_t o) CAMK_INLINED {
        const Pack u = Pack::load(d[i] + o), v = Pack::load(e[i] + o), dz = Pack::load(t.dz[i] + o);
        const Pack w = math::norm_second_order(u, v, dz, r, mean_ndz, mean_nv);
        w.store(d[i] + o);
        sum_w = sum_w + w, sum_nw = multiply_add(Pack::load(t.n[i] + o), w, sum_nw);
      });
      const Pack mean_w = mean(sum_w), mean_nw = mean(sum_nw);
      each_pack(layer, [&](int64_t o) CAMK_INLINED {
        const Pack n = Pack::load(t.n[i] + o);
        multiply_add(rest, n, math::norm_jacobian(Pack::load(d[i] + o), n, r, mean_w, mean_nw)).store(d[i] + o);
        math::norm_jacobian(Pack::load(e[i] + o), n, r, mean_v, mean_nv).store(e[i] + o);
      });
    }
  });
}

}  // namespace camk::cpu
