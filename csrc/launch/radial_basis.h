// SPDX-License-Identifier: MIT
// The operators of radial_basis: their tensors and settings, checked, are a RadialCall for a backend's kernels. Schemas
// and shapes: python/camkernels/radial_basis.py.
#pragma once
#include <string>

#include "math/radial_basis.h"
#include "torch/seam.h"

namespace camk::launch {

using OptionalTensor = std::optional<Tensor>;

// What follows the tensors in every schema.
struct RadialOptions {
  int64_t kind, shape;
  bool normalize, detach;
  double eps;
  int64_t keep;
  bool deterministic;
};

// The differentiable tensors of a call, or cotangents of their gradients.
struct RadialTensors {
  OptionalTensor x, centers, shapes, features, phase;
};

// What is computed: gradients in the cotangent of the value (of second order), x, centers, shapes, features, phase.
struct RadialWishes {
  bool grad, x, centers, shapes, features, phase;
};

struct RadialResults {
  Tensor grad, x, centers, shapes, features, phase;
};

class RadialCall {
 public:
  static constexpr const char* kOp = "radial_basis";

  RadialTensors at, along;
  OptionalTensor neighbors, frequencies;
  RadialOptions options;

  const Tensor& x() const { return *at.x; }
  const Tensor& features() const { return *at.features; }
  int dims() const { return int(x().size(1)); }
  int64_t count() const { return features().size(0); }
  int64_t width() const { return features().size(1); }
  math::RadialShape shape() const { return math::RadialShape(options.shape); }

  void check() const {
    require(x().dim() == 2 && x().size(1) >= 1 && x().size(1) <= math::kMaxRadialDims && features().dim() == 2, kOp,
            ": x must have shape [points, d] with d from 1 to 4, features [kernels, F]");
    require(number() == ScalarType::Double || number() == ScalarType::Float, kOp, ": x must be float32 or float64");
    const ScalarType stored = features().scalar_type();
    require(stored == ScalarType::Half || stored == ScalarType::BFloat16 || stored == ScalarType::Float ||
                stored == ScalarType::Double,
            kOp, ": features must be float16, bfloat16, float32 or float64");
    require(number() == ScalarType::Double || stored != ScalarType::Double, kOp,
            ": x must be float64 beside float64 features");
    require(options.kind >= 0 && options.kind < math::kRadialKinds && options.shape >= 0 &&
                options.shape < math::kRadialShapes && options.keep >= 0 && options.keep <= width(),
            kOp, ": kind, shape or keep");
    require(count() > 0 && count() < int64_t(1) << 31, kOp, ": kernels must be from 1 to 2^31 - 1");
    check_tensors(at);
    check_tensors(along);
    check(frequencies, "frequencies", number(), {width() - options.keep});
    require(!at.phase || frequencies, kOp, ": a phase needs frequencies");
    require(!neighbors || (neighbors->dim() == 2 && neighbors->size(1) > 0), kOp,
            ": neighbors must have shape [points, K] with K > 0");
    if (neighbors) check(neighbors, "neighbors", ScalarType::Int, {x().size(0), neighbors->size(1)});
  }
  // Of grad, rows without gaps inside; a backend that cannot read them apart from each other checks that they are not.
  void check_gradients(const Tensor& grad, const RadialWishes& wishes) const {
    check_form(grad, "grad_y", features().scalar_type(), {x().size(0), width()});
    require(grad.is_contiguous() || (grad.stride(1) == 1 && grad.stride(0) >= width()), kOp, ": rows of grad_y");
    require(!wishes.phase || at.phase, kOp, ": there is no phase");
  }

  // body(Tag<S>) with the arithmetic type, which is the dtype of x.
  template <class Body>
  void with_arithmetic(const Body& body) const {
    if (number() == ScalarType::Double) return body(Tag<double>{});
    body(Tag<float>{});
  }

 private:
  ScalarType number() const { return x().scalar_type(); }

  void check(const OptionalTensor& t, const char* name, ScalarType type, const std::vector<int64_t>& sizes) const {
    if (!t) return;
    check_contiguous(*t, kOp, name);
    check_form(*t, name, type, sizes);
  }
  void check_form(const Tensor& t, const char* name, ScalarType type, const std::vector<int64_t>& sizes) const {
    check_same_device(t, x(), kOp, name);
    bool fits = t.scalar_type() == type && t.dim() == int64_t(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t.size(int64_t(i)) == sizes[i];
    require(fits, kOp, ": dtype or shape of ", name);
  }
  void check_tensors(const RadialTensors& t) const {
    check(t.x, "x", number(), {x().size(0), dims()});
    check(t.centers, "centers", number(), {count(), dims()});
    check(t.shapes, "shapes", number(), {count(), math::radial_shape_width(shape(), dims())});
    check(t.features, "features", features().scalar_type(), {count(), width()});
    check(t.phase, "phase", number(), {width() - options.keep});
  }
};

// The operators of a backend: kValue(call) -> y, kGradients(call, grad, wishes, second) -> RadialResults.
template <auto kValue, auto kGradients>
struct RadialOperators {
  static Tensor forward(Tensor x, Tensor centers, Tensor shapes, Tensor features, OptionalTensor phase,
                        OptionalTensor neighbors, OptionalTensor frequencies, int64_t kind, int64_t shape,
                        bool normalize, bool detach, double eps, int64_t keep, bool deterministic) {
    const RadialCall call{{x, centers, shapes, features, phase},
                          {},
                          neighbors,
                          frequencies,
                          {kind, shape, normalize, detach, eps, keep, deterministic}};
    call.check();
    return kValue(call);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      Tensor grad, Tensor x, Tensor centers, Tensor shapes, Tensor features, OptionalTensor phase,
      OptionalTensor neighbors, OptionalTensor frequencies, int64_t kind, int64_t shape, bool normalize, bool detach,
      double eps, int64_t keep, bool deterministic, std::vector<bool> mask) {
    check_mask(RadialCall::kOp, mask, 5);
    const RadialCall call{{x, centers, shapes, features, phase},
                          {},
                          neighbors,
                          frequencies,
                          {kind, shape, normalize, detach, eps, keep, deterministic}};
    const RadialResults found = gradients(call, grad, {false, mask[0], mask[1], mask[2], mask[3], mask[4]}, false);
    return {found.x, found.centers, found.shapes, found.features, found.phase};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_backward(
      OptionalTensor x_along, OptionalTensor centers_along, OptionalTensor shapes_along, OptionalTensor features_along,
      OptionalTensor phase_along, Tensor grad, Tensor x, Tensor centers, Tensor shapes, Tensor features,
      OptionalTensor phase, OptionalTensor neighbors, OptionalTensor frequencies, int64_t kind, int64_t shape,
      bool normalize, bool detach, double eps, int64_t keep, bool deterministic, std::vector<bool> mask) {
    check_mask(RadialCall::kOp, mask, 6);
    const RadialCall call{{x, centers, shapes, features, phase},
                          {x_along, centers_along, shapes_along, features_along, phase_along},
                          neighbors,
                          frequencies,
                          {kind, shape, normalize, detach, eps, keep, deterministic}};
    const RadialResults found = gradients(call, grad, {mask[0], mask[1], mask[2], mask[3], mask[4], mask[5]}, true);
    return {found.grad, found.x, found.centers, found.shapes, found.features, found.phase};
  }

 private:
  static RadialResults gradients(const RadialCall& call, const Tensor& grad, const RadialWishes& wishes, bool second) {
    call.check();
    call.check_gradients(grad, wishes);
    return kGradients(call, grad, wishes, second);
  }
};

}  // namespace camk::launch
