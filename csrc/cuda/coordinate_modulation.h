// SPDX-License-Identifier: MIT
// What the kernels of coordinate_modulation are told, and the launchers. No torch and no CUDA syntax: the glue to
// PyTorch includes it too.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/storage.h"
#include "cuda/sums.h"
#include "math/modulation.h"

namespace camk::cuda {

// Packed rows hold all numbers of a node side by side, in packs.
// Grids [layers, 2, (3,) (channels,) *nodes] and their packed rows [planes, nodes + 1, pitch]; the last row of a plane
// and the numbers from `width` to `pitch` are zero.
struct RowLayout {
  int64_t nodes;
  uint32_t width, pitch;  // numbers of a node, and rounded up to whole words
  uint32_t planes, each;  // planes of a layer's gamma or beta, channels of a plane
  int64_t numbers() const { return planes * (nodes + 1) * pitch; }
};

// One launch. S: arithmetic, and packed rows. Null pointers stand for what is not there.
template <class S>
struct LookupJob {
  math::NodeGrid<S> grid;
  RowLayout layout;
  int dims, slots;  // axes of nodes, coordinates of a point
  int lane_bits;    // 2^lane_bits threads take a point, up to 32; set by the launcher
  int64_t points;
  Storage storage;    // of g and y
  bool words;         // the rows of g and y are whole aligned words; set by the launcher
  const S* coords;    // [points, slots]
  const S* rows;      // packed grids
  const void* g;      // [points, width] gradient of the value
  const S* v;         // [points, slots] cotangent of the gradient in coords
  const S* tangents;  // packed cotangent of the gradient in the grids
  void* y;            // [points, width] value, or gradient in g
  S* gu;              // [points, slots] gradient in coords
  S* sums;            // packed gradient in the grids; zero at first
  int64_t* fixed;     // the same in fixed point; zero at first
  uint64_t* largest;  // bits of the largest finite float64 that is added to sums; zero at first
};

// Grids to packed rows, and back. S: float or double.
template <class S>
cudaError_t launch_pack(const RowLayout& layout, const void* grids, Storage storage, S* rows, cudaStream_t stream);
template <class S>
cudaError_t launch_unpack(const RowLayout& layout, const S* rows, void* grids, Storage storage, cudaStream_t stream);

// y
template <class S>
cudaError_t launch_lookup(LookupJob<S> job, cudaStream_t stream);

// gu and sums: gradients of <g, value>.
template <class S>
cudaError_t launch_lookup_backward(LookupJob<S> job, Sums way, cudaStream_t stream);

// y, gu and sums: gradients of <v, gu> + <tangents, gradient in the grids>.
template <class S>
cudaError_t launch_lookup_second_order(LookupJob<S> job, Sums way, cudaStream_t stream);

}  // namespace camk::cuda
