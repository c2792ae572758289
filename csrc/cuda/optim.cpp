// SPDX-License-Identifier: MIT
// The operator of SparseRowAdam on CUDA; schema and shapes: python/camkernels/optim.py.
#include "cuda/optim.h"

#include "cuda/stream.h"
#include "launch/optim.h"

namespace camk::cuda {
namespace {

using launch::AdamTensors, launch::kAdam;
using OptionalTensor = std::optional<Tensor>;

template <class C>
AdamJob<C> job_of(const AdamTensors& t, const math::AdamRates<C>& rates) {
  return {t.values.size(0),
          t.width(),
          t.count(),
          storage_of(t.values, kAdam, "values"),
          t.values.mutable_data_ptr(),
          write<C>(t.first),
          write<C>(t.second),
          write<int32_t>(t.steps),
          t.gradient.const_data_ptr(),
          t.rows ? read<int64_t>(*t.rows) : nullptr,
          read<C>(t.corrections),
          t.corrections.size(0) - 1,
          rates};
}

// A row that is listed but not there changes nothing: to look for one would wait for the device.
void step(Tensor values, Tensor first, Tensor second, Tensor steps, Tensor gradient, OptionalTensor rows,
          Tensor corrections, double lr, double beta1, double beta2, double eps) {
  const AdamTensors tensors{values, first, second, steps, gradient, rows, corrections};
  tensors.check();
  tensors.each([&](const Tensor& t, const char* name) { check_same_device(t, values, kAdam, name, "the parameter"); });
  if (gradient.numel() == 0) return;
  const CurrentStream stream(values);
  const auto run = [&]<class C>(Tag<C>) {
    const cudaError_t error = launch_sparse_row_adam(job_of<C>(tensors, {lr, beta1, beta2, eps}), stream.get());
    if (error != cudaSuccess) fail(kAdam, ": the CUDA kernel could not run: ", explain(error));
  };
  values.scalar_type() == ScalarType::Double ? run(Tag<double>{}) : run(Tag<float>{});
}

}  // namespace
}  // namespace camk::cuda

STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) {
  m.impl("sparse_row_adam", TORCH_BOX(&camk::cuda::step));
}
