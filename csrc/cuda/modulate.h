// SPDX-License-Identifier: MIT
// What the kernels of modulate are told, and their launchers. No torch and no CUDA syntax: the glue to PyTorch includes
// it too.
#pragma once
#include "cuda/storage.h"
#include "launch/group_pieces.h"

namespace camk::cuda {

// A scale or shift [items, rows or 1, width or 1]. Null pointers stand for what is not there.
template <class C>
struct SharedItems {
  int64_t rows, width, share;
  const C *values, *along;  // along: the cotangent of its gradient
  C *gradient, *edges;
  CAMK_HD int64_t numbers() const { return rows * width; }
};

// h [groups, rows, width]; y: the value, or the gradient in g for second derivatives.
template <class C>
struct ModulateJob {
  GroupPieces pieces;
  int64_t rows, width;
  Storage storage;  // of h, y, g and what belongs to them
  int activation;
  bool norm, frequency_per_group;
  C omega, eps;
  const C* frequencies;
  int64_t frequency_count;
  const void *h, *g, *h_along;
  void *y, *gh;
  SharedItems<C> scale, shift;
  int64_t numbers() const { return rows * width; }
};

// The most pieces that are worked on at the same time.
template <class C>
int64_t pieces_held(const ModulateJob<C>& job);

template <class C>
cudaError_t launch_modulate_value(const ModulateJob<C>& job, cudaStream_t stream);

// Gradients in h, scale and shift, those that have a place; second: of <cotangents, gradients>.
template <class C>
cudaError_t launch_modulate_gradients(const ModulateJob<C>& job, bool second, cudaStream_t stream);

}  // namespace camk::cuda
