// SPDX-License-Identifier: MIT
// The tensors of SparseRowAdam's operator, checked the same on every device; schema: python/camkernels/optim.py.
#pragma once
#include "torch/seam.h"

namespace camk::launch {

inline constexpr const char* kAdam = "SparseRowAdam";

struct AdamTensors {
  const Tensor &values, &first, &second, &steps, &gradient;
  const std::optional<Tensor>& rows;
  const Tensor& corrections;

  int64_t width() const { return values.numel() / values.size(0); }
  int64_t count() const { return rows ? rows->numel() : values.size(0); }

  void check() const {
    const std::pair<const Tensor&, const char*> all[] = {{values, "values"},     {first, "exp_avg"},
                                                         {second, "exp_avg_sq"}, {steps, "step"},
                                                         {gradient, "gradient"}, {corrections, "corrections"}};
    for (const auto& [tensor, name] : all) check_contiguous(tensor, kAdam, name);
    const auto kind = values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    for (const Tensor* moment : {&first, &second}) {
      require(moment->numel() == values.numel() && moment->scalar_type() == kind, kAdam,
              ": size or dtype of the moments");
    }
    require(values.dim() > 0 && steps.numel() == values.size(0) && steps.scalar_type() == ScalarType::Int, kAdam,
            ": step must be int32, one for each row");
    require(corrections.scalar_type() == kind && corrections.dim() == 2 && corrections.size(0) > 0 &&
                corrections.size(1) == 2,
            kAdam, ": corrections must be [steps, 2], of the dtype of the moments");
    require(gradient.scalar_type() == values.scalar_type(), kAdam,
            ": the gradient must have the dtype of the parameter");
    require(gradient.numel() * values.size(0) == values.numel() * count(), kAdam, ": shape of the gradient");
    if (!rows) return;
    check_contiguous(*rows, kAdam, "rows");
    require(rows->scalar_type() == ScalarType::Long, kAdam, ": rows must be int64");
  }
};

}  // namespace camk::launch
