// SPDX-License-Identifier: MIT
// Products of tiles: a block of 128 threads, or of several groups of so many, computes 64 rows and 64 columns per group
// of A B^T, in steps of kDepth columns of A and B, which lie in shared memory.
#pragma once
#include "cuda/device.cuh"
#include "cuda/storage.cuh"
#include "math/portable.h"

namespace camk::cuda {

inline constexpr int kGroupThreads = 128, kGroupColumns = 64;
inline constexpr int kMaxGroups = 2;
inline constexpr int kSlabRows = 64, kDepth = 32;
// Rows of a slab are 4 banks apart: whatever a warp reads or writes of it at once lies in different banks.
inline constexpr int kSlabStride = kDepth + 4;

// Slabs of A and B come twice, so that a warp fills one pair while another still reads the other; once where shared
// memory is short.
inline constexpr int kCopies = 2;
// Numbers in them.
CAMK_HD int slabs_size(int groups, int copies) { return copies * kSlabStride * (kSlabRows + groups * kGroupColumns); }

// Rows of shared memory.
template <class C>
struct Operand {
  const C* data;
  int64_t stride;
};

// Which index of a staged matrix runs along memory: lanes follow it.
enum class Along { kDepth, kRows };

// slab[row][k] = fetch(row, k), for a multiple of 64 rows. Several loads are under way before the first is waited for.
template <Along along, class C, class Fetch>
CAMK_DEVICE void stage(C* slab, int rows, const Fetch& fetch) {
  constexpr int kAtOnce = 8;
  for (int first = int(threadIdx.x); first < rows * kDepth; first += kAtOnce * int(blockDim.x)) {
    C held[kAtOnce];
    int place[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * int(blockDim.x);
      int row = i / kDepth, k = i % kDepth;
      if constexpr (along == Along::kRows) {  // a warp takes 8 rows and 4 columns
        const int lane = i % 32, part = i / 32;
        row = part / (kDepth / 4) * 8 + lane % 8, k = part % (kDepth / 4) * 4 + lane / 8;
      }
      place[j] = row * kSlabStride + k;
      held[j] = fetch(row, k);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) slab[place[j]] = held[j];
  }
}

// ---- The sums of a thread: 32 of its group's 64 x 64 -------------------------------------------------------

// float64, by fused multiply-adds: 8 rows and 4 columns.
struct DoubleSums {
  double sum[8][4]{};

  CAMK_DEVICE explicit DoubleSums(int) {}
  static CAMK_DEVICE int row(int i) { return int(threadIdx.x) % kGroupThreads / 16 + 8 * i; }
  static CAMK_DEVICE int column(int j) {
    return int(threadIdx.x) / kGroupThreads * kGroupColumns + int(threadIdx.x) % 16 + 16 * j;
  }
  CAMK_DEVICE void add(Operand<double> a, Operand<double> b, int) {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      double left[8], right[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i] = a.data[row(i) * a.stride + k];
#pragma unroll
      for (int j = 0; j < 4; ++j) right[j] = b.data[column(j) * b.stride + k];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fma(left[i], right[j], sum[i][j]);
      }
    }
  }
  // body(row, column, sum)
  template <class Body>
  CAMK_DEVICE void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) body(row(i), column(j), sum[i][j]);
    }
  }
};

// A float32 as the sum of two tf32, exact but for the last bit. What is not finite has no rest.
struct Split {
  uint32_t high, low;
  CAMK_DEVICE explicit Split(float x) : high(to_tf32(x)) {
    float rounded;
    memcpy(&rounded, &high, 4);
    low = to_tf32(fabsf(x) <= 3.4e38f ? x - rounded : 0.0f);
  }
};

// float32, by tensor cores: 8 products of 16 x 8. `terms`: how many products of tf32 make one of two float32. 1: of
// both rounded to tf32. 2: of the left one's parts, for a right one that is exact in tf32, as float16 and bfloat16 are.
// 3: and of the left one with the right one's small part; what is left out is below the last bit of float32.
struct TensorSums {
  float sum[8][4]{};
  int terms;

  CAMK_DEVICE explicit TensorSums(int number) : terms(number) {}
  static CAMK_DEVICE int lane() { return int(threadIdx.x) % 32; }
  static CAMK_DEVICE int first_row() { return int(threadIdx.x) % kGroupThreads / 32 * 16 + lane() / 4; }
  static CAMK_DEVICE int first_column() { return int(threadIdx.x) / kGroupThreads * kGroupColumns; }

  CAMK_DEVICE void add(Operand<float> a, Operand<float> b, int columns) {
    if (terms == 1) {
      add_terms<1>(a, b, columns);
    } else if (terms == 2) {
      add_terms<2>(a, b, columns);
    } else {
      add_terms<3>(a, b, columns);
    }
  }
  template <class Body>
  CAMK_DEVICE void each(const Body& body) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        body(first_row() + i / 2 * 8, first_column() + n * 8 + lane() % 4 * 2 + i % 2, sum[n][i]);
      }
    }
  }

 private:
  // Columns of a slab may come in any order, if it is that of A and B: a thread takes 8 that lie together, so that one
  // load brings what it needs for two steps.
  template <int Terms>
  CAMK_DEVICE void add_terms(Operand<float> a, Operand<float> b, int columns) {
    const int tiles = (columns - first_column() + 7) / 8;
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      const float* from = a.data + first_row() * a.stride + lane() % 4 * 8 + k;
      const float4 top = *reinterpret_cast<const float4*>(from),
                   bottom = *reinterpret_cast<const float4*>(from + 8 * a.stride);
      const Split left[2][4] = {{Split(top.x), Split(bottom.x), Split(top.y), Split(bottom.y)},
                                {Split(top.z), Split(bottom.z), Split(top.w), Split(bottom.w)}};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (n >= tiles) break;
        const float4 right = *reinterpret_cast<const float4*>(
            b.data + (first_column() + n * 8 + lane() / 4) * b.stride + lane() % 4 * 8 + k);
        step<Terms>(sum[n], left[0], Split(right.x), Split(right.y));
        step<Terms>(sum[n], left[1], Split(right.z), Split(right.w));
      }
    }
  }
  template <int Terms>
  static CAMK_DEVICE void step(float (&d)[4], const Split (&a)[4], Split b0, Split b1) {
    const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    if constexpr (Terms > 1) mma_tf32(d, {a[0].low, a[1].low, a[2].low, a[3].low}, {b0.high, b1.high});
    if constexpr (Terms > 2) mma_tf32(d, high, {b0.low, b1.low});
    mma_tf32(d, high, {b0.high, b1.high});
  }
};

template <class C>
using SumsOf = std::conditional_t<sizeof(C) == 8, DoubleSums, TensorSums>;

// ---- A block's products ------------------------------------------------------------------------------------

template <class C>
class Slabs {
 public:
  CAMK_DEVICE Slabs(C* memory, int copies) : memory_(memory), copies_(copies) {}
  static CAMK_DEVICE int columns() { return int(blockDim.x) / kGroupThreads * kGroupColumns; }

  // sums += A B^T for the first `columns` rows of B, over `depth` columns of both. a(slab, k) and b(slab, k) give the
  // operands of the kDepth columns from k on, in the slab that they may fill; those beyond `depth` are zeros in both.
  template <class A, class B>
  CAMK_DEVICE void add(SumsOf<C>& sums, int columns, int depth, const A& a, const B& b) {
    for (int k = 0; k < depth; k += kDepth) {
      C* slab = memory_ + slabs_size(int(blockDim.x) / kGroupThreads, turn_);
      const Operand<C> left = a(slab, k), right = b(slab + kSlabRows * kSlabStride, k);
      __syncthreads();
      sums.add(left, right, columns);
      turn_ = (turn_ + 1) % copies_;
      if (copies_ == 1) __syncthreads();
    }
  }

 private:
  C* memory_;
  int copies_, turn_ = 0;
};

}  // namespace camk::cuda
