// SPDX-License-Identifier: MIT
// Run-time number types of a lookup as types of the compiler.
#pragma once
#include "cpu/storage.h"
#include "torch/seam.h"

namespace camk::cpu {

// body(Tag<arithmetic of the coordinates>, Tag<storage of the table>); coordinates are float64 where the table is.
template <class Body>
auto dispatch(const char* op, const Tensor& coordinates, const Tensor& table, const Body& body) {
  const bool wide = coordinates.scalar_type() == ScalarType::Double;
  switch (table.scalar_type()) {
    case ScalarType::Double:
      require(wide, op, ": coordinates must be float64 beside a float64 table");
      return body(Tag<double>{}, Tag<double>{});
    case ScalarType::Float:
      return wide ? body(Tag<double>{}, Tag<float>{}) : body(Tag<float>{}, Tag<float>{});
    case ScalarType::Half:
      return wide ? body(Tag<double>{}, Tag<Half>{}) : body(Tag<float>{}, Tag<Half>{});
    case ScalarType::BFloat16:
      return wide ? body(Tag<double>{}, Tag<BFloat16>{}) : body(Tag<float>{}, Tag<BFloat16>{});
    default:
      fail(op, ": parameters must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace camk::cpu
