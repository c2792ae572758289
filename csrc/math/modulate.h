// SPDX-License-Identifier: MIT
// Scale, shift and activation of a number: y = f(s), s = scale n + shift, with the gradients of <g, y> and of <g, dy>,
// where dy = f'(s) ds is the tangent of y along given directions. Where n is normalised: math/norm.h.
#pragma once
#include "math/activation.h"

namespace camk::math {

template <class C>
struct ScaleShift {
  C scale, shift;
  CAMK_HD C operator()(C n) const { return multiply_add(scale, n, shift); }
};

template <class C>
struct ModulateGradients {
  C scale, shift, n;
};

// slope: f'(s)
template <class C>
CAMK_HD ModulateGradients<C> modulate_gradients(C scale, C n, C g, C slope) {
  const C of_s = g * slope;
  return {of_s * n, of_s, scale * of_s};
}

// ds, for tangents `along` of scale and shift and dn of n
template <class C>
CAMK_HD C modulate_tangent(C scale, const ScaleShift<C>& along, C n, C dn) {
  return multiply_add(along.scale, n, multiply_add(scale, dn, along.shift));
}

template <class C>
struct TangentGradients {
  C scale, shift, n, dn;
};

// a b + c, c where a is 0, also if b is infinite: a direction or gradient that is absent is a 0 which adds nothing.
template <class C>
CAMK_HD C add_present(C a, C b, C c) {
  return choose_zero(a, c, multiply_add(a, b, c));
}

// From the gradients of s and ds; scale_along: tangent of scale.
template <class C>
CAMK_HD TangentGradients<C> tangent_gradients(C scale, C scale_along, C n, C dn, C of_s, C of_ds) {
  return {multiply_add(of_s, n, of_ds * dn), of_s, add_present(scale_along, of_ds, scale * of_s), scale * of_ds};
}

// Of <g, dy>: its gradient in g, and those of s and ds. f: at s
template <class C>
struct TangentCotangents {
  C g, s, ds;
};
template <class C>
CAMK_HD TangentCotangents<C> tangent_cotangents(C g, C ds, const Jet<C>& f) {
  return {f.first * ds, g * f.second * ds, g * f.first};
}

}  // namespace camk::math
