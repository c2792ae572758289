// SPDX-License-Identifier: MIT
// Rows of numbers in scratch memory, in the arithmetic type C, read from tensors and written to them.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/products.h"

namespace camk::cpu {

inline constexpr const char* kPackage = "camkernels";  // in errors of what ops share

template <class C>
constexpr ScalarType number_type() {
  return std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
}

// A matrix in scratch memory.
template <class C>
struct Rows {
  C* data = nullptr;
  int64_t stride = 0;
  CAMK_HD C* operator[](int64_t row) const { return data + row * stride; }
};

// How far rows of `width` numbers lie apart in scratch memory: an odd number of the cache's lines, because rows a power
// of two apart meet in few of its sets.
template <class C>
int64_t spacing(int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(C);
  return (padded(width) / kLine | 1) * kLine;
}

// Room for rows of any width up to its own, used for rows of `width`.
template <class C>
Rows<C> of_width(Rows<C> room, int64_t width) {
  return {room.data, spacing<C>(width)};
}

// Memory for numbers, aligned for every load, as long as the object lives.
template <class C>
class Scratch {
 public:
  // Whole packs of zeros.
  C* take(int64_t count) { return static_cast<C*>(std::memset(take_unset(count), 0, bytes_of(count))); }
  C* take_unset(int64_t count) {
    C* made = static_cast<C*>(std::aligned_alloc(64, bytes_of(count)));
    require(made, kPackage, ": no memory for ", bytes_of(count), " bytes");
    owned_.emplace_back(made);
    return made;
  }
  Rows<C> rows(int64_t width, int64_t count) { return {take(count * spacing<C>(width)), spacing<C>(width)}; }

 private:
  static size_t bytes_of(int64_t count) { return size_t(padded(std::max<int64_t>(count, 1))) * sizeof(C); }

  struct Free {
    void operator()(C* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<C, Free>> owned_;
};

template <class To, class From>
CAMK_HD void convert(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<To, From>) {
    if (count == kPanel) return void(std::memcpy(to, from, kPanel * sizeof(To)));
    if (count > kPanel) return void(std::memcpy(to, from, size_t(count) * sizeof(To)));
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[i];
      asm("");  // not a call of memcpy, which takes longer than a few numbers
    }
  } else if constexpr (std::is_floating_point_v<To>) {
    for (int64_t i = 0; i < count; ++i) to[i] = To(to_number(from[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from_number<To>(double(from[i]));
  }
}

// Where a tensor's numbers are. Asking the tensor takes as long as reading a row of them.
struct Source {
  ScalarType type;
  const void* data;
  Source(const Tensor& t) : type(t.scalar_type()), data(t.const_data_ptr()) {}
};
struct Target {
  ScalarType type;
  void* data;
  Target(const Tensor& t) : type(t.scalar_type()), data(t.mutable_data_ptr()) {}
};

// `count` rows of `width` numbers of a tensor, from row `first` on, read as C or written.
template <class C>
void read_rows(const Source& source, int64_t first, int64_t count, int64_t width, Rows<C> to) {
  with_numbers(kPackage, source.type, [&]<class T>(Tag<T>) {
    const T* from = static_cast<const T*>(source.data) + first * width;
    for (int64_t i = 0; i < count; ++i) convert(from + i * width, width, to[i]);
  });
}
template <class C>
void write_rows(Rows<C> from, int64_t first, int64_t count, int64_t width, const Target& target) {
  with_numbers(kPackage, target.type, [&]<class T>(Tag<T>) {
    T* to = static_cast<T*>(target.data) + first * width;
    for (int64_t i = 0; i < count; ++i) convert(from[i], width, to + i * width);
  });
}

}  // namespace camk::cpu
