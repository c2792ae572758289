// SPDX-License-Identifier: MIT
// What the search of nearest centres is told, and its launcher. No torch and no CUDA syntax: the glue to PyTorch
// includes it too.
#pragma once
#include "cuda/storage.h"
#include "math/neighbors.h"

namespace camk::cuda {

template <class S>
struct NearestJob {
  math::Cells<S> cells;
  int64_t dims, n, k;
  const S* x;       // [n, dims]
  int32_t* rows;    // [n, k], -1 for points that are not finite
  double* squares;  // [n, k] squared distances, NaN for those
};

template <class S>
cudaError_t launch_nearest(const NearestJob<S>& job, cudaStream_t stream);

}  // namespace camk::cuda
