// SPDX-License-Identifier: MIT
// The value of radial_basis on CUDA, and in second order the gradient in the cotangent of it.
#include "cuda/radial_basis.cuh"

namespace camk::cuda {
namespace {

template <int D, class N>
__global__ void __launch_bounds__(kRadialThreads, kRadialMinBlocks)
    radial_value(const __grid_constant__ RadialJob<typename scalar_of<N>::type> job) {
  using Thread = RadialThread<D, N>;
  using S = typename Thread::S;
  constexpr int kNumbers = Thread::kNumbers;
  Thread thread(job, point_of_thread(job));
  for (int64_t start = 0; start < job.width; start += thread.lanes() * kNumbers) {
    const int64_t c = start + thread.lane * kNumbers;
    const RadialWaves<N> waves(job, c);
    Vec<N, kNumbers> sum{};
    thread.each_block([&] {
      thread.each_row(c, [&](N u, const Vec<N, kNumbers>& features) {
#pragma unroll
        for (int n = 0; n < kNumbers; ++n) sum[n] = sum[n] + waves.value(n, u) * features[n];
      });
    });
    if (!thread.there || c >= job.width) continue;
    Pack<S> y;
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) y[n] = thread.lost ? S(NAN) : gradient_of(sum[n]);
    store_pack(job.y, thread.place(thread.i, c), y);
  }
}

}  // namespace

template <class S>
cudaError_t launch_radial_value(RadialJob<S> job, bool second, cudaStream_t stream) {
  const LaunchShape shape = arrange(job, stream);
  return with_numbers(job, second, [&]<int D, class N>() { return launch(radial_value<D, N>, shape, job); });
}

template cudaError_t launch_radial_value(RadialJob<float>, bool, cudaStream_t);
template cudaError_t launch_radial_value(RadialJob<double>, bool, cudaStream_t);

}  // namespace camk::cuda
