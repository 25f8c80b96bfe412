// SwiGLU on one row of a tile of accumulators: the epilogues of expert_mlp.cpp.
//
// Forward: h = (g, u) is stored, a = w silu(g) u with silu(g) = g s, s = 1 / (1 + exp(-g)).
// Backward, with d the gradient of the unweighted a: the row's share of <d, silu(g) u> is returned (gradient of w) and
//   dg = w d u s (1 + g (1 - s)),   du = w d silu(g),   a as above.
#pragma once

#include <cmath>

#include "cpu/gemm_avx512.h"

namespace omni::cpu {

template <class E, class Acc>
void swiglu_row(const Acc* g, const Acc* u, int64_t n, Acc weight, E* h_gate, E* h_up, E* a) {
  for (int64_t i = 0; i < n; ++i) {
    from_float(g[i], h_gate[i]);
    from_float(u[i], h_up[i]);
    from_float(weight * (g[i] / (Acc(1) + std::exp(-g[i]))) * u[i], a[i]);
  }
}

template <class E, class Acc>
Acc swiglu_backward_row(const Acc* d, const E* h_gate, const E* h_up, int64_t n, Acc weight, E* d_gate, E* d_up, E* a) {
  Acc dot = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc g = to_float(h_gate[i]), u = to_float(h_up[i]), s = Acc(1) / (Acc(1) + std::exp(-g)), silu = g * s;
    dot += d[i] * silu * u;
    from_float(weight * d[i] * u * s * (Acc(1) + g * (Acc(1) - s)), d_gate[i]);
    from_float(weight * d[i] * silu, d_up[i]);
    from_float(weight * silu * u, a[i]);
  }
  return dot;
}

#if OMNI_X86

OMNI_AVX512 inline __m512 sigmoid_vector(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_vector(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

OMNI_AVX512 inline __m512 load_lanes(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
template <class E>
OMNI_AVX512 inline __m512 load_lanes(const E* p, __mmask16 lanes) {
  return Vector<float>::widen(E{}, _mm256_maskz_loadu_epi16(lanes, p));
}
OMNI_AVX512 inline void store_lanes(float* p, __mmask16 lanes, __m512 x) { _mm512_mask_storeu_ps(p, lanes, x); }
template <class E>
OMNI_AVX512 inline void store_lanes(E* p, __mmask16 lanes, __m512 x) {
  _mm256_mask_storeu_epi16(p, lanes, Vector<float>::narrow(E{}, x));
}

template <class E>
OMNI_AVX512 void swiglu_row_avx512(const float* g, const float* u, int64_t n, float weight, E* h_gate, E* h_up, E* a) {
  const __m512 w = _mm512_set1_ps(weight);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n - i)) - 1);
    const __m512 gate = _mm512_maskz_loadu_ps(lanes, g + i), up = _mm512_maskz_loadu_ps(lanes, u + i);
    store_lanes(h_gate + i, lanes, gate);
    store_lanes(h_up + i, lanes, up);
    store_lanes(a + i, lanes, _mm512_mul_ps(_mm512_mul_ps(w, up), _mm512_mul_ps(gate, sigmoid_vector(gate))));
  }
}

template <class E>
OMNI_AVX512 float swiglu_backward_row_avx512(const float* d, const E* h_gate, const E* h_up, int64_t n, float weight,
                                             E* d_gate, E* d_up, E* a) {
  const __m512 w = _mm512_set1_ps(weight), one = _mm512_set1_ps(1.0f);
  __m512 dot = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n - i)) - 1);
    const __m512 g = load_lanes(h_gate + i, lanes), u = load_lanes(h_up + i, lanes), s = sigmoid_vector(g);
    const __m512 grad = _mm512_maskz_loadu_ps(lanes, d + i), silu = _mm512_mul_ps(g, s), act = _mm512_mul_ps(silu, u);
    const __m512 weighted = _mm512_mul_ps(w, grad);
    dot = _mm512_mask3_fmadd_ps(grad, act, dot, lanes);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
    store_lanes(d_gate + i, lanes, _mm512_mul_ps(_mm512_mul_ps(weighted, u), slope));
    store_lanes(d_up + i, lanes, _mm512_mul_ps(weighted, silu));
    store_lanes(a + i, lanes, _mm512_mul_ps(w, act));
  }
  return _mm512_reduce_add_ps(dot);
}

#endif  // OMNI_X86

// The rows above with the instructions of engine G.
template <class G>
struct Swiglu {
  using E = typename G::Element;
  using Acc = typename G::Acc;
  static void row(const Acc* g, const Acc* u, int64_t n, Acc weight, E* h_gate, E* h_up, E* a) {
    if constexpr (G::kAvx512)
      swiglu_row_avx512(g, u, n, weight, h_gate, h_up, a);
    else
      swiglu_row(g, u, n, weight, h_gate, h_up, a);
  }
  static Acc backward_row(const Acc* d, const E* h_gate, const E* h_up, int64_t n, Acc weight, E* d_gate, E* d_up, E* a) {
    if constexpr (G::kAvx512)
      return swiglu_backward_row_avx512(d, h_gate, h_up, n, weight, d_gate, d_up, a);
    else
      return swiglu_backward_row(d, h_gate, h_up, n, weight, d_gate, d_up, a);
  }
};

}  // namespace omni::cpu
