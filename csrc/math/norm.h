// SPDX-License-Identifier: MIT
// Normalisation of a row z of H values, n = r c with c = z - mean(z), r = 1 / sqrt(mean(c^2) + eps), and its
// derivatives. The Jacobian J w = r (w - mean(w) - n mean(n w)) is symmetric: it carries tangents forward and gradients
// back. Means are over the row.
#pragma once
#include "math/portable.h"

namespace camk::math {

template <class C>
CAMK_HD C inverse_deviation(C mean_of_squares, C eps) {
  return C(1) / sqrt_of(mean_of_squares + eps);
}

// J w; mean_w = mean(w), mean_nw = mean(n w).
template <class C>
CAMK_HD C norm_jacobian(C w, C n, C r, C mean_w, C mean_nw) {
  return r * (w - mean_w - n * mean_nw);
}

// Gradient in z of <u, n> + <v, J t> = J w + rest n: this is w, for a tangent t with J t = dn and mean_nt = mean(n t).
// mean_nv = mean(n v).
template <class C>
CAMK_HD C norm_second_order(C u, C v, C t, C r, C mean_nt, C mean_nv) {
  return u - r * (mean_nt * v + mean_nv * t);
}
// ... and this is rest; mean_v_dn = mean(v dn).
template <class C>
CAMK_HD C norm_second_order_rest(C r, C mean_v_dn) {
  return C(0) - r * mean_v_dn;
}

}  // namespace camk::math
