// SPDX-License-Identifier: MIT
// Memory as a kernel sees it: poisoned shared memory, aligned vector accesses, atomics, asynchronous copies.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace camk::sim {

// Shared memory of one block. Everything starts as 0xFF bytes, which read as NaN in every floating type, so a
// value used before it was written is seen in the result. The dynamic part is a heap block of exactly the
// size asked for.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t dynamic_bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
};

bool is_shared(const void* address);

// Device and host pointers look alike here; these two keep a kernel from confusing global and shared memory.
void require_shared(const void* address, const char* operation, const Where& where);
void require_global(const void* address, const char* operation, const Where& where);
void require_aligned(const void* address, std::size_t bytes, const char* operation, const Where& where);

void copy_async(void* shared, const void* global, int bytes, bool valid, const Where& where);
void commit_copies();
void wait_copies(int groups_left);

template <class V>
concept Atomic = std::same_as<V, int> || std::same_as<V, unsigned> || std::same_as<V, unsigned long long> ||
                 std::same_as<V, float> || std::same_as<V, double> || std::same_as<V, __half> ||
                 std::same_as<V, __half2> || std::same_as<V, __nv_bfloat16> || std::same_as<V, __nv_bfloat162>;
template <class V>
concept AtomicInteger = std::same_as<V, int> || std::same_as<V, unsigned> || std::same_as<V, unsigned long long>;

template <class V>
V sum(V a, V b) {
  if constexpr (std::same_as<V, __half> || std::same_as<V, __nv_bfloat16>)
    return V(static_cast<float>(a) + static_cast<float>(b));
  else if constexpr (std::same_as<V, __half2> || std::same_as<V, __nv_bfloat162>)
    return V(sum(a.x, b.x), sum(a.y, b.y));
  else if constexpr (std::is_integral_v<V>)  // integers wrap on a device
    return static_cast<V>(static_cast<unsigned long long>(a) + static_cast<unsigned long long>(b));
  else
    return a + b;
}

template <class V, class F>
V atomically(V* address, const char* operation, const Where& where, F&& next) {
  preempt();
  require_aligned(address, sizeof(V), operation, where);
  ++state.statistics.atomics;
  V old;
  std::memcpy(&old, address, sizeof(V));
  const V now = next(old);
  std::memcpy(address, &now, sizeof(V));
  return old;
}

}  // namespace camk::sim

#define CAMK_SIM_HERE const ::camk::sim::Where& where = ::camk::sim::Where::current()

template <camk::sim::Atomic V>
V atomicAdd(V* address, std::type_identity_t<V> value, CAMK_SIM_HERE) {
  return camk::sim::atomically(address, "atomicAdd", where, [&](V old) { return camk::sim::sum(old, value); });
}
template <camk::sim::AtomicInteger V>
V atomicMax(V* address, std::type_identity_t<V> value, CAMK_SIM_HERE) {
  return camk::sim::atomically(address, "atomicMax", where, [&](V old) { return std::max(old, value); });
}
template <camk::sim::AtomicInteger V>
V atomicMin(V* address, std::type_identity_t<V> value, CAMK_SIM_HERE) {
  return camk::sim::atomically(address, "atomicMin", where, [&](V old) { return std::min(old, value); });
}
template <camk::sim::AtomicInteger V>
V atomicOr(V* address, std::type_identity_t<V> value, CAMK_SIM_HERE) {
  return camk::sim::atomically(address, "atomicOr", where, [&](V old) { return old | value; });
}
template <camk::sim::AtomicInteger V>
V atomicAnd(V* address, std::type_identity_t<V> value, CAMK_SIM_HERE) {
  return camk::sim::atomically(address, "atomicAnd", where, [&](V old) { return old & value; });
}
template <class V>
  requires camk::sim::AtomicInteger<V> || std::same_as<V, float>
V atomicExch(V* address, std::type_identity_t<V> value, CAMK_SIM_HERE) {
  return camk::sim::atomically(address, "atomicExch", where, [&](V) { return value; });
}
template <class V>
  requires camk::sim::AtomicInteger<V> || std::same_as<V, unsigned short>
V atomicCAS(V* address, std::type_identity_t<V> expected, std::type_identity_t<V> value, CAMK_SIM_HERE) {
  return camk::sim::atomically(address, "atomicCAS", where, [&](V old) { return old == expected ? value : old; });
}

namespace camk::sim {

// N neighbouring sums: one vector instruction where the architecture has it, else N scalar ones.
template <int N>
void add_floats(float* address, const float (&values)[N], bool one_instruction, const Where& where) {
  require_aligned(address, N * sizeof(float), "vector reduction", where);
  if (!one_instruction) {
    for (int i = 0; i < N; ++i) atomicAdd(address + i, values[i], where);
    return;
  }
  preempt();
  ++state.statistics.vector_reductions;
  for (int i = 0; i < N; ++i) address[i] += values[i];
}

}  // namespace camk::sim

// Blocks run one after another and threads one at a time: memory is always in order, a fence has nothing to
// do but to give the schedule a chance.
inline void __threadfence() { camk::sim::preempt(); }
inline void __threadfence_block() { camk::sim::preempt(); }

template <class V>
V __ldg(const V* address, CAMK_SIM_HERE) {
  camk::sim::require_global(address, "__ldg", where);
  camk::sim::require_aligned(address, std::min<std::size_t>(sizeof(V), 16), "__ldg", where);
  return *address;
}
