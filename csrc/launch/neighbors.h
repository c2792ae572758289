// SPDX-License-Identifier: MIT
// A search of nearest centres as the operators receive it; schema: python/camkernels/neighbors.py.
#pragma once
#include <limits>

#include "math/neighbors.h"
#include "torch/seam.h"

namespace camk::launch {

struct NearestTensors {
  const Tensor &x, &points, &rows, &starts, &cuts;
  const std::vector<int64_t>& slabs;  // of each axis
  int64_t k;

  // Whether they fit together: what is read afterwards lies inside them, if starts and rows hold what they should.
  void check(const char* op) const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    require(x.dim() == 2 && points.dim() == 2 && x.size(1) == points.size(0), op, ": x and centers must have one d");
    require(x.size(1) >= 1 && x.size(1) <= math::kMostNeighborDims, op, ": d must be from 1 to 4");
    require(x.size(0) <= kMost && points.size(1) <= kMost, op, ": too many points or centers");
    const bool number = x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double;
    require(number && points.scalar_type() == x.scalar_type(), op, ": x and centers must be float32, or float64");
    require(k >= 1 && k <= points.size(1), op, ": k must be from 1 to the number of centers");
    require(int64_t(slabs.size()) == x.size(1), op, ": slabs must have one number for each axis");
    int64_t cells = 1, all_cuts = 0;
    for (int64_t count : slabs) {
      require(count >= 1 && count <= kMost / cells, op, ": slabs out of range");
      cells *= count, all_cuts += count - 1;
    }
    check_table(rows, ScalarType::Int, points.size(1), op, "rows");
    check_table(starts, ScalarType::Int, cells + 1, op, "starts");
    check_table(cuts, ScalarType::Double, all_cuts, op, "cuts");
    check_contiguous(x, op, "x"), check_contiguous(points, op, "points");
  }

  template <class S>
  math::Cells<S> cells() const {
    math::Cells<S> cells{points.size(1), read<S>(points), read<int32_t>(rows), read<int32_t>(starts), {}};
    const double* cut = read<double>(cuts);
    for (size_t i = 0; i < slabs.size(); ++i) {
      cells.axes[i] = {int32_t(slabs[i]), cut};
      cut += slabs[i] - 1;
    }
    return cells;
  }

 private:
  static void check_table(const Tensor& t, ScalarType type, int64_t size, const char* op, const char* name) {
    require(t.scalar_type() == type && t.numel() == size, op, ": dtype or size of ", name);
    check_contiguous(t, op, name);
  }
};

// body(Tag<number type of the coordinates>)
template <class Body>
void with_coordinates(const Tensor& x, const Body& body) {
  x.scalar_type() == ScalarType::Double ? body(Tag<double>{}) : body(Tag<float>{});
}

}  // namespace camk::launch
