// SPDX-License-Identifier: MIT
// Stored numbers in and out of registers.
#pragma once
#include "cuda/device.cuh"
#include "cuda/storage.h"
#include "math/portable.h"

namespace camk::cuda {

// float16 or bfloat16: which of them is asked for at run time, an instruction more per number and half as many kernels.
struct Short {
  uint16_t bits;
};
CAMK_DEVICE float to_number(Short v, Storage kind) {
  return kind == Storage::kHalf ? __half2float(__ushort_as_half(v.bits))
                                : __bfloat162float(__ushort_as_bfloat16(v.bits));
}
CAMK_DEVICE float to_number(float v, Storage) { return v; }
CAMK_DEVICE double to_number(double v, Storage) { return v; }
CAMK_DEVICE void from_number(Short& v, double x, Storage kind) {
  v.bits = kind == Storage::kHalf ? __half_as_ushort(__float2half_rn(float(x)))
                                  : __bfloat16_as_ushort(__float2bfloat16_rn(float(x)));
}
CAMK_DEVICE void from_number(float& v, double x, Storage) { v = float(x); }
CAMK_DEVICE void from_number(double& v, double x, Storage) { v = x; }

// body(null pointer of the stored type)
template <class Body>
CAMK_DEVICE void with_storage(Storage kind, Body body) {
  switch (kind) {
    case Storage::kHalf:
    case Storage::kBFloat16:
      return body(static_cast<Short*>(nullptr));
    case Storage::kFloat:
      return body(static_cast<float*>(nullptr));
    case Storage::kDouble:
      return body(static_cast<double*>(nullptr));
  }
}

// The same for numbers that are computed in C, which are stored as C or narrower.
template <class C, class Body>
CAMK_DEVICE void with_storage_of(Storage kind, const Body& body) {
  if constexpr (sizeof(C) == 8) {
    with_storage(kind, body);
  } else if (kind == Storage::kFloat) {
    body(static_cast<float*>(nullptr));
  } else {
    body(static_cast<Short*>(nullptr));
  }
}

template <class C>
CAMK_DEVICE C load_number(const void* from, Storage kind, int64_t at) {
  C number;
  with_storage_of<C>(
      kind, [&]<class T>(T*) { number = C(to_number(load_readonly(static_cast<const T*>(from) + at), kind)); });
  return number;
}

template <class C>
CAMK_DEVICE void store_number(void* to, Storage kind, int64_t at, C value) {
  with_storage_of<C>(kind, [&]<class T>(T*) {
    T number;
    from_number(number, value, kind);
    store_streaming(static_cast<T*>(to) + at, number);
  });
}

// ---- Rows: several numbers at once -----------------------------------------------------------------------

// F stored numbers as one word, or as words of 16 bytes.
template <class T, int F>
struct alignas(F * sizeof(T) < 16 ? F * sizeof(T) : 16) Row {
  T v[F];
};
template <class T, int F>
inline constexpr int kWord = F * sizeof(T) <= 16 ? F : 16 / int(sizeof(T));

template <int F, class C, class T>
CAMK_DEVICE Vec<C, F> load_row(const T* from, Storage kind) {
  constexpr int W = kWord<T, F>;
  Vec<C, F> row;
#pragma unroll
  for (int k = 0; k < F; k += W) {
    const auto word = load_readonly(reinterpret_cast<const Row<T, W>*>(from + k));
#pragma unroll
    for (int f = 0; f < W; ++f) row[k + f] = C(to_number(word.v[f], kind));
  }
  return row;
}

template <class T, int F, class C>
CAMK_DEVICE Row<T, F> pack_row(const Vec<C, F>& row, Storage kind) {
  Row<T, F> packed;
#pragma unroll
  for (int f = 0; f < F; ++f) from_number(packed.v[f], row[f], kind);
  return packed;
}

template <class T, int F, class C>
CAMK_DEVICE void store_row(T* to, const Vec<C, F>& row, Storage kind) {
  constexpr int W = kWord<T, F>;
  const Row<T, F> packed = pack_row<T, F>(row, kind);
#pragma unroll
  for (int k = 0; k < F; k += W) {
    Row<T, W> word;
    memcpy(&word, packed.v + k, sizeof(word));
    store_streaming(reinterpret_cast<Row<T, W>*>(to + k), word);
  }
}

}  // namespace camk::cuda
