// SPDX-License-Identifier: MIT
// Run-time number types as types of the compiler.
#pragma once
#include "cpu/storage.h"
#include "torch/seam.h"

namespace camk::cpu {

// body(Tag<T>) for the number type of a tensor.
template <class Body>
void with_numbers(const char* op, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(Tag<double>{});
    case ScalarType::Float:
      return body(Tag<float>{});
    case ScalarType::Half:
      return body(Tag<Half>{});
    case ScalarType::BFloat16:
      return body(Tag<BFloat16>{});
    default:
      fail(op, ": parameters must be float16, bfloat16, float32 or float64");
  }
}

template <class Body>
void with_numbers(const char* op, const Tensor& tensor, const Body& body) {
  with_numbers(op, tensor.scalar_type(), body);
}

inline bool is_wide(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// body(Tag<C>), C the type of the arithmetic: that of wide tensors is float64, of all others float32.
template <class Body>
void with_arithmetic(bool wide, const Body& body) {
  wide ? body(Tag<double>{}) : body(Tag<float>{});
}

// body(Tag<arithmetic of the coordinates>, Tag<storage of the table>); coordinates are float64 where the table is.
template <class Body>
void dispatch(const char* op, const Tensor& coordinates, const Tensor& table, const Body& body) {
  with_numbers(op, table, [&]<class T>(Tag<T> storage) {
    if (is_wide(coordinates)) return body(Tag<double>{}, storage);
    if constexpr (std::is_same_v<T, double>) {
      fail(op, ": coordinates must be float64 beside a float64 table");
    } else {
      body(Tag<float>{}, storage);
    }
  });
}

}  // namespace camk::cpu
