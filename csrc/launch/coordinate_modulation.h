// SPDX-License-Identifier: MIT
// The grids of a coordinate modulation as the operators receive them, measured for a launch.
#pragma once
#include "math/modulation.h"
#include "torch/seam.h"

namespace camk::launch {

// What follows the tensors in every schema.
struct LookupOptions {
  bool zeros, align_corners, planes;
};

struct NodeGrids {
  math::NodeGrid<double> grid;                           // the same for every layer, channel and plane
  int dims;                                              // axes of nodes
  int planes;                                            // lookups whose product is taken: 3 or 1
  int slots;                                             // coordinates of a point
  int64_t layers, channels;                              // channels: -1 where the grids have no such axis
  int64_t width() const { return 2 * layers * each(); }  // numbers of a node
  int64_t each() const { return channels < 0 ? 1 : channels; }
  int64_t corners() const { return int64_t(1) << dims; }

  // The grid with numbers of the arithmetic type S, for rows that count several times.
  template <class S>
  math::NodeGrid<S> grid_in(int64_t times = 1) const {
    math::NodeGrid<S> to{};
    for (int d = 0; d < dims; ++d) {
      const auto& axis = grid.axis[d];
      to.axis[d] = {S(axis.scale), S(axis.shift), axis.nodes, uint32_t(axis.stride * times)};
    }
    to.rows = uint32_t(grid.rows * times), to.zeros = grid.zeros;
    return to;
  }
};

// grids [layers, 2, (3,) (channels,) *nodes]; coordinate slot 0 is the last axis of nodes.
inline NodeGrids measure_grids(const Tensor& coords, const Tensor& grids, const LookupOptions& options) {
  constexpr const char* kOp = "coordinate_modulation";
  require(coords.dim() == 2 && coords.size(1) >= 1 && coords.size(1) <= math::kMaxDims, kOp,
          ": coords must have 2 dimensions, of which the second is 1 to 7");
  NodeGrids g{};
  g.planes = options.planes ? 3 : 1;
  g.slots = int(coords.size(1));
  g.dims = options.planes ? 2 : g.slots;
  const int64_t extra = grids.dim() - 2 - (options.planes ? 1 : 0) - g.dims;
  require((extra == 0 || extra == 1) && grids.numel() > 0 && grids.size(1) == 2, kOp,
          ": the grids do not fit the coordinates");
  require(!options.planes || (g.slots == 3 && grids.size(2) == 3), kOp, ": plane products have 3 planes");
  g.layers = grids.size(0);
  g.channels = extra ? grids.size(grids.dim() - g.dims - 1) : -1;
  g.grid.zeros = options.zeros;
  int64_t stride = 1;
  for (int d = 0; d < g.dims; ++d) {
    const int64_t nodes = grids.size(grids.dim() - 1 - d);
    auto& axis = g.grid.axis[d];
    axis.scale = double(options.align_corners ? nodes - 1 : nodes) / 2;
    axis.shift = options.align_corners ? 0.0 : -0.5;
    axis.nodes = uint32_t(nodes), axis.stride = uint32_t(stride);
    stride *= nodes;
    require(stride < int64_t(1) << 31, kOp, ": grids of 2^31 nodes and more run with backend='reference' only");
  }
  g.grid.rows = uint32_t(stride);
  return g;
}

}  // namespace camk::launch
