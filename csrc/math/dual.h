// SPDX-License-Identifier: MIT
// A number and its derivative along one direction. A formula for gradients that computes with these gives, in `along`,
// the second derivatives times that direction.
#pragma once
#include "math/portable.h"

namespace camk {

template <class C>
struct Dual {
  C value, along;
  Dual() = default;
  CAMK_HD Dual(C value, C along) : value(value), along(along) {}
  CAMK_HD explicit Dual(double constant) : value(C(constant)), along(C(0)) {}
  CAMK_HD friend Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.along + b.along}; }
  CAMK_HD friend Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.along - b.along}; }
  // Which of the two products is rounded is said: left to a compiler, it would be one here and the other there.
  CAMK_HD friend Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, multiply_add(a.value, b.along, a.along * b.value)};
  }
  CAMK_HD friend Dual multiply_add(Dual a, Dual b, Dual c) {
    return {multiply_add(a.value, b.value, c.value),
            multiply_add(a.value, b.along, multiply_add(a.along, b.value, c.along))};
  }
  CAMK_HD friend Dual operator/(Dual a, Dual b) {
    const C ratio = a.value / b.value;
    return {ratio, (a.along - ratio * b.along) / b.value};
  }
};

template <class C>
struct scalar_of<Dual<C>> : scalar_of<C> {};

// The number as a constant, without its derivative.
template <class C>
CAMK_HD C constant_of(C x) {
  return x;
}
template <class C>
CAMK_HD Dual<C> constant_of(Dual<C> x) {
  return {x.value, C(0)};
}

// The number without its derivative; the part that a gradient consists of.
template <class C>
CAMK_HD C value_of(C x) {
  return x;
}
template <class C>
CAMK_HD C value_of(Dual<C> x) {
  return x.value;
}
template <class C>
CAMK_HD C gradient_of(C x) {
  return x;
}
template <class C>
CAMK_HD C gradient_of(Dual<C> x) {
  return x.along;
}

template <class C>
CAMK_HD Dual<C> choose_below(Dual<C> a, Dual<C> b, Dual<C> yes, Dual<C> no) {
  return {choose_below(a.value, b.value, yes.value, no.value), choose_below(a.value, b.value, yes.along, no.along)};
}
template <class C>
CAMK_HD Dual<C> choose_zero(Dual<C> x, Dual<C> yes, Dual<C> no) {
  return {choose_zero(x.value, yes.value, no.value), choose_zero(x.value, yes.along, no.along)};
}

template <class C>
CAMK_HD Dual<C> sqrt_of(Dual<C> x) {
  const C root = sqrt_of(x.value);
  return {root, C(0.5) * x.along / root};
}
template <class C>
CAMK_HD Dual<C> exp_of(Dual<C> x) {
  const C e = exp_of(x.value);
  return {e, e * x.along};
}
template <class C>
CAMK_HD Vec<Dual<C>, 2> sine_and_cosine(Dual<C> x) {
  const Vec<C, 2> wave = sine_and_cosine(x.value);
  return {{Dual<C>(wave[0], wave[1] * x.along), Dual<C>(wave[1], C(0) - wave[0] * x.along)}};
}
template <class C>
CAMK_HD Dual<C> sine_of(Dual<C> x) {
  const Vec<C, 2> wave = sine_and_cosine(x.value);
  return {wave[0], wave[1] * x.along};
}

}  // namespace camk
