// SPDX-License-Identifier: MIT
// The seam to PyTorch: the only place that includes its headers, and only the stable ones, so that a library built once
// loads in every later PyTorch. Checks here are the last line of defence: the sentences for users live in Python.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

// Lives in PyTorch from 2.13 on; weak, so that the libraries also load into earlier ones.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

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

// A sentence for the user, made of parts; PyTorch makes a RuntimeError of it. STD_TORCH_CHECK would begin it with the
// names of a function and a file.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

// A new tensor, or PyTorch's own sentence where it makes none: out of memory, most often, and callers look for its
// words.
template <class Make>
Tensor allocate(const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    if (torch_exception_get_what_without_backtrace != nullptr) fail(torch_exception_get_what_without_backtrace());
    fail("PyTorch made no tensor, for want of memory perhaps: ", error.what());
  }
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes);
  return allocate([&] { return torch::stable::new_empty(like, shape, dtype); });
}
inline Tensor empty_as(const Tensor& like) {
  return allocate([&] { return torch::stable::empty_like(like); });
}
inline Tensor zeros(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return allocate([&] { return torch::stable::new_zeros(like, sizes, dtype); });
}

// Bytes that live as long as the returned tensor, from PyTorch's allocator.
inline Tensor scratch_bytes(const Tensor& like, int64_t bytes) { return empty(like, {bytes}, ScalarType::Byte); }

inline void check_contiguous(const Tensor& t, const char* op, const char* name) {
  require(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_same_device(const Tensor& t, const Tensor& like, const char* op, const char* name,
                              const char* like_name = "x") {
  require(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
          " is on another device than ", like_name, "; move it with .to(", like_name, ".device)");
}

inline void check_mask(const char* op, const std::vector<bool>& mask, size_t gradients) {
  require(mask.size() == gradients, op, ": mask must have one entry for each gradient");
}

}  // namespace camk
