// SPDX-License-Identifier: MIT
// Loops of modulate over the numbers of a group, which lies in scratch memory, [rows, pitch], while it is worked on.
// Beyond the width of a row scales, shifts and gradients are 0, so that sums run over whole packs of lanes.
#pragma once
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "launch/modulate.h"
#include "math/modulate.h"
#include "math/norm.h"

namespace camk::cpu {

using launch::ModulateGroups, launch::SharedSize;
using OptionalTensor = std::optional<Tensor>;

// The scale or shift of the group at hand, or their tangents: each of its rows is written out, once for all groups that
// share it. Zeros where there is no tensor.
template <class C>
class SharedRows {
 public:
  SharedRows(const SharedSize& size, const OptionalTensor& tensor, int64_t width, int64_t pitch, Scratch<C>& memory)
      : size_(size),
        from_(tensor ? camk::read<C>(*tensor) : nullptr),
        width_(width),
        pitch_(pitch),
        rows_(memory.take(size.rows * pitch)) {}

  const C* row(int64_t row) const { return rows_ + (size_.rows > 1 ? row * pitch_ : 0); }

  void read(int64_t group) {
    const int64_t wanted = group / size_.share;
    if (!from_ || wanted == held_) return;
    held_ = wanted;
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
};

// Groups go in pieces, which do not depend on the number of threads. What the groups of one piece share is added up
// there; what several pieces share, at the edges of a piece, is added up afterwards in their order.
struct GroupPieces {
  int64_t groups, each, count;

  GroupPieces(const ModulateGroups& g, int64_t number_bytes) : groups(g.count) {
    constexpr int64_t kLeastNumbers = 1 << 16, kMost = 256, kMostBytes = 64 << 20;
    const int64_t edges = 2 * (g.scale.numbers() + g.shift.numbers()) * number_bytes;
    const int64_t most =
        std::max<int64_t>(std::min({kMost, groups * g.numbers() / kLeastNumbers, kMostBytes / edges}), 1);
    each = std::max<int64_t>((groups + most - 1) / most, 1);
    count = (groups + each - 1) / each;
  }
  int64_t begin(int64_t piece) const { return piece * each; }
  int64_t end(int64_t piece) const { return std::min(groups, begin(piece) + each); }
};

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
    Part(SharedGradient& whole, int64_t piece) : whole_(whole), piece_(piece) {}

    void begin(int64_t group) {
      if (!whole_.total_ || group / whole_.size_.share == held_) return;
      held_ = group / whole_.size_.share;
      to_ = whole_.target(piece_, held_);
      std::fill_n(to_, whole_.size_.numbers(), C(0));
    }
    // numbers: of a row of the group; sum: of them.
    void add(int64_t row, int64_t width, const C* numbers, double sum) {
      if (!to_) return;
      C* to = to_ + (whole_.size_.rows > 1 ? row * whole_.size_.width : 0);
      if (whole_.size_.width < width) {
        *to += C(sum);
      } else {
        for (int64_t k = 0; k < width; ++k) to[k] += numbers[k];
      }
    }

   private:
    SharedGradient& whole_;
    int64_t piece_, held_ = -1;
    C* to_ = nullptr;
  };

  void add_edges() {
    for (int64_t piece = 1; total_ && piece < pieces_.count; ++piece) {
      const int64_t own = pieces_.begin(piece) / size_.share, first = own * size_.share;
      if (first >= pieces_.begin(piece) || first < pieces_.begin(piece - 1)) continue;  // begins here, or is done
      C* total = total_ + own * size_.numbers();
      std::copy_n(edge(piece - 1, own), size_.numbers(), total);
      for (int64_t p = piece; p < pieces_.count && pieces_.begin(p) < first + size_.share; ++p) {
        const C* more = edge(p, own);
        for (int64_t k = 0; k < size_.numbers(); ++k) total[k] += more[k];
      }
    }
  }

  Tensor result;

 private:
  // Where the sum of a piece goes: beside the result if other pieces add to it, too.
  C* target(int64_t piece, int64_t own) {
    const int64_t first = own * size_.share, end = first + size_.share;
    const bool whole = first >= pieces_.begin(piece) && end <= pieces_.end(piece);
    return whole ? total_ + own * size_.numbers() : edge(piece, own);
  }
  C* edge(int64_t piece, int64_t own) {
    const bool first = own == pieces_.begin(piece) / size_.share;
    return edges_.data() + (2 * piece + !first) * size_.numbers();
  }

  const SharedSize& size_;
  const GroupPieces& pieces_;
  C* total_ = nullptr;
  std::vector<C> edges_;
};

// What every operator is given.
struct ModulateCall {
  const Tensor &h, &gamma, &beta;
  const OptionalTensor& frequencies;
  launch::ModulateOptions options;
  ModulateGroups groups;
};

// Cotangents of the gradients; absent: zero.
struct ModulateTangents {
  const OptionalTensor &h, &gamma, &beta;
};

template <class C>
class GroupLoops {
  using Pack = Lanes<C>;
  using Part = typename SharedGradient<C>::Part;

 public:
  GroupLoops(const ModulateCall& call, const ModulateTangents& along)
      : call_(call),
        along_(along),
        rows_(call.groups.rows),
        width_(call.groups.width),
        pitch_(round_up(width_, lanes_of<Pack>)),
        scale_(call.groups.scale, call.gamma, width_, pitch_, memory_),
        shift_(call.groups.shift, call.beta, width_, pitch_, memory_),
        scale_along_(call.groups.scale, along.gamma, width_, pitch_, memory_),
        shift_along_(call.groups.shift, along.beta, width_, pitch_, memory_) {
    for (Rows<C>* part : {&n_, &d_, &v_, &t_, &out_}) *part = {memory_.take(rows_ * pitch_), pitch_};
    for (C** row : {&of_scale_, &of_shift_, &frequencies_}) *row = memory_.take(pitch_);
    if (call.frequencies && !call.options.frequency_per_group)
      convert(read<C>(*call.frequencies), width_, frequencies_);
  }

  template <class F>
  void value(F f, int64_t group, const Tensor& y) {
    begin(group);
    each_pack([&](int64_t row, int64_t at, int64_t k) CAMK_INLINED {
      math::activate<0>(f, modulation(row, k)(normalised(at)), rate(f, k)).value.store(out_.data + at);
    });
    put(out_, group, y);
  }

  template <class F>
  void backward(F f, int64_t group, const Tensor& grad, const Tensor* gh, Part& of_scale, Part& of_shift) {
    begin(group), take(grad, group, d_);
    of_scale.begin(group), of_shift.begin(group);
    double sum_w = 0, sum_nw = 0;
    for (int64_t row = 0; row < rows_; ++row) {
      const auto sums = sums_of_row<4>(row, [&](int64_t at, int64_t k, Vec<Pack, 4>& sum) CAMK_INLINED {
        const Pack n = normalised(at);
        const auto m = modulation(row, k);
        const auto found =
            math::modulate_gradients(m, n, Pack::load(d_.data + at), math::activate<1>(f, m(n), rate(f, k)).first);
        found.scale.store(of_scale_ + k), found.shift.store(of_shift_ + k), found.n.store(d_.data + at);
        sum[0] = sum[0] + found.scale, sum[1] = sum[1] + found.shift;
        sum[2] = sum[2] + found.n, sum[3] = multiply_add(n, found.n, sum[3]);
      });
      of_scale.add(row, width_, of_scale_, sums[0]), of_shift.add(row, width_, of_shift_, sums[1]);
      sum_w += sums[2], sum_nw += sums[3];
    }
    if (!gh) return;
    if (norm()) {
      const Pack mean_w = mean(sum_w), mean_nw = mean(sum_nw);
      each_pack([&](int64_t, int64_t at, int64_t) CAMK_INLINED {
        math::norm_jacobian(Pack::load(d_.data + at), normalised(at), Pack(r_), mean_w, mean_nw).store(out_.data + at);
      });
    }
    put(norm() ? out_ : d_, group, *gh);
  }

  // Gradients of <grad, dy>, dy the tangent of y along `along`.
  template <class F>
  void second_order(F f, int64_t group, const Tensor& grad, const Tensor* ggrad, const Tensor* gh, Part& of_scale,
                    Part& of_shift) {
    begin(group), take(grad, group, d_);
    scale_along_.read(group), shift_along_.read(group);
    if (along_.h) take(*along_.h, group, t_);
    of_scale.begin(group), of_shift.begin(group);
    const Pack mean_t = mean(norm() ? total([&](int64_t at) CAMK_INLINED { return Pack::load(t_.data + at); }) : 0);
    const Pack mean_nt =
        mean(norm() ? total([&](int64_t at) CAMK_INLINED { return normalised(at) * Pack::load(t_.data + at); }) : 0);
    Vec<double, 5> means{};  // of u, n u, v, n v, v dn: u and v are the gradients of n and dn
    for (int64_t row = 0; row < rows_; ++row) {
      const auto sums = sums_of_row<7>(row, [&](int64_t at, int64_t k, Vec<Pack, 7>& sum) CAMK_INLINED {
        const Pack n = normalised(at), t = Pack::load(t_.data + at), g = Pack::load(d_.data + at);
        const Pack dn = norm() ? math::norm_jacobian(t, n, Pack(r_), mean_t, mean_nt) : t;
        const auto m = modulation(row, k);
        const math::ScaleShift<Pack> along{Pack::load(scale_along_.row(row) + k),
                                           Pack::load(shift_along_.row(row) + k)};
        const auto found = math::modulate_second_order(m, along, n, dn, g, math::activate<2>(f, m(n), rate(f, k)));
        found.g.store(out_.data + at), found.n.store(d_.data + at), found.dn.store(v_.data + at);
        found.scale.store(of_scale_ + k), found.shift.store(of_shift_ + k);
        sum[0] = sum[0] + found.scale, sum[1] = sum[1] + found.shift;
        sum[2] = sum[2] + found.n, sum[3] = multiply_add(n, found.n, sum[3]);
        sum[4] = sum[4] + found.dn, sum[5] = multiply_add(n, found.dn, sum[5]);
        sum[6] = multiply_add(dn, found.dn, sum[6]);
      });
      of_scale.add(row, width_, of_scale_, sums[0]), of_shift.add(row, width_, of_shift_, sums[1]);
      for (int i = 0; i < 5; ++i) means[i] += sums[i + 2] / double(call_.groups.numbers());
    }
    if (ggrad) put(out_, group, *ggrad);
    if (!gh) return;
    if (norm()) through_norm(mean_t, mean_nt, means);
    put(norm() ? out_ : d_, group, *gh);
  }

 private:
  bool norm() const { return call_.options.norm; }
  Pack mean(double sum) const { return Pack(C(sum / double(call_.groups.numbers()))); }
  Pack normalised(int64_t at) const { return Pack::load(n_.data + at) * Pack(r_); }
  math::ScaleShift<Pack> modulation(int64_t row, int64_t k) const {
    return {Pack::load(scale_.row(row) + k), Pack::load(shift_.row(row) + k)};
  }
  template <class F>
  Pack rate(F, int64_t k) const {
    if constexpr (math::Activation{F::value} == math::Activation::kResidualSine) return Pack::load(frequencies_ + k);
    return Pack(C(call_.options.omega));
  }

  void take(const Tensor& from, int64_t group, Rows<C> to) const { read_rows(from, group * rows_, rows_, width_, to); }
  void put(Rows<C> from, int64_t group, const Tensor& to) const { write_rows(from, group * rows_, rows_, width_, to); }

  // body(row, where a pack lies in the group, and in the row)
  template <class Body>
  void each_pack(const Body& body) const {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t k = 0; k < pitch_; k += lanes_of<Pack>) body(row, row * pitch_ + k, k);
    }
  }

  // N sums over a row: body(where a pack lies in the group, and in the row, sums) adds to them. Long rows are added up
  // in spans, in float64.
  template <int N, class Body>
  Vec<double, N> sums_of_row(int64_t row, const Body& body) const {
    constexpr int64_t kSpan = 64 * lanes_of<Pack>;
    Vec<double, N> sums{};
    for (int64_t first = 0; first < pitch_; first += kSpan) {
      Vec<Pack, N> part;
      unroll<N>([&](auto i) CAMK_INLINED { part[i] = Pack(C(0)); });
      const int64_t end = std::min(first + kSpan, pitch_);
      for (int64_t k = first; k < end; k += lanes_of<Pack>) body(row * pitch_ + k, k, part);
      unroll<N>([&](auto i) CAMK_INLINED { sums[i] += double(sum_of_lanes(part[i])); });
    }
    return sums;
  }

  // The sum over the group of what number(where a pack lies) gives.
  template <class Number>
  double total(const Number& number) const {
    double sum = 0;
    for (int64_t row = 0; row < rows_; ++row) {
      sum += sums_of_row<1>(
          row, [&](int64_t at, int64_t, Vec<Pack, 1>& part) CAMK_INLINED { part[0] = part[0] + number(at); })[0];
    }
    return sum;
  }

  // Reads a group with its scale, shift and frequency; under a norm n_ is h - mean, and n = r n_.
  void begin(int64_t group) {
    scale_.read(group), shift_.read(group);
    if (call_.frequencies && call_.options.frequency_per_group) {
      std::fill_n(frequencies_, pitch_, read<C>(*call_.frequencies)[group % call_.frequencies->numel()]);
    }
    clear_beyond_width(C(0));
    take(call_.h, group, n_);
    if (!norm()) return;
    const Pack centre = mean(total([&](int64_t at) CAMK_INLINED { return Pack::load(n_.data + at); }));
    clear_beyond_width(centre.v[0]);
    const double squares = total([&](int64_t at) CAMK_INLINED {
      const Pack c = Pack::load(n_.data + at) - centre;
      c.store(n_.data + at);
      return c * c;
    });
    r_ = math::inverse_deviation(C(squares / double(call_.groups.numbers())), C(call_.options.eps));
  }
  void clear_beyond_width(C number) const {
    for (int64_t row = 0; row < rows_; ++row) std::fill(n_[row] + width_, n_[row] + pitch_, number);
  }

  // The gradient of h from those of n and dn, into out_.
  void through_norm(Pack mean_t, Pack mean_nt, const Vec<double, 5>& means) const {
    const auto m = [&](int i) { return Pack(C(means[i])); };
    const Pack r(r_), mean_v = m(2), mean_nv = m(3), rest = math::norm_second_order_rest(r, m(4));
    const Pack mean_w = math::norm_second_order(m(0), mean_v, mean_t, r, mean_nt, mean_nv);
    const Pack mean_nw = math::norm_second_order(m(1), mean_nv, mean_nt, r, mean_nt, mean_nv);
    each_pack([&](int64_t, int64_t at, int64_t) CAMK_INLINED {
      const Pack n = normalised(at);
      const Pack w = math::norm_second_order(Pack::load(d_.data + at), Pack::load(v_.data + at),
                                             Pack::load(t_.data + at), r, mean_nt, mean_nv);
      multiply_add(rest, n, math::norm_jacobian(w, n, r, mean_w, mean_nw)).store(out_.data + at);
    });
  }

  const ModulateCall& call_;
  ModulateTangents along_;
  int64_t rows_, width_, pitch_;
  Scratch<C> memory_;
  SharedRows<C> scale_, shift_, scale_along_, shift_along_;
  Rows<C> n_, d_, v_, t_, out_;
  C r_ = C(1);
  C *of_scale_, *of_shift_, *frequencies_;  // rows
};

}  // namespace camk::cpu
