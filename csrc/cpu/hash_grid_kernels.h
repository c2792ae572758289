// SPDX-License-Identifier: MIT
// What the loops of hash_grid_loops.cpp work on: one level and F of its features, over points. Coordinates and
// gradients come channel-major: value k of point i at p[k * pitch + i].
#pragma once
#include "cpu/storage.h"
#include "launch/hash_grid.h"

namespace camk::cpu {

// What is larger does not stay in a core's second-level cache.
inline constexpr int64_t kCacheBytes = 1 << 20;

// S: coordinate arithmetic (float, double). T: table storage. Unused pointers are null.
template <class S, class T>
struct Piece {
  math::Level level;
  int dims;
  math::Interpolation interpolation;
  int64_t begin, end, pitch;
  const S* x;                // [D] coordinates
  int64_t features;          // row stride of table and sums
  bool beyond_cache;         // whether many rows are not in the second-level cache
  const T* table = nullptr;  // rows of this level, at the first of the F features
  const S* g = nullptr;      // [F] gradient of the value
  const S* gj = nullptr;     // [F * D] gradient of the Jacobian
  const S* v = nullptr;      // [D] cotangent of the coordinate gradient
  S* y = nullptr;            // [F] value
  S* j = nullptr;            // [F * D] Jacobian
  S* gx = nullptr;           // [D] coordinate gradient, added to
};

// The same towards the table gradient, kept in A.
template <class S, class A>
struct ScatterPiece : Piece<S, A> {
  A* sums = nullptr;              // rows of this level
  uint32_t first = 0, count = 0;  // the entries that this thread owns
};

template <class S, class T>
struct Kernels {
  using Read = void (*)(Piece<S, T>);
  using Scatter = void (*)(ScatterPiece<S, accumulator_of<T>>);
  int features;  // F
  Read value, jacobian, backward_x, jacobian_backward_x, along, along_backward_x;
  Scatter backward_table, jacobian_backward_table, along_backward_table;
};

// The loops for as many of the remaining features, the whole row or the rest of it, as they take at once. Instantiated
// in hash_grid_loops.cpp.
template <class S, class T>
Kernels<S, T> kernels_for(int dims, bool nearest, int features, bool whole);

}  // namespace camk::cpu
