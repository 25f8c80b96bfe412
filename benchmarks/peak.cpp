// What a core's multipliers can do: independent FMAs (fp32) and vdpbf16ps (bf16) on registers alone, as many chains as
// hide their latency. Prints "fp32 bf16" in GFLOP/s, summed over the threads; 0 where the instruction is missing. The
// clock is that of measure.py: thread CPU time on one thread, wall time on several.
//
//     c++ -O2 -pthread benchmarks/peak.cpp -o peak && ./peak 1
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr long kSteps = 6000000;
constexpr int kChains = 12, kLanes = 16;

// Twelve chains of one instruction; the registers are named because a compiler may reorder or drop arrays of them.
#define CHAINS(instruction)                                                                                  \
  for (long i = 0; i < kSteps; ++i)                                                                          \
    __asm__ volatile(instruction " %%zmm30, %%zmm31, %%zmm0\n\t" instruction " %%zmm30, %%zmm31, %%zmm1\n\t"   \
                     instruction " %%zmm30, %%zmm31, %%zmm2\n\t" instruction " %%zmm30, %%zmm31, %%zmm3\n\t"   \
                     instruction " %%zmm30, %%zmm31, %%zmm4\n\t" instruction " %%zmm30, %%zmm31, %%zmm5\n\t"   \
                     instruction " %%zmm30, %%zmm31, %%zmm6\n\t" instruction " %%zmm30, %%zmm31, %%zmm7\n\t"   \
                     instruction " %%zmm30, %%zmm31, %%zmm8\n\t" instruction " %%zmm30, %%zmm31, %%zmm9\n\t"   \
                     instruction " %%zmm30, %%zmm31, %%zmm10\n\t" instruction " %%zmm30, %%zmm31, %%zmm11\n\t" \
                     ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")

__attribute__((target("avx512f"))) void clear() {
  __asm__ volatile(
      "vpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31\n\t"
      "vpxord %%zmm0, %%zmm0, %%zmm0\n\tvpxord %%zmm1, %%zmm1, %%zmm1\n\tvpxord %%zmm2, %%zmm2, %%zmm2\n\t"
      "vpxord %%zmm3, %%zmm3, %%zmm3\n\tvpxord %%zmm4, %%zmm4, %%zmm4\n\tvpxord %%zmm5, %%zmm5, %%zmm5\n\t"
      "vpxord %%zmm6, %%zmm6, %%zmm6\n\tvpxord %%zmm7, %%zmm7, %%zmm7\n\tvpxord %%zmm8, %%zmm8, %%zmm8\n\t"
      "vpxord %%zmm9, %%zmm9, %%zmm9\n\tvpxord %%zmm10, %%zmm10, %%zmm10\n\tvpxord %%zmm11, %%zmm11, %%zmm11" ::
          : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
}

void fma() { clear(); CHAINS("vfmadd231ps"); }
void dot() { clear(); CHAINS("vdpbf16ps"); }

double now(int threads) {
  timespec time;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double gflops(void (*loop)(), int threads, double flops) {
  double best = 0;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const double start = now(threads);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(loop);
    loop();
    for (auto& other : others) other.join();
    const double rate = threads * flops * kChains * kLanes * kSteps / (now(threads) - start) * 1e-9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  const bool vectors = __builtin_cpu_supports("avx512f"), pairs = vectors && __builtin_cpu_supports("avx512bf16");
  std::printf("%.1f %.1f\n", vectors ? gflops(fma, threads, 2) : 0.0, pairs ? gflops(dot, threads, 4) : 0.0);
}
