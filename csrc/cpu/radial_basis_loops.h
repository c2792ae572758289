// SPDX-License-Identifier: MIT
// Loops of radial_basis over pairs of a point and a kernel. Kernels are computed pair by pair; what a pair adds for
// each feature goes in SIMD lanes over the features. N is the arithmetic type: a scalar S, or its dual number, with
// which the loops of the first derivatives give the second ones along a direction.
#pragma once
#include <limits>

#include "cpu/lane_functions.h"
#include "cpu/rows.h"
#include "math/radial_basis.h"

namespace camk::cpu {

// Numbers and their derivatives along the direction of the second order; null: 0.
template <class S>
struct Operand {
  const S* value = nullptr;
  const S* along = nullptr;
};

template <class N>
struct pack_of {
  using type = Lanes<N>;
};
template <class S>
struct pack_of<Dual<S>> {
  using type = Dual<Lanes<S>>;
};

template <class N, class S>
CAMK_HD N number_at(const Operand<S>& from, int64_t i) {
  if constexpr (std::is_same_v<N, S>) {
    return from.value[i];
  } else {
    return {from.value[i], from.along ? from.along[i] : S(0)};
  }
}
template <class C, class S>
CAMK_HD C pack_at(const Operand<S>& from, int64_t i) {
  if constexpr (std::is_same_v<C, Lanes<S>>) {
    return C::load(from.value + i);
  } else {
    return {Lanes<S>::load(from.value + i), from.along ? Lanes<S>::load(from.along + i) : Lanes<S>(S(0))};
  }
}

// The same number in every lane, the sum of all lanes, and the part of a number that a gradient consists of.
template <class S>
CAMK_HD Lanes<S> in_all_lanes(S x) {
  return Lanes<S>(x);
}
template <class S>
CAMK_HD Dual<Lanes<S>> in_all_lanes(Dual<S> x) {
  return {Lanes<S>(x.value), Lanes<S>(x.along)};
}
template <class S>
CAMK_HD Dual<S> sum_of_lanes(Dual<Lanes<S>> x) {
  return {sum_of_lanes(x.value), sum_of_lanes(x.along)};
}
template <class C>
CAMK_HD C gradient_of(C x) {
  return x;
}
template <class C>
CAMK_HD C gradient_of(Dual<C> x) {
  return x.along;
}

// What the loops work on. Rows of features are padded to `pitch` numbers.
template <class S>
struct RadialProblem {
  math::RadialKind kind;
  math::RadialShape shape;
  bool normalize, detach;
  S eps;
  int64_t points, count, per_point, width, pitch, keep;
  int dims, shape_width;
  Operand<S> x, centers, shapes, features, phase;
  const S* rates;                   // [pitch], as phase; their first `keep` numbers are not read
  const int32_t* neighbors;         // [points, per_point]; null: all kernels, those in `all`
  const std::vector<int32_t>& all;  // 0, 1, ...

  const int32_t* kernels_of(int64_t point) const { return neighbors ? neighbors + point * per_point : all.data(); }

  // Whether a point has a value: finite coordinates, kernels that exist.
  bool has_value(int64_t point) const {
    for (int i = 0; i < dims; ++i) {
      if (!std::isfinite(x.value[point * dims + i])) return false;
    }
    const int32_t* kernels = kernels_of(point);
    return std::all_of(kernels, kernels + per_point, [&](int32_t k) { return k >= 0 && k < count; });
  }
};

// Gradients, added to; null where they are not wanted.
template <class S>
struct RadialSums {
  S *centers = nullptr, *shapes = nullptr, *features = nullptr;  // rows as those of the problem
  bool phase = false;
};

// Pairs of consecutive points, per_point to each, and the same in the order of their kernels.
template <class N>
struct RadialPairs {
  int64_t begin = 0, end = 0;  // points
  std::vector<N> u, gradient;  // of pairs: the weight, and the gradient in it, then in phi
  std::vector<N> scale;        // of points: 1 / (sum phi + eps)
  std::vector<uint8_t> has_value;
  std::vector<int64_t> first;   // of kernels: where their pairs begin in `sorted`
  std::vector<int32_t> sorted;  // pairs
};

template <int D, class N>
struct RadialLoops {
  using S = typename scalar_of<N>::type;
  using C = typename pack_of<N>::type;
  using Pack = Lanes<S>;
  using Problem = RadialProblem<S>;
  static constexpr int kWidth = lanes_of<Pack>;

  const Problem& problem;

  math::RadialKernel<D, N> kernel(int64_t point, int64_t k) const {
    math::RadialKernel<D, N> found;
    found.kind = problem.kind, found.form = problem.shape;
    for (int i = 0; i < D; ++i) {
      found.x[i] = number_at<N>(problem.x, point * D + i);
      found.center[i] = number_at<N>(problem.centers, k * D + i);
    }
    if (math::radial_ignores_shape(problem.kind, problem.shape)) {
      found.form = math::RadialShape::kIsotropic, found.shape[0] = N(1);
    } else {
      for (int i = 0; i < problem.shape_width; ++i) {
        found.shape[i] = number_at<N>(problem.shapes, k * problem.shape_width + i);
      }
    }
    found.evaluate();
    return found;
  }

  // The weights u of a point; returns what they were multiplied by.
  N weigh(int64_t point, N* u) const {
    const int32_t* kernels = problem.kernels_of(point);
    N total(0);
    for (int64_t j = 0; j < problem.per_point; ++j) {
      u[j] = kernel(point, kernels[j]).value;
      total = total + u[j];
    }
    if (!problem.normalize) return N(1);
    const N scale = N(1) / ((problem.detach ? constant_of(total) : total) + N(problem.eps));
    for (int64_t j = 0; j < problem.per_point; ++j) u[j] = u[j] * scale;
    return scale;
  }

  // psi of the features from c on.
  CAMK_HD math::RadialWave<C> wave(C u, int64_t c) const {
    const C one = in_all_lanes(N(1)), zero = in_all_lanes(N(0));
    if (c + kWidth <= problem.keep) return {u, one, zero};
    C rate = zero;
    if constexpr (std::is_same_v<C, Pack>) {
      rate = Pack::load(problem.rates + c);
    } else {
      rate.value = Pack::load(problem.rates + c);
    }
    math::RadialWave<C> found = math::radial_wave(u, rate, pack_at<C>(problem.phase, c));
    for (int64_t k = 0; k < problem.keep - c; ++k) {
      set_lane(found.value, u, k), set_lane(found.slope, one, k), set_lane(found.phase_slope, zero, k);
    }
    return found;
  }

  // The row of the point's value, or in second order of the gradient in the cotangent of it.
  void value(int64_t point, const N* u, S* row) const {
    const int32_t* kernels = problem.kernels_of(point);
    for (int64_t c = 0; c < problem.pitch; c += kWidth) {
      Pack sum(S(0));
      for (int64_t j = 0; j < problem.per_point; ++j) {
        const C feature = pack_at<C>(problem.features, int64_t(kernels[j]) * problem.pitch + c);
        if constexpr (std::is_same_v<C, Pack>) {
          sum = multiply_add(wave(in_all_lanes(u[j]), c).value, feature, sum);
        } else {
          sum = sum + gradient_of(wave(in_all_lanes(u[j]), c).value * feature);
        }
      }
      sum.store(row + c);
    }
  }

  // Weights of the points from begin to end.
  void weigh(RadialPairs<N>& pairs, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i - pairs.begin;
      pairs.has_value[at] = problem.has_value(i);
      if (pairs.has_value[at]) pairs.scale[at] = weigh(i, pairs.u.data() + at * problem.per_point);
    }
  }

  // Sorts the pairs by kernel: those of a kernel stay in the order of the points.
  void sort(RadialPairs<N>& pairs) const {
    pairs.first.assign(problem.count + 2, 0);
    const auto each_pair = [&](const auto& body) {
      for (int64_t i = pairs.begin; i < pairs.end; ++i) {
        if (!pairs.has_value[i - pairs.begin]) continue;
        const int32_t* kernels = problem.kernels_of(i);
        for (int64_t j = 0; j < problem.per_point; ++j) body(kernels[j], (i - pairs.begin) * problem.per_point + j);
      }
    };
    each_pair([&](int32_t k, int64_t) { ++pairs.first[k + 2]; });
    for (int64_t k = 2; k < problem.count + 2; ++k) pairs.first[k] += pairs.first[k - 1];
    each_pair([&](int32_t k, int64_t pair) { pairs.sorted[pairs.first[k + 1]++] = int32_t(pair); });
  }

  // Of the kernels from begin to end: gradients in features, added, and in phases, added to the row of_phase; in the
  // weights of their pairs. g: rows of the points of the pairs.
  void sum_features(RadialPairs<N>& pairs, Rows<const S> g, int64_t begin, int64_t end, const RadialSums<S>& sums,
                    bool weights, S* of_phase) const {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t at = pairs.first[k]; at < pairs.first[k + 1]; ++at) {
        const int64_t pair = pairs.sorted[at];
        const S* row = g[pair / problem.per_point];
        const C u = in_all_lanes(pairs.u[pair]);
        C slope = in_all_lanes(N(0));
        for (int64_t c = 0; c < problem.pitch; c += kWidth) {
          const math::RadialWave<C> psi = wave(u, c);
          const Pack cotangent = Pack::load(row + c);
          if (sums.features) add(sums.features + k * problem.pitch + c, cotangent * gradient_of(psi.value));
          if (!weights && !sums.phase) continue;
          const C part = pack_at<C>(problem.features, k * problem.pitch + c) * constant(cotangent);
          if (weights) slope = slope + part * psi.slope;
          if (sums.phase) add(of_phase + c, gradient_of(part * psi.phase_slope));
        }
        if (weights) pairs.gradient[pair] = sum_of_lanes(slope);
      }
    }
  }

  // Of the points from begin to end: from the gradients in their weights those in phi, and those in x; null: not
  // wanted.
  void back_to_points(RadialPairs<N>& pairs, int64_t begin, int64_t end, S* gx) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i - pairs.begin;
      S* found = gx ? gx + i * D : nullptr;
      if (!pairs.has_value[at]) {
        if (found) std::fill(found, found + D, std::numeric_limits<S>::quiet_NaN());
        continue;
      }
      N* gradient = pairs.gradient.data() + at * problem.per_point;
      back_to_kernels(pairs.u.data() + at * problem.per_point, pairs.scale[at], gradient);
      if (!found) continue;
      const int32_t* kernels = problem.kernels_of(i);
      std::fill(found, found + D, S(0));
      for (int64_t j = 0; j < problem.per_point; ++j) {
        const auto parts = kernel(i, kernels[j]).pull_back(gradient[j]);
        for (int a = 0; a < D; ++a) found[a] += gradient_of(parts.x[a]);
      }
    }
  }

  // Of the kernels from begin to end: gradients in centres and shapes, added.
  void sum_kernels(const RadialPairs<N>& pairs, int64_t begin, int64_t end, const RadialSums<S>& sums) const {
    const bool shapes = sums.shapes && !math::radial_ignores_shape(problem.kind, problem.shape);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t at = pairs.first[k]; at < pairs.first[k + 1]; ++at) {
        const int64_t pair = pairs.sorted[at];
        const auto parts = kernel(pairs.begin + pair / problem.per_point, k).pull_back(pairs.gradient[pair]);
        for (int i = 0; sums.centers && i < D; ++i) sums.centers[k * D + i] += gradient_of(parts.center[i]);
        for (int i = 0; shapes && i < problem.shape_width; ++i) {
          sums.shapes[k * problem.shape_width + i] += gradient_of(parts.shape[i]);
        }
      }
    }
  }

 private:
  CAMK_HD static void add(S* to, Pack more) { (Pack::load(to) + more).store(to); }

  CAMK_HD static C constant(Pack x) {
    if constexpr (std::is_same_v<C, Pack>) {
      return x;
    } else {
      return {x, Pack(S(0))};
    }
  }

  CAMK_HD static void set_lane(C& to, const C& from, int64_t k) {
    if constexpr (std::is_same_v<C, Pack>) {
      to.v[k] = from.v[k];
    } else {
      to.value.v[k] = from.value.v[k], to.along.v[k] = from.along.v[k];
    }
  }

  // Gradients in the weights u = scale phi of a point into those in phi.
  void back_to_kernels(const N* u, N scale, N* gradient) const {
    N of_total(0);
    if (problem.normalize && !problem.detach) {
      for (int64_t j = 0; j < problem.per_point; ++j) of_total = of_total + gradient[j] * u[j];
    }
    for (int64_t j = 0; j < problem.per_point; ++j) gradient[j] = scale * (gradient[j] - of_total);
  }
};

// body(Constant<D>) for a number of axes.
template <class Body>
void with_radial_dims(int dims, const Body& body) {
  switch (dims) {
    case 1:
      return body(Constant<1>{});
    case 2:
      return body(Constant<2>{});
    case 3:
      return body(Constant<3>{});
    default:
      return body(Constant<4>{});
  }
}

}  // namespace camk::cpu
