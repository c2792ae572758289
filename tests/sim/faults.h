// SPDX-License-Identifier: MIT
// Faults a kernel commits in plain C++ (wild addresses, undefined behaviour), turned into sentences.
#pragma once

#include <csignal>
#include <string>

namespace camk::sim {

// While it lives, an illegal address used by a kernel ends the launch with an Error instead of the process.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  struct sigaction old_segv_, old_bus_;
  stack_t old_stack_;
};

// "file:line: " of the instruction that used an illegal address in the last launch, or "". Runs addr2line.
std::string place_of_fault();

}  // namespace camk::sim
