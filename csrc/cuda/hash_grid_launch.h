// SPDX-License-Identifier: MIT
// Choices that the hash-grid launchers share: which kernel, how many levels a thread takes.
#pragma once
#include <algorithm>

#include "cuda/hash_grid.cuh"

namespace camk::cuda {

// Up to `most` levels of a point for one thread, fewer where that would leave the device without work: below about half
// of the threads it can hold, latency decides, and threads hide it better than the cache.
inline int levels_per_thread(int64_t points, int n_levels, int most) {
  constexpr int kThreadsPerMultiprocessor = 1024;
  const int64_t wanted = int64_t(kThreadsPerMultiprocessor) * device_number(cudaDevAttrMultiProcessorCount);
  int levels = std::clamp(most, 1, n_levels);
  while (levels > 1 && points * divide_up(n_levels, levels) < wanted) levels /= 2;
  return levels;
}

// body.operator()<T, D, F>() of a regular job: T the storage (only float, where the kernel asks for it at run time).
template <bool Typed, class Body>
cudaError_t with_regular(const Job<float>& job, Body body) {
  const auto with_features = [&]<class T, int D>() {
    switch (job.features) {
      case 1:
        return body.template operator()<T, D, 1>();
      case 2:
        return body.template operator()<T, D, 2>();
      default:
        return body.template operator()<T, D, 4>();
    }
  };
  const auto with_axes = [&]<class T>() {
    switch (job.dims) {
      case 2:
        return with_features.template operator()<T, 2>();
      case 3:
        return with_features.template operator()<T, 3>();
      default:
        return with_features.template operator()<T, 4>();
    }
  };
  if constexpr (Typed) {
    if (job.storage != Storage::kFloat) return with_axes.template operator()<Short>();
  }
  return with_axes.template operator()<float>();
}

}  // namespace camk::cuda
