// SPDX-License-Identifier: MIT
// Products of a tile of rows, which stays in cache, with a matrix in panels of kPanel columns: blocks of kBlockRows x
// kBlockVectors registers, one scalar of the tile times a vector of the panel. No row needs an alignment.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/lane_functions.h"

namespace camk::cpu {

inline constexpr int64_t kPanel = 16;
#if defined(__AVX512F__)
inline constexpr int kBlockRows = 12;  // 24 sums in 32 registers
inline constexpr int kRowVectors = 4;  // of a row that is in registers as a whole
inline constexpr int kOuterRows = 8;   // divides the usual widths: no narrower blocks at the end
#else
inline constexpr int kBlockRows = 6;  // 12 sums in 16 registers
inline constexpr int kRowVectors = 2;
inline constexpr int kOuterRows = 4;
#endif
inline constexpr int kBlockVectors = 2;
inline constexpr int64_t kDepth = 256;  // a panel of that many rows of float32 takes half of a first-level cache

inline int64_t padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// Where column j of row k lies in panels of `depth` rows.
inline int64_t in_panels(int64_t depth, int64_t k, int64_t j) { return (j / kPanel * depth + k) * kPanel + j % kPanel; }

// Memory that is read soon, by the next tile. Products fetch it into the second-level cache, some bytes of it for each
// row of panels that they multiply, as many as last time's rows make it: where requests wait for each other, so do the
// products. A line for each row takes an MLP 3 to 8 % longer (a Xeon with AMX).
class Ahead {
 public:
  void clear() {
    rows_before_ = rows_, rows_ = 0;
    ranges_.clear(), next_ = 0, bytes_ = 0;
  }
  void add(const void* from, int64_t bytes) {
    if (bytes > 0) ranges_.push_back({static_cast<const char*>(from), bytes}), bytes_ += bytes;
  }
  // Where the next bytes are, and how far apart a row's. Where nothing is left: 0, and what is in the cache, because a
  // fetch from null looks for its page anew each time.
  std::pair<const char*, int64_t> take(int64_t rows) {
    rows_ += rows;
    if (next_ == ranges_.size()) return {reinterpret_cast<const char*>(this), 0};
    const int64_t step = rows_before_ ? std::min(kLine, bytes_ / rows_before_ + 1) : kLine;
    Range& range = ranges_[next_];
    const char* from = range.from;
    range.from += rows * step, range.bytes -= rows * step;
    if (range.bytes <= 0) ++next_;
    return {from, step};
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Range {
    const char* from;
    int64_t bytes;
  };
  std::vector<Range> ranges_;
  size_t next_ = 0;
  int64_t bytes_ = 0, rows_ = 0, rows_before_ = 0;
};

// sum += a B for a block: `depth` numbers of Rows rows and a pack of columns of each of the panels b.
template <int Rows, int Vectors, class E, class C>
CAMK_HD void add_products(const E* a, int64_t a_stride, const E* const (&b)[Vectors], int64_t depth,
                          C (&sum)[Rows][Vectors], Ahead& ahead) {
  auto [line, step] = ahead.take(depth);
  static_assert(Rows % 3 == 0);
  // Every third row: a pointer to each is what the compiler makes of it, more than there are registers for. 2 to 4 % of
  // an MLP of 48, 64, 64 and 3 values (a Xeon with AMX).
  const E* third[Rows / 3];
  unroll<Rows / 3>([&](auto r) CAMK_INLINED { third[r] = a + 3 * r * a_stride; });
  for (int64_t k = 0; k < depth; ++k, line += step) {
    unroll<Rows / 3>([&](auto r) CAMK_INLINED { asm("" : "+r"(third[r])); });
    Lanes<E> x[Vectors];
    unroll<Vectors>([&](auto v) CAMK_INLINED { x[v] = Lanes<E>::load(b[v] + k * kPanel); });
    __builtin_prefetch(line, 0, 2);
    unroll<Rows>([&](auto r) CAMK_INLINED {
      const Lanes<E> scalar(third[r / 3][r % 3 * a_stride + k]);
      unroll<Vectors>([&](auto v) CAMK_INLINED { sum[r][v] = multiply_add(scalar, x[v], sum[r][v]); });
    });
  }
}

template <int Rows, int Vectors, class E, class C>
CAMK_HD void multiply_block(const E* a, int64_t a_stride, const E* const (&b)[Vectors], int64_t depth, const C* start,
                            C* c, int64_t c_stride, bool add, Ahead& ahead) {
  using Pack = Lanes<C>;
  constexpr int kWidth = lanes_of<Pack>;
  Pack sum[Rows][Vectors];
  unroll<Rows>([&](auto r) CAMK_INLINED {
    unroll<Vectors>([&](auto v) CAMK_INLINED {
      const C* from = add ? c + r * c_stride : start;
      sum[r][v] = from ? Pack::load(from + v * kWidth) : Pack(C(0));
    });
  });
  add_products(a, a_stride, b, depth, sum, ahead);
  unroll<Rows>([&](auto r) CAMK_INLINED {
    unroll<Vectors>([&](auto v) CAMK_INLINED { sum[r][v].store(c + r * c_stride + v * kWidth); });
  });
}

template <int Vectors, class E, class C>
void multiply_columns(const E* a, int64_t a_stride, int64_t rows, const E* panels, int64_t depth, int64_t k0,
                      int64_t column, const C* bias, C* c, int64_t c_stride, bool add, Ahead& ahead) {
  constexpr int kWidth = lanes_of<Lanes<C>>;
  const E* b[Vectors];
  for (int v = 0; v < Vectors; ++v) b[v] = panels + in_panels(depth, k0, column + v * kWidth);
  const int64_t some = std::min(kDepth, depth - k0);
  const C* start = bias ? bias + column : nullptr;
  for (int64_t r = 0; r < rows; r += kBlockRows) {
    multiply_block<kBlockRows, Vectors>(a + r * a_stride + k0, a_stride, b, some, start, c + r * c_stride + column,
                                        c_stride, add || k0 > 0, ahead);
  }
}

// c = a B + bias, or c += a B: a [rows, depth], rows a multiple of kBlockRows, B in panels, c [rows, padded(columns)].
// bias [padded(columns)] or null. E: C, or pairs of bfloat16 (uint32_t), of which `depth` counts the pairs.
template <class E, class C>
void multiply(const E* a, int64_t a_stride, int64_t rows, const E* panels, int64_t depth, int64_t columns,
              const C* bias, C* c, int64_t c_stride, Ahead& ahead, bool add = false) {
  constexpr int64_t kWidth = lanes_of<Lanes<C>>;
  const int64_t end = padded(columns);
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    int64_t j = 0;
    for (; j + kBlockVectors * kWidth <= end; j += kBlockVectors * kWidth) {
      multiply_columns<kBlockVectors>(a, a_stride, rows, panels, depth, k0, j, bias, c, c_stride, add, ahead);
    }
    for (; j < end; j += kWidth) {
      multiply_columns<1>(a, a_stride, rows, panels, depth, k0, j, bias, c, c_stride, add, ahead);
    }
  }
}

// The same for a B of at most kFew columns, these as kFew rows of b [kFew, depth], zeros behind the last, depth a
// multiple of kPanel: dot products, where a panel would be mostly zeros.
inline constexpr int kFew = 4;

template <class C>
void multiply_few(const C* a, int64_t a_stride, int64_t rows, const C* b, int64_t depth, int64_t columns, const C* bias,
                  C* c, int64_t c_stride, bool add) {
  using Pack = Lanes<C>;
  constexpr int kWidth = lanes_of<Pack>, kRows = std::max(1, kWidth / kFew);
  for (int64_t r = 0; r < rows; r += kRows, a += kRows * a_stride) {
    Pack sum[kRows * kFew];
    unroll<kRows * kFew>([&](auto i) CAMK_INLINED { sum[i] = Pack(C(0)); });
    for (int64_t k = 0; k < depth; k += kWidth) {
      Pack x[kFew];
      unroll<kFew>([&](auto j) CAMK_INLINED { x[j] = Pack::load(b + j * depth + k); });
      unroll<kRows>([&](auto i) CAMK_INLINED {
        const Pack row = Pack::load(a + i * a_stride + k);
        unroll<kFew>([&](auto j) CAMK_INLINED { sum[i * kFew + j] = multiply_add(row, x[j], sum[i * kFew + j]); });
      });
    }
    C dots[kRows][kFew];
    for (int i = 0; i < kRows * kFew; i += kWidth) sums_of_lanes<C>(sum + i).store(*dots + i);
    for (int i = 0; i < kRows; ++i, c += c_stride) {
      for (int64_t j = 0; j < columns; ++j) c[j] = dots[i][j] + (add ? c[j] : bias ? bias[j] : C(0));
      if (!add) std::fill(c + columns, c + kPanel, C(0));
    }
  }
}

// Blocks of whole rows: body(Constant<packs of a row>), if registers hold the rows of a block, and the panels of B take
// no more of a first-level cache than those of a block in multiply(). Returns whether.
template <class C, class Body>
bool with_row_packs(int64_t depth, int64_t columns, const Body& body) {
  constexpr int kPacks = kPanel / lanes_of<Lanes<C>>;  // of a panel
  const int64_t packs = padded(columns) / lanes_of<Lanes<C>>;
  if (packs > kRowVectors || packs * depth > kBlockVectors * kDepth) return false;
  unroll<kRowVectors / kPacks>([&](auto i) {
    constexpr int kSome = (decltype(i)::value + 1) * kPacks;
    if (packs == kSome) body(Constant<kSome>{});
  });
  return true;
}

// A row in registers.
template <class Pack, int Packs>
struct RegisterRow {
  Pack (&packs)[Packs];

  CAMK_HD Pack load(int64_t column) const { return packs[column / lanes_of<Pack>]; }
  CAMK_HD void store(int64_t column, Pack pack) const { packs[column / lanes_of<Pack>] = pack; }
  template <class Body>
  CAMK_HD void each_column(const Body& body) const {
    unroll<Packs>([&](auto p) CAMK_INLINED { body(p * lanes_of<Pack>); });
  }
};

// finish(number, row) for each row of a B + bias, while it is in registers: nobody waits for memory between the product
// and what is done to it, and the next block's product runs beside that. 4 to 10 % of networks of 64 channels (a Xeon
// with AMX).
template <int Vectors, class C, class Finish>
void multiply_rows(const C* a, int64_t a_stride, int64_t rows, const C* panels, int64_t depth, const C* bias,
                   const Finish& finish, Ahead& ahead) {
  using Pack = Lanes<C>;
  constexpr int kRows = Vectors > kBlockVectors ? kBlockRows / 2 : kBlockRows;
  const C* b[Vectors];
  for (int v = 0; v < Vectors; ++v) b[v] = panels + in_panels(depth, 0, v * lanes_of<Pack>);
  for (int64_t first = 0; first < rows; first += kRows) {
    Pack sum[kRows][Vectors];
    unroll<kRows>([&](auto r) CAMK_INLINED {
      unroll<Vectors>([&](auto v)
                          CAMK_INLINED { sum[r][v] = bias ? Pack::load(bias + v * lanes_of<Pack>) : Pack(C(0)); });
    });
    add_products(a + first * a_stride, a_stride, b, depth, sum, ahead);
    unroll<kRows>([&](auto r) CAMK_INLINED { finish(first + r, RegisterRow{sum[r]}); });
  }
}

template <int Rows, int Vectors, class E, class C>
CAMK_HD void add_outer_block(const E* d, int64_t d_stride, const E* x, int64_t x_stride, int64_t n,
                             C* const (&sums)[Vectors]) {
  using Pack = Lanes<C>;
  constexpr int kWidth = lanes_of<Pack>;
  Pack sum[Rows][Vectors];
  unroll<Rows>([&](auto r) CAMK_INLINED {
    unroll<Vectors>([&](auto v) CAMK_INLINED { sum[r][v] = Pack::load(sums[v] + r * kPanel); });
    __builtin_prefetch(sums[0] + (Rows + r) * kPanel);  // those of the next block
  });
  for (int64_t i = 0; i < n; ++i) {
    Lanes<E> row[Vectors];
    unroll<Vectors>([&](auto v) CAMK_INLINED { row[v] = Lanes<E>::load(x + i * x_stride + v * kWidth); });
    unroll<Rows>([&](auto r) CAMK_INLINED {
      const Lanes<E> scalar(d[i * d_stride + r]);
      unroll<Vectors>([&](auto v) CAMK_INLINED { sum[r][v] = multiply_add(scalar, row[v], sum[r][v]); });
    });
  }
  unroll<Rows>([&](auto r) CAMK_INLINED {
    unroll<Vectors>([&](auto v) CAMK_INLINED { sum[r][v].store(sums[v] + r * kPanel); });
  });
}

// sums += d^T x: d [n, outs], x [n, padded(columns)], sums [outs, columns] in panels, of which rows from `first` on. E:
// C, or pairs of bfloat16 of two rows, of which n counts the pairs.
template <class E, class C>
void add_outer(const E* d, int64_t d_stride, int64_t outs, const E* x, int64_t x_stride, int64_t columns, int64_t n,
               C* panels, int64_t first = 0) {
  constexpr int64_t kWidth = lanes_of<Lanes<C>>;
  const auto over_rows = [&]<int Vectors>(int64_t column) {
    const auto block = [&]<int Rows>(int64_t o) {
      C* sums[Vectors];
      for (int v = 0; v < Vectors; ++v) sums[v] = panels + in_panels(outs, o, column + v * kWidth);
      add_outer_block<Rows, Vectors>(d + o, d_stride, x + column, x_stride, n, sums);
    };
    int64_t o = first;
    for (; o + kOuterRows <= outs; o += kOuterRows) block.template operator()<kOuterRows>(o);
    for (; o + 4 <= outs; o += 4) block.template operator()<4>(o);
    for (; o < outs; ++o) block.template operator()<1>(o);
  };
  int64_t j = 0;
  for (; j + kBlockVectors * kWidth <= padded(columns); j += kBlockVectors * kWidth) {
    over_rows.template operator()<kBlockVectors>(j);
  }
  for (; j < padded(columns); j += kWidth) over_rows.template operator()<1>(j);
}

}  // namespace camk::cpu
