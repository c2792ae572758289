// SPDX-License-Identifier: MIT
// What pairs of a point and a kernel add for each feature, in packs of features: rows of values and gradients.
#pragma once
#include <limits>

#include "cpu/radial_basis_pairs.h"

namespace camk::cpu {

// Of some features, how psi is found.
enum class Waves {
  kNone,  // all are kept as they are: psi(u) = u
  kFast,  // none is, and all phases are within the bound of the fast waves
  kAny
};

// psi of a pack of features from c on.
template <class C, Waves kWaves, class S>
class RadialWaves {
 public:
  using Pack = Lanes<S>;
  RadialWaves() = default;
  CAMK_HD RadialWaves(const RadialProblem<S>& problem, int64_t c)
      : kept_(problem.keep - c), rate_(Pack::load(problem.rates + c)), phase_(pack_at<C>(problem.phase, c)) {}

  CAMK_HD math::RadialWave<C> operator()(C u) const {
    const C one(1), zero(0), rate = constant_pack<C>(rate_);
    if constexpr (kWaves == Waves::kNone) {
      return {u, one, zero};
    } else if constexpr (kWaves == Waves::kFast) {
      return math::radial_wave(rate, sine_and_cosine_within(u * rate + phase_));
    } else {
      const math::RadialWave<C> found = math::radial_wave(u, rate, phase_);
      const C lane = constant_pack<C>(lane_numbers<S>()), kept = constant_pack<C>(Pack(S(kept_)));
      return {choose_below(lane, kept, u, found.value), choose_below(lane, kept, one, found.slope),
              choose_below(lane, kept, zero, found.phase_slope)};
    }
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
  // the cotangents of them. row(point): where; far: past the caches.
  template <class Row>
  void values(const Pairs& pairs, int64_t begin, int64_t end, const Row& row, bool far) const {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int64_t last = std::min(i + kWidth, end);
      with_waves(pairs.within[(i - pairs.begin) / kWidth],
                 [&](int64_t c, const auto& waves) CAMK_INLINED { values(pairs, i, last, c, waves, row, far); });
      for (int64_t k = i; k < last; ++k) {
        if (pairs.has_value(k, problem_.per_point)) continue;
        std::fill(row(k), row(k) + problem_.pitch, std::numeric_limits<S>::quiet_NaN());
      }
    }
  }

  // Gradients in features, added, and in phases, added to of_phase, from some pairs; those in the weights of the pairs.
  // g(point): the row of its cotangent. pair(at): a pair; its kernel must not be another thread's. Without a list of
  // them these are all pairs.
  template <class Row>
  void sum_features(Pairs& pairs, int64_t begin, int64_t end, PairOrder pair, const Row& g, const RadialSums<S>& sums,
                    bool weights, S* of_phase) const {
    const auto sum = [&]<int kSlopes>(Constant<kSlopes>) CAMK_INLINED {
      pair.sorted ? sum_listed<kSlopes>(pairs, begin, end, pair, g, sums, weights, of_phase)
                  : sum_all<kSlopes>(pairs, g, sums, weights, of_phase);
    };
    weights || sums.phase ? sum(Constant<true>{}) : sum(Constant<false>{});
  }

 private:
  static constexpr int kWidth = lanes_of<Pack>;
  // Points whose rows of features are fetched in advance; pairs, whose rows are; pairs of a group, whose rows are.
  static constexpr int64_t kRowsAhead = 8, kPairsAhead = 48, kGroup = 32;

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
    N gradients[kGroup];  // in their weights
  };

  // body(c, waves) for all features: some packs of them from c on at a time.
  template <class Body>
  CAMK_HD void with_waves(bool within, const Body& body) const {
    int64_t c = 0;
    for (; c + 2 * kWidth <= problem_.pitch; c += 2 * kWidth) with_packs<2>(within, c, body);
    if (c < problem_.pitch) with_packs<1>(within, c, body);
  }
  template <int kPacks, class Body>
  CAMK_HD void with_packs(bool within, int64_t c, const Body& body) const {
    if (problem_.keep >= c + kPacks * kWidth) return body(c, waves_from<Waves::kNone, kPacks>(c));
    if constexpr (std::is_same_v<C, Pack>) {  // there are no fast waves of dual numbers
      if (within && problem_.keep <= c) return body(c, waves_from<Waves::kFast, kPacks>(c));
    }
    body(c, waves_from<Waves::kAny, kPacks>(c));
  }
  template <Waves kWaves, int kPacks>
  CAMK_HD Vec<RadialWaves<C, kWaves, S>, kPacks> waves_from(int64_t c) const {
    Vec<RadialWaves<C, kWaves, S>, kPacks> found;
    unroll<kPacks>([&](int i) CAMK_INLINED { found[i] = {problem_, c + i * kWidth}; });
    return found;
  }

  CAMK_HD static Operand<S> from(const Operand<S>& operand, int64_t c) {
    return {operand.value + c, operand.along ? operand.along + c : nullptr};
  }
  CAMK_HD static void add(S* to, Pack more) { (Pack::load(to) + more).store(to); }

  // Of a block of points, the features of some packs from c on.
  template <class Wave, int kPacks, class Row>
  CAMK_HD void values(const Pairs& pairs, int64_t begin, int64_t end, int64_t c, const Vec<Wave, kPacks>& waves,
                      const Row& row, bool far) const {
    const int64_t pitch = problem_.pitch, per_point = problem_.per_point;
    const int64_t at = (begin - pairs.begin) / kWidth * per_point;
    const int32_t* kernels = pairs.kernels.data() + at * kWidth;
    const C* u = pairs.u.data() + at;
    const Operand<S> features = from(problem_.features, c);
    for (int64_t l = 0; l < end - begin; ++l) {
      prefetch_features(begin + l + kRowsAhead, c, waves);
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
      unroll<kPacks>([&](int i)
                         CAMK_INLINED { far ? sum[i].store_far(to + i * kWidth) : sum[i].store(to + i * kWidth); });
    }
  }

  // What a pair with the weight u adds for some packs of features to their sums, unless null, and of_phase, unless
  // null; the gradient in u, to be summed over the lanes. g, features, sums and of_phase begin with the first of these
  // packs, row is where the kernel's begin in features and sums.
  template <bool kSlopes, class Wave, int kPacks>
  CAMK_HD static C add_pair(C u, const S* g, int64_t row, const Vec<Wave, kPacks>& waves, const Operand<S>& features,
                            S* sums, S* of_phase) {
    C slope(0);
    unroll<kPacks>([&](int i) CAMK_INLINED {
      const math::RadialWave<C> psi = waves[i](u);
      const Pack cotangent = Pack::load(g + i * kWidth);
      if (sums) add(sums + row + i * kWidth, cotangent * gradient_of(psi.value));
      if constexpr (kSlopes) {
        const C part = pack_at<C>(features, row + i * kWidth) * constant_pack<C>(cotangent);
        slope = multiply_add(part, psi.slope, slope);
        if (of_phase) add(of_phase + i * kWidth, gradient_of(part * psi.phase_slope));
      }
    });
    return slope;
  }

  // sum_features of all pairs, a block of points at a time.
  template <bool kSlopes, class Row>
  void sum_all(Pairs& pairs, const Row& g, const RadialSums<S>& sums, bool weights, S* of_phase) const {
    for (int64_t i = pairs.begin, at = 0; i < pairs.end; i += kWidth, at += problem_.per_point) {
      const S* rows[kWidth];
      for (int64_t l = 0; l < kWidth; ++l) rows[l] = g(std::min(i + l, pairs.end - 1));
      if (weights) std::fill_n(pairs.gradient.data() + at, problem_.per_point, C(0));
      with_waves(pairs.within[(i - pairs.begin) / kWidth], [&](int64_t c, const auto& waves) CAMK_INLINED {
        for (int64_t k = i + kWidth; k < std::min(i + 2 * kWidth, pairs.end); ++k) prefetch(g(k) + c, waves);
        S *const to = sums.features ? sums.features + c : nullptr, *const phase = sums.phase ? of_phase + c : nullptr;
        for (int64_t j = at; j < at + problem_.per_point; ++j) {
          const C gradient = add_pack<kSlopes>(pairs, j, rows, c, waves, to, phase);
          if (weights) pairs.gradient[j] = pairs.gradient[j] + gradient;
        }
      });
    }
  }
  // add_pair for a pack of pairs, whose points' cotangents are in some rows; the gradient in their weights.
  template <bool kSlopes, class Wave, int kPacks>
  CAMK_HD C add_pack(const Pairs& pairs, int64_t pack, const S* const* rows, int64_t c, const Vec<Wave, kPacks>& waves,
                     S* sums, S* of_phase) const {
    const Operand<S> features = from(problem_.features, c);
    const int64_t pitch = problem_.pitch, last = int64_t(pairs.kernels.size()) - 1;
    C slopes[kWidth]{};
    for (int64_t l = 0; l < kWidth; ++l) {
      const int64_t p = pack * kWidth + l, coming = pairs.kernels[std::min(p + kPairsAhead, last)] * pitch;
      if (sums) prefetch(sums + coming, waves);
      if (kSlopes) prefetch(features.value + coming, waves);
      const int64_t kernel = pairs.kernels[p];
      if (kernel < 0) continue;
      const C u = in_all_lanes(lane_of(pairs.u[pack], l));
      slopes[l] = add_pair<kSlopes>(u, rows[l] + c, kernel * pitch, waves, features, sums, of_phase);
    }
    return kSlopes ? sums_of_lanes(slopes) : C(0);
  }

  // sum_features of listed pairs: while a group is summed, the rows of the next are fetched.
  template <bool kSlopes, class Row>
  void sum_listed(Pairs& pairs, int64_t begin, int64_t end, PairOrder pair, const Row& g, const RadialSums<S>& sums,
                  bool weights, S* of_phase) const {
    Group groups[2];
    int64_t at = begin;
    for (int turn = 0; at < end || groups[turn].count > 0; turn = 1 - turn) {
      Group &next = groups[1 - turn], &group = groups[turn];
      next.count = 0, next.within = true;
      for (; at < end && next.count < kGroup; ++at) list(pairs, pair(at), g, next);
      with_waves(group.within, [&](int64_t c, const auto& waves) CAMK_INLINED {
        const Operand<S> features = from(problem_.features, c);
        S* const to = sums.features ? sums.features + c : nullptr;
        for (int64_t n = 0; n < next.count; ++n) {
          prefetch(next.pairs[n].g + c, waves);
          if (to) prefetch(to + next.pairs[n].row, waves);
          if (kSlopes) prefetch(features.value + next.pairs[n].row, waves);
        }
        for (int64_t n = 0; n < group.count; ++n) {
          const Listed& listed = group.pairs[n];
          const C slope = add_pair<kSlopes>(in_all_lanes(listed.u), listed.g + c, listed.row, waves, features, to,
                                            sums.phase ? of_phase + c : nullptr);
          if (weights) group.gradients[n] = group.gradients[n] + sum_of_lanes(slope);
        }
      });
      for (int64_t n = 0; weights && n < group.count; ++n) {
        const uint32_t p = group.pairs[n].number;
        set_lane(pairs.gradient[p / kWidth], p % kWidth, group.gradients[n]);
      }
    }
  }
  // Adds a pair to a group, unless its point has no value.
  template <class Row>
  CAMK_HD void list(const Pairs& pairs, uint32_t pair, const Row& g, Group& to) const {
    const int64_t kernel = pairs.kernels[pair];
    if (kernel < 0) return;
    const uint32_t block = pair / pairs.block, lane = pair % kWidth;
    to.within &= pairs.within[block] != 0;
    to.gradients[to.count] = N(0);
    to.pairs[to.count++] = {g(pairs.begin + int64_t(block) * kWidth + lane), kernel * problem_.pitch,
                            lane_of(pairs.u[pair / kWidth], lane), pair};
  }

  // As many packs of a row as there are waves; it need not exist.
  template <class Wave, int kPacks>
  CAMK_HD static void prefetch(const S* row, const Vec<Wave, kPacks>&) {
    constexpr int kLine = 64 / sizeof(S), kLines = (kPacks * kWidth + kLine - 1) / kLine;
    unroll<kLines>([&](int line) CAMK_INLINED { __builtin_prefetch(row + line * kLine); });
  }
  // Those of the features of a point's kernels, from c on.
  template <class Wave, int kPacks>
  CAMK_HD void prefetch_features(int64_t i, int64_t c, const Vec<Wave, kPacks>& waves) const {
    if (!problem_.neighbors || i >= problem_.points) return;
    const int32_t* kernels = problem_.kernels_of(problem_.point_at(i));
    const S* features = problem_.features.value + c;
    const int64_t pitch = problem_.pitch, per_point = problem_.per_point;
    for (int64_t j = 0; j < per_point; ++j) prefetch(features + kernels[j] * pitch, waves);
  }

  const RadialProblem<S>& problem_;
};

}  // namespace camk::cpu
