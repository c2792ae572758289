// SPDX-License-Identifier: MIT
// Stored numbers in and out of registers.
#pragma once
#include "cuda/device.cuh"
#include "cuda/storage.h"

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

}  // namespace camk::cuda
