// SPDX-License-Identifier: MIT
// radial_basis on the CPU.
// A gradient in a kernel is a sum over the pairs it is part of, each kernel's by one thread and in the order of the
// pairs: the same bits for any number of threads.
#include "cpu/radial_basis_call.h"

namespace camk::cpu {
namespace {

// Pairs of points and kernels whose weights are kept at a time, for each thread: more, and what is kept leaves the
// cache (all gradients of 3 axes, 8 neighbours: 385 ns per point; with 100 000 pairs 450).
constexpr int64_t kPairs = 1 << 14;
// Kernels are shared out among threads in at most this many pieces.
constexpr int64_t kPieces = 64;
// A result of this many bytes goes past the caches: with 16 MB of 2^17 points 1.15x as fast, and 1.01x to 1.08x
// together with a product or a sum of them; with less a product takes up to a tenth longer (2 axes, 4 neighbours, 32
// features, a Xeon with AMX).
constexpr int64_t kFarBytes = 16 << 20;
// Rows of a result, each written once: in place where the tensor has the form of the loops, else by way of scratch, a
// block of points at a time.
template <class S>
class ResultRows {
 public:
  ResultRows(const Tensor& to, const RadialProblem<S>& problem) : problem_(problem), to_(to) {
    if (problem.width == problem.pitch && to.scalar_type() == number_type<S>()) {
      own_ = write<S>(to);
      far_ = goes_far(own_, problem.points * problem.pitch * int64_t(sizeof(S)), kFarBytes);
    } else {
      scratch_.resize(kPointBlock * problem.pitch);
    }
  }
  ~ResultRows() {
    if (far_) far_stores_done();  // once: every block waiting for its stores took as long as they save
  }
  // write(row, far): row(i), of `pitch` numbers, is where the row of point i belongs, far: past the caches; the points
  // are begin, ..., end - 1.
  template <class Write>
  void write_rows(int64_t begin, int64_t end, const Write& write) {
    const auto row = [this, begin](int64_t i) CAMK_INLINED {
      return own_ ? own_ + problem_.point_at(i) * problem_.pitch : scratch_.data() + (i - begin) * problem_.pitch;
    };
    write(row, far_);
    if (own_) return;
    for (int64_t i = begin; i < end; ++i) {
      const Rows<S> row{scratch_.data() + (i - begin) * problem_.pitch, problem_.pitch};
      cpu::write_rows(row, problem_.point_at(i), 1, problem_.width, to_);
    }
  }

 private:
  const RadialProblem<S>& problem_;
  const Target to_;
  std::vector<S> scratch_;
  S* own_ = nullptr;
  bool far_ = false;
};

Tensor value(const RadialCall& call) {
  const Tensor y = in_large_pages(empty(call.features(), {call.x().size(0), call.width()}));
  call.with_arithmetic([&]<class S>(Tag<S>) {
    const PreparedCall<S> prepared(call);
    const RadialProblem<S> problem = prepared.problem(call);
    const RadialKernels<S> kernels = radial_kernels<S>(problem.dims);
    const RadialRows<S> values(problem);
    parallel_points(problem.points, [&](int64_t begin, int64_t end) {
      RadialPairs<S> pairs(kPointBlock, problem.per_point);
      ResultRows<S> rows(y, problem);
      for (int64_t i = begin; i < end; i = pairs.end) {
        pairs.begin = i, pairs.end = std::min(end, i + kPointBlock);
        kernels.weigh(problem, pairs, pairs.begin, pairs.end);
        rows.write_rows(pairs.begin, pairs.end,
                        [&](const auto& row, bool far) { values.values(pairs, pairs.begin, pairs.end, row, far); });
      }
    });
  });
  return y;
}

// The sums of a derivative, from pairs that are kept for some points at a time. S: the arithmetic type, N: S, or its
// dual number for the second order.
template <class N>
class RadialDerivative {
 public:
  using S = typename scalar_of<N>::type;

  RadialDerivative(const RadialCall& call, const RadialProblem<S>& problem, const Tensor& grad,
                   const RadialWishes& wishes, const RadialResults& results)
      : problem_(problem),
        grad_(grad),
        grad_stride_(grad.stride(0)),
        wishes_(wishes),
        results_(results),
        loops_(radial_kernels<N>(problem.dims)),
        rows_(problem),
        kernels_(wishes.centers || wishes.shapes),
        weights_(kernels_ || wishes.x),
        points_(points_at_once(problem)),
        pairs_(points_, problem.per_point),
        keep_(call.options.keep) {
    sums_.centers = wishes.centers ? write<S>(results.centers) : nullptr;
    sums_.shapes = wishes.shapes ? write<S>(results.shapes) : nullptr;
    sums_.phase = wishes.phase;
    if (wishes.features) {
      own_ = problem.width == problem.pitch && results.features.scalar_type() == number_type<S>();
      sums_.features = own_ ? write<S>(results.features) : scratch_.take(problem.count * problem.pitch);
    }
    if (problem.width != problem.pitch || grad.scalar_type() != number_type<S>()) {
      grad_rows_ = {scratch_.take(points_ * problem.pitch), problem.pitch};
    }
    // the sum over the pieces of the gradient in the phase depends on how many they are
    const bool split = torch::stable::get_num_threads() > 1 || wishes.phase;
    while (split && (problem.count >> shift_) >= kPieces) ++shift_;
    pieces_ = split ? ((problem.count - 1) >> shift_) + 1 : 1;
    of_phase_ = scratch_.rows(problem.pitch, pieces_);
    if (weights_) pairs_.gradient.resize(pairs_.u.size());
    if (kernels_) pairs_.parts.resize(pairs_.u.size() * problem.kernel_width());
  }

  void run() {
    for (int64_t begin = 0; begin < problem_.points; begin += points_) {
      pairs_.begin = begin, pairs_.end = std::min(problem_.points, begin + points_);
      each_point([&](int64_t first, int64_t last) { loops_.weigh(problem_, pairs_, first, last); });
      if constexpr (!std::is_same_v<N, S>) {  // of first order there is none
        if (wishes_.grad) write_grad();
      }
      sum();
    }
    if (wishes_.features && !own_) write_features();
    if (wishes_.phase) write_phase();
  }

 private:
  static int64_t points_at_once(const RadialProblem<S>& problem) {
    const int64_t most = kPairs * torch::stable::get_num_threads() / problem.per_point;
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
    if (pieces_ == 1) return body(0, 0, blocks() * problem_.per_point * kWidth, PairOrder{});
    const int32_t* first = pairs_.pieces.first.data();
    const PairOrder sorted{pairs_.pieces.sorted.data()};
    parallel_tasks(pieces_, [&](int64_t piece) { body(piece, first[piece], first[piece + 1], sorted); });
  }
  int64_t blocks() const { return round_up(pairs_.end - pairs_.begin, kWidth) / kWidth; }

  void write_grad() {
    each_point([&](int64_t begin, int64_t end) {
      ResultRows<S> rows(results_.grad, problem_);
      for (int64_t i = begin; i < end; i += kPointBlock) {
        const int64_t last = std::min(end, i + kPointBlock);
        rows.write_rows(i, last, [&](const auto& row, bool far) { rows_.values(pairs_, i, last, row, far); });
      }
    });
  }

  void sum() {
    if (!weights_ && !wishes_.features && !wishes_.phase) return;
    if (grad_rows_.data) {
      each_point([&](int64_t begin, int64_t end) {
        with_numbers(RadialCall::kOp, grad_.type, [&]<class T>(Tag<T>) {
          const T* from = static_cast<const T*>(grad_.data);
          for (int64_t i = begin; i < end; ++i) {
            convert(from + problem_.point_at(i) * grad_stride_, problem_.width, grad_rows_[i - pairs_.begin]);
          }
        });
      });
    }
    const S* own = static_cast<const S*>(grad_.data);  // where it needs no conversion
    const auto g = [&](int64_t i) CAMK_INLINED -> const S* {
      return grad_rows_.data ? grad_rows_[i - pairs_.begin] : own + problem_.point_at(i) * grad_stride_;
    };
    if (pieces_ > 1) {
      const auto piece = [&](int64_t p) CAMK_INLINED { return int64_t(pairs_.kernels[p] >> shift_); };
      pairs_.pieces.sort(blocks() * problem_.per_point * kWidth, pieces_, piece);
    }
    each_piece([&](int64_t piece, int64_t begin, int64_t end, PairOrder pair) {
      rows_.sum_features(pairs_, begin, end, pair, g, sums_, weights_, of_phase_[piece]);
    });
    if (!weights_) return;
    each_point([&](int64_t begin, int64_t end) {
      loops_.back_to_points(problem_, pairs_, begin, end, wishes_.x ? write<S>(results_.x) : nullptr, kernels_);
    });
    if (!kernels_) return;
    each_piece([&](int64_t, int64_t begin, int64_t end, PairOrder pair) {
      loops_.sum_kernels(problem_, pairs_, begin, end, pair, sums_);
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
  const int64_t grad_stride_;  // from row to row
  const RadialWishes wishes_;
  const RadialResults& results_;
  const RadialKernels<N> loops_;
  RadialRows<N> rows_;
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

// A tensor for a gradient; empty(0) where it is not wanted.
Tensor fresh(const Tensor& like, bool wanted) { return wanted ? in_large_pages(empty_as(like)) : empty(like, {0}); }

// One for sums, zeros.
Tensor fresh_zeros(const Tensor& like, bool wanted) {
  const Tensor made = fresh(like, wanted);
  char* bytes = static_cast<char*>(made.mutable_data_ptr());
  torch::stable::parallel_for(0, made.numel() * int64_t(made.element_size()), 1 << 20,
                              [&](int64_t begin, int64_t end) { std::memset(bytes + begin, 0, size_t(end - begin)); });
  return made;
}

RadialResults gradients(const RadialCall& call, const Tensor& grad, const RadialWishes& wishes, bool second) {
  const RadialResults results{fresh(grad, wishes.grad),
                              fresh(call.x(), wishes.x),
                              fresh_zeros(*call.at.centers, wishes.centers),
                              fresh_zeros(*call.at.shapes, wishes.shapes),
                              fresh_zeros(call.features(), wishes.features),
                              fresh(call.at.phase ? *call.at.phase : call.x(), wishes.phase)};
  call.with_arithmetic([&]<class S>(Tag<S>) {
    const PreparedCall<S> prepared(call);
    const RadialProblem<S> problem = prepared.problem(call);
    if (second) {
      RadialDerivative<Dual<S>>(call, problem, grad, wishes, results).run();
    } else {
      RadialDerivative<S>(call, problem, grad, wishes, results).run();
    }
  });
  return results;
}

using Operators = launch::RadialOperators<value, gradients>;

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) {
  m.impl("radial_basis", TORCH_BOX(&camk::cpu::Operators::forward));
  m.impl("radial_basis_backward", TORCH_BOX(&camk::cpu::Operators::backward));
  m.impl("radial_basis_backward_backward", TORCH_BOX(&camk::cpu::Operators::backward_backward));
}
