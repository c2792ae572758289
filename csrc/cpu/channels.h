// SPDX-License-Identifier: MIT
// Row-major tensors [points, channels] <-> channel-major scratch [channels, pitch], converting the number type. The
// kernels walk one level over all points, so they want each channel contiguous.
#pragma once
#include <algorithm>

#include "cpu/storage.h"

namespace camk::cpu {

inline constexpr int64_t kTile = 8;

template <class From, class To>
CAMK_HD void transpose_tile(const From* from, int64_t from_pitch, To* to, int64_t to_pitch) {
  using Scalar = std::conditional_t<std::is_same_v<From, double> || std::is_same_v<To, double>, double, float>;
  Scalar tile[kTile][kTile];
  for (int64_t r = 0; r < kTile; ++r) {
    for (int64_t c = 0; c < kTile; ++c) tile[c][r] = Scalar(to_number(from[r * from_pitch + c]));
  }
  for (int64_t r = 0; r < kTile; ++r) {
    for (int64_t c = 0; c < kTile; ++c) to[r * to_pitch + c] = from_number<To>(tile[r][c]);
  }
}

#if defined(__AVX2__)
// The tile that nearly every call consists of: three rounds of shuffles.
template <>
inline void transpose_tile(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
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
#endif

// to[c * to_pitch + r] = from[r * from_pitch + c] for r < rows, c < columns.
template <class From, class To>
[[gnu::noinline]] void transpose(const From* from, int64_t rows, int64_t columns, int64_t from_pitch, To* to,
                                 int64_t to_pitch) {
  const int64_t whole_rows = rows / kTile * kTile, whole_columns = columns / kTile * kTile;
  for (int64_t r = 0; r < whole_rows; r += kTile) {
    for (int64_t c = 0; c < whole_columns; c += kTile) {
      transpose_tile(from + r * from_pitch + c, from_pitch, to + c * to_pitch + r, to_pitch);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      using Scalar = std::conditional_t<std::is_same_v<From, double>, double, float>;
      to[c * to_pitch + r] = from_number<To>(Scalar(to_number(from[r * from_pitch + c])));
    }
  }
}

}  // namespace camk::cpu
