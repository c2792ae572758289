// SPDX-License-Identifier: MIT
// The operators of radial_basis on CUDA.
#include "launch/radial_basis.h"

#include <cuda_runtime_api.h>

#include "cuda/radial_basis.h"
#include "cuda/repeatable.h"
#include "cuda/stream.h"

namespace camk::cuda {
namespace {

using launch::OptionalTensor, launch::RadialCall, launch::RadialResults, launch::RadialWishes;

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(RadialCall::kOp, ": the CUDA kernel could not run: ", explain(error));
}

template <class T>
RadialOperand<T> operand(const OptionalTensor& at, const OptionalTensor& along) {
  return {at ? static_cast<const T*>(at->const_data_ptr()) : nullptr,
          along ? static_cast<const T*>(along->const_data_ptr()) : nullptr};
}

// A job without results.
template <class S>
RadialJob<S> job_of(const RadialCall& call) {
  RadialJob<S> job{};
  job.kind = math::RadialKind(call.options.kind), job.shape = call.shape();
  job.normalize = call.options.normalize, job.detach = call.options.detach, job.eps = S(call.options.eps);
  job.dims = call.dims(), job.shape_width = math::radial_shape_width(job.shape, job.dims);
  job.points = call.x().size(0), job.count = call.count(), job.width = call.width();
  job.per_point = call.neighbors ? call.neighbors->size(1) : job.count;
  job.keep = call.frequencies ? call.options.keep : job.width;
  job.storage = storage_of(call.features(), RadialCall::kOp, "features");
  job.x = operand<S>(call.at.x, call.along.x), job.centers = operand<S>(call.at.centers, call.along.centers);
  job.shapes = operand<S>(call.at.shapes, call.along.shapes), job.phase = operand<S>(call.at.phase, call.along.phase);
  job.features = operand<void>(call.at.features, call.along.features);
  if (call.frequencies) job.frequencies = read<S>(*call.frequencies);
  if (call.neighbors) job.neighbors = read<int32_t>(*call.neighbors);
  return job;
}

Tensor value(const RadialCall& call) {
  const CurrentStream stream(call.x());
  const Tensor y = empty(call.features(), {call.x().size(0), call.width()});
  call.with_arithmetic([&]<class S>(Tag<S>) {
    RadialJob<S> job = job_of<S>(call);
    job.y = y.mutable_data_ptr();
    check(launch_radial_value(job, false, stream.get()));
  });
  return y;
}

// A gradient in a tensor [count, *] of the kernels', summed in the arithmetic type S and then stored in the tensor's.
template <class S>
class KernelGradient {
 public:
  RadialSums<S> where{};

  KernelGradient(const Tensor& like, bool wanted, bool deterministic)
      : wanted_(wanted),
        type_(like.scalar_type()),
        sums_(wanted ? zeros(like, {like.size(0), like.size(1)}, kArithmetic) : empty(like, {0})) {
    if (!wanted) return;
    where.sums = write<S>(sums_);
    if (!deterministic) return;
    repeatable_.emplace(like, sums_.numel());
    where.fixed = repeatable_->fixed(), where.largest = repeatable_->largest();
  }

  // empty(0) where it is not wanted.
  Tensor finish(int64_t terms, cudaStream_t stream) const {
    if (!wanted_) return sums_;
    if (repeatable_) {
      constexpr Storage kind = sizeof(S) == 8 ? Storage::kDouble : Storage::kFloat;
      check(repeatable_->finish(where.sums, kind, terms, stream));
    }
    if (type_ == kArithmetic) return sums_;
    const Tensor rounded = empty(sums_, {sums_.size(0), sums_.size(1)}, type_);
    const Storage kind = storage_of(rounded, RadialCall::kOp, "features");
    check(launch_round(read<S>(sums_), rounded.mutable_data_ptr(), kind, sums_.numel(), stream));
    return rounded;
  }

 private:
  static constexpr ScalarType kArithmetic = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
  bool wanted_;
  ScalarType type_;
  Tensor sums_;
  std::optional<RepeatableSum> repeatable_;
};

// Repeatable sums take two passes; what does not need sums is found in the first.
template <class S>
void run_gradients(RadialJob<S> job, bool deterministic, bool second, cudaStream_t stream) {
  if (!deterministic || !job.adds()) return check(launch_radial_gradients(job, Sums::kFast, second, stream));
  check(launch_radial_gradients(job, Sums::kLargest, second, stream));
  job.gx = nullptr;
  check(launch_radial_gradients(job, Sums::kFixed, second, stream));
}

RadialResults gradients(const RadialCall& call, const Tensor& grad, const RadialWishes& wishes, bool second) {
  const CurrentStream stream(call.x());
  const bool deterministic = call.options.deterministic;
  const auto fresh = [](const Tensor& like, bool wanted) { return wanted ? empty_as(like) : empty(like, {0}); };
  RadialResults found{};
  found.grad = fresh(grad, wishes.grad), found.x = fresh(call.x(), wishes.x);
  found.phase = fresh(call.at.phase ? *call.at.phase : call.x(), wishes.phase);
  call.with_arithmetic([&]<class S>(Tag<S>) {
    const KernelGradient<S> of_centers(*call.at.centers, wishes.centers, deterministic),
        of_shapes(*call.at.shapes, wishes.shapes, deterministic),
        of_features(call.features(), wishes.features, deterministic);
    RadialJob<S> job = job_of<S>(call);
    check_contiguous(grad, RadialCall::kOp, "grad_y");
    job.g = grad.const_data_ptr();
    if (wishes.grad) {
      job.y = found.grad.mutable_data_ptr();
      check(launch_radial_value(job, second, stream.get()));
      job.y = nullptr;
    }
    if (wishes.phase) {
      const Tensor parts = empty(call.x(), {kPhaseBlocks, job.width});
      job.of_phase = write<S>(parts);
      check(launch_radial_phase(job, write<S>(found.phase), second, stream.get()));
    }
    if (wishes.x) job.gx = write<S>(found.x);
    job.of_centers = of_centers.where, job.of_shapes = of_shapes.where, job.of_features = of_features.where;
    if (job.gx || job.adds()) run_gradients(job, deterministic, second, stream.get());
    found.centers = of_centers.finish(job.terms(), stream.get());
    found.shapes = of_shapes.finish(job.terms(), stream.get());
    found.features = of_features.finish(job.terms(), stream.get());
  });
  return found;
}

using Operators = launch::RadialOperators<value, gradients>;

}  // namespace
}  // namespace camk::cuda

STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) {
  m.impl("radial_basis", TORCH_BOX(&camk::cuda::Operators::forward));
  m.impl("radial_basis_backward", TORCH_BOX(&camk::cuda::Operators::backward));
  m.impl("radial_basis_backward_backward", TORCH_BOX(&camk::cuda::Operators::backward_backward));
}
