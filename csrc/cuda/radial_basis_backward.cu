// SPDX-License-Identifier: MIT
// First and second derivatives of radial_basis on CUDA. Towards x the lanes of a point add up what they found: no
// atomics, the same bits every time; towards the phase, which all points share, blocks leave parts that are added up in
// order. Towards centres, shapes and features sums are float32 (float64), by vector reductions of 16 bytes, or in fixed
// point where they must not depend on the order.
#include "cuda/radial_basis.cuh"
#include "cuda/sums.cuh"

namespace camk::cuda {
namespace {

// ---- Sums over points ---------------------------------------------------------------------------------------

// Adds the first `count` numbers from `at` on; whole: all of them, to an aligned word.
template <int W, class S>
CAMK_DEVICE void add_numbers(const RadialSums<S>& to, Sums way, int64_t terms, int64_t at, const Vec<S, W>& numbers,
                             int count, bool whole) {
  const auto each = [&](const auto& body) CAMK_INLINED {
#pragma unroll
    for (int n = 0; n < W; ++n) {
      if (n < count) body(n);
    }
  };
  if (way == Sums::kLargest) {
    each([&](int n) CAMK_INLINED { find_largest(to.largest, double(numbers[n])); });
  } else if (way == Sums::kFixed) {
    const FixedPoint sum(to.fixed, *to.largest, terms);
    each([&](int n) CAMK_INLINED { sum.add(to.sums, at + n, double(numbers[n])); });
  } else {
    if constexpr (sizeof(S) == 4) {
      if (whole) return reduce_add_n<W>(to.sums + at, numbers.v);
    }
    each([&](int n) CAMK_INLINED { reduce_add(to.sums + at + n, numbers[n]); });
  }
}

// ---- Gradients ----------------------------------------------------------------------------------------------

// In second order of float64 a pair has more numbers than a thread registers: there a call leaves it in local memory.
template <int D, class N>
__device__ CAMK_NOINLINE math::RadialGradient<D, N> pull_back_apart(const math::RadialKernel<D, N>& pair, N of_phi) {
  return pair.pull_back(of_phi);
}
template <int D, class N>
CAMK_DEVICE math::RadialGradient<D, N> pull_back(const math::RadialKernel<D, N>& pair, N of_phi) {
  if constexpr (std::is_same_v<N, Dual<double>>) {
    return pull_back_apart(pair, of_phi);
  } else {
    return pair.pull_back(of_phi);
  }
}

template <int D, class N>
class RadialGradients {
 public:
  using Thread = RadialThread<D, N>;
  using S = typename Thread::S;
  static constexpr int kNumbers = Thread::kNumbers;

  CAMK_DEVICE RadialGradients(const RadialJob<S>& job, Sums way)
      : job_(job), way_(way), thread_(job, point_of_thread(job)) {}

  CAMK_DEVICE void run() {
    const bool weighs = job_.weighs(), shares = weighs && job_.normalize && !job_.detach;
    N share(0);  // of the normaliser in the gradient of a weight
    if (shares && !thread_.one_block()) {
      thread_.each_block([&] { share = share + of_weight(true, false) * thread_.weight(); });
      share = sum_of_lanes(share, 1, thread_.lanes());
    }
    thread_.each_block([&] {
      const N of_u = of_weight(weighs, job_.of_features.sums != nullptr);
      if (shares && thread_.one_block()) share = sum_of_lanes(of_u * thread_.weight(), 1, thread_.lanes());
      if (weighs && thread_.has_kernel) back_to_kernel(thread_.scale * (of_u - share));
    });
    if (job_.gx) store_x();
  }

 private:
  const RadialJob<S>& job_;
  const Sums way_;
  Thread thread_;
  Vec<S, D> of_x_{};
  int64_t held_ = -1;  // the first of the features whose cotangents and waves are held
  Pack<S> g_;
  RadialWaves<N> waves_;

  // The gradient in the weight of this lane's pair, if wanted; adds to that in features.
  CAMK_DEVICE N of_weight(bool weighs, bool adds) {
    N mine(0);
    thread_.each_pair([&](int l, int32_t kernel, N u) {
      N slope(0);
      for (int64_t c = thread_.lane * kNumbers; thread_.takes(c); c += thread_.lanes() * kNumbers) {
        if (c != held_) hold(c);
        Vec<S, kNumbers> part;
        if (weighs) {
          slope = slope + slope_and_part(u, thread_.features(kernel, c), part);
        } else {
#pragma unroll
          for (int n = 0; n < kNumbers; ++n) part[n] = g_[n] * gradient_of(waves_.value(n, u));
        }
        if (!adds) continue;
        const int count = int(min(job_.width - c, int64_t(kNumbers)));
        add_numbers(job_.of_features, way_, job_.terms(), kernel * job_.width + c, part, count, job_.words);
      }
      if (!weighs) return;
      slope = sum_of_lanes(slope, 1, thread_.lanes());
      if (thread_.lane == l) mine = slope;
    });
    return mine;
  }

  CAMK_DEVICE void hold(int64_t c) {
    held_ = c, g_ = load_pack<S>(job_.g, thread_.place(thread_.i, c)), waves_ = RadialWaves<N>(job_, c);
  }

  // Of the features that are held: what they add to the gradient in u; part: what their own gradients are.
  CAMK_DEVICE N slope_and_part(N u, const Vec<N, kNumbers>& features, Vec<S, kNumbers>& part) const {
    N slope(0);
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      const math::RadialWave<N> psi = waves_(n, u);
      part[n] = g_[n] * gradient_of(psi.value);
      slope = slope + N(g_[n]) * features[n] * psi.slope;
    }
    return slope;
  }

  // From the gradient in phi of this lane's pair those in x and the kernel's parameters.
  CAMK_DEVICE void back_to_kernel(N of_phi) {
    const math::RadialGradient<D, N> found = pull_back(thread_.pair, of_phi);
    Vec<S, D> of_center;
    unroll<D>([&](int a) CAMK_INLINED {
      of_x_[a] += gradient_of(found.x[a]);
      of_center[a] = gradient_of(found.center[a]);
    });
    if (job_.of_centers.sums) {
      add_numbers(job_.of_centers, way_, job_.terms(), int64_t(thread_.kernel) * D, of_center, D, true);
    }
    if (!job_.of_shapes.sums || math::radial_ignores_shape(job_.kind, job_.shape)) return;
    Vec<S, D * D> of_shape;
    unroll<D * D>([&](int s) CAMK_INLINED { of_shape[s] = gradient_of(found.shape[s]); });
    add_numbers(job_.of_shapes, way_, job_.terms(), int64_t(thread_.kernel) * job_.shape_width, of_shape,
                job_.shape_width, job_.shape_width == D * D);
  }

  CAMK_DEVICE void store_x() {
    unroll<D>([&](int a) CAMK_INLINED {
      const S sum = sum_of_lanes(of_x_[a], 1, thread_.lanes());
      if (thread_.there && thread_.lane == 0) job_.gx[thread_.i * D + a] = thread_.lost ? S(NAN) : sum;
    });
  }
};

template <int D, class N>
__global__ void __launch_bounds__(kRadialThreads, kRadialMinBlocks)
    radial_gradients(const __grid_constant__ RadialJob<typename scalar_of<N>::type> job, Sums way) {
  RadialGradients<D, N>(job, way).run();
}

// ---- The gradient in the phase ------------------------------------------------------------------------------

// Parts: what the lanes that take the same features found.
template <class S>
CAMK_DEVICE void store_part(const RadialJob<S>& job, int64_t c, const Vec<S, Pack<S>::kNumbers>& sum) {
  constexpr int kNumbers = Pack<S>::kNumbers, kWarps = kRadialThreads / 32;
  __shared__ S parts[kWarps][32][kNumbers];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, lanes = 1 << job.lane_bits;
  unroll<kNumbers>([&](int n) CAMK_INLINED { parts[warp][lane][n] = sum_of_lanes(sum[n], lanes, 32); });
  __syncthreads();
  if (int(threadIdx.x) < lanes) {
    for (int n = 0; n < kNumbers && c + n < job.width; ++n) {
      S total(0);
      for (int w = 0; w < kWarps; ++w) total += parts[w][lane][n];
      job.of_phase[blockIdx.x * job.width + c + n] = total;
    }
  }
  __syncthreads();
}

template <int D, class N>
__global__ void __launch_bounds__(kRadialThreads, kRadialMinBlocks)
    radial_phase(const __grid_constant__ RadialJob<typename scalar_of<N>::type> job) {
  using Thread = RadialThread<D, N>;
  using S = typename Thread::S;
  constexpr int kNumbers = Thread::kNumbers;
  const int64_t lanes = int64_t(1) << job.lane_bits, step = gridDim.x * (kRadialThreads >> job.lane_bits);
  for (int64_t start = 0; start < job.width; start += lanes * kNumbers) {
    const int64_t c = start + (threadIdx.x & (lanes - 1)) * kNumbers;
    const RadialWaves<N> waves(job, c);
    Vec<S, kNumbers> sum{};
    for (int64_t first = 0; first < job.points; first += step) {
      Thread thread(job, first + point_of_thread(job));
      const Pack<S> g = thread.takes(c) ? load_pack<S>(job.g, thread.place(thread.i, c)) : Pack<S>(S(0));
      thread.each_block([&] {
        thread.each_row(c, [&](N u, const Vec<N, kNumbers>& features) {
#pragma unroll
          for (int n = 0; n < kNumbers; ++n) {
            sum[n] += gradient_of(N(g[n]) * features[n] * waves(n, u).phase_slope);
          }
        });
      });
    }
    store_part(job, c, sum);
  }
}

template <class S>
__global__ void __launch_bounds__(kRadialThreads)
    finish_phase(const S* parts, int64_t blocks, int64_t width, int64_t keep, S* gradient) {
  const int64_t c = keep + int64_t(blockIdx.x) * kRadialThreads + threadIdx.x;
  if (c >= width) return;
  S sum(0);
  for (int64_t block = 0; block < blocks; ++block) sum += parts[block * width + c];
  gradient[c - keep] = sum;
}

}  // namespace

template <class S>
cudaError_t launch_radial_gradients(RadialJob<S> job, Sums way, bool second, cudaStream_t stream) {
  const LaunchShape shape = arrange(job, stream);
  return with_numbers(job, second, [&]<int D, class N>() { return launch(radial_gradients<D, N>, shape, job, way); });
}

template <class S>
cudaError_t launch_radial_phase(RadialJob<S> job, S* gradient, bool second, cudaStream_t stream) {
  LaunchShape shape = arrange(job, stream);
  const int64_t blocks = std::clamp(int64_t(shape.grid.x), int64_t(1), kPhaseBlocks);
  shape.grid = dim3(unsigned(blocks));
  const cudaError_t error =
      with_numbers(job, second, [&]<int D, class N>() { return launch(radial_phase<D, N>, shape, job); });
  if (error != cudaSuccess) return error;
  shape.grid = dim3(unsigned(divide_up(job.width - job.keep, kRadialThreads)));
  const S* parts = job.of_phase;
  return launch(finish_phase<S>, shape, parts, blocks, job.width, job.keep, gradient);
}

template cudaError_t launch_radial_gradients(RadialJob<float>, Sums, bool, cudaStream_t);
template cudaError_t launch_radial_gradients(RadialJob<double>, Sums, bool, cudaStream_t);
template cudaError_t launch_radial_phase(RadialJob<float>, float*, bool, cudaStream_t);
template cudaError_t launch_radial_phase(RadialJob<double>, double*, bool, cudaStream_t);

}  // namespace camk::cuda
