// SPDX-License-Identifier: MIT
// A pack of SIMD lanes that stands for C in the formulas of csrc/math. Compiler vector extensions, so that one source
// serves every instruction set; intrinsics only where the extensions have no word for it (fused multiply-add,
// rounding).
#pragma once
#include <array>
#include <cstring>

#include "math/portable.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace camk {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;  // SSE2, NEON
#endif

// Written out per type: the compiler drops the attribute where the element type is a template parameter.
template <class T, int N>
struct raw_lanes;
template <int N>
struct raw_lanes<float, N> {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <int N>
struct raw_lanes<uint32_t, N> {
  typedef uint32_t type __attribute__((vector_size(4 * N)));
};
template <int N>
struct raw_lanes<int32_t, N> {
  typedef int32_t type __attribute__((vector_size(4 * N)));
};

template <int N>
struct raw_lanes<double, N> {
  typedef double type __attribute__((vector_size(8 * N)));
};

template <class T, int N = 4 * kLanes / int(sizeof(T))>
struct Lanes {
  using Raw = typename raw_lanes<T, N>::type;
  Raw v;
  Lanes() = default;
  CAMK_HD Lanes(Raw raw) : v(raw) {}
  CAMK_HD explicit Lanes(T scalar) : v(scalar - Raw{}) {}
  CAMK_HD static Lanes load(const T* p) {
    Lanes r;
    memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  CAMK_HD void store(T* p) const { memcpy(p, &v, sizeof(v)); }
  // Past the caches, to where nobody reads soon; p as aligned as the pack is wide. Then far_stores_done().
  CAMK_HD void store_far(T* p) const {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
    store(p);
#endif
  }
  CAMK_HD friend Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
  CAMK_HD friend Lanes operator-(Lanes a) { return -a.v; }
  CAMK_HD friend Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
  CAMK_HD friend Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
  CAMK_HD friend Lanes operator/(Lanes a, Lanes b) { return a.v / b.v; }
  CAMK_HD friend Lanes operator&(Lanes a, Lanes b) { return a.v & b.v; }
  CAMK_HD friend Lanes operator|(Lanes a, Lanes b) { return a.v | b.v; }
  CAMK_HD friend Lanes operator^(Lanes a, Lanes b) { return a.v ^ b.v; }
};

// Before another thread is told that it may read what store_far wrote.
CAMK_HD void far_stores_done() {
#if defined(__SSE__)
  __builtin_ia32_sfence();
#endif
}

using Floats = Lanes<float>;
using Doubles = Lanes<double>;  // half as many
using Words = Lanes<uint32_t>;

template <>
struct index_of<Floats> {
  using type = Words;
};
template <class T, int N>
struct scalar_of<Lanes<T, N>> {
  using type = T;
};

CAMK_HD Floats multiply_add(Floats x, Floats y, Floats z) {
#if defined(__AVX512F__)
  return Floats(_mm512_fmadd_ps(x.v, y.v, z.v));
#elif defined(__FMA__)
  return Floats(_mm256_fmadd_ps(x.v, y.v, z.v));
#else
  for (int i = 0; i < kLanes; ++i) x.v[i] = multiply_add(x.v[i], y.v[i], z.v[i]);
  return x;
#endif
}

#if defined(__AVX512F__)
using HalfFloats = Lanes<float, kLanes / 2>;
CAMK_HD HalfFloats multiply_add(HalfFloats x, HalfFloats y, HalfFloats z) {
  return HalfFloats(_mm256_fmadd_ps(x.v, y.v, z.v));
}

// bfloat16 in pairs, the first in the lower half. By instructions that not every processor with AVX-512 has.
inline bool multiplies_bfloat16() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}
// x0 y0 + x1 y1 + z
CAMK_HD Floats multiply_add(Words x, Words y, Floats z) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(z.v) : "v"(x.v), "v"(y.v));
  return z;
}
// The numbers of `low`, then those of `high`, to nearest even.
CAMK_HD Words to_bfloat16(Floats low, Floats high) {
  Words pairs;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pairs.v) : "v"(high.v), "v"(low.v));
  return pairs;
}
// Number k of both side by side.
CAMK_HD Words to_bfloat16_pairs(Floats first, Floats second) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint16_t, 2 * kLanes> order{};
    for (uint16_t k = 0; k < kLanes; ++k) order[2 * k] = k, order[2 * k + 1] = kLanes + k;
    return order;
  }();
  const __m512i rounded = (__m512i)to_bfloat16(first, second).v;
  return Words((Words::Raw)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder.data()), rounded));
}
// N numbers, up to kLanes, and zeros behind them; none below 0.
CAMK_HD Floats load_first(const float* p, int64_t n) {
  const __mmask16 mask = n >= kLanes ? 0xffff : n <= 0 ? 0 : (1 << n) - 1;
  return Floats(_mm512_maskz_loadu_ps(mask, p));
}
#else
inline bool multiplies_bfloat16() { return false; }
#endif

CAMK_HD Floats round_down(Floats x) {
#if defined(__AVX512F__)
  return Floats(_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return Floats(_mm256_floor_ps(x.v));
#else
  for (int i = 0; i < kLanes; ++i) x.v[i] = floorf(x.v[i]);
  return x;
#endif
}

// Whether a comparison holds in every lane.
CAMK_HD bool in_all_lanes(Lanes<int32_t>::Raw holds) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)holds) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)holds) == 0xff;
#else
  int32_t all = -1;
  for (int k = 0; k < kLanes; ++k) all &= holds[k];
  return all != 0;
#endif
}

// Whether every lane lies between -bound and bound; NaN does not.
CAMK_HD bool all_within(Floats x, float bound) {
  return in_all_lanes((x.v < Floats(bound).v) & (x.v > Floats(-bound).v));
}

CAMK_HD bool all_below(Words x, uint32_t bound) { return in_all_lanes(x.v < Words(bound).v); }

CAMK_HD Words to_word(Floats whole) {
  return Words((Words::Raw) __builtin_convertvector(whole.v, Lanes<int32_t>::Raw));
}

CAMK_HD Words to_cell(Floats whole) {
  const Floats::Raw low = Floats(kCellMin).v, high = Floats(kCellMax).v;
  Floats::Raw w = whole.v < low ? low : whole.v;
  w = w > high ? high : w;
  return to_word(Floats(w));
}

CAMK_HD Words where_positive(Floats x, Words n) { return Words((Words::Raw)(x.v > Floats(0.f).v) & n.v); }

// Dense indices of points inside the grid are below 2 size, so that one subtraction is enough and the loop rarely runs.
CAMK_HD Words remainder_of(Words i, uint32_t size) {
  const Words::Raw s = Words(size).v;
  Words::Raw r = i.v - ((Words::Raw)(i.v >= s) & s);
  const Words::Raw beyond = (Words::Raw)(r >= s);
  uint32_t any = 0;
  for (int k = 0; k < kLanes; ++k) any |= beyond[k];
  if (any) {
    for (int k = 0; k < kLanes; ++k) r[k] = i.v[k] % size;
  }
  return Words(r);
}

#if defined(__AVX2__)
// N numbers, and zeros behind them.
template <int N>
CAMK_HD __m128 load_some(const float* p) {
  if constexpr (N == 4) return _mm_loadu_ps(p);
  if constexpr (N == 1) return _mm_load_ss(p);
  if constexpr (N == 3) return _mm_maskload_ps(p, _mm_setr_epi32(-1, -1, -1, 0));
  return _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
#endif

// N columns, up to four, of kLanes rows, a pack for each; row(k): where row k is.
template <int N, class Row>
CAMK_HD Vec<Floats, N> load_columns(const Row& row) {
  Vec<Floats, N> columns;
#if defined(__AVX2__)
  Floats::Raw r[4];  // rows i, i + 4, ...: side by side
  unroll<4>([&](int i) CAMK_INLINED {
    const auto some = [&](int k) CAMK_INLINED { return load_some<N>(row(i + 4 * k)); };
#if defined(__AVX512F__)
    const __m512 half = _mm512_insertf32x4(_mm512_castps128_ps512(some(0)), some(1), 1);
    r[i] = _mm512_insertf32x4(_mm512_insertf32x4(half, some(2), 2), some(3), 3);
#else
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(some(0)), some(1), 1);
#endif
  });
#if defined(__AVX512F__)
  const __m512i lows = _mm512_setr_epi32(0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const __m512i highs = _mm512_add_epi32(lows, _mm512_set1_epi32(2));
  const auto low = [&](__m512 a, __m512 b) CAMK_INLINED { return _mm512_permutex2var_ps(a, lows, b); };
  const auto high = [&](__m512 a, __m512 b) CAMK_INLINED { return _mm512_permutex2var_ps(a, highs, b); };
#else
  const auto low = [](__m256 a, __m256 b) CAMK_INLINED { return _mm256_unpacklo_ps(a, b); };
  const auto high = [](__m256 a, __m256 b) CAMK_INLINED { return _mm256_unpackhi_ps(a, b); };
#endif
  const Floats::Raw a = low(r[0], r[2]), b = low(r[1], r[3]), c = high(r[0], r[2]), d = high(r[1], r[3]);
  const Floats four[] = {low(a, b), high(a, b), low(c, d), high(c, d)};
  unroll<N>([&](int i) CAMK_INLINED { columns[i] = four[i]; });
#else
  for (int k = 0; k < kLanes; ++k) unroll<N>([&](int c) CAMK_INLINED { columns[c].v[k] = row(k)[c]; });
#endif
  return columns;
}

// Number of points that a value of type C stands for.
template <class C>
inline constexpr int lanes_of = sizeof(C) / sizeof(typename scalar_of<C>::type);

template <class C>
CAMK_HD C load_lanes(const typename scalar_of<C>::type* p) {
  if constexpr (lanes_of<C> == 1) {
    return *p;
  } else {
    return C::load(p);
  }
}

template <class C>
CAMK_HD void store_lanes(typename scalar_of<C>::type* p, C value) {
  if constexpr (lanes_of<C> == 1) {
    *p = value;
  } else {
    value.store(p);
  }
}

}  // namespace camk
