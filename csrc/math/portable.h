// SPDX-License-Identifier: MIT
// What host and device code share. A formula is a template over its arithmetic type C: a scalar (float, double; one
// point) or a pack of SIMD lanes (several points), so that the CPU kernels, the CUDA kernels and the scalar probes of
// the tests all run the same lines. A type other than float and double specialises index_of and overloads the functions
// below (found by argument-dependent lookup).
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define CAMK_HD __host__ __device__ __forceinline__
#define CAMK_INLINED
#else
#define CAMK_HD inline __attribute__((always_inline))
#define CAMK_INLINED __attribute__((always_inline))  // after a lambda's parameter list
#endif

namespace camk {

template <class T, int N>
struct Vec {
  T v[N];
  CAMK_HD T& operator[](int i) { return v[i]; }
  CAMK_HD const T& operator[](int i) const { return v[i]; }
};

// pair[side], where `side` may be known at run time only: an index would then move the pair from registers to local
// memory on a GPU, and a choice is slower on a CPU, whose lanes are in memory anyway.
template <class T>
CAMK_HD const T& of_side(const Vec<T, 2>& pair, int side) {
#ifdef __CUDA_ARCH__
  return side ? pair[1] : pair[0];
#else
  return pair[side];
#endif
}

// An int that is part of its type. std::integral_constant is none for a device: its conversion is a host function,
// which nvcc evaluates there all the same, but with a warning.
template <int I>
struct Constant {
  static constexpr int value = I;
  CAMK_HD constexpr operator int() const { return I; }
};

template <class Body, int... I>
CAMK_HD void unroll_over(Body&& body, std::integer_sequence<int, I...>) {
  (body(Constant<I>{}), ...);
}

// body(0), ..., body(N - 1). Up to 16 the front end writes them out, so that every index is a constant and small arrays
// live in registers whatever the optimiser thinks of the loop; beyond that it is a loop.
template <int N, class Body>
CAMK_HD void unroll(Body&& body) {
  if constexpr (N <= 16) {
    unroll_over(body, std::make_integer_sequence<int, N>{});
  } else {
    for (int i = 0; i < N; ++i) body(i);
  }
}

// body(Constant<D>) for a number of axes from 1 to 4.
template <class Body>
auto with_dims(int64_t dims, const Body& body) {
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

// The unsigned 32-bit type that has as many lanes as C.
template <class C>
struct index_of {
  using type = uint32_t;
};

// The plain number behind C.
template <class C>
struct scalar_of {
  using type = C;
};

// A cell coordinate saturates here: the largest float below 2^31, and -2^31.
inline constexpr float kCellMax = 2147483520.0f;
inline constexpr float kCellMin = -2147483648.0f;

CAMK_HD float round_down(float x) { return floorf(x); }
CAMK_HD double round_down(double x) { return floor(x); }

// x * y + z with one rounding in float32; in float64 two roundings, as the PyTorch definition has.
CAMK_HD float multiply_add(float x, float y, float z) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return fmaf(x, y, z);
#else  // without the instruction: the product is exact in double
  return float(double(x) * double(y) + double(z));
#endif
}
CAMK_HD double multiply_add(double x, double y, double z) { return x * y + z; }

// Whole number from -2^31 to 2^31 - 1 -> two's complement.
template <class C>
CAMK_HD uint32_t to_word(C whole) {
  return uint32_t(int32_t(whole));
}

// Any whole number -> two's complement.
template <class C>
CAMK_HD uint32_t to_cell(C whole) {
  const C low = C(kCellMin), high = C(kCellMax);
  return to_word(whole < low ? low : (whole > high ? high : whole));
}

// i mod size for any size.
CAMK_HD uint32_t remainder_of(uint32_t i, uint32_t size) { return i < size ? i : i % size; }

// n where x is above zero, else 0.
template <class C>
CAMK_HD uint32_t where_positive(C x, uint32_t n) {
  return x > C(0) ? n : 0u;
}

// a < b ? yes : no
template <class C, class V>
CAMK_HD V choose_below(C a, C b, V yes, V no) {
  return a < b ? yes : no;
}
// x == 0 ? yes : no
template <class C>
CAMK_HD C choose_zero(C x, C yes, C no) {
  return x == C(0) ? yes : no;
}

CAMK_HD float sqrt_of(float x) { return sqrtf(x); }
CAMK_HD double sqrt_of(double x) { return sqrt(x); }
CAMK_HD float exp_of(float x) { return expf(x); }
CAMK_HD double exp_of(double x) { return exp(x); }
CAMK_HD float tanh_of(float x) { return tanhf(x); }
CAMK_HD double tanh_of(double x) { return tanh(x); }
CAMK_HD float erf_of(float x) { return erff(x); }
CAMK_HD double erf_of(double x) { return erf(x); }
// ln(1 + x) for x in [0, 1]
CAMK_HD float log_one_plus(float x) { return log1pf(x); }
CAMK_HD double log_one_plus(double x) { return log1p(x); }
CAMK_HD float sine_of(float x) { return sinf(x); }
CAMK_HD double sine_of(double x) { return sin(x); }
#ifdef __CUDA_ARCH__  // one reduction of the argument
CAMK_HD Vec<float, 2> sine_and_cosine(float x) {
  Vec<float, 2> found;
  sincosf(x, &found.v[0], &found.v[1]);
  return found;
}
CAMK_HD Vec<double, 2> sine_and_cosine(double x) {
  Vec<double, 2> found;
  sincos(x, &found.v[0], &found.v[1]);
  return found;
}
#else
CAMK_HD Vec<float, 2> sine_and_cosine(float x) { return {{sinf(x), cosf(x)}}; }
CAMK_HD Vec<double, 2> sine_and_cosine(double x) { return {{sin(x), cos(x)}}; }
#endif

}  // namespace camk
