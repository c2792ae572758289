// SPDX-License-Identifier: MIT
// The search of nearest centres on CUDA; schema and shapes: python/camkernels/neighbors.py.
#include "cuda/neighbors.h"

#include "cuda/stream.h"
#include "launch/neighbors.h"
#include "torch/seam.h"

namespace camk::cuda {
namespace {

constexpr const char* kOp = "nearest";

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor points, Tensor rows, Tensor starts, Tensor cuts,
                                   std::vector<int64_t> slabs, int64_t k) {
  const launch::NearestTensors tensors{x, points, rows, starts, cuts, slabs, k};
  tensors.check(kOp);
  check_same_device(points, x, kOp, "points");
  check_same_device(rows, x, kOp, "rows");
  check_same_device(starts, x, kOp, "starts");
  check_same_device(cuts, x, kOp, "cuts");
  const CurrentStream stream(x);
  const int64_t n = x.size(0);
  const Tensor found = empty(x, {n, k}, ScalarType::Int), squares = empty(x, {n, k}, ScalarType::Double);
  launch::with_coordinates(x, [&]<class S>(Tag<S>) {
    const NearestJob<S> job{tensors.cells<S>(),    x.size(1), n, k, read<S>(x), write<int32_t>(found),
                            write<double>(squares)};
    const cudaError_t error = launch_nearest(job, stream.get());
    if (error != cudaSuccess) fail(kOp, ": the CUDA kernel could not run: ", explain(error));
  });
  return {found, squares};
}

}  // namespace
}  // namespace camk::cuda

STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) { m.impl("nearest", TORCH_BOX(&camk::cuda::nearest)); }
