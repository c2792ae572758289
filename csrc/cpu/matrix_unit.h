// SPDX-License-Identifier: MIT
// Products of pairs of bfloat16 by the matrix unit of Intel's server processors (AMX), whose registers hold 16 rows of
// 16 pairs, or of 16 sums in float32. A hundred times as many multiply-adds in a cycle as vdpbf16ps makes there; its
// layouts of factors are those of cpu/products.h.
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

// Whether there is one and the system lets this process use it, which has to be asked for.
inline bool has_matrix_unit() {
  static const bool found = [] {
    constexpr unsigned kBfloat16AndTiles = 1u << 22 | 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16AndTiles) != kBfloat16AndTiles) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}

// The unit of this thread, if there is one, set up for whole registers as long as the object lives.
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

// Sums of a block of 2 kUnit rows in registers 0 and 2, of a second panel in 1 and 3; `at` + column: of the first row.
template <int Panels>
CAMK_HD void load_sums(const float* at, int64_t row_bytes, int64_t down) {
  asm volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(at), "r"(row_bytes) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm2" : : "r"(at + down), "r"(row_bytes) : "memory");
  if constexpr (Panels == 1) return;
  asm volatile("tileloadd (%0,%1,1), %%tmm1" : : "r"(at + kUnit), "r"(row_bytes) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm3" : : "r"(at + kUnit + down), "r"(row_bytes) : "memory");
}
template <int Panels>
CAMK_HD void store_sums(float* at, int64_t row_bytes, int64_t down) {
  asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(at), "r"(row_bytes) : "memory");
  asm volatile("tilestored %%tmm2, (%0,%1,1)" : : "r"(at + down), "r"(row_bytes) : "memory");
  if constexpr (Panels == 1) return;
  asm volatile("tilestored %%tmm1, (%0,%1,1)" : : "r"(at + kUnit), "r"(row_bytes) : "memory");
  asm volatile("tilestored %%tmm3, (%0,%1,1)" : : "r"(at + kUnit + down), "r"(row_bytes) : "memory");
}
CAMK_HD void clear_sums() {
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
}

template <int Panels>
CAMK_HD void unit_block(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t depth, const float* bias,
                        float* c, int64_t c_stride, bool add, Ahead& ahead) {
  constexpr int64_t kPanelBytes = kPanel * sizeof(uint32_t), kLines = 8;  // lines fetched with 2 kUnit rows of factors
  auto [line, step] = ahead.take(depth / kUnit * kLines);
  const int64_t a_bytes = a_stride * sizeof(uint32_t), c_bytes = c_stride * sizeof(float);
  if (add) {
    load_sums<Panels>(c, c_bytes, kUnit * c_stride);
  } else if (bias) {
    load_sums<Panels>(bias, 0, 0);  // the same row everywhere
  } else {
    clear_sums();
  }
  for (int64_t k = 0; k < depth; k += kUnit) {
    for (int64_t i = 0; i < kLines; ++i, line += step) __builtin_prefetch(line, 0, 2);
    asm volatile("tileloadd (%0,%1,1), %%tmm4" : : "r"(a + k), "r"(a_bytes) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm6" : : "r"(b + k * kPanel), "r"(kPanelBytes) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm5" : : "r"(a + k + kUnit * a_stride), "r"(a_bytes) : "memory");
    asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm6, %tmm5, %tmm2");
    if constexpr (Panels == 1) continue;
    asm volatile("tileloadd (%0,%1,1), %%tmm7" : : "r"(b + (depth + k) * kPanel), "r"(kPanelBytes) : "memory");
    asm volatile("tdpbf16ps %tmm7, %tmm4, %tmm1\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  store_sums<Panels>(c, c_bytes, kUnit * c_stride);
}

// multiply() of cpu/products.h for pairs of bfloat16: rows a multiple of 2 kUnit, depth of kUnit.
inline void unit_multiply(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* panels, int64_t depth,
                          int64_t columns, const float* bias, float* c, int64_t c_stride, Ahead& ahead, bool add) {
  const auto over_rows = [&]<int Panels>(int64_t column) {
    for (int64_t r = 0; r < rows; r += 2 * kUnit) {
      unit_block<Panels>(a + r * a_stride, a_stride, panels + in_panels(depth, 0, column), depth,
                         bias ? bias + column : nullptr, c + r * c_stride + column, c_stride, add, ahead);
    }
  };
  int64_t j = 0;
  for (; j + 2 * kPanel <= padded(columns); j += 2 * kPanel) over_rows.template operator()<2>(j);
  if (j < padded(columns)) over_rows.template operator()<1>(j);
}

#else

inline bool has_matrix_unit() { return false; }
struct MatrixUnit {};

#endif

}  // namespace camk::cpu
