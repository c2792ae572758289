// SPDX-License-Identifier: MIT
#include "scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <optional>

#include "faults.h"
#include "memory.h"

namespace camk::sim {

State state;

namespace {

std::optional<Schedule> chosen;
std::vector<char*> stacks;  // kept between launches
void (*kernel_body)(void*) = nullptr;
void* kernel_argument = nullptr;
thread_local bool resumed = false;  // a fibre runs on this thread

std::string text(const char* format, auto... values) {
  char buffer[400];
  std::snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

void release(Rendezvous& meeting, const Thread& anyone) {
  meeting.combine(meeting.lanes, meeting.present);
  const unsigned first = anyone.warp * 32;
  for (unsigned lane = 0; lane < 32 && first + lane < state.threads.size(); ++lane)
    if (meeting.present >> lane & 1 && state.threads[first + lane].status == Status::in_warp)
      state.threads[first + lane].status = Status::ready;
  meeting.present = 0;
  ++meeting.generation;
}

void thread_main() {
  arrived();
  try {
    kernel_body(kernel_argument);
  } catch (const std::exception& e) {
    if (state.error.empty()) state.error = std::string("a kernel threw an exception: ") + e.what();
  }
  self().status = Status::done;
  leave(self().fibre, true);
  std::abort();
}

// A thread ended: operations that waited only for it complete without it.
void after_exit(Thread& thread) {
  Warp& warp = state.warps[thread.warp];
  warp.alive &= ~(1u << thread.lane);
  for (Rendezvous& meeting : warp.meetings)
    if (meeting.present && meeting.present == (meeting.mask & warp.alive)) release(meeting, thread);
}

void set_up_block() {
  const unsigned count = state.block_size.x * state.block_size.y * state.block_size.z;
  while (stacks.size() < count) stacks.push_back(new_stack());
  state.threads.resize(count);
  state.warps.resize((count + 31) / 32);
  for (Warp& warp : state.warps) {
    warp.alive = 0;
    for (Rendezvous& meeting : warp.meetings) meeting.present = 0;
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = state.threads[i];
    thread.lane = i & 31;
    thread.warp = i >> 5;
    thread.index = make_uint3(i % state.block_size.x, i / state.block_size.x % state.block_size.y,
                              i / (state.block_size.x * state.block_size.y));
    thread.status = Status::ready;
    thread.waits_for = nullptr;
    thread.loaded.forget();
    thread.copies.clear();
    thread.copy_group = 0;
    thread.fibre.stack = stacks[i];
    prepare(thread.fibre, thread_main);
    state.warps[thread.warp].alive |= 1u << thread.lane;
  }
  state.statistics.threads += count;
}

// Resumes every ready lane of one warp until none is ready. Returns how many ended; sets `progress`.
unsigned run_warp(unsigned warp, const std::vector<unsigned>& lanes, bool& progress) {
  unsigned ended = 0;
  for (bool again = true; again && state.error.empty();) {
    again = false;
    for (unsigned lane : lanes) {
      const unsigned i = warp * 32 + lane;
      if (i >= state.threads.size() || state.threads[i].status != Status::ready) continue;
      state.current = &state.threads[i];
      ++state.statistics.switches;
      resumed = true;
      enter(state.threads[i].fibre);
      resumed = false;
      progress = again = true;
      if (!state.error.empty()) break;
      if (state.threads[i].status == Status::done) {
        ++ended;
        after_exit(state.threads[i]);
      }
    }
  }
  state.current = nullptr;
  return ended;
}

// Every thread waits at a barrier or has ended: opens the barrier, or says why it may not open.
void open_barrier(unsigned ended) {
  const Thread* first = nullptr;
  const Thread* other = nullptr;
  state.barrier_count = 0;
  for (const Thread& thread : state.threads) {
    if (thread.status != Status::in_block) continue;
    if (!first) first = &thread;
    if (thread.where.line() != first->where.line() || thread.where.column() != first->where.column() ||
        std::string(thread.where.file_name()) != first->where.file_name())
      other = &thread;
    state.barrier_count += thread.vote != 0;
  }
  const unsigned waiting = static_cast<unsigned>(state.threads.size()) - ended;
  const std::string at = place(first->where) + ": divergent " + first->waits_for + ": ";
  if (ended)
    state.error =
        at + text("%u of %zu threads of block (%u,%u,%u) returned before this barrier, which %u wait at", ended,
                  state.threads.size(), state.block_index.x, state.block_index.y, state.block_index.z, waiting);
  else if (other)
    state.error = at + "other threads of the block wait at " + place(other->where);
  if (!state.error.empty()) return;
  state.barrier_and = state.barrier_count == static_cast<int>(waiting);
  state.barrier_or = state.barrier_count > 0;
  for (Thread& thread : state.threads) thread.status = Status::ready;
}

void report_deadlock() {
  std::string sentence;
  int listed = 0;
  for (const Thread& thread : state.threads) {
    if (thread.status == Status::done || ++listed > 6) continue;
    if (sentence.empty()) sentence = place(thread.where) + ": deadlock, no thread of the block can go on:";
    sentence += text(" thread %u waits in %s", thread.warp * 32 + thread.lane, thread.waits_for);
    if (thread.status == Status::in_warp) sentence += text(" with mask 0x%08x", thread.mask);
    sentence += " at " + place(thread.where) + ";";
  }
  state.error = sentence + (listed > 6 ? text(" and %d more", listed - 6) : "");
}

void run_block(const Schedule& schedule) {
  set_up_block();
  std::vector<unsigned> warps(state.warps.size()), lanes(32);
  std::iota(warps.begin(), warps.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  if (schedule.kind == Schedule::reverse) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  unsigned ended = 0;
  while (ended < state.threads.size() && state.error.empty()) {
    if (schedule.kind == Schedule::shuffled) {
      std::shuffle(warps.begin(), warps.end(), state.random);
      std::shuffle(lanes.begin(), lanes.end(), state.random);
    }
    bool progress = false;
    for (unsigned warp : warps) ended += run_warp(warp, lanes, progress);
    if (!state.error.empty()) break;
    unsigned waiting = 0;
    for (const Thread& thread : state.threads) waiting += thread.status == Status::in_block;
    if (waiting && waiting + ended == state.threads.size())
      open_barrier(ended);
    else if (!progress)
      report_deadlock();
  }
}

void check_configuration(dim3 grid, dim3 block, std::size_t shared_bytes, const Where& where) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const std::size_t limit = shared_limit();
  if (threads < 1 || threads > 1024 || block.z > 64)
    fail(text("a block of %u x %u x %u threads: a device allows 1 to 1024, at most 64 in z", block.x, block.y, block.z),
         where);
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail(text("a grid of %u x %u x %u blocks: a device allows 2147483647 x 65535 x 65535", grid.x, grid.y, grid.z),
         where);
  if (shared_bytes > limit)
    fail(text("%zu bytes of dynamic shared memory: sm_%d allows %zu", shared_bytes, state.architecture, limit), where);
}

Schedule current_schedule() {
  if (chosen) return *chosen;
  const char* named = std::getenv("CAMK_SIM_SCHEDULE");
  return parse_schedule(named && *named ? named : "forward");
}

}  // namespace

bool in_kernel() { return resumed; }

std::string place(const Where& where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

void fail(const std::string& sentence, const Where& where) {
  const std::string full = place(where) + ": " + sentence;
  if (!in_kernel()) throw Error(full);
  const uint3 b = state.block_index, t = self().index;
  if (state.error.empty())
    state.error = full + text(" [block (%u,%u,%u), thread (%u,%u,%u)]", b.x, b.y, b.z, t.x, t.y, t.z);
  self().status = Status::done;
  leave(self().fibre, true);
  std::abort();
}

void yield() { leave(self().fibre); }

void preempt() {
  if (state.preempt && state.random() % 8 == 0) yield();
}

void block_barrier(const char* name, int vote, const Where& where) {
  Thread& thread = self();
  thread.status = Status::in_block;
  thread.waits_for = name;
  thread.where = where;
  thread.vote = vote;
  ++state.statistics.barriers;
  yield();
}

void meet(std::uint32_t mask, void* mine, const char* name, Combine combine, const Where& where) {
  Thread& thread = self();
  Warp& warp = state.warps[thread.warp];
  if (!(mask >> thread.lane & 1))
    fail(text("wrong mask: lane %u calls %s with mask 0x%08x, which does not name it", thread.lane, name, mask), where);
  auto found = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](auto& m) { return m.mask == mask; });
  if (found == warp.meetings.end()) {
    warp.meetings.emplace_back().mask = mask;
    found = warp.meetings.end() - 1;
  }
  Rendezvous& meeting = *found;
  if (meeting.present && meeting.combine != combine)
    fail(text("lanes of mask 0x%08x meet in different operations, %s and %s", mask, name, meeting.name), where);
  meeting.name = name;
  meeting.combine = combine;
  meeting.lanes[thread.lane] = mine;
  meeting.present |= 1u << thread.lane;
  ++state.statistics.warp_operations;
  if (meeting.present == (mask & warp.alive)) return release(meeting, thread);
  thread.mask = mask;
  thread.waits_for = name;
  thread.where = where;
  for (const std::uint64_t generation = meeting.generation; meeting.generation == generation;) {
    thread.status = Status::in_warp;
    yield();
  }
}

void meet_whole_warp(void* mine, const char* name, Combine combine, const Where& where) {
  if (state.warps[self().warp].alive != ~0u)
    fail(text("%s needs all 32 lanes; some have returned or do not exist", name), where);
  meet(~0u, mine, name, combine, where);
}

Schedule parse_schedule(const std::string& name) {
  if (name == "forward") return {Schedule::forward, 0};
  if (name == "reverse") return {Schedule::reverse, 0};
  if (name.rfind("random:", 0) == 0 && name.find_first_not_of("0123456789", 7) == std::string::npos && name.size() > 7)
    return {Schedule::shuffled, static_cast<unsigned>(std::strtoul(name.c_str() + 7, nullptr, 10))};
  throw Error("the simulator knows the schedules forward, reverse and random:SEED, not '" + name + "'");
}

void set_schedule(const char* name) {
  if (name)
    chosen = parse_schedule(name);
  else
    chosen.reset();
}

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* argument,
              const Where& where) {
  if (in_kernel()) fail("a kernel may not launch another one in the simulator", where);
  static std::mutex one_at_a_time;  // static shared memory exists once per process
  const std::lock_guard lock(one_at_a_time);
  check_configuration(grid, block, shared_bytes, where);
  const Schedule schedule = current_schedule();
  state.grid_size = grid;
  state.block_size = block;
  state.error.clear();
  state.random.seed(schedule.seed + 1);
  state.preempt = schedule.kind == Schedule::shuffled;
  kernel_body = body;
  kernel_argument = argument;
  ++state.statistics.launches;
  const FaultGuard guard;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  // An odd stride permutes a power of two of slots; slots beyond the grid are passed over.
  const std::uint64_t slots = schedule.kind == Schedule::shuffled ? std::bit_ceil(blocks) : blocks;
  const std::uint64_t stride = state.random() | 1u, offset = state.random();
  for (std::uint64_t i = 0; i < slots && state.error.empty(); ++i) {
    std::uint64_t at = i;
    if (schedule.kind == Schedule::reverse) at = blocks - 1 - i;
    if (schedule.kind == Schedule::shuffled) at = (i * stride + offset) & (slots - 1);
    if (at >= blocks) continue;
    state.block_index = make_uint3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                                   static_cast<unsigned>(at / grid.x / grid.y));
    ++state.statistics.blocks;
    const SharedMemory shared(shared_bytes);
    run_block(schedule);
  }
  if (!state.error.empty()) throw Error(place_of_fault() + state.error + " (launched at " + place(where) + ")");
}

}  // namespace camk::sim
