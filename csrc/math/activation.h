// SPDX-License-Identifier: MIT
// Activations of the modulated MLP with their first and second derivatives; their meaning:
// camkernels.reference.modulate.
#pragma once
#include "math/portable.h"

namespace camk::math {

// Numbered as ACTIVATIONS in python/camkernels/_modulation.py.
enum class Activation {
  kNone,
  kRelu,
  kLeakyRelu,
  kGelu,
  kSilu,
  kSoftplus,
  kSigmoid,
  kTanh,
  kExponential,
  kSquareplus,
  kSine,
  kResidualSine
};
inline constexpr int kActivations = 12;

// f(z), f'(z), f''(z).
template <class C>
struct Jet {
  C value, first, second;
};

// The first `Order` derivatives of activation I at z; the others may be left out. rate: omega of a sine, the frequency
// of a residual one. A derivative at a kink is that of the left, as PyTorch's is.
template <int Order, int I, class C>
CAMK_HD Jet<C> activate(Constant<I>, C z, C rate) {
  using enum Activation;
  constexpr Activation A{I};
  const C zero(0), one(1), two(2), half(0.5);
  Jet<C> f;
  if constexpr (A == kNone) {
    f = {z, one, zero};
  } else if constexpr (A == kRelu || A == kLeakyRelu) {
    const C slope(A == kRelu ? 0.0 : 0.01);
    f = {choose_below(z, zero, A == kRelu ? zero : slope * z, z), choose_below(zero, z, one, slope), zero};
  } else if constexpr (A == kGelu) {
    const C above = half * (one + erf_of(z * C(0.70710678118654752))),
            density = C(0.39894228040143268) * exp_of(C(-0.5) * z * z);
    f.value = z * above;
    if constexpr (Order > 0) f.first = above + z * density;
    if constexpr (Order > 1) f.second = density * (two - z * z);
  } else if constexpr (A == kSilu || A == kSigmoid) {
    const C s = one / (one + exp_of(zero - z)), slope = s * (one - s);
    if constexpr (A == kSigmoid) {
      f = {s, slope, slope * (one - two * s)};
    } else {
      f = {z * s, s + z * slope, slope * (two + z * (one - two * s))};
    }
  } else if constexpr (A == kSoftplus) {  // the identity beyond 20, as in PyTorch
    const C limit(20), size = choose_below(z, zero, zero - z, z), e = exp_of(zero - size);
    const C s = choose_below(z, zero, e, one) / (one + e);
    f.value = choose_below(limit, z, z, choose_below(z, zero, zero, z) + log_one_plus(e));
    f.first = choose_below(limit, z, one, s);
    f.second = choose_below(limit, z, zero, s * (one - s));
  } else if constexpr (A == kTanh) {
    const C t = tanh_of(z), slope = one - t * t;
    f = {t, slope, zero - two * t * slope};
  } else if constexpr (A == kExponential) {
    const C e = exp_of(z);
    f = {e, e, e};
  } else if constexpr (A == kSquareplus) {
    const C root = sqrt_of(z * z + C(4));
    f = {half * (z + root), half * (one + z / root), two / (root * root * root)};
  } else {
    const Vec<C, 2> wave = sine_and_cosine(rate * z);
    const C plain = A == kResidualSine ? one : zero;
    f = {wave[0] + plain * z, plain + rate * wave[1], zero - rate * rate * wave[0]};
  }
  return f;
}

// body(Constant<I>) for the activation of that number.
template <int I = 0, class Body>
CAMK_HD void with_activation(Activation activation, const Body& body) {
  if constexpr (I < kActivations) {
    if (int(activation) == I) {
      body(Constant<I>{});
    } else {
      with_activation<I + 1>(activation, body);
    }
  }
}

}  // namespace camk::math
