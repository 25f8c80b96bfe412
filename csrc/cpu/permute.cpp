// Token permutation: copies of a token for each of its experts, weighted sums back, and the gradients of both.
//
// All of it is bound by memory, so every kernel walks token by token: a token's row of x or of the gradient is read once
// and stays in the first-level cache while its k expert rows are written (or read). Sums run over the rows of a token in
// ascending order in fp32 registers (fp64 for F64): deterministic for any number of threads, no atomics. Results larger
// than the caches are stored past them (non-temporal), which saves reading each line before it is overwritten. The forms
// with vectors are in permute_kernels.h.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/light_kernels.h"
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

// `copy` moves one row.
template <class Copy>
void permute_range(const char* x, const int64_t* token_offsets, const int64_t* token_rows, int64_t bytes,
                   const Copy& copy, char* out, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t j = token_offsets[t]; j < token_offsets[t + 1]; ++j) {
      copy(x + t * bytes, bytes, out + token_rows[j] * bytes);
    }
  }
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
  for_token_ranges(token_offsets, T, bytes, parallel, [&](int64_t begin, int64_t end) {
    const auto run = [&](const auto& copy) {
      permute_range(static_cast<const char*>(x), token_offsets, token_rows, bytes, copy, static_cast<char*>(out), begin,
                    end);
    };
    if (stream_pays(out, bytes, num_rows) && with_vectors([&](auto isa) {
          run([](const char* from, int64_t n, char* to) { LightKernels<decltype(isa)>::copy_past_caches(from, n, to); });
          store_fence();
        }))
      return;
    run([](const char* from, int64_t n, char* to) { std::memcpy(to, from, n); });
  });
  std::memset(static_cast<char*>(out) + A * bytes, 0, (num_rows - A) * bytes);
}

void unpermute(const void* rows, const void* weights, const int64_t* token_offsets, const int64_t* token_rows, int64_t T,
               int64_t H, DType dtype_in, DType dtype_out, void* out, const Parallel& parallel) {
  const bool stream = stream_pays(out, H * size_of(dtype_out), T);
  for_token_ranges(token_offsets, T, H * size_of(dtype_in), parallel, [&](int64_t begin, int64_t end) {
    if (with_vectors([&](auto isa) {
          LightKernels<decltype(isa)>::unpermute(rows, weights, token_offsets, token_rows, H, dtype_in, dtype_out, stream,
                                                 out, begin, end);
        }))
      return;
    with_types(dtype_in, dtype_out, [&](auto* in, auto* result) {
      using In = std::remove_pointer_t<decltype(in)>;
      unpermute_portable(static_cast<const In*>(rows), static_cast<const AccumulatorOf<In>*>(weights), token_offsets,
                         token_rows, H, static_cast<decltype(result)>(out), begin, end);
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
  const bool stream = grad_rows && stream_pays(grad_rows, bytes, num_rows);
  for_token_ranges(token_offsets, T, bytes, parallel, [&](int64_t begin, int64_t end) {
    if (with_vectors([&](auto isa) {
          LightKernels<decltype(isa)>::unpermute_backward(grad_y, rows, weights, factor, token_offsets, token_rows, H,
                                                          dtype_rows, dtype_grad, stream, grad_rows, grad_weights, begin,
                                                          end);
        }))
      return;
    with_types(dtype_rows, dtype_grad, [&](auto* in, auto* grad) {
      using In = std::remove_pointer_t<decltype(in)>;
      using Acc = AccumulatorOf<In>;
      unpermute_backward_portable(static_cast<const std::remove_pointer_t<decltype(grad)>*>(grad_y),
                                  static_cast<const In*>(rows), static_cast<const Acc*>(weights),
                                  static_cast<const Acc*>(factor), token_offsets, token_rows, H,
                                  static_cast<In*>(grad_rows), static_cast<Acc*>(grad_weights), begin, end);
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
