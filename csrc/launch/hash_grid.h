// SPDX-License-Identifier: MIT
// The geometry of a hash grid as the operators receive it (plain lists from python: GridGeometry), unpacked for a
// launch.
#pragma once
#include <vector>

#include "math/hash_grid.h"

namespace camk::launch {

inline constexpr int64_t kMaxLevelSize = int64_t(1) << 31;  // entries; an index has 32 bits

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

// Whether the lists describe a grid of so many axes: right lengths, known settings, levels one behind the other. What
// is read afterwards then lies inside a table of as many rows as the levels have together.
inline bool describes_grid(int64_t dims, const GridLists& lists) {
  if (dims < 1 || dims > math::kMaxDims || lists.layout.empty()) return false;
  const int64_t width = dims + 3, n_levels = int64_t(lists.layout.size()) / width;
  if (int64_t(lists.layout.size()) != n_levels * width || int64_t(lists.scales.size()) != n_levels * dims) return false;
  int64_t rows = 0;
  for (int64_t l = 0; l < n_levels; ++l) {
    const int64_t size = lists.layout[l * width + dims], offset = lists.layout[l * width + dims + 1];
    if (size < 1 || size > kMaxLevelSize || offset != rows) return false;
    rows += size;
  }
  return lists.outside >= 0 && lists.outside <= int64_t(math::Outside::kWrap) && lists.interpolation >= 0 &&
         lists.interpolation <= int64_t(math::Interpolation::kNearest);
}

// A grid without levels if the lists describe none.
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
  if (!describes_grid(dims, lists)) return grid;
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
