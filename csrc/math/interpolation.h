// SPDX-License-Identifier: MIT
// Blend weight of the upper corner along one axis as a function of the fractional position t in [0, 1), and its first
// two derivatives. Linear: t. Smoothstep: 3 t^2 - 2 t^3. Nearest has no upper corner: the caller reads the lower one
// alone.
#pragma once
#include "portable.h"

namespace camk::math {

enum class Interpolation : int { kLinear = 0, kSmoothstep = 1, kNearest = 2 };

template <class C>
CAMK_HD C blend(Interpolation kind, C t) {
  return kind == Interpolation::kSmoothstep ? t * t * (C(3) - C(2) * t) : t;
}

template <class C>
CAMK_HD C blend_first(Interpolation kind, C t) {
  return kind == Interpolation::kSmoothstep ? C(6) * t * (C(1) - t) : C(1);
}

template <class C>
CAMK_HD C blend_second(Interpolation kind, C t) {
  return kind == Interpolation::kSmoothstep ? C(6) - C(12) * t : C(0);
}

}  // namespace camk::math
