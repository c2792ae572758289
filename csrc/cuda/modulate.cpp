// SPDX-License-Identifier: MIT
// The operators of modulate on CUDA; schemas and shapes: python/camkernels/modulate.py.
#include "cuda/modulate.h"

#include <algorithm>

#include "cuda/stream.h"
#include "launch/modulate.h"
#include "torch/seam.h"

namespace camk::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Bools = std::vector<bool>;
constexpr const char* kOp = "modulate";

// The tensors every operator takes, checked.
struct Call {
  const Tensor &h, &gamma, &beta;
  const OptionalTensor& frequencies;
  const launch::ModulateOptions options;
  const launch::ModulateGroups groups;
  CurrentStream stream;

  Call(const Tensor& values, const Tensor& scale, const Tensor& shift, const OptionalTensor& waves,
       const launch::ModulateOptions& chosen)
      : h(values),
        gamma(scale),
        beta(shift),
        frequencies(waves),
        options(chosen),
        groups(launch::measure_groups(values, scale, shift, waves, chosen)),
        stream(values) {
    check_tensor(h, "h"), check_number(gamma, "gamma"), check_number(beta, "beta");
    if (frequencies) check_number(*frequencies, "frequencies");
    require(is_wide() || h.scalar_type() != ScalarType::Double, kOp, ": gamma must be float64 beside a float64 h");
  }

  bool is_wide() const { return gamma.scalar_type() == ScalarType::Double; }

  void check_like(const OptionalTensor& t, const Tensor& like, const char* name) const {
    if (!t) return;
    check_tensor(*t, name);
    require(t->scalar_type() == like.scalar_type() && t->numel() == like.numel(), kOp, ": dtype or size of ", name);
  }
  void check(cudaError_t error) const {
    if (error != cudaSuccess) fail(kOp, ": the CUDA kernel could not run: ", explain(error));
  }

  // A job without gradients.
  template <class C>
  ModulateJob<C> job() const {
    ModulateJob<C> job{};
    job.rows = groups.rows, job.width = groups.width;
    job.storage = storage_of(h, kOp, "h");
    job.activation = int(options.activation), job.norm = options.norm;
    job.omega = C(options.omega), job.eps = C(options.eps);
    job.frequency_per_group = options.frequency_per_group;
    if (frequencies) job.frequencies = read<C>(*frequencies), job.frequency_count = frequencies->numel();
    job.h = h.const_data_ptr();
    job.scale = items<C>(groups.scale, gamma), job.shift = items<C>(groups.shift, beta);
    return job;
  }

 private:
  void check_tensor(const Tensor& t, const char* name) const {
    check_contiguous(t, kOp, name);
    check_same_device(t, h, kOp, name);
  }
  void check_number(const Tensor& t, const char* name) const {
    check_tensor(t, name);
    const bool number = t.scalar_type() == ScalarType::Double || t.scalar_type() == ScalarType::Float;
    require(number && t.scalar_type() == gamma.scalar_type(), kOp, ": ", name,
            " must be float32, or float64 as all of gamma, beta and frequencies are");
  }
  template <class C>
  static SharedItems<C> items(const launch::SharedSize& size, const Tensor& values) {
    return {size.rows, size.width, size.share, read<C>(values), nullptr, nullptr, nullptr};
  }
};

template <class Body>
void with_arithmetic(const Call& call, const Body& body) {
  call.is_wide() ? body(Tag<double>{}) : body(Tag<float>{});
}

Tensor forward(Tensor h, Tensor gamma, Tensor beta, OptionalTensor frequencies, int64_t activation, double omega,
               bool norm, double eps, bool frequency_per_group) {
  const Call call(h, gamma, beta, frequencies, {activation, omega, norm, eps, frequency_per_group});
  const Tensor y = empty_as(h);
  with_arithmetic(call, [&]<class C>(Tag<C>) {
    ModulateJob<C> job = call.job<C>();
    job.y = y.mutable_data_ptr();
    job.pieces = GroupPieces::of(call.groups.count, call.groups.count);
    call.check(launch_modulate_value(job, call.stream.get()));
  });
  return y;
}

struct Tangents {
  const OptionalTensor &h, &gamma, &beta;
};

struct Gradients {
  Tensor grad, h, gamma, beta;
};

// mask: of grad, h, gamma, beta; along: null for first derivatives.
Gradients gradients(const Call& call, const Tensor& grad, const Tangents* along, const Bools& mask) {
  const auto fresh = [&](const Tensor& like, bool wanted) {
    if (!wanted) return empty(like, {0});
    return call.groups.count == 0 ? zeros(like, like.sizes(), like.scalar_type()) : empty_as(like);
  };
  const Gradients found{fresh(grad, mask[0]), fresh(call.h, mask[1]), fresh(call.gamma, mask[2]),
                        fresh(call.beta, mask[3])};
  if (call.groups.count == 0) return found;
  with_arithmetic(call, [&]<class C>(Tag<C>) {
    ModulateJob<C> job = call.job<C>();
    job.g = grad.const_data_ptr();
    if (mask[0]) job.y = found.grad.mutable_data_ptr();
    if (mask[1]) job.gh = found.h.mutable_data_ptr();
    if (mask[2]) job.scale.gradient = write<C>(found.gamma);
    if (mask[3]) job.shift.gradient = write<C>(found.beta);
    if (along && along->h) job.h_along = along->h->const_data_ptr();
    if (along && along->gamma) job.scale.along = read<C>(*along->gamma);
    if (along && along->beta) job.shift.along = read<C>(*along->beta);
    constexpr int64_t kMostBytes = 256 << 20;
    const int64_t edges = 2 * (job.scale.numbers() + job.shift.numbers());
    job.pieces =
        GroupPieces::of(call.groups.count, std::min(pieces_held(job), kMostBytes / (edges * int64_t(sizeof(C)))));
    const Tensor memory = empty(call.gamma, {job.pieces.count * edges});
    job.scale.edges = write<C>(memory);
    job.shift.edges = job.scale.edges + 2 * job.pieces.count * job.scale.numbers();
    call.check(launch_modulate_gradients(job, along != nullptr, call.stream.get()));
  });
  return found;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor h, Tensor gamma, Tensor beta,
                                            OptionalTensor frequencies, int64_t activation, double omega, bool norm,
                                            double eps, bool frequency_per_group, Bools mask) {
  const Call call(h, gamma, beta, frequencies, {activation, omega, norm, eps, frequency_per_group});
  check_mask(kOp, mask, 3);
  call.check_like(grad, h, "grad_y");
  const Gradients found = gradients(call, grad, nullptr, {false, mask[0], mask[1], mask[2]});
  return {found.h, found.gamma, found.beta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_backward(OptionalTensor h_along, OptionalTensor gamma_along,
                                                             OptionalTensor beta_along, Tensor grad, Tensor h,
                                                             Tensor gamma, Tensor beta, OptionalTensor frequencies,
                                                             int64_t activation, double omega, bool norm, double eps,
                                                             bool frequency_per_group, Bools mask) {
  const Call call(h, gamma, beta, frequencies, {activation, omega, norm, eps, frequency_per_group});
  check_mask(kOp, mask, 4);
  call.check_like(grad, h, "grad_y");
  call.check_like(h_along, h, "grad_h");
  call.check_like(gamma_along, gamma, "grad_gamma");
  call.check_like(beta_along, beta, "grad_beta");
  const Tangents along{h_along, gamma_along, beta_along};
  const Gradients found = gradients(call, grad, &along, mask);
  return {found.grad, found.h, found.gamma, found.beta};
}

}  // namespace
}  // namespace camk::cuda

STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) {
  m.impl("modulate", TORCH_BOX(&camk::cuda::forward));
  m.impl("modulate_backward", TORCH_BOX(&camk::cuda::backward));
  m.impl("modulate_backward_backward", TORCH_BOX(&camk::cuda::backward_backward));
}
