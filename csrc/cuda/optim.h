// SPDX-License-Identifier: MIT
// What the kernel of SparseRowAdam is told, and its launcher. No torch and no CUDA syntax: the glue to PyTorch includes
// it too.
#pragma once
#include "cuda/storage.h"
#include "math/optim.h"

namespace camk::cuda {

// A table [rows, width] with its moments, and a gradient of `count` rows: those that are listed, or all.
template <class C>
struct AdamJob {
  int64_t rows, width, count;
  Storage storage;  // of values and gradient
  void* values;
  C *first, *second;
  int32_t* steps;
  const void* gradient;
  const int64_t* listed;  // null: all
  const C* corrections;   // [last_correction + 1, 2]; the last holds for all later steps
  int64_t last_correction;
  math::AdamRates<C> rates;
};

template <class C>
cudaError_t launch_sparse_row_adam(const AdamJob<C>& job, cudaStream_t stream);

}  // namespace camk::cuda
