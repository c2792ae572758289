// SPDX-License-Identifier: MIT
// Sums over points of the modulated MLP on CUDA: gradients of weights, biases and shared modulation. Each is made of
// partial sums, whose number depends on sizes and the device alone, and which are added in a fixed order: the same bits
// every time.
#include <algorithm>

#include "cuda/modulated_mlp.cuh"

namespace camk::cuda {
namespace {

// Estimated, not measured: a partial sum over fewer points costs more to write and read than it saves.
constexpr int kPointsPerSplit = 256, kBlocksPerMultiprocessor = 2;
constexpr int kThreads = 128;

CAMK_DEVICE int tiles_of(const Layer& layer) {
  const auto tiles = [](int n) { return (n + kGroupColumns - 1) / kGroupColumns; };
  return tiles(layer.out) * tiles(layer.in);
}

// A tile of one layer's sums, over the points of one split.
template <class C>
struct SumTile {
  const NetworkJob<C>& job;
  const Layer& layer;
  int l, o, i;         // layer, first row and column
  int64_t first, end;  // points

  CAMK_DEVICE C* rows() const { return job.rows + first * job.stride; }
  // sums += gradients^T inputs, of the values or of their tangents
  CAMK_DEVICE void add(SumsOf<C>& sums, Slabs<C>& slabs, bool tangents) const {
    const Inputs<C> inputs(job, l, rows(), first, tangents);
    const int column = (tangents ? layer.dn : layer.n) + o, points = int(end - first);
    const auto gradients = [&](C* slab, int k0) -> Operand<C> {
      stage<Along::kRows>(slab, kSlabRows, [&](int r, int k) {
        return o + r < layer.out && k0 + k < points ? row_of(rows(), job, k0 + k)[column + r] : C(0);
      });
      return {slab, kSlabStride};
    };
    const auto values = [&](C* slab, int k0) -> Operand<C> {
      inputs.with_fetch(min(i + kGroupColumns, layer.in), [&](const auto& fetch) {
        stage<Along::kRows>(slab, kGroupColumns, [&](int c, int k) {
          return i + c < layer.in && k0 + k < points ? fetch(k0 + k, i + c) : C(0);
        });
      });
      return {slab, kSlabStride};
    };
    slabs.add(sums, layer.in - i, points, gradients, values);
  }
  CAMK_DEVICE C bias(int r) const {
    C sum(0);
    for (int k = 0; k < int(end - first); ++k) sum += row_of(rows(), job, k)[layer.n + o + r];
    return sum;
  }
  CAMK_DEVICE void put(int r, int c, C sum) const {
    C* to = job.sums + blockIdx.y * job.weight_sums + layer.sums + int64_t(o + r) * (layer.in + 1) + c;
    *to = job.accumulate ? *to + sum : sum;
  }
};

// blockIdx.x: tile, of all layers; blockIdx.y: split.
template <class C>
__global__ void __launch_bounds__(kGroupThreads, 1)
    weight_sums(const __grid_constant__ NetworkJob<C> job, int64_t per_split, bool tangents) {
  CAMK_DYNAMIC_SHARED(C, shared);
  int l = 0, index = int(blockIdx.x);
  for (; index >= tiles_of(layer_of(job, l)); ++l) index -= tiles_of(layer_of(job, l));
  const Layer& layer = layer_of(job, l);
  const int across = (layer.in + kGroupColumns - 1) / kGroupColumns;
  const int64_t first = min(int64_t(blockIdx.y) * per_split, job.points), end = min(first + per_split, job.points);
  const SumTile<C> tile{job, layer, l, index / across * kSlabRows, index % across * kGroupColumns, first, end};
  Slabs<C> slabs(shared, kCopies);
  SumsOf<C> sums(job.sum_terms);
  tile.add(sums, slabs, false);
  if (tangents) tile.add(sums, slabs, true);
  sums.each([&](int r, int c, C sum) {
    if (tile.o + r < layer.out && tile.i + c < layer.in) tile.put(r, tile.i + c, sum);
  });
  const int r = int(threadIdx.x);
  if (tile.i == 0 && r < kSlabRows && tile.o + r < layer.out) tile.put(r, layer.in, tile.bias(r));
}

// blockIdx.y: layer.
template <class C>
__global__ void __launch_bounds__(kThreads) weight_gradients(const __grid_constant__ NetworkJob<C> job) {
  const Layer& layer = layer_of(job, int(blockIdx.y));
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, width = layer.in + 1;
  if (at >= layer.out * width) return;
  C sum(0);
  for (int s = 0; s < job.splits; ++s) sum += job.sums[s * job.weight_sums + layer.sums + at];
  const int64_t o = at / width, i = at % width;
  if (i < layer.in && layer.weight_gradient) store_number(layer.weight_gradient, job.weights, o * layer.in + i, sum);
  if (i == layer.in && layer.bias_gradient) store_number(layer.bias_gradient, job.weights, o, sum);
}

// blockIdx.x: 2^narrow values of a group; blockIdx.y: group, from that of the first point on. Threads take points
// kThreads >> narrow apart, and one adds their sums.
template <class C>
__global__ void __launch_bounds__(kThreads)
    group_sums(const __grid_constant__ NetworkJob<C> job, C* to, int64_t values, int narrow) {
  __shared__ C part[kThreads];
  const int64_t group = job.before / job.group + blockIdx.y + gridDim.y * int64_t(blockIdx.z);
  const int64_t value = (int64_t(blockIdx.x) << narrow) + (threadIdx.x & ((1 << narrow) - 1));
  const int64_t first = max(group * job.group - job.before, int64_t(0));
  const int64_t end = min((group + 1) * job.group - job.before, job.points);
  C sum(0);
  for (int64_t p = first + (threadIdx.x >> narrow); value < values && p < end; p += kThreads >> narrow) {
    sum += job.modulation_points[p * values + value];
  }
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >> narrow || value >= values || first >= end) return;
  C total = group * job.group < job.before ? to[group * values + value] : C(0);  // began in an earlier launch
  for (int k = 0; k < kThreads >> narrow; ++k) total += part[(k << narrow) + threadIdx.x];
  to[group * values + value] = total;
}

template <class C>
__global__ void __launch_bounds__(kThreads) store(const C* from, void* to, Storage kind, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) store_number(to, kind, i, from[i]);
}

}  // namespace

template <class C>
int splits_for(const NetworkJob<C>& job, int64_t points) {
  const int64_t held = kBlocksPerMultiprocessor * int64_t(device_number(cudaDevAttrMultiProcessorCount));
  return int(std::clamp(divide_up(points, kPointsPerSplit), int64_t(1), divide_up(held, job.sum_tiles)));
}

template <class C>
cudaError_t launch_weight_sums(const NetworkJob<C>& job, Order order, cudaStream_t stream) {
  const dim3 grid(unsigned(job.sum_tiles), unsigned(job.splits));
  const int64_t per_split = divide_up(divide_up(job.points, job.splits), kDepth) * kDepth;
  return launch(weight_sums<C>, {grid, kGroupThreads, sizeof(C) * slabs_size(1, kCopies), stream}, job, per_split,
                order == Order::kSecond);
}

template <class C>
cudaError_t launch_weight_gradients(const NetworkJob<C>& job, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(job.most_sums, kThreads)), unsigned(job.layers));
  return launch(weight_gradients<C>, {grid, kThreads, 0, stream}, job);
}

template <class C>
cudaError_t launch_group_sums(const NetworkJob<C>& job, C* to, cudaStream_t stream) {
  const int64_t values = modulation_values(job);
  int narrow = 5;  // 32 values, fewer where there are fewer
  while (narrow > 0 && (1 << (narrow - 1)) >= values) --narrow;
  const int64_t groups = (job.before + job.points - 1) / job.group - job.before / job.group + 1;
  constexpr int64_t kMost = 65535;  // of blocks along an axis but the first
  const int64_t deep = divide_up(groups, kMost);
  const dim3 grid(unsigned(divide_up(values, 1 << narrow)), unsigned(divide_up(groups, deep)), unsigned(deep));
  return launch(group_sums<C>, {grid, kThreads, 0, stream}, job, to, values, narrow);
}

template <class C>
cudaError_t launch_store(const C* from, void* to, Storage kind, int64_t count, cudaStream_t stream) {
  return launch(store<C>, {unsigned(divide_up(count, kThreads)), kThreads, 0, stream}, from, to, kind, count);
}

template int splits_for(const NetworkJob<float>&, int64_t);
template int splits_for(const NetworkJob<double>&, int64_t);
template cudaError_t launch_weight_sums(const NetworkJob<float>&, Order, cudaStream_t);
template cudaError_t launch_weight_sums(const NetworkJob<double>&, Order, cudaStream_t);
template cudaError_t launch_weight_gradients(const NetworkJob<float>&, cudaStream_t);
template cudaError_t launch_weight_gradients(const NetworkJob<double>&, cudaStream_t);
template cudaError_t launch_group_sums(const NetworkJob<float>&, float*, cudaStream_t);
template cudaError_t launch_group_sums(const NetworkJob<double>&, double*, cudaStream_t);
template cudaError_t launch_store(const float*, void*, Storage, int64_t, cudaStream_t);
template cudaError_t launch_store(const double*, void*, Storage, int64_t, cudaStream_t);

}  // namespace camk::cuda
