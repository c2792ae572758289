// SPDX-License-Identifier: MIT
// What launchers of every op need to know of tensors and the device. No CUDA syntax: the glue to PyTorch includes it
// too.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace camk::cuda {

// How the numbers of a tensor are stored.
enum class Storage : int { kHalf, kBFloat16, kFloat, kDouble };
constexpr int bytes_of(Storage kind) { return kind == Storage::kDouble ? 8 : kind == Storage::kFloat ? 4 : 2; }

// Numbers that a thread computes together: a word of so many bytes in their arithmetic type.
inline constexpr int kPackBytes = 16;
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A number of the current device, which PyTorch has made that of the tensors.
inline int device_number(cudaDeviceAttr attribute) {
  int device = 0, value = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

}  // namespace camk::cuda
