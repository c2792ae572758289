// SPDX-License-Identifier: MIT
// Which block a network takes, and the launch of its kernels.
#pragma once
#include "cuda/modulated_mlp_fused.cuh"

namespace camk::cuda {

// A tile has at most so many points, a launch at most so many tiles for each that a GPU holds at once: rows for more
// would need more memory than they save time (an H100 takes 7 % less with four).
inline constexpr int64_t kFusedRows = 128, kFusedWaves = 2;

// Columns of a block.
inline int fused_columns(const NetworkJob<float>& job) { return job.widest <= 64 ? 64 : job.widest <= 128 ? 128 : 256; }

// Whether weights are packed as bfloat16, for products of it; as float32 for those of tf32.
inline bool packs_bfloat16(const NetworkJob<float>& job) { return job.weights == Storage::kBFloat16 && job.terms > 1; }

// body(Constant<Across>, null pointer of a packed weight's type)
template <class Body>
auto with_block(const NetworkJob<float>& job, const Body& body) {
  const auto with_weights = [&](auto across) {
    return packs_bfloat16(job) ? body(across, static_cast<uint16_t*>(nullptr))
                               : body(across, static_cast<float*>(nullptr));
  };
  switch (fused_columns(job)) {
    case 64:
      return with_weights(Constant<1>{});
    case 128:
      return with_weights(Constant<2>{});
    default:
      return with_weights(Constant<4>{});
  }
}

template <int Across, class W>
LaunchShape fused_shape(const NetworkJob<float>& job, cudaStream_t stream) {
  using B = Block<Across>;
  return {unsigned(divide_up(job.points, B::kPoints)), unsigned(B::kThreads), B::shared_bytes(job.skips, sizeof(W)),
          stream};
}

}  // namespace camk::cuda
