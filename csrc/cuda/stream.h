// SPDX-License-Identifier: MIT
// What the CUDA operators need of PyTorch beyond tensors: where they are registered, the current stream, the device,
// and errors as sentences.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "cuda/storage.h"
#include "torch/seam.h"

// Where operators are registered; the simulator's build names a place of its own.
#ifndef CAMK_NAMESPACE
#define CAMK_NAMESPACE camkernels
#endif
#ifndef CAMK_DISPATCH_KEY
#define CAMK_DISPATCH_KEY CUDA
#endif

#ifndef CAMK_SIMULATE
// Lives in libtorch_cuda; weak, so that the library also loads into a PyTorch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace camk::cuda {

// Makes the tensor's device current and finds its stream. The simulator has neither.
class CurrentStream {
 public:
#ifdef CAMK_SIMULATE
  explicit CurrentStream(const Tensor&) {}
#else
  explicit CurrentStream(const Tensor& t) : guard_(checked_device(t)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t get() const { return stream_; }

 private:
#ifndef CAMK_SIMULATE
  static int32_t checked_device(const Tensor& t) {
    require(aoti_torch_get_current_cuda_stream != nullptr && t.is_cuda(),
            "camkernels: the CUDA kernels need a PyTorch built with CUDA, and tensors on a GPU");
    return t.get_device_index();
  }
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

inline Storage storage_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    default:
      fail(op, ": ", name, " must be float16, bfloat16, float32 or float64");
  }
}

inline std::string explain(cudaError_t error) {
  const std::string said = cudaGetErrorString(error);
  switch (error) {
    case cudaErrorInsufficientDriver:
      return said +
             "; the driver is older than the CUDA release camkernels was built with: update the driver, or build "
             "camkernels with the CUDA release that the driver knows";
    case cudaErrorNoDevice:
      return said + "; no GPU or no driver is visible to this process";
    case cudaErrorNoKernelImageForDevice:
      return said +
             "; camkernels was built for other GPU architectures: build it with TORCH_CUDA_ARCH_LIST set to this one";
    default:
      return said;
  }
}

}  // namespace camk::cuda
