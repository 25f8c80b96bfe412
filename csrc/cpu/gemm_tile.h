// Where a microkernel puts its tile: the interface between gemm_blocked.h and its engines.
#pragma once

#include <cstdint>

namespace omni::cpu {

// Memory that a microkernel fetches while it computes: two addresses a unit, `gap` bytes apart, moving on by `step`. Any
// address does where there is nothing to fetch.
struct Fetch {
  const char* at;
  int64_t step, gap;
};

template <class Acc>
struct Tile {
  const Acc* init;  // added to the products; null: zero
  int64_t ld_init;
  void* out;  // Acc, or the engine's element type if `narrow`
  int64_t ld_out;
  int64_t cols;
  bool narrow;
  bool stream;            // store past the caches: whole aligned vectors only
  Acc* pack;              // where a microkernel that packs leaves B, [unit][kTile]
  Fetch fetch;
};

}  // namespace omni::cpu
