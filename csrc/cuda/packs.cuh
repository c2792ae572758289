// SPDX-License-Identifier: MIT
// Packs: numbers that a thread computes together, and how they come from rows of a tensor and go there.
#pragma once
#include "cuda/device.cuh"
#include "cuda/storage.cuh"

namespace camk::cuda {

template <class S>
struct alignas(kPackBytes) Pack : Vec<S, kPackBytes / int(sizeof(S))> {
  static constexpr int kNumbers = kPackBytes / int(sizeof(S));
  using Numbers = Vec<S, kNumbers>;

  Pack() = default;
  CAMK_DEVICE explicit Pack(S number) {
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) (*this)[k] = number;
  }
  CAMK_DEVICE explicit Pack(const Numbers& numbers) : Numbers(numbers) {}
};

template <class S>
CAMK_DEVICE Pack<S> operator+(const Pack<S>& a, const Pack<S>& b) {
  Pack<S> sum;
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) sum[k] = a[k] + b[k];
  return sum;
}
template <class S>
CAMK_DEVICE Pack<S> operator*(const Pack<S>& a, const Pack<S>& b) {
  Pack<S> product;
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) product[k] = a[k] * b[k];
  return product;
}
template <class S>
CAMK_DEVICE Pack<S> multiply_add(S x, const Pack<S>& y, const Pack<S>& z) {
  Pack<S> sum;
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) sum[k] = camk::multiply_add(x, y[k], z[k]);
  return sum;
}
template <class S>
CAMK_DEVICE S dot(const Pack<S>& a, const Pack<S>& b) {
  S sum(0);
#pragma unroll
  for (int k = 0; k < Pack<S>::kNumbers; ++k) sum = camk::multiply_add(a[k], b[k], sum);
  return sum;
}

// Where the numbers of a pack are stored: `first` numbers behind the tensor's first, `left` to the end of their row.
// whole: they are an aligned word, as all packs of that tensor.
struct PackPlace {
  Storage storage;
  bool whole;
  int64_t first, left;
};

// Zeros beyond the end of the row.
template <class S>
CAMK_DEVICE Pack<S> load_pack(const void* from, const PackPlace& place) {
  Pack<S> numbers(S(0));
  with_storage_of<S>(place.storage, [&]<class T>(T*) {
    const T* row = static_cast<const T*>(from) + place.first;
    if (place.whole) {
      numbers = Pack<S>(load_row<Pack<S>::kNumbers, S>(row, place.storage));
    } else {
#pragma unroll
      for (int n = 0; n < Pack<S>::kNumbers; ++n) {
        if (n < place.left) numbers[n] = S(to_number(load_readonly(row + n), place.storage));
      }
    }
  });
  return numbers;
}

template <class S>
CAMK_DEVICE void store_pack(void* to, const PackPlace& place, const Pack<S>& numbers) {
  with_storage_of<S>(place.storage, [&]<class T>(T*) {
    T* row = static_cast<T*>(to) + place.first;
    if (place.whole) {
      store_row<T, Pack<S>::kNumbers, S>(row, numbers, place.storage);
    } else {
#pragma unroll
      for (int n = 0; n < Pack<S>::kNumbers; ++n) {
        if (n >= place.left) break;
        T number;
        from_number(number, numbers[n], place.storage);
        store_streaming(row + n, number);
      }
    }
  });
}

}  // namespace camk::cuda
