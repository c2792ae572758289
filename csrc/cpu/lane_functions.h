// SPDX-License-Identifier: MIT
// The functions of csrc/math/portable.h for packs of lanes: polynomials in float32, the C library in float64. Errors
// are those of float32 rounding (tests/test_math.py); NaN stays NaN.
#pragma once
#include <cmath>

#include "cpu/lanes.h"

namespace camk {

template <class T, class V>
CAMK_HD Lanes<V> choose_below(Lanes<T> a, Lanes<T> b, Lanes<V> yes, Lanes<V> no) {
  return Lanes<V>(a.v < b.v ? yes.v : no.v);
}

template <class T>
CAMK_HD Lanes<T> choose_zero(Lanes<T> x, Lanes<T> yes, Lanes<T> no) {
  return Lanes<T>(x.v == Lanes<T>(T(0)).v ? yes.v : no.v);
}

CAMK_HD Doubles multiply_add(Doubles x, Doubles y, Doubles z) { return x * y + z; }

// f(lane) for every lane.
template <class T, class Function>
CAMK_HD Lanes<T> lane_by_lane(Lanes<T> x, const Function& f) {
  for (int k = 0; k < int(sizeof(x.v) / sizeof(T)); ++k) x.v[k] = f(x.v[k]);
  return x;
}

// c[0] + c[1] x + ... by Horner's rule
template <int N>
CAMK_HD Floats polynomial(Floats x, const float (&c)[N]) {
  Floats sum(c[N - 1]);
  unroll<N - 1>([&](int i) CAMK_INLINED { sum = multiply_add(sum, x, Floats(c[N - 2 - i])); });
  return sum;
}

template <class T>
CAMK_HD Lanes<T> sqrt_of(Lanes<T> x) {
  return lane_by_lane(x, [](T a) CAMK_INLINED { return std::sqrt(a); });
}

// 2^n for whole n in [-126, 127]
CAMK_HD Floats power_of_two(Floats n) {
  const Lanes<int32_t>::Raw whole = __builtin_convertvector(n.v, Lanes<int32_t>::Raw);
  return Floats((Floats::Raw)((whole + 127) << 23));
}

// e^x = 2^n e^r with |r| <= ln(2) / 2; in two steps of n, so that subnormals and infinity come out
CAMK_HD Floats exp_of(Floats x) {
  const Floats high(89.f), low(-104.f);
  const Floats bounded = choose_below(high, x, high, choose_below(x, low, low, x));
  const Floats n = round_down(multiply_add(bounded, Floats(1.44269504f), Floats(0.5f)));
  const Floats r = multiply_add(n, Floats(-1.42860677e-6f), multiply_add(n, Floats(-0.693145752f), bounded));
  const Floats e = polynomial(r, {1.f, 1.f, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040});
  const Floats some = round_down(n * Floats(0.5f));
  return e * power_of_two(some) * power_of_two(n - some);
}

// The continued fraction of tanh for small x, (e - 1) / (e + 1) with e = exp(2x) beyond.
CAMK_HD Floats tanh_of(Floats x) {
  const Floats square = x * x, one(1.f), zero(0.f), bound(9.1f), two(2.f);
  const Floats size = choose_below(x, zero, zero - x, x);
  const Floats near =
      x * polynomial(square, {10395.f, 1260.f, 21.f}) / polynomial(square, {10395.f, 4725.f, 210.f, 1.f});
  const Floats far = one - two / (exp_of(two * choose_below(bound, size, bound, size)) + one);
  return choose_below(size, Floats(0.625f), near, choose_below(x, zero, zero - far, far));
}

// 1 - exp(-x^2) t P(t), t = 1 / (1 + 0.34 |x|): absolute error, not relative, of one rounding
CAMK_HD Floats erf_of(Floats x) {
  const Floats one(1.f), zero(0.f), size = choose_below(x, zero, zero - x, x);
  const Floats t = one / multiply_add(size, Floats(0.34f), one);
  const Floats tail = t * polynomial(t, {0.180147641f, 0.305061568f, -0.286043336f, 1.2111981f, -1.25099644f,
                                         1.08761626f, -0.246983788f});
  const Floats value = multiply_add(zero - exp_of(zero - x * x), tail, one);
  return choose_below(x, zero, zero - value, value);
}

// 2 artanh(s), s = x / (2 + x) in [0, 1/3]
CAMK_HD Floats log_one_plus(Floats x) {
  const Floats s = x / (x + Floats(2.f)), square = s * s;
  return Floats(2.f) * s * polynomial(square, {1.f, 1.f / 3, 1.f / 5, 1.f / 7, 1.f / 9, 1.f / 11, 1.f / 13});
}

// Where the functions of waves are polynomials.
inline constexpr float kWaveBound = 1e6f;

// The last bits of the first sum, multiples of x, and r = x - multiple period, |r| <= period / 2. A period in two
// parts: x minus the first part is exact, the second loses no more than r's own rounding.
struct Reduced {
  Lanes<int32_t>::Raw multiple;
  Floats r;
};
CAMK_HD Reduced reduce_phase(Floats x, float inverse, float period, float rest) {
  const Floats magic(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number, in the last bits of the sum
  const Floats shifted = multiply_add(x, Floats(inverse), magic), k = shifted - magic;
  return {(Lanes<int32_t>::Raw)shifted.v, multiply_add(k, Floats(-rest), multiply_add(k, Floats(-period), x))};
}

// Of phases within the bound: those of what is left of half turns, both negated where these are odd. By polynomials
// within 1.2e-8 of sin(r) / r and 4.5e-9 of cos(r).
CAMK_HD Vec<Floats, 2> sine_and_cosine_within(Floats x) {
#if defined(__FMA__)
  const auto [k, r] = reduce_phase(x, 0.318309886f, 3.14159274f, -8.74227801e-8f);
  const Floats square = r * r;
  const Floats rest = square * polynomial(square, {-0.166666597f, 0.00833306555f, -1.98095382e-4f, 2.60563093e-6f});
  const Floats sine = multiply_add(r, rest, r);
  const Floats cosine =
      polynomial(square, {1.f, -0.5f, 0.0416666418f, -0.00138884026f, 2.47618555e-5f, -2.60765262e-7f});
  const auto turned = [odd = k << 31](Floats wave)
                          CAMK_INLINED { return Floats((Floats::Raw)((Lanes<int32_t>::Raw)wave.v ^ odd)); };
  return {{turned(sine), turned(cosine)}};
#else
  return {{lane_by_lane(x, [](float a) { return std::sin(a); }), lane_by_lane(x, [](float a) { return std::cos(a); })}};
#endif
}

CAMK_HD Vec<Floats, 2> sine_and_cosine(Floats x) {
  if (all_within(x, kWaveBound)) return sine_and_cosine_within(x);
  return {{lane_by_lane(x, [](float a) { return std::sin(a); }), lane_by_lane(x, [](float a) { return std::cos(a); })}};
}

CAMK_HD Doubles exp_of(Doubles x) {
  return lane_by_lane(x, [](double a) { return std::exp(a); });
}
CAMK_HD Doubles tanh_of(Doubles x) {
  return lane_by_lane(x, [](double a) { return std::tanh(a); });
}
CAMK_HD Doubles erf_of(Doubles x) {
  return lane_by_lane(x, [](double a) { return std::erf(a); });
}
CAMK_HD Doubles log_one_plus(Doubles x) {
  return lane_by_lane(x, [](double a) { return std::log1p(a); });
}
CAMK_HD Vec<Doubles, 2> sine_and_cosine(Doubles x) {
  return {
      {lane_by_lane(x, [](double a) { return std::sin(a); }), lane_by_lane(x, [](double a) { return std::cos(a); })}};
}
CAMK_HD Vec<Doubles, 2> sine_and_cosine_within(Doubles x) { return sine_and_cosine(x); }
CAMK_HD bool all_within(Doubles x, double bound) {
  bool all = true;
  for (int k = 0; k < kLanes / 2; ++k) all &= std::fabs(x.v[k]) < bound;
  return all;
}

// Halves are added to halves: a chain of additions would wait for each of them.
template <class C, int N, int... k>
CAMK_HD C sum_of_lanes(Lanes<C, N> x, std::integer_sequence<int, k...>) {
  constexpr int kWidth = sizeof...(k);
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  typedef Index Order __attribute__((vector_size(sizeof(C) * kWidth)));
  unroll<4>([&](auto step) CAMK_INLINED {
    constexpr int kHalf = kWidth >> (decltype(step)::value + 1);
    if constexpr (kHalf > 0) x.v += __builtin_shuffle(x.v, Order{(k + kHalf) % kWidth...});
  });
  return x.v[0];
}
template <class C, int N>
CAMK_HD C sum_of_lanes(Lanes<C, N> x) {
  return sum_of_lanes(x, std::make_integer_sequence<int, N>{});
}

// In lane i the sum over the lanes of x[i]: halves of two packs change places and are added, until one pack is left.
template <class C, int... k>
CAMK_HD Lanes<C> sums_of_lanes(Lanes<C>* x, std::integer_sequence<int, k...>) {
  constexpr int kWidth = sizeof...(k);
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  typedef Index Order __attribute__((vector_size(sizeof(C) * kWidth)));
  unroll<4>([&](auto step) CAMK_INLINED {
    constexpr int kHalf = kWidth >> (decltype(step)::value + 1);
    unroll<kHalf>([&](auto i) CAMK_INLINED {
      const auto a = x[i].v, b = x[i + kHalf].v;
      x[i] = __builtin_shuffle(a, b, Order{(k & kHalf ? kWidth + k : k)...}) +
             __builtin_shuffle(a, b, Order{(k & kHalf ? kWidth + k - kHalf : k + kHalf)...});
    });
  });
  return x[0];
}
template <class C>
CAMK_HD Lanes<C> sums_of_lanes(Lanes<C>* x) {
  return sums_of_lanes(x, std::make_integer_sequence<int, lanes_of<Lanes<C>>>{});
}

}  // namespace camk
