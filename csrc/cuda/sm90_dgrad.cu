// grouped_gemm on sm_90a: dx = dy w^T, bf16.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;
using cutlass::bfloat16_t;

void dgrad_large(const Problem& problem) {
  GroupedGemm<Kind::Dgrad, bfloat16_t, bfloat16_t, cute::Shape<_128, _256, _64>, cute::Shape<_2, _1, _1>, false>::run(
      problem);
}

void dgrad_small(const Problem& problem) {
  GroupedGemm<Kind::Dgrad, bfloat16_t, bfloat16_t, cute::Shape<_64, _256, _64>, cute::Shape<_1, _1, _1>, true>::run(
      problem);
}

}  // namespace omni::cuda::sm90
