// Counter-based uniform draws: the hash of megatron_omni/ops/counter_rng.py, bit for bit, one pass over the result.
#include <algorithm>

#include "cpu/counter_rng.h"
#include "kernels.h"

namespace omni::cpu {
namespace {

uint64_t mix64(uint64_t x) {  // splitmix64 finaliser
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

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
      float* row = out + t * num_draws;
      if (!with_vectors([&](auto isa) { LightKernels<decltype(isa)>::fill_draws(low, high, num_draws, row); }))
        fill_row<void>(low, high, num_draws, row);
    }
  });
}

}  // namespace omni::cpu
