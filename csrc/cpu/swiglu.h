// SwiGLU on one row of a tile of accumulators in plain C++: the epilogues of expert_mlp.cpp. gemm_simd_kernels.h has them
// with vectors.
//
// Forward: h = (g, u) is stored, a = w silu(g) u with silu(g) = g s, s = 1 / (1 + exp(-g)).
// Backward, with d the gradient of the unweighted a: the row's share of <d, silu(g) u> is returned (gradient of w) and
//   dg = w d u s (1 + g (1 - s)),   du = w d silu(g),   a as above.
#pragma once

#include <cmath>

#include "cpu/vector.h"

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

}  // namespace omni::cpu
