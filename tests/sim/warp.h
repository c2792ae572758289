// SPDX-License-Identifier: MIT
// Barriers, shuffles and votes under CUDA's own names.
#pragma once

#include <cstdint>

#include "scheduler.h"

namespace camk::sim {

template <class V>
struct ShuffleLane {
  V value, result;
  unsigned source;
  bool missing;
};

template <class V>
V shuffle(std::uint32_t mask, const V& value, unsigned source, const char* name, const Where& where) {
  ShuffleLane<V> mine{value, value, source, false};
  const Combine combine = [](void* const* lanes, std::uint32_t present) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(present >> lane & 1)) continue;
      auto& reader = *static_cast<ShuffleLane<V>*>(lanes[lane]);
      reader.missing = !(present >> reader.source & 1);
      if (!reader.missing) reader.result = static_cast<const ShuffleLane<V>*>(lanes[reader.source])->value;
    }
  };
  meet(mask, &mine, name, combine, where);
  if (mine.missing)
    fail(std::string(name) + " reads lane " + std::to_string(source) + ", which is not in the mask or has returned",
         where);
  return mine.result;
}

struct BallotLane {
  bool vote;
  std::uint32_t votes, voters;
};

inline BallotLane ballot(std::uint32_t mask, bool vote, const char* name, const Where& where) {
  BallotLane mine{vote, 0, 0};
  const Combine combine = [](void* const* lanes, std::uint32_t present) {
    std::uint32_t votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (present >> lane & 1 && static_cast<const BallotLane*>(lanes[lane])->vote) votes |= 1u << lane;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(present >> lane & 1)) continue;
      static_cast<BallotLane*>(lanes[lane])->votes = votes;
      static_cast<BallotLane*>(lanes[lane])->voters = present;
    }
  };
  meet(mask, &mine, name, combine, where);
  return mine;
}

template <class V>
struct MatchLane {
  V value;
  std::uint32_t equal;
};

}  // namespace camk::sim

#define CAMK_SIM_HERE const ::camk::sim::Where& where = ::camk::sim::Where::current()

inline void __syncthreads(CAMK_SIM_HERE) { camk::sim::block_barrier("__syncthreads", 0, where); }
inline int __syncthreads_count(int vote, CAMK_SIM_HERE) {
  camk::sim::block_barrier("__syncthreads_count", vote, where);
  return camk::sim::state.barrier_count;
}
inline int __syncthreads_and(int vote, CAMK_SIM_HERE) {
  camk::sim::block_barrier("__syncthreads_and", vote, where);
  return camk::sim::state.barrier_and;
}
inline int __syncthreads_or(int vote, CAMK_SIM_HERE) {
  camk::sim::block_barrier("__syncthreads_or", vote, where);
  return camk::sim::state.barrier_or;
}
inline void __syncwarp(unsigned mask = ~0u, CAMK_SIM_HERE) {
  camk::sim::meet(mask, nullptr, "__syncwarp", [](void* const*, std::uint32_t) {}, where);
}

template <class V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32, CAMK_SIM_HERE) {
  const unsigned segment = camk::sim::self().lane & ~static_cast<unsigned>(width - 1);
  const unsigned from = segment | (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1));
  return camk::sim::shuffle(mask, value, from, "__shfl_sync", where);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int flip, int width = 32, CAMK_SIM_HERE) {
  const unsigned lane = camk::sim::self().lane, other = lane ^ static_cast<unsigned>(flip);
  const unsigned segment = ~static_cast<unsigned>(width - 1);
  const unsigned from = (other & segment) > (lane & segment) ? lane : other & 31;
  return camk::sim::shuffle(mask, value, from, "__shfl_xor_sync", where);
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned delta, int width = 32, CAMK_SIM_HERE) {
  const unsigned lane = camk::sim::self().lane, within = lane & static_cast<unsigned>(width - 1);
  const unsigned from = within + delta < static_cast<unsigned>(width) ? lane + delta : lane;
  return camk::sim::shuffle(mask, value, from, "__shfl_down_sync", where);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned delta, int width = 32, CAMK_SIM_HERE) {
  const unsigned lane = camk::sim::self().lane, within = lane & static_cast<unsigned>(width - 1);
  return camk::sim::shuffle(mask, value, within >= delta ? lane - delta : lane, "__shfl_up_sync", where);
}

inline unsigned __ballot_sync(unsigned mask, int vote, CAMK_SIM_HERE) {
  return camk::sim::ballot(mask, vote != 0, "__ballot_sync", where).votes;
}
inline int __any_sync(unsigned mask, int vote, CAMK_SIM_HERE) {
  return camk::sim::ballot(mask, vote != 0, "__any_sync", where).votes != 0;
}
inline int __all_sync(unsigned mask, int vote, CAMK_SIM_HERE) {
  const auto all = camk::sim::ballot(mask, vote != 0, "__all_sync", where);
  return all.votes == all.voters;
}
template <class V>
unsigned __match_any_sync(unsigned mask, V value, CAMK_SIM_HERE) {
  using Lane = camk::sim::MatchLane<V>;
  Lane mine{value, 0};
  const camk::sim::Combine combine = [](void* const* lanes, std::uint32_t present) {
    for (unsigned a = 0; a < 32; ++a)
      for (unsigned b = 0; b < 32; ++b)
        if (present >> a & present >> b & 1 &&
            std::memcmp(&static_cast<Lane*>(lanes[a])->value, &static_cast<Lane*>(lanes[b])->value, sizeof(V)) == 0)
          static_cast<Lane*>(lanes[a])->equal |= 1u << b;
  };
  camk::sim::meet(mask, &mine, "__match_any_sync", combine, where);
  return mine.equal;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, CAMK_SIM_HERE) {
  struct Lane {
    unsigned value, total;
  } mine{value, 0};
  const camk::sim::Combine combine = [](void* const* lanes, std::uint32_t present) {
    unsigned total = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (present >> lane & 1) total += static_cast<Lane*>(lanes[lane])->value;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (present >> lane & 1) static_cast<Lane*>(lanes[lane])->total = total;
  };
  camk::sim::meet(mask, &mine, "__reduce_add_sync", combine, where);
  return mine.total;
}
