// SPDX-License-Identifier: MIT
// Runs the project's CUDA C++ kernels on the host, unmodified:   g++ -x c++ -include simulator.h kernel.cu
//
// NVIDIA's headers compile under a host compiler and bring float4, dim3, __half, __nv_bfloat16; the files
// included here bring what a device adds. CAMK_SIMULATE is defined; which architecture's instruction set is
// simulated, 80 or 90, is chosen at run time (camk_sim_architecture).
//
// Not modelled: two blocks at the same time, weak memory order, bank conflicts, the order of additions inside
// a tensor core, __activemask (its value is unspecified on a device). __CUDA_ARCH__ stays undefined: gate on
// CAMK_ARCH.
#pragma once

#ifndef CAMK_SIMULATE
#define CAMK_SIMULATE
#endif
#define CAMK_SIMULATOR_INCLUDED 1

// Must precede NVIDIA's headers, which then keep it. `noinit` puts the variable, also one in a template, into
// a section of its own: that is how the simulator finds all shared memory to poison it.
#define __shared__ static __attribute__((noinit))

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

#include "intrinsics.h"
#include "memory.h"
#include "scheduler.h"
#include "tensor.h"
#include "warp.h"

#define threadIdx (::camk::sim::state.current->index)
#define blockIdx (::camk::sim::state.block_index)
#define blockDim (::camk::sim::state.block_size)
#define gridDim (::camk::sim::state.grid_size)
#define warpSize 32
