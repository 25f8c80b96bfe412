// The draws of one key, compiled for every engine: the loop is left to the compiler, which has a vector form of each step.
#pragma once

#include "cpu/light_kernels.h"

namespace omni::cpu {

template <class Isa>
OMNI_TARGET inline void fill_row(uint32_t low, uint32_t high, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t x = low + static_cast<uint32_t>(i) * 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du ^ high;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    const float m = static_cast<float>(static_cast<int32_t>(x) >> 9);  // 23 bits
    out[i] = m * 0x1p-23f + (0.5f + 0x1p-24f);
  }
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::fill_draws(uint32_t low, uint32_t high, int64_t n, float* out) {
  fill_row<Isa>(low, high, n, out);
}

}  // namespace omni::cpu
