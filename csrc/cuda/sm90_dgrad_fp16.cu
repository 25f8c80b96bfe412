// grouped_gemm on sm_90a: dx = dy w^T, fp16.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

void dgrad_fp16(const Problem& problem) { run_by_rows<Kind::Dgrad, cutlass::half_t>(problem); }

}  // namespace omni::cuda::sm90
