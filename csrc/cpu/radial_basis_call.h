// SPDX-License-Identifier: MIT
// A call of radial_basis as the loops read it.
#pragma once
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/radial_basis_kernels.h"
#include "cpu/radial_basis_rows.h"
#include "launch/radial_basis.h"

namespace camk::cpu {

using launch::OptionalTensor, launch::RadialCall, launch::RadialOptions, launch::RadialResults, launch::RadialWishes;

// Rows of a tensor in the arithmetic type S, padded to `pitch` numbers: its own where they are that already.
template <class S>
class PaddedRows {
 public:
  PaddedRows(const OptionalTensor& from, int64_t count, int64_t width, int64_t pitch) {
    if (!from) return;
    if (from->scalar_type() == number_type<S>() && width == pitch) {
      data_ = read<S>(*from);
      return;
    }
    const Rows<S> rows{scratch_.take(count * pitch), pitch};
    const Source source(*from);
    torch::stable::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
      read_rows(source, begin, end - begin, width, Rows<S>{rows[begin], pitch});
    });
    data_ = rows.data;
  }
  const S* data() const { return data_; }

 private:
  Scratch<S> scratch_;
  const S* data_ = nullptr;
};

// Points are taken cell by cell where the features of their kernels do not stay in a cache otherwise: from this many
// bytes of them on, and where most are read by several points.
inline constexpr int64_t kLargeTable = 4 << 20;
// Points of a cell, on average.
inline constexpr int64_t kCellPoints = 16;

// The least and the greatest coordinate of points [points, D] along each axis; NaN: neither.
template <int D, class S>
struct Extent {
  Vec<S, D> low, high;

  Extent(const S* x, int64_t points) {
    using Pack = Lanes<S>;
    constexpr int kWidth = lanes_of<Pack>;
    constexpr S kMost = std::numeric_limits<S>::max();
    const auto include = [](auto& least, auto& greatest, auto at) CAMK_INLINED {
      least = at < least ? at : least, greatest = at > greatest ? at : greatest;
    };
    Vec<Pack, D> least, greatest;  // of kWidth points at a time, number by number
    for (int k = 0; k < D; ++k) least[k] = Pack(kMost), greatest[k] = Pack(-kMost);
    int64_t i = 0;
    for (; i + kWidth <= points; i += kWidth) {
      unroll<D>([&](int k) CAMK_INLINED { include(least[k].v, greatest[k].v, Pack::load(x + i * D + k * kWidth).v); });
    }
    for (int a = 0; a < D; ++a) low[a] = kMost, high[a] = -kMost;
    for (int n = 0; n < D * kWidth; ++n) {  // a lane of NaN alone has the first values of both
      low[n % D] = std::min<S>(low[n % D], least[n / kWidth].v[n % kWidth]);
      high[n % D] = std::max<S>(high[n % D], greatest[n / kWidth].v[n % kWidth]);
    }
    for (int64_t n = i * D; n < points * D; ++n) include(low[n % D], high[n % D], x[n]);
  }
};

// The order of points [points, D] by the cells of a grid over them.
template <int D, class S>
Binned order_of_cells(const S* x, int64_t points) {
  const int64_t side = int64_t(std::pow(double(points) / kCellPoints, 1.0 / D)) + 1;
  const Extent<D, S> extent(x, points);
  const Vec<S, D>&low = extent.low, &high = extent.high;
  Vec<S, D> scale;
  int64_t cells = 1;
  for (int a = 0; a < D; ++a) scale[a] = S(side) / (high[a] - low[a]), cells *= side;
  std::vector<int32_t> cell_of(points);
  parallel_points(points, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t cell = 0;
      for (int a = 0; a < D; ++a) {
        const S at = (x[i * D + a] - low[a]) * scale[a];
        cell = cell * int32_t(side) + (at > 0 ? int32_t(std::min(at, S(side - 1))) : 0);
      }
      cell_of[i] = cell;
    }
  });
  Binned order;
  order.sort(points, cells, [&](int64_t i) { return cell_of[i]; });
  return order;
}

// The call as the loops see it, with what they read padded.
template <class S>
class PreparedCall {
 public:
  explicit PreparedCall(const RadialCall& call)
      : pitch_(round_up(call.features().size(1), lanes_of<Lanes<S>>)),
        features_(padded_features(call, call.at.features)),
        features_along_(padded_features(call, call.along.features)),
        rates_(padded_waves(call, call.frequencies)),
        phase_(padded_waves(call, call.at.phase)),
        phase_along_(padded_waves(call, call.along.phase)) {
    if (call.neighbors) {
      const Tensor& x = call.x();
      const int64_t count = call.features().size(0), pairs = x.size(0) * call.neighbors->size(1);
      const bool large = count * pitch_ * int64_t(sizeof(S)) >= kLargeTable && pairs >= 2 * count;
      if (!large || x.size(0) >= int64_t(1) << 31) return;
      with_dims(int(x.size(1)),
                [&](auto dims) { order_ = order_of_cells<decltype(dims)::value>(read<S>(x), x.size(0)); });
      return;
    }
    all_.resize(call.features().size(0));
    for (size_t k = 0; k < all_.size(); ++k) all_[k] = int32_t(k);
  }

  RadialProblem<S> problem(const RadialCall& call) const {
    const Tensor &x = call.x(), &features = call.features();
    const RadialOptions& options = call.options;
    const auto shape = math::RadialShape(options.shape);
    const int dims = int(x.size(1));
    const int64_t count = features.size(0), width = features.size(1);
    return {.kind = math::RadialKind(options.kind),
            .shape = shape,
            .normalize = options.normalize,
            .detach = options.detach,
            .eps = S(options.eps),
            .fast_below = fast_below(),
            .points = x.size(0),
            .count = count,
            .per_point = call.neighbors ? call.neighbors->size(1) : count,
            .width = width,
            .pitch = pitch_,
            .keep = call.frequencies ? options.keep : pitch_,
            .dims = dims,
            .shape_width = math::radial_shape_width(shape, dims),
            .x = operand(call.at.x, call.along.x),
            .centers = operand(call.at.centers, call.along.centers),
            .shapes = operand(call.at.shapes, call.along.shapes),
            .features = {features_.data(), features_along_.data()},
            .phase = {phase_.data(), phase_along_.data()},
            .rates = rates_.data(),
            .neighbors = call.neighbors ? read<int32_t>(*call.neighbors) : nullptr,
            .all = all_,
            .order = order_.sorted.empty() ? nullptr : order_.sorted.data()};
  }

 private:
  static Operand<S> operand(const OptionalTensor& at, const OptionalTensor& along) {
    return {read<S>(*at), along ? read<S>(*along) : nullptr};
  }
  PaddedRows<S> padded_features(const RadialCall& call, const OptionalTensor& t) const {
    return {t, call.features().size(0), call.features().size(1), pitch_};
  }
  // Weights below it have phases within the bound of the fast waves, whatever the rounding.
  S fast_below() const {
    constexpr S kMargin = 1 - 4 * std::numeric_limits<S>::epsilon();
    return (S(kWaveBound) - largest(phase_)) / largest(rates_) * kMargin;
  }
  static S largest(const std::vector<S>& numbers) {
    S most(0);
    for (S number : numbers) {
      most = std::max(most, std::isnan(number) ? std::numeric_limits<S>::infinity() : std::abs(number));
    }
    return most;
  }
  // [pitch], a wave where its feature is.
  std::vector<S> padded_waves(const RadialCall& call, const OptionalTensor& t) const {
    std::vector<S> found(pitch_, S(0));
    if (t) std::copy(read<S>(*t), read<S>(*t) + t->numel(), found.begin() + call.options.keep);
    return found;
  }

  int64_t pitch_;
  PaddedRows<S> features_, features_along_;
  std::vector<S> rates_, phase_, phase_along_;
  std::vector<int32_t> all_;
  Binned order_;
};

}  // namespace camk::cpu
