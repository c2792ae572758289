// SPDX-License-Identifier: MIT
// C[m, n] = A[m, k] B[k, n] (row-major) in float16, bfloat16 or tf32 on tensor cores: cp.async in two stages,
// ldmatrix, mma. m a multiple of 32, n of 16, k of 16 (16-bit) or 8 (tf32). `bug` injects a defect.
#include "interface.h"

namespace {

enum Bug { kNone, kNoWait, kNoBarrier };
constexpr int kWarps = 2, kRows = 16 * kWarps, kColumns = 16, kThreads = 32 * kWarps,
              kPad = 16;  // kPad in bytes

template <class T>
struct Tile {
  static constexpr int depth = 32 / sizeof(T);              // k of one stage: rows of A are 32 bytes
  static constexpr int a_stride = (32 + kPad) / sizeof(T);  // padding spreads rows over the banks
  static constexpr int b_stride = kColumns + kPad / sizeof(T);
  static constexpr int stage = kRows * a_stride + depth * b_stride;  // elements of A and B
  static constexpr int bytes = 2 * stage * sizeof(T);
};

template <class T>
CAMK_DEVICE void fetch(T* stage, const T* a, const T* b, int64_t row, int64_t column, int64_t k0, int64_t n,
                       int64_t k) {
  constexpr int wide = 16 / sizeof(T);  // elements of one copy
  for (int i = threadIdx.x; i < kRows * 2; i += kThreads)
    camk::cp_async<16>(stage + i / 2 * Tile<T>::a_stride + i % 2 * wide, a + (row + i / 2) * k + k0 + i % 2 * wide);
  constexpr int per_row = kColumns / wide;
  T* const b_tile = stage + kRows * Tile<T>::a_stride;
  for (int i = threadIdx.x; i < Tile<T>::depth * per_row; i += kThreads)
    camk::cp_async<16>(b_tile + i / per_row * Tile<T>::b_stride + i % per_row * wide,
                       b + (k0 + i / per_row) * n + column + i % per_row * wide);
  camk::cp_async_commit();
}

template <class T>
CAMK_DEVICE void load_b(uint32_t (&b)[2][2], const T* tile, int lane) {
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    camk::ldmatrix_x4<true>(r, tile + lane % 16 * Tile<T>::b_stride + lane / 16 * 8);
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  } else {
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 2; ++i)
        b[half][i] = camk::to_tf32(tile[(lane % 4 + 4 * i) * Tile<T>::b_stride + half * 8 + lane / 4]);
  }
}

CAMK_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  camk::mma_f16(d, a, b);
}
CAMK_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  camk::mma_bf16(d, a, b);
}
CAMK_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  camk::mma_tf32(d, a, b);
}

template <class T, int bug>
__global__ void __launch_bounds__(kThreads)
    matmul(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ c, int64_t n, int64_t k) {
  CAMK_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t{blockIdx.y} * kRows, column = int64_t{blockIdx.x} * kColumns;
  float sums[2][4] = {};
  fetch(shared, a, b, row, column, 0, n, k);
  for (int64_t k0 = 0, step = 0; k0 < k; k0 += Tile<T>::depth, ++step) {
    const bool more = k0 + Tile<T>::depth < k;
    if (more) fetch(shared + (step + 1) % 2 * Tile<T>::stage, a, b, row, column, k0 + Tile<T>::depth, n, k);
    if (more || bug == kNoWait)
      camk::cp_async_wait<1>();
    else
      camk::cp_async_wait<0>();
    if (bug != kNoBarrier) __syncthreads();
    const T* const tile = shared + step % 2 * Tile<T>::stage;
    uint32_t a_fragment[4], b_fragment[2][2];
    camk::ldmatrix_x4(a_fragment, tile + (warp * 16 + lane % 16) * Tile<T>::a_stride + lane / 16 * (16 / sizeof(T)));
    if constexpr (sizeof(T) == 4)
      for (uint32_t& x : a_fragment) {
        float value;
        memcpy(&value, &x, 4);
        x = camk::to_tf32(value);
      }
    load_b(b_fragment, tile + kRows * Tile<T>::a_stride, lane);
    for (int half = 0; half < 2; ++half) multiply(sums[half], a_fragment, b_fragment[half], T());
    if (bug != kNoBarrier) __syncthreads();  // the next fetch overwrites this stage
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i)
      c[(row + warp * 16 + lane / 4 + i / 2 * 8) * n + column + half * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
}

template <class T, int bug = kNone>
int start(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, int missing_bytes) {
  const camk::LaunchShape shape{dim3(n / kColumns, m / kRows), dim3(kThreads), size_t(Tile<T>::bytes - missing_bytes)};
  return run(
      [&] { return camk::launch(matmul<T, bug>, shape, static_cast<const T*>(a), static_cast<const T*>(b), c, n, k); });
}

}  // namespace

// type: 0 float16, 1 bfloat16, 2 tf32. missing_bytes: how much too little dynamic shared memory is asked for.
SELFTEST selftest_matmul(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, int type, int bug,
                         int missing_bytes) {
  if (bug == kNoWait) return start<__half, kNoWait>(a, b, c, m, n, k, 0);
  if (bug == kNoBarrier) return start<__half, kNoBarrier>(a, b, c, m, n, k, 0);
  if (type == 0) return start<__half>(a, b, c, m, n, k, missing_bytes);
  if (type == 1) return start<__nv_bfloat16>(a, b, c, m, n, k, missing_bytes);
  return start<float>(a, b, c, m, n, k, missing_bytes);
}
