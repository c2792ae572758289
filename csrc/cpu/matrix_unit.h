// SPDX-License-Identifier: MIT
// Products of pairs of bfloat16 by the matrix unit of Intel's server processors (AMX), whose registers hold 16 rows of
// 16 pairs, or of 16 sums in float32. It makes some 25 times as many multiply-adds as vdpbf16ps, which is half as fast
// there as those of float32 (bench/ceilings.cpp); its layouts of factors are those of cpu/products.h.
#pragma once
#include "cpu/products.h"

#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CAMK_MATRIX_UNIT 1
#endif

namespace camk::cpu {

inline constexpr int64_t kUnit = 16;  // rows of a register, and pairs or sums in one of them

#if CAMK_MATRIX_UNIT

// Whether there is one beside vectors of bfloat16, and the system lets this process use it, which has to be asked for.
inline bool has_matrix_unit() {
  static const bool found = [] {
    if (!multiplies_bfloat16()) return false;
    constexpr unsigned kBfloat16AndTiles = 1u << 22 | 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16AndTiles) != kBfloat16AndTiles) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}

// The unit of this thread, set up for whole registers as long as the object lives.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, first = 0, unused[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit};
    } whole;
    asm volatile("ldtilecfg %0" : : "m"(whole));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
};

template <int Register>
CAMK_HD void load_register(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(Register) : "memory");
}
template <int Register>
CAMK_HD void store_register(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(Register) : "memory");
}
template <int Sums, int A, int B>
CAMK_HD void multiply_registers() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
}

// What registers hold of a matrix: numbers between its rows, to the register below, to the one on the right.
template <class T>
struct Registers {
  T* at;
  int64_t row, down, right;
};

// c = start + a b for Down x Right registers of c; start.at: null for zeros. depth: pairs, a multiple of kUnit.
template <int Down, int Right>
CAMK_HD void unit_block(Registers<const uint32_t> a, Registers<const uint32_t> b, int64_t depth,
                        Registers<const float> start, Registers<float> c, Ahead& ahead) {
  constexpr int64_t kBytes = 4, kLines = 8;  // of a number; lines that are fetched while a register is multiplied
  auto [line, step] = ahead.take(depth / kUnit * kLines);
  unroll<Down * Right>([&](auto i) CAMK_INLINED {
    if (start.at) {
      load_register<i>(start.at + i / Right * start.down + i % Right * start.right, start.row * kBytes);
    } else {
      asm volatile("tilezero %%tmm%c0" : : "i"(int(i)));
    }
  });
  for (int64_t k = 0; k < depth; k += kUnit) {
    for (int64_t i = 0; i < kLines; ++i, line += step) __builtin_prefetch(line, 0, 2);
    unroll<Down>([&](auto d) CAMK_INLINED { load_register<4 + d>(a.at + d * a.down + k, a.row * kBytes); });
    unroll<Right>([&](auto r) CAMK_INLINED { load_register<6 + r>(b.at + k * b.row + r * b.right, b.row * kBytes); });
    unroll<Down * Right>([&](auto i) CAMK_INLINED { multiply_registers<i, 4 + i / Right, 6 + i % Right>(); });
  }
  unroll<Down * Right>(
      [&](auto i) CAMK_INLINED { store_register<i>(c.at + i / Right * c.down + i % Right * c.right, c.row * kBytes); });
}

// body.operator()<Down, Right>(row, column) for blocks of as many registers: two in each direction, or one at the end.
template <class Body>
CAMK_HD void each_unit_block(int64_t rows, int64_t columns, const Body& body) {
  const auto over_rows = [&]<int Right>(int64_t column) CAMK_INLINED {
    int64_t r = 0;
    for (; r + 2 * kUnit <= rows; r += 2 * kUnit) body.template operator()<2, Right>(r, column);
    if (r < rows) body.template operator()<1, Right>(r, column);
  };
  int64_t j = 0;
  for (; j + 2 * kUnit <= columns; j += 2 * kUnit) over_rows.template operator()<2>(j);
  if (j < columns) over_rows.template operator()<1>(j);
}

// multiply() of cpu/products.h for pairs of bfloat16: rows and depth multiples of kUnit.
inline void unit_multiply(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* panels, int64_t depth,
                          int64_t columns, const float* bias, float* c, int64_t c_stride, Ahead& ahead, bool add) {
  each_unit_block(rows, padded(columns), [&]<int Down, int Right>(int64_t r, int64_t j) {
    const Registers<float> to{c + r * c_stride + j, c_stride, kUnit * c_stride, kUnit};
    const Registers<const float> same{bias ? bias + j : nullptr, 0, 0, kUnit}, before{to.at, to.row, to.down, to.right};
    unit_block<Down, Right>({a + r * a_stride, a_stride, kUnit * a_stride, 0},
                            {panels + in_panels(depth, 0, j), kPanel, 0, depth * kPanel}, depth, add ? before : same,
                            to, ahead);
  });
}

// add_outer() of cpu/products.h for pairs of bfloat16 and a transposed d [rows, n], where rows and n are multiples of
// kUnit; the first of the `outs` rows of sums.
inline void unit_add_outer(const uint32_t* d, int64_t rows, const uint32_t* x, int64_t x_stride, int64_t columns,
                           int64_t n, int64_t outs, float* panels, Ahead& ahead) {
  each_unit_block(rows, padded(columns), [&]<int Down, int Right>(int64_t o, int64_t j) {
    const Registers<float> sums{panels + in_panels(outs, o, j), kPanel, kUnit * kPanel, outs * kPanel};
    unit_block<Down, Right>({d + o * n, n, kUnit * n, 0}, {x + j, x_stride, 0, kUnit}, n,
                            {sums.at, sums.row, sums.down, sums.right}, sums, ahead);
  });
}

#else

inline bool has_matrix_unit() { return false; }
struct MatrixUnit {};

#endif

}  // namespace camk::cpu
