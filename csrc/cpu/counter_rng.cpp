// Counter-based uniform draws: the hash of megatron_omni/ops/counter_rng.py, bit for bit, one pass over the result.
#include <algorithm>

#include "cpu/isa.h"
#include "kernels.h"

namespace omni::cpu {
namespace {

uint64_t mix64(uint64_t x) {  // splitmix64 finaliser
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Draws of one key; the loop is left to the compiler, which has a vector form of every step.
#define OMNI_FILL_ROW(low, high, n, out)                                            \
  for (int64_t i = 0; i < n; ++i) {                                                 \
    uint32_t x = low + static_cast<uint32_t>(i) * 0x9E3779B9u;                      \
    x = (x ^ (x >> 16)) * 0x7FEB352Du ^ high;                                       \
    x = (x ^ (x >> 15)) * 0x846CA68Bu;                                              \
    x ^= x >> 16;                                                                   \
    const float m = static_cast<float>(static_cast<int32_t>(x) >> 9); /* 23 bits */ \
    out[i] = m * 0x1p-23f + (0.5f + 0x1p-24f);                                      \
  }

void fill_row(uint32_t low, uint32_t high, int64_t n, float* out) { OMNI_FILL_ROW(low, high, n, out) }

#if OMNI_X86
OMNI_AVX512 void fill_row_avx512(uint32_t low, uint32_t high, int64_t n, float* out) {
  OMNI_FILL_ROW(low, high, n, out)
}
#endif

}  // namespace

void counter_uniform(const int64_t* sample_ids, const int64_t* positions, int64_t T, int64_t num_draws, uint64_t call,
                     float* out, const Parallel& parallel) {
  constexpr int64_t kDrawsPerTask = 1 << 16;
  const int64_t tasks = std::clamp<int64_t>(T * num_draws / kDrawsPerTask, 1, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    for (int64_t t = T * task / tasks; t < T * (task + 1) / tasks; ++t) {
      const uint64_t sample = mix64(static_cast<uint64_t>(sample_ids[t]) + call);
      const uint64_t key = mix64(sample + static_cast<uint64_t>(positions[t]) * 0x9E3779B97F4A7C15u);
      const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
#if OMNI_X86
      if (has_avx512()) {
        fill_row_avx512(low, high, num_draws, out + t * num_draws);
        continue;
      }
#endif
      fill_row(low, high, num_draws, out + t * num_draws);
    }
  });
}

}  // namespace omni::cpu
