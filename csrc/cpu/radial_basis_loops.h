// SPDX-License-Identifier: MIT
// Loops of radial_basis over pairs of a point and a kernel. Weights are computed for a pack of points at a time, what a
// pair adds for each feature in packs of features. N is the arithmetic type: a scalar S, or its dual number, with which
// the loops of the first derivatives give the second ones along a direction.
#pragma once
#include <limits>

#include "cpu/radial_basis_packs.h"

namespace camk::cpu {

// What the loops work on. Rows of features are padded to `pitch` numbers.
template <class S>
struct RadialProblem {
  math::RadialKind kind;
  math::RadialShape shape;
  bool normalize, detach;
  S eps, fast_below;  // fast_below: weights below it have phases within the bound of the fast waves
  int64_t points, count, per_point, width, pitch, keep;
  int dims, shape_width;
  Operand<S> x, centers, shapes, features, phase;
  const S* rates;                   // [pitch], as phase; their first `keep` numbers are not read
  const int32_t* neighbors;         // [points, per_point]; null: all kernels, those in `all`
  const std::vector<int32_t>& all;  // 0, 1, ...
  const int32_t* order;             // [points], in which points are taken; null: their own

  int64_t point_at(int64_t i) const { return order ? order[i] : i; }
  const int32_t* kernels_of(int64_t point) const { return neighbors ? neighbors + point * per_point : all.data(); }
};

// Gradients, added to; null where they are not wanted.
template <class S>
struct RadialSums {
  S *centers = nullptr, *shapes = nullptr, *features = nullptr;  // rows as those of the problem
  bool phase = false;
};

// The pairs of points that are taken one after the other, in blocks of as many as a pack has lanes: pair (i, j) is lane
// i % lanes of pack i / lanes * per_point + j.
template <class N>
struct RadialPairs {
  using C = typename pack_of<N>::type;
  using Pack = Lanes<typename scalar_of<N>::type>;
  static constexpr int kWidth = lanes_of<Pack>;

  int64_t begin = 0, end = 0;    // points
  std::vector<int32_t> kernels;  // -1 where the point has no value
  std::vector<C> u, gradient;    // the weight, and the gradient in it, then in phi
  std::vector<C> scale;          // of blocks: 1 / (sum phi + eps)
  std::vector<uint8_t> within;   // of blocks: whether all phases are within the bound of the fast waves
  std::vector<Pack> parts;       // of packs: the gradients in centres and shapes, number by number
  Binned pieces;                 // the pairs by the pieces of their kernels

  RadialPairs(int64_t points, int64_t per_point)
      : kernels(round_up(points, kWidth) * per_point),
        u(kernels.size() / kWidth),
        scale(round_up(points, kWidth) / kWidth),
        within(scale.size()) {}
  bool has_value(int64_t point, int64_t per_point) const {
    const int64_t at = point - begin;
    return kernels[at / kWidth * per_point * kWidth + at % kWidth] >= 0;
  }
};

// psi of a pack of features from c on. kWithin: their phases are within the bound of the fast waves.
template <class C, bool kWithin, class S>
class RadialWaves {
 public:
  using Pack = Lanes<S>;
  CAMK_HD RadialWaves(const RadialProblem<S>& problem, int64_t c)
      : kept_(problem.keep - c), rate_(Pack::load(problem.rates + c)), phase_(pack_at<C>(problem.phase, c)) {}

  CAMK_HD math::RadialWave<C> operator()(C u) const {
    const C one(1), zero(0);
    if (kept_ >= lanes_of<Pack>) return {u, one, zero};
    const C rate = constant_pack<C>(rate_);
    math::RadialWave<C> found;
    if constexpr (kWithin && std::is_same_v<C, Pack>) {
      found = math::radial_wave(rate, sine_and_cosine_within(u * rate + phase_));
    } else {
      found = math::radial_wave(u, rate, phase_);
    }
    for (int64_t k = 0; k < kept_; ++k) {
      set_lane(found.value, k, lane_of(u, k));
      set_lane(found.slope, k, lane_of(one, k)), set_lane(found.phase_slope, k, lane_of(zero, k));
    }
    return found;
  }
  // What operator() gives as value.
  CAMK_HD C value(C u) const {
    if constexpr (std::is_same_v<C, Pack>) {
      if (kept_ >= lanes_of<Pack>) return u;
      const C phase = u * rate_ + phase_;
      C found = kWithin ? sine_within(phase) : sine_of(phase);
      for (int64_t k = 0; k < kept_; ++k) set_lane(found, k, lane_of(u, k));
      return found;
    } else {
      return (*this)(u).value;
    }
  }

 private:
  int64_t kept_;
  Pack rate_;
  C phase_;
};

template <int D, class N>
struct RadialLoops {
  using S = typename scalar_of<N>::type;
  using C = typename pack_of<N>::type;
  using Pack = Lanes<S>;
  using Problem = RadialProblem<S>;
  using Pairs = RadialPairs<N>;
  static constexpr int kWidth = lanes_of<Pack>;
  // Points whose rows of features, and blocks of points whose kernels are fetched in advance.
  static constexpr int64_t kRowsAhead = 4, kPairsAhead = 16, kBlocksAhead = 2;

  const Problem& problem;

  // Numbers of a kernel's parameters.
  int kernel_width() const { return D + problem.shape_width; }

  // A block of points with one kernel each; those of points without value may be any.
  CAMK_HD math::RadialKernel<D, C> kernel(const Vec<C, D>& x, const int32_t* kernels) const {
    math::RadialKernel<D, C> found;
    found.kind = problem.kind, found.form = problem.shape, found.x = x;
    int32_t rows[kWidth];
    for (int l = 0; l < kWidth; ++l) rows[l] = std::max(kernels[l], 0);
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

  // The points from i on; the last one also in lanes behind it.
  Vec<C, D> block_of_points(int64_t i) const {
    Vec<C, D> x;
    const auto row = [&](int l) CAMK_INLINED { return problem.point_at(std::min(i + l, problem.points - 1)); };
    gather_operand<D>(problem.x, row, x.v);
    return x;
  }

  // Weights of the points from begin, the first of a block, to end.
  void weigh(Pairs& pairs, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kWidth) {
      prefetch_points(i + 3 * kBlocksAhead * kWidth);
      prefetch_kernels(i + kBlocksAhead * kWidth);
      const int64_t block = (i - pairs.begin) / kWidth, at = block * problem.per_point;
      int32_t* kernels = pairs.kernels.data() + at * kWidth;
      const Vec<C, D> x = block_of_points(i);
      name_kernels(i, std::min<int64_t>(kWidth, end - i), x, kernels);
      C total(0);
      for (int64_t j = 0; j < problem.per_point; ++j) {
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

  // The row of a point's value, or in second order of the gradient in the cotangent of it.
  void value(const Pairs& pairs, int64_t point, S* row) const {
    prefetch_rows_of(point + kRowsAhead);
    if (!pairs.has_value(point, problem.per_point)) {
      std::fill(row, row + problem.pitch, std::numeric_limits<S>::quiet_NaN());
    } else if (pairs.within[(point - pairs.begin) / kWidth]) {
      value<true>(pairs, point, row);
    } else {
      value<false>(pairs, point, row);
    }
  }

  // Gradients in features, added, and in phases, added to of_phase, from some pairs; those in the weights of the pairs.
  // g(point): the row of its cotangent. pair(at): a pair; its kernel must not be another thread's.
  template <class Row, class Pair>
  void sum_features(Pairs& pairs, int64_t begin, int64_t end, const Pair& pair, const Row& g, const RadialSums<S>& sums,
                    bool weights, S* of_phase) const {
    for (int64_t at = begin; at < end; ++at) {
      if (at + kPairsAhead < end) prefetch_pair(pairs, pair(at + kPairsAhead), g, sums, weights || sums.phase);
      const uint32_t p = pair(at);
      const int64_t k = pairs.kernels[p];
      if (k < 0) continue;
      const S* row = g(point_of(pairs, p));
      const C u = in_all_lanes(lane_of(pairs.u[p / kWidth], p % kWidth));
      const bool within = pairs.within[p / block()];
      if (!weights && !sums.phase) {
        within ? add_features<true>(k, u, row, sums.features) : add_features<false>(k, u, row, sums.features);
        continue;
      }
      const N slope =
          within ? add_slopes<true>(k, u, row, sums, of_phase) : add_slopes<false>(k, u, row, sums, of_phase);
      if (weights) set_lane(pairs.gradient[p / kWidth], p % kWidth, slope);
    }
  }

  // Of the points from begin, the first of a block, to end: from the gradients in their weights those in x, unless
  // null, and if wanted the parts of those in kernels.
  void back_to_points(Pairs& pairs, int64_t begin, int64_t end, S* gx, bool kernels) const {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int64_t block = (i - pairs.begin) / kWidth, at = block * problem.per_point;
      back_to_kernels(pairs, block);
      const Vec<C, D> x = block_of_points(i);
      Vec<Pack, D> found{};
      for (int64_t j = 0; j < problem.per_point; ++j) {
        const auto parts = kernel(x, pairs.kernels.data() + (at + j) * kWidth).pull_back(pairs.gradient[at + j]);
        for (int a = 0; a < D; ++a) found[a] = found[a] + gradient_of(parts.x[a]);
        if (!kernels) continue;
        Pack* to = pairs.parts.data() + (at + j) * kernel_width();
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
  template <class Pair>
  void sum_kernels(const Pairs& pairs, int64_t begin, int64_t end, const Pair& pair, const RadialSums<S>& sums) const {
    const bool shapes = sums.shapes && !math::radial_ignores_shape(problem.kind, problem.shape);
    for (int64_t at = begin; at < end; ++at) {
      const uint32_t p = pair(at);
      const int64_t k = pairs.kernels[p];
      if (k < 0) continue;
      const Pack* parts = pairs.parts.data() + p / kWidth * kernel_width();
      for (int a = 0; sums.centers && a < D; ++a) sums.centers[k * D + a] += lane_of(parts[a], p % kWidth);
      for (int a = 0; shapes && a < problem.shape_width; ++a) {
        sums.shapes[k * problem.shape_width + a] += lane_of(parts[D + a], p % kWidth);
      }
    }
  }

 private:
  template <bool kWithin>
  using Waves = RadialWaves<C, kWithin, S>;

  CAMK_HD static void add(S* to, Pack more) { (Pack::load(to) + more).store(to); }

  template <bool kWithin>
  void value(const Pairs& pairs, int64_t point, S* row) const {
    const int64_t pitch = problem.pitch, per_point = problem.per_point, lane = (point - pairs.begin) % kWidth;
    const int64_t at = (point - pairs.begin) / kWidth * per_point;
    const int32_t* kernels = pairs.kernels.data() + at * kWidth + lane;
    const C* u = pairs.u.data() + at;
    for (int64_t c = 0; c < pitch; c += kWidth) {
      const Waves<kWithin> waves(problem, c);
      Pack sum(S(0));
      for (int64_t j = 0; j < per_point; ++j) {
        const C feature = pack_at<C>(problem.features, kernels[j * kWidth] * pitch + c);
        sum = sum + gradient_of(waves.value(in_all_lanes(lane_of(u[j], lane))) * feature);
      }
      sum.store(row + c);
    }
  }

  template <bool kWithin>
  CAMK_HD void add_features(int64_t k, C u, const S* row, S* sums) const {
    const int64_t pitch = problem.pitch;
    for (int64_t c = 0; c < pitch; c += kWidth) {
      add(sums + k * pitch + c, Pack::load(row + c) * gradient_of(Waves<kWithin>(problem, c).value(u)));
    }
  }

  // Returns the gradient in u.
  template <bool kWithin>
  CAMK_HD N add_slopes(int64_t k, C u, const S* row, const RadialSums<S>& sums, S* of_phase) const {
    const int64_t pitch = problem.pitch;
    C slope(0);
    for (int64_t c = 0; c < pitch; c += kWidth) {
      const math::RadialWave<C> psi = Waves<kWithin>(problem, c)(u);
      const Pack cotangent = Pack::load(row + c);
      if (sums.features) add(sums.features + k * pitch + c, cotangent * gradient_of(psi.value));
      const C part = pack_at<C>(problem.features, k * pitch + c) * constant_pack<C>(cotangent);
      slope = slope + part * psi.slope;
      if (sums.phase) add(of_phase + c, gradient_of(part * psi.phase_slope));
    }
    return sum_of_lanes(slope);
  }

  // Pairs of a block of points, and the point of a pair.
  CAMK_HD uint32_t block() const { return uint32_t(problem.per_point * kWidth); }
  CAMK_HD int64_t point_of(const Pairs& pairs, uint32_t p) const {
    return pairs.begin + p / block() * kWidth + p % kWidth;
  }

  // The kernels of a block of `points` points from i on, -1 where a point has no value: coordinates that are not
  // finite, kernels that do not exist.
  CAMK_HD void name_kernels(int64_t i, int64_t points, const Vec<C, D>& x, int32_t* to) const {
    const int64_t pairs = problem.per_point * kWidth;
    for (int l = 0; l < kWidth; ++l) {
      const int32_t* kernels = problem.kernels_of(problem.point_at(i + std::min<int64_t>(l, points - 1)));
      for (int64_t j = 0; j < problem.per_point; ++j) to[j * kWidth + l] = kernels[j];
    }
    int32_t has_value[kWidth];  // all bits or none
    for (int l = 0; l < kWidth; ++l) has_value[l] = -int32_t(l < points);
    for (int a = 0; a < D; ++a) {
      for (int l = 0; l < kWidth; ++l) has_value[l] &= -int32_t(std::isfinite(value_of(lane_of(x[a], l))));
    }
    for (int64_t p = 0; p < pairs; p += kWidth) {
      for (int l = 0; l < kWidth; ++l) has_value[l] &= -int32_t(uint32_t(to[p + l]) < uint32_t(problem.count));
    }
    for (int64_t p = 0; p < pairs; p += kWidth) {
      for (int l = 0; l < kWidth; ++l) to[p + l] |= ~has_value[l];
    }
  }

  // Addresses that are fetched in advance need not exist.
  CAMK_HD void prefetch_points(int64_t i) const {
    if (!problem.order) return;
    for (int64_t end = std::min(i + kWidth, problem.points); i < end; ++i) {
      const int64_t point = problem.point_at(i);
      __builtin_prefetch(problem.x.value + point * D);
      const int32_t* kernels = problem.neighbors + point * problem.per_point;
      __builtin_prefetch(kernels);
      __builtin_prefetch(kernels + problem.per_point - 1);
    }
  }
  CAMK_HD void prefetch_kernels(int64_t i) const {
    if (!problem.neighbors) return;
    for (int64_t end = std::min(i + kWidth, problem.points); i < end; ++i) {
      const int32_t* kernels = problem.kernels_of(problem.point_at(i));
      for (int64_t j = 0; j < problem.per_point; ++j) {
        __builtin_prefetch(problem.centers.value + int64_t(kernels[j]) * D);
        __builtin_prefetch(problem.shapes.value + int64_t(kernels[j]) * problem.shape_width);
      }
    }
  }
  CAMK_HD void prefetch_row(const S* table, int64_t k) const {
    for (int64_t c = 0; c < problem.pitch; c += int64_t(64 / sizeof(S)))
      __builtin_prefetch(table + k * problem.pitch + c);
  }
  template <class Row>
  CAMK_HD void prefetch_pair(const Pairs& pairs, uint32_t p, const Row& g, const RadialSums<S>& sums,
                             bool features) const {
    const int64_t k = pairs.kernels[p];
    if (k < 0) return;
    prefetch_row(g(point_of(pairs, p)), 0);
    if (sums.features) prefetch_row(sums.features, k);
    if (features) prefetch_row(problem.features.value, k);
  }
  CAMK_HD void prefetch_rows_of(int64_t i) const {
    if (!problem.neighbors || i >= problem.points) return;
    const int32_t* kernels = problem.kernels_of(problem.point_at(i));
    for (int64_t j = 0; j < problem.per_point; ++j) prefetch_row(problem.features.value, kernels[j]);
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

}  // namespace camk::cpu
