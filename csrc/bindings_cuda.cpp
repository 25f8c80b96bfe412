// The CUDA side of the ops: checks, allocation on the current device, calls to kernels_cuda.h on the current stream.
//
// Schemas, gradients and fake kernels are those of bindings.cpp, which is loaded first. Shapes and dtypes are checked;
// what index tensors and offsets hold is not, because reading it would wait for the device. Nothing here waits, but for
// build_permutation without `num_assignments`.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "kernels_cuda.h"

namespace {

using at::Tensor;
using omni::accumulator_of;
using omni::check;
using omni::check_main_grads;
using omni::data_or_null;
using omni::DType;
using omni::dtype_of;
using std::optional;

void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

const int64_t* index(const Tensor& x) { return x.const_data_ptr<int64_t>(); }

// ---- permute ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build_permutation(const Tensor& routing_map,
                                                                     optional<int64_t> num_assignments) {
  TORCH_CHECK_VALUE(routing_map.scalar_type() == at::kBool, "routing_map: dtype ", routing_map.scalar_type(),
                    " must be bool");
  TORCH_CHECK_VALUE(routing_map.dim() == 2, "routing_map: has ", routing_map.dim(), " dimensions, must have 2");
  const c10::cuda::CUDAGuard guard(routing_map.device());
  const int64_t T = routing_map.size(0), E = routing_map.size(1);
  const Tensor map = routing_map.contiguous();
  const auto options = map.options().dtype(at::kLong);
  const Tensor zero = at::zeros({1}, options);
  const Tensor offsets = at::cat({zero, at::cumsum(at::sum(map, 0, false, at::kLong), 0)});
  const Tensor token_offsets = at::cat({zero, at::cumsum(at::sum(map, 1, false, at::kLong), 0)});
  const int64_t A = num_assignments ? *num_assignments : offsets[E].item<int64_t>();
  TORCH_CHECK_VALUE(A >= 0 && A <= T * E, "num_assignments: ", A, " is not in 0..", T * E, ", the entries of routing_map");
  Tensor row_token = at::empty({A}, options), row_expert = at::empty({A}, options), token_rows = at::empty({A}, options);
  const Tensor rank = at::cumsum(map, 0, at::kLong);
  omni::cuda::fill_permutation(map.const_data_ptr<bool>(), index(rank), index(offsets), index(token_offsets), T, E, A,
                               row_token.mutable_data_ptr<int64_t>(), row_expert.mutable_data_ptr<int64_t>(),
                               token_rows.mutable_data_ptr<int64_t>(), stream());
  return {offsets, row_token, row_expert, token_offsets, token_rows};
}

Tensor permute(const Tensor& x, const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows,
               int64_t num_rows) {
  const DType dtype = dtype_of(x, "x");
  check(x, x, x.scalar_type(), {-1, -1}, "x");
  const int64_t A = row_token.numel();
  check(row_token, x, at::kLong, {A}, "row_token");
  TORCH_CHECK_VALUE(num_rows >= A, "num_rows: ", num_rows, " output rows cannot hold ", A, " assignments");
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor out = at::empty({num_rows, x.size(1)}, x.options());
  omni::cuda::permute(x.const_data_ptr(), index(row_token), A, num_rows, x.size(1), dtype, out.mutable_data_ptr(),
                      stream());
  return out;
}

Tensor unpermute(const Tensor& rows, const optional<Tensor>& weights, const Tensor& row_token,
                 const Tensor& token_offsets, const Tensor& token_rows, int64_t num_tokens,
                 const optional<Tensor>& gradient_factor, at::ScalarType out_dtype) {
  const DType dtype = dtype_of(rows, "rows");
  check(rows, rows, rows.scalar_type(), {-1, -1}, "rows");
  const int64_t A = token_rows.numel(), H = rows.size(1);
  TORCH_CHECK_VALUE(rows.size(0) >= A, "rows: has ", rows.size(0), " rows for ", A, " assignments");
  TORCH_CHECK_VALUE(num_tokens >= 0, "num_tokens: ", num_tokens, " must not be negative");
  check(weights, rows, accumulator_of(dtype), {A}, "weights");
  check(gradient_factor, rows, accumulator_of(dtype), {A}, "gradient_factor");
  check(token_offsets, rows, at::kLong, {num_tokens + 1}, "token_offsets");
  check(token_rows, rows, at::kLong, {A}, "token_rows");
  const c10::cuda::CUDAGuard guard(rows.device());
  Tensor out = at::empty({num_tokens, H}, rows.options().dtype(out_dtype));
  const DType result = dtype_of(out, "out_dtype");
  TORCH_CHECK_VALUE((dtype == DType::F64) == (result == DType::F64), "out_dtype: dtype ", out_dtype,
                    " does not go with rows of ", rows.scalar_type());
  omni::cuda::unpermute(rows.const_data_ptr(), data_or_null(weights), index(token_offsets), index(token_rows), num_tokens,
                        H, dtype, result, out.mutable_data_ptr(), stream());
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& rows, const optional<Tensor>& weights,
                                              const optional<Tensor>& gradient_factor, const Tensor& row_token,
                                              const Tensor& token_offsets, const Tensor& token_rows, bool needs_rows,
                                              bool needs_weights) {
  const DType dtype = dtype_of(rows, "rows"), grad_dtype = dtype_of(grad, "grad");
  check(rows, rows, rows.scalar_type(), {-1, -1}, "rows");
  const int64_t A = row_token.numel(), H = rows.size(1);
  check(grad, rows, grad.scalar_type(), {-1, H}, "grad");
  TORCH_CHECK_VALUE((dtype == DType::F64) == (grad_dtype == DType::F64), "grad: dtype ", grad.scalar_type(),
                    " does not go with rows of ", rows.scalar_type());
  TORCH_CHECK_VALUE(rows.size(0) >= A, "rows: has ", rows.size(0), " rows for ", A, " assignments");
  check(weights, rows, accumulator_of(dtype), {A}, "weights");
  check(gradient_factor, rows, accumulator_of(dtype), {A}, "gradient_factor");
  check(row_token, rows, at::kLong, {A}, "row_token");
  const c10::cuda::CUDAGuard guard(rows.device());
  Tensor grad_rows = at::empty({needs_rows ? rows.size(0) : 0, H}, rows.options());
  Tensor grad_weights = at::empty({needs_weights ? A : 0}, rows.options().dtype(accumulator_of(dtype)));
  omni::cuda::unpermute_backward(grad.const_data_ptr(), rows.const_data_ptr(), data_or_null(weights),
                                 data_or_null(gradient_factor), index(row_token), A, needs_rows ? rows.size(0) : A, H,
                                 dtype, grad_dtype, needs_rows ? grad_rows.mutable_data_ptr() : nullptr,
                                 needs_weights ? grad_weights.mutable_data_ptr() : nullptr, stream());
  return {grad_rows, grad_weights};
}

Tensor gather_assignments(const Tensor& values, const Tensor& row_token, const Tensor& row_expert) {
  TORCH_CHECK_VALUE(values.dim() == 2, "values: has ", values.dim(), " dimensions, must have 2");
  check(row_token, values, at::kLong, {row_token.numel()}, "row_token");
  check(row_expert, values, at::kLong, {row_token.numel()}, "row_expert");
  return at::index(values, {row_token, row_expert});
}

Tensor scatter_assignments(const Tensor& entries, const Tensor& row_token, const Tensor& row_expert, int64_t num_tokens,
                           int64_t num_experts) {
  const int64_t A = entries.numel();
  check(entries, entries, entries.scalar_type(), {A}, "entries");
  check(row_token, entries, at::kLong, {A}, "row_token");
  check(row_expert, entries, at::kLong, {A}, "row_expert");
  Tensor out = at::zeros({num_tokens, num_experts}, entries.options());
  return at::index_put_(out, {row_token, row_expert}, entries);  // no (token, expert) comes twice: plain writes
}

// ---- topp_route ------------------------------------------------------------------------------------------------------

void check_logits(const Tensor& z, const char* name) {
  TORCH_CHECK_VALUE(z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble, name, ": dtype ", z.scalar_type(),
                    " must be float32 or float64");
  check(z, z, z.scalar_type(), {-1, -1}, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topp_route(
    const Tensor& z, int64_t num_routed, int64_t num_null, double top_p, optional<int64_t> top_k,
    c10::string_view estimator, const optional<Tensor>& gumbel, const optional<Tensor>& bernoulli,
    optional<int64_t> max_routed, const optional<Tensor>& padding, const optional<Tensor>& keep) {
  const omni::ToppRoute r = omni::route_of(z, num_routed, num_null, top_p, top_k, omni::estimator_of(estimator), max_routed);
  const int64_t T = r.T, slots = r.num_dynamic, shared = r.num_shared;
  TORCH_CHECK_VALUE(slots <= omni::cuda::kMaxSlots, "num_routed: ", slots, " dynamic slots, at most ",
                    omni::cuda::kMaxSlots, " on CUDA");
  check(gumbel, z, z.scalar_type(), {T, slots}, "gumbel");
  check(bernoulli, z, z.scalar_type(), {T, slots}, "bernoulli");
  check(padding, z, at::kBool, {T}, "padding");
  check(keep, z, at::kBool, {T, slots}, "keep");
  const c10::cuda::CUDAGuard guard(z.device());
  const auto integers = z.options().dtype(at::kLong);
  Tensor mask = at::empty({T, slots}, z.options().dtype(at::kBool)), weights = at::empty({T, slots}, z.options());
  Tensor shared_weights = at::empty({T, shared}, z.options()), scale = at::empty({T, slots}, z.options());
  Tensor k = at::empty({T}, integers), draw_rank = at::empty({T, slots}, integers);
  omni::cuda::topp_route(r, dtype_of(z, "z"), z.const_data_ptr(), data_or_null(gumbel), data_or_null(bernoulli),
                         omni::bool_or_null(padding), omni::bool_or_null(keep),
                         mask.mutable_data_ptr<bool>(), weights.mutable_data_ptr(), shared_weights.mutable_data_ptr(),
                         scale.mutable_data_ptr(), k.mutable_data_ptr<int64_t>(), draw_rank.mutable_data_ptr<int64_t>(),
                         stream());
  return {weights, shared_weights, mask, scale, k, draw_rank};
}

Tensor topp_route_backward(const optional<Tensor>& grad_weights, const optional<Tensor>& grad_shared,
                           const Tensor& weights, const Tensor& shared_weights, const Tensor& scale,
                           c10::string_view estimator) {
  check_logits(weights, "weights");
  const int64_t T = weights.size(0), slots = weights.size(1), shared = shared_weights.size(1);
  const auto dtype = weights.scalar_type();
  check(shared_weights, weights, dtype, {T, shared}, "shared_weights");
  check(scale, weights, dtype, {T, slots}, "scale");
  check(grad_weights, weights, dtype, {T, slots}, "grad_weights");
  check(grad_shared, weights, dtype, {T, shared}, "grad_shared");
  const c10::cuda::CUDAGuard guard(weights.device());
  const omni::ToppRoute r{T, slots, shared, slots, 0, 0, -1, omni::estimator_of(estimator)};
  Tensor grad_z = at::empty({T, slots + shared}, weights.options());
  omni::cuda::topp_route_backward(r, dtype_of(weights, "weights"), data_or_null(grad_weights), data_or_null(grad_shared),
                                  weights.const_data_ptr(), shared_weights.const_data_ptr(), scale.const_data_ptr(),
                                  grad_z.mutable_data_ptr(), stream());
  return grad_z;
}

// ---- release_route ---------------------------------------------------------------------------------------------------

omni::ReleaseResults release_route(const Tensor& z, int64_t num_routed, int64_t num_null, double top_p,
                                   optional<int64_t> top_k, double eps, const optional<Tensor>& gumbel,
                                   const optional<Tensor>& bernoulli, optional<int64_t> max_routed,
                                   const optional<Tensor>& padding, const optional<Tensor>& keep) {
  const c10::cuda::CUDAGuard guard(z.device());
  return omni::release_route(z, num_routed, num_null, top_p, top_k, eps, gumbel, bernoulli, max_routed, padding, keep,
                             [](auto... arguments) { omni::cuda::release_route(arguments..., stream()); });
}

Tensor release_route_backward(const optional<Tensor>& grad_weights, const optional<Tensor>& grad_shared, const Tensor& z,
                              const Tensor& mask, const Tensor& draw_rank, const Tensor& multiplier,
                              const optional<Tensor>& keep, double eps) {
  const c10::cuda::CUDAGuard guard(z.device());
  return omni::release_route_backward(grad_weights, grad_shared, z, mask, draw_rank, multiplier, keep, eps,
                                      [](auto... arguments) { omni::cuda::release_route_backward(arguments..., stream()); });
}

// ---- counter_rng -----------------------------------------------------------------------------------------------------

Tensor counter_uniform(const Tensor& sample_ids, const Tensor& positions, int64_t num_draws, int64_t call) {
  const int64_t T = sample_ids.numel();
  check(sample_ids, sample_ids, at::kLong, {T}, "sample_ids");
  check(positions, sample_ids, at::kLong, {T}, "positions");
  TORCH_CHECK_VALUE(num_draws >= 0, "num_draws: ", num_draws, " must not be negative");
  const c10::cuda::CUDAGuard guard(sample_ids.device());
  Tensor out = at::empty({T, num_draws}, sample_ids.options().dtype(at::kFloat));
  omni::cuda::counter_uniform(index(sample_ids), index(positions), T, num_draws, static_cast<uint64_t>(call),
                              out.mutable_data_ptr<float>(), stream());
  return out;
}

// ---- grouped_gemm ----------------------------------------------------------------------------------------------------

Tensor workspace_for(const Tensor& rows, int64_t experts) {
  const auto bytes = static_cast<int64_t>(omni::cuda::grouped_gemm_workspace(rows.size(0), experts));
  return at::empty({bytes}, rows.options().dtype(at::kByte));  // the allocator aligns to 512 bytes
}

// rows [A, width] against w [E, K, N]; `side` of w meets the rows.
DType check_groups(const Tensor& rows, const char* name, const Tensor& w, const char* w_name, int64_t side,
                   const Tensor& offsets) {
  const DType dtype = dtype_of(rows, name);
  check(rows, rows, rows.scalar_type(), {-1, -1}, name);
  check(w, rows, rows.scalar_type(), {-1, -1, -1}, w_name);
  TORCH_CHECK_VALUE(w.size(side) == rows.size(1), w_name, ": side ", side, " is ", w.size(side), ", ", name, " has ",
                    rows.size(1), " columns");
  check(offsets, rows, at::kLong, {w.size(0) + 1}, "offsets");
  return dtype;
}

Tensor grouped(const Tensor& x, const Tensor& w, const Tensor& offsets, bool transpose_w) {
  const DType dtype = check_groups(x, transpose_w ? "dy" : "x", w, "w", transpose_w ? 2 : 1, offsets);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor y = at::empty({x.size(0), w.size(transpose_w ? 1 : 2)}, x.options());
  Tensor workspace = workspace_for(x, w.size(0));
  omni::cuda::grouped_gemm(x.const_data_ptr(), w.const_data_ptr(), index(offsets), x.size(0), w.size(0), w.size(1),
                           w.size(2), dtype, transpose_w, y.mutable_data_ptr(), workspace.mutable_data_ptr(), stream());
  return y;
}

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets) { return grouped(x, w, offsets, false); }

Tensor grouped_gemm_dgrad(const Tensor& dy, const Tensor& w, const Tensor& offsets) {
  return grouped(dy, w, offsets, true);
}

void wgrad_into(const Tensor& x, const Tensor& dy, const Tensor& offsets, const Tensor& out, bool accumulate) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t experts = offsets.numel() - 1;
  Tensor workspace = workspace_for(x, experts);
  omni::cuda::grouped_wgrad(x.const_data_ptr(), dy.const_data_ptr(), index(offsets), x.size(0), experts, x.size(1),
                            dy.size(1), dtype_of(x, "x"), dtype_of(out, "out"), accumulate, out.mutable_data_ptr(),
                            workspace.mutable_data_ptr(), stream());
}

void check_wgrad(const Tensor& x, const Tensor& dy, const Tensor& offsets) {
  check(x, x, x.scalar_type(), {-1, -1}, "x");
  check(dy, x, x.scalar_type(), {x.size(0), -1}, "dy");
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() > 0, "offsets: must be a vector of at least one entry");
  check(offsets, x, at::kLong, {offsets.numel()}, "offsets");
}

Tensor grouped_gemm_wgrad(const Tensor& x, const Tensor& dy, const Tensor& offsets) {
  check_wgrad(x, dy, offsets);
  Tensor dw = at::empty({offsets.numel() - 1, x.size(1), dy.size(1)}, x.options());
  wgrad_into(x, dy, offsets, dw, false);
  return dw;
}

void grouped_gemm_wgrad_out(const Tensor& x, const Tensor& dy, const Tensor& offsets, const Tensor& out, bool accumulate) {
  check_wgrad(x, dy, offsets);
  const auto wide = accumulator_of(dtype_of(x, "x"));
  TORCH_CHECK_VALUE(out.scalar_type() == wide || (out.scalar_type() == x.scalar_type() && !accumulate), "out: dtype ",
                    out.scalar_type(), " must be float32", accumulate ? " to accumulate" : " or x's",
                    " (float64 for float64 rows)");
  check(out, x, out.scalar_type(), {offsets.numel() - 1, x.size(1), dy.size(1)}, "out");
  wgrad_into(x, dy, offsets, out, accumulate);
}

// ---- expert_mlp ------------------------------------------------------------------------------------------------------

DType check_experts(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& offsets,
                    const optional<Tensor>& row_weight) {
  const DType dtype = check_groups(x, "x", w1, "w1", 1, offsets);
  TORCH_CHECK_VALUE(w1.size(2) % 2 == 0, "w1: last side ", w1.size(2), " must be even (gate and up)");
  check(w2, x, x.scalar_type(), {w1.size(0), w1.size(2) / 2, w1.size(1)}, "w2");
  check(row_weight, x, accumulator_of(dtype), {x.size(0)}, "row_weight");
  return dtype;
}

std::tuple<Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& offsets,
                                      const optional<Tensor>& row_weight, const optional<Tensor>& main_grad1,
                                      const optional<Tensor>& main_grad2) {
  const DType dtype = check_experts(x, w1, w2, offsets, row_weight);
  check_main_grads(main_grad1, main_grad2, w1, w2);
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t rows = x.size(0), F = w2.size(1);
  Tensor h = at::empty({rows, 2 * F}, x.options()), a = at::empty({rows, F}, x.options()), y = at::empty_like(x);
  Tensor workspace = workspace_for(x, w1.size(0));
  omni::cuda::expert_mlp(x.const_data_ptr(), w1.const_data_ptr(), w2.const_data_ptr(), index(offsets),
                         data_or_null(row_weight), rows, w1.size(0), x.size(1), F, dtype, h.mutable_data_ptr(),
                         a.mutable_data_ptr(), y.mutable_data_ptr(), workspace.mutable_data_ptr(), stream());
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& h,
                                                               const Tensor& w1, const Tensor& w2, const Tensor& offsets,
                                                               const optional<Tensor>& row_weight, bool needs_x,
                                                               bool needs_w1, bool needs_w2, bool needs_row_weight,
                                                               const optional<Tensor>& main_grad1,
                                                               const optional<Tensor>& main_grad2) {
  const DType dtype = check_experts(x, w1, w2, offsets, row_weight);
  check_main_grads(main_grad1, main_grad2, w1, w2);
  const int64_t rows = x.size(0), E = w1.size(0), H = x.size(1), F = w2.size(1);
  check(dy, x, x.scalar_type(), {rows, H}, "dy");
  check(h, x, x.scalar_type(), {rows, 2 * F}, "h");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options();
  Tensor dh = at::empty({rows, 2 * F}, options), a = at::empty({rows, F}, options);
  Tensor dx = at::empty({needs_x ? rows : 0, H}, options);
  const bool add = main_grad1.has_value();
  Tensor dw1 = at::empty({needs_w1 && !add ? E : 0, H, 2 * F}, options);
  Tensor dw2 = at::empty({needs_w2 && !add ? E : 0, F, H}, options);
  Tensor drow_weight = at::empty({needs_row_weight ? rows : 0}, options.dtype(accumulator_of(dtype)));
  Tensor workspace = workspace_for(x, E);
  omni::cuda::expert_mlp_backward(
      dy.const_data_ptr(), x.const_data_ptr(), h.const_data_ptr(), w1.const_data_ptr(), w2.const_data_ptr(),
      index(offsets), data_or_null(row_weight), rows, E, H, F, dtype, add ? dtype_of(*main_grad1, "main_grad1") : dtype,
      add, a.mutable_data_ptr(), dh.mutable_data_ptr(), needs_x ? dx.mutable_data_ptr() : nullptr,
      needs_w1 ? (add ? *main_grad1 : dw1).mutable_data_ptr() : nullptr,
      needs_w2 ? (add ? *main_grad2 : dw2).mutable_data_ptr() : nullptr,
      needs_row_weight ? drow_weight.mutable_data_ptr() : nullptr, workspace.mutable_data_ptr(), stream());
  return {dx, dw1, dw2, drow_weight};
}

}  // namespace

// Same order of results as the schemas in bindings.cpp.
TORCH_LIBRARY_IMPL(megatron_omni, CUDA, m) {
  m.impl("build_permutation", build_permutation);
  m.impl("permute", permute);
  m.impl("unpermute", unpermute);
  m.impl("unpermute_backward", unpermute_backward);
  m.impl("gather_assignments", gather_assignments);
  m.impl("scatter_assignments", scatter_assignments);
  m.impl("topp_route", topp_route);
  m.impl("topp_route_backward", topp_route_backward);
  m.impl("release_route", release_route);
  m.impl("release_route_backward", release_route_backward);
  m.impl("counter_uniform", counter_uniform);
  m.impl("grouped_gemm", grouped_gemm);
  m.impl("grouped_gemm_dgrad", grouped_gemm_dgrad);
  m.impl("grouped_gemm_wgrad", grouped_gemm_wgrad);
  m.impl("grouped_gemm_wgrad_out", grouped_gemm_wgrad_out);
  m.impl("expert_mlp", expert_mlp);
  m.impl("expert_mlp_backward", expert_mlp_backward);
}
