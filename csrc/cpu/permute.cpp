// Token permutation: copies of a token for each of its experts, weighted sums back, and the gradients of both.
//
// All of it is bound by memory, so every kernel walks token by token: a token's row of x or of the gradient is read once
// and stays in the first-level cache while its k expert rows are written (or read). Sums run over the rows of a token in
// ascending order in fp32 registers (fp64 for F64): deterministic for any number of threads, no atomics. Results larger
// than the caches are stored past them (non-temporal), which saves reading each line before it is overwritten.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/vector.h"
#include "kernels.h"

namespace omni::cpu {
namespace {

constexpr int64_t kStreamBytes = int64_t{4} << 20;   // results from here on are stored past the caches
constexpr int64_t kBytesPerTask = int64_t{64} << 10;  // less is not worth another thread

// Bounds of `parts` runs of tokens with about the same number of rows to move; a token counts as one row more.
int64_t part_begin(const int64_t* token_offsets, int64_t T, int64_t parts, int64_t part) {
  const int64_t wanted = (token_offsets[T] + T) / parts * part + (token_offsets[T] + T) % parts * part / parts;
  if (part == parts) return T;
  int64_t low = 0, high = T;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (token_offsets[middle] + middle < wanted) low = middle + 1; else high = middle;
  }
  return low;
}

template <class F>
void for_token_ranges(const int64_t* token_offsets, int64_t T, int64_t row_bytes, const Parallel& parallel, const F& f) {
  const int64_t bytes = (token_offsets[T] + T) * row_bytes;
  const int64_t parts = std::clamp<int64_t>(std::min<int64_t>(bytes / kBytesPerTask, T), 1, parallel.threads);
  parallel(parts, [&](int64_t part) {
    f(part_begin(token_offsets, T, parts, part), part_begin(token_offsets, T, parts, part + 1));
  });
}

bool stream_pays(const void* out, int64_t row_bytes, int64_t num_rows) {
  return row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 && num_rows * row_bytes >= kStreamBytes;
}

// ---- permute ----------------------------------------------------------------------------------------------------------

#if OMNI_X86
OMNI_AVX512 void stream_row(char* out, const char* in, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
}
#endif

void permute_range(const char* x, const int64_t* token_offsets, const int64_t* token_rows, int64_t bytes, bool stream,
                   char* out, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t j = token_offsets[t]; j < token_offsets[t + 1]; ++j) {
#if OMNI_X86
      if (stream) {
        stream_row(out + token_rows[j] * bytes, x + t * bytes, bytes);
        continue;
      }
#endif
      std::memcpy(out + token_rows[j] * bytes, x + t * bytes, bytes);
    }
  }
  if (stream) store_fence();
}

// ---- unpermute --------------------------------------------------------------------------------------------------------

template <class In, class Out, class Acc>
void unpermute_portable(const In* rows, const Acc* weights, const int64_t* token_offsets, const int64_t* token_rows,
                        int64_t H, Out* out, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < H; h += kBlock) {
      const int64_t n = std::min(kBlock, H - h);
      Acc sum[kBlock] = {};
      for (int64_t j = token_offsets[t]; j < token_offsets[t + 1]; ++j) {
        const int64_t a = token_rows[j];
        const Acc w = weights ? weights[a] : Acc(1);
        for (int64_t i = 0; i < n; ++i) sum[i] += w * Acc(to_float(rows[a * H + h + i]));
      }
      for (int64_t i = 0; i < n; ++i) from_float(sum[i], out[t * H + h + i]);
    }
  }
}

template <class In, class Acc, class Grad>
void unpermute_backward_portable(const Grad* grad_y, const In* rows, const Acc* weights, const Acc* factor,
                                 const int64_t* token_offsets, const int64_t* token_rows, int64_t H, In* grad_rows,
                                 Acc* grad_weights, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Grad* g = grad_y + t * H;
    for (int64_t j = token_offsets[t]; j < token_offsets[t + 1]; ++j) {
      const int64_t a = token_rows[j];
      const Acc f = factor ? factor[a] : Acc(1);
      if (grad_weights) {
        Acc part[8] = {};  // eight partial sums: less rounding, and room for the compiler
        for (int64_t i = 0; i < H; ++i) part[i % 8] += Acc(to_float(rows[a * H + i])) * Acc(to_float(g[i]));
        grad_weights[a] = f * (((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])));
      }
      if (grad_rows) {
        const Acc scale = f * (weights ? weights[a] : Acc(1));
        for (int64_t i = 0; i < H; ++i) from_float(scale * Acc(to_float(g[i])), grad_rows[a * H + i]);
      }
    }
  }
}

#if OMNI_X86

// Asks for the U vectors that a later loop reads at p: a row begins on a page of its own, which the processor does not
// foresee by itself. Into the second-level cache, which waits for more lines at once than the first.
template <int U, class Acc, class In>
OMNI_AVX512 inline void prefetch(const In* p) {
  for (size_t byte = 0; byte < U * Vector<Acc>::width * sizeof(In); byte += 64)
    _mm_prefetch(reinterpret_cast<const char*>(p) + byte, _MM_HINT_T1);
}

// y = (First ? 0 : sum) + the weighted sum of R rows, read side by side from end to end. `next` are the rows after these.
template <int R, bool First, bool Stream, class In, class Out, class Acc>
OMNI_AVX512 void add_rows(const In* rows, const Acc* weights, const int64_t* row, const int64_t* next, int64_t H,
                          const Acc* sum, Out* y) {
  using V = Vector<Acc>;
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
      prefetch<kUnroll, Acc>(ahead[r] + h);
      for (int u = 0; u < kUnroll; ++u) v[u] = V::fma(V::load(p[r] + h + u * V::width), w[r], v[u]);
    }
    for (int u = 0; u < kUnroll; ++u) V::template store<Stream>(y + h + u * V::width, v[u]);
  }
  for (; h < H; h += V::width) {
    const int64_t n = std::min<int64_t>(V::width, H - h);
    typename V::type v = First ? V::zero() : V::load_part(sum + h, n);
    for (int r = 0; r < R; ++r) v = V::fma(V::load_part(p[r] + h, n), w[r], v);
    V::store_part(y + h, v, n);
  }
}

constexpr int kRowsAtOnce = 4;

template <bool First, bool Stream, class In, class Out, class Acc>
OMNI_AVX512 void add_some_rows(int64_t k, const In* rows, const Acc* weights, const int64_t* row, const int64_t* next,
                               int64_t H, const Acc* sum, Out* y) {
  if (k == 4) return add_rows<4, First, Stream>(rows, weights, row, next, H, sum, y);
  if (k == 3) return add_rows<3, First, Stream>(rows, weights, row, next, H, sum, y);
  if (k == 2) return add_rows<2, First, Stream>(rows, weights, row, next, H, sum, y);
  return add_rows<1, First, Stream>(rows, weights, row, next, H, sum, y);
}

// Up to four rows of a token at once: their sum never leaves the registers; of more rows it goes by a row of scratch that
// stays in the first-level cache.
template <bool Stream, class In, class Out, class Acc>
OMNI_AVX512 void unpermute_avx512(const In* rows, const Acc* weights, const int64_t* token_offsets,
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
      if (j == last && first) add_some_rows<true, Stream>(k, rows, weights, row, next, H, sum, y);
      else if (j == last) add_some_rows<false, Stream>(k, rows, weights, row, next, H, sum, y);
      else if (first) add_rows<kRowsAtOnce, true, false>(rows, weights, row, next, H, sum, sum);
      else add_rows<kRowsAtOnce, false, false>(rows, weights, row, next, H, sum, sum);
    }
  }
  if (Stream) store_fence();
}

// One row: grad_row = scale g and the dot product of row and g.
template <bool Rows, bool Dot, bool Stream, class In, class Acc, class Grad>
OMNI_AVX512 inline Acc backward_row(const Grad* g, const In* row, const In* next_row, Acc scale, int64_t H,
                                    In* grad_row) {
  using V = Vector<Acc>;
  constexpr int kUnroll = 4;
  const typename V::type s = V::broadcast(scale);
  typename V::type dot[kUnroll];
  for (int u = 0; u < kUnroll; ++u) dot[u] = V::zero();
  int64_t h = 0;
  for (; h + kUnroll * V::width <= H; h += kUnroll * V::width) {
    if (Dot) prefetch<kUnroll, Acc>(next_row + h);
    for (int u = 0; u < kUnroll; ++u) {
      const typename V::type v = V::load(g + h + u * V::width);
      if (Dot) dot[u] = V::fma(V::load(row + h + u * V::width), v, dot[u]);
      if (Rows) V::template store<Stream>(grad_row + h + u * V::width, V::mul(v, s));
    }
  }
  for (; h < H; h += V::width) {
    const int64_t n = std::min<int64_t>(V::width, H - h);
    const typename V::type v = V::load_part(g + h, n);
    if (Dot) dot[0] = V::fma(V::load_part(row + h, n), v, dot[0]);
    if (Rows) V::store_part(grad_row + h, V::mul(v, s), n);
  }
  return Dot ? V::sum(V::add(V::add(dot[0], dot[1]), V::add(dot[2], dot[3]))) : Acc(0);
}

template <bool Rows, bool Dot, bool Stream, class In, class Acc, class Grad>
OMNI_AVX512 void unpermute_backward_avx512(const Grad* grad_y, const In* rows, const Acc* weights, const Acc* factor,
                                           const int64_t* token_offsets, const int64_t* token_rows, int64_t H,
                                           In* grad_rows, Acc* grad_weights, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t j = token_offsets[t]; j < token_offsets[t + 1]; ++j) {
      const int64_t a = token_rows[j];
      const Acc f = factor ? factor[a] : Acc(1);
      const int64_t next = j + 1 < token_offsets[end] ? token_rows[j + 1] : a;
      const Acc dot = backward_row<Rows, Dot, Stream>(grad_y + t * H, Dot ? rows + a * H : nullptr,
                                                      Dot ? rows + next * H : nullptr,
                                                      f * (weights ? weights[a] : Acc(1)), H,
                                                      Rows ? grad_rows + a * H : nullptr);
      if (Dot) grad_weights[a] = f * dot;
    }
  }
  if (Stream) store_fence();
}

#endif  // OMNI_X86

// f with a null pointer of the element type: f(float*), f(Bf16*), f(Half*); F64 has its own path.
template <class F>
void with_type(DType dtype, const F& f) {
  if (dtype == DType::F32) f(static_cast<float*>(nullptr));
  if (dtype == DType::BF16) f(static_cast<Bf16*>(nullptr));
  if (dtype == DType::F16) f(static_cast<Half*>(nullptr));
}

template <class In, class Out, class Acc>
void unpermute_typed(const In* rows, const Acc* weights, const int64_t* token_offsets, const int64_t* token_rows,
                     int64_t T, int64_t H, Out* out, const Parallel& parallel) {
  const bool stream = stream_pays(out, H * sizeof(Out), T);
  for_token_ranges(token_offsets, T, H * sizeof(In), parallel, [&](int64_t begin, int64_t end) {
#if OMNI_X86
    if (has_avx512()) {
      if (stream) return unpermute_avx512<true>(rows, weights, token_offsets, token_rows, H, out, begin, end);
      return unpermute_avx512<false>(rows, weights, token_offsets, token_rows, H, out, begin, end);
    }
#endif
    unpermute_portable(rows, weights, token_offsets, token_rows, H, out, begin, end);
  });
}

template <class In, class Acc, class Grad>
void unpermute_backward_typed(const Grad* grad_y, const In* rows, const Acc* weights, const Acc* factor,
                              const int64_t* token_offsets, const int64_t* token_rows, int64_t T, int64_t num_rows,
                              int64_t H, In* grad_rows, Acc* grad_weights, const Parallel& parallel) {
  for_token_ranges(token_offsets, T, H * sizeof(In), parallel, [&](int64_t begin, int64_t end) {
#if OMNI_X86
    if (has_avx512()) {
      const auto run = [&](auto with_rows, auto with_dot, auto stream) {
        unpermute_backward_avx512<with_rows.value, with_dot.value, stream.value>(
            grad_y, rows, weights, factor, token_offsets, token_rows, H, grad_rows, grad_weights, begin, end);
      };
      const std::true_type yes;
      const std::false_type no;
      if (!grad_rows) return run(no, yes, no);
      const bool stream = stream_pays(grad_rows, H * sizeof(In), num_rows);
      if (grad_weights) return stream ? run(yes, yes, yes) : run(yes, yes, no);
      return stream ? run(yes, no, yes) : run(yes, no, no);
    }
#endif
    unpermute_backward_portable(grad_y, rows, weights, factor, token_offsets, token_rows, H, grad_rows, grad_weights,
                                begin, end);
  });
}

// f(e) for every expert e of a token, ascending: eight map entries at a time, most of which are false.
template <class F>
void for_each_expert(const bool* row, int64_t E, const F& f) {
  int64_t e = 0;
  for (; e + 8 <= E; e += 8) {
    uint64_t word;
    std::memcpy(&word, row + e, 8);
    if (word == 0) continue;
    for (int64_t i = 0; i < 8; ++i)
      if (row[e + i]) f(e + i);
  }
  for (; e < E; ++e)
    if (row[e]) f(e);
}

}  // namespace

int64_t count_assignments(const bool* map, int64_t stride, int64_t T, int64_t E, int64_t* offsets,
                          int64_t* token_offsets) {
  std::fill(offsets, offsets + E + 1, 0);
  int64_t count = 0;
  for (int64_t t = 0; t < T; ++t) {
    token_offsets[t] = count;
    for_each_expert(map + t * stride, E, [&](int64_t e) { ++offsets[e + 1]; ++count; });
  }
  token_offsets[T] = count;
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  return count;
}

void fill_permutation(const bool* map, int64_t stride, int64_t T, int64_t E, const int64_t* offsets, int64_t* next_row,
                      int64_t* row_token, int64_t* row_expert, int64_t* token_rows) {
  std::copy(offsets, offsets + E, next_row);
  for (int64_t t = 0; t < T; ++t) {
    for_each_expert(map + t * stride, E, [&](int64_t e) {
      const int64_t row = next_row[e]++;
      row_token[row] = t;
      row_expert[row] = e;
      *token_rows++ = row;
    });
  }
}

void permute(const void* x, const int64_t* token_offsets, const int64_t* token_rows, int64_t T, int64_t A,
             int64_t num_rows, int64_t H, DType dtype, void* out, const Parallel& parallel) {
  const int64_t bytes = H * size_of(dtype);
  const bool stream = has_avx512() && stream_pays(out, bytes, num_rows);
  for_token_ranges(token_offsets, T, bytes, parallel, [&](int64_t begin, int64_t end) {
    permute_range(static_cast<const char*>(x), token_offsets, token_rows, bytes, stream, static_cast<char*>(out), begin,
                  end);
  });
  std::memset(static_cast<char*>(out) + A * bytes, 0, (num_rows - A) * bytes);
}

void unpermute(const void* rows, const void* weights, const int64_t* token_offsets, const int64_t* token_rows, int64_t T,
               int64_t H, DType dtype_in, DType dtype_out, void* out, const Parallel& parallel) {
  if (dtype_in == DType::F64) {
    return unpermute_typed(static_cast<const double*>(rows), static_cast<const double*>(weights), token_offsets,
                           token_rows, T, H, static_cast<double*>(out), parallel);
  }
  with_type(dtype_in, [&](auto* in) {
    with_type(dtype_out, [&](auto* result) {
      unpermute_typed(static_cast<const std::remove_pointer_t<decltype(in)>*>(rows), static_cast<const float*>(weights),
                      token_offsets, token_rows, T, H, static_cast<decltype(result)>(out), parallel);
    });
  });
}

void unpermute_backward(const void* grad_y, const void* rows, const void* weights, const void* factor,
                        const int64_t* token_offsets, const int64_t* token_rows, int64_t T, int64_t A, int64_t num_rows,
                        int64_t H, DType dtype_rows, DType dtype_grad, void* grad_rows, void* grad_weights,
                        const Parallel& parallel) {
  const int64_t bytes = H * size_of(dtype_rows);
  if (grad_rows) std::memset(static_cast<char*>(grad_rows) + A * bytes, 0, (num_rows - A) * bytes);
  if (!grad_rows && !grad_weights) return;
  if (dtype_rows == DType::F64) {
    return unpermute_backward_typed(static_cast<const double*>(grad_y), static_cast<const double*>(rows),
                                    static_cast<const double*>(weights), static_cast<const double*>(factor),
                                    token_offsets, token_rows, T, num_rows, H, static_cast<double*>(grad_rows),
                                    static_cast<double*>(grad_weights), parallel);
  }
  with_type(dtype_rows, [&](auto* in) {
    with_type(dtype_grad, [&](auto* grad) {
      unpermute_backward_typed(static_cast<const std::remove_pointer_t<decltype(grad)>*>(grad_y),
                               static_cast<const std::remove_pointer_t<decltype(in)>*>(rows),
                               static_cast<const float*>(weights), static_cast<const float*>(factor), token_offsets,
                               token_rows, T, num_rows, H, static_cast<decltype(in)>(grad_rows),
                               static_cast<float*>(grad_weights), parallel);
    });
  });
}

void gather_entries(const void* values, int64_t token_stride, int64_t expert_stride, const int64_t* row_token,
                    const int64_t* row_expert, int64_t A, int64_t item_bytes, void* out) {
  const auto run = [&](auto* item) {
    using Item = std::remove_pointer_t<decltype(item)>;
    for (int64_t a = 0; a < A; ++a)
      static_cast<Item*>(out)[a] =
          static_cast<const Item*>(values)[row_token[a] * token_stride + row_expert[a] * expert_stride];
  };
  if (item_bytes == 2) run(static_cast<uint16_t*>(nullptr));
  if (item_bytes == 4) run(static_cast<uint32_t*>(nullptr));
  if (item_bytes == 8) run(static_cast<uint64_t*>(nullptr));
}

void scatter_entries(const void* entries, const int64_t* row_token, const int64_t* row_expert, int64_t A, int64_t T,
                     int64_t E, int64_t item_bytes, void* out) {
  std::memset(out, 0, T * E * item_bytes);
  const auto run = [&](auto* item) {
    using Item = std::remove_pointer_t<decltype(item)>;
    for (int64_t a = 0; a < A; ++a)
      static_cast<Item*>(out)[row_token[a] * E + row_expert[a]] = static_cast<const Item*>(entries)[a];
  };
  if (item_bytes == 2) run(static_cast<uint16_t*>(nullptr));
  if (item_bytes == 4) run(static_cast<uint32_t*>(nullptr));
  if (item_bytes == 8) run(static_cast<uint64_t*>(nullptr));
}

}  // namespace omni::cpu
