// SPDX-License-Identifier: MIT
#include "memory.h"

#include <cstdlib>
#include <functional>
#include <new>

// Bounds of the output section in which shared.ld gathers every __shared__ variable.
extern "C" unsigned char camk_sim_shared_begin[] __attribute__((visibility("hidden")));
extern "C" unsigned char camk_sim_shared_end[] __attribute__((visibility("hidden")));

namespace camk::sim {
namespace {

// AddressSanitizer's red zones lie between the variables: they must be stepped over without being looked at.
__attribute__((no_sanitize("address"), noinline)) void poison_static() {
  for (volatile unsigned char* p = camk_sim_shared_begin; p != camk_sim_shared_end; ++p) *p = 0xFF;
}

}  // namespace

SharedMemory::SharedMemory(std::size_t dynamic_bytes) {
  poison_static();
  state.dynamic_bytes = dynamic_bytes;
  state.dynamic_shared = nullptr;
  if (!dynamic_bytes) return;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, dynamic_bytes)) throw std::bad_alloc();
  state.dynamic_shared = static_cast<unsigned char*>(memory);
  std::memset(memory, 0xFF, dynamic_bytes);
}

SharedMemory::~SharedMemory() {
  std::free(state.dynamic_shared);
  state.dynamic_shared = nullptr;
}

bool is_shared(const void* address) {
  const auto within = [&](const unsigned char* first, const unsigned char* last) {
    const auto* p = static_cast<const unsigned char*>(address);
    return std::less_equal<>()(first, p) && std::less<>()(p, last);
  };
  return within(state.dynamic_shared, state.dynamic_shared + state.dynamic_bytes) ||
         within(camk_sim_shared_begin, camk_sim_shared_end);
}

void require_shared(const void* address, const char* operation, const Where& where) {
  if (is_shared(address)) return;
  std::string sentence = std::string(operation) + " needs an address in shared memory";
  const auto at = reinterpret_cast<std::uintptr_t>(address),
             first = reinterpret_cast<std::uintptr_t>(state.dynamic_shared);
  if (first && at >= first && at - first < (64u << 10))
    sentence += "; perhaps this launch asked for too little: " + std::to_string(state.dynamic_bytes) + " bytes dynamic";
  fail(sentence, where);
}

void require_global(const void* address, const char* operation, const Where& where) {
  if (is_shared(address)) fail(std::string(operation) + " needs an address in global memory, not in shared", where);
}

void require_aligned(const void* address, std::size_t bytes, const char* operation, const Where& where) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes)
    fail(std::string(operation) + ": misaligned address, " + std::to_string(bytes) + " bytes must divide it", where);
}

// The data arrive at the wait; until then the destination holds poison, as nobody may rely on what is there.
void copy_async(void* shared, const void* global, int bytes, bool valid, const Where& where) {
  require_shared(shared, "cp.async (destination)", where);
  require_global(global, "cp.async (source)", where);
  require_aligned(shared, static_cast<std::size_t>(bytes), "cp.async (destination)", where);
  require_aligned(global, static_cast<std::size_t>(bytes), "cp.async (source)", where);
  Thread& thread = self();
  PendingCopy& copy = thread.copies.emplace_back(PendingCopy{shared, {}, bytes, thread.copy_group});
  if (valid) std::memcpy(copy.data, global, static_cast<std::size_t>(bytes));
  std::memset(shared, 0xFF, static_cast<std::size_t>(bytes));
  ++state.statistics.asynchronous_copies;
}

void commit_copies() { ++self().copy_group; }

void wait_copies(int groups_left) {
  Thread& thread = self();
  std::erase_if(thread.copies, [&](const PendingCopy& copy) {
    if (copy.group >= thread.copy_group - groups_left) return false;
    std::memcpy(copy.target, copy.data, static_cast<std::size_t>(copy.bytes));
    return true;
  });
}

}  // namespace camk::sim
