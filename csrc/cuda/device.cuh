// What the hand-written kernels share: element types, 16-byte loads, launches, and the walk over ragged groups.
//
// Kernels are written so that a C++ compiler can run them too: OMNI_EMULATE_CUDA replaces the CUDA headers by
// tests/ops/cuda_emulation/emulate.h, which executes the same source thread by thread on the CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(OMNI_EMULATE_CUDA)
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define OMNI_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define OMNI_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include "../kernels_cuda.h"

namespace omni::cuda {

inline void check_launch(const char* op) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- elements --------------------------------------------------------------------------------------------------------

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A, class T>
__device__ inline A load_as(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<A>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return static_cast<A>(__half2float(value));
  } else {
    return static_cast<A>(value);
  }
}

template <class T, class A>
__device__ inline T store_as(A value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// `n` neighbours, moved in transactions of at most 16 bytes.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T value[n];
};

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Calls f with a value of the element type of `dtype`.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::F32: return f(float{});
    case DType::BF16: return f(__nv_bfloat16{});
    case DType::F16: return f(__half{});
    case DType::F64: return f(double{});
  }
}

// ---- warps and blocks ------------------------------------------------------------------------------------------------

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <class A>
__device__ inline A warp_sum(A value) {  // the same in every lane
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <class A>
__device__ inline A warp_max(A value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace omni::cuda
