// SPDX-License-Identifier: MIT
// One kernel of a radial basis at one point, phi(x, centre, shape), the waves of its weight, and their derivatives;
// their meaning: camkernels.reference.radial_basis. C is a scalar, a pack of lanes, or the dual number of one.
#pragma once
#include "math/dual.h"

namespace camk::math {

// Numbered as KINDS and SHAPES in python/camkernels/_radial_basis.py.
enum class RadialKind {
  kNlin,
  kIvq,
  kIvmq,
  kIvd,
  kIvc,
  kGauss,
  kSgauss2,
  kNsgauss2,
  kMarkov,
  kExpsin,
  kQd,
  kMqd,
  kPhs1,
  kPhs3,
  kVep,
  kCos
};
enum class RadialShape { kIsotropic, kDiagonal, kFull, kProjected, kSymmetric };
inline constexpr int kRadialKinds = 16, kRadialShapes = 5, kMaxRadialDims = 4;

// Numbers that describe the shape of one kernel.
CAMK_HD int radial_shape_width(RadialShape shape, int dims) {
  if (shape == RadialShape::kIsotropic) return 1;
  if (shape == RadialShape::kDiagonal) return dims;
  return shape == RadialShape::kSymmetric ? dims * (dims + 1) / 2 : dims * dims;
}
CAMK_HD bool radial_ignores_shape(RadialKind kind, RadialShape shape) {
  return kind == RadialKind::kCos || (kind == RadialKind::kPhs1 && shape == RadialShape::kIsotropic);
}

// body(i, j, k) for the entries (i, j) of the matrix S that are not always 0, k the number of the shape that stands
// there.
template <int D, class Body>
CAMK_HD void each_shape_entry(RadialShape shape, const Body& body) {
  switch (shape) {
    case RadialShape::kIsotropic:
      return unroll<D>([&](int i) CAMK_INLINED { body(i, i, 0); });
    case RadialShape::kDiagonal:
      return unroll<D>([&](int i) CAMK_INLINED { body(i, i, i); });
    case RadialShape::kSymmetric:
      return unroll<D * D>([&](int k) CAMK_INLINED {
        const int i = k / D, j = k % D, low = i < j ? i : j, high = i < j ? j : i;
        body(i, j, low * (2 * D - low - 1) / 2 + high);
      });
    default:
      return unroll<D * D>([&](int k) CAMK_INLINED { body(k / D, k % D, k); });
  }
}

// phi(q) and phi'(q).
template <class C>
struct RadialProfile {
  C value, slope;
};

// Those of sqrt(q): derivatives at q = 0 are 0.
template <class C>
CAMK_HD RadialProfile<C> rooted_profile(RadialKind kind, C q) {
  using enum RadialKind;
  const C zero(0), one(1), root = choose_zero(q, zero, sqrt_of(q)), root_slope = choose_zero(q, zero, C(0.5) / root);
  RadialProfile<C> f;
  if (kind == kIvd) {
    f.value = one / (root + C(1e-10));
    f.slope = zero - f.value * f.value * root_slope;
  } else if (kind == kIvc) {
    f.value = one / (q * root + C(1e-30));
    f.slope = C(-1.5) * f.value * (f.value * root);
  } else if (kind == kMarkov) {
    f.value = exp_of(zero - root);
    f.slope = zero - f.value * root_slope;
  } else if (kind == kExpsin) {
    const Vec<C, 2> wave = sine_and_cosine(root);
    f.value = exp_of(zero - wave[0]);
    f.slope = zero - f.value * wave[1] * root_slope;
  } else if (kind == kPhs1) {
    f = {root, root_slope};
  } else {
    f = {q * root, C(1.5) * root};
  }
  f.slope = choose_zero(q, zero, f.slope);
  return f;
}

template <class C>
CAMK_HD RadialProfile<C> radial_profile(RadialKind kind, C q) {
  using enum RadialKind;
  const C zero(0), one(1), half(0.5);
  switch (kind) {
    case kIvq: {
      const C f = one / (one + q);
      return {f, zero - f * f};
    }
    case kIvmq: {
      const C f = one / sqrt_of(one + q);
      return {f, C(-0.5) * f * f * f};
    }
    case kGauss: {
      const C f = exp_of(C(-0.5) * q);
      return {f, C(-0.5) * f};
    }
    case kSgauss2: {
      const C f = exp_of(C(-0.25) * q * q);
      return {f, C(-0.5) * q * f};
    }
    case kNsgauss2: {
      const C f = exp_of(zero - q);
      return {f, zero - f};
    }
    case kQd:
      return {one + q, one};
    case kMqd: {
      const C f = sqrt_of(one + q);
      return {f, half / f};
    }
    case kVep:
      return {one - q, C(-1)};
    default:
      return rooted_profile(kind, q);
  }
}

// max(0, 1 - |t|) and its derivative, 0 where the hat peaks and ends.
template <class C>
CAMK_HD RadialProfile<C> hat_profile(C t) {
  const C zero(0), one(1), side = choose_zero(t, zero, choose_below(t, zero, C(-1), one)), height = one - side * t;
  return {choose_zero(height, zero, choose_below(height, zero, zero, height)),
          choose_below(zero, height, zero - side, zero)};
}

template <int D, class C>
struct RadialGradient {
  Vec<C, D> x, center;
  Vec<C, D * D> shape;  // the first radial_shape_width
};

template <int D, class C>
CAMK_HD C inner(const Vec<C, D>& a, const Vec<C, D>& b) {
  C sum(0);
  for (int i = 0; i < D; ++i) sum = sum + a[i] * b[i];
  return sum;
}

// phi with o = x - centre and t = S o. A kind that ignores its shape has an isotropic one of 1.
template <int D, class C>
struct RadialKernel {
  RadialKind kind;
  RadialShape form;
  Vec<C, D> x, center;
  Vec<C, D * D> shape;
  Vec<C, D> o, t;
  C value, slope;  // phi; phi'(q) of the kinds that have it

  CAMK_HD void evaluate() {
    if (kind == RadialKind::kCos) {
      value = inner(x, center) / (length(x).value * length(center).value);
      return;
    }
    for (int i = 0; i < D; ++i) o[i] = x[i] - center[i], t[i] = C(0);
    each_shape_entry<D>(form, [&](int i, int j, int k) CAMK_INLINED { t[i] = t[i] + shape[k] * o[j]; });
    if (kind == RadialKind::kNlin) {
      value = C(1);
      for (int i = 0; i < D; ++i) value = value * hat_profile(t[i]).value;
      return;
    }
    const RadialProfile<C> f = radial_profile(kind, form == RadialShape::kProjected ? inner(t, t) : inner(o, t));
    value = f.value, slope = f.slope;
  }

  // The gradient of g phi.
  CAMK_HD RadialGradient<D, C> pull_back(C g) const {
    if (kind == RadialKind::kCos) return pull_back_cosine(g);
    RadialGradient<D, C> found{};
    Vec<C, D> of_o{}, of_t;
    for (int i = 0; i < D; ++i) {
      if (kind == RadialKind::kNlin) {
        of_t[i] = g;
        for (int j = 0; j < D; ++j) {
          const RadialProfile<C> hat = hat_profile(t[j]);
          of_t[i] = of_t[i] * (j == i ? hat.slope : hat.value);
        }
      } else if (form == RadialShape::kProjected) {
        of_t[i] = C(2) * g * slope * t[i];
      } else {
        of_t[i] = g * slope * o[i], of_o[i] = g * slope * t[i];
      }
    }
    each_shape_entry<D>(form, [&](int i, int j, int k) CAMK_INLINED {
      of_o[j] = of_o[j] + shape[k] * of_t[i];
      found.shape[k] = found.shape[k] + of_t[i] * o[j];
    });
    for (int i = 0; i < D; ++i) found.x[i] = of_o[i], found.center[i] = C(0) - of_o[i];
    return found;
  }

 private:
  // max(|v|, 1e-8) and, as slope, what the derivative of its logarithm is per v.
  CAMK_HD static RadialProfile<C> length(const Vec<C, D>& v) {
    const C least(1e-8), square = inner(v, v), root = choose_zero(square, C(0), sqrt_of(square));
    return {choose_below(root, least, least, root), choose_below(root, least, C(0), C(1) / square)};
  }

  CAMK_HD RadialGradient<D, C> pull_back_cosine(C g) const {
    RadialGradient<D, C> found{};
    const RadialProfile<C> of_x = length(x), of_center = length(center);
    const C scale = C(1) / (of_x.value * of_center.value);
    for (int i = 0; i < D; ++i) {
      found.x[i] = g * (center[i] * scale - value * of_x.slope * x[i]);
      found.center[i] = g * (x[i] * scale - value * of_center.slope * center[i]);
    }
    return found;
  }
};

// psi = sin(rate u + phase) and its derivatives in u and in the phase.
template <class C>
struct RadialWave {
  C value, slope, phase_slope;
};
template <class C>
CAMK_HD RadialWave<C> radial_wave(C rate, const Vec<C, 2>& sine_and_cosine) {
  return {sine_and_cosine[0], rate * sine_and_cosine[1], sine_and_cosine[1]};
}
template <class C>
CAMK_HD RadialWave<C> radial_wave(C u, C rate, C phase) {
  return radial_wave(rate, sine_and_cosine(u * rate + phase));
}

}  // namespace camk::math
