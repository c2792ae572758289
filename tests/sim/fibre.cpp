// SPDX-License-Identifier: MIT
#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

#ifdef CAMK_SIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace camk::sim {
namespace {

Fibre scheduler;  // the context launch() runs in
#ifdef CAMK_SIM_ASAN
const void* scheduler_bottom = nullptr;
std::size_t scheduler_bytes = 0;
#endif

#ifndef CAMK_SIM_USE_UCONTEXT
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

}  // namespace

char* new_stack() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  return static_cast<char*>(memory);
}

void prepare(Fibre& fibre, void (*entry)()) {
#ifdef CAMK_SIM_ASAN
  // The last user of this stack may have been abandoned in the middle, with its red zones still marked.
  ASAN_UNPOISON_MEMORY_REGION(fibre.stack, kStackBytes);
  fibre.fake_stack = nullptr;
#endif
#ifdef CAMK_SIM_USE_UCONTEXT
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, entry, 0);
#else
  void** top = reinterpret_cast<void**>(fibre.stack + kStackBytes - 64);
  *--top = nullptr;  // where a return address would be: unwinders stop here
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  fibre.stack_pointer = top;
#endif
}

void enter(Fibre& fibre) {
#ifdef CAMK_SIM_ASAN
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, fibre.stack, kStackBytes);
#endif
#ifdef CAMK_SIM_USE_UCONTEXT
  swapcontext(&scheduler.context, &fibre.context);
#else
  switch_stack(&scheduler.stack_pointer, fibre.stack_pointer);
#endif
#ifdef CAMK_SIM_ASAN
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void arrived() {
#ifdef CAMK_SIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
}

void leave(Fibre& fibre, [[maybe_unused]] bool for_ever) {
#ifdef CAMK_SIM_ASAN
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fibre.fake_stack, scheduler_bottom, scheduler_bytes);
#endif
#ifdef CAMK_SIM_USE_UCONTEXT
  swapcontext(&fibre.context, &scheduler.context);
#else
  switch_stack(&fibre.stack_pointer, scheduler.stack_pointer);
#endif
#ifdef CAMK_SIM_ASAN
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &scheduler_bottom, &scheduler_bytes);
#endif
}

}  // namespace camk::sim
