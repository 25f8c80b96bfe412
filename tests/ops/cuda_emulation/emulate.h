// Runs CUDA kernels on the CPU, one thread at a time: what csrc/cuda/device.cuh includes under OMNI_EMULATE_CUDA.
//
// Every CUDA thread of a block is a fiber that runs until it reaches a barrier; the order of the fibers is drawn anew every
// round, so a missing barrier shows as a wrong result. Where CUDA leaves a choice, the harsher one is taken:
//   shared memory starts as NaN, and lies between guard bytes that are checked after every block
//   an asynchronous copy happens as late as the wait for it allows
//   a fragment (WMMA) is read and written by its warp's first thread, without any implied barrier
//   a barrier that not all threads of the block or warp reach is an error
// What this cannot show: speed, memory ordering finer than barriers, and what the compiler makes of the code.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- the runtime -----------------------------------------------------------------------------------------------------
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 8, cudaSuccess; }
template <class F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}

// ---- 16-bit elements -------------------------------------------------------------------------------------------------
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

// ---- threads ---------------------------------------------------------------------------------------------------------
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Copy {
  void* target;
  const void* source;
  size_t bytes, zeros;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<Copy> pending;               // issued, not committed
  std::vector<std::vector<Copy>> batches;  // committed, not waited for
};

struct Warp {
  Barrier barrier;
  unsigned char exchange[32][16];
};

inline constexpr size_t kStack = 256 * 1024, kGuard = 256;
inline constexpr unsigned char kFill = 0xff;  // NaN in every float type

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline int current;
inline bool progress, trapped;
inline std::function<void()> body;
inline unsigned char* shared;
inline std::mt19937 order_of_threads(1);

inline void wait(Barrier& barrier, int count) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
    return;
  }
  while (barrier.generation == generation) swapcontext(&threads[current].context, &scheduler);
}

inline Warp& warp() { return warps[current / 32]; }
inline void wait_warp() { wait(warp().barrier, 32); }

inline void entry() {
  body();
  threads[current].done = true;
  progress = true;
  swapcontext(&threads[current].context, &scheduler);
}

inline void run_block(int num_threads) {
  threads.resize(num_threads);
  warps.assign(num_threads / 32, Warp{});
  block_barrier = Barrier{};
  std::vector<int> order(num_threads);
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.done = false;
    thread.pending.clear();
    thread.batches.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, entry, 0);
    order[i] = i;
  }
  for (int alive = num_threads; alive > 0;) {
    progress = false;
    std::shuffle(order.begin(), order.end(), order_of_threads);
    alive = 0;
    for (const int i : order) {
      if (threads[i].done) continue;
      current = i;
      threadIdx = dim3(i);
      swapcontext(&scheduler, &threads[i].context);
      alive += !threads[i].done;
    }
    if (alive > 0 && !progress) throw std::runtime_error("a barrier that not every thread reaches");
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  if (block.x % 32 != 0 || block.x > 1024 || block.y != 1 || block.z != 1) throw std::runtime_error("block size");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535) throw std::runtime_error("grid size");
  body = [=] { kernel(args...); };
  gridDim = grid;
  blockDim = block;
  const size_t padded = (shared_bytes + 127) / 128 * 128;
  auto* memory = static_cast<unsigned char*>(std::aligned_alloc(128, padded + 2 * kGuard));
  const std::unique_ptr<unsigned char, void (*)(void*)> owner(memory, std::free);
  shared = memory + kGuard;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(memory, kFill, padded + 2 * kGuard);
        blockIdx = dim3(x, y, z);
        trapped = false;
        run_block(static_cast<int>(block.x));
        if (trapped) throw std::runtime_error("the device stopped");
        for (size_t i = 0; i < padded + 2 * kGuard; ++i) {
          const bool is_guard = i < kGuard || i >= kGuard + shared_bytes;
          if (is_guard && memory[i] != kFill) throw std::runtime_error("write outside of shared memory");
        }
      }
    }
  }
}

}  // namespace emulate

// The thread goes no further; its block ends, unless others wait for it at a barrier.
inline void __trap() {
  emulate::trapped = emulate::progress = true;
  emulate::threads[emulate::current].done = true;
  swapcontext(&emulate::threads[emulate::current].context, &emulate::scheduler);
}

#define OMNI_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emulate::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))
#define OMNI_DYNAMIC_SHARED(name) unsigned char* const name = emulate::shared

inline void __syncthreads() { emulate::wait(emulate::block_barrier, static_cast<int>(blockDim.x)); }
inline void __syncwarp() { emulate::wait_warp(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = emulate::current % 32;
  std::memcpy(emulate::warp().exchange[lane], &value, sizeof(T));
  emulate::wait_warp();
  std::memcpy(&value, emulate::warp().exchange[lane ^ mask], sizeof(T));
  emulate::wait_warp();
  return value;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned votes = 0;
  const int lane = emulate::current % 32;
  emulate::warp().exchange[lane][0] = value;
  emulate::wait_warp();
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(emulate::warp().exchange[i][0] != 0) << i;
  emulate::wait_warp();
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// ---- asynchronous copies ---------------------------------------------------------------------------------------------
inline void __pipeline_memcpy_async(void* target, const void* source, size_t bytes, size_t zeros = 0) {
  if (reinterpret_cast<uintptr_t>(target) % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0) std::abort();
  emulate::threads[emulate::current].pending.push_back({target, source, bytes, zeros});
}
inline void __pipeline_commit() {
  auto& thread = emulate::threads[emulate::current];
  thread.batches.push_back(std::move(thread.pending));
  thread.pending.clear();
}
inline void __pipeline_wait_prior(size_t left) {
  auto& batches = emulate::threads[emulate::current].batches;
  while (batches.size() > left) {
    for (const auto& copy : batches.front()) {
      std::memcpy(copy.target, copy.source, copy.bytes - copy.zeros);
      std::memset(static_cast<char*>(copy.target) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
    batches.erase(batches.begin());
  }
}

// ---- WMMA ------------------------------------------------------------------------------------------------------------
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int m, int n, int k, class T, class Major = void>
struct fragment {
  T x[16 * 16];  // row after row
};

inline bool is_first_lane() { return emulate::current % 32 == 0; }

inline void check_pointer(const void* pointer, unsigned ld, unsigned ld_multiple) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32 != 0 || ld % ld_multiple != 0) std::abort();
}

template <class Use, int m, int n, int k, class T, class Major>
void fill_fragment(fragment<Use, m, n, k, T, Major>& f, T value) {
  for (T& x : f.x) x = value;
}

template <class Use, int m, int n, int k, class T, class Major>
void load_matrix_sync(fragment<Use, m, n, k, T, Major>& f, const T* pointer, unsigned ld) {
  if (!is_first_lane()) return;
  check_pointer(pointer, ld, 8);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      f.x[row * 16 + column] = std::is_same_v<Major, row_major> ? pointer[row * ld + column] : pointer[column * ld + row];
    }
  }
}

inline float as_float(__half x) { return __half2float(x); }
inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <int m, int n, int k, class T, class MajorA, class MajorB>
void mma_sync(fragment<accumulator, m, n, k, float>& d, const fragment<matrix_a, m, n, k, T, MajorA>& a,
              const fragment<matrix_b, m, n, k, T, MajorB>& b, const fragment<accumulator, m, n, k, float>& c) {
  if (!is_first_lane()) return;
  float wide_b[16 * 16];
  for (int i = 0; i < 256; ++i) wide_b[i] = as_float(b.x[i]);
  for (int row = 0; row < 16; ++row) {
    float sum[16];
    for (int column = 0; column < 16; ++column) sum[column] = c.x[row * 16 + column];
    for (int i = 0; i < 16; ++i) {
      const float left = as_float(a.x[row * 16 + i]);
      for (int column = 0; column < 16; ++column) sum[column] += left * wide_b[i * 16 + column];
    }
    for (int column = 0; column < 16; ++column) d.x[row * 16 + column] = sum[column];
  }
}

template <int m, int n, int k>
void store_matrix_sync(float* pointer, const fragment<accumulator, m, n, k, float>& f, unsigned ld, layout_t) {
  if (!is_first_lane()) return;
  check_pointer(pointer, ld, 4);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) pointer[row * ld + column] = f.x[row * 16 + column];
  }
}

}  // namespace nvcuda::wmma

namespace omni::cuda {
using std::exp;
}
