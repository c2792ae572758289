// SPDX-License-Identifier: MIT
// Gradients of the modulated MLP in float32 with layers of up to 256 columns: a block computes a tile's values anew and
// goes back through the layers; then sums over points, of what it left in the rows, make the gradients of the weights.
#include <algorithm>

#include "cuda/modulated_mlp_fused.cuh"
#include "cuda/modulated_mlp_fused_launch.h"

namespace camk::cuda {
namespace {

template <int Across, class W>
__global__ void __launch_bounds__(Block<Across>::kThreads, Block<Across>::kGradients)
    fused_gradients(const __grid_constant__ NetworkJob<float> job) {
  using B = Block<Across>;
  CAMK_DYNAMIC_SHARED(float, shared);
  FusedTile<Across, W> tile(job, shared);
  const Product back = back_product(job, back_from(job, job.layers - 1), B::kColumns);
  tile.begin(forward_product(layer_of(job, 0)));
#pragma unroll 1
  for (int l = 0; l < job.layers; ++l) {
    tile.template forward<true>(l, l + 1 < job.layers ? forward_product(layer_of(job, l + 1)) : back);
  }
  tile.keep_points();
  tile.load_gradient();
#pragma unroll 1
  for (int l = job.layers - 1; l >= 0; --l) {
    tile.back(l);
    const Layer& layer = layer_of(job, l);
#pragma unroll 1
    for (Back at = back_from(job, l); at.l == l; at = back_after(job, at, B::kColumns)) {
      WarpSums sums;
      tile.clear(sums);
      tile.template multiply<false>(sums, back_product(job, at, B::kColumns),
                                    back_product(job, back_after(job, at, B::kColumns), B::kColumns));
      if (at.first >= layer.own) {
        tile.add_points_gradient(sums, l, at.first - layer.own, back_columns(layer, at, B::kColumns));
      } else {
        tile.put_values(sums);
      }
    }
  }
}

// ---- sums over points ----------------------------------------------------------------------------------------------

constexpr int kSumThreads = 128, kSumTile = 64, kSumDepth = 32, kSumBlocksPerMultiprocessor = 4;
// Lanes that take different points and features access different banks.
constexpr int kSumStride = kSumTile + 8;

CAMK_HD int sum_columns(const Layer& layer) { return up(layer.own, kSumTile) + up(layer.in - layer.own, kSumTile); }
CAMK_HD int sum_tiles(const Layer& layer) { return up(layer.out, kSumTile) * sum_columns(layer); }

// Where numbers of consecutive points lie, apart from each other by `stride`; `columns` of them are there.
struct Rows {
  const float* data;
  int64_t stride;
  int columns;
};

// slab[k][c] <- the next kSumDepth points; zeros beyond `points`.
CAMK_DEVICE void fetch_rows(float* slab, const Rows& from, int points) {
  for (int i = int(threadIdx.x); i < kSumDepth * kSumTile / 4; i += kSumThreads) {
    const int k = i / (kSumTile / 4), c = i % (kSumTile / 4) * 4;
    const bool there = k < points && c < from.columns;
    cp_async<16>(slab + k * kSumStride + c, there ? from.data + k * from.stride + c : from.data, there);
  }
}

// A warp's 32 x 32 of the sums: 2 x 16 outputs and 4 x 8 inputs.
struct PointSums {
  float sum[2][4][4]{};

  // From slabs at the warp's first output and input. Terms: as in TensorSums.
  template <int Terms>
  CAMK_DEVICE void add(const float* left, const float* right) {
    const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
    for (int k = 0; k < kSumDepth; k += 8) {
      uint32_t high[2][4], low[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Split split(left[(k + t + i / 2 * 4) * kSumStride + m * 16 + g + i % 2 * 8]);
          high[m][i] = split.high, low[m][i] = split.low;
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Split x(right[(k + t) * kSumStride + n * 8 + g]), y(right[(k + t + 4) * kSumStride + n * 8 + g]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if constexpr (Terms > 1) {
            mma_tf32(sum[m][n], low[m], {x.high, y.high});
            mma_tf32(sum[m][n], high[m], {x.low, y.low});
          }
          mma_tf32(sum[m][n], high[m], {x.high, y.high});
        }
      }
    }
  }
};

// blockIdx.x: tile, of all layers; blockIdx.y: split.
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerMultiprocessor)
    point_sums(const __grid_constant__ NetworkJob<float> job, int per_split) {
  CAMK_DYNAMIC_SHARED(float, shared);  // two slabs of each operand
  constexpr int kSlab = kSumDepth * kSumStride;
  int l = 0, index = int(blockIdx.x);
  for (; index >= sum_tiles(layer_of(job, l)); ++l) index -= sum_tiles(layer_of(job, l));
  const Layer& layer = layer_of(job, l);
  const int o = index / sum_columns(layer) * kSumTile, across = index % sum_columns(layer);
  const bool of_x = across >= up(layer.own, kSumTile);
  const int i = (across - (of_x ? up(layer.own, kSumTile) : 0)) * kSumTile;
  const int64_t first = min(int64_t(blockIdx.y) * per_split, job.points), end = min(first + per_split, job.points);
  const float* row = job.rows + first * job.stride;
  Rows gradients{row + layer.n + o, job.stride, up(layer.out - o, kStep) * kStep}, values{row, job.stride, 0};
  if (!of_x) {
    values.data += layer_of(job, l - 1).y + i, values.columns = up(layer.own - i, kStep) * kStep;
  } else if (job.x_row >= 0) {
    values.data += job.x_row + i, values.columns = up(job.features - i, kStep) * kStep;
  } else {
    values = {static_cast<const float*>(job.x) + (job.before + first) * job.features + i, job.features,
              job.features - i};
  }
  PointSums sums;
  float bias = 0;
  const int warp = int(threadIdx.x) / 32, down = warp / 2 * 32, right = warp % 2 * 32;
  int turn = 0;
  const auto fetch = [&](int64_t from) {
    const int points = int(min(end - from, int64_t(kSumDepth)));
    fetch_rows(shared + turn * 2 * kSlab, gradients, points);
    fetch_rows(shared + turn * 2 * kSlab + kSlab, values, points);
    cp_async_commit();
    gradients.data += kSumDepth * gradients.stride, values.data += kSumDepth * values.stride;
  };
  if (first < end) fetch(first);
  for (int64_t at = first; at < end; at += kSumDepth) {
    cp_async_wait<0>();
    __syncthreads();
    const float* slab = shared + turn * 2 * kSlab;
    turn ^= 1;
    if (at + kSumDepth < end) fetch(at + kSumDepth);
    if (o + down < layer.out) {
      const float *left_rows = slab + down, *right_rows = slab + kSlab + right;
      job.sum_terms == 1 ? sums.add<1>(left_rows, right_rows) : sums.add<3>(left_rows, right_rows);
    }
    if (across == 0 && int(threadIdx.x) < kSumTile) {
#pragma unroll 8
      for (int k = 0; k < kSumDepth; ++k) bias += slab[k * kSumStride + int(threadIdx.x)];
    }
  }
  float* to = job.sums + blockIdx.y * job.weight_sums + layer.sums;
  const auto put = [&](int output, int input, float sum) {
    float* place = to + int64_t(output) * (layer.in + 1) + input;
    *place = job.accumulate ? *place + sum : sum;
  };
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int output = feature_at(o + down + m * 16 + g + e / 2 * 8), c = i + right + n * 8 + t * 2 + e % 2;
        const int input = of_x ? layer.own + c : feature_at(c);
        if (output < layer.out && input < (of_x ? layer.in : layer.own)) put(output, input, sums.sum[m][n][e]);
      }
    }
  }
  const int output = feature_at(o + int(threadIdx.x));
  if (across == 0 && int(threadIdx.x) < kSumTile && output < layer.out) put(output, layer.in, bias);
}

}  // namespace

int64_t fused_points_per_launch(const NetworkJob<float>& job) {
  const int64_t processors = device_number(cudaDevAttrMultiProcessorCount);
  const int64_t most = with_block(job, [&]<int Across, class W>(Constant<Across>, W*) {
    return processors * kFusedWaves * Block<Across>::kGradients * Block<Across>::kPoints;
  });
  return std::min(most, divide_up(job.points, kFusedRows) * kFusedRows);
}

int fused_splits(NetworkJob<float>& job, int64_t points) {
  job.sum_tiles = 0;
  for (int l = 0; l < job.layers; ++l) job.sum_tiles += sum_tiles(job.layer[l]);
  const int64_t held = kSumBlocksPerMultiprocessor * int64_t(device_number(cudaDevAttrMultiProcessorCount));
  return int(
      std::clamp<int64_t>(divide_up(points, 4 * kSumDepth), int64_t(1), std::max(held / job.sum_tiles, int64_t(1))));
}

cudaError_t launch_fused_gradients(const NetworkJob<float>& job, cudaStream_t stream) {
  return with_block(job, [&]<int Across, class W>(Constant<Across>, W*) {
    return launch(fused_gradients<Across, W>, fused_shape<Across, W>(job, stream), job);
  });
}

cudaError_t launch_point_sums(const NetworkJob<float>& job, cudaStream_t stream) {
  const dim3 grid(unsigned(job.sum_tiles), unsigned(job.splits));
  const LaunchShape shape{grid, kSumThreads, 4 * sizeof(float) * kSumDepth * kSumStride, stream};
  const int per_split = int(divide_up(divide_up(job.points, job.splits), kSumDepth) * kSumDepth);
  return launch(point_sums, shape, job, per_split);
}

}  // namespace camk::cuda
