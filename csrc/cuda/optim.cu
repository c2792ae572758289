// SPDX-License-Identifier: MIT
// SparseRowAdam on CUDA. A team of lanes takes a row: the first power of 2 that holds it, up to a warp.
#include "cuda/optim.h"

#include <algorithm>

#include "cuda/storage.cuh"

namespace camk::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class C, class T>
CAMK_DEVICE void step_number(const AdamJob<C>& job, int64_t at, C g, const Vec<C, 2>& by) {
  T* value = static_cast<T*>(job.values) + at;
  const auto after =
      math::adam_step<C>({C(to_number(*value, job.storage)), job.first[at], job.second[at]}, g, by, job.rates);
  from_number(*value, after.value, job.storage);
  job.first[at] = after.first, job.second[at] = after.second;
}

// T: how values and gradient are stored. Lanes of other rows, or of none, take part in the votes of the warp.
template <class C, class T>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_row_adam(const __grid_constant__ AdamJob<C> job, const __grid_constant__ int team) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / team;
  const int lane = threadIdx.x % team, first_of_team = threadIdx.x % kWarp / team * team;
  const int64_t row = i >= job.count ? -1 : job.listed ? job.listed[i] : i;
  const bool exists = row >= 0 && row < job.rows;
  const T* gradient = static_cast<const T*>(job.gradient) + i * job.width;
  bool touched = false;
  for (int64_t k = lane; exists && k < job.width; k += team) {
    touched |= C(to_number(load_readonly(gradient + k), job.storage)) != C(0);
  }
  const unsigned lanes_of_team = team == kWarp ? kAllLanes : ((1u << team) - 1) << first_of_team;
  const bool moves = (__ballot_sync(kAllLanes, touched) & lanes_of_team) != 0;
  const int32_t before = moves && lane == 0 ? job.steps[row] : 0;
  const int32_t step = __shfl_sync(kAllLanes, before, 0, team) + 1;
  if (!moves) return;
  if (lane == 0) job.steps[row] = step;
  const C* correction = job.corrections + 2 * (step < job.last_correction ? step : job.last_correction);
  const Vec<C, 2> by{{load_readonly(correction), load_readonly(correction + 1)}};
  for (int64_t k = lane; k < job.width; k += team) {
    step_number<C, T>(job, row * job.width + k, C(to_number(load_readonly(gradient + k), job.storage)), by);
  }
}

template <class C, class T>
cudaError_t launch_stored(const AdamJob<C>& job, cudaStream_t stream) {
  int team = 1;
  while (team < kWarp && team < job.width) team *= 2;
  const auto blocks = unsigned(divide_up(job.count, kThreads / team));
  return launch(sparse_row_adam<C, T>, {blocks, kThreads, 0, stream}, job, team);
}

}  // namespace

template <class C>
cudaError_t launch_sparse_row_adam(const AdamJob<C>& job, cudaStream_t stream) {
  if constexpr (sizeof(C) == sizeof(double)) {
    return launch_stored<C, double>(job, stream);
  } else if (job.storage == Storage::kFloat) {
    return launch_stored<C, float>(job, stream);
  } else {
    return launch_stored<C, Short>(job, stream);
  }
}

template cudaError_t launch_sparse_row_adam(const AdamJob<float>&, cudaStream_t);
template cudaError_t launch_sparse_row_adam(const AdamJob<double>&, cudaStream_t);

}  // namespace camk::cuda
