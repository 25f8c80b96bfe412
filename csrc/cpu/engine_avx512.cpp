// The AVX-512 engine.
#include "cpu/isa.h"

#if OMNI_X86

#include "cpu/vector_avx512.h"
// after the vectors
#include "cpu/cached_attention_kernels.h"
#include "cpu/counter_rng.h"
#include "cpu/dit_kernels.h"
#include "cpu/gemm_simd_kernels.h"
#include "cpu/permute_kernels.h"
#include "cpu/topp_route_kernels.h"

namespace omni::cpu {

template struct Simd<Avx512, float, false>;
template struct Simd<Avx512, Half, false>;
template struct Simd<Avx512, Bf16, false>;
template struct Simd<Avx512, Bf16, true>;
template struct LightKernels<Avx512>;

}  // namespace omni::cpu

#endif  // OMNI_X86
