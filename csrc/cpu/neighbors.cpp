// SPDX-License-Identifier: MIT
// The nearest centres of points, exactly; schemas: python/camkernels/neighbors.py.
//
// A search extends the cell of its point, towards what is nearest, to a box with k centres, and this box to all slabs
// within the distance of the k-th. For each cut the tables hold the coordinate of the centre nearest to it on either
// side: what is beyond a box is no nearer than that, also after rounding, because rounding is monotone.
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"
#include "cpu/neighbor_cells.h"
#include "cpu/parallel.h"

namespace camk::cpu {
namespace {

constexpr const char* kOp = "nearest";

template <class T>
Tensor as_tensor(const std::vector<T>& numbers, const Tensor& like, ScalarType type) {
  const Tensor t = empty(like, {int64_t(numbers.size())}, type);
  std::copy(numbers.begin(), numbers.end(), write<T>(t));
  return t;
}

// body(Tag<number>) for float32 and float64.
template <class Body>
void with_coordinates(const Tensor& t, const Body& body) {
  check_contiguous(t, kOp, "coordinates");
  if (t.scalar_type() == ScalarType::Double) return body(Tag<double>{});
  require(t.scalar_type() == ScalarType::Float, kOp, ": coordinates must be float32 or float64");
  body(Tag<float>{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> build(Tensor centers) {
  require(centers.dim() == 2 && centers.size(0) > 0, kOp, ": centers must be [n, d] with n > 0");
  const int64_t n = centers.size(0), dims = centers.size(1);
  require(dims >= 1 && dims <= 4 && n <= std::numeric_limits<int32_t>::max(), kOp, ": too many axes or centers");
  const Tensor points = empty(centers, {dims, n});
  Tensor rows, starts, axes;
  with_coordinates(centers, [&]<class S>(Tag<S>) {
    const S* from = read<S>(centers);
    const std::vector<double> packed = pack_axes(from, n, dims);
    const Sorted sorted(from, n, unpack_axes(packed.data(), dims));
    S* to = write<S>(points);
    for (int64_t i = 0; i < dims; ++i) {
      for (int64_t k = 0; k < n; ++k) to[i * n + k] = from[sorted.rows[k] * dims + i];
    }
    axes = as_tensor(packed, centers, ScalarType::Double);
    starts = as_tensor(sorted.starts, centers, ScalarType::Int);
    rows = as_tensor(sorted.rows, centers, ScalarType::Int);
  });
  return {points, rows, starts, axes};
}

// ---- searching
// -------------------------------------------------------------------------------------------------------

template <class S>
struct Cells {
  std::vector<Axis> axes;
  int64_t count;          // of centres
  const S* points;        // [d, n] in the order of cells
  const int32_t* rows;    // [n] where the points stood
  const int32_t* starts;  // [cells + 1]
};

// Centres that may be among the nearest, and the choice of those that are, by distance, then by row.
class Candidates {
 public:
  explicit Candidates(int64_t k) : k_(k) {}
  void clear() { count_ = 0; }

  // Adds those of a run of centres that are not beyond a limit: points, axis by axis, `stride` apart.
  template <int D, class S>
  void add(const S* points, int64_t stride, const int32_t* rows, int64_t size, const double* at, double limit) {
    const int64_t room = count_ + size + kLanes;
    if (int64_t(squares_.size()) < room) squares_.resize(2 * room), rows_.resize(2 * room);
#if defined(__AVX512F__)
    const __m512d zero = _mm512_setzero_pd(), most = _mm512_set1_pd(limit);
    for (int64_t p = 0; p < size; p += kLanes) {
      const auto there = __mmask8(size - p >= kLanes ? 0xff : (1 << (size - p)) - 1);
      __m512d d = zero;
      unroll<D>([&](int i) CAMK_INLINED {
        const __m512d offset = load_some(points + i * stride + p, there) - _mm512_set1_pd(at[i]);
        d = d + _mm512_fmadd_pd(offset, offset, zero);  // as square()
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
        for (int i = 0; i < D; ++i) d += square(double(points[i * stride + first + p]) - at[i]);
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

// The search of one point, in boxes of cells around it.
template <class S, int D>
class Search {
 public:
  Search(const Cells<S>& cells, const S* at, int64_t cell, Candidates& candidates)
      : cells_(cells), candidates_(candidates) {
    for (int i = D - 1; i >= 0; --i) {
      at_[i] = at[i];
      low_[i] = high_[i] = int32_t(cell) % int32_t(axis(i).slabs);
      cell = int32_t(cell) / int32_t(axis(i).slabs);
    }
  }

  void run(int64_t k, int32_t* rows, double* squares) {
    grow_to(k);
    scan(kInfinity);
    candidates_.choose(rows, squares);
    const double limit = squares[k - 1];
    if (!widen_to(limit)) return;
    scan(limit);
    candidates_.choose(rows, squares);
  }

 private:
  const Axis& axis(int i) const { return cells_.axes[i]; }
  // Squared distances to the nearest coordinate of a centre beyond the box.
  double above(int i) const { return square(axis(i).first[high_[i] + 1] - at_[i]); }
  double below(int i) const { return square(axis(i).last[low_[i] - 1] - at_[i]); }
  bool ends_above(int i) const { return high_[i] + 1 == axis(i).slabs; }
  bool ends_below(int i) const { return low_[i] == 0; }

  // Extends the box to what is nearest, until it holds k centres.
  void grow_to(int64_t k) {
    while (count() < k) {
      int64_t* side = nullptr;
      double least = kInfinity;
      for (int i = 0; i < D; ++i) {
        if (!ends_above(i) && (side == nullptr || above(i) < least)) least = above(i), side = &high_[i];
        if (!ends_below(i) && (side == nullptr || below(i) < least)) least = below(i), side = &low_[i];
      }
      *side += side >= high_ && side < high_ + D ? 1 : -1;
    }
  }

  // Extends the box to all centres that may be within a distance; whether that changes it.
  bool widen_to(double limit) {
    bool wider = false;
    for (int i = 0; i < D; ++i) {
      while (!ends_above(i) && above(i) <= limit) ++high_[i], wider = true;
      while (!ends_below(i) && below(i) <= limit) --low_[i], wider = true;
    }
    return wider;
  }

  // body(begin, end) for each run of centres in the box.
  template <class Body>
  void each_run(const Body& body) const {
    int64_t slab[D];
    std::copy_n(low_, D, slab);
    for (;;) {
      int64_t cell = 0;
      for (int i = 0; i < D; ++i) cell = cell * axis(i).slabs + slab[i];
      body(cells_.starts[cell], cells_.starts[cell + high_[D - 1] - low_[D - 1] + 1]);
      int i = D - 2;
      for (; i >= 0 && slab[i] == high_[i]; --i) slab[i] = low_[i];
      if (i < 0) return;
      ++slab[i];
    }
  }

  int64_t count() const {
    int64_t sum = 0;
    each_run([&](int32_t begin, int32_t end) { sum += end - begin; });
    return sum;
  }

  // Takes all centres of the box that are not beyond a limit.
  void scan(double limit) {
    candidates_.clear();
    each_run([&](int32_t begin, int32_t end) {
      candidates_.template add<D>(cells_.points + begin, cells_.count, cells_.rows + begin, end - begin, at_, limit);
    });
  }

  const Cells<S>& cells_;
  Candidates& candidates_;
  double at_[D];
  int64_t low_[D], high_[D];
};

// Points in the order of their cells lie anywhere: what they have is fetched this many in advance.
constexpr int64_t kPointsAhead = 8;

template <class S, int D>
void search(const Cells<S>& cells, const S* x, int64_t n, int64_t k, int32_t* rows, double* squares) {
  const Sorted sorted(x, n, cells.axes);
  parallel_points(n, [&](int64_t begin, int64_t end) {
    Candidates candidates(k);
    for (int64_t i = begin; i < end; ++i) {
      if (i + kPointsAhead < end) {
        const int64_t next = sorted.rows[i + kPointsAhead];
        __builtin_prefetch(x + next * D), __builtin_prefetch(sorted.cells.data() + next);
        __builtin_prefetch(rows + next * k, 1), __builtin_prefetch(squares + next * k, 1);
      }
      const int64_t point = sorted.rows[i];
      Search<S, D> search(cells, x + point * D, sorted.cells[point], candidates);
      search.run(k, rows + point * k, squares + point * k);
    }
  });
}

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor points, Tensor rows, Tensor starts, Tensor axes, int64_t k) {
  const int64_t n = x.size(0), dims = points.size(0);
  require(x.dim() == 2 && x.size(1) == dims, kOp, ": x must be [n, ", dims, "]");
  require(n <= std::numeric_limits<int32_t>::max(), kOp, ": too many points");
  require(x.scalar_type() == points.scalar_type(), kOp, ": x and centers must have one dtype");
  require(k >= 1 && k <= points.size(1), kOp, ": k must be from 1 to the number of centers");
  check_contiguous(points, kOp, "centers");
  const Tensor found = empty(x, {n, k}, ScalarType::Int), squares = empty(x, {n, k}, ScalarType::Double);
  with_coordinates(x, [&]<class S>(Tag<S>) {
    const Cells<S> cells{unpack_axes(read<double>(axes), dims), points.size(1), read<S>(points), read<int32_t>(rows),
                         read<int32_t>(starts)};
    const auto run = [&]<int D>() {
      search<S, D>(cells, read<S>(x), n, k, write<int32_t>(found), write<double>(squares));
    };
    if (dims == 1) return run.template operator()<1>();
    if (dims == 2) return run.template operator()<2>();
    if (dims == 3) return run.template operator()<3>();
    run.template operator()<4>();
  });
  return {found, squares};
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) {
  m.impl("neighbor_cells", TORCH_BOX(&camk::cpu::build));
  m.impl("nearest", TORCH_BOX(&camk::cpu::nearest));
}
