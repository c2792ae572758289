// SPDX-License-Identifier: MIT
// Scales and shifts of modulate's groups, which groups may share, and the sums that are their gradients.
#pragma once
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "launch/group_pieces.h"
#include "launch/modulate.h"

namespace camk::cpu {

using launch::ModulateGroups, launch::SharedSize;
using OptionalTensor = std::optional<Tensor>;

// Of a tensor of the operator's own. With all gradients of 2^17 rows of 256 numbers 1.4x as fast, a Xeon with AMX.
inline bool goes_far(const Target& to, int64_t bytes) { return goes_far(to.data, bytes, 32 << 20); }

// A row that is written.
template <class C>
struct WrittenRow {
  C* at;
  bool far;
  CAMK_HD void store(int64_t k, Lanes<C> pack) const { far ? pack.store_far(at + k) : pack.store(at + k); }
};

template <class C>
int64_t pitch_of(const ModulateGroups& groups) {
  return round_up(groups.width, lanes_of<Lanes<C>>);
}

// The scale or shift of the group at hand, or their tangents. Rows that are no whole packs of numbers of their own are
// written out, once for all groups that share them. Zeros where there is no tensor.
template <class C>
class SharedRows {
 public:
  SharedRows(const SharedSize& size, const OptionalTensor& tensor, int64_t width, int64_t pitch, Scratch<C>& memory)
      : size_(size),
        from_(tensor ? camk::read<C>(*tensor) : nullptr),
        width_(width),
        pitch_(pitch),
        rows_(memory.take(size.rows * pitch)),
        at_(rows_) {}

  const C* row(int64_t row) const { return at_ + (size_.rows > 1 ? row * pitch_ : 0); }

  void read(int64_t group) {
    const int64_t wanted = group / size_.share;
    if (!from_ || wanted == held_) return;
    held_ = wanted;
    if (size_.width == pitch_) return void(at_ = from_ + wanted * size_.numbers());
    for (int64_t a = 0; a < size_.rows; ++a) {
      const C* from = from_ + (wanted * size_.rows + a) * size_.width;
      if (size_.width == width_) {
        convert(from, width_, rows_ + a * pitch_);
      } else {
        std::fill_n(rows_ + a * pitch_, width_, *from);
      }
    }
  }

 private:
  const SharedSize& size_;
  const C* from_;
  int64_t width_, pitch_, held_ = -1;
  C* rows_;
  const C* at_;
};

inline GroupPieces pieces_of(const ModulateGroups& g, int64_t number_bytes) {
  constexpr int64_t kLeastNumbers = 1 << 16, kMost = 256, kMostBytes = 64 << 20;
  const int64_t edges = 2 * (g.scale.numbers() + g.shift.numbers()) * number_bytes;
  return GroupPieces::of(g.count, std::min({kMost, g.count * g.numbers() / kLeastNumbers, kMostBytes / edges}));
}

// The gradient of a scale or shift, added up by pieces.
template <class C>
class SharedGradient {
 public:
  SharedGradient(const SharedSize& size, const GroupPieces& pieces, const Tensor& like, bool wanted)
      : result(wanted ? empty_as(like) : empty(like, {0})), size_(size), pieces_(pieces) {
    if (!wanted) return;
    total_ = write<C>(result);
    if (pieces.count == 0) std::fill_n(total_, result.numel(), C(0));
    edges_.resize(size_t(2 * pieces.count * size.numbers()));
  }

  // What one piece adds.
  class Part {
   public:
    Part(SharedGradient& whole, int64_t piece, const ModulateGroups& groups)
        : whole_(whole), piece_(piece), width_(groups.width), row_(memory_.take(pitch_of<C>(groups))) {
      const SharedSize& size = whole.size_;
      alone_ = whole.total_ && size.share == 1 && size.rows == groups.rows && size.width == pitch_of<C>(groups);
      far_ = alone_ && goes_far(whole.result, size.count * size.numbers() * int64_t(sizeof(C)));
    }

    void begin(int64_t group) {
      if (!whole_.total_ || group / whole_.size_.share == held_) return;
      held_ = group / whole_.size_.share;
      to_ = whole_.target(piece_, held_);
      if (!alone_) std::fill_n(to_, whole_.size_.numbers(), C(0));
    }
    // Where the numbers of a row are to be written, then to be added: in place, if no others are added there.
    WrittenRow<C> row(int64_t row) const { return {alone_ ? at(row) : row_, far_}; }
    // sum: of the numbers.
    void add(int64_t row, double sum) {
      if (!to_ || alone_) return;
      C* to = at(row);
      if (whole_.size_.width < width_) {
        *to += C(sum);
      } else {
        for (int64_t k = 0; k < width_; ++k) to[k] += row_[k];
      }
    }

   private:
    C* at(int64_t row) const { return to_ + (whole_.size_.rows > 1 ? row * whole_.size_.width : 0); }

    SharedGradient& whole_;
    int64_t piece_, width_, held_ = -1;
    Scratch<C> memory_;
    C* row_;
    C* to_ = nullptr;
    bool alone_, far_;
  };

  void add_edges() {
    for (int64_t piece = 1; total_ && piece < pieces_.count; ++piece) {
      const int64_t item = pieces_.divided(piece, size_.share);
      if (item < 0) continue;
      C* total = total_ + item * size_.numbers();
      std::fill_n(total, size_.numbers(), C(0));
      pieces_.each_edge(piece, item, size_.share, [&](int64_t edge) {
        const C* more = edges_.data() + edge * size_.numbers();
        for (int64_t k = 0; k < size_.numbers(); ++k) total[k] += more[k];
      });
    }
  }

  Tensor result;

 private:
  // Where the sum of a piece goes.
  C* target(int64_t piece, int64_t item) {
    if (pieces_.holds(piece, item, size_.share)) return total_ + item * size_.numbers();
    return edges_.data() + pieces_.edge(piece, item, size_.share) * size_.numbers();
  }

  const SharedSize& size_;
  const GroupPieces& pieces_;
  C* total_ = nullptr;
  std::vector<C> edges_;
};

}  // namespace camk::cpu
