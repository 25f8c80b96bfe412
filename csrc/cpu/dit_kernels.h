// The kernels of dit.cpp for vectors of any width: for the instruction set whose engine_<isa>.cpp includes this after its
// vectors, and for one lane (engine_portable.cpp). Rows and heads are multiples of 16 wide: no vector is partial there.
// Every function is a template over the vectors, also where it names none: a plain one would be compiled for each
// instruction set under one name, and the linker would keep any of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/light_kernels.h"

namespace omni::cpu {
namespace dit {

// ---- rows --------------------------------------------------------------------------------------------------------------

template <class V>
OMNI_TARGET inline float sum_of(const float* x, int64_t n) {
  typename V::type sum = V::zero();
  for (int64_t i = 0; i < n; i += V::width) sum = V::add(sum, V::load(x + i));
  return V::sum(sum);
}

// sum of (x - mean)^2
template <class V>
OMNI_TARGET inline float squares_of(const float* x, int64_t n, float mean) {
  typename V::type sum = V::zero();
  for (int64_t i = 0; i < n; i += V::width) {
    const typename V::type off = V::sub(V::load(x + i), V::broadcast(mean));
    sum = V::fma(off, off, sum);
  }
  return V::sum(sum);
}

// Neighbours (a, b) of n as complex numbers times (c, s), or times (c, -s) where `back`.
template <class V, bool back>
OMNI_TARGET inline void turn(const float* __restrict in, const float* __restrict turns, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; i += 2) {
    const float a = in[i], b = in[i + 1], c = turns[i], s = back ? -turns[i + 1] : turns[i + 1];
    out[i] = a * c - b * s;
    out[i + 1] = a * s + b * c;
  }
}

// What a picture's rows are multiplied with: weight, times factor where there is one.
template <class V>
OMNI_TARGET inline void factors_of(const ModulatedNorm& a, int64_t b, float* out) {
  for (int64_t i = 0; i < a.H; ++i) out[i] = a.factor ? a.weight[i] * a.factor[b * a.H + i] : a.weight[i];
}

// ---- products ----------------------------------------------------------------------------------------------------------

// R rows and N vectors of c [., ldc] = a b: a[r, k] at a + r am + k ak, b [K, ldb].
template <class V, int R, int N>
OMNI_TARGET inline void tile(int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
                             int64_t ldc) {
  typename V::type sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) sum[r][j] = V::zero();
  for (int64_t k = 0; k < K; ++k) {
    typename V::type right[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) right[j] = V::load(b + k * ldb + j * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename V::type left = V::broadcast(a[r * am + k * ak]);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) sum[r][j] = V::fma(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) V::template store<false>(c + r * ldc + j * V::width, sum[r][j]);
}

template <class V, int N>
OMNI_TARGET inline void columns(int64_t M, int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                                float* c, int64_t ldc) {
  constexpr int R = V::width >= 16 ? 8 : 4;
  int64_t m = 0;
  for (; m + R <= M; m += R) tile<V, R, N>(K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
  for (; m < M; ++m) tile<V, 1, N>(K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
}

// c [M, N] = a b, N a multiple of 16.
template <class V>
OMNI_TARGET inline void product(int64_t M, int64_t N, int64_t K, const float* a, int64_t am, int64_t ak, const float* b,
                                int64_t ldb, float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + 2 * V::width <= N; n += 2 * V::width) columns<V, 2>(M, K, a, am, ak, b + n, ldb, c + n, ldc);
  for (; n < N; n += V::width) columns<V, 1>(M, K, a, am, ak, b + n, ldb, c + n, ldc);
}

// ---- attention ---------------------------------------------------------------------------------------------------------
// Scores and probabilities lie across, [keys, queries]: a softmax then goes down the lanes of vectors, over any number of keys.

constexpr int64_t kPad = 16;
inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// The rows that one group of a picture sees, of all segments, behind one another; n of them, and zeros up to a multiple of
// 16. Keys are times the scale of their segment.
struct Seen {
  std::vector<float> keys, values;  // [padded(n), D]
  std::vector<int64_t> places;      // [n] row of its segment
  int64_t first[kSegments + 1], n;
};

template <class V>
OMNI_TARGET inline void gather(const JointAttention& a, int64_t b, int64_t g, Seen& seen) {
  seen.places.clear();
  for (int s = 0; s < kSegments; ++s) {
    seen.first[s] = static_cast<int64_t>(seen.places.size());
    const Segment& rows = a.segments[s];
    for (int64_t j = 0; j < rows.count; ++j)
      if (!rows.mask || rows.mask[b * rows.count + j]) seen.places.push_back(j);
  }
  seen.first[kSegments] = seen.n = static_cast<int64_t>(seen.places.size());
  for (auto* x : {&seen.keys, &seen.values}) x->assign(padded(seen.n) * a.D, 0.0f);
  for (int s = 0; s < kSegments; ++s) {
    const Segment& rows = a.segments[s];
    const typename V::type scale = V::broadcast(rows.scale);
    for (int64_t j = seen.first[s]; j < seen.first[s + 1]; ++j) {
      const float* key = rows.keys + b * rows.keys_at.picture + g * rows.keys_at.group + seen.places[j] * rows.keys_at.row;
      const float* value =
          rows.values + b * rows.values_at.picture + g * rows.values_at.group + seen.places[j] * rows.values_at.row;
      for (int64_t c = 0; c < a.D; c += V::width) {
        V::template store<false>(seen.keys.data() + j * a.D + c, V::mul(V::load(key + c), scale));
        V::template store<false>(seen.values.data() + j * a.D + c, V::load(value + c));
      }
    }
  }
}

// out [D, padded(n)] of rows [n, D], `step` apart; zeros behind n.
template <class V>
OMNI_TARGET inline void lay_across(const float* rows, int64_t n, int64_t step, int64_t D, float* out) {
  constexpr int64_t W = V::width;
  for (int64_t i = 0; i < padded(n); i += W)
    for (int64_t c = 0; c < D; c += W) {
      typename V::type block[W];
      for (int64_t r = 0; r < W; ++r) block[r] = i + r < n ? V::load(rows + (i + r) * step + c) : V::zero();
      V::transpose(block);
      for (int64_t r = 0; r < W; ++r) V::template store<false>(out + (c + r) * padded(n) + i, block[r]);
    }
}

// Down each column of x [n, columns]: exp(x - top) / sum, times factor.
template <class V>
OMNI_TARGET inline void softmax(float* x, int64_t n, int64_t columns, float factor) {
  if (n == 0) return;
  for (int64_t c = 0; c < columns; c += V::width) {
    float *first = x + c, *end = first + n * columns;
    typename V::type top = V::load(first), sum = V::zero();
    for (const float* at = first; at < end; at += columns) top = V::max(top, V::load(at));
    for (float* at = first; at < end; at += columns) {
      const typename V::type p = exp_vector<V>(V::sub(V::load(at), top));
      V::template store<false>(at, p);
      sum = V::add(sum, p);
    }
    const typename V::type share = V::div(V::broadcast(factor), sum);
    for (float* at = first; at < end; at += columns) V::template store<false>(at, V::mul(V::load(at), share));
  }
}

// d = gate p (d - m), m the sum of p d down a column; the sum of all m.
template <class V>
OMNI_TARGET inline float softmax_backward(const float* p, int64_t n, int64_t columns, float gate, float* d) {
  typename V::type total = V::zero();
  for (int64_t c = 0; c < columns; c += V::width) {
    typename V::type mean = V::zero();
    for (int64_t i = c; i < n * columns; i += columns) mean = V::fma(V::load(p + i), V::load(d + i), mean);
    for (int64_t i = c; i < n * columns; i += columns)
      V::template store<false>(
          d + i, V::mul(V::mul(V::broadcast(gate), V::load(p + i)), V::sub(V::load(d + i), mean)));
    total = V::add(total, mean);
  }
  return V::sum(total);
}

template <class V>
OMNI_TARGET inline float gate_of(const Segment& rows, int64_t h) {
  return rows.gate ? rows.gate[h] : 1.0f;
}

// Probabilities p [padded(n), padded(T)] of head h, each segment's by itself; `gated`: times its gate.
template <class V>
OMNI_TARGET inline void probabilities(const JointAttention& a, const Seen& seen, int64_t h, const float* query_across,
                                      bool gated, float* p) {
  const int64_t columns = padded(a.T);
  product<V>(padded(seen.n), columns, a.D, seen.keys.data(), a.D, 1, query_across, columns, p, columns);
  for (int s = 0; s < kSegments; ++s)
    softmax<V>(p + seen.first[s] * columns, seen.first[s + 1] - seen.first[s], columns,
               gated ? gate_of<V>(a.segments[s], h) : 1.0f);
}

// Adds rows [n, D] to where they came from: keys' times the scale of their segment, values' times its gate.
template <class V>
OMNI_TARGET inline void scatter(const JointAttention& a, const Seen& seen, const float* rows, int64_t b, int64_t g, int64_t h,
                                bool keys) {
  for (int s = 0; s < kSegments; ++s) {
    if (seen.first[s] == seen.first[s + 1]) continue;  // such a segment may have no memory
    const Segment& to = a.segments[s];
    const Strides& at = keys ? to.keys_at : to.values_at;
    const typename V::type factor = V::broadcast(keys ? to.scale : gate_of<V>(to, h));
    float* base = (keys ? to.grad_keys : to.grad_values) + b * at.picture + g * at.group;
    for (int64_t j = seen.first[s]; j < seen.first[s + 1]; ++j)
      for (int64_t c = 0; c < a.D; c += V::width) {
        float* out = base + seen.places[j] * at.row + c;
        V::template store<false>(out, V::fma(factor, V::load(rows + j * a.D + c), V::load(out)));
      }
  }
}

}  // namespace dit

// ---- modulated_norm ------------------------------------------------------------------------------------------------------

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::modulated_norm(const ModulatedNorm& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  const int64_t H = a.H;
  std::vector<float> f(H);
  for (int64_t b = begin; b < end; ++b) {
    dit::factors_of<V>(a, b, f.data());
    for (int64_t row = b * a.T; row < (b + 1) * a.T; ++row) {
      const float* x = a.x + row * H;
      const float r = 1 / std::sqrt(dit::squares_of<V>(x, H, 0) / H + a.eps);
      a.rstd[row] = r;
      const typename V::type all = V::broadcast(r);
      for (int64_t i = 0; i < H; i += V::width) {
        const typename V::type normed = V::mul(V::load(x + i), all), by = V::load(f.data() + i);
        V::template store<false>(a.y + row * H + i, a.residual ? V::fma(normed, by, V::load(a.residual + row * H + i))
                                                               : V::mul(normed, by));
      }
    }
  }
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::modulated_norm_backward(const ModulatedNorm& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  const int64_t H = a.H;
  std::vector<float> f(H);
  for (int64_t b = begin; b < end; ++b) {
    dit::factors_of<V>(a, b, f.data());
    float* sums = a.sums + b * H;
    std::fill(sums, sums + H, 0.0f);
    for (int64_t row = b * a.T; row < (b + 1) * a.T; ++row) {
      const float *x = a.x + row * H, *g = a.grad + row * H;
      typename V::type dots = V::zero();
      const float r = a.rstd[row];
      for (int64_t i = 0; i < H; i += V::width) {
        const typename V::type gx = V::mul(V::load(g + i), V::load(x + i));
        dots = V::fma(gx, V::load(f.data() + i), dots);
        V::template store<false>(sums + i, V::fma(gx, V::broadcast(r), V::load(sums + i)));
      }
      const typename V::type all = V::broadcast(r), back = V::broadcast(V::sum(dots) * r * r * r / H);
      for (int64_t i = 0; i < H; i += V::width)
        V::template store<false>(a.grad_x + row * H + i,
                                 V::fnma(V::load(x + i), back, V::mul(V::mul(V::load(g + i), V::load(f.data() + i)), all)));
    }
  }
}

// ---- rotary_norm ---------------------------------------------------------------------------------------------------------

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::rotary_norm(const RotaryNorm& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  const int64_t W = a.heads * a.D;
  std::vector<float> normed(W);
  for (int64_t b = begin; b < end; ++b)
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t row = b * a.T + t;
      const float* x = a.x + row * W;
      const float mean = dit::sum_of<V>(x, W) / W, r = 1 / std::sqrt(dit::squares_of<V>(x, W, mean) / W + a.eps);
      a.stats[2 * row] = mean, a.stats[2 * row + 1] = r;
      for (int64_t i = 0; i < W; i += V::width) {
        const typename V::type off = V::mul(V::sub(V::load(x + i), V::broadcast(mean)), V::broadcast(r));
        V::template store<false>(normed.data() + i, V::fma(off, V::load(a.weight + i), V::load(a.bias + i)));
      }
      for (int64_t h = 0; h < a.heads; ++h)
        dit::turn<V, false>(normed.data() + h * a.D, a.turns + t * a.D, a.D, a.y + ((b * a.heads + h) * a.T + t) * a.D);
    }
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::rotary_norm_backward(const RotaryNorm& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  const int64_t W = a.heads * a.D;
  std::vector<float> g(W);
  for (int64_t b = begin; b < end; ++b) {
    float *sums = a.weight_sums + b * W, *biases = a.bias_sums + b * W;
    std::fill(sums, sums + W, 0.0f), std::fill(biases, biases + W, 0.0f);
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t row = b * a.T + t;
      for (int64_t h = 0; h < a.heads; ++h)
        dit::turn<V, true>(a.grad + ((b * a.heads + h) * a.T + t) * a.D, a.turns + t * a.D, a.D, g.data() + h * a.D);
      const float* x = a.x + row * W;
      const typename V::type mean = V::broadcast(a.stats[2 * row]), r = V::broadcast(a.stats[2 * row + 1]);
      typename V::type plain = V::zero(), dots = V::zero();
      for (int64_t i = 0; i < W; i += V::width) {
        const typename V::type grad = V::load(g.data() + i), by = V::mul(grad, V::load(a.weight + i));
        const typename V::type off = V::mul(V::sub(V::load(x + i), mean), r);
        plain = V::add(plain, by), dots = V::fma(by, off, dots);
        V::template store<false>(sums + i, V::fma(grad, off, V::load(sums + i)));
        V::template store<false>(biases + i, V::add(grad, V::load(biases + i)));
      }
      const typename V::type level = V::broadcast(V::sum(plain) / W), slope = V::broadcast(V::sum(dots) / W);
      for (int64_t i = 0; i < W; i += V::width) {
        const typename V::type by = V::mul(V::load(g.data() + i), V::load(a.weight + i));
        const typename V::type off = V::mul(V::sub(V::load(x + i), mean), r);
        V::template store<false>(a.grad_x + row * W + i, V::mul(r, V::fnma(off, slope, V::sub(by, level))));
      }
    }
  }
}

// ---- swiglu --------------------------------------------------------------------------------------------------------------

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::swiglu(const SwiGlu& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  const typename V::type one = V::broadcast(1);
  for (int64_t i = begin; i < end; i += V::width) {
    const typename V::Part part = V::part(end - i);
    const typename V::type g = V::load_part(a.gate + i, part), u = V::load_part(a.up + i, part);
    const typename V::type silu = V::div(g, V::add(one, exp_vector<V>(V::sub(V::zero(), g))));
    V::store_part(a.y + i, V::mul(silu, u), part);
  }
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::swiglu_backward(const SwiGlu& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  const typename V::type one = V::broadcast(1);
  for (int64_t i = begin; i < end; i += V::width) {
    const typename V::Part part = V::part(end - i);
    const typename V::type g = V::load_part(a.gate + i, part), u = V::load_part(a.up + i, part);
    const typename V::type d = V::load_part(a.grad + i, part);
    const typename V::type s = V::div(one, V::add(one, exp_vector<V>(V::sub(V::zero(), g)))), silu = V::mul(g, s);
    const typename V::type slope = V::fma(silu, V::sub(one, s), s);
    V::store_part(a.grad_gate + i, V::mul(V::mul(d, u), slope), part);
    V::store_part(a.grad_up + i, V::mul(d, silu), part);
  }
}

// ---- joint_attention -----------------------------------------------------------------------------------------------------

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::joint_attention(const JointAttention& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  dit::Seen seen;
  const int64_t per_group = a.heads / a.groups, width = a.heads * a.D, columns = dit::padded(a.T);
  std::vector<float> p, query(columns * a.D);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.groups, g = unit % a.groups;
    dit::gather<V>(a, b, g, seen);
    p.resize(dit::padded(seen.n) * columns);
    for (int64_t h = g * per_group; h < (g + 1) * per_group; ++h) {
      dit::lay_across<V>(a.query + (b * a.heads + h) * a.T * a.D, a.T, a.D, a.D, query.data());
      dit::probabilities<V>(a, seen, h, query.data(), true, p.data());
      dit::product<V>(a.T, a.D, seen.n, p.data(), 1, columns, seen.values.data(), a.D,
                      a.out + b * a.T * width + h * a.D, width);
    }
  }
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::joint_attention_backward(const JointAttention& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  dit::Seen seen;
  const int64_t per_group = a.heads / a.groups, width = a.heads * a.D, columns = dit::padded(a.T);
  std::vector<float> p, d, rows, across(columns * a.D);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.groups, g = unit % a.groups;
    dit::gather<V>(a, b, g, seen);
    const int64_t n = dit::padded(seen.n);
    p.resize(n * columns), d.resize(n * columns), rows.resize(n * a.D);
    for (int64_t h = g * per_group; h < (g + 1) * per_group; ++h) {
      const int64_t own = (b * a.heads + h) * a.T * a.D;
      const float *query = a.query + own, *grad = a.grad + b * a.T * width + h * a.D;
      dit::lay_across<V>(query, a.T, a.D, a.D, across.data());
      dit::probabilities<V>(a, seen, h, across.data(), false, p.data());
      dit::lay_across<V>(grad, a.T, width, a.D, across.data());
      dit::product<V>(n, columns, a.D, seen.values.data(), a.D, 1, across.data(), columns, d.data(), columns);
      dit::product<V>(n, a.D, a.T, p.data(), columns, 1, grad, width, rows.data(), a.D);
      dit::scatter<V>(a, seen, rows.data(), b, g, h, false);
      for (int s = 0; s < kSegments; ++s) {
        const int64_t first = seen.first[s], count = seen.first[s + 1] - first, at = first * columns;
        const float total = dit::softmax_backward<V>(p.data() + at, count, columns, dit::gate_of<V>(a.segments[s], h),
                                                     d.data() + at);
        if (a.segments[s].grad_gate) a.segments[s].grad_gate[b * a.heads + h] = total;
      }
      dit::product<V>(a.T, a.D, seen.n, d.data(), 1, columns, seen.keys.data(), a.D, a.grad_query + own, a.D);
      dit::product<V>(n, a.D, a.T, d.data(), columns, 1, query, a.D, rows.data(), a.D);
      dit::scatter<V>(a, seen, rows.data(), b, g, h, true);
    }
  }
}

}  // namespace omni::cpu
