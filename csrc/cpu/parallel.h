// SPDX-License-Identifier: MIT
// Work over PyTorch's own threads: ranges of points, and tasks handed out one by one.
#pragma once
#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

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

// Numbers from 0 to count - 1 in the order of their bins, those of a bin in their own order; where each bin begins, and
// the end. What has bin(i) < 0 is left out.
struct Binned {
  std::vector<int32_t> sorted, first;

  template <class Bin>
  void sort(int64_t count, int64_t bins, const Bin& bin) {
    constexpr int64_t kLeast = 4;  // numbers of a bin, for which it is worth to be counted by a thread
    const int64_t ranges = std::clamp<int64_t>(count / (kLeast * bins), 1, torch::stable::get_num_threads());
    const int64_t each = (count + ranges - 1) / ranges;
    std::vector<int32_t> next((bins + 1) * ranges, 0);
    const auto each_number = [&](const auto& body) {
      parallel_tasks(ranges, [&](int64_t range) {
        for (int64_t i = range * each; i < std::min(count, (range + 1) * each); ++i) {
          const int64_t b = bin(i);
          if (b >= 0) body(next[b * ranges + range], i);
        }
      });
    };
    each_number([](int32_t& counted, int64_t) { ++counted; });
    std::exclusive_scan(next.begin(), next.end(), next.begin(), 0);
    first.resize(bins + 1);
    for (int64_t b = 0; b <= bins; ++b) first[b] = next[b * ranges];
    sorted.resize(count);
    each_number([&](int32_t& at, int64_t i) { sorted[at++] = int32_t(i); });
  }
};

}  // namespace camk::cpu
