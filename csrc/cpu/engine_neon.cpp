// The NEON engine.
#include "cpu/isa.h"

#if OMNI_NEON

#include "cpu/vector_neon.h"
// after the vectors
#include "cpu/cached_attention_kernels.h"
#include "cpu/counter_rng.h"
#include "cpu/dit_kernels.h"
#include "cpu/gemm_simd_kernels.h"
#include "cpu/permute_kernels.h"
#include "cpu/topp_route_kernels.h"

namespace omni::cpu {

template struct Simd<Neon, float, false>;
template struct Simd<Neon, Half, false>;
template struct Simd<Neon, Bf16, false>;
template struct LightKernels<Neon>;

}  // namespace omni::cpu

#endif  // OMNI_NEON
