// grouped_gemm on sm_90a: dw[e] = x_e^T dy_e from bf16 rows into bf16, or into fp32 (main_grad), overwriting or adding.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;
using cutlass::bfloat16_t;

// Tiles lie in [K, N], so their shape does not depend on the rows of an expert; those are the length of the reduction.
void wgrad_bf16(const Problem& problem) {
  GroupedGemm<Kind::Wgrad, bfloat16_t, bfloat16_t, cute::Shape<_128, _256, _64>, cute::Shape<_2, _1, _1>, false>::run(
      problem);
}

void wgrad_fp32(const Problem& problem) {
  GroupedGemm<Kind::Wgrad, bfloat16_t, float, cute::Shape<_128, _256, _64>, cute::Shape<_2, _1, _1>, false>::run(
      problem);
}

}  // namespace omni::cuda::sm90
