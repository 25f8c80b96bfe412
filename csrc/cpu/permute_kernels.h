// The vector forms of permute.cpp, for the instruction set whose engine_<isa>.cpp includes this after its vectors.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/light_kernels.h"

namespace omni::cpu {

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::copy_past_caches(const char* in, int64_t bytes, char* out) {
  using V = Vector<Isa, float>;
  constexpr int64_t step = V::width * 4;
  for (int64_t i = 0; i < bytes; i += step)
    V::template store<true>(reinterpret_cast<float*>(out + i), V::load(reinterpret_cast<const float*>(in + i)));
}

// Asks for the U vectors that a later loop reads at p: a row begins on a page of its own, which the processor does not
// foresee by itself. Into the second-level cache, which waits for more lines at once than the first.
template <class Isa, int U, class Acc, class In>
OMNI_TARGET inline void prefetch(const In* p) {
  for (size_t byte = 0; byte < U * Vector<Isa, Acc>::width * sizeof(In); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
}

// y = (First ? 0 : sum) + the weighted sum of R rows, read side by side from end to end. `next` are the rows after these.
template <class Isa, int R, bool First, bool Stream, class In, class Out, class Acc>
OMNI_TARGET void add_rows(const In* rows, const Acc* weights, const int64_t* row, const int64_t* next, int64_t H,
                          const Acc* sum, Out* y) {
  using V = Vector<Isa, Acc>;
  constexpr int kUnroll = 4;
  const In* p[R];
  const In* ahead[R];
  typename V::type w[R];
  for (int r = 0; r < R; ++r) {
    p[r] = rows + row[r] * H;
    ahead[r] = rows + next[r] * H;
    w[r] = V::broadcast(weights ? weights[row[r]] : Acc(1));
  }
  int64_t h = 0;
  for (; h + kUnroll * V::width <= H; h += kUnroll * V::width) {
    typename V::type v[kUnroll];
    for (int u = 0; u < kUnroll; ++u) v[u] = First ? V::zero() : V::load(sum + h + u * V::width);
    for (int r = 0; r < R; ++r) {
      prefetch<Isa, kUnroll, Acc>(ahead[r] + h);
      for (int u = 0; u < kUnroll; ++u) v[u] = V::fma(V::load(p[r] + h + u * V::width), w[r], v[u]);
    }
    for (int u = 0; u < kUnroll; ++u) V::template store<Stream>(y + h + u * V::width, v[u]);
  }
  for (; h < H; h += V::width) {
    const typename V::Part n = V::part(H - h);
    typename V::type v = First ? V::zero() : V::load_part(sum + h, n);
    for (int r = 0; r < R; ++r) v = V::fma(V::load_part(p[r] + h, n), w[r], v);
    V::store_part(y + h, v, n);
  }
}

constexpr int kRowsAtOnce = 4;

template <class Isa, bool First, bool Stream, class In, class Out, class Acc>
OMNI_TARGET void add_some_rows(int64_t k, const In* rows, const Acc* weights, const int64_t* row, const int64_t* next,
                               int64_t H, const Acc* sum, Out* y) {
  if (k == 4) return add_rows<Isa, 4, First, Stream>(rows, weights, row, next, H, sum, y);
  if (k == 3) return add_rows<Isa, 3, First, Stream>(rows, weights, row, next, H, sum, y);
  if (k == 2) return add_rows<Isa, 2, First, Stream>(rows, weights, row, next, H, sum, y);
  return add_rows<Isa, 1, First, Stream>(rows, weights, row, next, H, sum, y);
}

// Up to four rows of a token at once: their sum never leaves the registers; of more rows it goes by a row of scratch that
// stays in the first-level cache.
template <class Isa, bool Stream, class In, class Out, class Acc>
OMNI_TARGET void unpermute_tokens(const In* rows, const Acc* weights, const int64_t* token_offsets,
                                  const int64_t* token_rows, int64_t H, Out* out, int64_t begin, int64_t end) {
  std::vector<Acc> scratch(H);
  Acc* sum = scratch.data();
  for (int64_t t = begin; t < end; ++t) {
    Out* y = out + t * H;
    int64_t j = token_offsets[t];
    const int64_t last = token_offsets[t + 1];
    if (j == last) {
      std::memset(y, 0, H * sizeof(Out));
      continue;
    }
    while (j < last) {
      const bool first = j == token_offsets[t];
      const int64_t k = std::min<int64_t>(kRowsAtOnce, last - j);
      const int64_t* row = token_rows + j;
      const int64_t* next = j + 2 * k <= token_offsets[end] ? row + k : row;
      j += k;
      if (j == last && first) add_some_rows<Isa, true, Stream>(k, rows, weights, row, next, H, sum, y);
      else if (j == last) add_some_rows<Isa, false, Stream>(k, rows, weights, row, next, H, sum, y);
      else if (first) add_rows<Isa, kRowsAtOnce, true, false>(rows, weights, row, next, H, sum, sum);
      else add_rows<Isa, kRowsAtOnce, false, false>(rows, weights, row, next, H, sum, sum);
    }
  }
  if (Stream) store_fence();
}

// One row: grad_row = scale g and the dot product of row and g.
template <class Isa, bool Rows, bool Dot, bool Stream, class In, class Acc, class Grad>
OMNI_TARGET inline Acc backward_row(const Grad* g, const In* row, const In* next_row, Acc scale, int64_t H,
                                    In* grad_row) {
  using V = Vector<Isa, Acc>;
  constexpr int kUnroll = 4;
  const typename V::type s = V::broadcast(scale);
  typename V::type dot[kUnroll];
  for (int u = 0; u < kUnroll; ++u) dot[u] = V::zero();
  int64_t h = 0;
  for (; h + kUnroll * V::width <= H; h += kUnroll * V::width) {
    if (Dot) prefetch<Isa, kUnroll, Acc>(next_row + h);
    for (int u = 0; u < kUnroll; ++u) {
      const typename V::type v = V::load(g + h + u * V::width);
      if (Dot) dot[u] = V::fma(V::load(row + h + u * V::width), v, dot[u]);
      if (Rows) V::template store<Stream>(grad_row + h + u * V::width, V::mul(v, s));
    }
  }
  for (; h < H; h += V::width) {
    const typename V::Part n = V::part(H - h);
    const typename V::type v = V::load_part(g + h, n);
    if (Dot) dot[0] = V::fma(V::load_part(row + h, n), v, dot[0]);
    if (Rows) V::store_part(grad_row + h, V::mul(v, s), n);
  }
  return Dot ? V::sum(V::add(V::add(dot[0], dot[1]), V::add(dot[2], dot[3]))) : Acc(0);
}

template <class Isa, bool Rows, bool Dot, bool Stream, class In, class Acc, class Grad>
OMNI_TARGET void unpermute_tokens_backward(const Grad* grad_y, const In* rows, const Acc* weights, const Acc* factor,
                                           const int64_t* token_offsets, const int64_t* token_rows, int64_t H,
                                           In* grad_rows, Acc* grad_weights, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t j = token_offsets[t]; j < token_offsets[t + 1]; ++j) {
      const int64_t a = token_rows[j];
      const Acc f = factor ? factor[a] : Acc(1);
      const int64_t next = j + 1 < token_offsets[end] ? token_rows[j + 1] : a;
      const Acc dot = backward_row<Isa, Rows, Dot, Stream>(grad_y + t * H, Dot ? rows + a * H : nullptr,
                                                      Dot ? rows + next * H : nullptr,
                                                      f * (weights ? weights[a] : Acc(1)), H,
                                                      Rows ? grad_rows + a * H : nullptr);
      if (Dot) grad_weights[a] = f * dot;
    }
  }
  if (Stream) store_fence();
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::unpermute(const void* rows, const void* weights, const int64_t* token_offsets,
                                              const int64_t* token_rows, int64_t H, DType dtype_in, DType dtype_out,
                                              bool stream, void* out, int64_t begin, int64_t end) {
  with_types(dtype_in, dtype_out, [&](auto* in, auto* result) {
    using In = std::remove_pointer_t<decltype(in)>;
    using Acc = AccumulatorOf<In>;
    const auto run = [&](auto past_caches) {
      unpermute_tokens<Isa, past_caches.value>(static_cast<const In*>(rows), static_cast<const Acc*>(weights),
                                               token_offsets, token_rows, H, static_cast<decltype(result)>(out), begin,
                                               end);
    };
    if (stream) run(std::true_type{}); else run(std::false_type{});
  });
}

template <class Isa>
OMNI_TARGET void LightKernels<Isa>::unpermute_backward(const void* grad_y, const void* rows, const void* weights,
                                                       const void* factor, const int64_t* token_offsets,
                                                       const int64_t* token_rows, int64_t H, DType dtype_rows,
                                                       DType dtype_grad, bool stream, void* grad_rows,
                                                       void* grad_weights, int64_t begin, int64_t end) {
  with_types(dtype_rows, dtype_grad, [&](auto* in, auto* grad) {
    using In = std::remove_pointer_t<decltype(in)>;
    using Grad = std::remove_pointer_t<decltype(grad)>;
    using Acc = AccumulatorOf<In>;
    const auto run = [&](auto with_rows, auto with_dot, auto past_caches) {
      unpermute_tokens_backward<Isa, with_rows.value, with_dot.value, past_caches.value>(
          static_cast<const Grad*>(grad_y), static_cast<const In*>(rows), static_cast<const Acc*>(weights),
          static_cast<const Acc*>(factor), token_offsets, token_rows, H, static_cast<In*>(grad_rows),
          static_cast<Acc*>(grad_weights), begin, end);
    };
    const std::true_type yes;
    const std::false_type no;
    if (!grad_rows) return run(no, yes, no);
    if (grad_weights) return stream ? run(yes, yes, yes) : run(yes, yes, no);
    stream ? run(yes, no, yes) : run(yes, no, no);
  });
}

}  // namespace omni::cpu
