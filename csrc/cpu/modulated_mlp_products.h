// SPDX-License-Identifier: MIT
// Products of the modulated MLP's tiles, in whichever form the matrices are packed.
#pragma once
#include "cpu/modulated_mlp_net.h"

namespace camk::cpu {

// Products of a tile's rows with the matrices of layers and with other rows, and what is fetched while they run.
template <class C>
class TileProducts {
 public:
  Ahead ahead;

  TileProducts(const Net<C>& net, Scratch<C>& memory) : net_(net), stride_(round_up((net.widest() + 1) / 2, kUnit)) {
    if (!net.rounds) return;
    for (uint32_t** pairs : {&pairs_, &d_pairs_, &x_pairs_}) {
      *pairs = reinterpret_cast<uint32_t*>(memory.take(net.tile_rows * stride_));
    }
    if (has_matrix_unit()) unit_.emplace();
  }

  // For a tile of `count` points. Rows behind them, up to a whole block, hold what was there before; their products are
  // made and nobody reads them.
  void start(int64_t count) {
    rows_ = net_.whole_rows(count);
    ahead.clear();
  }

  // c = a B + bias, or c += a B, for all rows that start() made whole.
  void operator()(Rows<C> a, Matrix<C> b, int64_t depth, int64_t columns, const C* bias, Rows<C> c, bool add = false) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<C, float>) {
      if (b.rounded) {
        round_rows(a, depth);
#if CAMK_MATRIX_UNIT
        if (unit_) {
          return unit_multiply(pairs_, stride_, rows_, b.rounded, pairs_of(depth), columns, bias, c.data, c.stride,
                               ahead, add);
        }
#endif
        return multiply(pairs_, stride_, rows_, b.rounded, pairs_of(depth), columns, bias, c.data, c.stride, ahead,
                        add);
      }
    }
#endif
    if (b.few) return multiply_few(a.data, a.stride, rows_, b.few, depth, columns, bias, c.data, c.stride, add);
    multiply(a.data, a.stride, rows_, b.exact, depth, columns, bias, c.data, c.stride, ahead, add);
  }

  // finish(number, row) for the first `count` rows of a B + bias while they are in registers. Returns whether they fit
  // there; if not, nothing is done.
  template <class Finish>
  bool by_rows(Rows<C> a, Matrix<C> b, int64_t depth, int64_t columns, const C* bias, int64_t count,
               const Finish& finish) {
    if (!b.exact) return false;
    return with_row_packs<C>(depth, columns, [&](auto packs) {
      const auto present = [&](int64_t number, auto row) CAMK_INLINED {
        if (number < count) finish(number, row);
      };
      multiply_rows<decltype(packs)::value>(a.data, a.stride, rows_, b.exact, depth, bias, present, ahead);
    });
  }

  // sums += d^T x over `count` points, sums [outs, columns] in panels.
  void add_outer(Rows<C> d, int64_t outs, Rows<C> x, int64_t columns, int64_t count, C* sums) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<C, float>) {
      if (pairs_) return add_rounded_outer(d, outs, x, columns, count, sums);
    }
#endif
    cpu::add_outer(d.data, d.stride, outs, x.data, x.stride, columns, count, sums);
  }

 private:
#if defined(__AVX512F__)
  void add_rounded_outer(Rows<C> d, int64_t outs, Rows<C> x, int64_t columns, int64_t count, C* sums) {
    const int64_t pairs = rows_ / 2, d_stride = padded(outs), x_stride = padded(columns);
    int64_t whole = 0;  // rows that fill registers
    pair_rows(d, outs, count, d_pairs_), pair_rows(x, columns, count, x_pairs_);
#if CAMK_MATRIX_UNIT
    if (unit_) {
      whole = outs / kUnit * kUnit;
      transpose(reinterpret_cast<const float*>(d_pairs_), pairs, whole, d_stride, reinterpret_cast<float*>(pairs_),
                pairs);
      unit_add_outer(pairs_, whole, x_pairs_, x_stride, columns, pairs, outs, sums, ahead);
    }
#endif
    cpu::add_outer(d_pairs_, d_stride, outs, x_pairs_, x_stride, columns, pairs, sums, whole);
  }

  // Each two rows rounded, side by side, [pairs, padded(columns)]; zeros behind the last of `count`.
  void pair_rows(Rows<C> rows, int64_t columns, int64_t count, uint32_t* to) {
    const int64_t end = padded(columns);
    for (int64_t i = 0; i < rows_; i += 2, to += end) {
      for (int64_t k = 0; k < end; k += kLanes) {
        const auto some = [&](int64_t row)
                              CAMK_INLINED { return load_first(rows[row] + k, row < count ? columns - k : 0); };
        to_bfloat16_pairs(some(i), some(i + 1)).store(to + k);
      }
    }
  }

  void round_rows(Rows<C> a, int64_t depth) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t k = 0; k < depth; k += 2 * kLanes) {
        const auto some = [&](int64_t first) CAMK_INLINED { return load_first(a[i] + first, depth - first); };
        to_bfloat16(some(k), some(k + kLanes)).store(pairs_ + i * stride_ + k / 2);
      }
    }
  }
#endif

  const Net<C>& net_;
  std::optional<MatrixUnit> unit_;
  int64_t stride_, rows_ = 0;
  uint32_t *pairs_ = nullptr, *d_pairs_, *x_pairs_;  // of a row; of two rows
};

}  // namespace camk::cpu
