// Where a microkernel puts its tile: the interface between gemm_blocked.h and its engines.
#pragma once

#include <cstdint>

namespace omni::cpu {

template <class Acc>
struct Tile {
  const Acc* init;  // added to the products; null: zero
  int64_t ld_init;
  void* out;  // Acc, or the engine's element type if `narrow`
  int64_t ld_out;
  int64_t cols;
  bool narrow;
  bool stream;            // store past the caches: whole aligned vectors only
  const void* prefetch;   // memory to fetch meanwhile, 128 bytes a unit; any address does where there is none
  int64_t prefetch_step;  // bytes
};

}  // namespace omni::cpu
