// SPDX-License-Identifier: MIT
// From sums over points to gradients.
#include "cuda/sums.cuh"

#include "cuda/storage.cuh"
#include "cuda/sums.h"

namespace camk::cuda {
namespace {

constexpr int kThreads = 128;

LaunchShape one_each(int64_t count, cudaStream_t stream) {
  return {dim3(unsigned(divide_up(count, kThreads))), kThreads, 0, stream};
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_fixed(const int64_t* fixed, const uint64_t* largest, A* sums, int64_t count, int64_t terms) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  sums[i] += A(ldexp(double(fixed[i]), -fixed_exponent(*largest, terms)));
}

template <class A>
__global__ void __launch_bounds__(kThreads) round_sums(const A* sums, void* to, Storage kind, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) store_number<A>(to, kind, i, sums[i]);
}

}  // namespace

cudaError_t launch_finish_fixed(const int64_t* fixed, const uint64_t* largest, void* sums, Storage kind, int64_t count,
                                int64_t terms, cudaStream_t stream) {
  if (kind == Storage::kDouble) {
    return launch(finish_fixed<double>, one_each(count, stream), fixed, largest, static_cast<double*>(sums), count,
                  terms);
  }
  return launch(finish_fixed<float>, one_each(count, stream), fixed, largest, static_cast<float*>(sums), count, terms);
}

template <class A>
cudaError_t launch_round(const A* sums, void* to, Storage kind, int64_t count, cudaStream_t stream) {
  return launch(round_sums<A>, one_each(count, stream), sums, to, kind, count);
}

template cudaError_t launch_round(const float*, void*, Storage, int64_t, cudaStream_t);
template cudaError_t launch_round(const double*, void*, Storage, int64_t, cudaStream_t);

}  // namespace camk::cuda
