// SPDX-License-Identifier: MIT
// A chunk of points on its way through the levels: coordinates made safe to compute with, rows turned into channels and
// back. Whatever is special about a point (outside, not finite, fewer levels) is dealt with here, once per point, so
// that the loops over levels know only formulas.
#pragma once
#include <limits>

#include "cpu/channels.h"
#include "cpu/hash_grid_kernels.h"
#include "cpu/parallel.h"

namespace camk::cpu {

// Status of a point: bits 0..6 clamped axes, then the states that concern all axes.
inline constexpr uint16_t kZeroPoint = 1 << 8, kNanPoint = 1 << 9;

template <class S>
struct Chunk {
  const launch::Grid& grid;
  int64_t first, n, pitch;  // points [first, first + n); channels are pitch apart
  S* x;                     // [D, pitch]
  uint16_t* status;         // [pitch]
  const int32_t* counts;    // levels of each point, or null

  int active_levels(int64_t i) const {
    return counts ? std::clamp(counts[first + i], 0, grid.active_levels) : grid.active_levels;
  }

  // Fills x and status of [begin, end); returns whether any of these points needs special treatment.
  [[gnu::noinline]] bool settle(const S* rows, int64_t begin, int64_t end) const {
    const int dims = grid.dims;
    const S* points = rows + (first + begin) * dims;
    bool special = counts != nullptr;
    if (all_inside(points, (end - begin) * dims)) {
      transpose(points, end - begin, dims, dims, x + begin, pitch);
      std::fill(status + begin, status + end, uint16_t(0));
    } else {
      for (int64_t i = begin; i < end; ++i) special |= settle_point(points + (i - begin) * dims, i);
    }
    for (int d = 0; d < dims; ++d) zero_padding(x + d * pitch, end);
    return special;
  }

  // Channels -> rows of out. axes: 0 for values, dims for Jacobians, whose channels run over the axes fastest.
  template <class T>
  [[gnu::noinline]] void write_rows(const S* channels, int axes, T* out, int64_t begin, int64_t end,
                                    bool special) const {
    const int64_t each = std::max(axes, 1), width = grid.channels() * each;
    const int64_t filled = each * grid.features * grid.active_levels;
    T* rows = out + (first + begin) * width;
    transpose(channels + begin, filled, end - begin, pitch, rows, width);
    for (int64_t i = 0; i < end - begin && filled < width; ++i) {
      std::fill(rows + i * width + filled, rows + (i + 1) * width, T{});
    }
    for (int64_t i = begin; i < end && special; ++i) {
      T* row = rows + (i - begin) * width;
      const int64_t kept = each * grid.features * active_levels(i);
      mend(row, kept, axes, status[i]);
      std::fill(row + kept, row + filled, T{});
    }
  }

  // Rows of a gradient, `stride` numbers from one to the next -> channels of the active levels, 0 where the point must
  // not pass a gradient on.
  template <class T>
  [[gnu::noinline]] void read_rows(const T* in, int64_t stride, int axes, S* channels, int64_t begin, int64_t end,
                                   bool special) const {
    const int64_t each = std::max(axes, 1);
    const int64_t filled = each * grid.features * grid.active_levels;
    const bool far = (end - begin) * filled * int64_t(sizeof(S)) > kCacheBytes;
    const auto turn = far ? transpose<true, T, S> : transpose<false, T, S>;
    turn(in + (first + begin) * stride, end - begin, filled, stride, channels + begin, pitch);
    for (int64_t i = begin; i < end && special; ++i) {
      const bool dead = status[i] & (kZeroPoint | kNanPoint);
      const int64_t kept = dead ? 0 : each * grid.features * active_levels(i);
      for (int64_t c = kept; c < filled; ++c) channels[c * pitch + i] = 0;
      for (int64_t c = 0; c < kept && axes > 0; ++c) {
        if (status[i] >> (c % axes) & 1) channels[c * pitch + i] = 0;
      }
    }
    for (int64_t c = 0; c < filled; ++c) zero_padding(channels + c * pitch, end);
  }

  // [D, pitch] -> rows of a coordinate gradient.
  [[gnu::noinline]] void write_coordinates(const S* channels, S* out, int64_t begin, int64_t end, bool special) const {
    const int dims = grid.dims;
    S* rows = out + (first + begin) * dims;
    transpose(channels + begin, dims, end - begin, pitch, rows, dims);
    for (int64_t i = begin; i < end && special; ++i) {
      if (active_levels(i) > 0) mend(rows + (i - begin) * dims, dims, dims, status[i]);
    }
  }

  // Rows of a cotangent of the coordinate gradient -> [D, pitch].
  [[gnu::noinline]] void read_coordinates(const S* in, S* channels, int64_t begin, int64_t end) const {
    const int dims = grid.dims;
    for (int64_t i = begin; i < end; ++i) {
      const bool dead = status[i] & (kZeroPoint | kNanPoint);
      for (int d = 0; d < dims; ++d) {
        channels[d * pitch + i] = dead || (status[i] >> d & 1) ? S(0) : in[(first + i) * dims + d];
      }
    }
    for (int d = 0; d < dims; ++d) zero_padding(channels + d * pitch, end);
  }

  // Zeroes channels over [begin, end) and the padding behind.
  [[gnu::noinline]] void clear(S* channels, int64_t count, int64_t begin, int64_t end) const {
    for (int64_t c = 0; c < count; ++c)
      std::fill(channels + c * pitch + begin, channels + c * pitch + (end == n ? pitch : end), S(0));
  }

 private:
  // Whether none of these coordinates is changed by math::settle.
  static bool all_inside(const S* numbers, int64_t count) {
    int outside = 0;  // unlike a bool, a sum that compilers vectorise
    for (int64_t i = 0; i < count; ++i) outside |= !((numbers[i] >= S(0)) & (numbers[i] <= S(1)));
    return outside == 0;
  }

  // Fills x and status of point i; returns whether it needs special treatment.
  bool settle_point(const S* point, int64_t i) const {
    uint16_t bits = 0;
    for (int d = 0; d < grid.dims; ++d) {
      math::Status s;
      x[d * pitch + i] = math::settle(point[d], grid.outside, s);
      bits |= s == math::kClamped ? 1 << d : s == math::kZeroed ? kZeroPoint : s == math::kNotFinite ? kNanPoint : 0;
    }
    if (bits & (kZeroPoint | kNanPoint)) {
      for (int d = 0; d < grid.dims; ++d) x[d * pitch + i] = 0;
    }
    status[i] = bits & kNanPoint ? kNanPoint : bits;
    return bits != 0;
  }

  void zero_padding(S* channel, int64_t end) const {
    if (end == n) std::fill(channel + n, channel + pitch, S(0));
  }

  // What the status of a point makes of a row whose numbers belong to the axes in turn.
  template <class T>
  static void mend(T* row, int64_t width, int axes, uint16_t status) {
    if (status & (kZeroPoint | kNanPoint)) {
      const double value = status & kNanPoint ? std::numeric_limits<double>::quiet_NaN() : 0.0;
      std::fill(row, row + width, from_number<T>(value));
    } else if (status != 0 && axes > 0) {
      for (int64_t c = 0; c < width; ++c) {
        if (status >> (c % axes) & 1) row[c] = T{};
      }
    }
  }
};

}  // namespace camk::cpu
