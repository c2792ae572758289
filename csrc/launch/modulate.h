// SPDX-License-Identifier: MIT
// The groups of a modulate as the operators receive them, measured for a launch.
#pragma once
#include "math/activation.h"
#include "torch/seam.h"

namespace camk::launch {

// What follows the tensors in every schema.
struct ModulateOptions {
  int64_t activation;
  double omega;
  bool norm;
  double eps;
  bool frequency_per_group;
};

// A scale or shift [count, rows, width]: rows and width are those of a group, or 1 where its rows or columns are alike;
// `share` groups in a row have the same one.
struct SharedSize {
  int64_t count, rows, width, share;
  int64_t numbers() const { return rows * width; }
};

// h [count, rows, width]: a group is what is normalised together.
struct ModulateGroups {
  int64_t count, rows, width;
  SharedSize scale, shift;
  int64_t numbers() const { return rows * width; }
};

inline SharedSize measure_shared(const Tensor& h, const Tensor& t, const char* name) {
  constexpr const char* kOp = "modulate";
  require(t.dim() == 3, kOp, ": ", name, " must have 3 dimensions");
  const SharedSize size{t.size(0), t.size(1), t.size(2), t.size(0) > 0 ? h.size(0) / t.size(0) : 1};
  require(size.share * size.count == h.size(0) || (size.share == 0 && h.size(0) == 0), kOp, ": ", name,
          " must divide the groups of h into equal parts");
  require((size.rows == 1 || size.rows == h.size(1)) && (size.width == 1 || size.width == h.size(2)), kOp, ": ", name,
          " must broadcast to the groups of h");
  return size;
}

inline ModulateGroups measure_groups(const Tensor& h, const Tensor& gamma, const Tensor& beta,
                                     const std::optional<Tensor>& frequencies, const ModulateOptions& options) {
  constexpr const char* kOp = "modulate";
  require(h.dim() == 3 && h.size(1) > 0 && h.size(2) > 0, kOp, ": h must have 3 dimensions, the last two not empty");
  require(options.activation >= 0 && options.activation < math::kActivations, kOp, ": unknown activation");
  const bool waves = math::Activation(options.activation) == math::Activation::kResidualSine;
  require(!waves || (frequencies && frequencies->dim() == 1 && frequencies->numel() > 0 &&
                     (options.frequency_per_group || frequencies->numel() == h.size(2))),
          kOp, ": frequencies must have one number per channel");
  return {h.size(0), h.size(1), h.size(2), measure_shared(h, gamma, "gamma"), measure_shared(h, beta, "beta")};
}

}  // namespace camk::launch
