// SPDX-License-Identifier: MIT
// Entry points of the simulator's self-tests: extern "C", raw pointers, 0 or a failure whose sentence
// camk_sim_last_error() keeps. The same files compile with nvcc, where a launch reports its own error.
#pragma once

#include "cuda/device.cuh"

#define SELFTEST extern "C" __attribute__((visibility("default"))) int

#ifdef CAMK_SIMULATE
#include "control.h"
template <class Launch>
int run(Launch&& launch) {
  return camk::sim::guarded([&] { launch(); });
}
#else
template <class Launch>
int run(Launch&& launch) {
  return static_cast<int>(launch());
}
#endif
