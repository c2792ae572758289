// SPDX-License-Identifier: MIT
// The modulated MLP in float32 with layers of up to 256 columns: the weights in the order of their use, and the value.
// A block takes one tile of points through all layers.
#include "cuda/modulated_mlp_fused.cuh"
#include "cuda/modulated_mlp_fused_launch.h"

namespace camk::cuda {
namespace {

constexpr int kPackThreads = 256, kPackBlocks = 16;

// `terms` of products: one takes rounded weights.
CAMK_DEVICE void put_weight(float* to, float number, int terms) {
  *to = terms == 1 ? __uint_as_float(to_tf32(number)) : number;
}
CAMK_DEVICE void put_weight(uint16_t* to, float number, int) {
  *to = __bfloat16_as_ushort(__float2bfloat16_rn(number));
}

// to <- a product's weights; weight(column, place of a step, step) may be asked for any column of a tile.
template <class W, class Weight>
CAMK_DEVICE void pack_product(W* to, const Product& product, int terms, const Weight& weight) {
  const int threads = int(gridDim.x * blockDim.x), first = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (int i = first; i < product.numbers(); i += threads) {
    const int place = i % kStep, column = i / kStep % kTileColumns, tile = i / kTileNumbers;
    const float number = weight(tile % product.tiles * kTileColumns + column, place, tile / product.tiles);
    put_weight(to + tile * kTileNumbers + tile_index(place, column, sizeof(W) == 2), number, terms);
  }
}

// blockIdx.y: layer. `columns`: of a block.
template <class W>
__global__ void __launch_bounds__(kPackThreads)
    pack(const __grid_constant__ NetworkJob<float> job, float* biases, W* stream, int columns, bool back) {
  const int l = int(blockIdx.y);
  const Layer& layer = layer_of(job, l);
  const auto weight = [&](int o, int i) {
    const bool there = o < layer.out && i < layer.in;
    return there ? load_number<float>(layer.weight, job.weights, int64_t(o) * layer.in + i) : 0.0f;
  };
  for (int before = 0; before < l; ++before) stream += forward_product(layer_of(job, before)).numbers();
  const Product product = forward_product(layer);
  pack_product(stream, product, job.terms, [&](int column, int place, int step) {
    const int own = step * kStep + feature_at(place), x = (step - product.own_steps) * kStep + place;
    const bool of_x = step >= product.own_steps;
    return of_x || own < layer.own ? weight(column, of_x ? layer.own + x : own) : 0.0f;
  });
  for (int c = int(blockIdx.x * blockDim.x + threadIdx.x); c < columns; c += int(gridDim.x * blockDim.x)) {
    const bool there = layer.bias && c < layer.out;
    biases[l * columns + c] = there ? load_number<float>(layer.bias, job.weights, c) : 0.0f;
  }
  if (!back) return;
  for (int after = l; after < job.layers; ++after) stream += forward_product(layer_of(job, after)).numbers();
  for (Back at = back_from(job, job.layers - 1); at.l >= l; at = back_after(job, at, columns)) {
    const Product part = back_product(job, at, columns);
    if (at.l == l) {
      const int some = back_columns(layer, at, columns);
      pack_product(stream, part, job.terms, [&](int column, int place, int step) {
        return column < some ? weight(step * kStep + feature_at(place), at.first + column) : 0.0f;
      });
    }
    stream += part.numbers();
  }
}

template <int Across, class W>
__global__ void __launch_bounds__(Block<Across>::kThreads, Block<Across>::kForward)
    fused_forward(const __grid_constant__ NetworkJob<float> job) {
  CAMK_DYNAMIC_SHARED(float, shared);
  FusedTile<Across, W> tile(job, shared);
  tile.begin(forward_product(layer_of(job, 0)));
#pragma unroll 1
  for (int l = 0; l < job.layers; ++l) {
    tile.template forward<false>(l, l + 1 < job.layers ? forward_product(layer_of(job, l + 1)) : Product{});
  }
  tile.put_result();
}

}  // namespace

bool is_fused(const NetworkJob<float>& job) {
  if (job.layers > kLayersInArguments || job.widest > Block<4>::kColumns) return false;
  const int most = device_number(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return with_block(job, [&]<int Across, class W>(Constant<Across>, W*) {
    return Block<Across>::shared_bytes(job.skips, sizeof(W)) <= size_t(most);
  });
}

int64_t packed_bytes(const NetworkJob<float>& job, bool back) {
  const int columns = fused_columns(job);
  int64_t numbers = 0;
  for (int l = 0; l < job.layers; ++l) numbers += forward_product(job.layer[l]).numbers();
  for (Back at = back_from(job, back ? job.layers - 1 : -1); at.l >= 0; at = back_after(job, at, columns)) {
    numbers += back_product(job, at, columns).numbers();
  }
  return int64_t(sizeof(float)) * job.layers * columns + numbers * (packs_bfloat16(job) ? 2 : 4);
}

cudaError_t launch_pack(NetworkJob<float>& job, void* to, bool back, cudaStream_t stream) {
  const int columns = fused_columns(job);
  float* biases = static_cast<float*>(to);
  job.biases = biases, job.packed = biases + job.layers * columns;
  const LaunchShape shape{dim3(kPackBlocks, unsigned(job.layers)), kPackThreads, 0, stream};
  if (packs_bfloat16(job)) {
    return launch(pack<uint16_t>, shape, job, biases, static_cast<uint16_t*>(const_cast<void*>(job.packed)), columns,
                  back);
  }
  return launch(pack<float>, shape, job, biases, static_cast<float*>(const_cast<void*>(job.packed)), columns, back);
}

cudaError_t launch_fused_forward(const NetworkJob<float>& job, cudaStream_t stream) {
  return with_block(job, [&]<int Across, class W>(Constant<Across>, W*) {
    return launch(fused_forward<Across, W>, fused_shape<Across, W>(job, stream), job);
  });
}

}  // namespace camk::cuda
