// SPDX-License-Identifier: MIT
// SparseRowAdam on the CPU; schema and shapes: python/camkernels/optim.py. A pack of lanes goes along a row, or holds
// several short ones; where a gradient is all zero nothing else is read.
#include "math/optim.h"

#include <array>

#include "cpu/dispatch.h"
#include "cpu/lane_functions.h"
#include "cpu/parallel.h"
#include "launch/optim.h"

namespace camk::cpu {
namespace {

using launch::AdamTensors, launch::kAdam;
using OptionalTensor = std::optional<Tensor>;

// Rows that a sparse gradient lists lie anywhere: what they have is fetched this many in advance.
constexpr int64_t kRowsAhead = 8;
// Fewer numbers than this are not worth waking a thread for.
constexpr int64_t kGrainNumbers = 1 << 15;

// N: a number, or a pack of them.
template <class N, class T>
CAMK_HD N load_numbers(const T* from) {
  using C = typename scalar_of<N>::type;
  if constexpr (lanes_of<N> == 1) {
    return C(to_number(*from));
  } else if constexpr (std::is_same_v<C, T>) {
    return N::load(from);
  } else {
    N pack;
    unroll<lanes_of<N>>([&](int k) CAMK_INLINED { pack.v[k] = to_number(from[k]); });
    return pack;
  }
}

template <class T, class N>
CAMK_HD void store_numbers(T* to, N numbers) {
  if constexpr (lanes_of<N> == 1) {
    *to = from_number<T>(double(numbers));
  } else if constexpr (std::is_same_v<typename scalar_of<N>::type, T>) {
    numbers.store(to);
  } else {
    unroll<lanes_of<N>>([&](int k) CAMK_INLINED { to[k] = from_number<T>(double(numbers.v[k])); });
  }
}

using Bits = Lanes<int32_t>::Raw;

CAMK_HD bool any_lane(Bits bits) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)bits, (__m512i)bits) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)bits, (__m256i)bits);
#else
  uint64_t words[sizeof(Bits) / 8], any = 0;
  memcpy(words, &bits, sizeof(bits));
  for (uint64_t word : words) any |= word;
  return any != 0;
#endif
}

// All bits of the lanes that are not 0, NaN among them.
CAMK_HD Bits nonzero_lanes(Floats x) { return x.v != Floats(0.f).v; }
CAMK_HD bool any_nonzero(Floats x) { return any_lane(nonzero_lanes(x)); }
CAMK_HD bool any_nonzero(Doubles x) { return any_lane((Bits)(x.v != Doubles(0.).v)); }

// A number for each lane, which the compiler would make lane by lane of a loop.
template <auto kOf>
CAMK_HD Bits lane_constants() {
  alignas(64) static constexpr auto kNumbers = [] {
    std::array<int32_t, kLanes> numbers{};
    for (int k = 0; k < kLanes; ++k) numbers[k] = kOf(k);
    return numbers;
  }();
  return Lanes<int32_t>::load(kNumbers.data()).v;
}

// bits[kOf(k)] in lane k.
template <auto kOf>
CAMK_HD Bits permuted(Bits bits) {
  return __builtin_shuffle(bits, lane_constants<kOf>());
}

// Lanes in rows of F: all lanes of a row of which one is set.
template <int F>
CAMK_HD Bits of_rows(Bits bits) {
  if constexpr (F > 1) bits |= permuted<[](int k) { return k ^ 1; }>(bits);
  if constexpr (F > 2) bits |= permuted<[](int k) { return k ^ 2; }>(bits);
  if constexpr (F > 4) bits |= permuted<[](int k) { return k ^ 4; }>(bits);
  return bits;
}

// All bits of the first N lanes.
template <int N>
CAMK_HD Bits first_lanes() {
  return lane_constants<[](int k) { return k < N ? -1 : 0; }>();
}

// The first N lanes from memory, 0 in the others. Written in parts and read as a whole they would wait.
template <int N>
CAMK_HD Bits load_first(const int32_t* from) {
#if defined(__AVX512F__)
  return (Bits)_mm512_maskz_loadu_epi32((1u << N) - 1, from);
#elif defined(__AVX2__)
  return (Bits)_mm256_maskload_epi32(from, (__m256i)first_lanes<N>());
#else
  Bits bits{};
  for (int k = 0; k < N; ++k) bits[k] = from[k];
  return bits;
#endif
}

// Pairs of numbers, pair k at base + 2 index[k], for rows of F lanes: the first numbers and the second ones.
template <int F>
CAMK_HD Vec<Floats, 2> pairs_of_rows(const float* base, Bits index) {
  if constexpr (F == 1) {
    alignas(64) uint32_t entries[kLanes];
    Words((Words::Raw)index).store(entries);
    return load_pairs(base, entries);
  } else {
#if defined(__AVX512F__)
    const auto pairs = (Floats::Raw)_mm512_i32gather_pd(_mm512_castsi512_si256((__m512i)index), base, 8);
#else
    Floats::Raw pairs;
    for (int k = 0; k < kLanes; ++k) pairs[k] = base[2 * index[k / 2] + k % 2];
#endif
    return {{Floats(__builtin_shuffle(pairs, lane_constants<[](int k) { return k / F * 2; }>())),
             Floats(__builtin_shuffle(pairs, lane_constants<[](int k) { return k / F * 2 + 1; }>()))}};
  }
}

template <class T, int F>
class ShortRows;

// A table [rows, width] of numbers T with its moments.
template <class C, class T>
struct RowAdam {
  using Pack = Lanes<C>;
  static constexpr int kWidth = lanes_of<Pack>;

  T* values;
  C *first, *second;
  int32_t* steps;
  int64_t width;
  const C* corrections;  // [last_correction + 1, 2]; the last holds for all later steps
  int64_t last_correction;
  math::AdamRates<C> rates;

  const C* correction(int64_t step) const { return corrections + 2 * std::min(step, last_correction); }

  template <class N>
  CAMK_HD math::AdamNumber<N> load(int64_t at) const {
    return {load_numbers<N>(values + at), load_lanes<N>(first + at), load_lanes<N>(second + at)};
  }
  template <class N>
  CAMK_HD void store(int64_t at, const math::AdamNumber<N>& numbers) const {
    store_numbers(values + at, numbers.value);
    store_lanes(first + at, numbers.first), store_lanes(second + at, numbers.second);
  }
  template <class N>
  CAMK_HD void step_numbers(int64_t at, const T* gradient, const C* by) const {
    store(at, math::adam_step(load<N>(at), load_numbers<N>(gradient), Vec<N, 2>{{N(by[0]), N(by[1])}}, rates));
  }

  bool is_touched(const T* gradient) const {
    int64_t k = 0;
    for (; k + kWidth <= width; k += kWidth) {
      if (any_nonzero(load_numbers<Pack>(gradient + k))) return true;
    }
    for (; k < width; ++k) {
      if (load_numbers<C>(gradient + k) != C(0)) return true;
    }
    return false;
  }

  void step_row(int64_t row, const T* gradient) const {
    if (!is_touched(gradient)) return;
    const C* by = correction(++steps[row]);
    int64_t k = 0;
    for (; k + kWidth <= width; k += kWidth) step_numbers<Pack>(row * width + k, gradient + k, by);
    for (; k < width; ++k) step_numbers<C>(row * width + k, gradient + k, by);
  }

  void fetch(int64_t row) const {
    const int64_t at = row * width;
    __builtin_prefetch(values + at, 1), __builtin_prefetch(first + at, 1), __builtin_prefetch(second + at, 1);
    __builtin_prefetch(steps + row, 1);
  }

  // Rows from `begin` to `end`, or those that are listed there, F numbers each if F is not 0.
  template <int F>
  void step_rows(int64_t begin, int64_t end, const int64_t* rows, const T* gradient) const {
    if constexpr (F > 0) {
      ShortRows<T, F> packs(*this);
      begin = rows ? packs.step_listed(begin, end, rows, gradient) : packs.step_range(begin, end, gradient);
    }
    for (int64_t i = begin; i < end; ++i) {
      if (rows && i + kRowsAhead < end) fetch(rows[i + kRowsAhead]);
      step_row(rows ? rows[i] : i, gradient + i * width);
    }
  }
};

// Rows of F numbers, as many as fit into a pack, side by side.
template <class T, int F>
class ShortRows {
 public:
  static constexpr int kRows = kLanes / F;

  explicit ShortRows(const RowAdam<float, T>& adam) : adam_(adam) { hold(1); }

  // Whole packs of rows from `begin` to `end`; where they end. The touched ones of a block are listed first, because a
  // branch for each is often mispredicted: 0.14 instead of 0.23 ms where 1 % of 2^19 rows of 2 are touched.
  int64_t step_range(int64_t begin, int64_t end, const T* gradient) {
    constexpr int64_t kBlock = 64;
    while (begin + kRows <= end) {
      int64_t touched[kBlock], count = 0;
      for (int64_t i = 0; i < kBlock && begin + kRows <= end; ++i, begin += kRows) {
        touched[count] = begin, count += any_nonzero(load_numbers<Floats>(gradient + begin * F));
      }
      for (int64_t i = 0; i < count; ++i) step(touched[i], gradient + touched[i] * F);
    }
    return begin;
  }

  // Whole packs of the rows that are listed from `begin` to `end`; where they end.
  int64_t step_listed(int64_t begin, int64_t end, const int64_t* rows, const T* gradient) {
    for (; begin + kRows <= end; begin += kRows) {
      for (int64_t i = begin + kRowsAhead; i < std::min(end, begin + kRowsAhead + kRows); ++i) adam_.fetch(rows[i]);
      step_scattered(rows + begin, gradient + begin * F);
    }
    return begin;
  }

 private:
  CAMK_HD void step(int64_t row, const T* gradient) {
    const Floats g = load_numbers<Floats>(gradient);
    const Bits numbers = nonzero_lanes(g);
    const bool whole = !any_lane(~numbers);
    Bits steps = load_first<kRows>(adam_.steps + row);
    const auto before = adam_.template load<Floats>(row * F);
    if (whole && !any_lane(steps ^ before_)) {
      steps = held_;
      adam_.store(row * F, math::adam_step(before, g, by_, adam_.rates));
    } else {
      adam_.store(row * F, moved(before, g, of_rows<F>(numbers), steps));
      if (whole) hold(steps[0]);
    }
    memcpy(adam_.steps + row, &steps, kRows * 4);
  }

  CAMK_HD void step_scattered(const int64_t* rows, const T* gradient) const {
    const Floats g = load_numbers<Floats>(gradient);
    alignas(64) T values[kLanes];
    alignas(64) float first[kLanes], second[kLanes];
    Bits steps{};
    unroll<kRows>([&](int r) CAMK_INLINED {
      const int64_t at = rows[r] * F;
      memcpy(values + r * F, adam_.values + at, F * sizeof(T));
      memcpy(first + r * F, adam_.first + at, F * sizeof(float));
      memcpy(second + r * F, adam_.second + at, F * sizeof(float));
      steps[r] = adam_.steps[rows[r]];
    });
    const math::AdamNumber<Floats> before{load_numbers<Floats>(values), Floats::load(first), Floats::load(second)};
    const auto after = moved(before, g, of_rows<F>(nonzero_lanes(g)), steps);
    store_numbers(values, after.value), after.first.store(first), after.second.store(second);
    unroll<kRows>([&](int r) CAMK_INLINED {
      const int64_t at = rows[r] * F;
      memcpy(adam_.values + at, values + r * F, F * sizeof(T));
      memcpy(adam_.first + at, first + r * F, F * sizeof(float));
      memcpy(adam_.second + at, second + r * F, F * sizeof(float));
      adam_.steps[rows[r]] = steps[r];
    });
  }

  // What becomes of rows, of which those with set lanes are touched, and of their counts of steps, in the first lanes.
  CAMK_HD math::AdamNumber<Floats> moved(const math::AdamNumber<Floats>& before, Floats g, Bits touched,
                                         Bits& steps) const {
    steps -= permuted<[](int k) { return k % kRows * F; }>(touched);
    const Bits most = Lanes<int32_t>(int32_t(adam_.last_correction)).v;
    const auto by = pairs_of_rows<F>(adam_.corrections, steps < most ? steps : most);
    const auto after = math::adam_step(before, g, by, adam_.rates);
    const auto chosen = [&](Floats yes, Floats no) CAMK_INLINED { return Floats(touched ? yes.v : no.v); };
    return {chosen(after.value, before.value), chosen(after.first, before.first), chosen(after.second, before.second)};
  }

  // Expects rows that take this step.
  void hold(int32_t step) {
    held_ = Lanes<int32_t>(step).v & first_lanes<kRows>(), before_ = held_ + first_lanes<kRows>();
    const float* by = adam_.correction(step);
    by_ = {{Floats(by[0]), Floats(by[1])}};
  }

  const RowAdam<float, T> adam_;
  Bits held_, before_;
  Vec<Floats, 2> by_;
};

// body(Constant<F>) for rows of F numbers of which several are a pack, else body(Constant<0>).
template <class C, class Body>
void with_short_rows(int64_t width, const Body& body) {
  if constexpr (std::is_same_v<C, float>) {
    if (width == 1) return body(Constant<1>{});
    if (width == 2) return body(Constant<2>{});
    if constexpr (kLanes > 4) {
      if (width == 4) return body(Constant<4>{});
    }
    if constexpr (kLanes > 8) {
      if (width == 8) return body(Constant<8>{});
    }
  }
  body(Constant<0>{});
}

void check_listed(const AdamTensors& tensors) {
  if (!tensors.rows) return;
  const int64_t *rows = read<int64_t>(*tensors.rows), *end = rows + tensors.count(), limit = tensors.values.size(0);
  const bool exist = std::all_of(rows, end, [=](int64_t row) { return row >= 0 && row < limit; });
  require(exist, kAdam, ": rows must be below ", limit, " and not negative");
}

void step(Tensor values, Tensor first, Tensor second, Tensor steps, Tensor gradient, OptionalTensor rows,
          Tensor corrections, double lr, double beta1, double beta2, double eps) {
  const AdamTensors tensors{values, first, second, steps, gradient, rows, corrections};
  tensors.check();
  check_listed(tensors);
  if (gradient.numel() == 0) return;
  const int64_t width = tensors.width(), count = tensors.count();
  const int64_t grain = std::max<int64_t>(kGrainNumbers / width, 1);
  with_numbers(kAdam, values, [&]<class T>(Tag<T>) {
    using C = accumulator_of<T>;
    const RowAdam<C, T> adam{
        write<T>(values),     write<C>(first),         write<C>(second),       write<int32_t>(steps), width,
        read<C>(corrections), corrections.size(0) - 1, {lr, beta1, beta2, eps}};
    const T* from = read<T>(gradient);
    const int64_t* listed = rows ? read<int64_t>(*rows) : nullptr;
    with_short_rows<C>(width, [&](auto numbers) {
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        adam.template step_rows<decltype(numbers)::value>(begin, end, listed, from);
      });
    });
  });
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) { m.impl("sparse_row_adam", TORCH_BOX(&camk::cpu::step)); }
