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

  // body(tensor, its name in the state or the schema)
  template <class Body>
  void each(const Body& body) const {
    body(values, "values"), body(first, "exp_avg"), body(second, "exp_avg_sq"), body(steps, "step");
    body(gradient, "gradient"), body(corrections, "corrections");
    if (rows) body(*rows, "rows");
  }

  void check() const {
    each([](const Tensor& tensor, const char* name) { check_contiguous(tensor, kAdam, name); });
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
    const bool fits = values.size(0) == 0 ? gradient.numel() == 0 : gradient.numel() == count() * width();
    require(fits, kAdam, ": shape of the gradient");
    if (!rows) return;
    require(rows->scalar_type() == ScalarType::Long, kAdam, ": rows must be int64");
  }
};

}  // namespace camk::launch
