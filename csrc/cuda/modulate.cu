// SPDX-License-Identifier: MIT
// Modulate on CUDA: value, gradients, second derivatives. A team of threads takes a piece of the groups, in order, so
// that sums over groups have the same bits every time.
#include <algorithm>

#include "cuda/modulate.cuh"

namespace camk::cuda {
namespace {

enum class Pass : int { kValue, kGradients, kSecond };

// Estimated, not measured: a warp reads numbers again from the first-level cache up to this length of a group.
constexpr int64_t kLongestOfWarp = 1024;
constexpr int kWarpsPerBlock = 4, kThreads = 128;
constexpr int64_t kWarpsPerMultiprocessor = 64, kBlocksPerMultiprocessor = 4;

template <class C, int kTeam, Pass kPass>
__global__ void __launch_bounds__(kTeam == kWarpTeam ? kWarpTeam * kWarpsPerBlock : kTeam)
    modulate(const __grid_constant__ ModulateJob<C> job) {
  __shared__ C part[kTeam == kWarpTeam ? 1 : kMostSums * (kTeam / 32)];
  const int64_t piece = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kTeam;
  if (piece >= job.pieces.count) return;
#pragma unroll 1
  for (int64_t group = job.pieces.begin(piece); group < job.pieces.end(piece); ++group) {
    GroupWork<C, kTeam> work(job, part, piece, group);
    if constexpr (kPass == Pass::kValue) work.value();
    if constexpr (kPass == Pass::kGradients) work.gradients();
    if constexpr (kPass == Pass::kSecond) work.second_order();
  }
}

// blockIdx.y: the piece before which an item is divided, less one.
template <class C>
__global__ void __launch_bounds__(kThreads) add_edges(SharedItems<C> items, GroupPieces pieces) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x, piece = int64_t(blockIdx.y) + 1;
  const int64_t item = pieces.divided(piece, items.share);
  if (item < 0 || k >= items.numbers()) return;
  C sum(0);
  pieces.each_edge(piece, item, items.share,
                   [&](int64_t edge) { sum += load_readonly(items.edges + edge * items.numbers() + k); });
  items.gradient[item * items.numbers() + k] = sum;
}

// Columns belong to threads, so that a block pays where there are many.
template <class C>
bool takes_block(const ModulateJob<C>& job) {
  return job.rows > 1 ? job.width >= kBlockTeam / 2 : job.width > kLongestOfWarp;
}

template <Pass kPass, class C>
cudaError_t launch_pass(const ModulateJob<C>& job, cudaStream_t stream) {
  if (takes_block(job)) {
    return launch(modulate<C, kBlockTeam, kPass>, {unsigned(job.pieces.count), kBlockTeam, 0, stream}, job);
  }
  const auto blocks = unsigned(divide_up(job.pieces.count, kWarpsPerBlock));
  return launch(modulate<C, kWarpTeam, kPass>, {blocks, kWarpTeam * kWarpsPerBlock, 0, stream}, job);
}

template <class C>
cudaError_t launch_add_edges(const SharedItems<C>& items, const GroupPieces& pieces, cudaStream_t stream) {
  if (!items.gradient || items.share == 1 || pieces.count < 2) return cudaSuccess;
  const dim3 grid(unsigned(divide_up(items.numbers(), kThreads)), unsigned(pieces.count - 1));
  return launch(add_edges<C>, {grid, kThreads, 0, stream}, items, pieces);
}

}  // namespace

template <class C>
int64_t pieces_held(const ModulateJob<C>& job) {
  constexpr int64_t kMost = 65536;  // blocks of add_edges along an axis, and one
  const int64_t each = takes_block(job) ? kBlocksPerMultiprocessor : kWarpsPerMultiprocessor;
  return std::min(each * device_number(cudaDevAttrMultiProcessorCount), kMost);
}

template <class C>
cudaError_t launch_modulate_value(const ModulateJob<C>& job, cudaStream_t stream) {
  return launch_pass<Pass::kValue>(job, stream);
}

template <class C>
cudaError_t launch_modulate_gradients(const ModulateJob<C>& job, bool second, cudaStream_t stream) {
  cudaError_t error = second ? launch_pass<Pass::kSecond>(job, stream) : launch_pass<Pass::kGradients>(job, stream);
  if (error == cudaSuccess) error = launch_add_edges(job.scale, job.pieces, stream);
  return error == cudaSuccess ? launch_add_edges(job.shift, job.pieces, stream) : error;
}

template int64_t pieces_held(const ModulateJob<float>&);
template int64_t pieces_held(const ModulateJob<double>&);
template cudaError_t launch_modulate_value(const ModulateJob<float>&, cudaStream_t);
template cudaError_t launch_modulate_value(const ModulateJob<double>&, cudaStream_t);
template cudaError_t launch_modulate_gradients(const ModulateJob<float>&, bool, cudaStream_t);
template cudaError_t launch_modulate_gradients(const ModulateJob<double>&, bool, cudaStream_t);

}  // namespace camk::cuda
