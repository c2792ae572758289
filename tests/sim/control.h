// SPDX-License-Identifier: MIT
// For C entry points of a simulated library: exceptions must not pass through ctypes.
#pragma once

#include <type_traits>

namespace camk::sim {

int guard(void (*action)(void*), void* argument);

// 0, or 1 with the sentence kept for camk_sim_last_error().
template <class Action>
int guarded(Action&& action) {
  return guard([](void* f) { (*static_cast<std::remove_reference_t<Action>*>(f))(); }, &action);
}

}  // namespace camk::sim
