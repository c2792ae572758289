// SPDX-License-Identifier: MIT
// What both passes of a repeatable sum (cuda/sums.h) leave in memory, `count` numbers on the device of a tensor.
#pragma once
#include "cuda/sums.h"
#include "torch/seam.h"

namespace camk::cuda {

class RepeatableSum {
 public:
  RepeatableSum(const Tensor& like, int64_t count)
      : fixed_(zeros(like, {count}, ScalarType::Long)), largest_(zeros(like, {1}, ScalarType::Long)) {}

  int64_t* fixed() const { return write<int64_t>(fixed_); }
  uint64_t* largest() const { return reinterpret_cast<uint64_t*>(write<int64_t>(largest_)); }

  // sums += what was added up, of at most `terms` summands each.
  cudaError_t finish(void* sums, Storage kind, int64_t terms, cudaStream_t stream) const {
    return launch_finish_fixed(fixed(), largest(), sums, kind, fixed_.numel(), terms, stream);
  }

 private:
  Tensor fixed_, largest_;
};

}  // namespace camk::cuda
