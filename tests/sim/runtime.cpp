// SPDX-License-Identifier: MIT
// The C interface of a simulated library, and the few CUDA run-time functions a launcher may call.
#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "control.h"
#include "scheduler.h"

namespace camk::sim {
namespace {

thread_local std::string last_error;

}  // namespace

int guard(void (*action)(void*), void* argument) {
  try {
    action(argument);
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return 1;
  }
}

}  // namespace camk::sim

extern "C" {
#define CAMK_SIM_EXPORT __attribute__((visibility("default")))
// Present in coverage builds only.
__attribute__((weak)) void __gcov_dump();
__attribute__((weak)) void __gcov_reset();

// The sentence of the last failed call on this thread.
CAMK_SIM_EXPORT const char* camk_sim_last_error() { return camk::sim::last_error.c_str(); }

// "forward", "reverse", "random:SEED"; null returns to the environment variable CAMK_SIM_SCHEDULE. 0 on
// success.
CAMK_SIM_EXPORT int camk_sim_schedule(const char* name) {
  return camk::sim::guarded([&] { camk::sim::set_schedule(name); });
}

// What the next launches simulate: 80 or 90. 0 on success.
CAMK_SIM_EXPORT int camk_sim_architecture(int sm) {
  return camk::sim::guarded([&] {
    if (sm != 80 && sm != 86 && sm != 90) {
      throw camk::sim::Error("architectures are 80, 86 and 90, not " + std::to_string(sm));
    }
    camk::sim::state.architecture = sm;
  });
}

// Copies the counters in the order of `struct Statistics`, sets them to zero, returns how many there are.
CAMK_SIM_EXPORT int camk_sim_statistics(std::uint64_t* values) {
  std::memcpy(values, &camk::sim::state.statistics, sizeof(camk::sim::Statistics));
  camk::sim::state.statistics = {};
  return static_cast<int>(sizeof(camk::sim::Statistics) / sizeof(std::uint64_t));
}

// Writes the line counters of a coverage build to disk.
CAMK_SIM_EXPORT void camk_sim_write_coverage() {
  if (!__gcov_dump) return;
  __gcov_dump();
  __gcov_reset();
}

// ---- CUDA run time: one device, one stream, everything finished when a call returns -----------------------
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error of the simulated CUDA run time"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;  // few, so that grid-stride loops do loop
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(camk::sim::shared_limit());
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = camk::sim::state.architecture / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = camk::sim::state.architecture % 10;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
}
