// SPDX-License-Identifier: MIT
// Sums over points in global memory, and how they become gradients. No CUDA syntax: the glue to PyTorch includes it
// too.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/storage.h"

namespace camk::cuda {

// A repeatable sum takes two passes: kLargest finds the largest number to add, kFixed adds in fixed point, where order
// does not matter; finish_fixed brings the sums back.
enum class Sums : int { kFast, kLargest, kFixed };

// sums += fixed, numbers that had up to `terms` summands. sums: float64 where `kind` is, else float32.
cudaError_t launch_finish_fixed(const int64_t* fixed, const uint64_t* largest, void* sums, Storage kind, int64_t count,
                                int64_t terms, cudaStream_t stream);

// Float32 or float64 sums to the numbers of a narrower kind.
template <class A>
cudaError_t launch_round(const A* sums, void* to, Storage kind, int64_t count, cudaStream_t stream);

}  // namespace camk::cuda
