// SPDX-License-Identifier: MIT
// Loops of modulate over the numbers of a group, [rows, pitch]: where they lie in the tensors, if these are of the
// arithmetic type and rows are whole packs of lanes, else in scratch memory. There, beyond the width of a row, scales,
// shifts and gradients are 0, so that sums run over whole packs.
#pragma once
#include "cpu/modulate_shared.h"
#include "math/modulate.h"
#include "math/norm.h"

namespace camk::cpu {

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

// A row of the group at hand. Its members are read into registers: what is stored might be any of those of GroupLoops.
template <class C>
struct GroupRow {
  using Pack = Lanes<C>;
  const C *h, *g, *t;  // t: the tangent of h
  C* v;
  WrittenRow<C> w, out;
  const C *scale, *shift, *scale_along, *shift_along, *frequencies;
  Pack centre, r, omega;

  CAMK_HD Pack centred(int64_t k) const { return Pack::load(h + k) - centre; }
  CAMK_HD Pack normalised(int64_t k) const { return centred(k) * r; }
  CAMK_HD math::ScaleShift<Pack> modulation(int64_t k) const { return {Pack::load(scale + k), Pack::load(shift + k)}; }
  CAMK_HD math::ScaleShift<Pack> along(int64_t k) const {
    return {Pack::load(scale_along + k), Pack::load(shift_along + k)};
  }
  // f and its derivatives at s
  template <int Order, int I>
  CAMK_HD math::Jet<Pack> activate(Constant<I> f, int64_t k, Pack s) const {
    constexpr bool kWave = math::Activation{I} == math::Activation::kResidualSine;
    return math::activate<Order>(f, s, kWave ? Pack::load(frequencies + k) : omega);
  }
};

template <class C>
class GroupLoops {
  using Pack = Lanes<C>;
  using Row = GroupRow<C>;
  using Part = typename SharedGradient<C>::Part;

 public:
  GroupLoops(const ModulateCall& call, const ModulateTangents& along)
      : call_(call),
        from_(call.h),
        rows_(call.groups.rows),
        width_(call.groups.width),
        pitch_(pitch_of<C>(call.groups)),
        scale_(call.groups.scale, call.gamma, width_, pitch_, memory_),
        shift_(call.groups.shift, call.beta, width_, pitch_, memory_),
        scale_along_(call.groups.scale, along.gamma, width_, pitch_, memory_),
        shift_along_(call.groups.shift, along.beta, width_, pitch_, memory_) {
    if (along.h) h_along_.emplace(*along.h);
    for (Rows<C>* part : {&h_copy_, &g_copy_, &t_copy_, &w_copy_, &v_, &out_copy_}) {
      *part = {memory_.take(rows_ * pitch_), pitch_};
    }
    t_ = {t_copy_.data, pitch_};
    frequencies_ = memory_.take(pitch_);
    if (!call.frequencies) return;
    if (call.options.frequency_per_group) {
      of_groups_ = read<C>(*call.frequencies);
    } else {
      read_rows(*call.frequencies, 0, 1, width_, Rows<C>{frequencies_, pitch_});
    }
  }

  template <class F>
  void value(F f, int64_t group, const Target& y) {
    begin(group);
    place_out(y, group);
    each_row([&](const Row& row, int64_t) CAMK_INLINED {
      each_pack([&](int64_t k) CAMK_INLINED {
        const Pack s = row.modulation(k)(row.normalised(k));
        row.out.store(k, row.template activate<0>(f, k, s).value);
      });
    });
    put(out_, group, y);
  }

  template <class F>
  void backward(F f, int64_t group, const Source& grad, const std::optional<Target>& gh, Part& of_scale,
                Part& of_shift) {
    begin(group);
    g_ = take(grad, group, g_copy_);
    of_scale.begin(group), of_shift.begin(group);
    if (gh) place_out(*gh, group);
    w_ = norm() ? w_copy_ : out_;
    double sum_w = 0, sum_nw = 0;
    each_row([&](const Row& row, int64_t index) CAMK_INLINED {
      const auto scale_row = of_scale.row(index), shift_row = of_shift.row(index);
      const auto sums = sums_of_row<4>([&](int64_t k, Vec<Pack, 4>& sum) CAMK_INLINED {
        const Pack n = row.normalised(k);
        const auto m = row.modulation(k);
        const Pack slope = row.template activate<1>(f, k, m(n)).first;
        const auto found = math::modulate_gradients(m.scale, n, Pack::load(row.g + k), slope);
        scale_row.store(k, found.scale), shift_row.store(k, found.shift), row.w.store(k, found.n);
        sum[0] = sum[0] + found.scale, sum[1] = sum[1] + found.shift;
        sum[2] = sum[2] + found.n, sum[3] = multiply_add(n, found.n, sum[3]);
      });
      of_scale.add(index, sums[0]), of_shift.add(index, sums[1]);
      sum_w += sums[2], sum_nw += sums[3];
    });
    if (!gh) return;
    if (norm()) {
      const Pack mean_w = mean(sum_w), mean_nw = mean(sum_nw);
      each_row([&](const Row& row, int64_t) CAMK_INLINED {
        each_pack([&](int64_t k) CAMK_INLINED {
          const Pack w = Pack::load(row.w.at + k);
          row.out.store(k, math::norm_jacobian(w, row.normalised(k), row.r, mean_w, mean_nw));
        });
      });
    }
    put(out_, group, *gh);
  }

  // Gradients of <grad, dy>, dy the tangent of y along `along`.
  template <class F>
  void second_order(F f, int64_t group, const Source& grad, const std::optional<Target>& ggrad,
                    const std::optional<Target>& gh, Part& of_scale, Part& of_shift) {
    begin(group);
    g_ = take(grad, group, g_copy_);
    scale_along_.read(group), shift_along_.read(group);
    if (h_along_) t_ = take(*h_along_, group, t_copy_);
    of_scale.begin(group), of_shift.begin(group);
    const bool with_norm = norm();
    if (ggrad) place_out(*ggrad, group);
    if (gh && !with_norm) w_ = place(*gh, group, w_copy_);
    const Vec<Pack, 2> mean_t = with_norm ? tangent_means() : Vec<Pack, 2>{};
    Vec<double, 5> sums_of{};  // u, n u, v, n v, v dn: u and v are the gradients of n and dn
    each_row([&](const Row& row, int64_t index) CAMK_INLINED {
      const auto scale_row = of_scale.row(index), shift_row = of_shift.row(index);
      const auto sums = sums_of_row<7>([&](int64_t k, Vec<Pack, 7>& sum) CAMK_INLINED {
        const Pack n = row.normalised(k), t = Pack::load(row.t + k), g = Pack::load(row.g + k);
        const Pack dn = with_norm ? math::norm_jacobian(t, n, row.r, mean_t[0], mean_t[1]) : t;
        const auto m = row.modulation(k);
        const auto jet = row.template activate<2>(f, k, m(n));
        const auto along = row.along(k);
        const auto of = math::tangent_cotangents(g, math::modulate_tangent(m.scale, along, n, dn), jet);
        const auto found = math::tangent_gradients(m.scale, along.scale, n, dn, of.s, of.ds);
        row.out.store(k, of.g), row.w.store(k, found.n), found.dn.store(row.v + k);
        scale_row.store(k, found.scale), shift_row.store(k, found.shift);
        sum[0] = sum[0] + found.scale, sum[1] = sum[1] + found.shift;
        sum[2] = sum[2] + found.n, sum[3] = multiply_add(n, found.n, sum[3]);
        sum[4] = sum[4] + found.dn, sum[5] = multiply_add(n, found.dn, sum[5]);
        sum[6] = multiply_add(dn, found.dn, sum[6]);
      });
      of_scale.add(index, sums[0]), of_shift.add(index, sums[1]);
      for (int i = 0; i < 5; ++i) sums_of[i] += sums[i + 2];
    });
    if (ggrad) put(out_, group, *ggrad);
    if (!gh) return;
    if (!with_norm) return put(w_, group, *gh);
    place_out(*gh, group);
    through_norm(mean_t, sums_of);
    put(out_, group, *gh);
  }

 private:
  bool norm() const { return call_.options.norm; }
  Pack mean(double sum) const { return Pack(C(sum / double(call_.groups.numbers()))); }

  bool in_place(ScalarType type) const { return width_ == pitch_ && type == number_type<C>(); }
  // The rows of the group at hand: those of the tensor, or a copy.
  Rows<const C> take(const Source& from, int64_t group, Rows<C> copy) const {
    if (in_place(from.type)) return {static_cast<const C*>(from.data) + group * rows_ * width_, width_};
    read_rows(from, group * rows_, rows_, width_, copy);
    return {copy.data, copy.stride};
  }
  // Where the rows of the group are to be written, then put: in the tensor, or in other memory.
  Rows<C> place(const Target& to, int64_t group, Rows<C> other) const {
    if (in_place(to.type)) return {static_cast<C*>(to.data) + group * rows_ * width_, width_};
    return other;
  }
  void place_out(const Target& to, int64_t group) {
    out_ = place(to, group, out_copy_);
    far_ = in_place(to.type) && goes_far(to, call_.groups.count * call_.groups.numbers() * int64_t(sizeof(C)));
  }
  void put(Rows<C> from, int64_t group, const Target& to) const {
    if (!in_place(to.type)) write_rows(from, group * rows_, rows_, width_, to);
  }

  // body(row, its index)
  template <class Body>
  CAMK_HD void each_row(const Body& body) const {
    for (int64_t i = 0; i < rows_; ++i) {
      const Row row{h_[i],
                    g_[i],
                    t_[i],
                    v_[i],
                    {w_[i], far_ && w_.data == out_.data},
                    {out_[i], far_},
                    scale_.row(i),
                    shift_.row(i),
                    scale_along_.row(i),
                    shift_along_.row(i),
                    frequencies_,
                    Pack(centre_),
                    Pack(r_),
                    Pack(C(call_.options.omega))};
      body(row, i);
    }
  }
  // body(where a pack lies in a row)
  template <class Body>
  CAMK_HD void each_pack(const Body& body) const {
    const int64_t end = pitch_;
    for (int64_t k = 0; k < end; k += lanes_of<Pack>) body(k);
  }

  // N sums over a row: body(where a pack lies, sums) adds to them. Long rows are added up in spans, in float64.
  template <int N, class Body>
  CAMK_HD Vec<double, N> sums_of_row(const Body& body) const {
    constexpr int64_t kSpan = 64 * lanes_of<Pack>;
    Vec<double, N> sums{};
    for (int64_t first = 0, most = pitch_; first < most; first += kSpan) {
      Vec<Pack, N> part;
      unroll<N>([&](auto i) CAMK_INLINED { part[i] = Pack(C(0)); });
      const int64_t end = std::min(first + kSpan, most);
      for (int64_t k = first; k < end; k += lanes_of<Pack>) body(k, part);
      unroll<N>([&](auto i) CAMK_INLINED { sums[i] += double(sum_of_lanes(part[i])); });
    }
    return sums;
  }
  // The same over the group.
  template <int N, class Body>
  CAMK_HD Vec<double, N> sums_of_group(const Body& body) const {
    Vec<double, N> sums{};
    each_row([&](const Row& row, int64_t) CAMK_INLINED {
      const auto more = sums_of_row<N>([&](int64_t k, Vec<Pack, N>& part) CAMK_INLINED { body(row, k, part); });
      unroll<N>([&](auto i) CAMK_INLINED { sums[i] += more[i]; });
    });
    return sums;
  }

  // Reads a group with its scale, shift and frequency, and normalises it.
  void begin(int64_t group) {
    w_ = w_copy_, out_ = out_copy_, far_ = false;
    scale_.read(group), shift_.read(group);
    if (of_groups_) std::fill_n(frequencies_, pitch_, of_groups_[group % call_.frequencies->numel()]);
    fill_beyond_width(C(0));
    h_ = take(from_, group, h_copy_);
    if (!norm()) return;
    centre_ = mean(sums_of_group<1>([](const Row& row, int64_t k, Vec<Pack, 1>& sum)
                                        CAMK_INLINED { sum[0] = sum[0] + Pack::load(row.h + k); })[0])
                  .v[0];
    fill_beyond_width(centre_);
    const auto squares = sums_of_group<1>([](const Row& row, int64_t k, Vec<Pack, 1>& sum) CAMK_INLINED {
      const Pack c = row.centred(k);
      sum[0] = multiply_add(c, c, sum[0]);
    });
    r_ = math::inverse_deviation(mean(squares[0]).v[0], C(call_.options.eps));
  }
  void fill_beyond_width(C number) const {
    for (int64_t i = 0; i < rows_; ++i) std::fill(h_copy_[i] + width_, h_copy_[i] + pitch_, number);
  }

  // Means of t and n t, t the tangent of h.
  Vec<Pack, 2> tangent_means() const {
    const auto sums = sums_of_group<2>([](const Row& row, int64_t k, Vec<Pack, 2>& sum) CAMK_INLINED {
      const Pack t = Pack::load(row.t + k);
      sum[0] = sum[0] + t, sum[1] = multiply_add(row.normalised(k), t, sum[1]);
    });
    return {{mean(sums[0]), mean(sums[1])}};
  }

  // The gradient of h from those of n, in w_, and dn, in v_, into out_.
  void through_norm(Vec<Pack, 2> mean_t, const Vec<double, 5>& sums) const {
    const Pack r(r_), mean_v = mean(sums[2]), mean_nv = mean(sums[3]);
    const Pack rest = math::norm_second_order_rest(r, mean(sums[4]));
    const Pack mean_w = math::norm_second_order(mean(sums[0]), mean_v, mean_t[0], r, mean_t[1], mean_nv);
    const Pack mean_nw = math::norm_second_order(mean(sums[1]), mean_nv, mean_t[1], r, mean_t[1], mean_nv);
    each_row([&](const Row& row, int64_t) CAMK_INLINED {
      each_pack([&](int64_t k) CAMK_INLINED {
        const Pack n = row.normalised(k), u = Pack::load(row.w.at + k), v = Pack::load(row.v + k);
        const Pack w = math::norm_second_order(u, v, Pack::load(row.t + k), r, mean_t[1], mean_nv);
        row.out.store(k, multiply_add(rest, n, math::norm_jacobian(w, n, r, mean_w, mean_nw)));
      });
    });
  }

  const ModulateCall& call_;
  Source from_;
  std::optional<Source> h_along_;
  int64_t rows_, width_, pitch_;
  Scratch<C> memory_;
  SharedRows<C> scale_, shift_, scale_along_, shift_along_;
  Rows<C> h_copy_, g_copy_, t_copy_, w_copy_, out_copy_;  // what cannot stay in the tensors
  Rows<const C> h_, g_, t_;                               // of the group: h, gradient of y, tangent of h
  Rows<C> w_, v_, out_;
  const C* of_groups_ = nullptr;  // frequencies of groups
  bool far_ = false;              // where out_ is written
  C centre_ = C(0), r_ = C(1);    // n = r (h - centre)
  C* frequencies_;                // a row
};

}  // namespace camk::cpu
