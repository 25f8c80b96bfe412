// The CUDA kernels behind the ops, as plain C++17 without torch: csrc/bindings_cuda.cpp allocates and calls these.
//
// The counterparts of kernels.h, with the same meaning. Every pointer is device memory, `stream` is a cudaStream_t; calls
// only enqueue: none waits for the device, none allocates, none uses atomics, so results repeat bit by bit. Numbers
// of rows on the device (offsets, the entries of a map) are checked there, since reading them on the host would wait: where
// they are wrong the device stops before anything uses them. Index arrays are trusted.
// A call that CUDA or CUTLASS refuses throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace omni::cuda {

// ---- permute.cu -----------------------------------------------------------------------------------------------------
// row_token[A], row_expert[A] and token_rows[A] of map [T, E] from rank_in_expert [T, E] (its running count down each
// column, this token included), offsets[E + 1] and token_offsets[T + 1].
void fill_permutation(const bool* map, const int64_t* rank_in_expert, const int64_t* offsets, const int64_t* token_offsets,
                      int64_t T, int64_t E, int64_t A, int64_t* row_token, int64_t* row_expert, int64_t* token_rows,
                      void* stream);

// out[a] = x[row_token[a]]; rows A..num_rows are zero.
void permute(const void* x, const int64_t* row_token, int64_t A, int64_t num_rows, int64_t H, DType dtype, void* out,
             void* stream);

// out[t] = sum over the rows a of token t of weights[a] rows[a], in fp32 (fp64 for F64), rows in the order of token_rows.
// weights: null is 1; fp32, or fp64 for F64 rows. dtype_out: any of F32, BF16, F16 for such rows, F64 for F64.
void unpermute(const void* rows, const void* weights, const int64_t* token_offsets, const int64_t* token_rows, int64_t T,
               int64_t H, DType dtype_in, DType dtype_out, void* out, void* stream);

// grad_rows[a] = f[a] weights[a] g[t], grad_weights[a] = f[a] <rows[a], g[t]>; f and weights: null is 1. Either result may
// be null; rows may be null where grad_weights is. grad_rows rows A..num_rows are zero. grad_weights is fp32 (fp64).
void unpermute_backward(const void* grad_y, const void* rows, const void* weights, const void* factor,
                        const int64_t* row_token, int64_t A, int64_t num_rows, int64_t H, DType dtype_rows,
                        DType dtype_grad, void* grad_rows, void* grad_weights, void* stream);

// ---- topp_route.cu --------------------------------------------------------------------------------------------------
// As cpu::topp_route; at most kMaxSlots dynamic slots.
inline constexpr int64_t kMaxSlots = 1024;
void topp_route(const ToppRoute& r, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, void* scale,
                int64_t* k, int64_t* draw_rank, void* stream);
void topp_route_backward(const ToppRoute& r, DType dtype, const void* grad_weights, const void* grad_shared,
                         const void* weights, const void* shared_weights, const void* scale, void* grad_z, void* stream);

// ---- release_route.cu -----------------------------------------------------------------------------------------------
// As cpu::release_route and its gradient.
void release_route(const ToppRoute& r, double eps, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                   const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, int64_t* k,
                   int64_t* draw_rank, void* multiplier, void* stream);
void release_route_backward(const ToppRoute& r, double eps, DType dtype, const void* grad_weights, const void* grad_shared,
                            const void* z, const bool* mask, const bool* keep, const int64_t* draw_rank,
                            const void* multiplier, void* grad_z, void* stream);

// ---- counter_rng.cu -------------------------------------------------------------------------------------------------
// As cpu::counter_uniform.
void counter_uniform(const int64_t* sample_ids, const int64_t* positions, int64_t T, int64_t num_draws, uint64_t call,
                     float* out, void* stream);

// ---- grouped_gemm.cu ------------------------------------------------------------------------------------------------
// y[a] = x[a] w[e] for the rows a of expert e (transpose_w false: x [rows, K], y [rows, N]), or x[a] w[e]^T (true: x is
// [rows, N], y is [rows, K]); w [E, K, N]. Rows past offsets[E] are not read and come back zero.
// bf16 and fp16 accumulate in fp32. `workspace` has at least grouped_gemm_workspace(rows, E) bytes, 256-byte aligned.
size_t grouped_gemm_workspace(int64_t rows, int64_t E);
void grouped_gemm(const void* x, const void* w, const int64_t* offsets, int64_t rows, int64_t E, int64_t K, int64_t N,
                  DType dtype, bool transpose_w, void* y, void* workspace, void* stream);

// dw[e] = x_e^T dy_e, or += where accumulate; an expert without rows gives zero. dtype_dw: dtype, or F32 for 16-bit rows.
void grouped_wgrad(const void* x, const void* dy, const int64_t* offsets, int64_t rows, int64_t E, int64_t K, int64_t N,
                   DType dtype, DType dtype_dw, bool accumulate, void* dw, void* workspace, void* stream);

// ---- expert_mlp.cu --------------------------------------------------------------------------------------------------
// h = x w1 [rows, 2F] = (gate | up), a = row_weight silu(gate) up, y = a w2. w1 [E, H, 2F], w2 [E, F, H]; row_weight [rows]
// fp32 (fp64 for F64), null is 1. h is kept for the backward, `a` [rows, F] is scratch.
void expert_mlp(const void* x, const void* w1, const void* w2, const int64_t* offsets, const void* row_weight,
                int64_t rows, int64_t E, int64_t H, int64_t F, DType dtype, void* h, void* a, void* y, void* workspace,
                void* stream);

// From dy [rows, H]: dx, dw1 and dw2 (either null: not wanted; += where accumulate), drow_weight [rows] or null.
// Scratch: a [rows, F], dh [rows, 2F].
void expert_mlp_backward(const void* dy, const void* x, const void* h, const void* w1, const void* w2,
                         const int64_t* offsets, const void* row_weight, int64_t rows, int64_t E, int64_t H, int64_t F,
                         DType dtype, DType dtype_dw, bool accumulate, void* a, void* dh, void* dx, void* dw1, void* dw2,
                         void* drow_weight, void* workspace, void* stream);

}  // namespace omni::cuda
