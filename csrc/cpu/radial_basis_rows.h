// SPDX-License-Identifier: MIT
// What pairs of a point and a kernel add for each feature, in packs of features: rows of values and gradients.
#pragma once
#include <limits>

#include "cpu/radial_basis_pairs.h"

namespace camk::cpu {

// psi of a pack of features from c on. kWithin: their phases are within the bound of the fast waves.
template <class C, bool kWithin, class S>
class RadialWaves {
 public:
  using Pack = Lanes<S>;
  RadialWaves() = default;
  CAMK_HD RadialWaves(const RadialProblem<S>& problem, int64_t c)
      : kept_(problem.keep - c), rate_(Pack::load(problem.rates + c)), phase_(pack_at<C>(problem.phase, c)) {}

  CAMK_HD math::RadialWave<C> operator()(C u) const {
    const C one(1), zero(0);
    if (kept_ >= lanes_of<Pack>) return {u, one, zero};
    const C rate = constant_pack<C>(rate_);
    math::RadialWave<C> found;
    if constexpr (kWithin) {
      found = math::radial_wave(rate, sine_and_cosine_within(u * rate + phase_));
    } else {
      found = math::radial_wave(u, rate, phase_);
    }
    if (kept_ <= 0) return found;
    const C lane = constant_pack<C>(lane_numbers<S>()), kept = constant_pack<C>(Pack(S(kept_)));
    return {choose_below(lane, kept, u, found.value), choose_below(lane, kept, one, found.slope),
            choose_below(lane, kept, zero, found.phase_slope)};
  }

 private:
  int64_t kept_;
  Pack rate_;
  C phase_;
};

template <class N>
class RadialRows {
 public:
  using S = typename scalar_of<N>::type;
  using C = typename pack_of<N>::type;
  using Pack = Lanes<S>;
  using Pairs = RadialPairs<N>;

  explicit RadialRows(const RadialProblem<S>& problem) : problem_(problem) {}

  // The rows of the values of points from begin, the first of a block, to end, or in second order of the gradients in
  // the cotangents of them. row(point): where.
  template <class Row>
  void values(const Pairs& pairs, int64_t begin, int64_t end, const Row& row) const {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int64_t last = std::min(i + kWidth, end);
      with_waves(pairs.within[(i - pairs.begin) / kWidth],
                 [&](int64_t c, const auto& waves) CAMK_INLINED { values(pairs, i, last, c, waves, row); });
      for (int64_t k = i; k < last; ++k) {
        if (pairs.has_value(k, problem_.per_point)) continue;
        std::fill(row(k), row(k) + problem_.pitch, std::numeric_limits<S>::quiet_NaN());
      }
    }
  }

  // Gradients in features, added, and in phases, added to of_phase, from some pairs; those in the weights of the pairs.
  // g(point): the row of its cotangent. pair(at): a pair; its kernel must not be another thread's.
  template <class Row>
  void sum_features(Pairs& pairs, int64_t begin, int64_t end, PairOrder pair, const Row& g, const RadialSums<S>& sums,
                    bool weights, S* of_phase) const {
    const bool slopes = weights || sums.phase;
    Group groups[2];  // while one is summed, the rows of the other are fetched
    int64_t at = begin;
    for (int turn = 0; at < end || groups[turn].count > 0; turn = 1 - turn) {
      Group &next = groups[1 - turn], &group = groups[turn];
      next.count = 0, next.within = true;
      for (; at < end && next.count < kGroup; ++at) list(pairs, pair(at), g, next);
      with_waves(group.within, [&](int64_t c, const auto& waves) CAMK_INLINED {
        prefetch(next, c, waves, sums, slopes);
        slopes ? add_slopes(group, c, waves, sums, of_phase) : add_features(group, c, waves, sums.features);
      });
      for (int64_t n = 0; weights && n < group.count; ++n) {
        const uint32_t p = group.pairs[n].number;
        set_lane(pairs.gradient[p / kWidth], p % kWidth, sum_of_lanes(group.slopes[n]));
      }
    }
  }

 private:
  static constexpr int kWidth = lanes_of<Pack>;
  // Points whose rows of features are fetched in advance; pairs of a group, whose rows are.
  static constexpr int64_t kRowsAhead = 4, kGroup = 32;

  template <bool kWithin, int kPacks>
  using Waves = Vec<RadialWaves<C, kWithin, S>, kPacks>;

  struct Listed {
    const S* g;   // the row of its point's cotangent
    int64_t row;  // where that of its kernel begins
    N u;
    uint32_t number;
  };
  // Some pairs of points that have a value.
  struct Group {
    int64_t count = 0;
    bool within = true;
    Listed pairs[kGroup];
    C slopes[kGroup];  // the gradient in u, to be summed over the lanes
  };

  // body(c, waves) for all features: some packs of them from c on at a time.
  template <class Body>
  CAMK_HD void with_waves(bool within, const Body& body) const {
    if constexpr (std::is_same_v<C, Pack>) {  // there are no fast waves of dual numbers
      if (within) return with_waves<true>(body);
    }
    with_waves<false>(body);
  }
  template <bool kWithin, class Body>
  void with_waves(const Body& body) const {
    int64_t c = 0;
    for (; c + 2 * kWidth <= problem_.pitch; c += 2 * kWidth) body(c, waves_from<kWithin, 2>(c));
    if (c < problem_.pitch) body(c, waves_from<kWithin, 1>(c));
  }
  template <bool kWithin, int kPacks>
  CAMK_HD Waves<kWithin, kPacks> waves_from(int64_t c) const {
    Waves<kWithin, kPacks> found;
    unroll<kPacks>([&](int i) CAMK_INLINED { found[i] = {problem_, c + i * kWidth}; });
    return found;
  }

  CAMK_HD static Operand<S> from(const Operand<S>& operand, int64_t c) {
    return {operand.value + c, operand.along ? operand.along + c : nullptr};
  }
  CAMK_HD static void add(S* to, Pack more) { (Pack::load(to) + more).store(to); }

  // Of a block of points, the features of some packs from c on.
  template <class Waves, int kPacks, class Row>
  CAMK_HD void values(const Pairs& pairs, int64_t begin, int64_t end, int64_t c, const Vec<Waves, kPacks>& waves,
                      const Row& row) const {
    const int64_t pitch = problem_.pitch, per_point = problem_.per_point;
    const int64_t at = (begin - pairs.begin) / kWidth * per_point;
    const int32_t* kernels = pairs.kernels.data() + at * kWidth;
    const C* u = pairs.u.data() + at;
    const Operand<S> features = from(problem_.features, c);
    for (int64_t l = 0; l < end - begin; ++l) {
      prefetch_features<kPacks>(begin + l + kRowsAhead, c);
      Vec<Pack, kPacks> sum;
      unroll<kPacks>([&](int i) CAMK_INLINED { sum[i] = Pack(S(0)); });
      for (int64_t j = 0; j < per_point; ++j) {
        const C weight = in_all_lanes(lane_of(u[j], l));
        const int64_t kernel = std::max(kernels[j * kWidth + l], 0) * pitch;
        unroll<kPacks>([&](int i) CAMK_INLINED {
          sum[i] = sum[i] + gradient_of(waves[i](weight).value * pack_at<C>(features, kernel + i * kWidth));
        });
      }
      S* to = row(begin + l) + c;
      unroll<kPacks>([&](int i) CAMK_INLINED { sum[i].store(to + i * kWidth); });
    }
  }

  // Adds a pair to a group, unless its point has no value.
  template <class Row>
  CAMK_HD void list(const Pairs& pairs, uint32_t pair, const Row& g, Group& to) const {
    const int64_t kernel = pairs.kernels[pair];
    if (kernel < 0) return;
    const uint32_t block = pair / pairs.block, lane = pair % kWidth;
    to.within &= pairs.within[block] != 0;
    to.slopes[to.count] = C(0);
    to.pairs[to.count++] = {g(pairs.begin + int64_t(block) * kWidth + lane), kernel * problem_.pitch,
                            lane_of(pairs.u[pair / kWidth], lane), pair};
  }

  template <class Waves, int kPacks>
  CAMK_HD void prefetch(const Group& group, int64_t c, const Vec<Waves, kPacks>&, const RadialSums<S>& sums,
                        bool features) const {
    const S *values = problem_.features.value + c, *gradients = sums.features + c;
    for (int64_t n = 0; n < group.count; ++n) {
      const Listed& pair = group.pairs[n];
      prefetch<kPacks>(pair.g + c);
      if (sums.features) prefetch<kPacks>(gradients + pair.row);
      if (features) prefetch<kPacks>(values + pair.row);
    }
  }

  template <class Waves, int kPacks>
  CAMK_HD void add_features(const Group& group, int64_t c, const Vec<Waves, kPacks>& waves, S* sums) const {
    for (int64_t n = 0; n < group.count; ++n) {
      const Listed& pair = group.pairs[n];
      const C u = in_all_lanes(pair.u);
      const S* g = pair.g + c;
      S* to = sums + pair.row + c;
      unroll<kPacks>([&](int i) CAMK_INLINED {
        add(to + i * kWidth, Pack::load(g + i * kWidth) * gradient_of(waves[i](u).value));
      });
    }
  }

  template <class Waves, int kPacks>
  CAMK_HD void add_slopes(Group& group, int64_t c, const Vec<Waves, kPacks>& waves, const RadialSums<S>& sums,
                          S* of_phase) const {
    const Operand<S> features = from(problem_.features, c);
    for (int64_t n = 0; n < group.count; ++n) {
      const Listed& pair = group.pairs[n];
      const C u = in_all_lanes(pair.u);
      C slope = group.slopes[n];
      unroll<kPacks>([&](int i) CAMK_INLINED {
        const math::RadialWave<C> psi = waves[i](u);
        const Pack g = Pack::load(pair.g + c + i * kWidth);
        if (sums.features) add(sums.features + pair.row + c + i * kWidth, g * gradient_of(psi.value));
        const C part = pack_at<C>(features, pair.row + i * kWidth) * constant_pack<C>(g);
        slope = slope + part * psi.slope;
        if (sums.phase) add(of_phase + c + i * kWidth, gradient_of(part * psi.phase_slope));
      });
      group.slopes[n] = slope;
    }
  }

  // Some packs of a row, which need not exist.
  template <int kPacks>
  CAMK_HD static void prefetch(const S* row) {
    constexpr int kLine = 64 / sizeof(S), kLines = (kPacks * kWidth + kLine - 1) / kLine;
    unroll<kLines>([&](int line) CAMK_INLINED { __builtin_prefetch(row + line * kLine); });
  }
  // Those of the features of a point's kernels.
  template <int kPacks>
  CAMK_HD void prefetch_features(int64_t i, int64_t c) const {
    if (!problem_.neighbors || i >= problem_.points) return;
    const int32_t* kernels = problem_.kernels_of(problem_.point_at(i));
    const S* features = problem_.features.value + c;
    const int64_t pitch = problem_.pitch, per_point = problem_.per_point;
    for (int64_t j = 0; j < per_point; ++j) prefetch<kPacks>(features + kernels[j] * pitch);
  }

  const RadialProblem<S>& problem_;
};

}  // namespace camk::cpu
