// SPDX-License-Identifier: MIT
// The execution model: a grid is run block after block, a block as one fibre per thread.
//
// A thread runs until it has to wait for others (block barrier, warp operation) or ends. Which thread goes on
// next is the schedule's choice; a correct kernel gives the same result in all of them, a kernel with a
// missing barrier does not.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibre.h"

namespace camk::sim {

using Where = std::source_location;

// Every fault of a kernel ends as this exception, thrown by the launch on the caller's stack.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Status : std::uint8_t { ready, in_warp, in_block, done };

struct PendingCopy {  // a cp.async on its way
  void* target;
  unsigned char data[16];
  int bytes, group;
};

inline constexpr std::size_t kSectorBytes = 32;  // what memory behind the first-level cache moves at once

// Which sector a thread loaded from lately: a load from one of these asks the first-level cache alone.
class RecentSectors {
 public:
  void forget() { last_.fill(0), next_ = 0; }
  bool add(const void* address) {  // false: it is among them
    const auto sector = reinterpret_cast<std::uintptr_t>(address) / kSectorBytes;
    if (std::find(last_.begin(), last_.end(), sector) != last_.end()) return false;
    last_[next_++ % last_.size()] = sector;
    return true;
  }

 private:
  std::array<std::uintptr_t, 32> last_{};
  std::size_t next_ = 0;
};

struct Thread {
  uint3 index{};
  unsigned lane = 0, warp = 0;
  Status status = Status::ready;
  int vote = 0;
  std::uint32_t mask = 0;           // of the warp operation it waits in
  const char* waits_for = nullptr;  // its name
  Where where;
  Fibre fibre;
  RecentSectors loaded;
  std::vector<PendingCopy> copies;
  int copy_group = 0;
};

// Lanes that name the same mask meet here. The last one to come (or the exit of the last one missing)
// computes the result for all of them; every lane's arguments and results stay on its own stack.
using Combine = void (*)(void* const* lanes, std::uint32_t present);
struct Rendezvous {
  std::uint32_t mask = 0, present = 0;
  std::uint64_t generation = 0;
  const char* name = nullptr;
  Combine combine = nullptr;
  void* lanes[32] = {};
};

struct Warp {
  std::uint32_t alive = 0;
  std::deque<Rendezvous> meetings;  // a deque keeps references valid while it grows
};

struct Statistics {
  std::uint64_t launches, blocks, threads, switches, barriers, warp_operations;
  std::uint64_t atomics, vector_reductions, asynchronous_copies, matrix_products, matrix_loads;
  // By the load and store functions of device.cuh.
  std::uint64_t loads, bytes_loaded, sectors_loaded, stores, bytes_stored;
};

struct State {
  int architecture = 90;      // 80 or 90
  Thread* current = nullptr;  // null outside kernels
  uint3 block_index{};
  dim3 block_size, grid_size;
  unsigned char* dynamic_shared = nullptr;
  std::size_t dynamic_bytes = 0;
  int barrier_count = 0, barrier_and = 0, barrier_or = 0;
  bool preempt = false;  // random schedules also switch threads at atomics
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::string error;
  std::minstd_rand random;
  Statistics statistics{};
};
extern State state;

// Dynamic shared memory a kernel can opt in to.
inline std::size_t shared_limit() {
  return std::size_t{state.architecture >= 90 ? 227u : state.architecture == 86 ? 99u : 163u} * 1024;
}

inline void count_store(std::size_t bytes) { ++state.statistics.stores, state.statistics.bytes_stored += bytes; }

bool in_kernel();  // whether the caller is a thread of a kernel (other threads of the process may be none)
inline Thread& self() { return *state.current; }

inline void count_load(const void* address, std::size_t bytes) {  // aligned to its bytes, so within a sector
  ++state.statistics.loads, state.statistics.bytes_loaded += bytes;
  state.statistics.sectors_loaded += self().loaded.add(address);
}

std::string place(const Where& where);  // "file:line"

// Ends the launch with a sentence. Inside a kernel the calling thread is abandoned where it stands, because
// an exception could not pass through code compiled as non-throwing.
[[noreturn]] void fail(const std::string& sentence, const Where& where);

void yield();    // lets the schedule choose another thread
void preempt();  // the same, sometimes, in random schedules
void block_barrier(const char* name, int vote, const Where& where);
void meet(std::uint32_t mask, void* mine, const char* name, Combine combine, const Where& where);
void meet_whole_warp(void* mine, const char* name, Combine combine, const Where& where);

struct Schedule {
  enum Kind { forward, reverse, shuffled } kind = forward;
  unsigned seed = 0;
};
Schedule parse_schedule(const std::string& text);  // "forward", "reverse", "random:SEED"; throws Error
void set_schedule(const char* text);               // null: CAMK_SIM_SCHEDULE, or forward

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* argument, const Where& where);

// Runs body() once per thread of the grid. Throws Error; one launch at a time per process.
template <class Body>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, Body& body, const Where& where) {
  run_grid(grid, block, shared_bytes, [](void* f) { (*static_cast<Body*>(f))(); }, &body, where);
}

}  // namespace camk::sim
