// SPDX-License-Identifier: MIT
// Derivatives of the modulated MLP on CUDA, point by point: a block computes a tile's values anew and goes back through
// the layers. It leaves in the rows what the sums over points need (modulated_mlp_sums.cu): of every layer, what it
// gave and the gradient of W h + b. For second derivatives the tangents go along.
#include "cuda/modulated_mlp.cuh"

namespace camk::cuda {
namespace {

// The gradient of the last layer's results and of x behind them, into the rows: that of their tangents for second
// derivatives, for then the gradient of the results themselves is nothing.
template <class C>
CAMK_DEVICE void begin_back(const Tile<C>& tile, bool second) {
  const NetworkJob<C>& job = tile.job;
  const int width = layer_of(job, job.layers - 1).out;
  const auto given = [&](int p, int c) {
    return load_number<C>(job.g, job.weights, (job.before + tile.first + p) * job.outputs + c);
  };
  tile.each_number(width, [&](int p, int c) {
    C* row = tile.row(p);
    row[job.g_row + c] = second ? C(0) : given(p, c);
    if (second) row[job.dg_row + c] = given(p, c);
  });
  tile.each_number(job.features, [&](int p, int i) {
    tile.row(p)[job.gx_row + i] = !second && job.outputs > width ? given(p, width + i) : C(0);
  });
}

template <class C>
CAMK_DEVICE void end_back(const Tile<C>& tile) {
  const NetworkJob<C>& job = tile.job;
  if (!job.gx) return;
  tile.each_number(job.features, [&](int p, int i) {
    const int64_t at = (job.before + tile.first + p) * job.features + i;
    store_number(job.gx, job.coordinates, at, tile.row(p)[job.gx_row + i]);
  });
}

template <class C>
__global__ void __launch_bounds__(kMaxThreads, 1) derivatives(const __grid_constant__ NetworkJob<C> job, bool second) {
  CAMK_DYNAMIC_SHARED(C, shared);
  const int64_t first = int64_t(blockIdx.x) * kTileRows;
  Tile<C> tile(job, Slabs<C>(shared, kCopies), first, job.rows + first * job.stride, false);
#pragma unroll 1
  for (int l = 0; l < job.layers; ++l) {
#pragma unroll 1
    for (int tangent = 0; tangent <= int(second); ++tangent) tile.linear(l, tangent != 0);
    tile.each_row([&](int64_t point, C* row) {
      second ? activate_tangent_row(job, l, point, row) : activate_row(job, l, point, row, false);
    });
  }
  if (job.y) tile.put_points(job.x_tangent);
  begin_back(tile, second);
#pragma unroll 1
  for (int l = job.layers - 1; l >= 0; --l) {
    tile.each_row([&](int64_t point, C* row) {
      second ? deactivate_tangent_row(job, l, point, row) : deactivate_row(job, l, point, row);
    });
#pragma unroll 1
    for (int tangent = 0; tangent <= int(second); ++tangent) tile.linear_back(l, tangent != 0);
  }
  end_back(tile);
}

}  // namespace

template <class C>
cudaError_t launch_backward(const NetworkJob<C>& job, Order order, cudaStream_t stream) {
  const int groups = groups_for(job.widest);
  const LaunchShape shape{unsigned(divide_up(job.points, kTileRows)), unsigned(groups * kGroupThreads),
                          sizeof(C) * slabs_size(groups, kCopies), stream};
  return launch(derivatives<C>, shape, job, order == Order::kSecond);
}

template cudaError_t launch_backward(const NetworkJob<float>&, Order, cudaStream_t);
template cudaError_t launch_backward(const NetworkJob<double>&, Order, cudaStream_t);

}  // namespace camk::cuda
