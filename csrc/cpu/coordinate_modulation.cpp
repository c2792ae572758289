// SPDX-License-Identifier: MIT
// The operators of coordinate_modulation on the CPU; schemas and shapes: python/camkernels/coordinate_modulation.py.
// The setting `deterministic` changes nothing here: sums have one order for any number of threads.
#include "cpu/channels.h"
#include "cpu/coordinate_modulation_loops.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace camk::cpu {
namespace {

using launch::NodeGrids;
using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "coordinate_modulation";

// Nodes that are packed, or unpacked, at a time.
constexpr int64_t kNodeBlock = 64;
// Rows of points that are converted at a time hold about this many numbers: they stay in the first-level cache.
constexpr int64_t kBlockNumbers = 4096, kBlockPoints = 64;

NodeGrids checked(const Tensor& coords, const Tensor& grids, bool zeros, bool align_corners, bool planes) {
  const bool number = is_wide(coords) || coords.scalar_type() == ScalarType::Float;
  require(number, kOp, ": coords must be float32 or float64");
  require(is_wide(coords) || !is_wide(grids), kOp, ": coords must be float64 beside float64 grids");
  with_numbers(kOp, grids, [](auto) {});  // refuses other types here, where no thread has begun
  check_contiguous(coords, kOp, "coords");
  check_contiguous(grids, kOp, "grids");
  return launch::measure_grids(coords, grids, {zeros, align_corners, planes});
}

void check_like(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check_contiguous(t, kOp, name);
  require(t.scalar_type() == like.scalar_type() && t.numel() == numel, kOp, ": dtype or size of ", name);
}

// body(rows, of where they lie in the grids, of where they go in a packed row) for every plane: rows of a plane that
// are `nodes` apart in the grids.
template <class Body>
void each_run(const NodeGrids& g, int plane, const Body& body) {
  if (g.planes == 1) return body(g.width(), int64_t(0), int64_t(0));
  for (int64_t l = 0; l < 2 * g.layers; ++l) body(g.each(), (l * g.planes + plane) * g.each(), l * g.each());
}

// Grids [layers, 2, (3,) (channels,) *nodes] <-> rows [planes, nodes + 1, pitch], all numbers of a node side by side.
template <class S>
class PackedGrids {
 public:
  PackedGrids(const NodeGrids& grids, int64_t lanes, const Tensor& like, int64_t copies = 1)
      : grids_(grids), pitch_(round_up(grids.width(), lanes)) {
    packs_ = pitch_ / lanes;
    numbers_ = grids.planes * (int64_t(grids.grid.rows) + 1) * pitch_;
    require(numbers_ / lanes < int64_t(1) << 32, kOp,
            ": grids of 2^32 packs and more run with backend='reference' only");
    memory_ = in_large_pages(scratch_bytes(like, copies * numbers_ * int64_t(sizeof(S))));
  }
  int64_t pitch() const { return pitch_; }
  int64_t numbers() const { return numbers_; }
  S* data(int64_t copy = 0) const { return write<S>(memory_) + copy * numbers_; }
  // A lookup in these grids.
  LookupPiece<S> piece(const Tensor& coords) const {
    return {grids_.grid_in<S>(packs_), grids_.dims, grids_.slots, pitch_, read<S>(coords), data()};
  }

  void pack(const Tensor& from) const {
    each_block([&](int plane, int64_t first, int64_t count) {
      S* rows = row(plane, first);
      with_numbers(kOp, from, [&]<class T>(Tag<T>) {
        const T* numbers = read<T>(from) + first;
        each_run(grids_, plane, [&](int64_t runs, int64_t source, int64_t target) {
          transpose(numbers + source * grids_.grid.rows, runs, count, grids_.grid.rows, rows + target, pitch_);
        });
      });
      for (int64_t i = 0; i < count; ++i) std::fill(rows + i * pitch_ + grids_.width(), rows + (i + 1) * pitch_, S(0));
    });
    for (int plane = 0; plane < grids_.planes; ++plane) {
      S* beyond = row(plane, grids_.grid.rows);
      std::fill(beyond, beyond + pitch_, S(0));
    }
  }

  // The sum of all copies, in their order.
  void unpack_sum(int64_t copies, const Tensor& to) const {
    each_block([&](int plane, int64_t first, int64_t count) {
      S* rows = row(plane, first);
      for (int64_t copy = 1; copy < copies; ++copy) {
        const S* more = rows + copy * numbers_;
        for (int64_t k = 0; k < count * pitch_; ++k) rows[k] += more[k];
      }
      with_numbers(kOp, to, [&]<class T>(Tag<T>) {
        T* numbers = write<T>(to) + first;
        each_run(grids_, plane, [&](int64_t runs, int64_t target, int64_t source) {
          transpose(rows + source, count, runs, pitch_, numbers + target * grids_.grid.rows, grids_.grid.rows);
        });
      });
    });
  }

 private:
  S* row(int plane, int64_t node) const { return data() + (plane * (int64_t(grids_.grid.rows) + 1) + node) * pitch_; }

  // body(plane, first node, count)
  template <class Body>
  void each_block(const Body& body) const {
    const int64_t rows = grids_.grid.rows, blocks = (rows + kNodeBlock - 1) / kNodeBlock;
    torch::stable::parallel_for(0, grids_.planes * blocks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b % blocks * kNodeBlock;
        body(int(b / blocks), first, std::min(kNodeBlock, rows - first));
      }
    });
  }

  const NodeGrids& grids_;
  int64_t pitch_, packs_, numbers_;
  Tensor memory_;
};

// Rows [points, pitch] of a few points' numbers: where tensors [points, width] have them, or, if these store other
// numbers or their rows are not whole packs, converted from and to them.
template <class S>
class RowBlock {
 public:
  RowBlock(ScalarType stored, int64_t width, int64_t pitch)
      : width_(width), pitch_(pitch), in_place_(width == pitch && stored == number_type<S>()) {
    if (in_place_) return;
    points_ = std::clamp<int64_t>(kBlockNumbers / pitch / kPointBlock * kPointBlock, kPointBlock, kBlockPoints);
    numbers_.resize(points_ * pitch);
  }
  // How many at a time.
  int64_t points() const { return points_; }

  const S* read(const Source& from, int64_t begin, int64_t end) {
    if (in_place_) return static_cast<const S*>(from.data) + begin * width_;
    read_rows(from, begin, end - begin, width_, Rows<S>{numbers_.data(), pitch_});
    return numbers_.data();
  }
  // Where to write rows from `begin` on; then written.
  S* place(const Target& to, int64_t begin) {
    return in_place_ ? static_cast<S*>(to.data) + begin * width_ : numbers_.data();
  }
  void written(const Target& to, int64_t begin, int64_t end) {
    if (!in_place_) write_rows(Rows<S>{numbers_.data(), pitch_}, begin, end - begin, width_, to);
  }

 private:
  int64_t width_, pitch_, points_ = int64_t(1) << 60;
  bool in_place_;
  std::vector<S> numbers_;
};

// Points go in pieces that sum into rows of their own, added up in order: the same bits for any number of threads.
struct Pieces {
  int64_t count, each;

  // A piece is worth a thread's while, adds at least as many rows as it clears, and all of them have room.
  Pieces(const NodeGrids& g, int64_t points, bool sums, int64_t bytes) {
    constexpr int64_t kLeastPoints = 2048, kMost = 64, kMostBytes = 64 << 20;
    count = std::min(points / kLeastPoints, kMost);
    if (sums) count = std::min({count, points * g.corners() / g.grid.rows, kMostBytes / bytes});
    count = std::max<int64_t>(count, 1);
    each = (points + count - 1) / count;
  }
};

Tensor forward(Tensor coords, Tensor grids, bool zeros, bool align_corners, bool planes, bool) {
  const NodeGrids g = checked(coords, grids, zeros, align_corners, planes);
  std::vector<int64_t> sizes{coords.size(0), g.layers, 2};
  if (g.channels >= 0) sizes.push_back(g.channels);
  const Tensor y =
      in_large_pages(allocate([&] { return torch::stable::new_empty(grids, {sizes.data(), sizes.size()}); }));
  const Target to(y);
  with_arithmetic(is_wide(coords), [&]<class S>(Tag<S>) {
    const LookupKernels<S> loops = kernels_for<S>(g);
    const PackedGrids<S> packed(g, loops.lanes, coords);
    packed.pack(grids);
    parallel_points(coords.size(0), [&](int64_t begin, int64_t end) {
      RowBlock<S> rows(to.type, g.width(), packed.pitch());
      LookupPiece<S> piece = packed.piece(coords);
      for (int64_t i = begin; i < end; i += rows.points()) {
        piece.begin = i, piece.end = std::min(end, i + rows.points());
        piece.y = rows.place(to, i);
        loops.value(piece);
        rows.written(to, piece.begin, piece.end);
      }
    });
  });
  return y;
}

// Goes over points with the gradient `grad` of the value; body(loops, piece) computes a block of them. Returns the
// gradient in the grids.
template <class S, class Tell, class Body>
Tensor sum_over_points(const NodeGrids& g, const Tensor& coords, const Tensor& grids, const Tensor& grad, bool wanted,
                       const Tell& tell, const Body& body) {
  const LookupKernels<S> loops = kernels_for<S>(g);
  const PackedGrids<S> packed(g, loops.lanes, coords);
  packed.pack(grids);
  const Source from(grad);
  const Pieces pieces(g, coords.size(0), wanted, packed.numbers() * int64_t(sizeof(S)));
  const PackedGrids<S> sums(g, loops.lanes, coords, wanted ? pieces.count : 0);
  parallel_tasks(pieces.count, [&](int64_t task) {
    RowBlock<S> rows(from.type, g.width(), packed.pitch());
    LookupPiece<S> piece = packed.piece(coords);
    tell(piece);
    piece.sums = wanted ? sums.data(task) : nullptr;
    if (wanted) std::fill(piece.sums, piece.sums + sums.numbers(), S(0));
    const int64_t last = std::min(coords.size(0), (task + 1) * pieces.each);
    for (int64_t i = task * pieces.each; i < last; i += rows.points()) {
      piece.begin = i, piece.end = std::min(last, i + rows.points());
      piece.g = rows.read(from, piece.begin, piece.end);
      body(loops, piece);
    }
  });
  if (!wanted) return empty(grids, {0});
  const Tensor ggrids = in_large_pages(empty_as(grids));
  sums.unpack_sum(pieces.count, ggrids);
  return ggrids;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor coords, Tensor grids, bool zeros, bool align_corners,
                                    bool planes, bool, std::vector<bool> mask) {
  const NodeGrids g = checked(coords, grids, zeros, align_corners, planes);
  check_mask(kOp, mask, 2);
  check_like(grad, grids, coords.size(0) * g.width(), "grad_y");
  const Tensor gu = mask[0] ? empty_as(coords) : empty(coords, {0});
  Tensor ggrids;
  with_arithmetic(is_wide(coords), [&]<class S>(Tag<S>) {
    const auto tell = [&](LookupPiece<S>& piece) { piece.gu = mask[0] ? write<S>(gu) : nullptr; };
    ggrids = sum_over_points<S>(g, coords, grids, grad, mask[1], tell,
                                [](const auto& loops, const LookupPiece<S>& piece) { loops.backward(piece); });
  });
  return {gu, ggrids};
}

std::tuple<Tensor, Tensor, Tensor> backward_backward(OptionalTensor v, OptionalTensor tangents, Tensor grad,
                                                     Tensor coords, Tensor grids, bool zeros, bool align_corners,
                                                     bool planes, bool, std::vector<bool> mask) {
  const NodeGrids g = checked(coords, grids, zeros, align_corners, planes);
  check_mask(kOp, mask, 3);
  check_like(grad, grids, coords.size(0) * g.width(), "grad_y");
  if (v) check_like(*v, coords, coords.numel(), "grad_coords");
  if (tangents) check_like(*tangents, grids, grids.numel(), "grad_grids");
  const Tensor ggrad = mask[0] ? in_large_pages(empty_as(grad)) : empty(grad, {0});
  const Tensor gu = mask[1] ? empty_as(coords) : empty(coords, {0});
  const Target to(ggrad);
  Tensor ggrids;
  with_arithmetic(is_wide(coords), [&]<class S>(Tag<S>) {
    const PackedGrids<S> along(g, kernels_for<S>(g).lanes, coords, tangents ? 1 : 0);
    if (tangents) along.pack(*tangents);
    const auto tell = [&](LookupPiece<S>& piece) {
      piece.v = v ? read<S>(*v) : nullptr;
      piece.tangents = tangents ? along.data() : nullptr;
      piece.gu = mask[1] ? write<S>(gu) : nullptr;
    };
    ggrids = sum_over_points<S>(g, coords, grids, grad, mask[2], tell, [&](const auto& loops, LookupPiece<S>& piece) {
      RowBlock<S> rows(to.type, g.width(), piece.pitch);
      piece.y = mask[0] ? rows.place(to, piece.begin) : nullptr;
      loops.second_order(piece);
      if (mask[0]) rows.written(to, piece.begin, piece.end);
    });
  });
  return {ggrad, gu, ggrids};
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) {
  m.impl("coordinate_modulation", TORCH_BOX(&camk::cpu::forward));
  m.impl("coordinate_modulation_backward", TORCH_BOX(&camk::cpu::backward));
  m.impl("coordinate_modulation_backward_backward", TORCH_BOX(&camk::cpu::backward_backward));
}
