// SPDX-License-Identifier: MIT
// The nearest centres of points on CUDA: a thread takes a point. Formulas and the proof that the search is exact:
// math/neighbors.h.
#include "cuda/device.cuh"
#include "cuda/neighbors.h"

namespace camk::cuda {
namespace {

// Estimated, not measured: small blocks, so that the lists of many fit into shared memory.
constexpr int kThreads = 64;
// Longer lists are kept in the results themselves, in global memory. 48 KB for a block.
constexpr int64_t kMostInShared = 64;

// The nearest centres that a thread has seen, in order: by distance, then by row. Entry j lies at j * kStride.
template <int kStride>
class Nearest {
 public:
  CAMK_DEVICE Nearest(double* squares, int32_t* rows, int32_t k) : squares_(squares), rows_(rows), last_(k - 1) {
#pragma unroll 1
    for (int32_t j = 0; j < k; ++j) put(j, farthest_, farthest_row_);
  }

  CAMK_DEVICE double farthest() const { return farthest_; }
  CAMK_DEVICE bool takes(double square) const { return square <= farthest_; }

  CAMK_DEVICE void offer(double square, int32_t row) {
    if (!before(square, row, farthest_, farthest_row_)) return;
    int32_t j = last_;
#pragma unroll 1
    for (; j > 0 && before(square, row, squares_[at(j - 1)], rows_[at(j - 1)]); --j) {
      put(j, squares_[at(j - 1)], rows_[at(j - 1)]);
    }
    put(j, square, row);
    farthest_ = squares_[at(last_)], farthest_row_ = rows_[at(last_)];
  }

 private:
  CAMK_DEVICE static int64_t at(int32_t j) { return int64_t(j) * kStride; }
  CAMK_DEVICE static bool before(double square, int32_t row, double other, int32_t other_row) {
    return square < other || (square == other && row < other_row);
  }
  CAMK_DEVICE void put(int32_t j, double square, int32_t row) { squares_[at(j)] = square, rows_[at(j)] = row; }

  double* squares_;
  int32_t* rows_;
  int32_t last_;
  double farthest_ = HUGE_VAL;
  int32_t farthest_row_ = INT32_MAX;
};

template <class S, int D, int kStride>
class Search {
 public:
  CAMK_DEVICE Search(const math::Cells<S>& cells, const Vec<double, D>& at, Nearest<kStride>& found)
      : cells_(cells), at_(at), found_(found) {}

  CAMK_DEVICE void run(int64_t k) {
    Vec<int32_t, D> slab;
    unroll<D>([&](auto i) { slab[i] = math::cuts_up_to(cells_.axes[i].cuts, cells_.axes[i].count - 1, at_[i]); });
    Around box(cells_.axes, at_, slab);
    box.grow_to(k, cells_.starts);
    box.each_run([&](int32_t first, int32_t last) { scan(first, last); });
    const Around seen = box;
    if (box.widen_to(found_.farthest())) {
      box.each_run_beyond(seen, [&](int32_t first, int32_t last) { scan(first, last); });
    }
  }

 private:
  using Around = math::Box<D, math::Slabs[math::kMostNeighborDims]>;

  CAMK_DEVICE void scan(int32_t first, int32_t last) {
    const int32_t end = load_readonly(cells_.starts + last);
#pragma unroll 1
    for (int32_t p = load_readonly(cells_.starts + first); p < end; ++p) {
      double square = 0;
      unroll<D>([&](auto i) {
        square += math::rounded_square(double(load_readonly(cells_.points + i * cells_.count + p)) - at_[i]);
      });
      if (found_.takes(square)) found_.offer(square, load_readonly(cells_.rows + p));
    }
  }

  const math::Cells<S>& cells_;
  const Vec<double, D>& at_;
  Nearest<kStride>& found_;
};

// kShared: the lists of a block lie in shared memory, entry by entry, so that its threads meet in no bank.
template <class S, int D, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) nearest_centers(const __grid_constant__ NearestJob<S> job) {
  CAMK_DYNAMIC_SHARED(double, lists);
  const int64_t point = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (point >= job.n) return;
  const auto k = int32_t(job.k);
  double* const squares = job.squares + point * k;
  int32_t* const rows = job.rows + point * k;
  Vec<double, D> at;
  bool finite = true;
  unroll<D>([&](auto i) {
    at[i] = load_readonly(job.x + point * D + i);
    finite &= at[i] - at[i] == 0;
  });
  if (!finite) {
#pragma unroll 1
    for (int32_t j = 0; j < k; ++j) squares[j] = NAN, rows[j] = -1;
    return;
  }
  if constexpr (kShared) {
    double* const own_squares = lists + threadIdx.x;
    int32_t* const own_rows = reinterpret_cast<int32_t*>(lists + k * kThreads) + threadIdx.x;
    Nearest<kThreads> found(own_squares, own_rows, k);
    Search<S, D, kThreads>(job.cells, at, found).run(k);
#pragma unroll 1
    for (int32_t j = 0; j < k; ++j) squares[j] = own_squares[j * kThreads], rows[j] = own_rows[j * kThreads];
  } else {
    Nearest<1> found(squares, rows, k);
    Search<S, D, 1>(job.cells, at, found).run(k);
  }
}

template <class S, int D>
cudaError_t launch_in(const NearestJob<S>& job, cudaStream_t stream) {
  const auto blocks = unsigned(divide_up(job.n, kThreads));
  if (job.k > kMostInShared) return launch(nearest_centers<S, D, false>, {blocks, kThreads, 0, stream}, job);
  const size_t bytes = size_t(job.k) * kThreads * (sizeof(double) + sizeof(int32_t));
  return launch(nearest_centers<S, D, true>, {blocks, kThreads, bytes, stream}, job);
}

}  // namespace

template <class S>
cudaError_t launch_nearest(const NearestJob<S>& job, cudaStream_t stream) {
  return with_dims(job.dims, [&]<int D>(Constant<D>) { return launch_in<S, D>(job, stream); });
}

template cudaError_t launch_nearest(const NearestJob<float>&, cudaStream_t);
template cudaError_t launch_nearest(const NearestJob<double>&, cudaStream_t);

}  // namespace camk::cuda
