// Counter-based uniform draws: the hash of megatron_omni/ops/counter_rng.py, a thread a draw, bit for bit as on the CPU.
#include "device.cuh"

namespace omni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;

__device__ inline uint64_t mix64(uint64_t x) {  // splitmix64 finaliser
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

__global__ void __launch_bounds__(kThreads)
counter_uniform_kernel(const int64_t* sample_ids, const int64_t* positions, int64_t T, int64_t num_draws,
                       uint64_t call, float* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < T * num_draws; i += step) {
    const int64_t t = i / num_draws;
    const uint64_t sample = mix64(static_cast<uint64_t>(sample_ids[t]) + call);
    const uint64_t key = mix64(sample + static_cast<uint64_t>(positions[t]) * 0x9E3779B97F4A7C15u);
    uint32_t x = static_cast<uint32_t>(key) + static_cast<uint32_t>(i % num_draws) * 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x ^= static_cast<uint32_t>(key >> 32);
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    // 23 signed bits: every product and sum below is exact
    out[i] = static_cast<float>(static_cast<int32_t>(x) >> 9) * 0x1p-23f + (0.5f + 0x1p-24f);
  }
}

}  // namespace

void counter_uniform(const int64_t* sample_ids, const int64_t* positions, int64_t T, int64_t num_draws, uint64_t call,
                     float* out, void* stream) {
  if (T == 0 || num_draws == 0) return;
  const int64_t blocks = div_up(T * num_draws, kThreads);
  OMNI_LAUNCH(counter_uniform_kernel, static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream,
              sample_ids, positions, T, num_draws, call, out);
  check_launch("counter_uniform");
}

}  // namespace omni::cuda
