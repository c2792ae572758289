// SPDX-License-Identifier: MIT
// Points sorted by the cells of centres that hold them.
#pragma once
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "math/neighbors.h"

namespace camk::cpu {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The slabs of one axis, and a way to find that of a coordinate.
class Axis : public math::Slabs {
 public:
  explicit Axis(const math::Slabs& slabs) : Slabs(slabs), bins_(count + 1) {
    if (count == 1) return;
    low_ = cuts[0];
    const double extent = cuts[count - 2] - low_;
    if (extent > 0 && double(count) / extent < kInfinity) scale_ = double(count) / extent;
    for (int32_t j = 0; j < count - 1; ++j) ++bins_[bin(cuts[j]) + 1];
    std::partial_sum(bins_.begin(), bins_.end(), bins_.begin());
  }

  int32_t slab(double at) const {
    const int64_t b = bin(at);
    return bins_[b] + math::cuts_up_to(cuts + bins_[b], bins_[b + 1] - bins_[b], at);
  }

 private:
  // Equal parts of the axis: a coordinate in a lower one is less, so that only the cuts in its own need a look. The
  // first for what is no number, as infinity times a scale of 0.
  int64_t bin(double at) const {
    const double part = (at - low_) * scale_;
    return part > 0 ? int64_t(std::min(part, double(count - 1))) : 0;
  }

  double low_ = 0, scale_ = 0;
  std::vector<int32_t> bins_;  // [slabs + 1] how many cuts lie in lower bins
};

// The cell of each point, and the points in the order of their cells, a cell's in their own order.
struct Sorted {
  std::vector<int32_t> cells, points;

  template <class S>
  Sorted(const S* x, int64_t n, const std::vector<Axis>& axes) : cells(n) {
    int64_t count = 1;
    for (const Axis& axis : axes) count *= axis.count;
    const auto dims = int64_t(axes.size());
    parallel_points(n, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        int32_t cell = 0;
        for (int64_t i = 0; i < dims; ++i) cell = cell * axes[i].count + axes[i].slab(x[k * dims + i]);
        cells[k] = cell;
      }
    });
    Binned order;
    order.sort(n, count, [&](int64_t k) { return cells[k]; });
    points = std::move(order.sorted);
  }
};

}  // namespace camk::cpu
