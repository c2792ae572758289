// SPDX-License-Identifier: MIT
// What the kernels of radial_basis are told, and the launchers. No torch and no CUDA syntax: the glue to PyTorch
// includes it too.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/storage.h"
#include "cuda/sums.h"
#include "math/radial_basis.h"

namespace camk::cuda {

// Numbers, and the cotangents of their gradients for the second order; null: none.
template <class T>
struct RadialOperand {
  const T *value, *along;
};

// A gradient in what the kernels own, [count, *], added to; sums: null where it is not wanted.
template <class S>
struct RadialSums {
  S* sums;
  int64_t* fixed;     // the same in fixed point; zero at first
  uint64_t* largest;  // bits of the largest finite float64 that is added; zero at first
};

// One launch. S: arithmetic. Null pointers stand for what is not there.
template <class S>
struct RadialJob {
  math::RadialKind kind;
  math::RadialShape shape;
  bool normalize, detach;
  S eps;
  int dims, shape_width;
  int lane_bits;  // 2^lane_bits threads take a point, up to 32; set by the launcher
  int64_t points, count, per_point, width, keep;
  Storage storage;                             // of features, g and y
  bool words;                                  // the rows of features, g, y and of their sums are whole aligned packs
  RadialOperand<S> x, centers, shapes, phase;  // [points, dims], [count, dims], [count, shape_width], [width - keep]
  RadialOperand<void> features;                // [count, width]
  const S* frequencies;                        // [width - keep]
  const int32_t* neighbors;                    // [points, per_point]; null: all kernels
  const void* g;                               // [points, width] gradient of the value
  void* y;                                     // [points, width] value, or gradient in g
  S* gx;                                       // [points, dims] gradient in x
  RadialSums<S> of_centers, of_shapes, of_features;
  S* of_phase;  // [kPhaseBlocks, width] parts of the gradient in the phase
  // whether gradients in the weights are wanted
  CAMK_HD bool weighs() const { return gx || of_centers.sums || of_shapes.sums; }
  CAMK_HD bool adds() const { return of_centers.sums || of_shapes.sums || of_features.sums; }
  // what one number of those gradients is a sum of, at most
  CAMK_HD int64_t terms() const { return neighbors ? points * per_point : points; }
};

// Blocks that each leave a part of the gradient in the phase, at most.
inline constexpr int64_t kPhaseBlocks = 1024;

// y: the value, or with `second` the gradient in g.
template <class S>
cudaError_t launch_radial_value(RadialJob<S> job, bool second, cudaStream_t stream);

// gx, of_centers, of_shapes, of_features: gradients of <g, value>, or with `second` of <cotangents, those gradients>.
template <class S>
cudaError_t launch_radial_gradients(RadialJob<S> job, Sums way, bool second, cudaStream_t stream);

// The same for the phase: of_phase, then added up in order to gradient [width - keep].
template <class S>
cudaError_t launch_radial_phase(RadialJob<S> job, S* gradient, bool second, cudaStream_t stream);

}  // namespace camk::cuda
