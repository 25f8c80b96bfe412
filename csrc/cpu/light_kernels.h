// The kernels beside the products that have vectors: declared here for their drivers (permute.cpp, topp_route.cpp,
// cached_attention.cpp, dit.cpp, counter_rng.cpp), defined in permute_kernels.h, topp_route_kernels.h,
// cached_attention_kernels.h, dit_kernels.h and counter_rng.h, compiled by engine_<isa>.cpp.
#pragma once

#include <type_traits>

#include "cpu/vector.h"
#include "kernels.h"

namespace omni::cpu {

template <class E>
using AccumulatorOf = std::conditional_t<std::is_same_v<E, double>, double, float>;

// f with a null pointer of the element type: f(float*), f(Bf16*), f(Half*).
template <class F>
void with_type(DType dtype, const F& f) {
  if (dtype == DType::F32) f(static_cast<float*>(nullptr));
  if (dtype == DType::BF16) f(static_cast<Bf16*>(nullptr));
  if (dtype == DType::F16) f(static_cast<Half*>(nullptr));
}

// The same for two types; F64 goes with itself only.
template <class F>
void with_types(DType first, DType second, const F& f) {
  if (first == DType::F64) return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  with_type(first, [&](auto* one) { with_type(second, [&](auto* other) { f(one, other); }); });
}

template <class Isa>
struct LightKernels {
  // `bytes` a multiple of 64, out aligned to 64
  OMNI_TARGET static void copy_past_caches(const char* in, int64_t bytes, char* out);
  // kernels.h's unpermute and its backward for tokens begin..end
  OMNI_TARGET static void unpermute(const void* rows, const void* weights, const int64_t* token_offsets,
                                    const int64_t* token_rows, int64_t H, DType dtype_in, DType dtype_out, bool stream,
                                    void* out, int64_t begin, int64_t end);
  OMNI_TARGET static void unpermute_backward(const void* grad_y, const void* rows, const void* weights,
                                             const void* factor, const int64_t* token_offsets, const int64_t* token_rows,
                                             int64_t H, DType dtype_rows, DType dtype_grad, bool stream, void* grad_rows,
                                             void* grad_weights, int64_t begin, int64_t end);
  // draw_rank[e]: the place of slot e among n, as topp_route.cpp orders them: the number of slots before it. `keys`:
  // scratch, n rounded up to 16.
  OMNI_TARGET static void rank_slots(const float* z, const float* gumbel, int64_t n, int32_t* keys, int64_t* draw_rank);
  // p[e] = exp(z[e] - top); their sum
  OMNI_TARGET static float exponentials(const float* z, int64_t n, float top, float* p);
  // kernels.h's cached_attention for (token, group) begin..end; not F64
  OMNI_TARGET static void cached_attention(const CachedAttention& a, DType dtype, int64_t begin, int64_t end);
  // kernels.h's parts of the picture generator, for pictures, elements or (picture, group) begin..end
  OMNI_TARGET static void modulated_norm(const ModulatedNorm& a, int64_t begin, int64_t end);
  OMNI_TARGET static void modulated_norm_backward(const ModulatedNorm& a, int64_t begin, int64_t end);
  OMNI_TARGET static void rotary_norm(const RotaryNorm& a, int64_t begin, int64_t end);
  OMNI_TARGET static void rotary_norm_backward(const RotaryNorm& a, int64_t begin, int64_t end);
  OMNI_TARGET static void swiglu(const SwiGlu& a, int64_t begin, int64_t end);
  OMNI_TARGET static void swiglu_backward(const SwiGlu& a, int64_t begin, int64_t end);
  OMNI_TARGET static void joint_attention(const JointAttention& a, int64_t begin, int64_t end);
  OMNI_TARGET static void joint_attention_backward(const JointAttention& a, int64_t begin, int64_t end);
  // one row of counter_rng.cpp
  OMNI_TARGET static void fill_draws(uint32_t low, uint32_t high, int64_t n, float* out);
};

}  // namespace omni::cpu
