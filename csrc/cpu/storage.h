// SPDX-License-Identifier: MIT
// The number types in which tables, features and weights are stored, and how rows of them are read into lanes and
// added. float16 and bfloat16 are storage only: arithmetic is float32.
#pragma once
#include <bit>

#include "cpu/lanes.h"

namespace camk {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

CAMK_HD float to_number(float x) { return x; }
CAMK_HD double to_number(double x) { return x; }
CAMK_HD float to_number(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
CAMK_HD float to_number(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero and subnormal: a multiple of 2^-24
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(magnitude) * 0x1p-24f));
  }
  const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  return std::bit_cast<float>(sign | ((magnitude << 13) + rebias));
#endif
}

template <class T>
CAMK_HD T from_number(double x) {
  return T(x);
}
// Round to nearest even; NaN stays NaN.
template <>
CAMK_HD BFloat16 from_number<BFloat16>(double x) {
  const uint32_t b = std::bit_cast<uint32_t>(float(x));
  if ((b & 0x7fffffffu) > 0x7f800000u) return {uint16_t((b >> 16) | 0x40u)};
  return {uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
}
template <>
CAMK_HD Half from_number<Half>(double x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(float(x), _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t b = std::bit_cast<uint32_t>(float(x)), sign = (b >> 16) & 0x8000u, m = b & 0x7fffffffu;
  if (m > 0x7f800000u) return {uint16_t(sign | 0x7e00u | ((m >> 13) & 0x3ffu))};
  if (m >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (m < 0x38800000u) {                                    // subnormal: adding 0.5 rounds at 2^-24
    const float shifted = std::bit_cast<float>(m) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((m - (112u << 23) + 0xfffu + ((m >> 13) & 1u)) >> 13))};
#endif
}

// What sums are kept in.
template <class T>
using accumulator_of = std::conditional_t<std::is_same_v<T, double>, double, float>;

// kLanes pairs of float32, pair k at base + 2 entries[k]. One load each: a gather instruction is no faster on rows in
// the cache, and keeps others waiting on rows that are not.
CAMK_HD Vec<Floats, 2> load_pairs(const float* base, const uint32_t* entries) {
#if defined(__AVX2__)
  const double* pairs = reinterpret_cast<const double*>(base);
  const auto two = [&](int i, int j)
                       CAMK_INLINED { return _mm_loadh_pd(_mm_load_sd(pairs + entries[i]), pairs + entries[j]); };
#endif
#if defined(__AVX512F__)
  const auto eight = [&](int i) CAMK_INLINED {
    __m512d r = _mm512_castpd128_pd512(two(i, i + 1));
    r = _mm512_insertf64x2(r, two(i + 2, i + 3), 1);
    r = _mm512_insertf64x2(r, two(i + 4, i + 5), 2);
    return _mm512_castpd_ps(_mm512_insertf64x2(r, two(i + 6, i + 7), 3));
  };
  const __m512 a = eight(0), b = eight(8);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{Floats(_mm512_permutex2var_ps(a, even, b)), Floats(_mm512_permutex2var_ps(a, odd, b))}};
#elif defined(__AVX2__)
  const auto four = [&](int i, int j, int k, int l) CAMK_INLINED {
    return _mm256_castpd_ps(_mm256_insertf128_pd(_mm256_castpd128_pd256(two(i, j)), two(k, l), 1));
  };
  const __m256 a = four(0, 1, 4, 5), b = four(2, 3, 6, 7);  // so that the split needs no crossing of 128-bit halves
  return {{Floats(_mm256_shuffle_ps(a, b, 0x88)), Floats(_mm256_shuffle_ps(a, b, 0xdd))}};
#else
  Vec<Floats, 2> r;
  for (int k = 0; k < kLanes; ++k) {
    r[0].v[k] = base[2 * size_t(entries[k])], r[1].v[k] = base[2 * size_t(entries[k]) + 1];
  }
  return r;
#endif
}

CAMK_HD Vec<Floats, 2> load_pairs(const BFloat16* base, const uint32_t* entries) {
  Words pairs;
  const char* bytes = reinterpret_cast<const char*>(base);
#if defined(__AVX512F__)
  pairs = Words((Words::Raw)_mm512_i32gather_epi32((__m512i)Words::load(entries).v, bytes, 4));
#else
  for (int k = 0; k < kLanes; ++k) {
    uint32_t pair;
    memcpy(&pair, bytes + 4 * size_t(entries[k]), 4);
    pairs.v[k] = pair;
  }
#endif
  return {{Floats((Floats::Raw)(pairs.v << 16)), Floats((Floats::Raw)(pairs.v & 0xffff0000u))}};
}

// Rows of F numbers, row k at base + stride entries[k], as F values of type C.
template <int F, class C, class T>
CAMK_HD Vec<C, F> load_rows(const T* base, int64_t stride, const uint32_t* entries) {
  Vec<C, F> r;
  if constexpr (lanes_of<C> == 1) {
    const T* row = base + size_t(*entries) * stride;
    for (int f = 0; f < F; ++f) r[f] = C(to_number(row[f]));
  } else if constexpr (F == 2 && (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>)) {
    if (stride == 2) return load_pairs(base, entries);
    unroll<kLanes>([&](int k) CAMK_INLINED {
      const T* row = base + size_t(entries[k]) * stride;
      r[0].v[k] = to_number(row[0]), r[1].v[k] = to_number(row[1]);
    });
  } else {
    unroll<kLanes>([&](int k) CAMK_INLINED {
      const T* row = base + size_t(entries[k]) * stride;
      unroll<F>([&](auto f) CAMK_INLINED { r[f].v[k] = to_number(row[f]); });
    });
  }
  return r;
}

template <int Rows, class T>
CAMK_HD void prefetch_rows(const T* base, int64_t stride, const uint32_t* entries) {
  for (int k = 0; k < Rows; ++k) __builtin_prefetch(base + size_t(entries[k]) * stride);
}

// value k of pack f at p[k * F + f]
template <int F>
CAMK_HD void store_interleaved(float* p, const Vec<Floats, F>& rows) {
  if constexpr (F == 1) {
    rows[0].store(p);
  } else {
    static_assert(F == 2);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256 low = _mm256_unpacklo_ps(rows[0].v, rows[1].v), high = _mm256_unpackhi_ps(rows[0].v, rows[1].v);
    _mm256_store_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_store_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
#else
    for (int k = 0; k < kLanes; ++k) p[2 * k] = rows[0].v[k], p[2 * k + 1] = rows[1].v[k];
#endif
  }
}

template <int F, class A>
CAMK_HD void add_row(A* row, const A* value) {
  if constexpr (F == 2 && std::is_same_v<A, float>) {
    typedef float Pair __attribute__((vector_size(8)));  // one load, one addition, one store
    Pair sum, more;
    memcpy(&sum, row, sizeof(sum));
    memcpy(&more, value, sizeof(more));
    sum += more;
    memcpy(row, &sum, sizeof(sum));
  } else {
    for (int f = 0; f < F; ++f) row[f] += value[f];
  }
}

// Adds row k to base + stride entries[k], lane after lane; rows outside [first, first + count) belong to another
// thread. Nearly always there are none: one check for all lanes makes the scattering pass in 3-D 9 % faster (Zen 5).
template <int F, class C, class A>
struct RowAdder {
  A* base;
  int64_t stride;
  uint32_t first, count;

  CAMK_HD void operator()(const uint32_t* entries, const Vec<C, F>& rows) const {
    if constexpr (lanes_of<C> == 1) {
      if (*entries - first >= count) return;
      A* row = base + size_t(*entries) * stride;
      for (int f = 0; f < F; ++f) row[f] += A(rows[f]);
    } else {
      alignas(64) A value[kLanes * F];
      store_interleaved(value, rows);
      const auto add = [&](int k) CAMK_INLINED { add_row<F>(base + size_t(entries[k]) * stride, value + k * F); };
      if (all_below(Words::load(entries) - Words(first), count)) {
        unroll<kLanes>(add);
      } else {
        for (int k = 0; k < kLanes; ++k) {
          if (entries[k] - first < count) add(k);
        }
      }
    }
  }
};

}  // namespace camk
