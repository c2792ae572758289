// SPDX-License-Identifier: MIT
// The operators of radial_basis on the CPU; schemas and shapes: python/camkernels/radial_basis.py.
// A gradient in a kernel is a sum over the pairs it is part of, each kernel's by one thread and in the order of the
// pairs: the same bits for any number of threads.
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/radial_basis_loops.h"

namespace camk::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "radial_basis";

// Pairs of points and kernels whose weights are kept at a time, for each thread; more where there are more kernels, so
// that going over all kernels is no more work than going over the pairs.
constexpr int64_t kPairs = 1 << 14;
// Kernels are shared out among threads in at most this many pieces.
constexpr int64_t kPieces = 64;
// Rows of results that are fetched in advance where points are not in their own order.
constexpr int64_t kRowsAhead = 8;

struct RadialOptions {
  int64_t kind, shape;
  bool normalize, detach;
  double eps;
  int64_t keep;
};

// The differentiable tensors of a call, or cotangents of their gradients.
struct RadialTensors {
  OptionalTensor x, centers, shapes, features, phase;
};

struct RadialCall {
  RadialTensors at, along;
  OptionalTensor neighbors, frequencies;
  RadialOptions options;
  const Tensor& x() const { return *at.x; }
  const Tensor& features() const { return *at.features; }
};

void check_number(const OptionalTensor& t, const char* name, ScalarType type, std::vector<int64_t> sizes) {
  if (!t) return;
  check_contiguous(*t, kOp, name);
  bool fits = t->scalar_type() == type && t->dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t->size(int64_t(i)) == sizes[i];
  require(fits, kOp, ": dtype or shape of ", name);
}

void check_tensors(const RadialTensors& t, const RadialCall& like) {
  const Tensor &x = like.x(), &features = like.features();
  const auto number = x.scalar_type();
  const int64_t dims = x.size(1), count = features.size(0), waves = features.size(1) - like.options.keep;
  const int64_t width = math::radial_shape_width(math::RadialShape(like.options.shape), int(dims));
  check_number(t.x, "x", number, {x.size(0), dims});
  check_number(t.centers, "centers", number, {count, dims});
  check_number(t.shapes, "shapes", number, {count, width});
  check_number(t.features, "features", features.scalar_type(), {count, features.size(1)});
  check_number(t.phase, "phase", number, {waves});
}

void check_call(const RadialCall& call) {
  const Tensor &x = call.x(), &features = call.features();
  const RadialOptions& options = call.options;
  require(x.dim() == 2 && x.size(1) >= 1 && x.size(1) <= math::kMaxRadialDims && features.dim() == 2, kOp,
          ": x must have shape [points, d] with d from 1 to 4, features [kernels, F]");
  const auto number = x.scalar_type();
  require(number == ScalarType::Double || number == ScalarType::Float, kOp, ": x must be float32 or float64");
  require(number == ScalarType::Double || features.scalar_type() != ScalarType::Double, kOp,
          ": x must be float64 beside float64 features");
  require(options.kind >= 0 && options.kind < math::kRadialKinds && options.shape >= 0 &&
              options.shape < math::kRadialShapes && options.keep >= 0 && options.keep <= features.size(1),
          kOp, ": kind, shape or keep");
  require(features.size(0) > 0 && features.size(0) < int64_t(1) << 31, kOp, ": kernels must be from 1 to 2^31 - 1");
  check_tensors(call.at, call);
  check_tensors(call.along, call);
  check_number(call.frequencies, "frequencies", number, {features.size(1) - options.keep});
  if (!call.neighbors) return;
  require(call.neighbors->dim() == 2, kOp, ": neighbors must have 2 dimensions");
  check_number(call.neighbors, "neighbors", ScalarType::Int, {x.size(0), call.neighbors->size(1)});
}

template <class S>
constexpr auto kArithmetic = std::is_same_v<S, double> ? ScalarType::Double : ScalarType::Float;

// Rows of a tensor in the arithmetic type S, padded to `pitch` numbers: its own where they are that already.
template <class S>
class PaddedRows {
 public:
  PaddedRows(const OptionalTensor& from, int64_t count, int64_t width, int64_t pitch) {
    if (!from) return;
    if (from->scalar_type() == kArithmetic<S> && width == pitch) {
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
constexpr int64_t kLargeTable = 4 << 20;
// Points of a cell, on average.
constexpr int64_t kCellPoints = 16;

// The order of points [points, dims] by the cells of a grid over them.
template <class S>
Binned order_of_cells(const S* x, int64_t points, int dims) {
  const int64_t side = int64_t(std::pow(double(points) / kCellPoints, 1.0 / dims)) + 1;
  std::vector<S> low(dims, std::numeric_limits<S>::max()), high(dims, std::numeric_limits<S>::lowest()), scale(dims);
  for (int64_t i = 0; i < points; ++i) {
    for (int a = 0; a < dims; ++a) {
      const S at = x[i * dims + a];
      low[a] = at < low[a] ? at : low[a], high[a] = at > high[a] ? at : high[a];  // NaN: neither
    }
  }
  int64_t cells = 1;
  for (int a = 0; a < dims; ++a) scale[a] = S(side) / (high[a] - low[a]), cells *= side;
  Binned order;
  order.sort(points, cells, [&](int64_t i) {
    int64_t cell = 0;
    for (int a = 0; a < dims; ++a) {
      const S at = (x[i * dims + a] - low[a]) * scale[a];
      cell = cell * side + (at > 0 ? int64_t(std::min(at, S(side - 1))) : 0);
    }
    return cell;
  });
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
      if (large && x.size(0) < int64_t(1) << 31) order_ = order_of_cells(read<S>(x), x.size(0), int(x.size(1)));
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
            .fast_below = (S(kWaveBound) - largest(phase_)) / largest(rates_),
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
  static S largest(const std::vector<S>& numbers) {
    S most(0);
    for (S number : numbers) most = std::max(most, std::abs(number));
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

// body(Tag<S>) for the arithmetic type of a call.
template <class Body>
void with_arithmetic(const RadialCall& call, const Body& body) {
  if (call.x().scalar_type() == ScalarType::Double) {
    body(Tag<double>{});
  } else {
    body(Tag<float>{});
  }
}

// Rows of a result, each written once: in place where the tensor has the form of the loops, else by way of scratch.
template <class S>
class ResultRows {
 public:
  ResultRows(const Tensor& to, int64_t width, int64_t pitch) : to_(to), width_(width), scratch_(pitch) {
    if (width == pitch && to.scalar_type() == kArithmetic<S>) own_ = write<S>(to);
  }
  void prefetch_row(int64_t i) const {
    for (int64_t c = 0; own_ && c < width_; c += int64_t(64 / sizeof(S))) {
      __builtin_prefetch(own_ + i * width_ + c, 1);
    }
  }
  // fill(row of `pitch` numbers)
  template <class Fill>
  void write_row(int64_t i, const Fill& fill) {
    if (own_) return fill(own_ + i * width_);
    fill(scratch_.data());
    write_rows(Rows<S>{scratch_.data(), int64_t(scratch_.size())}, i, 1, width_, to_);
  }

 private:
  const Target to_;
  int64_t width_;
  std::vector<S> scratch_;
  S* own_ = nullptr;
};

Tensor forward(Tensor x, Tensor centers, Tensor shapes, Tensor features, OptionalTensor phase, OptionalTensor neighbors,
               OptionalTensor frequencies, int64_t kind, int64_t shape, bool normalize, bool detach, double eps,
               int64_t keep) {
  const RadialCall call{
      {x, centers, shapes, features, phase}, {}, neighbors, frequencies, {kind, shape, normalize, detach, eps, keep}};
  check_call(call);
  const Tensor y = in_large_pages(empty(features, {x.size(0), features.size(1)}));
  with_arithmetic(call, [&]<class S>(Tag<S>) {
    const PreparedCall<S> prepared(call);
    const RadialProblem<S> problem = prepared.problem(call);
    with_radial_dims(problem.dims, [&](auto dims) {
      const RadialLoops<decltype(dims)::value, S> loops{problem};
      parallel_points(problem.points, [&](int64_t begin, int64_t end) {
        RadialPairs<S> pairs(kPointBlock, problem.per_point);
        ResultRows<S> rows(y, problem.width, problem.pitch);
        for (int64_t i = begin; i < end; i = pairs.end) {
          pairs.begin = i, pairs.end = std::min(end, i + kPointBlock);
          loops.weigh(pairs, pairs.begin, pairs.end);
          for (int64_t k = pairs.begin; k < pairs.end; ++k) {
            if (problem.order && k + kRowsAhead < end) rows.prefetch_row(problem.point_at(k + kRowsAhead));
            rows.write_row(problem.point_at(k), [&](S* row) CAMK_INLINED { loops.value(pairs, k, row); });
          }
        }
      });
    });
  });
  return y;
}

// What is computed: gradients in the cotangent of the value (of second order), x, centers, shapes, features, phase.
struct RadialWishes {
  bool grad, x, centers, shapes, features, phase;
};

struct RadialResults {
  Tensor grad, x, centers, shapes, features, phase;
};

// The sums of a derivative, from pairs that are kept for some points at a time. S: the arithmetic type, N: S, or its
// dual number for the second order.
template <int D, class N>
class RadialDerivative {
 public:
  using S = typename scalar_of<N>::type;

  RadialDerivative(const RadialCall& call, const RadialProblem<S>& problem, const Tensor& grad,
                   const RadialWishes& wishes, const RadialResults& results)
      : problem_(problem),
        grad_(grad),
        wishes_(wishes),
        results_(results),
        loops_{problem},
        kernels_(wishes.centers || wishes.shapes),
        weights_(kernels_ || wishes.x),
        points_(points_at_once(problem)),
        pairs_(points_, problem.per_point),
        keep_(call.options.keep) {
    sums_.centers = wishes.centers ? write<S>(results.centers) : nullptr;
    sums_.shapes = wishes.shapes ? write<S>(results.shapes) : nullptr;
    sums_.phase = wishes.phase;
    if (wishes.features) {
      own_ = problem.width == problem.pitch && results.features.scalar_type() == kArithmetic<S>;
      sums_.features = own_ ? write<S>(results.features) : scratch_.take(problem.count * problem.pitch);
    }
    if (problem.width != problem.pitch || grad.scalar_type() != kArithmetic<S>) {
      grad_rows_ = {scratch_.take(points_ * problem.pitch), problem.pitch};
    }
    // the sum over the pieces of the gradient in the phase depends on how many they are
    const bool split = torch::stable::get_num_threads() > 1 || wishes.phase;
    while (split && (problem.count >> shift_) >= kPieces) ++shift_;
    pieces_ = split ? ((problem.count - 1) >> shift_) + 1 : 1;
    of_phase_ = scratch_.rows(problem.pitch, pieces_);
    if (weights_) pairs_.gradient.resize(pairs_.u.size());
    if (kernels_) pairs_.parts.resize(pairs_.u.size() * loops_.kernel_width());
  }

  void run() {
    for (int64_t begin = 0; begin < problem_.points; begin += points_) {
      pairs_.begin = begin, pairs_.end = std::min(problem_.points, begin + points_);
      each_point([&](int64_t first, int64_t last) { loops_.weigh(pairs_, first, last); });
      if (wishes_.grad) write_grad();
      sum();
    }
    if (wishes_.features && !own_) write_features();
    if (wishes_.phase) write_phase();
  }

 private:
  static int64_t points_at_once(const RadialProblem<S>& problem) {
    const int64_t most = std::max(kPairs * torch::stable::get_num_threads(), problem.count) / problem.per_point;
    return std::min(round_up(std::max<int64_t>(most, 1), kPointBlock), round_up(problem.points, kPointBlock));
  }
  template <class Body>
  void each_point(const Body& body) {
    parallel_points(pairs_.end - pairs_.begin,
                    [&](int64_t begin, int64_t end) { body(pairs_.begin + begin, pairs_.begin + end); });
  }
  // body(piece, begin, end, pair) of all kernels: pair(begin), ..., pair(end - 1) are the pairs of a piece.
  template <class Body>
  void each_piece(const Body& body) {
    if (pieces_ == 1) {
      return body(0, 0, blocks() * problem_.per_point * kWidth, [](int64_t at) CAMK_INLINED { return uint32_t(at); });
    }
    const int32_t *sorted = pairs_.pieces.sorted.data(), *first = pairs_.pieces.first.data();
    parallel_tasks(pieces_, [&](int64_t piece) {
      body(piece, first[piece], first[piece + 1], [=](int64_t at) CAMK_INLINED { return uint32_t(sorted[at]); });
    });
  }
  int64_t blocks() const { return round_up(pairs_.end - pairs_.begin, kWidth) / kWidth; }

  void write_grad() {
    each_point([&](int64_t begin, int64_t end) {
      ResultRows<S> rows(results_.grad, problem_.width, problem_.pitch);
      for (int64_t i = begin; i < end; ++i) {
        rows.write_row(problem_.point_at(i), [&](S* row) CAMK_INLINED { loops_.value(pairs_, i, row); });
      }
    });
  }

  void sum() {
    if (!weights_ && !wishes_.features && !wishes_.phase) return;
    if (grad_rows_.data) {
      each_point([&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Rows<S> row{grad_rows_[i - pairs_.begin], problem_.pitch};
          read_rows(grad_, problem_.point_at(i), 1, problem_.width, row);
        }
      });
    }
    const S* own = static_cast<const S*>(grad_.data);  // where it needs no conversion
    const auto g = [&](int64_t i) CAMK_INLINED -> const S* {
      return grad_rows_.data ? grad_rows_[i - pairs_.begin] : own + problem_.point_at(i) * problem_.pitch;
    };
    if (pieces_ > 1) {
      const auto piece = [&](int64_t p) CAMK_INLINED { return int64_t(pairs_.kernels[p] >> shift_); };
      pairs_.pieces.sort(blocks() * problem_.per_point * kWidth, pieces_, piece);
    }
    each_piece([&](int64_t piece, int64_t begin, int64_t end, const auto& pair) {
      loops_.sum_features(pairs_, begin, end, pair, g, sums_, weights_, of_phase_[piece]);
    });
    if (!weights_) return;
    each_point([&](int64_t begin, int64_t end) {
      loops_.back_to_points(pairs_, begin, end, wishes_.x ? write<S>(results_.x) : nullptr, kernels_);
    });
    if (!kernels_) return;
    each_piece([&](int64_t, int64_t begin, int64_t end, const auto& pair) {
      loops_.sum_kernels(pairs_, begin, end, pair, sums_);
    });
  }

  void write_features() {
    const Target to(results_.features);
    torch::stable::parallel_for(0, problem_.count, 1024, [&](int64_t begin, int64_t end) {
      const Rows<S> rows{sums_.features + begin * problem_.pitch, problem_.pitch};
      write_rows(rows, begin, end - begin, problem_.width, to);
    });
  }

  void write_phase() {
    for (int64_t piece = 1; piece < pieces_; ++piece) {
      for (int64_t c = 0; c < problem_.width; ++c) of_phase_[0][c] += of_phase_[piece][c];
    }
    std::copy(of_phase_[0] + keep_, of_phase_[0] + problem_.width, write<S>(results_.phase));
  }

  static constexpr int64_t kWidth = lanes_of<Lanes<S>>;
  const RadialProblem<S>& problem_;
  const Source grad_;
  const RadialWishes wishes_;
  const RadialResults& results_;
  RadialLoops<D, N> loops_;
  bool kernels_, weights_;  // whether gradients in parameters of kernels are wanted, and in weights
  int64_t points_;          // at a time
  RadialPairs<N> pairs_;
  int64_t keep_, pieces_, shift_ = 0;  // a kernel k belongs to piece k >> shift
  RadialSums<S> sums_;
  bool own_ = false;  // whether the gradient in features is summed in its tensor
  Scratch<S> scratch_;
  Rows<S> of_phase_;   // of each piece
  Rows<S> grad_rows_;  // of the points at a time, where the tensor's own do not serve
};

// A tensor for sums, zeros; empty(0) where it is not wanted.
Tensor zeros_like(const Tensor& like, bool wanted) {
  if (!wanted) return empty(like, {0});
  return zeros(like, {like.size(0), like.size(1)}, like.scalar_type());
}

RadialResults derivative(const RadialCall& call, const Tensor& grad, const RadialWishes& wishes, bool second) {
  check_call(call);
  check_number(grad, "grad_y", call.features().scalar_type(), {call.x().size(0), call.features().size(1)});
  require(!wishes.phase || call.at.phase, kOp, ": there is no phase");
  const auto fresh = [](const Tensor& like, bool wanted) {
    return wanted ? in_large_pages(empty_as(like)) : empty(like, {0});
  };
  const RadialResults results{fresh(grad, wishes.grad),
                              fresh(call.x(), wishes.x),
                              zeros_like(*call.at.centers, wishes.centers),
                              zeros_like(*call.at.shapes, wishes.shapes),
                              zeros_like(call.features(), wishes.features),
                              fresh(call.at.phase ? *call.at.phase : call.x(), wishes.phase)};
  with_arithmetic(call, [&]<class S>(Tag<S>) {
    const PreparedCall<S> prepared(call);
    const RadialProblem<S> problem = prepared.problem(call);
    with_radial_dims(problem.dims, [&](auto dims) {
      constexpr int D = decltype(dims)::value;
      if (second) {
        RadialDerivative<D, Dual<S>>(call, problem, grad, wishes, results).run();
      } else {
        RadialDerivative<D, S>(call, problem, grad, wishes, results).run();
      }
    });
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor centers, Tensor shapes,
                                                            Tensor features, OptionalTensor phase,
                                                            OptionalTensor neighbors, OptionalTensor frequencies,
                                                            int64_t kind, int64_t shape, bool normalize, bool detach,
                                                            double eps, int64_t keep, std::vector<bool> mask) {
  check_mask(kOp, mask, 5);
  const RadialCall call{
      {x, centers, shapes, features, phase}, {}, neighbors, frequencies, {kind, shape, normalize, detach, eps, keep}};
  const RadialResults found = derivative(call, grad, {false, mask[0], mask[1], mask[2], mask[3], mask[4]}, false);
  return {found.x, found.centers, found.shapes, found.features, found.phase};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_backward(
    OptionalTensor x_along, OptionalTensor centers_along, OptionalTensor shapes_along, OptionalTensor features_along,
    OptionalTensor phase_along, Tensor grad, Tensor x, Tensor centers, Tensor shapes, Tensor features,
    OptionalTensor phase, OptionalTensor neighbors, OptionalTensor frequencies, int64_t kind, int64_t shape,
    bool normalize, bool detach, double eps, int64_t keep, std::vector<bool> mask) {
  check_mask(kOp, mask, 6);
  const RadialCall call{{x, centers, shapes, features, phase},
                        {x_along, centers_along, shapes_along, features_along, phase_along},
                        neighbors,
                        frequencies,
                        {kind, shape, normalize, detach, eps, keep}};
  const RadialResults found = derivative(call, grad, {mask[0], mask[1], mask[2], mask[3], mask[4], mask[5]}, true);
  return {found.grad, found.x, found.centers, found.shapes, found.features, found.phase};
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) {
  m.impl("radial_basis", TORCH_BOX(&camk::cpu::forward));
  m.impl("radial_basis_backward", TORCH_BOX(&camk::cpu::backward));
  m.impl("radial_basis_backward_backward", TORCH_BOX(&camk::cpu::backward_backward));
}
