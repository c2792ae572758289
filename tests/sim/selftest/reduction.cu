// SPDX-License-Identifier: MIT
// Dot product: shuffles within a warp, static shared memory between warps, one atomic per block. `bug`
// injects a defect.
#include "interface.h"

namespace {

enum Bug { kNone, kNoBarrier, kDivergentBarrier, kWrongMask, kOverrun, kMixedOperations };
constexpr int kThreads = 128, kWarps = kThreads / 32;

template <int bug>
__global__ void dot(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out, int64_t n) {
  __shared__ float part[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.f;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += int64_t{gridDim.x} * kThreads)
    sum += a[i] * b[i];
  const unsigned mask = bug == kWrongMask && lane >= 16 ? 0x0000ffffu : ~0u;
  if (bug == kMixedOperations && lane == 7)
    sum += static_cast<float>(__ballot_sync(~0u, 1));
  else
    for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(mask, sum, d);
  float* const write = part;
  if (lane == 0) write[warp + (bug == kOverrun ? 1 : 0)] = sum;
  if (bug == kDivergentBarrier) {
    if (lane < 20) __syncthreads();
  } else if (bug != kNoBarrier) {
    __syncthreads();
  }
  if (threadIdx.x >= kWarps) return;
  sum = part[threadIdx.x];
  for (int d = kWarps / 2; d > 0; d /= 2) sum += __shfl_xor_sync((1u << kWarps) - 1, sum, d);
  if (threadIdx.x == 0) camk::reduce_add(out, sum);
}

}  // namespace

// What the glue calls: a launcher that knows no torch.
cudaError_t launch_dot(const float* a, const float* b, float* out, int64_t n, int bug, cudaStream_t stream) {
  constexpr void (*kernels[])(const float*, const float*, float*, int64_t) = {
      dot<kNone>, dot<kNoBarrier>, dot<kDivergentBarrier>, dot<kWrongMask>, dot<kOverrun>, dot<kMixedOperations>};
  return camk::launch(kernels[bug], {dim3(3), dim3(kThreads), 0, stream}, a, b, out, n);
}

SELFTEST selftest_dot(const float* a, const float* b, float* out, int64_t n, int bug) {
  return run([&] { return launch_dot(a, b, out, n, bug, nullptr); });
}
