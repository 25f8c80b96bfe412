// The packing, the microkernels and the SwiGLU rows of gemm_simd.h, for the instruction set whose engine_<isa>.cpp
// includes this after its vectors: every height, width, element type and layout of A, compiled once for all ops.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/gemm_simd.h"

namespace omni::cpu {

template <int64_t W, class Isa, class E, bool Pairs>
OMNI_TARGET inline void pack_columns(const E* src, int64_t ld, int64_t l, int64_t n, float* out) {
  using V = Vector<Isa, float>;
  using U = Units<Isa, E, Pairs>;
  constexpr int64_t pair = Pairs ? 2 : 1;
  constexpr int kVectors = W / V::width;
  const int64_t units = (l + pair - 1) / pair;
  for (int64_t u = 0; u < units; ++u) {
    const E* p = src + u * pair * ld;
    const bool single = Pairs && u * pair + 1 == l;
    float* to = out + u * W;
    for (int64_t c = 0; c < n; c += W, to += units * W) {
      if (!single && n - c >= W) {
        typename V::type whole[kVectors];
        U::load_whole(p + c, ld, whole);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) V::template store<false>(to + v * V::width, whole[v]);
        continue;
      }
#pragma GCC unroll 8
      for (int64_t v = 0; v < W; v += V::width)
        V::template store<false>(to + v, U::load_columns(p + c + v, ld, single, V::part(n - c - v)));
    }
  }
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET void Simd<Isa, E, Pairs>::pack_a(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
  pack_columns<kGroup, Isa, E, Pairs>(src, ld, l, n, out);
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET void Simd<Isa, E, Pairs>::pack_b(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
  pack_columns<kTile, Isa, E, Pairs>(src, ld, l, n, out);
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET void Simd<Isa, E, Pairs>::pack_transposed(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
  using V = Vector<Isa, float>;
  constexpr int W = V::width;
  const int64_t units = (l + kPair - 1) / kPair;
  for (int64_t c = 0; c < n; c += W) {
    float* to = out + c / kTile * units * kTile + c % kTile;
    for (int64_t u = 0; u < units; u += W) {
      typename V::type r[W];
      if (!Pairs && c + W <= n && u + W <= l) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = V::load(src + (c + i) * ld + u);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          r[i] = c + i < n ? Units<Isa, E, Pairs>::load_run(src + (c + i) * ld, u, l) : V::zero();
      }
      V::transpose(r);
      if (units - u >= W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) V::template store<false>(to + (u + i) * kTile, r[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          if (u + i < units) V::template store<false>(to + (u + i) * kTile, r[i]);
      }
    }
  }
  if (n % kTile) {  // the last tile's columns that no vector filled
    const int64_t filled = (n % kTile + W - 1) / W * W;
    float* to = out + n / kTile * units * kTile;
    for (int64_t u = 0; u < units; ++u)
      for (int64_t c = filled; c < kTile; c += W) V::template store<false>(to + u * kTile + c, V::zero());
  }
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET void Simd<Isa, E, Pairs>::pack_rows(const E* src, int64_t ld, int64_t m, int64_t l, Acc* out, int64_t ld_out) {
  using V = Vector<Isa, float>;
  const int64_t units = (l + kPair - 1) / kPair;
  for (int64_t i = 0; i < m; ++i) {
    int64_t u = 0;
    if constexpr (!Pairs)
      for (; u + V::width <= units; u += V::width)
        V::template store<false>(out + i * ld_out + u, V::load(src + i * ld + u));
    for (; u < units; u += V::width)
      V::store_part(out + i * ld_out + u, Units<Isa, E, Pairs>::load_run(src + i * ld, u, l), V::part(units - u));
  }
}

// A (first unit of the tile's first row; `row` bytes to the next row, `step` bytes to the next unit) times B
// (`b_step` units to the next row of its columns), over `units`. If it packs, B is elements as they lie in memory,
// `b_step` of them to the next row, and goes to t.pack on the way.
template <class Isa, class E, bool Pairs, bool PackedA, int Rows, int Vectors, bool Packs>
OMNI_TARGET void multiply_tile(int64_t units, const char* a, int64_t row, int64_t step, const float* b, int64_t b_step,
                               const Tile<float>& t) {
  using V = Vector<Isa, float>;
  using U = Units<Isa, E, Pairs>;
  typename V::type acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) acc[i][j] = V::zero();
  if constexpr (Shape<Isa>::kFetchesSums) {
    for (int i = 0; i < Rows; ++i)
      __builtin_prefetch(static_cast<const char*>(t.out) + i * t.ld_out * (t.narrow ? sizeof(E) : sizeof(float)), 0, 3);
  }
  if (PackedA) row = 4; else step = 4;
  const char* ahead = t.fetch.at;
  [[maybe_unused]] const E* elements = reinterpret_cast<const E*>(b);
  [[maybe_unused]] float* pack = t.pack;
#pragma GCC unroll 2
  for (int64_t u = 0; u < units; ++u) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + t.fetch.gap, 0, 2);
    ahead += t.fetch.step;
    typename V::type bv[Vectors];
    if constexpr (Packs) {
      U::load_whole(elements, b_step, bv);
      if constexpr (Shape<Isa>::kPackAhead > 0) __builtin_prefetch(elements + Shape<Isa>::kPackAhead * b_step, 0, 3);
      elements += (Pairs ? 2 : 1) * b_step;
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) V::template store<false>(pack + V::width * j, bv[j]);
      pack += V::width * Vectors;
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) bv[j] = V::load(b + V::width * j);
      b += b_step;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      float unit;
      std::memcpy(&unit, a + i * row, 4);
      const typename V::type av = V::broadcast(unit);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] = U::add_product(acc[i][j], av, bv[j]);
    }
    a += step;
  }
  // Copied: a store may change *t as far as the compiler knows. One question a tile, not one a vector: of short
  // contractions these stores are half of the time.
  const Tile<float> tile = t;
  const typename V::Part last = V::part(tile.cols - V::width * (Vectors - 1));
  const auto write = [&](auto* out, auto adds, auto streams) __attribute__((always_inline)) OMNI_TARGET {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        const bool whole = j < Vectors - 1;
        typename V::type v = acc[i][j];
        if constexpr (adds) {
          const float* p = tile.init + i * tile.ld_init + V::width * j;
          v = V::add(v, whole ? V::load(p) : V::load_part(p, last));
        }
        auto* p = out + i * tile.ld_out + V::width * j;
        if constexpr (std::is_same_v<decltype(p), E*>) {
          if (whole || streams) U::store(p, v, streams); else U::store_part(p, v, last);
        } else if constexpr (streams) {
          V::template store<true>(p, v);
        } else if (whole) {
          V::template store<false>(p, v);
        } else {
          V::store_part(p, v, last);
        }
      }
    }
  };
  const auto write_to = [&](auto* out) __attribute__((always_inline)) OMNI_TARGET {
    using Yes = std::true_type;
    using No = std::false_type;
    if (tile.stream)
      tile.init ? write(out, Yes{}, Yes{}) : write(out, No{}, Yes{});
    else
      tile.init ? write(out, Yes{}, No{}) : write(out, No{}, No{});
  };
  if constexpr (!std::is_same_v<E, float>)
    if (tile.narrow) return write_to(static_cast<E*>(tile.out));
  write_to(static_cast<float*>(tile.out));
}

// The microkernels of one layout of A by height and width; past the widths, the one that packs.
template <class Isa, class E, bool Pairs, bool PackedA>
struct MicroTable {
  using Engine = Simd<Isa, E, Pairs>;
  static constexpr int kRows = Shape<Isa>::kRows, kVectors = Shape<Isa>::kVectors;
  typename Engine::Micro of[kRows][kVectors + 1];

  template <int Rows, int... J>
  constexpr void fill_row(std::integer_sequence<int, J...>) {
    ((of[Rows - 1][J] = multiply_tile<Isa, E, Pairs, PackedA, Rows, J + 1, false>), ...);
    of[Rows - 1][kVectors] = multiply_tile<Isa, E, Pairs, PackedA, Rows, kVectors, true>;
  }
  template <int... I>
  constexpr void fill(std::integer_sequence<int, I...>) {
    (fill_row<I + 1>(std::make_integer_sequence<int, kVectors>()), ...);
  }
  constexpr MicroTable() : of() { fill(std::make_integer_sequence<int, kRows>()); }
};

template <class Isa, class E, bool Pairs>
OMNI_TARGET typename Simd<Isa, E, Pairs>::Micro Simd<Isa, E, Pairs>::micro(bool packed_a, bool packs, int64_t rows,
                                                                          int64_t cols) {
  static constexpr MicroTable<Isa, E, Pairs, false> by_rows;
  static constexpr MicroTable<Isa, E, Pairs, true> by_columns;
  constexpr int64_t lanes = Shape<Isa>::kLanes;
  const int64_t column = packs ? Shape<Isa>::kVectors : (cols + lanes - 1) / lanes - 1;
  return packed_a ? by_columns.of[rows - 1][column] : by_rows.of[rows - 1][column];
}

constexpr int kDepth = 8;       // rows of B that pass together
constexpr int kSumsAtOnce = 4;  // rows of A whose sums are in registers
constexpr int64_t kPage = 4096;

// sums += the products of rows Begin.. of A (`factor`), kSumsAtOnce at most, with kDepth rows of B: Vectors vectors
// from columns(row) on, which are left in `pack`, [kDepth][Vectors], if that is given.
template <class Isa, class E, int Rows, int Vectors, int Begin, class Columns>
OMNI_TARGET inline __attribute__((always_inline)) void add_few_columns(const float (*factor)[Rows],
                                                                       const Columns& columns, float* sums,
                                                                       int64_t ld_sums, float* pack) {
  using V = Vector<Isa, float>;
  using type = typename V::type;
  constexpr int rows = Rows - Begin < kSumsAtOnce ? Rows - Begin : kSumsAtOnce;
  __asm__("" : "+r"(factor));  // or the compiler keeps every factor as a vector on the stack, at twice the loads
  type acc[rows][Vectors];
  float* at = sums + Begin * ld_sums;
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) acc[i][v] = V::load(at + i * ld_sums + V::width * v);
#pragma GCC unroll 8
  for (int u = 0; u < kDepth; ++u) {
    type column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      column[v] = V::load(columns(u) + V::width * v);
      if (pack) V::template store<false>(pack + (u * Vectors + v) * V::width, column[v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const type times = V::broadcast(factor[u][Begin + i]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) acc[i][v] = V::fma(times, column[v], acc[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) V::template store<false>(at + i * ld_sums + V::width * v, acc[i][v]);
}

// sums[i][j] += the products of Rows rows of A with `depth` <= kDepth rows of B, over n columns. The rows of B that come
// after these are fetched meanwhile: as one run of memory where they are that (the processor's own prefetcher then runs
// ahead of ours), else row by row. Where loads of B follow each other closely, for hardly any rows of A, and its rows
// are a page or more, the processor's prefetcher alone is faster.
template <class Isa, class E, int Rows>
OMNI_TARGET void add_few(const E* a, int64_t ld_a, const E* b, int64_t ld_b, int64_t n, const E* next, int64_t depth,
                         float* sums, int64_t ld_sums) {
  using V = Vector<Isa, float>;
  constexpr bool lines = Shape<Isa>::kFewByLines, packs = lines && Rows > kSumsAtOnce;
  constexpr int kVectors = !lines ? 3 : Rows <= 2 ? 4 : 2;
  constexpr int kHint = lines ? 0 : 2;  // B passes by once: 0 leaves the second-level cache to what is used again
  float factors[kDepth][Rows];
  [[maybe_unused]] alignas(64) float pack[kDepth * kVectors * V::width];
  const E* row[kDepth];
  for (int64_t u = 0; u < kDepth; ++u) {
    row[u] = b + (u < depth ? u : 0) * ld_b;  // past the last: times zero
    for (int i = 0; i < Rows; ++i) factors[u][i] = u < depth ? to_float(a[i * ld_a + u]) : 0.0f;
  }
  constexpr int64_t across = kVectors * V::width, line = 64 / sizeof(E);
  const bool one_run = ld_b == n;
  const bool fetches = !lines || Rows > kSumsAtOnce || n * int64_t{sizeof(E)} < kPage;
  int64_t j = 0;
  for (; j + across <= n; j += across) {
    if (fetches && one_run) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kDepth * across; i += line) __builtin_prefetch(next + i, 0, kHint);
      next += kDepth * across;
    } else if (fetches) {
#pragma GCC unroll 8
      for (int u = 0; u < kDepth; ++u)
        for (int64_t i = 0; i < across; i += line) __builtin_prefetch(next + u * ld_b + i, 0, kHint);
      next += across;
    }
    const auto in_place = [&](int u) __attribute__((always_inline)) { return row[u] + j; };
    const auto packed = [&](int u) __attribute__((always_inline)) { return pack + u * across; };
    add_few_columns<Isa, E, Rows, kVectors, 0>(factors, in_place, sums + j, ld_sums, packs ? pack : nullptr);
    if constexpr (packs)
      add_few_columns<Isa, E, Rows, kVectors, kSumsAtOnce>(factors, packed, sums + j, ld_sums, nullptr);
    else if constexpr (Rows > kSumsAtOnce)
      add_few_columns<Isa, E, Rows, kVectors, kSumsAtOnce>(factors, in_place, sums + j, ld_sums, nullptr);
  }
  for (; j + V::width <= n; j += V::width) {
    const auto in_place = [&](int u) __attribute__((always_inline)) { return row[u] + j; };
    add_few_columns<Isa, E, Rows, 1, 0>(factors, in_place, sums + j, ld_sums, nullptr);
    if constexpr (Rows > kSumsAtOnce)
      add_few_columns<Isa, E, Rows, 1, kSumsAtOnce>(factors, in_place, sums + j, ld_sums, nullptr);
  }
  if (j == n) return;
  const typename V::Part part = V::part(n - j);
  for (int i = 0; i < Rows; ++i) {
    typename V::type sum = V::load_part(sums + i * ld_sums + j, part);
    for (int u = 0; u < kDepth; ++u)
      sum = V::fma(V::broadcast(factors[u][i]), V::load_part(row[u] + j, part), sum);
    V::store_part(sums + i * ld_sums + j, sum, part);
  }
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET void Simd<Isa, E, Pairs>::multiply_few(const E* a, int64_t ld_a, const E* b, int64_t ld_b, int64_t m,
                                                   int64_t n, int64_t l, const E* next, float* sums, int64_t ld_sums) {
  static constexpr decltype(&add_few<Isa, E, 1>) add[] = {
      add_few<Isa, E, 1>, add_few<Isa, E, 2>, add_few<Isa, E, 3>, add_few<Isa, E, 4>,
      add_few<Isa, E, 5>, add_few<Isa, E, 6>, add_few<Isa, E, 7>, add_few<Isa, E, 8>};
  static_assert(kFewRows <= 8);
  std::memset(sums, 0, m * ld_sums * sizeof(float));
  for (int64_t u = 0; u < l; u += kDepth) {
    const E* after = u + 2 * kDepth <= l ? b + (u + kDepth) * ld_b : next ? next : b;
    add[m - 1](a + u, ld_a, b + u * ld_b, ld_b, n, after, std::min<int64_t>(kDepth, l - u), sums, ld_sums);
  }
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET void Simd<Isa, E, Pairs>::write_row(const float* sums, int64_t n, E* out) {
  using V = Vector<Isa, float>;
  for (int64_t j = 0; j < n; j += V::width) {
    const typename V::Part part = V::part(n - j);
    Units<Isa, E, Pairs>::store_part(out + j, V::load_part(sums + j, part), part);
  }
}

template <class V>
OMNI_TARGET inline typename V::type sigmoid_vector(typename V::type x) {
  const typename V::type one = V::broadcast(1.0f);
  return V::div(one, V::add(one, exp_vector<V>(V::sub(V::zero(), x))));
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET void Simd<Isa, E, Pairs>::swiglu_row(const Acc* g, const Acc* u, int64_t n, Acc weight, E* h_gate, E* h_up,
                                                 E* a) {
  using V = Vector<Isa, float>;
  const typename V::type w = V::broadcast(weight);
  for (int64_t i = 0; i < n; i += V::width) {
    const typename V::Part part = V::part(n - i);
    const typename V::type gate = V::load_part(g + i, part), up = V::load_part(u + i, part);
    V::store_part(h_gate + i, gate, part);
    V::store_part(h_up + i, up, part);
    V::store_part(a + i, V::mul(V::mul(w, up), V::mul(gate, sigmoid_vector<V>(gate))), part);
  }
}

template <class Isa, class E, bool Pairs>
OMNI_TARGET float Simd<Isa, E, Pairs>::swiglu_backward_row(const Acc* d, const E* h_gate, const E* h_up, int64_t n,
                                                           Acc weight, E* d_gate, E* d_up, E* a) {
  using V = Vector<Isa, float>;
  using type = typename V::type;
  const type w = V::broadcast(weight), one = V::broadcast(1.0f);
  type dot = V::zero();
  for (int64_t i = 0; i < n; i += V::width) {
    const typename V::Part part = V::part(n - i);
    const type g = V::load_part(h_gate + i, part), u = V::load_part(h_up + i, part), s = sigmoid_vector<V>(g);
    const type grad = V::load_part(d + i, part), silu = V::mul(g, s), act = V::mul(silu, u);
    const type weighted = V::mul(w, grad);
    dot = V::fma(grad, act, dot);  // zero outside of part
    const type slope = V::mul(s, V::fma(g, V::sub(one, s), one));
    V::store_part(d_gate + i, V::mul(V::mul(weighted, u), slope), part);
    V::store_part(d_up + i, V::mul(weighted, silu), part);
    V::store_part(a + i, V::mul(w, act), part);
  }
  return V::sum(dot);
}

}  // namespace omni::cpu
