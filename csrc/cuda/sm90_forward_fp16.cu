// grouped_gemm on sm_90a: y = x w, fp16.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

void forward_fp16(const Problem& problem) { run_by_rows<Kind::Forward, cutlass::half_t>(problem); }

}  // namespace omni::cuda::sm90
