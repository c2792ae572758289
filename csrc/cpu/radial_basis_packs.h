// SPDX-License-Identifier: MIT
// Packs of numbers, or of their dual numbers, that the loops of radial_basis work on: a lane for each point or feature.
#pragma once
#include "cpu/lane_functions.h"
#include "cpu/rows.h"
#include "math/radial_basis.h"

namespace camk::cpu {

// Numbers and their derivatives along the direction of the second order; null: 0.
template <class S>
struct Operand {
  const S* value = nullptr;
  const S* along = nullptr;
};

template <class N>
struct pack_of {
  using type = Lanes<N>;
};
template <class S>
struct pack_of<Dual<S>> {
  using type = Dual<Lanes<S>>;
};

template <class C, class S>
CAMK_HD C pack_at(const Operand<S>& from, int64_t i) {
  if constexpr (std::is_same_v<C, Lanes<S>>) {
    return C::load(from.value + i);
  } else {
    return {Lanes<S>::load(from.value + i), from.along ? Lanes<S>::load(from.along + i) : Lanes<S>(S(0))};
  }
}

// The same number in every lane, one lane, and sums of all lanes.
template <class S>
CAMK_HD Lanes<S> in_all_lanes(S x) {
  return Lanes<S>(x);
}
template <class S>
CAMK_HD Dual<Lanes<S>> in_all_lanes(Dual<S> x) {
  return {Lanes<S>(x.value), Lanes<S>(x.along)};
}
template <class S>
CAMK_HD S lane_of(const Lanes<S>& x, int64_t k) {
  return x.v[k];
}
template <class S>
CAMK_HD Dual<S> lane_of(const Dual<Lanes<S>>& x, int64_t k) {
  return {lane_of(x.value, k), lane_of(x.along, k)};
}
template <class S>
CAMK_HD void set_lane(Lanes<S>& to, int64_t k, S x) {
  to.v[k] = x;
}
template <class S>
CAMK_HD void set_lane(Dual<Lanes<S>>& to, int64_t k, Dual<S> x) {
  to.value.v[k] = x.value, to.along.v[k] = x.along;
}
template <class S>
CAMK_HD Dual<S> sum_of_lanes(Dual<Lanes<S>> x) {
  return {sum_of_lanes(x.value), sum_of_lanes(x.along)};
}
// In lane i the sum over the lanes of x[i], the same bits as sum_of_lanes.
template <class S>
CAMK_HD Dual<Lanes<S>> sums_of_lanes(Dual<Lanes<S>> (&x)[lanes_of<Lanes<S>>]) {
  Lanes<S> value[lanes_of<Lanes<S>>], along[lanes_of<Lanes<S>>];
  for (int k = 0; k < lanes_of<Lanes<S>>; ++k) value[k] = x[k].value, along[k] = x[k].along;
  return {sums_of_lanes(value), sums_of_lanes(along)};
}

// 0, 1, ...
template <class S>
CAMK_HD Lanes<S> lane_numbers() {
  Lanes<S> x;
  for (int k = 0; k < lanes_of<Lanes<S>>; ++k) x.v[k] = S(k);
  return x;
}

template <class C, class S>
CAMK_HD C constant_pack(Lanes<S> x) {
  if constexpr (std::is_same_v<C, Lanes<S>>) {
    return x;
  } else {
    return {x, Lanes<S>(S(0))};
  }
}

// Rows of W numbers, one for each lane and named by row(lane), as W packs: pack c holds number c of all rows.
template <int W, class S, class Row>
CAMK_HD void gather_rows(const S* table, const Row& row, Lanes<S>* to) {
  if constexpr (std::is_same_v<S, float>) {
    unroll<(W + 3) / 4>([&](auto part) CAMK_INLINED {  // the last part is a whole one too, where the row is long enough
      constexpr int kCount = std::min(4, W), kFirst = std::min(4 * decltype(part)::value, W - kCount);
      const auto columns = load_columns<kCount>([&](int l) CAMK_INLINED { return table + row(l) * W + kFirst; });
      unroll<kCount>([&](int c) CAMK_INLINED { to[kFirst + c] = columns[c]; });
    });
  } else {
    for (int c = 0; c < W; ++c) {
      S column[lanes_of<Lanes<S>>];
      for (int l = 0; l < lanes_of<Lanes<S>>; ++l) column[l] = table[row(l) * W + c];
      to[c] = Lanes<S>::load(column);
    }
  }
}
template <int W, class C, class S, class Row>
CAMK_HD void gather_operand(const Operand<S>& table, const Row& row, C* to) {
  if constexpr (std::is_same_v<C, Lanes<S>>) {
    gather_rows<W>(table.value, row, to);
  } else {
    Lanes<S> value[W], along[W]{};
    gather_rows<W>(table.value, row, value);
    if (table.along) gather_rows<W>(table.along, row, along);
    for (int c = 0; c < W; ++c) to[c] = {value[c], along[c]};
  }
}

}  // namespace camk::cpu
