// SPDX-License-Identifier: MIT
// Wants more registers than its launch bounds leave: compiling it with spills as errors must fail.
#include "cuda/device.cuh"

__global__ void __launch_bounds__(1024, 2) spill(float* data) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i] = data[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) data[threadIdx.x + 1024 * i] = x[i] * x[95 - i] + x[(i * 7) % 96];
}
