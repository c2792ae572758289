// SPDX-License-Identifier: MIT
// What this machine can do at most, one thread each: fused multiply-adds, in float32 and as dot products of bfloat16,
// random 8-byte lookups, copying.
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include "cpu/matrix_unit.h"
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Lanes __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4, kChains = 12;  // 12 independent chains hide the latency and fit 16 registers

extern "C" {

// Floating-point operations done; `sink` keeps the compiler from dropping them.
double ceiling_fma(long iterations, float* sink) {
  Lanes sum[kChains], a, b;
  for (int i = 0; i < kLanes; ++i) a[i] = 0.999f, b[i] = 0.001f;
  for (int c = 0; c < kChains; ++c)
    for (int i = 0; i < kLanes; ++i) sum[c][i] = 0.1f * c;
  for (long n = 0; n < iterations; ++n)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * a + b;
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  for (int i = 0; i < kLanes; ++i) *sink += sum[0][i];
  return 2.0 * kLanes * kChains * iterations;
}

#if defined(__AVX512BF16__)
// The same of dot products of pairs of bfloat16, which are added in float32: by the matrix unit where there is one, or of
// vectors, whose latency wants more chains, and there are registers for them.
double ceiling_bfloat16(long iterations, float* sink) {
#if CAMK_MATRIX_UNIT
  if (camk::cpu::has_matrix_unit()) {
    const camk::cpu::MatrixUnit unit;
    for (long n = 0; n < iterations; ++n) {
      camk::unroll<4>([](auto i) CAMK_INLINED { camk::cpu::multiply_registers<i, 4 + i / 2, 6 + i % 2>(); });
    }
    return 4.0 * 16 * 16 * 16 * 4 * iterations;
  }
#endif
  const __m512bh a = __m512bh(_mm512_set1_epi16(0x3f7f)), b = __m512bh(_mm512_set1_epi16(0x3a83));
  constexpr int kChains = 16;
  __m512 sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_set1_ps(0.1f * c);
  for (long n = 0; n < iterations; ++n)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_dpbf16_ps(sum[c], a, b);
  for (int c = 1; c < kChains; ++c) sum[0] = _mm512_add_ps(sum[0], sum[c]);
  *sink += _mm512_reduce_add_ps(sum[0]);
  return 4.0 * 16 * kChains * iterations;
}
#endif

// Sum of table[index[i]]: eight bytes each, as a pair of float32 features. Prefetching `ahead` lookups is optional.
uint64_t ceiling_lookups(const uint64_t* table, const int32_t* index, long count, long ahead) {
  uint64_t sum[4] = {0, 0, 0, 0};
  long i = 0;
  if (ahead > 0)
    for (; i + ahead + 4 <= count; i += 4)
      for (int k = 0; k < 4; ++k) {
        __builtin_prefetch(table + index[i + ahead + k]);
        sum[k] += table[index[i + k]];
      }
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] += table[index[i + k]];
  return sum[0] + sum[1] + sum[2] + sum[3];
}

void ceiling_copy(void* to, const void* from, long bytes) { std::memcpy(to, from, bytes); }
}
