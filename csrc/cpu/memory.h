// SPDX-License-Identifier: MIT
// Fresh memory of PyTorch's allocator, in large pages where the system grants them on request: the first touch of 64 MB
// in 4 KB pages costs more than the kernels that fill it.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "torch/seam.h"

namespace camk::cpu {

// Asks for large pages for the whole ones inside a tensor that nobody has written to yet; returns the tensor.
inline Tensor in_large_pages(Tensor tensor) {
#if defined(__linux__)
  const int64_t bytes = tensor.numel() * int64_t(tensor.element_size());
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + uintptr_t(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace camk::cpu
