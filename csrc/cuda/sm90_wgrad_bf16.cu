// grouped_gemm on sm_90a: dw[e] = x_e^T dy_e from bf16 rows into bf16, or into fp32 (main_grad), overwriting or adding.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

void wgrad_bf16(const Problem& problem, bool into_fp32) { run_wgrad<cutlass::bfloat16_t>(problem, into_fp32); }

}  // namespace omni::cuda::sm90
