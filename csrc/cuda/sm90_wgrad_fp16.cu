// grouped_gemm on sm_90a: dw[e] = x_e^T dy_e from fp16 rows into fp16, or into fp32 (main_grad), overwriting or adding.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

void wgrad_fp16(const Problem& problem, bool into_fp32) { run_wgrad<cutlass::half_t>(problem, into_fp32); }

}  // namespace omni::cuda::sm90
