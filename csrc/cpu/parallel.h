// SPDX-License-Identifier: MIT
// Work over PyTorch's own threads: ranges of points, and tasks handed out one by one.
#pragma once
#include <algorithm>
#include <atomic>

#include "torch/seam.h"

namespace camk::cpu {

// Ranges start at multiples of this, so that SIMD blocks never straddle two threads.
inline constexpr int64_t kPointBlock = 16;
// Fewer blocks than this are not worth waking a thread for.
inline constexpr int64_t kGrainBlocks = 32;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class Body>
void parallel_points(int64_t n, const Body& body) {
  torch::stable::parallel_for(0, round_up(n, kPointBlock) / kPointBlock, kGrainBlocks, [&](int64_t begin, int64_t end) {
    body(begin * kPointBlock, std::min(n, end * kPointBlock));
  });
}

// body(task) for every task, in an order that depends on timing: tasks must not share what they write.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task);
    }
  });
}

}  // namespace camk::cpu
