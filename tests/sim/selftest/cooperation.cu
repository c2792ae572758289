// SPDX-License-Identifier: MIT
// Votes, shuffles with widths, partial masks, barriers with a vote: everything written out for comparison.
#include "interface.h"

namespace {

constexpr int kOutputs = 14;

__global__ void votes(const int* __restrict__ input, int* __restrict__ out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, value = input[i];
  int* const mine = out + i * kOutputs;
  const unsigned existing = __ballot_sync(~0u, 1);  // the last warp of the block is not full
  const unsigned even = existing & 0x55555555u, odd = existing & 0xaaaaaaaau;
  mine[0] = static_cast<int>(__ballot_sync(~0u, value > 2));
  mine[1] = __any_sync(~0u, value == 7);
  mine[2] = __all_sync(~0u, value < 7);
  mine[3] = static_cast<int>(__match_any_sync(~0u, value));
  if (lane % 2 == 0)  // two meetings of disjoint masks at the same time
    mine[4] = static_cast<int>(__ballot_sync(even, value & 1));
  else
    mine[4] = static_cast<int>(__ballot_sync(odd, value & 1));
  mine[5] = __syncthreads_count(value == 3);
  mine[6] = __syncthreads_and(value < 8);
  mine[7] = __syncthreads_or(value == 7);
  mine[8] = __shfl_sync(~0u, value, 3, 8);
  mine[9] = __shfl_up_sync(~0u, value, 2, 16);
  mine[10] = __shfl_down_sync(~0u, value, 3, 8);
  mine[11] = __shfl_xor_sync(~0u, value, 1, 4);
  mine[12] = static_cast<int>(existing);
  __shared__ int exchanged[32 * 3];
  exchanged[threadIdx.x] = value;
  __syncwarp();
  mine[13] = exchanged[threadIdx.x ^ 1];
}

// Raw registers in and out, so that the layouts are checked without any kernel's own index arithmetic. One
// warp per block; a [blocks, 32, 4], b [blocks, 32, 2], d [blocks, 32, 4] (in and out).
template <int type>
__global__ void product(const uint32_t* __restrict__ a, const uint32_t* __restrict__ b, float* __restrict__ d) {
  const int64_t thread = int64_t{blockIdx.x} * 32 + threadIdx.x;
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[thread * 4 + i], rd[i] = d[thread * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[thread * 2 + i];
  if constexpr (type == 0) camk::mma_f16(rd, ra, rb);
  if constexpr (type == 1) camk::mma_bf16(rd, ra, rb);
  if constexpr (type == 2) camk::mma_tf32(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[thread * 4 + i] = rd[i];
}

// in [32, 8] 16-bit: row r of matrix q is in[8 q + r]; out [32, 4] registers.
template <bool transposed>
__global__ void load(const uint16_t* __restrict__ in, uint32_t* __restrict__ out) {
  __shared__ __align__(16) uint16_t rows[32 * 8];
  for (int i = 0; i < 8; ++i) rows[threadIdx.x * 8 + i] = in[threadIdx.x * 8 + i];
  __syncthreads();
  uint32_t r[4];
  camk::ldmatrix_x4<transposed>(r, rows + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

}  // namespace

SELFTEST selftest_votes(const int* input, int* out, int blocks, int threads) {
  return run([&] { return camk::launch(votes, {dim3(blocks), dim3(threads)}, input, out); });
}

SELFTEST selftest_product(const uint32_t* a, const uint32_t* b, float* d, int blocks, int type) {
  return run([&] {
    const auto kernel = type == 0 ? product<0> : type == 1 ? product<1> : product<2>;
    return camk::launch(kernel, {dim3(blocks), dim3(32)}, a, b, d);
  });
}

SELFTEST selftest_load(const uint16_t* in, uint32_t* out, int transposed) {
  return run([&] { return camk::launch(transposed ? load<true> : load<false>, {dim3(1), dim3(32)}, in, out); });
}
