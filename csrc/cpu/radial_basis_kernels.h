// SPDX-License-Identifier: MIT
// The loops of radial_basis that depend on the number of axes, for those that do not.
#pragma once
#include "cpu/radial_basis_pairs.h"

namespace camk::cpu {

// Each goes over many points or pairs, as RadialLoops in radial_basis_loops.cpp says.
template <class N>
struct RadialKernels {
  using S = typename scalar_of<N>::type;
  using Problem = RadialProblem<S>;
  using Pairs = RadialPairs<N>;
  void (*weigh)(const Problem&, Pairs&, int64_t begin, int64_t end);
  void (*back_to_points)(const Problem&, Pairs&, int64_t begin, int64_t end, S* gx, bool kernels);
  void (*sum_kernels)(const Problem&, const Pairs&, int64_t begin, int64_t end, PairOrder, const RadialSums<S>&);
};

// N: float, double or the dual number of one. Instantiated in radial_basis_loops.cpp.
template <class N>
RadialKernels<N> radial_kernels(int dims);

}  // namespace camk::cpu
