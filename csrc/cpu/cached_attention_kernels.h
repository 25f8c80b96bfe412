// The vector form of cached_attention.cpp, for the instruction set whose engine_<isa>.cpp includes this after its vectors.
//
// Keys are taken in blocks that stay in the first-level cache, and the softmax is carried on from block to block: with m
// the highest score so far, sum and output are of exp(s - m), and shrink by exp(m - m') where a block brings a higher m'.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/light_kernels.h"

namespace omni::cpu {

constexpr int64_t kKeysPerBlock = 64;  // a multiple of every vector's width

// s[j] = <q, keys[j]> for j < m, and any score of these up to the next multiple of the width. q is fp32 and zero beyond D.
template <class Isa, class E>
OMNI_TARGET inline void score_block(const float* q, const E* keys, int64_t step, int64_t D, int64_t m, float* s) {
  using V = Vector<Isa, float>;
  constexpr int64_t W = V::width;
  for (int64_t j = 0; j < m; j += W) {
    const E* k[W];
    typename V::type rows[W];
#pragma GCC unroll 16
    for (int64_t r = 0; r < W; ++r) {
      k[r] = keys + std::min(j + r, m - 1) * step;
      rows[r] = V::zero();
    }
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      const typename V::type x = V::load(q + d);
#pragma GCC unroll 16
      for (int64_t r = 0; r < W; ++r) rows[r] = V::fma(V::load(k[r] + d), x, rows[r]);
    }
    if (d < D) {
      const typename V::Part part = V::part(D - d);
      const typename V::type x = V::load(q + d);
      for (int64_t r = 0; r < W; ++r) rows[r] = V::fma(V::load_part(k[r] + d, part), x, rows[r]);
    }
    V::transpose(rows);  // the sums of rows become a sum of vectors
#pragma GCC unroll 4
    for (int64_t half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int64_t r = 0; r < half; ++r) rows[r] = V::add(rows[r], rows[r + half]);
    V::template store<false>(s + j, rows[0]);
  }
}

// s becomes exp(s - top) for j < m and zero up to the width; their sum is returned. top: the highest of itself and of s.
template <class Isa>
OMNI_TARGET inline float weights_of_block(float* s, int64_t m, float& top) {
  using V = Vector<Isa, float>;
  constexpr int64_t W = V::width;
  typename V::type highest = V::broadcast(top);
  for (int64_t j = 0; j < m; j += W) highest = V::max(highest, V::load(s + j));
  float lanes[W];
  V::template store<false>(lanes, highest);
  for (int64_t r = 0; r < W; ++r) top = std::max(top, lanes[r]);
  const typename V::type all = V::broadcast(top);
  typename V::type sum = V::zero();
  for (int64_t j = 0; j < m; j += W) {
    const typename V::type p = V::keep(exp_vector<V>(V::sub(V::load(s + j), all)), V::part(m - j));
    V::template store<false>(s + j, p);
    sum = V::add(sum, p);
  }
  return V::sum(sum);
}

// out[h][0..U vectors] = shrink[h] out[h] + sum over j < m of p[h][j] values[j], for R heads side by side. Whole: all lanes
// of the vectors are there, else `part` of the one.
template <class Isa, int R, int U, bool Whole, class E>
OMNI_TARGET inline void add_values(const float* p, const float* shrink, const E* values, int64_t step, int64_t m,
                                   int64_t padded, typename Vector<Isa, float>::Part part, float* out) {
  using V = Vector<Isa, float>;
  constexpr int64_t W = V::width;
  typename V::type sum[R][U];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sum[r][u] = V::mul(V::broadcast(shrink[r]), V::load(out + r * padded + u * W));
  for (int64_t j = 0; j < m; ++j) {
    typename V::type v[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const E* from = values + j * step + u * W;
      v[u] = Whole ? V::load(from) : V::load_part(from, part);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const typename V::type weight = V::broadcast(p[r * kKeysPerBlock + j]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sum[r][u] = V::fma(weight, v[u], sum[r][u]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) V::template store<false>(out + r * padded + u * W, sum[r][u]);
}

// The same for all D columns of R heads.
template <class Isa, int R, class E>
OMNI_TARGET inline void add_block(const float* p, const float* shrink, const E* values, int64_t step, int64_t D, int64_t m,
                                  int64_t padded, float* out) {
  using V = Vector<Isa, float>;
  constexpr int64_t W = V::width;
  const typename V::Part all = V::part(W);
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W)
    add_values<Isa, R, 4, true>(p, shrink, values + d, step, m, padded, all, out + d);
  for (; d + 2 * W <= D; d += 2 * W)
    add_values<Isa, R, 2, true>(p, shrink, values + d, step, m, padded, all, out + d);
  for (; d + W <= D; d += W) add_values<Isa, R, 1, true>(p, shrink, values + d, step, m, padded, all, out + d);
  if (d < D) add_values<Isa, R, 1, false>(p, shrink, values + d, step, m, padded, V::part(D - d), out + d);
}

template <class Isa, class E>
OMNI_TARGET void attend_units(const CachedAttention& a, int64_t begin, int64_t end) {
  using V = Vector<Isa, float>;
  constexpr int64_t W = V::width;
  const int64_t D = a.D, n = a.heads, step = a.groups * D, padded = (D + W - 1) / W * W;
  std::vector<float> scratch(n * (2 * padded + kKeysPerBlock + 3));
  float* const q = scratch.data();
  float* const out = q + n * padded;
  float* const p = out + n * padded;
  float* const top = p + n * kKeysPerBlock;
  float* const sum = top + n;
  float* const shrink = sum + n;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t t = unit / a.groups, g = unit % a.groups, count = t < a.known ? a.counts[t] : 0;
    E* const to = static_cast<E*>(a.out) + unit * n * D;
    if (count == 0) {
      std::memset(static_cast<void*>(to), 0, n * D * sizeof(E));
      continue;
    }
    const int64_t first = (a.places[t] - count + 1) * step + g * D;
    const E* const keys = static_cast<const E*>(a.keys) + first;
    const E* const values = static_cast<const E*>(a.values) + first;
    const E* const query = static_cast<const E*>(a.query) + t * a.token_stride + g * a.group_stride;
    const typename V::type scale = V::broadcast(static_cast<float>(a.scale));
    for (int64_t h = 0; h < n; ++h) {
      for (int64_t d = 0; d < D; d += W) {
        const typename V::type x = V::load_part(query + h * a.head_stride + d, V::part(D - d));
        V::template store<false>(q + h * padded + d, V::mul(scale, x));
        V::template store<false>(out + h * padded + d, V::zero());
      }
      top[h] = -std::numeric_limits<float>::infinity();
      sum[h] = 0.0f;
    }
    for (int64_t b = 0; b < count; b += kKeysPerBlock) {
      const int64_t m = std::min(kKeysPerBlock, count - b);
      for (int64_t h = 0; h < n; ++h) {
        const float before = top[h];
        score_block<Isa>(q + h * padded, keys + b * step, step, D, m, p + h * kKeysPerBlock);
        const float total = weights_of_block<Isa>(p + h * kKeysPerBlock, m, top[h]);
        shrink[h] = b == 0 ? 0.0f : std::exp(before - top[h]);
        sum[h] = sum[h] * shrink[h] + total;
      }
      int64_t h = 0;
      for (; h + 2 <= n; h += 2)
        add_block<Isa, 2>(p + h * kKeysPerBlock, shrink + h, values + b * step, step, D, m, padded, out + h * padded);
      for (; h < n; ++h)
        add_block<Isa, 1>(p + h * kKeysPerBlock, shrink + h, values + b * step, step, D, m, padded, out + h * padded);
    }
    for (int64_t h = 0; h < n; ++h) {
      const typename V::type share = V::broadcast(1.0f / sum[h]);
      for (int64_t d = 0; d < D; d += W)
        V::store_part(to + h * D + d, V::mul(share, V::load(out + h * padded + d)), V::part(D - d));
    }
  }
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::cached_attention(const CachedAttention& a, DType dtype, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto* e) { attend_units<Isa, std::remove_pointer_t<decltype(e)>>(a, begin, end); });
}

}  // namespace omni::cpu
