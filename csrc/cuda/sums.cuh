// SPDX-License-Identifier: MIT
// Sums that do not depend on the order of their terms, in 64-bit fixed point.
#pragma once
#include "cuda/device.cuh"

namespace camk::cuda {

inline constexpr double kLargestFinite = 1.79e308;

// largest: bits of the largest size of a finite number so far, ordered as the numbers are, for these are not negative.
CAMK_DEVICE void find_largest(uint64_t* largest, double number) {
  auto* known = reinterpret_cast<unsigned long long*>(largest);
  const double size = fabs(number);
  if (!(size <= kLargestFinite)) return;
  unsigned long long bits;
  memcpy(&bits, &size, 8);
  // A stale value only costs an atomic operation.
  if (bits > *static_cast<volatile unsigned long long*>(known)) atomicMax(known, bits);
}

// 2^exponent times a number up to `largest`, added up `terms` times, stays below 2^62.
CAMK_DEVICE int fixed_exponent(uint64_t largest_bits, int64_t terms) {
  double largest;
  memcpy(&largest, &largest_bits, 8);
  int size = 0, count = 0;
  frexp(largest, &size);
  frexp(double(terms), &count);
  return min(62 - size - count, 1000);
}

// Adds in fixed point what is finite; the rest to the floating sums, whose infinities and NaN do not depend on the
// order either.
struct FixedPoint {
  int64_t* fixed;
  double factor;

  CAMK_DEVICE FixedPoint(int64_t* sums, uint64_t largest, int64_t terms)
      : fixed(sums), factor(ldexp(1.0, fixed_exponent(largest, terms))) {}

  template <class A>
  CAMK_DEVICE void add(A* floating, int64_t at, double number) const {
    if (!(fabs(number) <= kLargestFinite)) return reduce_add(floating + at, A(number));
    const long long whole = llrint(number * factor);
    unsigned long long bits;
    memcpy(&bits, &whole, 8);
    if (bits != 0) atomicAdd(reinterpret_cast<unsigned long long*>(fixed) + at, bits);
  }
};

}  // namespace camk::cuda
