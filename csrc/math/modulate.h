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
CAMK_HD ModulateGradients<C> modulate_gradients(const ScaleShift<C>& m, C n, C g, C slope) {
  const C of_s = g * slope;
  return {of_s * n, of_s, m.scale * of_s};
}

template <class C>
struct ModulateSecondOrder {
  C g, scale, shift, n, dn;
};

// along: tangents of scale and shift; dn: of n; f: at s.
template <class C>
CAMK_HD ModulateSecondOrder<C> modulate_second_order(const ScaleShift<C>& m, const ScaleShift<C>& along, C n, C dn, C g,
                                                     const Jet<C>& f) {
  const C ds = multiply_add(along.scale, n, multiply_add(m.scale, dn, along.shift));
  const C of_ds = g * f.first, of_s = g * f.second * ds;
  return {f.first * ds, multiply_add(of_s, n, of_ds * dn), of_s, multiply_add(along.scale, of_ds, m.scale * of_s),
          m.scale * of_ds};
}

}  // namespace camk::math
