// SPDX-License-Identifier: MIT
// Large results. Fresh memory of PyTorch's allocator, in large pages where the system grants them on request: the first
// touch of 64 MB in 4 KB pages costs more than the kernels that fill it. Stores past the caches.
#pragma once
#include <cstdint>

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

// Whether what is written may go past the caches, in whole packs: from some bytes on the next one to read it would not
// find it there, and a store that first fetches what it overwrites takes half as much memory traffic again.
inline bool goes_far(const void* to, int64_t bytes, int64_t least) {
  return bytes >= least && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

}  // namespace camk::cpu
