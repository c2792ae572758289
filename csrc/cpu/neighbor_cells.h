// SPDX-License-Identifier: MIT
// Centres sorted into cells. Every axis is cut into slabs of about as many centres each, and so the space into cells;
// the centres of a cell lie side by side.
#pragma once
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"

namespace camk::cpu {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Centres in a cell, on average: 3 was faster than 6 for 4 of 20,000 centres in two axes, and as fast for 8 of 100,000
// in three.
inline constexpr int64_t kCellCentres = 3;
// Centres that are sorted to place one cut.
inline constexpr int64_t kCutSample = 32;

// d * d, rounded: the compiler must not fuse it with a sum, which would break ties of mirrored centres.
inline double square(double d) {
#ifdef FP_FAST_FMA
  return std::fma(d, d, 0.0);
#else
  return d * d;
#endif
}

// The slabs of one axis: slab j holds coordinates from cuts[j - 1] up to but not cuts[j].
class Axis {
 public:
  int64_t slabs;
  const double* cuts;   // [slabs - 1]
  const double* first;  // [slabs] the least coordinate of a centre in slab j or above
  const double* last;   // [slabs] the greatest coordinate of a centre in slab j or below

  Axis(int64_t slabs, const double* cuts, const double* first, const double* last)
      : slabs(slabs), cuts(cuts), first(first), last(last), bins_(slabs + 1) {
    if (slabs == 1) return;
    low_ = cuts[0];
    const double extent = cuts[slabs - 2] - low_;
    if (extent > 0 && double(slabs) / extent < kInfinity) scale_ = double(slabs) / extent;
    for (int64_t j = 0; j < slabs - 1; ++j) ++bins_[bin(cuts[j]) + 1];
    std::partial_sum(bins_.begin(), bins_.end(), bins_.begin());
  }

  int64_t slab(double at) const {
    const int64_t b = bin(at);
    const double* base = cuts + bins_[b];
    for (int64_t left = bins_[b + 1] - bins_[b]; left > 0;) {
      const int64_t half = (left + 1) / 2;
      base += base[half - 1] <= at ? half : 0;
      left -= half;
    }
    return base - cuts;
  }

 private:
  // Equal parts of the axis: a coordinate in a lower one is less, so that only the cuts in its own need a look.
  int64_t bin(double at) const { return int64_t(std::clamp((at - low_) * scale_, 0.0, double(slabs - 1))); }

  double low_ = 0, scale_ = 0;
  std::vector<int32_t> bins_;  // [slabs + 1] how many cuts lie in lower bins
};

// Axes packed as numbers: how many slabs each has, then three tables for each.
inline std::vector<Axis> unpack_axes(const double* packed, int64_t dims) {
  std::vector<Axis> axes;
  const double* table = packed + dims;
  for (int64_t i = 0; i < dims; ++i) {
    const auto slabs = int64_t(packed[i]);
    axes.emplace_back(slabs, table, table + slabs, table + 2 * slabs);
    table += 3 * slabs;
  }
  return axes;
}

template <class S>
int64_t cell_of(const S* at, const std::vector<Axis>& axes) {
  int64_t cell = 0;
  for (size_t i = 0; i < axes.size(); ++i) cell = cell * axes[i].slabs + axes[i].slab(at[i]);
  return cell;
}

// ---- building
// --------------------------------------------------------------------------------------------------------

// Some coordinates of each axis, in order.
template <class S>
std::vector<std::vector<double>> sorted_samples(const S* centers, int64_t n, int64_t dims) {
  const auto cuts = int64_t(std::pow(double(n), 1.0 / double(dims)));
  const int64_t step = std::max<int64_t>(1, n / std::max<int64_t>(kCutSample * cuts, 1024));
  std::vector<std::vector<double>> samples(dims);
  for (int64_t i = 0; i < dims; ++i) {
    for (int64_t k = 0; k < n; k += step) samples[i].push_back(centers[k * dims + i]);
    std::sort(samples[i].begin(), samples[i].end());
  }
  return samples;
}

// How far the coordinates spread, without the outermost.
inline double spread_of(const std::vector<double>& sorted) {
  const size_t margin = sorted.size() / 16;
  const double most = sorted[sorted.size() - 1 - margin] - sorted[margin];
  return most > 0 ? most : sorted.back() - sorted.front();
}

// How many slabs each axis is worth, so that cells are about cubes.
inline std::vector<int64_t> slab_counts(const std::vector<std::vector<double>>& samples, int64_t n) {
  const size_t dims = samples.size();
  std::vector<size_t> order(dims);
  std::iota(order.begin(), order.end(), size_t(0));
  std::vector<double> spread(dims);
  for (size_t i = 0; i < dims; ++i) spread[i] = std::min(spread_of(samples[i]), std::numeric_limits<double>::max());
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return spread[a] < spread[b]; });
  std::vector<int64_t> counts(dims, 1);
  double cells = std::max(1.0, double(n) / kCellCentres);
  for (size_t k = 0; k < dims; ++k) {
    double exponent = std::log(cells);  // of spread * (cells / product of the spreads left)^(1 / axes left)
    if (spread[order[k]] <= 0) continue;
    for (size_t j = k; j < dims; ++j) exponent += std::log(spread[order[k]]) - std::log(spread[order[j]]);
    const double slabs = std::floor(std::exp(exponent / double(dims - k)) + 1e-9);
    counts[order[k]] = int64_t(std::clamp(slabs, 1.0, cells));
    cells = std::max(1.0, cells / double(counts[order[k]]));
  }
  return counts;
}

inline std::vector<double> cuts_of(const std::vector<double>& sorted, int64_t slabs) {
  std::vector<double> cuts;
  for (int64_t j = 1; j < slabs; ++j) cuts.push_back(sorted[j * int64_t(sorted.size()) / slabs]);
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

// The tables of all axes, as unpack_axes reads them.
template <class S>
std::vector<double> pack_axes(const S* centers, int64_t n, int64_t dims) {
  const auto samples = sorted_samples(centers, n, dims);
  const auto counts = slab_counts(samples, n);
  std::vector<double> packed(dims);
  for (int64_t i = 0; i < dims; ++i) {
    std::vector<double> cuts = cuts_of(samples[i], counts[i]);
    const int64_t slabs = int64_t(cuts.size()) + 1;
    std::vector<double> first(slabs, kInfinity), last(slabs, -kInfinity);
    const Axis axis(slabs, cuts.data(), nullptr, nullptr);
    for (int64_t k = 0; k < n; ++k) {
      const double at = centers[k * dims + i];
      const int64_t j = axis.slab(at);
      first[j] = std::min(first[j], at);
      last[j] = std::max(last[j], at);
    }
    for (int64_t j = 1; j < slabs; ++j) {
      last[j] = std::max(last[j], last[j - 1]);
      first[slabs - 1 - j] = std::min(first[slabs - 1 - j], first[slabs - j]);
    }
    packed[i] = double(slabs);
    cuts.push_back(kInfinity);  // tables are of one length
    for (const auto& table : {cuts, first, last}) packed.insert(packed.end(), table.begin(), table.end());
  }
  return packed;
}

// Where the rows of each cell begin, and the rows in the order of their cells, a cell's in their own order.
struct Sorted {
  std::vector<int32_t> cells, starts, rows;

  template <class S>
  Sorted(const S* points, int64_t n, const std::vector<Axis>& axes) : cells(n), rows(n) {
    int64_t count = 1;
    for (const Axis& axis : axes) count *= axis.slabs;
    starts.assign(count + 1, 0);
    const auto dims = int64_t(axes.size());
    parallel_points(n, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) cells[k] = int32_t(cell_of(points + k * dims, axes));
    });
    for (int32_t c : cells) ++starts[c + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int32_t> next(starts.begin(), starts.end() - 1);
    for (int64_t k = 0; k < n; ++k) rows[next[cells[k]]++] = int32_t(k);
  }
};

}  // namespace camk::cpu
