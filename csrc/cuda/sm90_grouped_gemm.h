// The Hopper path of grouped_gemm: plain C++ face of the CUTLASS kernels, so that only the sm90_*.cu files see CUTLASS.
//
// One run is E independent products D[e] = A[e] B[e], whose sizes, pointers and strides a one-block device kernel writes
// from `offsets`. Three kinds (x [rows, K], w [E, K, N], y [rows, N]; r_e rows of expert e):
//   Forward  D = y  [r_e, N]   A = x  [r_e, K]        B = w[e]    [K, N]       reduces over K
//   Dgrad    D = dx [r_e, K]   A = dy [r_e, N]        B = w[e]^T  [N, K]       reduces over N
//   Wgrad    D = dw [K, N]     A = x^T [K, r_e]       B = dy      [r_e, N]     reduces over r_e
// An expert without rows becomes a problem of no rows: no tile, nothing read, nothing written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace omni::cuda::sm90 {

struct Problem {
  const void* a;           // x or dy
  const void* b;           // w or dy
  void* d;                 // y, dx or dw
  const int64_t* offsets;  // [E + 1], device
  int64_t experts, k, n;   // K and N of w
  bool large;              // 128 x 256 tiles, else 64 x 256, for few rows an expert; wgrad has one size
  float beta;              // 1 adds to dw, 0 overwrites
  void* workspace;         // device, 256-byte aligned
  size_t workspace_bytes;
  void* stream;
};

// An upper bound for every kernel below on any Hopper device.
size_t workspace_bytes(int64_t experts);

// Each throws std::runtime_error when CUTLASS refuses or the launch fails. K and N must be multiples of 8 and every
// pointer 16-byte aligned. Elements are bf16 or fp16; dw may be fp32 (main_grad).
void forward_bf16(const Problem& problem);
void forward_fp16(const Problem& problem);
void dgrad_bf16(const Problem& problem);
void dgrad_fp16(const Problem& problem);
void wgrad_bf16(const Problem& problem, bool into_fp32);
void wgrad_fp16(const Problem& problem, bool into_fp32);

}  // namespace omni::cuda::sm90
