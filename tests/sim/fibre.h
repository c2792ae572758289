// SPDX-License-Identifier: MIT
// A fibre: its own stack, and a switch to and from the scheduler that costs a few nanoseconds.
//
// x86-64 saves the six registers the calling convention preserves; elsewhere, or with CAMK_SIM_UCONTEXT, the
// C library's ucontext does the same two to three times slower. AddressSanitizer is told of every switch,
// because it would take a foreign stack for a wild pointer.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define CAMK_SIM_ASAN 1
#endif
#if !defined(__x86_64__) || defined(CAMK_SIM_UCONTEXT)
#define CAMK_SIM_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace camk::sim {

constexpr std::size_t kStackBytes = 256 << 10;

struct Fibre {
  char* stack = nullptr;
#ifdef CAMK_SIM_USE_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
#ifdef CAMK_SIM_ASAN
  void* fake_stack = nullptr;
#endif
};

char* new_stack();                                // kStackBytes with a guard page at the low end
void prepare(Fibre& fibre, void (*entry)());      // the next enter() starts `entry` on fibre.stack
void enter(Fibre& fibre);                         // from the scheduler into the fibre
void arrived();                                   // first statement of every `entry`
void leave(Fibre& fibre, bool for_ever = false);  // from the fibre back to the scheduler

}  // namespace camk::sim
