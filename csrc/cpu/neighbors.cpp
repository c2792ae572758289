// SPDX-License-Identifier: MIT
// The nearest centres of points, exactly; schema: python/camkernels/neighbors.py.
#include <cstring>

#include "cpu/lanes.h"
#include "cpu/neighbor_cells.h"
#include "launch/neighbors.h"

namespace camk::cpu {
namespace {

constexpr const char* kOp = "nearest";

// Centres that may be among the nearest, and the choice of those that are, by distance, then by row.
class Candidates {
 public:
  explicit Candidates(int64_t k) : k_(k) {}
  void clear() { count_ = 0; }

  // Adds those of a run of centres that are not beyond a limit: points, axis by axis, `stride` apart.
  template <int D, class S>
  void add(const S* points, int64_t stride, const int32_t* rows, int64_t size, const Vec<double, D>& at, double limit) {
    const int64_t room = count_ + size + kLanes;
    if (int64_t(squares_.size()) < room) squares_.resize(2 * room), rows_.resize(2 * room);
#if defined(__AVX512F__)
    const __m512d zero = _mm512_setzero_pd(), most = _mm512_set1_pd(limit);
    for (int64_t p = 0; p < size; p += kLanes) {
      const auto there = __mmask8(size - p >= kLanes ? 0xff : (1 << (size - p)) - 1);
      __m512d d = zero;
      unroll<D>([&](int i) CAMK_INLINED {
        const __m512d offset = load_some(points + i * stride + p, there) - _mm512_set1_pd(at[i]);
        d = d + _mm512_fmadd_pd(offset, offset, zero);  // as rounded_square()
      });
      const __mmask8 near = _mm512_mask_cmp_pd_mask(there, d, most, _CMP_LE_OQ);
      _mm512_storeu_pd(squares_.data() + count_, _mm512_maskz_compress_pd(near, d));
      const __m256i row = _mm256_maskz_loadu_epi32(there, rows + p);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows_.data() + count_), _mm256_maskz_compress_epi32(near, row));
      count_ += __builtin_popcount(near);
    }
#else
    double* to = squares_.data();
    int32_t* row = rows_.data();
    int64_t count = count_;
    for (int64_t first = 0; first < size; first += kBlock) {
      const int64_t block = std::min(kBlock, size - first);
      double squares[kBlock];
      for (int64_t p = 0; p < block; ++p) {
        double d = 0;
        for (int i = 0; i < D; ++i) d += math::rounded_square(double(points[i * stride + first + p]) - at[i]);
        squares[p] = d;
      }
      for (int64_t p = 0; p < block; ++p) {  // without branches, which would be mispredicted
        to[count] = squares[p];
        row[count] = rows[first + p];
        count += squares[p] <= limit;
      }
    }
    count_ = count;
#endif
  }

  // The k nearest, in order; there are at least k.
  void choose(int32_t* rows, double* squares) const {
    if (count_ > kMostRanked || !rank(rows, squares)) sort(rows, squares);
  }

 private:
  static constexpr int64_t kLanes = camk::kLanes / 2;
  typedef int64_t Counts __attribute__((vector_size(8 * kLanes)));
  static constexpr int64_t kBlock = 32;
#if defined(__AVX512F__)
  static __m512d load_some(const double* p, __mmask8 there) { return _mm512_maskz_loadu_pd(there, p); }
  static __m512d load_some(const float* p, __mmask8 there) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(there, p)); }
#endif
  // Comparing all pairs is faster than sorting up to about here.
  static constexpr int64_t kMostRanked = 64;

  // Puts each where as many are nearer; false if some are equally far.
  bool rank(int32_t* rows, double* squares) const {
    double sorted[kMostRanked + kLanes];
    int32_t sorted_rows[kMostRanked + kLanes];
    int64_t ranks = 0;
    for (int64_t i = 0; i < count_; i += kLanes) {
      const Doubles::Raw d = Doubles::load(squares_.data() + i).v;
      Counts nearer = {};
      for (int64_t j = 0; j < count_; ++j) nearer -= squares_[j] < d;  // true is -1
      for (int64_t l = 0; l < std::min(kLanes, count_ - i); ++l) {
        sorted[nearer[l]] = d[l];
        sorted_rows[nearer[l]] = rows_[i + l];
        ranks += nearer[l];
      }
    }
    std::copy_n(sorted, k_, squares);
    std::copy_n(sorted_rows, k_, rows);
    return ranks == count_ * (count_ - 1) / 2;
  }

  void sort(int32_t* rows, double* squares) const {
    std::vector<std::pair<double, int32_t>> all;
    for (int64_t i = 0; i < count_; ++i) all.emplace_back(squares_[i], rows_[i]);
    std::partial_sort(all.begin(), all.begin() + k_, all.end());
    for (int64_t i = 0; i < k_; ++i) squares[i] = all[i].first, rows[i] = all[i].second;
  }

  int64_t k_, count_ = 0;
  std::vector<double> squares_;
  std::vector<int32_t> rows_;
};

// Points in the order of their cells lie anywhere: what they have is fetched this many in advance.
constexpr int64_t kPointsAhead = 8;

// The k nearest centres of a point, which lies in a cell.
template <class S, int D>
void search_point(const math::Cells<S>& cells, const std::vector<Axis>& axes, const S* x, int32_t cell, int64_t k,
                  Candidates& candidates, int32_t* rows, double* squares) {
  Vec<double, D> at;
  Vec<int32_t, D> slab;
  for (int i = D - 1; i >= 0; --i) {
    at[i] = x[i];
    slab[i] = cell % axes[i].count;
    cell /= axes[i].count;
  }
  math::Box<D, std::vector<Axis>> box(axes, at, slab);
  const auto scan = [&](double limit) {
    candidates.clear();
    box.each_run([&](int32_t first, int32_t last) {
      const int64_t begin = cells.starts[first], size = cells.starts[last] - begin;
      candidates.template add<D>(cells.points + begin, cells.count, cells.rows + begin, size, at, limit);
    });
    candidates.choose(rows, squares);
  };
  box.grow_to(k, cells.starts);
  scan(kInfinity);
  const double limit = squares[k - 1];
  if (box.widen_to(limit)) scan(limit);
}

template <class S, int D>
void search(const math::Cells<S>& cells, const S* x, int64_t n, int64_t k, int32_t* rows, double* squares) {
  const std::vector<Axis> axes(cells.axes, cells.axes + D);
  const Sorted sorted(x, n, axes);
  parallel_points(n, [&](int64_t begin, int64_t end) {
    Candidates candidates(k);
    for (int64_t i = begin; i < end; ++i) {
      if (i + kPointsAhead < end) {
        const int64_t next = sorted.points[i + kPointsAhead];
        __builtin_prefetch(x + next * D), __builtin_prefetch(sorted.cells.data() + next);
        __builtin_prefetch(rows + next * k, 1), __builtin_prefetch(squares + next * k, 1);
      }
      const int64_t p = sorted.points[i];
      search_point<S, D>(cells, axes, x + p * D, sorted.cells[p], k, candidates, rows + p * k, squares + p * k);
    }
  });
}

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor points, Tensor rows, Tensor starts, Tensor cuts,
                                   std::vector<int64_t> slabs, int64_t k) {
  const launch::NearestTensors tensors{x, points, rows, starts, cuts, slabs, k};
  tensors.check(kOp);
  const int64_t n = x.size(0);
  const Tensor found = empty(x, {n, k}, ScalarType::Int), squares = empty(x, {n, k}, ScalarType::Double);
  launch::with_coordinates(x, [&]<class S>(Tag<S>) {
    with_dims(x.size(1), [&]<int D>(Constant<D>) {
      search<S, D>(tensors.cells<S>(), read<S>(x), n, k, write<int32_t>(found), write<double>(squares));
    });
  });
  return {found, squares};
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) { m.impl("nearest", TORCH_BOX(&camk::cpu::nearest)); }
