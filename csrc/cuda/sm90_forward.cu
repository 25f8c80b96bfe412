// grouped_gemm on sm_90a: y = x w, bf16.
#include "sm90_grouped_gemm.cuh"

namespace omni::cuda::sm90 {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;
using cutlass::bfloat16_t;

// 128 x 256 fills the register file of two consumer warpgroups; the pair of a cluster shares each tile of w.
void forward_large(const Problem& problem) {
  GroupedGemm<Kind::Forward, bfloat16_t, bfloat16_t, cute::Shape<_128, _256, _64>, cute::Shape<_2, _1, _1>, false>::run(
      problem);
}

// 64 rows a tile: less padding below about 512 rows an expert; one warpgroup's epilogue hides behind the other's products.
void forward_small(const Problem& problem) {
  GroupedGemm<Kind::Forward, bfloat16_t, bfloat16_t, cute::Shape<_64, _256, _64>, cute::Shape<_1, _1, _1>, true>::run(
      problem);
}

// Ten arrays of E entries of at most 16 bytes, each rounded up to 256, and five tensor maps of 128 bytes an SM; Hopper
// has at most 144 SMs. Twice that is asked for, and `run` compares the exact need with what it was given.
size_t workspace_bytes(int64_t experts) { return 2 * (10 * (16 * static_cast<size_t>(experts) + 256) + 144 * 5 * 128 + 4096); }

}  // namespace omni::cuda::sm90
