// SPDX-License-Identifier: MIT
// Modulate on CUDA: value, gradients, second derivatives. A team of threads takes a piece of the groups, in order, so
// that sums over groups have the same bits every time.
#include <algorithm>

#include "cuda/modulate.cuh"

namespace camk::cuda {
namespace {

// Estimated, not measured: a warp reads numbers again from the first-level cache up to this length of a group.
constexpr int64_t kLongestOfWarp = 1024;
constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = 128;  // of add_edges
constexpr int64_t kWarpsPerMultiprocessor = 64, kBlocksPerMultiprocessor = 4;

template <int kTeam>
inline constexpr int threads_of = kTeam == kWarpTeam ? kWarpTeam * kWarpsPerBlock : kTeam;

// What a block's team needs to take sums.
template <class C, int kTeam>
struct Parts {
  C part[kTeam == kWarpTeam ? 1 : kMostSums * (kTeam / 32)];
};

// body(work) for the groups of this team's piece.
template <class C, int kTeam, class Body>
CAMK_DEVICE void each_group(const ModulateJob<C>& job, Parts<C, kTeam>& parts, const Body& body) {
  const int64_t piece = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kTeam;
  if (piece >= job.pieces.count) return;
#pragma unroll 1
  for (int64_t group = job.pieces.begin(piece); group < job.pieces.end(piece); ++group) {
    GroupWork<C, kTeam> work(job, parts.part, piece, group);
    body(work);
  }
}

template <class C, int kTeam>
__global__ void __launch_bounds__(threads_of<kTeam>, 1) modulate_value(const __grid_constant__ ModulateJob<C> job) {
  __shared__ Parts<C, kTeam> parts;
  each_group(job, parts, [](auto& work) { work.value(); });
}

template <class C, int kTeam>
__global__ void __launch_bounds__(threads_of<kTeam>, 1) modulate_gradients(const __grid_constant__ ModulateJob<C> job) {
  __shared__ Parts<C, kTeam> parts;
  each_group(job, parts, [](auto& work) { work.gradients(); });
}

template <class C, int kTeam>
__global__ void __launch_bounds__(threads_of<kTeam>, 1) modulate_second(const __grid_constant__ ModulateJob<C> job) {
  __shared__ Parts<C, kTeam> parts;
  each_group(job, parts, [](auto& work) { work.second_order(); });
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

template <class C>
using Kernel = void (*)(ModulateJob<C>);

template <class C>
cudaError_t launch_teams(Kernel<C> of_warps, Kernel<C> of_blocks, const ModulateJob<C>& job, cudaStream_t stream) {
  if (takes_block(job)) return launch(of_blocks, {unsigned(job.pieces.count), kBlockTeam, 0, stream}, job);
  const auto blocks = unsigned(divide_up(job.pieces.count, kWarpsPerBlock));
  return launch(of_warps, {blocks, threads_of<kWarpTeam>, 0, stream}, job);
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
  return launch_teams<C>(modulate_value<C, kWarpTeam>, modulate_value<C, kBlockTeam>, job, stream);
}

template <class C>
cudaError_t launch_modulate_gradients(const ModulateJob<C>& job, bool second, cudaStream_t stream) {
  cudaError_t error =
      second ? launch_teams<C>(modulate_second<C, kWarpTeam>, modulate_second<C, kBlockTeam>, job, stream)
             : launch_teams<C>(modulate_gradients<C, kWarpTeam>, modulate_gradients<C, kBlockTeam>, job, stream);
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
