// What a core's multipliers can do on registers alone, with as many independent chains as hide their latency: fp32 by FMA,
// bf16 by vdpbf16ps, or by the fp32 FMA where values are widened. Prints "fp32 bf16" in GFLOP/s, summed over the threads;
// zeros where the engine's instructions are missing. The clock is that of measure.py: thread CPU time on one thread, wall
// time on several. ENGINE: avx512 or avx2.
//
//     c++ -O2 -pthread benchmarks/peak.cpp -o peak && ./peak THREADS ENGINE
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr long kSteps = 6000000;
constexpr int kChains = 12;

// Twelve chains of one instruction; the registers are named because a compiler may reorder or drop arrays of them.
#define STEP(instruction, r, a, b, to) instruction " %%" r a ", %%" r b ", %%" r to "\n\t"
#define CHAINS(instruction, r, a, b)                                                                             \
  for (long i = 0; i < kSteps; ++i)                                                                              \
    __asm__ volatile(STEP(instruction, r, a, b, "0") STEP(instruction, r, a, b, "1") STEP(instruction, r, a, b, "2")   \
                     STEP(instruction, r, a, b, "3") STEP(instruction, r, a, b, "4") STEP(instruction, r, a, b, "5")   \
                     STEP(instruction, r, a, b, "6") STEP(instruction, r, a, b, "7") STEP(instruction, r, a, b, "8")   \
                     STEP(instruction, r, a, b, "9") STEP(instruction, r, a, b, "10") STEP(instruction, r, a, b, "11") \
                     ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",      \
                     "xmm11", "xmm12", "xmm13")

// All registers zero: no denormal, no infinity slows a product.
#define CLEAR __asm__ volatile("vzeroall" ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
                               "xmm9", "xmm10", "xmm11", "xmm12", "xmm13")

__attribute__((target("avx2,fma"))) void fma_avx2() { CLEAR; CHAINS("vfmadd231ps", "ymm", "12", "13"); }
__attribute__((target("avx512f"))) void fma_avx512() { CLEAR; CHAINS("vfmadd231ps", "zmm", "12", "13"); }
__attribute__((target("avx512f"))) void dot_avx512() { CLEAR; CHAINS("vdpbf16ps", "zmm", "12", "13"); }

double now(int threads) {
  timespec time;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// `flops` of one instruction
double gflops(void (*loop)(), int threads, double flops) {
  double best = 0;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const double start = now(threads);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(loop);
    loop();
    for (auto& other : others) other.join();
    const double rate = threads * flops * kChains * kSteps / (now(threads) - start) * 1e-9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: %s THREADS avx512|avx2\n", arguments[0]), 2;
  const int threads = std::atoi(arguments[1]);
  double fp32 = 0, bf16 = 0;
  if (std::strcmp(arguments[2], "avx512") == 0 && __builtin_cpu_supports("avx512f")) {
    fp32 = gflops(fma_avx512, threads, 2 * 16);
    bf16 = __builtin_cpu_supports("avx512bf16") ? gflops(dot_avx512, threads, 4 * 16) : fp32;
  } else if (std::strcmp(arguments[2], "avx2") == 0 && __builtin_cpu_supports("fma")) {
    bf16 = fp32 = gflops(fma_avx2, threads, 2 * 8);
  }
  std::printf("%.1f %.1f\n", fp32, bf16);
}
