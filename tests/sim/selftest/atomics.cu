// SPDX-License-Identifier: MIT
// Sums by atomics: a histogram through shared memory, and every reduction of device.cuh into one table.
#include "interface.h"

namespace {

constexpr int kThreads = 96, kBins = 37;

template <class T>
__global__ void histogram(const int* __restrict__ keys, T* __restrict__ bins, int64_t n) {
  __shared__ T local[kBins];
  for (int i = threadIdx.x; i < kBins; i += kThreads) local[i] = T(0);
  __syncthreads();
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += int64_t{gridDim.x} * kThreads)
    camk::shared_add(&local[keys[i]], T(1));
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) atomicAdd(bins + i, local[i]);
}

// Row keys[i] of `table` [kBins, N] grows by row i of `values` [n, N]; `shift` floats break the alignment.
template <int N>
__global__ void scatter(const int* __restrict__ keys, const float* __restrict__ values, float* table, int64_t n,
                        int shift) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  camk::reduce_add_n<N>(table + shift + int64_t{keys[i]} * N, values + i * N);
}

template <class Pair>
__global__ void scatter_pairs(const int* __restrict__ keys, const float2* __restrict__ values, Pair* table, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const float2 v = camk::load_readonly(values + i);
  camk::reduce_add(table + keys[i], Pair(v.x, v.y));
}

__global__ void scatter_double(const int* __restrict__ keys, const double* __restrict__ values, double* table,
                               int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) camk::reduce_add(table + keys[i], camk::load_streaming(values + i));
}

// Integer maximum, minimum, exchange and a counting loop of compare-and-swap, on one word each.
__global__ void words(unsigned* out) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  atomicMax(out, i);
  atomicMin(out + 1, i);
  atomicOr(out + 2, 1u << i % 32);
  unsigned seen = out[3];
  for (unsigned before = seen + 1; before != seen;) {
    before = seen;
    seen = atomicCAS(out + 3, before, before + 1);
  }
}

camk::LaunchShape one_thread_each(int64_t n) {
  return {dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads)), dim3(kThreads)};
}

}  // namespace

// type: 0 int, 1 unsigned, 2 64-bit, 3 float, 4 double.
SELFTEST selftest_histogram(const int* keys, void* bins, int64_t n, int type) {
  const camk::LaunchShape shape{dim3(3), dim3(kThreads)};
  return run([&] {
    if (type == 0) return camk::launch(histogram<int>, shape, keys, static_cast<int*>(bins), n);
    if (type == 1) return camk::launch(histogram<unsigned>, shape, keys, static_cast<unsigned*>(bins), n);
    if (type == 2)
      return camk::launch(histogram<unsigned long long>, shape, keys, static_cast<unsigned long long*>(bins), n);
    if (type == 3) return camk::launch(histogram<float>, shape, keys, static_cast<float*>(bins), n);
    return camk::launch(histogram<double>, shape, keys, static_cast<double*>(bins), n);
  });
}

SELFTEST selftest_scatter(const int* keys, const float* values, float* table, int64_t n, int features, int shift) {
  return run([&] {
    const auto kernel = features == 1   ? scatter<1>
                        : features == 2 ? scatter<2>
                        : features == 4 ? scatter<4>
                                        : scatter<8>;
    return camk::launch(kernel, one_thread_each(n), keys, values, table, n, shift);
  });
}

// type: 0 half2, 1 bfloat162, 2 double.
SELFTEST selftest_scatter_other(const int* keys, const void* values, void* table, int64_t n, int type) {
  const camk::LaunchShape shape = one_thread_each(n);
  const auto* pairs = static_cast<const float2*>(values);
  return run([&] {
    if (type == 0) return camk::launch(scatter_pairs<__half2>, shape, keys, pairs, static_cast<__half2*>(table), n);
    if (type == 1)
      return camk::launch(scatter_pairs<__nv_bfloat162>, shape, keys, pairs, static_cast<__nv_bfloat162*>(table), n);
    return camk::launch(scatter_double, shape, keys, static_cast<const double*>(values), static_cast<double*>(table),
                        n);
  });
}

SELFTEST selftest_words(unsigned* out, int blocks) {
  return run([&] { return camk::launch(words, {dim3(blocks), dim3(kThreads)}, out); });
}
