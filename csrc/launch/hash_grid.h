// SPDX-License-Identifier: MIT
// The geometry of a hash grid as the operators receive it (plain lists from python: GridGeometry), unpacked for a
// launch.
#pragma once
#include <vector>

#include "math/hash_grid.h"

namespace camk::launch {

struct Grid {
  int dims, features, n_levels;
  int active_levels;  // the levels beyond are not evaluated: value and gradient 0
  math::Interpolation interpolation;
  math::Outside outside;
  std::vector<math::Level> levels;
  std::vector<int64_t> offsets;  // first entry of each level

  bool nearest() const { return interpolation == math::Interpolation::kNearest; }
  int64_t channels() const { return int64_t(n_levels) * features; }
};

// What follows the tensors in every hash-grid schema. layout holds, per level: stride of every axis, size, offset,
// hashed.
struct GridLists {
  const std::vector<double>& scales;
  double shift;
  const std::vector<int64_t>& layout;
  bool ceil_corner;
  int64_t outside, interpolation, active_levels;
};

inline Grid unpack_grid(int64_t dims, int64_t features, const GridLists& lists) {
  const int64_t width = dims + 3, n_levels = int64_t(lists.layout.size()) / width;
  Grid grid{int(dims),
            int(features),
            int(n_levels),
            int(lists.active_levels),
            math::Interpolation(lists.interpolation),
            math::Outside(lists.outside),
            {},
            {}};
  for (int64_t l = 0; l < n_levels; ++l) {
    const int64_t* record = lists.layout.data() + l * width;
    math::Level level{};
    for (int64_t d = 0; d < dims; ++d) {
      level.scale[d] = lists.scales[l * dims + d];
      level.stride[d] = uint32_t(record[d]);
    }
    level.shift = lists.shift;
    level.size = uint32_t(record[dims]);
    level.hashed = record[dims + 2] != 0;
    level.ceil_corner = lists.ceil_corner;
    grid.levels.push_back(level);
    grid.offsets.push_back(record[dims + 1]);
  }
  return grid;
}

}  // namespace camk::launch
