// SPDX-License-Identifier: MIT
// Adam on one number of a table: its moments and itself after a step with the gradient g.
#pragma once
#include "math/portable.h"

namespace camk::math {

template <class C>
struct AdamRates {
  C lr, beta1, beta2, eps, rest1, rest2;  // rest: 1 - beta

  AdamRates(double rate, double first, double second, double epsilon)
      : lr(C(rate)), beta1(C(first)), beta2(C(second)), eps(C(epsilon)), rest1(C(1 - first)), rest2(C(1 - second)) {}
};

template <class C>
struct AdamNumber {
  C value, first, second;
};

// correction: 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), t: steps with this one. C: a number, or a pack of them
// beside rates of one.
template <class C, class S>
CAMK_HD AdamNumber<C> adam_step(const AdamNumber<C>& before, C g, const Vec<C, 2>& correction,
                                const AdamRates<S>& rates) {
  const C first = multiply_add(C(rates.beta1), before.first, C(rates.rest1) * g);
  const C second = multiply_add(C(rates.beta2), before.second, C(rates.rest2) * (g * g));
  const C scale = multiply_add(sqrt_of(second), correction[1], C(rates.eps));
  return {before.value - C(rates.lr) * correction[0] * first / scale, first, second};
}

}  // namespace camk::math
