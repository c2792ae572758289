// SPDX-License-Identifier: MIT
// The value of the modulated MLP on CUDA. A block takes tiles of points through all layers; their rows stay in shared
// memory, or, of layers too wide for it, in scratch memory of the block's own, which stays in the L2 cache.
#include <algorithm>

#include "cuda/modulated_mlp.cuh"

namespace camk::cuda {
namespace {

// Estimated, not measured: enough to hide the latency of a scratch memory that is in the L2 cache.
constexpr int kBlocksPerMultiprocessor = 2;

template <class C>
__global__ void __launch_bounds__(kMaxThreads, 1) forward(const __grid_constant__ NetworkJob<C> job, int copies) {
  CAMK_DYNAMIC_SHARED(C, shared);
  C* rows = shared + slabs_size(int(blockDim.x) / kGroupThreads, copies);
  if (job.rows) rows = job.rows + int64_t(blockIdx.x) * kTileRows * job.stride;
  for (int64_t first = int64_t(blockIdx.x) * kTileRows; first < job.points; first += int64_t(gridDim.x) * kTileRows) {
    Tile<C> tile(job, Slabs<C>(shared, copies), first, rows, job.rows == nullptr);
    for (int l = 0; l < job.layers; ++l) {
      tile.linear(l, false);
      tile.each_row([&](int64_t point, C* row) { activate_row(job, l, point, row, true); });
    }
    tile.put_points(job.x);
  }
}

struct Records {
  Layer layer[kLayersInArguments];
};
__global__ void set_layers(const __grid_constant__ Records records, Layer* to, int count) {
  if (int(threadIdx.x) < count) to[threadIdx.x] = records.layer[threadIdx.x];
}

template <class C>
size_t shared_bytes(const NetworkJob<C>& job, int copies, bool with_rows) {
  const size_t rows = with_rows ? size_t(kTileRows) * job.stride : 0;
  return sizeof(C) * (slabs_size(groups_for(job.widest), copies) + rows);
}

// Copies of the slabs that fit into shared memory beside the rows; 0: not even one does.
template <class C>
int copies_beside_rows(const NetworkJob<C>& job) {
  const auto most = size_t(device_number(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  int copies = kCopies;
  while (copies > 0 && shared_bytes(job, copies, true) > most) --copies;
  return copies;
}

}  // namespace

template <class C>
int forward_blocks(const NetworkJob<C>& job) {
  if (copies_beside_rows(job) > 0) return 0;
  const int64_t held = kBlocksPerMultiprocessor * int64_t(device_number(cudaDevAttrMultiProcessorCount));
  return int(std::min(held, divide_up(job.points, kTileRows)));
}

template <class C>
cudaError_t launch_forward(const NetworkJob<C>& job, cudaStream_t stream) {
  const unsigned blocks = unsigned(job.rows ? forward_blocks(job) : divide_up(job.points, kTileRows));
  const unsigned threads = unsigned(groups_for(job.widest) * kGroupThreads);
  const int copies = job.rows ? kCopies : copies_beside_rows(job);
  return launch(forward<C>, {blocks, threads, shared_bytes(job, copies, !job.rows), stream}, job, copies);
}

cudaError_t launch_set_layers(const Layer* from, Layer* to, int64_t count, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kLayersInArguments) {
    Records records;
    const int some = int(std::min(count - first, int64_t(kLayersInArguments)));
    std::copy_n(from + first, some, records.layer);
    const cudaError_t error = launch(set_layers, {1, kLayersInArguments, 0, stream}, records, to + first, some);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template int forward_blocks(const NetworkJob<float>&);
template int forward_blocks(const NetworkJob<double>&);
template cudaError_t launch_forward(const NetworkJob<float>&, cudaStream_t);
template cudaError_t launch_forward(const NetworkJob<double>&, cudaStream_t);

}  // namespace camk::cuda
