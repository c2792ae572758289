// SPDX-License-Identifier: MIT
// A warp's products of 32 rows, in shared memory, and 64 columns of weights that lie as the lanes take them: of 16 rows
// of weights ("a step"), 16 columns ("a tile") after another.
#pragma once
#include "cuda/product.cuh"

namespace camk::cuda {

inline constexpr int kStep = 16, kTileColumns = 16, kTileNumbers = kStep * kTileColumns;
inline constexpr int kWarpRows = 32, kWarpColumns = 64, kWarpTiles = kWarpColumns / kTileColumns;

// Values of a row lie as the lanes that computed them hold them, which are those that take them next: of 16 features,
// lane t of four has 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, in places 4 t to 4 t + 3.
CAMK_HD int feature_at(int place) { return place / 16 * 16 + place % 16 / 4 * 2 + place % 2 + place % 4 / 2 * 8; }
CAMK_HD int place_of(int feature) {
  return feature / 16 * 16 + feature % 8 / 2 * 4 + feature % 2 + feature % 16 / 8 * 2;
}

// Where the weight of row `place` of a step and `column` of a tile lies. bfloat16 takes 16 rows per instruction, tf32
// 8, the first two places of every four and then the others.
CAMK_HD int tile_index(int place, int column, bool bfloat16) {
  const int lane = column % 8 * 4 + place / 4, half = column / 8, j = place % 4;
  return bfloat16 ? lane * 8 + half * 4 + j : j / 2 * 128 + lane * 4 + half * 2 + j % 2;
}

struct Four {
  float v[4];
};
CAMK_DEVICE Four load_four(const float* from) {
  const float4 f = *reinterpret_cast<const float4*>(from);
  return {{f.x, f.y, f.z, f.w}};
}
CAMK_DEVICE void store_four(float* to, const Four& f) {
  *reinterpret_cast<float4*>(to) = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]);
}

// Sums of 2 x 16 rows and 4 tiles of 2 x 8 columns, as mma leaves them.
using WarpSums = float[2][2 * kWarpTiles][4];

// A float32 as the sum of two tf32, but for its last two bits; what is infinite becomes NaN.
struct Parts {
  uint32_t high, low;
  CAMK_DEVICE explicit Parts(float x) {
    constexpr uint32_t kBits = 0xffffe000u;
    memcpy(&high, &x, 4);
    high &= kBits;
    float top;
    memcpy(&top, &high, 4);
    const float rest = x - top;
    memcpy(&low, &rest, 4);
    low &= kBits;
  }
};

// Two numbers, one in each half of a register, as sums of kParts bfloat16 each, which hold all their bits; what is
// infinite becomes NaN.
struct PairParts {
  static constexpr int kParts = 3;
  uint32_t part[kParts];
  CAMK_DEVICE PairParts(float x, float y) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      part[i] = pack_bf16(x, y);
      x -= to_float(part[i] << 16), y -= to_float(part[i] & 0xffff0000u);
    }
  }

 private:
  static CAMK_DEVICE float to_float(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
  }
};

// body(tile) for those below `tiles`, of which a warp has all nearly always.
template <class Body>
CAMK_DEVICE void each_tile(int tiles, const Body& body) {
  if (tiles >= kWarpTiles) {
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) body(p);
  } else {
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      if (p >= tiles) break;
      body(p);
    }
  }
}

// The sums of tile p += 2 x 16 rows of values times 2 x 8 columns of weights.
CAMK_DEVICE void add_tile(WarpSums& sums, int p, const uint32_t (&left)[2][4], const uint32_t (&right)[2][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int m = 0; m < 2; ++m) mma_tf32(sums[m][2 * p + half], left[m], right[half]);
  }
}

// `Terms` products of tf32 make one of float32. 2: of the values' parts, for weights that are exact in tf32, as float16
// is. 3: and of the values with the weights' small part.
template <int Terms>
CAMK_DEVICE void multiply_tf32(WarpSums& sums, const float* from, int stride, const float* weights, int tiles) {
  const float* own = weights + int(threadIdx.x) % 32 * 4;
#pragma unroll
  for (int k = 0; k < 2; ++k) {  // two of the lane's four places: registers for all would cost a block its place
    uint32_t high[2][4], low[2][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float2 two = *reinterpret_cast<const float2*>(from + q * 8 * stride + 2 * k);
      const Parts first(two.x), second(two.y);
      high[q / 2][q % 2] = first.high, high[q / 2][2 + q % 2] = second.high;
      low[q / 2][q % 2] = first.low, low[q / 2][2 + q % 2] = second.low;
    }
    each_tile(tiles, [&](int p) {
      const Four four = load_four(own + p * kTileNumbers + k * 128);
      uint32_t top[2][2], rest[2][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Parts parts(four.v[j]);
        top[j / 2][j % 2] = parts.high;
        rest[j / 2][j % 2] = parts.low;
      }
      add_tile(sums, p, low, top);
      if constexpr (Terms > 2) add_tile(sums, p, high, rest);
      add_tile(sums, p, high, top);
    });
  }
}

// One product of tf32: of rounded values, with weights that were rounded when they were packed.
CAMK_DEVICE void multiply_rounded(WarpSums& sums, const float* from, int stride, const float* weights, int tiles) {
  const float* own = weights + int(threadIdx.x) % 32 * 4;
  uint32_t left[2][2][4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const Four four = load_four(from + q * 8 * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) left[j / 2][q / 2][j % 2 * 2 + q % 2] = to_tf32(four.v[j]);
  }
  each_tile(tiles, [&](int p) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 word = *reinterpret_cast<const uint4*>(own + p * kTileNumbers + k * 128);
      add_tile(sums, p, left[k], {{word.x, word.y}, {word.z, word.w}});
    }
  });
}

// sums += 32 rows of values, of which a lane has g, g + 8, g + 16, g + 24, times one step of weights. Float weights: as
// many products of tf32 as `terms` says.
CAMK_DEVICE void multiply_step(WarpSums& sums, const float* from, int stride, const float* weights, int tiles,
                               int terms) {
  if (tiles <= 0) return;
  if (terms == 1) {
    multiply_rounded(sums, from, stride, weights, tiles);
  } else if (terms == 2) {
    multiply_tf32<2>(sums, from, stride, weights, tiles);
  } else {
    multiply_tf32<3>(sums, from, stride, weights, tiles);
  }
}
CAMK_DEVICE void multiply_step(WarpSums& sums, const float* from, int stride, const uint16_t* weights, int tiles, int) {
  if (tiles <= 0) return;
  const uint16_t* own = weights + int(threadIdx.x) % 32 * 8;
  uint32_t left[PairParts::kParts][2][4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const Four four = load_four(from + q * 8 * stride);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PairParts parts(four.v[2 * i], four.v[2 * i + 1]);
#pragma unroll
      for (int part = 0; part < PairParts::kParts; ++part) left[part][q / 2][2 * i + q % 2] = parts.part[part];
    }
  }
  each_tile(tiles, [&](int p) {
    const uint4 word = *reinterpret_cast<const uint4*>(own + p * kTileNumbers);
    const uint32_t right[2][2] = {{word.x, word.y}, {word.z, word.w}};
#pragma unroll
    for (int part = PairParts::kParts - 1; part >= 0; --part) {  // the small ones first
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < 2; ++m) mma_bf16(sums[m][2 * p + half], left[part][m], right[half]);
      }
    }
  });
}

}  // namespace camk::cuda
