// grouped_gemm on sm_90a: dx = dy w^T, bf16.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

void dgrad_bf16(const Problem& problem) { run_by_rows<Kind::Dgrad, cutlass::bfloat16_t>(problem); }

}  // namespace omni::cuda::sm90
