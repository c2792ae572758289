// SPDX-License-Identifier: MIT
#include "faults.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

#include "scheduler.h"

namespace camk::sim {
namespace {

#if defined(__x86_64__) && defined(__linux__) && !defined(CAMK_SIM_ASAN)
#define CAMK_SIM_CATCHES_SIGNALS 1
constexpr bool catches_signals = true;
#else
constexpr bool catches_signals = false;  // AddressSanitizer reports better; other machines keep the default action
#endif

alignas(64) char handler_stack[64 << 10];
void* fault_address = nullptr;
void* fault_instruction = nullptr;  // until place_of_fault() has been asked

[[noreturn]] void abandon_thread(const std::string& sentence) {
  if (state.error.empty()) {
    char where[160];
    const uint3 b = state.block_index, t = self().index;
    std::snprintf(where, sizeof where, " [block (%u,%u,%u), thread (%u,%u,%u)]", b.x, b.y, b.z, t.x, t.y, t.z);
    state.error = sentence + where;
  }
  self().status = Status::done;
  leave(self().fibre, true);
  __builtin_abort();
}

#ifdef CAMK_SIM_CATCHES_SIGNALS
[[noreturn]] void after_fault() {
  char address[64];
  std::snprintf(address, sizeof address, "illegal address %p, or stack overflow", fault_address);
  abandon_thread(address);
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!in_kernel()) {  // not ours: let it happen again with the default action
    std::signal(signal, SIG_DFL);
    return;
  }
  fault_address = info->si_addr;
  // Continue in after_fault() on the upper end of the fibre's stack: the thread is lost, its frames do not
  // matter, and a stack overflow leaves no other room. The 8 bytes are the return address a call would have
  // pushed.
  auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
  fault_instruction = reinterpret_cast<void*>(machine->gregs[REG_RIP]);
  machine->gregs[REG_RSP] = reinterpret_cast<greg_t>(self().fibre.stack + kStackBytes - 64 - 8);
  machine->gregs[REG_RIP] = reinterpret_cast<greg_t>(&after_fault);
}
#endif

}  // namespace

std::string place_of_fault() {
  Dl_info module{};
  const char* instruction = static_cast<const char*>(std::exchange(fault_instruction, nullptr));
  if (!instruction || !dladdr(instruction, &module) || !module.dli_fname) return "";
  char command[600], line[400] = "";
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", module.dli_fname,
                static_cast<std::size_t>(instruction - static_cast<const char*>(module.dli_fbase)));
  if (FILE* output = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, output)) line[0] = 0;
    pclose(output);
  }
  std::string place(line);
  place = place.substr(0, place.find_first_of(" \n"));  // without a discriminator
  return place.empty() || place[0] == '?' ? "" : place + ": ";
}

FaultGuard::FaultGuard() {
#ifdef CAMK_SIM_CATCHES_SIGNALS
  stack_t own{};
  own.ss_sp = handler_stack;
  own.ss_size = sizeof handler_stack;
  sigaltstack(&own, &old_stack_);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv_);
  sigaction(SIGBUS, &action, &old_bus_);
#endif
}

FaultGuard::~FaultGuard() {
  if (!catches_signals) return;
  sigaction(SIGSEGV, &old_segv_, nullptr);
  sigaction(SIGBUS, &old_bus_, nullptr);
  sigaltstack(&old_stack_, nullptr);
}

namespace {

// The compiler's records of undefined behaviour all begin with the place in the source.
struct Place {
  const char* file;
  std::uint32_t line, column;
};
struct TypeName {
  std::uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  Place place;
  const TypeName* type;
  unsigned char log_alignment, kind;
};

void report(const void* record, const std::string& what) {
  const Place& place = *static_cast<const Place*>(record);
  const std::string sentence =
      std::string(place.file ? place.file : "?") + ":" + std::to_string(place.line) + ": " + what;
  if (!in_kernel()) throw Error(sentence);
  abandon_thread(sentence);
}

}  // namespace
}  // namespace camk::sim

// Kernels are compiled with -fsanitize=alignment,bounds,... but without its run-time library: these are the
// calls the compiler inserts, so undefined behaviour becomes an Error with file and line. A device would do
// something else than this processor in each of these cases.
extern "C" {
#define CAMK_SIM_HANDLER __attribute__((visibility("hidden"))) void
using camk::sim::report;

CAMK_SIM_HANDLER __ubsan_handle_type_mismatch_v1(const camk::sim::Mismatch* record, std::uintptr_t address) {
  if (!address) return report(record, std::string("null pointer to ") + record->type->name);
  const unsigned alignment = 1u << record->log_alignment;
  report(record, std::string("misaligned address of ") + record->type->name + ", " + std::to_string(alignment) +
                     " bytes must divide it");
}
CAMK_SIM_HANDLER __ubsan_handle_out_of_bounds(const void* record, std::uintptr_t index) {
  report(record, "array index " + std::to_string(static_cast<std::intptr_t>(index)) + " out of bounds");
}
CAMK_SIM_HANDLER __ubsan_handle_float_cast_overflow(const void* record, std::uintptr_t) {
  report(record,
         "floating-point value outside the range of the integer type (a device clamps, this processor does "
         "not)");
}
CAMK_SIM_HANDLER __ubsan_handle_shift_out_of_bounds(const void* record, std::uintptr_t, std::uintptr_t) {
  report(record, "shift by a negative or too large distance");
}
CAMK_SIM_HANDLER __ubsan_handle_divrem_overflow(const void* record, std::uintptr_t, std::uintptr_t) {
  report(record, "integer division by zero or overflow");
}
CAMK_SIM_HANDLER __ubsan_handle_add_overflow(const void* record, std::uintptr_t, std::uintptr_t) {
  report(record, "signed integer overflow in an addition");
}
CAMK_SIM_HANDLER __ubsan_handle_sub_overflow(const void* record, std::uintptr_t, std::uintptr_t) {
  report(record, "signed integer overflow in a subtraction");
}
CAMK_SIM_HANDLER __ubsan_handle_mul_overflow(const void* record, std::uintptr_t, std::uintptr_t) {
  report(record, "signed integer overflow in a multiplication");
}
CAMK_SIM_HANDLER __ubsan_handle_negate_overflow(const void* record, std::uintptr_t) {
  report(record, "signed integer overflow in a negation");
}
CAMK_SIM_HANDLER __ubsan_handle_builtin_unreachable(const void* record) { report(record, "unreachable code reached"); }
}
