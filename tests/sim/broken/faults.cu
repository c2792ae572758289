// SPDX-License-Identifier: MIT
// One kernel, many ways to be wrong: each must end as a sentence, none may end the process. For the simulator
// only.
#include "selftest/interface.h"

namespace {

enum Fault {
  kNone,
  kIllegalAddress,
  kNullPointer,
  kMisalignedLoad,
  kMisalignedReadonly,
  kIndex,
  kFloatCast,
  kSignedOverflow,
  kExitBeforeBarrier,
  kDifferentBarriers,
  kMaskDisagreement,
  kReadsAbsentLane,
  kPartialWarpProduct,
  kSharedIntoGlobalSum,
  kGlobalIntoSharedSum,
  kMisalignedCopy,
  kStackOverflow,
  kUninitialisedStatic,
  kUninitialisedDynamic,
  kDeadlock
};

__device__ CAMK_NOINLINE float deep(float x, int n) {
  volatile float room[256];
  room[n & 255] = x;
  return n == 0 ? x : deep(x + 1.f, n - 1) + room[n & 255];
}

CAMK_DEVICE void memory_fault(int fault, float* data, float* shared, int n) {
  const int i = threadIdx.x;
  if (fault == kIllegalAddress) data[int64_t{1} << 45] = 1.f;
  if (fault == kNullPointer) *reinterpret_cast<float*>(static_cast<uintptr_t>(n - 64)) = 1.f;
  if (fault == kMisalignedLoad) data[i] = reinterpret_cast<const float4*>(data + 1)->x;
  if (fault == kMisalignedReadonly) data[i] = camk::load_readonly(reinterpret_cast<const float2*>(data + 1)).x;
  if (fault == kFloatCast) data[i] = static_cast<float>(static_cast<unsigned>(data[i] - 1e6f));
  if (fault == kSignedOverflow) data[i] = static_cast<float>(0x7fffffff - 63 + n);
  if (fault == kSharedIntoGlobalSum) camk::reduce_add(shared, 1.f);
  if (fault == kGlobalIntoSharedSum) camk::shared_add(data, 1.f);
  if (fault == kMisalignedCopy) camk::cp_async<8>(shared, data + 1);
  if (fault == kStackOverflow) data[i] = deep(data[i], 100000 * n);
}

CAMK_DEVICE void cooperation_fault(int fault, float* data) {
  const int i = threadIdx.x;
  if (fault == kDifferentBarriers) {
    if (i < 32)
      __syncthreads();
    else
      __syncthreads();
  }
  if (fault == kMaskDisagreement) data[i] += __shfl_xor_sync(i % 32 < 8 ? 0xffffffffu : 0xffff00ffu, data[i], 1);
  if (fault == kDeadlock && i % 32 == 0) data[i] = __shfl_sync(0x3u, data[i], 0);
  if (fault == kReadsAbsentLane && i % 32 < 4) data[i] = __shfl_sync(0xfu, data[i], 9);
  if (fault == kPartialWarpProduct && i % 32 != 3) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    camk::mma_f16(d, a, b);
  }
}

__global__ void faulty(int fault, float* data, int n) {
  CAMK_DYNAMIC_SHARED(float, dynamic);
  __shared__ __align__(16) float table[64];
  const int i = threadIdx.x;
  if (fault == kExitBeforeBarrier && i == 5) return;
  if (fault != kUninitialisedStatic) table[i] = 1.f;
  if (fault != kUninitialisedDynamic) dynamic[i] = 2.f;
  __syncthreads();
  if (fault == kPartialWarpProduct && i == 3) return;
  memory_fault(fault, data, table, n);
  cooperation_fault(fault, data);
  if (fault == kIndex) table[n + i] = 1.f;
  if (fault == kDeadlock) __syncthreads();
  data[i] += table[i] + dynamic[i];
}

}  // namespace

// data: 64 floats, aligned to 16 bytes.
SELFTEST selftest_fault(int fault, float* data) {
  return run([&] { return camk::launch(faulty, {dim3(1), dim3(64), 64 * sizeof(float)}, fault, data, 64); });
}

SELFTEST selftest_launch(unsigned blocks, unsigned threads, size_t shared_bytes, float* data) {
  return run([&] { return camk::launch(faulty, {dim3(blocks), dim3(threads), shared_bytes}, int{kNone}, data, 64); });
}
