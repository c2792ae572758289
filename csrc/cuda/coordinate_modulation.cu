// SPDX-License-Identifier: MIT
// The value of coordinate_modulation on CUDA, and grids packed so that all numbers of a node lie side by side: a lookup
// then reads 2^D rows in words of 16 bytes, instead of 2^D numbers of every layer far apart.
#include <algorithm>

#include "cuda/coordinate_modulation.cuh"

namespace camk::cuda {
namespace {

// body(first number of a pack, its place in the packed rows, number -> place in the grids) for the packs of a node:
// blockIdx.x counts nodes, blockIdx.y packs, blockIdx.z planes, so that neighbouring threads take neighbouring nodes.
template <class S, class Body>
CAMK_DEVICE void each_pack_of_node(const RowLayout& layout, const Body& body) {
  const int64_t node = int64_t(blockIdx.x) * kLookupThreads + threadIdx.x;
  if (node > layout.nodes) return;
  const uint32_t step = gridDim.y * Pack<S>::kNumbers, plane = blockIdx.z;
  for (uint32_t k = blockIdx.y * Pack<S>::kNumbers; k < layout.pitch; k += step) {
    body(k, (plane * (layout.nodes + 1) + node) * layout.pitch + k, [&](uint32_t number) {
      const uint32_t run = (number / layout.each * layout.planes + plane) * layout.each + number % layout.each;
      return run * layout.nodes + node;
    });
  }
}

template <class S>
__global__ void __launch_bounds__(kLookupThreads, kLookupMinBlocks)
    pack_rows(const __grid_constant__ RowLayout layout, const void* grids, Storage storage, S* rows) {
  const bool beyond = int64_t(blockIdx.x) * kLookupThreads + threadIdx.x >= layout.nodes;
  each_pack_of_node<S>(layout, [&](uint32_t k, int64_t at, const auto& place) {
    Pack<S> numbers(S(0));
#pragma unroll
    for (int n = 0; n < Pack<S>::kNumbers; ++n) {
      if (!beyond && k + n < layout.width) numbers[n] = load_number<S>(grids, storage, place(k + n));
    }
    *reinterpret_cast<Pack<S>*>(rows + at) = numbers;
  });
}

template <class S>
__global__ void __launch_bounds__(kLookupThreads, kLookupMinBlocks)
    unpack_rows(const __grid_constant__ RowLayout layout, const S* rows, void* grids, Storage storage) {
  if (int64_t(blockIdx.x) * kLookupThreads + threadIdx.x >= layout.nodes) return;
  each_pack_of_node<S>(layout, [&](uint32_t k, int64_t at, const auto& place) {
    const auto numbers = load_readonly(reinterpret_cast<const Pack<S>*>(rows + at));
#pragma unroll
    for (int n = 0; n < Pack<S>::kNumbers; ++n) {
      if (k + n < layout.width) store_number(grids, storage, place(k + n), numbers[n]);
    }
  });
}

template <class S>
LaunchShape nodes_and_packs(const RowLayout& layout, cudaStream_t stream) {
  constexpr unsigned kMostBlocks = 65535;
  const unsigned packs = layout.pitch / Pack<S>::kNumbers;
  const dim3 grid(unsigned(divide_up(layout.nodes + 1, kLookupThreads)), std::min(packs, kMostBlocks), layout.planes);
  return {grid, kLookupThreads, 0, stream};
}

template <class S, int D, int P>
__global__ void __launch_bounds__(kLookupThreads, kLookupMinBlocks) lookup(const __grid_constant__ LookupJob<S> job) {
  using C = Pack<S>;
  const LookupThread<S, D, P> thread(job);
  thread.each_pack(
      [&](int64_t k) { thread.store_numbers(job.y, k, thread.broken ? C(S(NAN)) : math::product(thread.values(k))); });
}

}  // namespace

template <class S>
cudaError_t launch_pack(const RowLayout& layout, const void* grids, Storage storage, S* rows, cudaStream_t stream) {
  return launch(pack_rows<S>, nodes_and_packs<S>(layout, stream), layout, grids, storage, rows);
}
template <class S>
cudaError_t launch_unpack(const RowLayout& layout, const S* rows, void* grids, Storage storage, cudaStream_t stream) {
  return launch(unpack_rows<S>, nodes_and_packs<S>(layout, stream), layout, rows, grids, storage);
}
template <class S>
cudaError_t launch_lookup(LookupJob<S> job, cudaStream_t stream) {
  const LaunchShape shape = arrange(job, stream);
  return with_axes(job, [&]<int D, int P>() { return launch(lookup<S, D, P>, shape, job); });
}

template cudaError_t launch_pack(const RowLayout&, const void*, Storage, float*, cudaStream_t);
template cudaError_t launch_pack(const RowLayout&, const void*, Storage, double*, cudaStream_t);
template cudaError_t launch_unpack(const RowLayout&, const float*, void*, Storage, cudaStream_t);
template cudaError_t launch_unpack(const RowLayout&, const double*, void*, Storage, cudaStream_t);
template cudaError_t launch_lookup(LookupJob<float>, cudaStream_t);
template cudaError_t launch_lookup(LookupJob<double>, cudaStream_t);

}  // namespace camk::cuda
