// SPDX-License-Identifier: MIT
// What the hash-grid kernels share: a thread's point and levels, rows of a table in and out of registers, and how a
// thread adds to the table gradient. Formulas are csrc/math's.
#pragma once
#include "cuda/device.cuh"
#include "cuda/hash_grid.h"
#include "cuda/storage.cuh"

namespace camk::cuda {

inline constexpr int kThreads = 128;
// Said aloud, one block keeps the assembler from spilling a register or two for a higher occupancy, and leaves it
// registers for loads in flight.
inline constexpr int kMinBlocks = 1;
inline constexpr int kSectorBytes = 32;  // what memory moves at once

template <int D, class Body>
CAMK_DEVICE void each_axis(int dims, Body body) {
  if constexpr (D > 0) {
    unroll<D>(body);
  } else {
    for (int d = 0; d < dims; ++d) body(d);
  }
}

// ---- A point ----------------------------------------------------------------------------------------------

template <class S, int D>
struct Point {
  static constexpr int kAxes = D > 0 ? D : math::kMaxDims;
  Vec<S, kAxes> x;      // safe to compute with
  unsigned clamped;     // bit d: axis d has derivative 0
  bool zeroed, broken;  // value 0; NaN
  int levels;           // how many levels of this launch are evaluated

  CAMK_DEVICE bool dead() const { return zeroed || broken; }
  // What a number of this point becomes that belongs to one axis (-1: to none).
  CAMK_DEVICE S mend(S number, int axis) const {
    if (broken) return S(NAN);
    return zeroed || (axis >= 0 && (clamped >> axis & 1)) ? S(0) : number;
  }
};

template <int D, class S>
CAMK_DEVICE Point<S, D> settle_point(const Job<S>& job, int64_t i) {
  Point<S, D> point;
  point.clamped = 0;
  point.zeroed = point.broken = false;
  each_axis<D>(job.dims, [&](int d) {
    math::Status status;
    point.x[d] = math::settle(load_readonly(job.x + i * job.dims + d), job.outside, status);
    if (status == math::kClamped) point.clamped |= 1u << d;
    point.zeroed |= status == math::kZeroed;
    point.broken |= status == math::kNotFinite;
  });
  const int levels = job.counts ? min(max(load_readonly(job.counts + i), 0), job.active_levels) : job.active_levels;
  point.levels = min(levels - job.first_level, job.n_levels);
  return point;
}

// Corners are written out up to three axes, so that the loads of a point are under way together; 16 corners are a loop.
template <int D>
using Corners = math::Stencil<D, float, false, (D < 4)>;

// A record of this launch as the formulas take it.
template <int D, class S>
CAMK_DEVICE math::Level level_of(const JobLevel<S>& record, int dims) {
  math::Level level;
  each_axis<D>(dims, [&](int d) {
    level.scale[d] = double(record.scale[d]);
    level.stride[d] = record.stride[d];
  });
  level.shift = double(record.shift);
  level.size = record.size;
  level.hashed = record.hashed;
  level.ceil_corner = record.ceil_corner;
  return level;
}

// ---- Rows -------------------------------------------------------------------------------------------------

// Number by number, so that nothing is asked of the alignment.
template <int F, class C>
CAMK_DEVICE Vec<C, F> load_any(const void* base, Storage kind, int64_t offset) {
  Vec<C, F> row;
  with_storage(kind, [&]<class T>(T*) {
    const T* from = static_cast<const T*>(base) + offset;
#pragma unroll
    for (int f = 0; f < F; ++f) row[f] = C(to_number(load_readonly(from + f), kind));
  });
  return row;
}

template <int F, class C>
CAMK_DEVICE void store_any(void* base, Storage kind, int64_t offset, const Vec<C, F>& row) {
  with_storage(kind, [&]<class T>(T*) {
    T* to = static_cast<T*>(base) + offset;
#pragma unroll
    for (int f = 0; f < F; ++f) {
      T number;
      from_number(number, row[f], kind);
      store_streaming(to + f, number);
    }
  });
}

// Whole aligned words of float32 or less; the storage is asked for once per row, not per corner.
template <int F, class C>
CAMK_DEVICE Vec<C, F> load_aligned(const void* base, Storage kind, int64_t offset) {
  if (kind == Storage::kFloat) return load_row<F, C>(static_cast<const float*>(base) + offset, kind);
  return load_row<F, C>(static_cast<const Short*>(base) + offset, kind);
}

// ---- Reading a level --------------------------------------------------------------------------------------

// Row i of a level, of which F of `stride` features are taken.
template <class T, int F>
struct FetchRows {
  const T* rows;
  int64_t stride;
  Storage kind;
  CAMK_DEVICE Vec<float, F> operator()(uint32_t i) const {
    return load_row<F, float>(rows + int64_t(i) * stride, kind);
  }
};

// The same for one or two features and no more, where two rows make a word of at most 16 bytes. Corners come in pairs
// that differ along the first axis; where those are the two rows of an aligned pair, which is half of the time, one
// load brings both. The second load depends on addresses alone, so that all loads of a point are under way before the
// first is used.
template <class T, int F>
struct FetchPairs {
  const T* rows;
  int64_t stride;
  Storage kind;
  int calls = 0;
  uint32_t first = 0;
  Vec<float, 2 * F> pair{};

  CAMK_DEVICE Vec<float, F> half_of_pair(uint32_t i) const {
    Vec<float, F> row;
#pragma unroll
    for (int f = 0; f < F; ++f) row[f] = i & 1 ? pair[F + f] : pair[f];
    return row;
  }
  CAMK_DEVICE Vec<float, F> operator()(uint32_t i) {
    if (calls++ % 2 == 0) {
      first = i;
      pair = load_row<2 * F, float>(rows + int64_t(i & ~1u) * F, kind);
      return half_of_pair(i);
    }
    const bool beside = (i ^ first) == 1;
    Vec<float, F> alone{};
    if (!beside) alone = load_row<F, float>(rows + int64_t(i) * F, kind);
    const Vec<float, F> paired = half_of_pair(i);
    Vec<float, F> row;
#pragma unroll
    for (int f = 0; f < F; ++f) row[f] = beside ? paired[f] : alone[f];
    return row;
  }
};

template <class T, int F>
using Fetch = std::conditional_t<F <= 2, FetchPairs<T, F>, FetchRows<T, F>>;

// Any storage, any stride.
template <int F, class C>
struct FetchAny {
  const void* base;
  Storage kind;
  int64_t first, stride;
  CAMK_DEVICE Vec<C, F> operator()(uint32_t i) const { return load_any<F, C>(base, kind, first + int64_t(i) * stride); }
};

// ---- Adding to a level ------------------------------------------------------------------------------------

// float32 sums in global memory, as wide at once as the architecture allows.
template <int F>
struct AddRows {
  float* rows;
  int64_t stride;
  CAMK_DEVICE void operator()(uint32_t i, const Vec<float, F>& row) const {
    reduce_add_n<F>(rows + int64_t(i) * stride, row.v);
  }
};

// The same for few features: the corners of an aligned pair are added together.
template <int F>
struct AddPairs {
  float* rows;
  int64_t stride;
  int calls = 0;
  uint32_t first = 0;
  Vec<float, F> held{};

  CAMK_DEVICE void operator()(uint32_t i, const Vec<float, F>& row) {
    if (calls++ % 2 == 0) {
      first = i;
      held = row;
    } else if ((i ^ first) == 1) {
      Vec<float, 2 * F> pair;
#pragma unroll
      for (int f = 0; f < F; ++f) {
        pair[f] = i & 1 ? held[f] : row[f];
        pair[F + f] = i & 1 ? row[f] : held[f];
      }
      reduce_add_n<2 * F>(rows + int64_t(i & ~1u) * F, pair.v);
    } else {
      reduce_add_n<F>(rows + int64_t(first) * F, held.v);
      reduce_add_n<F>(rows + int64_t(i) * F, row.v);
    }
  }
};

template <int F>
using Add = std::conditional_t<F <= 2, AddPairs<F>, AddRows<F>>;

// float32 sums of this block.
template <int F>
struct AddShared {
  float* rows;
  CAMK_DEVICE void operator()(uint32_t i, const Vec<float, F>& row) const {
#pragma unroll
    for (int f = 0; f < F; ++f) shared_add(rows + i * F + f, row[f]);
  }
};

}  // namespace camk::cuda
