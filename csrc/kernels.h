// The kernels behind the ops of megatron_omni, as plain C++17 without torch: csrc/bindings.cpp (and bindings_cuda.cpp)
// check arguments, allocate results and call these. Every pointer is to contiguous memory; sizes are in elements.
// T tokens, E experts, A assignments (token, expert), H hidden, F ffn, K and N the sides of a weight.
#pragma once

#include <cstdint>

namespace omni {

// 16-bit values are passed as raw uint16_t.
enum class DType : int32_t { F32 = 0, BF16 = 1, F16 = 2, F64 = 3 };

inline int64_t size_of(DType d) { return d == DType::F64 ? 8 : d == DType::F32 ? 4 : 2; }

// How a CPU kernel runs its tasks. The bindings hand in torch's own intra-op pool, so that there is one pool.
struct Parallel {
  int threads;  // that a call may use at once
  void (*run)(int64_t num_tasks, void (*task)(void* context, int64_t index), void* context);

  // run f(index) for index in 0..num_tasks; tasks may run in any order and at the same time
  template <class F>
  void operator()(int64_t num_tasks, const F& f) const {
    if (num_tasks <= 1 || threads <= 1) {
      for (int64_t i = 0; i < num_tasks; ++i) f(i);
      return;
    }
    run(num_tasks, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, const_cast<F*>(&f));
  }
};

enum class Estimator : int32_t { None = 0, Grin = 1, Paper = 2 };

struct ToppRoute {
  int64_t T, num_dynamic, num_shared, num_routed;
  double top_p;
  int64_t top_k;       // 0: by top_p
  int64_t max_routed;  // < 0: no cap
  Estimator estimator;
};

namespace cpu {

// ---- permute.cpp ----------------------------------------------------------------------------------------------------
// The metadata of a routing map: offsets[E + 1] rows of each expert, row_token[A], row_expert[A] (expert-major, tokens
// in order), token_offsets[T + 1] and token_rows[A] (token-major: the rows of each token, ascending).

// Number of true entries of map[t * stride + e].
int64_t count_assignments(const bool* map, int64_t stride, int64_t T, int64_t E, int64_t* offsets, int64_t* token_offsets);
// Fills the rest from the offsets that count_assignments wrote; next_row[E] is scratch.
void fill_permutation(const bool* map, int64_t stride, int64_t T, int64_t E, const int64_t* offsets, int64_t* next_row,
                      int64_t* row_token, int64_t* row_expert, int64_t* token_rows);

// out[a] = x[row_token[a]]; rows A..num_rows are zero.
void permute(const void* x, const int64_t* token_offsets, const int64_t* token_rows, int64_t T, int64_t A,
             int64_t num_rows, int64_t H, DType dtype, void* out, const Parallel& parallel);

// out[t] = sum over the rows a of token t of weights[a] rows[a], in fp32 (fp64 for F64), rows ascending. weights: null is
// 1; fp32, or fp64 for F64 rows. dtype_out: any for F32/BF16/F16 rows but F64, F64 for F64.
void unpermute(const void* rows, const void* weights, const int64_t* token_offsets, const int64_t* token_rows, int64_t T,
               int64_t H, DType dtype_in, DType dtype_out, void* out, const Parallel& parallel);

// grad_rows[a] = f[a] weights[a] g[t], grad_weights[a] = f[a] <rows[a], g[t]>; f and weights: null is 1. Either result
// may be null; rows may be null where grad_weights is. grad_rows rows A..num_rows are zero. grad_weights is fp32 (fp64).
void unpermute_backward(const void* grad_y, const void* rows, const void* weights, const void* factor,
                        const int64_t* token_offsets, const int64_t* token_rows, int64_t T, int64_t A, int64_t num_rows,
                        int64_t H, DType dtype_rows, DType dtype_grad, void* grad_rows, void* grad_weights,
                        const Parallel& parallel);

// out[a] = values[row_token[a], row_expert[a]], values with strides in items of 2, 4 or 8 bytes; and back into a matrix
// [T, E] that is zero elsewhere.
void gather_entries(const void* values, int64_t token_stride, int64_t expert_stride, const int64_t* row_token,
                    const int64_t* row_expert, int64_t A, int64_t item_bytes, void* out);
void scatter_entries(const void* entries, const int64_t* row_token, const int64_t* row_expert, int64_t A, int64_t T,
                     int64_t E, int64_t item_bytes, void* out);

// ---- grouped_gemm.cpp -----------------------------------------------------------------------------------------------
// y[a] = x[a] w[e] for the rows a of expert e (transpose_w false: x [rows, K], y [rows, N]), or x[a] w[e]^T (true: x is
// [rows, N], y is [rows, K]); w [E, K, N]. Rows past offsets[E] are not read and come back zero. bf16 and fp16 accumulate
// in fp32.
void grouped_gemm(const void* x, const void* w, const int64_t* offsets, int64_t rows, int64_t E, int64_t K, int64_t N,
                  bool transpose_w, DType dtype, void* y, const Parallel& parallel);

// dw[e] = x_e^T dy_e, or += where accumulate (dtype_dw F32, or F64 for F64). An expert without rows gives zero, adds
// nothing. dtype_dw: dtype, or F32 for 16-bit rows.
void grouped_wgrad(const void* x, const void* dy, const int64_t* offsets, int64_t E, int64_t K, int64_t N, DType dtype,
                   DType dtype_dw, bool accumulate, void* dw, const Parallel& parallel);

// ---- expert_mlp.cpp -------------------------------------------------------------------------------------------------
// h = x w1 [rows, 2F] = (gate | up), a = row_weight silu(gate) up, y = a w2. w1 [E, H, 2F], w2 [E, F, H]; row_weight
// [rows] fp32 (fp64 for F64), null is 1. h is kept for the backward, `a` [rows, F] is scratch.
void expert_mlp(const void* x, const void* w1, const void* w2, const int64_t* offsets, const void* row_weight, int64_t rows,
                int64_t E, int64_t H, int64_t F, DType dtype, void* h, void* a, void* y, const Parallel& parallel);

// From dy [rows, H]: dx, dw1, dw2 (as grouped_wgrad has them) and drow_weight [rows], each null where it is not wanted.
// Scratch: a [rows, F], dh [rows, 2F].
void expert_mlp_backward(const void* dy, const void* x, const void* h, const void* w1, const void* w2,
                         const int64_t* offsets, const void* row_weight, int64_t rows, int64_t E, int64_t H, int64_t F,
                         DType dtype, DType dtype_dw, bool accumulate, void* a, void* dh, void* dx, void* dw1, void* dw2,
                         void* drow_weight, const Parallel& parallel);

// ---- topp_route.cpp -------------------------------------------------------------------------------------------------
// z[T, num_dynamic + num_shared]; gumbel, bernoulli and keep [T, num_dynamic] and padding [T] may be null. A slot that
// keep denies is not selected, nor is another in its place. F32 or F64.
void topp_route(const ToppRoute& r, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, void* scale, int64_t* k,
                int64_t* draw_rank, const Parallel& parallel);
// grad_z[T, num_dynamic + num_shared] from the gradients of weights and shared weights (either may be null: zero).
void topp_route_backward(const ToppRoute& r, DType dtype, const void* grad_weights, const void* grad_shared,
                         const void* weights, const void* shared_weights, const void* scale, void* grad_z,
                         const Parallel& parallel);

// ---- release_route.cpp ----------------------------------------------------------------------------------------------
// The routing of the published code (release_route.h): gumbel [T, num_dynamic, num_dynamic], eps the share of a logit that
// makes a near tie, multiplier [T, num_dynamic] what the backward needs beside mask and draw_rank. bernoulli null: no
// scale; the estimator of r is not read.
void release_route(const ToppRoute& r, double eps, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                   const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, int64_t* k,
                   int64_t* draw_rank, void* multiplier, const Parallel& parallel);
void release_route_backward(const ToppRoute& r, double eps, DType dtype, const void* grad_weights, const void* grad_shared,
                            const void* z, const bool* mask, const bool* keep, const int64_t* draw_rank,
                            const void* multiplier, void* grad_z, const Parallel& parallel);

// ---- cached_attention.cpp -------------------------------------------------------------------------------------------
// out[t, g, h] = sum over j of softmax_j(scale query[t, g, h] . keys[j, g]) values[j, g] over the counts[t] positions j that
// end at places[t]; of no positions, and of tokens from `known` on, zero. keys and values [N, groups, D], out [T, groups,
// heads, D]; strides of query in elements, its last one is 1. bf16 and fp16 are computed in fp32.
struct CachedAttention {
  int64_t T, known, groups, heads, D;
  int64_t token_stride, group_stride, head_stride;
  double scale;
  const void *query, *keys, *values;
  const int64_t *places, *counts;
  void* out;
};
void cached_attention(const CachedAttention& a, DType dtype, const Parallel& parallel);

// ---- dit.cpp ----------------------------------------------------------------------------------------------------------
// fp32; H and D are multiples of 16. B pictures of T rows.

// y = residual + f x / sqrt(mean x^2 + eps), f = weight factor[b]; factor [B, H] and residual may be null (1, 0). rstd [B, T]
// is for the backward, which gives grad_x and sums [B, H] of grad x rstd over a picture's rows.
struct ModulatedNorm {
  int64_t B, T, H;
  float eps;
  const float *x, *weight, *factor, *residual, *grad;
  float *y, *rstd, *grad_x, *sums;
};
void modulated_norm(const ModulatedNorm& a, const Parallel& parallel);
void modulated_norm_backward(const ModulatedNorm& a, const Parallel& parallel);

// LayerNorm of rows x [B, T, heads D], whose channel pairs then turn by turns [T, D / 2] (cos, sin): y [B, heads, T, D].
// stats [B, T] (mean, 1 / deviation) are for the backward, which gives grad_x and a row a picture of the sums of weight's
// and bias' gradients.
struct RotaryNorm {
  int64_t B, T, heads, D;
  float eps;
  const float *x, *weight, *bias, *turns, *grad;
  float *y, *stats, *grad_x, *weight_sums, *bias_sums;
};
void rotary_norm(const RotaryNorm& a, const Parallel& parallel);
void rotary_norm_backward(const RotaryNorm& a, const Parallel& parallel);

// y = silu(gate) up, n elements
struct SwiGlu {
  int64_t n;
  const float *gate, *up, *grad;
  float *y, *grad_gate, *grad_up;
};
void swiglu(const SwiGlu& a, const Parallel& parallel);
void swiglu_backward(const SwiGlu& a, const Parallel& parallel);

// out[b, t, h] = sum over segments of gate[h] softmax(scale q[b, h, t] . keys) values: attention of the same queries to
// several sets of rows, each with a softmax of its own. query [B, heads, T, D], out [B, T, heads D]; strides of keys and
// values in elements; mask [B, count] null: all rows count; gate [heads] null: 1. A segment without rows adds nothing.
// The backward adds to grad_keys and grad_values, laid out as keys and values; grad_gate [B, heads] may be null.
constexpr int kSegments = 3;  // patches, vision, caption
struct Strides { int64_t picture, group, row; };
struct Segment {
  int64_t count;
  float scale;
  const float *keys, *values, *gate;
  Strides keys_at, values_at;
  const bool* mask;
  float *grad_keys, *grad_values, *grad_gate;
};
struct JointAttention {
  int64_t B, T, heads, groups, D;
  Segment segments[kSegments];
  const float *query, *grad;
  float *out, *grad_query;
};
void joint_attention(const JointAttention& a, const Parallel& parallel);
void joint_attention_backward(const JointAttention& a, const Parallel& parallel);

// ---- counter_rng.cpp ------------------------------------------------------------------------------------------------
// out[t, i] in (0, 1): hash of call (the constants of the call, already mixed), sample_ids[t], positions[t] and i.
void counter_uniform(const int64_t* sample_ids, const int64_t* positions, int64_t T, int64_t num_draws, uint64_t call,
                     float* out, const Parallel& parallel);

}  // namespace cpu
}  // namespace omni
