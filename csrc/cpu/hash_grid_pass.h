// SPDX-License-Identifier: MIT
// How the hash-grid operators go over points and levels: chunks of points that bound the scratch memory, in each chunk
// level after level, so that one level's table stays in cache; points are split among threads where each writes its own
// rows, levels where threads write the table gradient.
#pragma once
#include "cpu/hash_grid_chunk.h"
#include "cpu/memory.h"

namespace camk::cpu {

// Scratch of a chunk stays about this large. Every level's table is read once per chunk, which at 2^18 points of 16 x 2
// channels costs 5 % of the time; less memory costs more, more memory gains nothing.
inline constexpr int64_t kScratchBytes = 40 << 20;

// S: coordinate arithmetic, T: table storage.
template <class S, class T>
class Pass {
 public:
  using A = accumulator_of<T>;

  // channels: numbers of scratch that each point needs besides its coordinates.
  Pass(const launch::Grid& grid, const Tensor& x, const std::optional<Tensor>& counts, int64_t channels)
      : grid_(grid), x_(read<S>(x)), counts_(counts ? read<int32_t>(*counts) : nullptr), points_(x.size(0)) {
    const int64_t numbers = grid.dims + channels, bytes = numbers * int64_t(sizeof(S)) + int64_t(sizeof(uint16_t));
    pitch_ = round_up(std::min(points_, std::max<int64_t>(kScratchBytes / bytes, 1024)), kPointBlock);
    memory_ = in_large_pages(scratch_bytes(x, pitch_ * bytes + 64));
    numbers_ = reinterpret_cast<S*>(round_up(reinterpret_cast<intptr_t>(write<uint8_t>(memory_)), 64));
    status_ = reinterpret_cast<uint16_t*>(numbers_ + pitch_ * numbers);
    for (int f = 0; f < grid.features; f += loops_.back().features) {
      loops_.push_back(kernels_for<S, T>(grid.dims, grid.nearest(), grid.features - f, f == 0));
    }
  }

  const S* x() const { return x_; }
  // The scratch numbers of channel c.
  S* channel(int64_t c) const { return numbers_ + (grid_.dims + c) * pitch_; }

  template <class Body>
  void each_chunk(const Body& body) const {
    for (int64_t first = 0; first < points_; first += pitch_) {
      body(Chunk<S>{grid_, first, std::min(pitch_, points_ - first), pitch_, numbers_, status_, counts_});
    }
  }

  // body(loops, piece, channel) for every active level and group of features, with the rows of `table`.
  template <class Body>
  void each_piece(const T* table, int64_t begin, int64_t end, const Body& body) const {
    for (int level = 0; level < grid_.active_levels; ++level) {
      each_group([&](const Kernels<S, T>& loops, int64_t f) {
        auto piece = piece_of<Piece<S, T>>(level, begin, end);
        piece.table = table + grid_.offsets[level] * grid_.features + f;
        body(loops, piece, int64_t(level) * grid_.features + f);
      });
    }
  }

  // The same towards the table gradient, where each level, or slice of it, has one owner that sums its points in order:
  // no atomics, and the same bits for any number of threads. The first chunk clears what it adds to.
  template <class Body>
  void each_owned_piece(const Chunk<S>& chunk, A* sums, const Body& body) const {
    const int threads = int(torch::stable::get_num_threads());
    const int slices = std::max(1, threads / std::max(1, grid_.active_levels));
    parallel_tasks(int64_t(grid_.n_levels) * slices, [&](int64_t task) {
      const int level = grid_.n_levels - 1 - int(task / slices);  // fine levels, the slow ones, first
      const int64_t size = grid_.levels[level].size, slice = task % slices;
      const int64_t first = size * slice / slices, count = size * (slice + 1) / slices - first;
      A* rows = sums + grid_.offsets[level] * grid_.features;
      if (chunk.first == 0) std::fill(rows + first * grid_.features, rows + (first + count) * grid_.features, A(0));
      if (level >= grid_.active_levels) return;
      each_group([&](const Kernels<S, T>& loops, int64_t f) {
        auto piece = piece_of<ScatterPiece<S, A>>(level, 0, chunk.n);
        piece.sums = rows + f;
        piece.first = uint32_t(first), piece.count = uint32_t(count);
        body(loops, piece, int64_t(level) * grid_.features + f);
      });
    });
  }

 private:
  template <class Body>
  void each_group(const Body& body) const {
    int64_t f = 0;
    for (const Kernels<S, T>& loops : loops_) {
      body(loops, f);
      f += loops.features;
    }
  }
  template <class P>
  P piece_of(int level, int64_t begin, int64_t end) const {
    P piece{};
    piece.level = grid_.levels[level];
    piece.dims = grid_.dims, piece.interpolation = grid_.interpolation;
    piece.begin = begin, piece.end = end, piece.pitch = pitch_;
    piece.x = numbers_, piece.features = grid_.features;
    // Where the rows are in the cache, prefetching takes as long as all the rest; beyond, the pass takes 1.2 to 2 times
    // as long without.
    piece.beyond_cache = rows_in_use(piece.level) * grid_.features * sizeof(*piece.table) > kCacheBytes;
    return piece;
  }

  // Entries of a level that points between 0 and 1 can touch.
  double rows_in_use(const math::Level& level) const {
    double vertices = 1;
    for (int d = 0; d < grid_.dims; ++d) vertices *= level.scale[d] + 2;
    return std::min(vertices, double(level.size));
  }

  const launch::Grid& grid_;
  const S* x_;
  const int32_t* counts_;
  int64_t points_, pitch_;
  Tensor memory_;
  S* numbers_;
  uint16_t* status_;
  std::vector<Kernels<S, T>> loops_;
};

// The table gradient while it is summed: the output itself, or float32 sums that are rounded to it at the end.
template <class T>
class TableGradient {
 public:
  using A = accumulator_of<T>;
  TableGradient(const Tensor& table, bool wanted, bool untouched) {
    out_ = wanted ? in_large_pages(torch::stable::empty_like(table)) : empty(table, {0});
    if (!wanted) return;
    constexpr bool direct = std::is_same_v<A, T>;
    sums_ = direct ? out_ : in_large_pages(torch::stable::new_empty(table, table.sizes(), ScalarType::Float));
    if (untouched) torch::stable::zero_(sums_);
  }
  A* sums() const { return write<A>(sums_); }
  Tensor rounded() const {
    if constexpr (!std::is_same_v<A, T>) {
      if (out_.numel() == 0) return out_;
      const A* from = read<A>(sums_);
      T* to = write<T>(out_);
      torch::stable::parallel_for(0, out_.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[i] = from_number<T>(from[i]);
      });
    }
    return out_;
  }

 private:
  Tensor out_, sums_;
};

}  // namespace camk::cpu
