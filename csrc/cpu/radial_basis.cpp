// SPDX-License-Identifier: MIT
// The operators of radial_basis on the CPU; schemas and shapes: python/camkernels/radial_basis.py.
// A gradient in a kernel is a sum over the points around it, each kernel's by one thread and in the order of the
// points: the same bits for any number of threads.
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/radial_basis_loops.h"

namespace camk::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "radial_basis";

// Pairs of points and kernels whose weights are kept at a time; more where there are more kernels, so that going over
// all kernels is no more work than going over the pairs.
constexpr int64_t kPairs = 1 << 17;
// Kernels are shared out in at most this many pieces.
constexpr int64_t kPieces = 64;

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

// Rows of a tensor in the arithmetic type S, padded to `pitch` numbers: its own where they are that already.
template <class S>
class PaddedRows {
 public:
  PaddedRows(const OptionalTensor& from, int64_t first, int64_t count, int64_t width, int64_t pitch) {
    if (!from) return;
    constexpr auto kOwn = std::is_same_v<S, double> ? ScalarType::Double : ScalarType::Float;
    if (from->scalar_type() == kOwn && width == pitch) {
      data_ = read<S>(*from) + first * width;
      return;
    }
    const Rows<S> rows{scratch_.take(count * pitch), pitch};
    const Source source(*from);
    torch::stable::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
      read_rows(source, first + begin, end - begin, width, Rows<S>{rows[begin], pitch});
    });
    data_ = rows.data;
  }
  const S* data() const { return data_; }

 private:
  Scratch<S> scratch_;
  const S* data_ = nullptr;
};

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
    if (call.neighbors) return;
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
            .all = all_};
  }

 private:
  static Operand<S> operand(const OptionalTensor& at, const OptionalTensor& along) {
    return {read<S>(*at), along ? read<S>(*along) : nullptr};
  }
  PaddedRows<S> padded_features(const RadialCall& call, const OptionalTensor& t) const {
    return {t, 0, call.features().size(0), call.features().size(1), pitch_};
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

Tensor forward(Tensor x, Tensor centers, Tensor shapes, Tensor features, OptionalTensor phase, OptionalTensor neighbors,
               OptionalTensor frequencies, int64_t kind, int64_t shape, bool normalize, bool detach, double eps,
               int64_t keep) {
  const RadialCall call{
      {x, centers, shapes, features, phase}, {}, neighbors, frequencies, {kind, shape, normalize, detach, eps, keep}};
  check_call(call);
  const Tensor y = in_large_pages(empty(features, {x.size(0), features.size(1)}));
  const Target to(y);
  with_arithmetic(call, [&]<class S>(Tag<S>) {
    const PreparedCall<S> prepared(call);
    const RadialProblem<S> problem = prepared.problem(call);
    with_radial_dims(problem.dims, [&](auto dims) {
      const RadialLoops<decltype(dims)::value, S> loops{problem};
      parallel_points(problem.points, [&](int64_t begin, int64_t end) {
        std::vector<S> u(problem.per_point), row(problem.pitch);
        for (int64_t i = begin; i < end; ++i) {
          if (problem.has_value(i)) {
            loops.weigh(i, u.data());
            loops.value(i, u.data(), row.data());
          } else {
            std::fill(row.begin(), row.end(), std::numeric_limits<S>::quiet_NaN());
          }
          write_rows(Rows<S>{row.data(), problem.pitch}, i, 1, problem.width, to);
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
      : problem_(problem), grad_(grad), wishes_(wishes), results_(results), loops_{problem} {
    sums_.centers = wishes.centers ? write<S>(results.centers) : nullptr;
    sums_.shapes = wishes.shapes ? write<S>(results.shapes) : nullptr;
    sums_.phase = wishes.phase;
    if (wishes.features) sums_.features = scratch_.take(problem.count * problem.pitch);
    of_phase_ = scratch_.rows(problem.pitch, kPieces);
    keep_ = call.options.keep;
    each_ = (problem.count + kPieces - 1) / kPieces;
    const int64_t most = std::max<int64_t>(std::max(kPairs, problem.count) / problem.per_point, 1);
    points_ = std::clamp<int64_t>(problem.points, 1, most);
    pairs_.has_value.resize(points_), pairs_.scale.resize(points_);
    for (auto* pairs : {&pairs_.u, &pairs_.gradient}) pairs->resize(points_ * problem.per_point);
    pairs_.sorted.resize(points_ * problem.per_point);
  }

  void run() {
    for (int64_t begin = 0; begin < problem_.points; begin += points_) {
      pairs_.begin = begin, pairs_.end = std::min(problem_.points, begin + points_);
      each_point([&](int64_t first, int64_t last) { loops_.weigh(pairs_, first, last); });
      if (wishes_.grad) write_grad();
      sum();
    }
    if (wishes_.features) write_features();
    if (wishes_.phase) write_phase();
  }

 private:
  template <class Body>
  void each_point(const Body& body) {
    parallel_points(pairs_.end - pairs_.begin,
                    [&](int64_t begin, int64_t end) { body(pairs_.begin + begin, pairs_.begin + end); });
  }
  // body(first kernel, last kernel, piece)
  template <class Body>
  void each_piece(const Body& body) {
    parallel_tasks(kPieces, [&](int64_t piece) {
      body(std::min(problem_.count, piece * each_), std::min(problem_.count, (piece + 1) * each_), piece);
    });
  }

  void write_grad() {
    const Target to(results_.grad);
    each_point([&](int64_t begin, int64_t end) {
      std::vector<S> row(problem_.pitch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i - pairs_.begin;
        if (pairs_.has_value[at]) {
          loops_.value(i, pairs_.u.data() + at * problem_.per_point, row.data());
        } else {
          std::fill(row.begin(), row.end(), std::numeric_limits<S>::quiet_NaN());
        }
        write_rows(Rows<S>{row.data(), problem_.pitch}, i, 1, problem_.width, to);
      }
    });
  }

  void sum() {
    const bool kernels = wishes_.centers || wishes_.shapes, weights = kernels || wishes_.x;
    if (!weights && !wishes_.features && !wishes_.phase) return;
    const PaddedRows<S> grad(grad_, pairs_.begin, pairs_.end - pairs_.begin, problem_.width, problem_.pitch);
    const Rows<const S> g{grad.data(), problem_.pitch};
    loops_.sort(pairs_);
    each_piece([&](int64_t begin, int64_t end, int64_t piece) {
      loops_.sum_features(pairs_, g, begin, end, sums_, weights, of_phase_[piece]);
    });
    if (!weights) return;
    each_point([&](int64_t begin, int64_t end) {
      loops_.back_to_points(pairs_, begin, end, wishes_.x ? write<S>(results_.x) : nullptr);
    });
    if (!kernels) return;
    each_piece([&](int64_t begin, int64_t end, int64_t) { loops_.sum_kernels(pairs_, begin, end, sums_); });
  }

  void write_features() {
    const Target to(results_.features);
    torch::stable::parallel_for(0, problem_.count, 1024, [&](int64_t begin, int64_t end) {
      const Rows<S> rows{sums_.features + begin * problem_.pitch, problem_.pitch};
      write_rows(rows, begin, end - begin, problem_.width, to);
    });
  }

  void write_phase() {
    for (int64_t piece = 1; piece < kPieces; ++piece) {
      for (int64_t c = 0; c < problem_.width; ++c) of_phase_[0][c] += of_phase_[piece][c];
    }
    std::copy(of_phase_[0] + keep_, of_phase_[0] + problem_.width, write<S>(results_.phase));
  }

  const RadialProblem<S>& problem_;
  const Tensor& grad_;
  const RadialWishes wishes_;
  const RadialResults& results_;
  RadialLoops<D, N> loops_;
  RadialSums<S> sums_;
  Scratch<S> scratch_;
  Rows<S> of_phase_;  // of each piece of the kernels
  int64_t keep_, each_, points_;
  RadialPairs<N> pairs_;
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
                              fresh(call.features(), wishes.features),
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
