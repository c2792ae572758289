// SPDX-License-Identifier: MIT
// Loops of radial_basis over pairs of a point and a kernel: the weights, for a pack of points at a time, and the
// gradients behind them.
#include <limits>

#include "cpu/radial_basis_kernels.h"

namespace camk::cpu {
namespace {

template <int D, class N>
struct RadialLoops {
  using S = typename scalar_of<N>::type;
  using C = typename pack_of<N>::type;
  using Pack = Lanes<S>;
  using Problem = RadialProblem<S>;
  using Pairs = RadialPairs<N>;
  static constexpr int kWidth = lanes_of<Pack>;
  using BlockRows = Vec<int64_t, kWidth>;
  // How far ahead the parameters of kernels are fetched, and what names them: points and neighbours. Where all lie in a
  // row as well, 39 against 31 ns per point (2 axes, 4 neighbours, 32 features).
  static constexpr int64_t kKernelsAhead = kWidth, kPointsAhead = 6 * kWidth;

  const Problem& problem;

  // A block of points with one kernel each; those of points without value may be any.
  CAMK_HD math::RadialKernel<D, C> kernel(const Vec<C, D>& x, const int32_t* kernels) const {
    math::RadialKernel<D, C> found;
    found.kind = problem.kind, found.form = problem.shape, found.x = x;
    typedef int32_t Numbers __attribute__((vector_size(4 * kWidth)));
    Numbers numbers;
    memcpy(&numbers, kernels, sizeof(numbers));
    numbers = numbers > 0 ? numbers : Numbers{};
    int32_t stored[kWidth];
    memcpy(stored, &numbers, sizeof(numbers));
    const volatile int32_t* rows = stored;  // read at every use: there are more addresses than registers
    const auto row = [&](int l) CAMK_INLINED { return int64_t(rows[l]); };
    gather_operand<D>(problem.centers, row, found.center.v);
    if (math::radial_ignores_shape(problem.kind, problem.shape)) {
      found.form = math::RadialShape::kIsotropic, found.shape[0] = C(1);
    } else if (problem.shape_width == D * D) {
      gather_operand<D * D>(problem.shapes, row, found.shape.v);
    } else if (problem.shape_width == D) {
      gather_operand<D>(problem.shapes, row, found.shape.v);
    } else if (problem.shape_width == 1) {
      gather_operand<1>(problem.shapes, row, found.shape.v);
    } else {
      gather_operand<D*(D + 1) / 2>(problem.shapes, row, found.shape.v);
    }
    found.evaluate();
    return found;
  }

  // The rows of a block of points from i on, and the points; the last one also in lanes behind it.
  CAMK_HD BlockRows rows_of_block(int64_t i) const {
    BlockRows rows;
    for (int l = 0; l < kWidth; ++l) rows[l] = problem.point_at(std::min(i + l, problem.points - 1));
    return rows;
  }
  CAMK_HD Vec<C, D> points_of_block(const BlockRows& rows) const {
    Vec<C, D> x;
    gather_operand<D>(problem.x, [&](int l) CAMK_INLINED { return rows[l]; }, x.v);
    return x;
  }

  // Weights of the points from begin, the first of a block, to end.
  void weigh(Pairs& pairs, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kWidth) {
      prefetch_points(i + kPointsAhead);
      const int64_t block = (i - pairs.begin) / kWidth, at = block * problem.per_point;
      int32_t* kernels = pairs.kernels.data() + at * kWidth;
      const BlockRows rows = rows_of_block(i);
      const Vec<C, D> x = points_of_block(rows);
      name_kernels(rows, std::min<int64_t>(kWidth, end - i), x, kernels);
      C total(0);
      for (int64_t j = 0; j < problem.per_point; ++j) {
        prefetch_kernels(i + kKernelsAhead, j);
        pairs.u[at + j] = kernel(x, kernels + j * kWidth).value;
        total = total + pairs.u[at + j];
      }
      C scale(1);
      if (problem.normalize) scale = scale / ((problem.detach ? constant_of(total) : total) + C(problem.eps));
      pairs.scale[block] = scale;
      bool within = true;
      for (int64_t j = 0; j < problem.per_point; ++j) {
        pairs.u[at + j] = pairs.u[at + j] * scale;
        if constexpr (std::is_same_v<C, Pack>) within &= all_within(pairs.u[at + j], problem.fast_below);
      }
      pairs.within[block] = within;
    }
  }

  // Of the points from begin, the first of a block, to end: from the gradients in their weights those in x, unless
  // null, and if wanted the parts of those in kernels.
  void back_to_points(Pairs& pairs, int64_t begin, int64_t end, S* gx, bool kernels) const {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int64_t block = (i - pairs.begin) / kWidth, at = block * problem.per_point;
      back_to_kernels(pairs, block);
      const Vec<C, D> x = points_of_block(rows_of_block(i));
      Vec<Pack, D> found{};
      for (int64_t j = 0; j < problem.per_point; ++j) {
        const auto parts = kernel(x, pairs.kernels.data() + (at + j) * kWidth).pull_back(pairs.gradient[at + j]);
        for (int a = 0; a < D; ++a) found[a] = found[a] + gradient_of(parts.x[a]);
        if (!kernels) continue;
        Pack* to = pairs.parts.data() + (at + j) * problem.kernel_width();
        for (int a = 0; a < D; ++a) to[a] = gradient_of(parts.center[a]);
        for (int a = 0; a < problem.shape_width; ++a) to[D + a] = gradient_of(parts.shape[a]);
      }
      for (int64_t l = 0; gx && l < std::min<int64_t>(kWidth, end - i); ++l) {
        const bool has = pairs.has_value(i + l, problem.per_point);
        for (int a = 0; a < D; ++a) {
          gx[problem.point_at(i + l) * D + a] = has ? lane_of(found[a], l) : std::numeric_limits<S>::quiet_NaN();
        }
      }
    }
  }

  // Gradients in centres and shapes, added, from some pairs, as in sum_features.
  void sum_kernels(const Pairs& pairs, int64_t begin, int64_t end, PairOrder pair, const RadialSums<S>& sums) const {
    const bool shapes = sums.shapes && !math::radial_ignores_shape(problem.kind, problem.shape);
    for (int64_t at = begin; at < end; ++at) {
      const uint32_t p = pair(at);
      const int64_t k = pairs.kernels[p];
      if (k < 0) continue;
      const Pack* parts = pairs.parts.data() + p / kWidth * problem.kernel_width();
      for (int a = 0; sums.centers && a < D; ++a) sums.centers[k * D + a] += lane_of(parts[a], p % kWidth);
      for (int a = 0; shapes && a < problem.shape_width; ++a) {
        sums.shapes[k * problem.shape_width + a] += lane_of(parts[D + a], p % kWidth);
      }
    }
  }

 private:
  // The kernels of a block of `points` points in some rows, -1 where a point has no value: coordinates that are not
  // finite, kernels that do not exist.
  CAMK_HD void name_kernels(const BlockRows& rows, int64_t points, const Vec<C, D>& x, int32_t* to) const {
    const int32_t* kernels[kWidth];
    for (int l = 0; l < kWidth; ++l) kernels[l] = problem.kernels_of(rows[l]);
    int64_t j = 0;
    uint32_t largest = 0;
    Words::Raw most{};
#if defined(__AVX2__)
    if constexpr (std::is_same_v<S, float>) {
      for (; j + 4 <= problem.per_point; j += 4) {
        const auto row = [&](int l) CAMK_INLINED { return reinterpret_cast<const float*>(kernels[l] + j); };
        const Vec<Floats, 4> columns = load_columns<4>(row);
        unroll<4>([&](int c) CAMK_INLINED {
          const auto column = (Words::Raw)columns[c].v;
          most = column > most ? column : most;
          memcpy(to + (j + c) * kWidth, &column, sizeof(column));
        });
      }
    }
#endif
    for (; j < problem.per_point; ++j) {
      for (int l = 0; l < kWidth; ++l) {
        to[j * kWidth + l] = kernels[l][j], largest = std::max(largest, uint32_t(kernels[l][j]));
      }
    }
    for (int l = 0; l < kLanes; ++l) largest = std::max(largest, uint32_t(most[l]));
    bool all = points == kWidth && largest < uint32_t(problem.count);
    for (int a = 0; a < D; ++a) all &= all_within(value_of(x[a]), std::numeric_limits<S>::max());
    if (!all) mark_kernels(points, x, to);
  }
  __attribute__((noinline)) void mark_kernels(int64_t points, const Vec<C, D>& x, int32_t* to) const {
    for (int l = 0; l < kWidth; ++l) {
      bool has = l < points;
      for (int a = 0; a < D; ++a) has &= std::isfinite(value_of(lane_of(x[a], l)));
      for (int64_t j = 0; j < problem.per_point; ++j) has &= uint32_t(to[j * kWidth + l]) < uint32_t(problem.count);
      for (int64_t j = 0; !has && j < problem.per_point; ++j) to[j * kWidth + l] = -1;
    }
  }

  // Addresses that are fetched in advance need not exist.
  CAMK_HD void prefetch_points(int64_t i) const {
    if (!problem.order) {
      prefetch_lines(problem.x.value + i * D, kWidth * D);
      if (problem.neighbors) prefetch_lines(problem.neighbors + i * problem.per_point, kWidth * problem.per_point);
      return;
    }
    for (int64_t end = std::min(i + kWidth, problem.points); i < end; ++i) {
      const int64_t point = problem.point_at(i);
      __builtin_prefetch(problem.x.value + point * D);
      const int32_t* kernels = problem.neighbors + point * problem.per_point;
      __builtin_prefetch(kernels);
      __builtin_prefetch(kernels + problem.per_point - 1);
    }
  }
  template <class T>
  CAMK_HD static void prefetch_lines(const T* from, int64_t count) {
    for (int64_t k = 0; k < count; k += int64_t(64 / sizeof(T))) __builtin_prefetch(from + k);
  }
  // Of a block of points the kernels number j: a few at a time, as only so many lines may be on their way (4 neighbours
  // of 20 000, a Xeon with AMX: 39 against 42 ns per point).
  CAMK_HD void prefetch_kernels(int64_t i, int64_t j) const {
    if (!problem.neighbors) return;
    const S *centers = problem.centers.value, *shapes = problem.shapes.value;
    const int64_t width = problem.shape_width;
    for (int64_t end = std::min(i + kWidth, problem.points); i < end; ++i) {
      const int64_t kernel = problem.kernels_of(problem.point_at(i))[j];
      const S* shape = shapes + kernel * width;
      __builtin_prefetch(centers + kernel * D);
      __builtin_prefetch(shape);
      if (width > 4) __builtin_prefetch(shape + width - 1);
    }
  }

  // Gradients in the weights u = scale phi of a block of points into those in phi.
  void back_to_kernels(Pairs& pairs, int64_t block) const {
    const C* u = pairs.u.data() + block * problem.per_point;
    C *gradient = pairs.gradient.data() + block * problem.per_point, of_total(0);
    if (problem.normalize && !problem.detach) {
      for (int64_t j = 0; j < problem.per_point; ++j) of_total = of_total + gradient[j] * u[j];
    }
    for (int64_t j = 0; j < problem.per_point; ++j) gradient[j] = pairs.scale[block] * (gradient[j] - of_total);
  }
};

}  // namespace

template <class N>
RadialKernels<N> radial_kernels(int dims) {
  using S = typename scalar_of<N>::type;
  using Problem = RadialProblem<S>;
  using Pairs = RadialPairs<N>;
  return with_dims(dims, []<int D>(Constant<D>) -> RadialKernels<N> {
    using Loops = RadialLoops<D, N>;
    return {[](const Problem& problem, Pairs& pairs, int64_t begin, int64_t end) {
              Loops{problem}.weigh(pairs, begin, end);
            },
            [](const Problem& problem, Pairs& pairs, int64_t begin, int64_t end, S* gx, bool kernels) {
              Loops{problem}.back_to_points(pairs, begin, end, gx, kernels);
            },
            [](const Problem& problem, const Pairs& pairs, int64_t begin, int64_t end, PairOrder pair,
               const RadialSums<S>& sums) { Loops{problem}.sum_kernels(pairs, begin, end, pair, sums); }};
  });
}

template RadialKernels<float> radial_kernels(int);
template RadialKernels<double> radial_kernels(int);
template RadialKernels<Dual<float>> radial_kernels(int);
template RadialKernels<Dual<double>> radial_kernels(int);

}  // namespace camk::cpu
