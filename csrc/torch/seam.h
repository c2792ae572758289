// SPDX-License-Identifier: MIT
// The seam to PyTorch: the only place that includes its headers, and only the stable ones, so that a library built once
// loads in every later PyTorch. Checks here are the last line of defence: the sentences for users live in Python.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace camk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Tag {
  using type = T;
};

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// Bytes that live as long as the returned tensor, from PyTorch's allocator.
inline Tensor scratch_bytes(const Tensor& like, int64_t bytes) { return empty(like, {bytes}, ScalarType::Byte); }

inline void check_contiguous(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

}  // namespace camk
