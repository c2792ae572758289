// SPDX-License-Identifier: MIT
// The one header with inline PTX and launch syntax. Kernels and launchers include it and csrc/math, nothing
// else.
//
// Every function has two bodies: the CUDA instruction, and what the instruction means, for the CPU simulator
// (CAMK_SIMULATE, tests/sim). Architecture code is gated on CAMK_ARCH, because __CUDA_ARCH__ exists in nvcc
// alone; in the simulator it is a number of the run, so that one build serves every architecture.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// 80 for sm_80, 90 for sm_90, ...; 0 in the host pass of nvcc.
#if defined(CAMK_SIMULATE)
#define CAMK_ARCH (::camk::sim::state.architecture)
#elif defined(__CUDA_ARCH__)
#define CAMK_ARCH (__CUDA_ARCH__ / 10)
#else
#define CAMK_ARCH 0
#endif

#ifdef CAMK_SIMULATE
#ifndef CAMK_SIMULATOR_INCLUDED
#error "compile simulated kernels with -include tests/sim/simulator.h"
#endif
#include <source_location>
// A last parameter that names the caller's line in the simulator's errors and does not exist on a device.
#define CAMK_WHERE , const std::source_location& where = std::source_location::current()
#define CAMK_PASS_WHERE , where
#else
#define CAMK_WHERE
#define CAMK_PASS_WHERE
#endif

#define CAMK_DEVICE __device__ __forceinline__
// CUDA's own __noinline__ would break the standard library under g++.
#define CAMK_NOINLINE __attribute__((noinline))

// Declares `name`, a T* to the dynamic shared memory of the block, aligned to 128 bytes.
#ifdef CAMK_SIMULATE
#define CAMK_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::camk::sim::state.dynamic_shared)
#else
#define CAMK_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char camk_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(camk_dynamic_shared)
#endif

namespace camk {

// ---- Launch -----------------------------------------------------------------------------------------------

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic; the opt-in above 48 KiB is done by launch()
  cudaStream_t stream = nullptr;
#ifdef CAMK_SIMULATE
  std::source_location where = std::source_location::current();
#endif
};

// launch(kernel, {grid, block, shared_bytes, stream}, arguments...). An empty grid is no work, not an error.
// On a device the result is the error of the launch itself; the simulator throws camk::sim::Error with a
// sentence instead.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return cudaSuccess;
#ifdef CAMK_SIMULATE
  auto thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  sim::launch(shape.grid, shape.block, shape.shared_bytes, thread, shape.where);
  return cudaSuccess;
#else
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // forget it, or the next launch would report it as its own
      return error;
    }
  }
  // clang-format off
  kernel<<<shape.grid, shape.block, shape.shared_bytes, shape.stream>>>(
      static_cast<Parameters>(arguments)...);
  // clang-format on
  return cudaGetLastError();
#endif
}

// ---- Sums in global memory: no old value comes back, so the hardware need not return one ------------------

CAMK_DEVICE void reduce_add(float* p, float v CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_global(p, "reduce_add", where);
  atomicAdd(p, v, where);
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "f"(v) : "memory");
#endif
}

// p aligned to 8 bytes. One instruction on sm_90, two before.
CAMK_DEVICE void reduce_add(float* p, float2 v CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_global(p, "reduce_add of float2", where);
  sim::add_floats(p, {v.x, v.y}, CAMK_ARCH >= 90, where);
#elif CAMK_ARCH >= 90
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "f"(v.x),
               "f"(v.y)
               : "memory");
#else
  reduce_add(p, v.x);
  reduce_add(p + 1, v.y);
#endif
}

// p aligned to 16 bytes. One instruction on sm_90, four before.
CAMK_DEVICE void reduce_add(float* p, float4 v CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_global(p, "reduce_add of float4", where);
  sim::add_floats(p, {v.x, v.y, v.z, v.w}, CAMK_ARCH >= 90, where);
#elif CAMK_ARCH >= 90
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#else
  reduce_add(p, v.x);
  reduce_add(p + 1, v.y);
  reduce_add(p + 2, v.z);
  reduce_add(p + 3, v.w);
#endif
}

CAMK_DEVICE void reduce_add(double* p, double v CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_global(p, "reduce_add", where);
  atomicAdd(p, v, where);
#else
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "d"(v) : "memory");
#endif
}

CAMK_DEVICE void reduce_add(__half2* p, __half2 v CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_global(p, "reduce_add", where);
  atomicAdd(p, v, where);
#else
  uint32_t bits;
  memcpy(&bits, &v, 4);
  asm volatile("red.relaxed.gpu.global.add.noftz.f16x2 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(bits)
               : "memory");
#endif
}

// One instruction on sm_90, a compare-and-swap loop before.
CAMK_DEVICE void reduce_add(__nv_bfloat162* p, __nv_bfloat162 v CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_global(p, "reduce_add", where);
  atomicAdd(p, v, where);
#elif CAMK_ARCH >= 90
  uint32_t bits;
  memcpy(&bits, &v, 4);
  asm volatile("red.relaxed.gpu.global.add.noftz.bf16x2 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(bits)
               : "memory");
#else
  atomicAdd(p, v);
#endif
}

// N neighbouring sums with the widest instructions N allows; p aligned to min(N, 4) * 4 bytes when N is even.
template <int N>
CAMK_DEVICE void reduce_add_n(float* p, const float* v CAMK_WHERE) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) reduce_add(p + i, make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]) CAMK_PASS_WHERE);
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) reduce_add(p + i, make_float2(v[i], v[i + 1]) CAMK_PASS_WHERE);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) reduce_add(p + i, v[i] CAMK_PASS_WHERE);
  }
}

// Sums in shared memory: float, double, int, unsigned, unsigned long long.
template <class T>
CAMK_DEVICE void shared_add(T* p, T v CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_shared(p, "shared_add", where);
  atomicAdd(p, v, where);
#else
  atomicAdd(p, v);
#endif
}

// ---- Loads and stores -------------------------------------------------------------------------------------

namespace detail {
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using Type = unsigned char;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
}  // namespace detail

#ifdef CAMK_SIMULATE
#define CAMK_LOAD_BODY(name, instruction)          \
  sim::require_global(p, name, where);             \
  sim::require_aligned(p, sizeof(T), name, where); \
  sim::count_load(p, sizeof(T));                   \
  T value;                                         \
  memcpy(&value, p, sizeof(T));                    \
  return value
#else
#define CAMK_LOAD_BODY(name, instruction)                          \
  using Word = typename detail::Word<sizeof(T)>::Type;             \
  const Word word = instruction(reinterpret_cast<const Word*>(p)); \
  T value;                                                         \
  memcpy(&value, &word, sizeof(T));                                \
  return value
#endif

// A T of 1, 2, 4, 8 or 16 bytes, aligned to its size, in one load. `readonly`: nobody writes it during the
// kernel (ld.global.nc). `streaming`: read once, evicted first.
template <class T>
CAMK_DEVICE T load_readonly(const T* p CAMK_WHERE) {
  CAMK_LOAD_BODY("load_readonly", __ldg);
}
template <class T>
CAMK_DEVICE T load_streaming(const T* p CAMK_WHERE) {
  CAMK_LOAD_BODY("load_streaming", __ldcs);
}
template <class T>
CAMK_DEVICE void store_streaming(T* p, const T& value CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::require_global(p, "store_streaming", where);
  sim::require_aligned(p, sizeof(T), "store_streaming", where);
  sim::count_store(sizeof(T));
  memcpy(p, &value, sizeof(T));
#else
  using Word = typename detail::Word<sizeof(T)>::Type;
  Word word;
  memcpy(&word, &value, sizeof(T));
  __stcs(reinterpret_cast<Word*>(p), word);
#endif
}

// Copies `bytes` = 4, 8 or 16 from global to shared memory in the background; both addresses aligned to
// `bytes`. With valid = false zeros are written and `global` is not read (it must still be an address).
template <int bytes>
CAMK_DEVICE void cp_async(void* shared, const void* global, bool valid = true CAMK_WHERE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef CAMK_SIMULATE
  sim::copy_async(shared, global, bytes, valid, where);
#else
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int read = valid ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(__cvta_generic_to_global(global)),
                 "r"(read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(__cvta_generic_to_global(global)),
                 "n"(bytes), "r"(read)
                 : "memory");
#endif
}

// Closes a group of this thread's copies.
CAMK_DEVICE void cp_async_commit() {
#ifdef CAMK_SIMULATE
  sim::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups_left` of this thread's newest groups are in flight. Other threads' copies still
// need a barrier after it.
template <int groups_left>
CAMK_DEVICE void cp_async_wait() {
#ifdef CAMK_SIMULATE
  sim::wait_copies(groups_left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#endif
}

// ---- Tensor cores. Lane 4 g + t of the warp; all 32 lanes take part ---------------------------------------
// A 16 x k row-major: a[0] row g, a[1] row g + 8, a[2], a[3] the same rows, k / 2 further right; columns from
// 2 t (16-bit) or t (tf32). B k x 8: b[0] rows from 2 t or t, b[1] k / 2 further down; column g. D: d[0],
// d[1] row g, columns 2 t and 2 t + 1; d[2], d[3] row g + 8. All: D += A B.

#ifdef CAMK_SIMULATE
#define CAMK_MMA_BODY(format, instruction) sim::matrix_product<sim::format>(d, a, b, instruction, where)
#else
#define CAMK_MMA_BODY(format, instruction)                                          \
  asm volatile(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

CAMK_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CAMK_WHERE) {
  CAMK_MMA_BODY(Half, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
CAMK_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CAMK_WHERE) {
  CAMK_MMA_BODY(BFloat, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
CAMK_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CAMK_WHERE) {
  CAMK_MMA_BODY(Tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}

// float32 rounded to the 10 mantissa bits of tf32, to nearest, ties away from zero.
CAMK_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
#ifdef CAMK_SIMULATE
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & 0xffffe000u;
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

// Two values in one register, `low` in the lower half.
CAMK_DEVICE uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
CAMK_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// Four 8 x 8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8 in shared
// memory, aligned to 16 bytes. r[i] of lane 4 g + t: elements 2 t, 2 t + 1 of row g of matrix i;
// `transposed`: of column g.
template <bool transposed = false>
CAMK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row CAMK_WHERE) {
#ifdef CAMK_SIMULATE
  sim::load_matrices<transposed>(r, row, where);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

}  // namespace camk
