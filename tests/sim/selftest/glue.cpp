// SPDX-License-Identifier: MIT
// One glue source, two libraries. CAMK_NAMESPACE and CAMK_DISPATCH_KEY come from the build: a CUDA build
// leaves them at their defaults; the simulator's build registers the same operators as a namespace of its own
// under the key CPU, so that the real CPU library, the CUDA library and the simulated one can be loaded into
// one process. In the simulator a kernel's fault arrives as a C++ exception from the launcher and becomes a
// RuntimeError; nothing is to be done here.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifndef CAMK_NAMESPACE
#define CAMK_NAMESPACE camkernels_selftest
#endif
#ifndef CAMK_DISPATCH_KEY
#define CAMK_DISPATCH_KEY CUDA
#endif

using torch::stable::Tensor;

cudaError_t launch_dot(const float* a, const float* b, float* out, int64_t n, int bug, cudaStream_t stream);

#ifndef CAMK_SIMULATE
// Lives in libtorch_cuda; weak, so that the library also loads into a PyTorch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace {

class CurrentStream {  // makes the tensor's device current and finds its stream; the simulator has neither
 public:
#ifdef CAMK_SIMULATE
  explicit CurrentStream(const Tensor&) {}
#else
  explicit CurrentStream(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t get() const { return stream_; }

 private:
#ifndef CAMK_SIMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

Tensor dot(Tensor a, Tensor b, int64_t bug) {
  STD_TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && a.numel() == b.numel(), "dot: a and b must match");
  const CurrentStream stream(a);
  Tensor out = torch::stable::new_zeros(a, {1});
  const cudaError_t error =
      launch_dot(static_cast<const float*>(a.const_data_ptr()), static_cast<const float*>(b.const_data_ptr()),
                 static_cast<float*>(out.mutable_data_ptr()), a.numel(), static_cast<int>(bug), stream.get());
  STD_TORCH_CHECK(error == cudaSuccess, "dot: ", cudaGetErrorString(error));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(CAMK_NAMESPACE, m) { m.def("dot(Tensor a, Tensor b, int bug=0) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) { m.impl("dot", TORCH_BOX(&dot)); }
