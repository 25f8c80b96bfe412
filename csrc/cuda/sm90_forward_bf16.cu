// grouped_gemm on sm_90a: y = x w, bf16.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

void forward_bf16(const Problem& problem) { run_by_rows<Kind::Forward, cutlass::bfloat16_t>(problem); }

// Ten arrays of E entries of at most 16 bytes, each rounded up to 256, and five tensor maps of 128 bytes an SM; Hopper
// has at most 144 SMs. Twice that is asked for, and `run` compares the exact need with what it was given.
size_t workspace_bytes(int64_t experts) { return 2 * (10 * (16 * static_cast<size_t>(experts) + 256) + 144 * 5 * 128 + 4096); }

}  // namespace omni::cuda::sm90
