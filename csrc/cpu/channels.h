// SPDX-License-Identifier: MIT
// Row-major tensors [points, channels] <-> channel-major scratch [channels, pitch], converting the number type. The
// kernels walk one level over all points, so they want each channel contiguous. Far: for more than a cache holds; rows
// are prefetched, and tiles whose lines are cache lines are stored past the caches.
#pragma once
#include <algorithm>

#include "cpu/storage.h"

namespace camk::cpu {

// A square of Side x Side numbers. If Far, its lines in `to` begin where cache lines do.
template <int Side, class From, class To>
struct Tile {
  using Scalar = std::conditional_t<std::is_same_v<From, double> || std::is_same_v<To, double>, double, float>;
  template <bool Far>
  CAMK_HD static void transpose(const From* from, int64_t from_pitch, To* to, int64_t to_pitch) {
    Scalar tile[Side][Side];
    for (int64_t r = 0; r < Side; ++r) {
      for (int64_t c = 0; c < Side; ++c) tile[c][r] = Scalar(to_number(from[r * from_pitch + c]));
    }
    for (int64_t r = 0; r < Side; ++r) {
      for (int64_t c = 0; c < Side; ++c) to[r * to_pitch + c] = from_number<To>(tile[r][c]);
    }
  }
};

// The tiles that nearly every call consists of: rounds of shuffles.
#if defined(__AVX2__)
template <>
struct Tile<8, float, float> {
  template <bool Far>
  CAMK_HD static void transpose(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_pitch);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * to_pitch, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * to_pitch, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
};
#endif

#if defined(__AVX512F__)
template <>
struct Tile<16, float, float> {
  template <bool Far>
  CAMK_HD static void transpose(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
    const auto store = [&](int column, Floats numbers) CAMK_INLINED {
      Far ? numbers.store_far(to + column * to_pitch) : numbers.store(to + column * to_pitch);
    };
    __m512 a[16], b[16];
    unroll<16>([&](int i) CAMK_INLINED { a[i] = _mm512_loadu_ps(from + i * from_pitch); });
    unroll<8>([&](int i) CAMK_INLINED {
      b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    });
    unroll<4>([&](int i) CAMK_INLINED {
      a[4 * i] = _mm512_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
      a[4 * i + 1] = _mm512_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
      a[4 * i + 2] = _mm512_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
      a[4 * i + 3] = _mm512_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
    });
    unroll<4>([&](int i) CAMK_INLINED {  // columns i, i + 4, i + 8, i + 12
      const __m512 even = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
      const __m512 more_even = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
      const __m512 more_odd = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
      store(i, _mm512_shuffle_f32x4(even, more_even, 0x88));
      store(i + 4, _mm512_shuffle_f32x4(odd, more_odd, 0x88));
      store(i + 8, _mm512_shuffle_f32x4(even, more_even, 0xdd));
      store(i + 12, _mm512_shuffle_f32x4(odd, more_odd, 0xdd));
    });
  }
};
template <class From, class To>
inline constexpr int kLargestTile = std::is_same_v<From, float> && std::is_same_v<To, float> ? 16 : 8;
#else
template <class From, class To>
inline constexpr int kLargestTile = 8;
#endif

// How far ahead rows are prefetched. With it and far stores, gradients of 2^17 points x 32 channels become channels in
// 5 ns a point instead of 13; far stores alone take 7.5 (Zen 5).
inline constexpr int64_t kRowsAhead = 64;

template <int Rows, class T>
CAMK_HD void prefetch_lines(const T* from, int64_t columns, int64_t pitch) {
  for (int64_t r = 0; r < Rows; ++r) {
    for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(from + r * pitch + c);
  }
}

// to[c * to_pitch + r] = from[r * from_pitch + c] for r < rows, c < columns: by tiles, what remains by smaller ones.
template <int Side, bool Far, class From, class To>
void transpose_by(const From* from, int64_t rows, int64_t columns, int64_t from_pitch, To* to, int64_t to_pitch) {
  const int64_t whole_rows = rows / Side * Side, whole_columns = columns / Side * Side;
  for (int64_t r = 0; r < whole_rows; r += Side) {
    if constexpr (Far && Side == kLargestTile<From, To>) {
      prefetch_lines<Side>(from + (r + kRowsAhead) * from_pitch, columns, from_pitch);
    }
    for (int64_t c = 0; c < whole_columns; c += Side) {
      using Square = Tile<Side, From, To>;
      Square::template transpose<Far>(from + r * from_pitch + c, from_pitch, to + c * to_pitch + r, to_pitch);
    }
  }
  if constexpr (Side > 1) {
    constexpr int kSmaller = Side > 8 ? 8 : 1;
    transpose_by<kSmaller, Far>(from + whole_columns, whole_rows, columns - whole_columns, from_pitch,
                                to + whole_columns * to_pitch, to_pitch);
    transpose_by<kSmaller, Far>(from + whole_rows * from_pitch, rows - whole_rows, columns, from_pitch, to + whole_rows,
                                to_pitch);
  }
}

template <bool Far = false, class From, class To>
[[gnu::noinline]] void transpose(const From* from, int64_t rows, int64_t columns, int64_t from_pitch, To* to,
                                 int64_t to_pitch) {
  transpose_by<kLargestTile<From, To>, Far>(from, rows, columns, from_pitch, to, to_pitch);
  if constexpr (Far) far_stores_done();
}

}  // namespace camk::cpu
