// SPDX-License-Identifier: MIT
// The operators of modulate on the CPU; schemas and shapes: python/camkernels/modulate.py.
#include "cpu/memory.h"
#include "cpu/modulate_loops.h"

namespace camk::cpu {
namespace {

constexpr const char* kOp = "modulate";

ModulateCall checked(const Tensor& h, const Tensor& gamma, const Tensor& beta, const OptionalTensor& frequencies,
                     const launch::ModulateOptions& options) {
  check_contiguous(h, kOp, "h");
  check_contiguous(gamma, kOp, "gamma");
  check_contiguous(beta, kOp, "beta");
  const auto kind = gamma.scalar_type();
  require(kind == ScalarType::Double || kind == ScalarType::Float, kOp, ": gamma must be float32 or float64");
  require(beta.scalar_type() == kind && (!frequencies || frequencies->scalar_type() == kind), kOp,
          ": gamma, beta and frequencies must have one dtype");
  require(kind == ScalarType::Double || h.scalar_type() != ScalarType::Double, kOp,
          ": gamma must be float64 beside a float64 h");
  return {h, gamma, beta, frequencies, options, launch::measure_groups(h, gamma, beta, frequencies, options)};
}

void check_like(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t) return;
  check_contiguous(*t, kOp, name);
  require(t->scalar_type() == like.scalar_type() && t->numel() == like.numel(), kOp, ": dtype or size of ", name);
}

// body(the activation, group) for the groups that a thread goes through. Here, and not around the threads' work, the
// activation becomes a type of the compiler: there are a dozen.
template <class Body>
void each_group(const ModulateCall& call, int64_t begin, int64_t end, const Body& body) {
  math::with_activation(math::Activation(call.options.activation), [&](auto activation) {
    for (int64_t group = begin; group < end; ++group) body(activation, group);
  });
  far_stores_done();
}

Tensor forward(Tensor h, Tensor gamma, Tensor beta, OptionalTensor frequencies, int64_t activation, double omega,
               bool norm, double eps, bool frequency_per_group) {
  const ModulateCall call = checked(h, gamma, beta, frequencies, {activation, omega, norm, eps, frequency_per_group});
  const Tensor y = in_large_pages(empty_as(h));
  constexpr int64_t kGrainNumbers = 1 << 15;
  const int64_t grain = std::max<int64_t>(kGrainNumbers / call.groups.numbers(), 1);
  const OptionalTensor none;
  const Target to(y);
  with_arithmetic(is_wide(call.gamma), [&]<class C>(Tag<C>) {
    torch::stable::parallel_for(0, call.groups.count, grain, [&](int64_t begin, int64_t end) {
      GroupLoops<C> loops(call, {none, none, none});
      each_group(call, begin, end, [&](auto f, int64_t group) { loops.value(f, group, to); });
    });
  });
  return y;
}

// body(loops, activation, group, parts of the gradients of scale and shift) for every group; returns those gradients.
template <class Body>
std::tuple<Tensor, Tensor> gradients(const ModulateCall& call, const ModulateTangents& along, bool of_scale,
                                     bool of_shift, const Body& body) {
  std::tuple<Tensor, Tensor> found;
  with_arithmetic(is_wide(call.gamma), [&]<class C>(Tag<C>) {
    using Gradient = SharedGradient<C>;
    const GroupPieces pieces = pieces_of(call.groups, sizeof(C));
    Gradient scale(call.groups.scale, pieces, call.gamma, of_scale);
    Gradient shift(call.groups.shift, pieces, call.beta, of_shift);
    parallel_tasks(pieces.count, [&](int64_t piece) {
      GroupLoops<C> loops(call, along);
      typename Gradient::Part scale_part(scale, piece, call.groups), shift_part(shift, piece, call.groups);
      each_group(call, pieces.begin(piece), pieces.end(piece),
                 [&](auto f, int64_t group) { body(loops, f, group, scale_part, shift_part); });
    });
    scale.add_edges(), shift.add_edges();
    found = {scale.result, shift.result};
  });
  return found;
}

Tensor fresh(const Tensor& like, bool wanted) { return wanted ? in_large_pages(empty_as(like)) : empty(like, {0}); }

std::optional<Target> target(const Tensor& t, bool wanted) { return wanted ? std::optional<Target>(t) : std::nullopt; }

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor h, Tensor gamma, Tensor beta,
                                            OptionalTensor frequencies, int64_t activation, double omega, bool norm,
                                            double eps, bool frequency_per_group, std::vector<bool> mask) {
  const ModulateCall call = checked(h, gamma, beta, frequencies, {activation, omega, norm, eps, frequency_per_group});
  check_mask(kOp, mask, 3);
  check_like(grad, h, "grad_y");
  const Tensor gh = fresh(h, mask[0]);
  const Source g(grad);
  const std::optional<Target> to = target(gh, mask[0]);
  const OptionalTensor none;
  const auto [ggamma, gbeta] = gradients(call, {none, none, none}, mask[1], mask[2],
                                         [&](auto& loops, auto f, int64_t group, auto& of_scale, auto& of_shift) {
                                           loops.backward(f, group, g, to, of_scale, of_shift);
                                         });
  return {gh, ggamma, gbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_backward(OptionalTensor h_along, OptionalTensor gamma_along,
                                                             OptionalTensor beta_along, Tensor grad, Tensor h,
                                                             Tensor gamma, Tensor beta, OptionalTensor frequencies,
                                                             int64_t activation, double omega, bool norm, double eps,
                                                             bool frequency_per_group, std::vector<bool> mask) {
  const ModulateCall call = checked(h, gamma, beta, frequencies, {activation, omega, norm, eps, frequency_per_group});
  check_mask(kOp, mask, 4);
  check_like(grad, h, "grad_y");
  check_like(h_along, h, "grad_h");
  check_like(gamma_along, gamma, "grad_gamma");
  check_like(beta_along, beta, "grad_beta");
  const Tensor ggrad = fresh(grad, mask[0]), gh = fresh(h, mask[1]);
  const Source g(grad);
  const std::optional<Target> to_grad = target(ggrad, mask[0]), to_h = target(gh, mask[1]);
  const auto [ggamma, gbeta] = gradients(call, {h_along, gamma_along, beta_along}, mask[2], mask[3],
                                         [&](auto& loops, auto f, int64_t group, auto& of_scale, auto& of_shift) {
                                           loops.second_order(f, group, g, to_grad, to_h, of_scale, of_shift);
                                         });
  return {ggrad, gh, ggamma, gbeta};
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) {
  m.impl("modulate", TORCH_BOX(&camk::cpu::forward));
  m.impl("modulate_backward", TORCH_BOX(&camk::cpu::backward));
  m.impl("modulate_backward_backward", TORCH_BOX(&camk::cpu::backward_backward));
}
