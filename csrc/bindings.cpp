// The CPU side of the ops: schemas of megatron_omni, argument checks, allocation, calls to kernels.h.
//
// Wrong arguments raise ValueError with the argument's name. Index arguments are checked against what they index (a
// pass over int64 metadata, small beside the rows it moves), so that no call reads or writes out of bounds. Gradients are
// in bindings_autograd.cpp, fake kernels in megatron_omni/ops/<op>.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/isa.h"
#include "kernels.h"
#include "pool.h"

namespace {

using at::Tensor;
using omni::accumulator_of;
using omni::check_main_grads;
using omni::cpu_engine;
using omni::data_or_null;
using omni::DType;
using omni::dtype_of;
using omni::pool;

// Names the engine from now on, or none.
void set_cpu_engine(c10::string_view name) {
  try {
    omni::cpu::set_engine(std::string(name));
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

void check_matrix(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, ": has ", x.dim(), " dimensions, must have 2");
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": must be contiguous; call .contiguous()");
}

void check_vector(const Tensor& x, int64_t length, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, ": dtype ", x.scalar_type(), " must be ", dtype);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.is_contiguous(), name, ": must be a contiguous vector");
  TORCH_CHECK_VALUE(x.numel() == length, name, ": has ", x.numel(), " entries, must have ", length);
}

// Every entry within 0..bound.
void check_range(const Tensor& x, int64_t bound, const char* name) {
  const int64_t* p = x.const_data_ptr<int64_t>();
  bool good = true;
  for (int64_t i = 0, n = x.numel(); i < n; ++i) good &= static_cast<uint64_t>(p[i]) < static_cast<uint64_t>(bound);
  TORCH_CHECK_VALUE(good, name, ": has an entry outside 0..", bound - 1);
}

// Offsets ascending from 0, to `last` at most (exactly, with `all`).
void check_offsets(const Tensor& x, int64_t last, bool all, const char* name) {
  const int64_t* p = x.const_data_ptr<int64_t>();
  const int64_t end = p[x.numel() - 1];
  bool good = p[0] == 0;
  for (int64_t i = 1, n = x.numel(); i < n; ++i) good &= p[i] >= p[i - 1];
  TORCH_CHECK_VALUE(good, name, ": must ascend from 0");
  TORCH_CHECK_VALUE(all ? end == last : end <= last, name, ": ends at ", end, all ? ", must end at " : ", past ", last);
}

// ---- permute ---------------------------------------------------------------------------------------------------------

// token_rows must list rows 0..A once each, those of token t (row_token == t) at token_offsets[t]..token_offsets[t + 1],
// ascending: then no kernel leaves a row unwritten, writes one twice, or reaches outside.
void check_permutation(const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows, int64_t T) {
  const int64_t A = row_token.numel();
  check_vector(row_token, A, at::kLong, "row_token");
  check_vector(token_offsets, T + 1, at::kLong, "token_offsets");
  check_vector(token_rows, A, at::kLong, "token_rows");
  check_offsets(token_offsets, A, true, "token_offsets");
  check_range(row_token, T, "row_token");
  check_range(token_rows, A, "token_rows");
  const int64_t* begin = token_offsets.const_data_ptr<int64_t>();
  const int64_t* row = token_rows.const_data_ptr<int64_t>();
  const int64_t* token = row_token.const_data_ptr<int64_t>();
  bool good = true;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = begin[t]; j < begin[t + 1]; ++j)
      good &= token[row[j]] == t && (j == begin[t] || row[j] > row[j - 1]);
  TORCH_CHECK_VALUE(good, "token_rows: must list the rows of each token as row_token has them, ascending");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build_permutation(const Tensor& routing_map,
                                                                     std::optional<int64_t> num_assignments) {
  TORCH_CHECK_VALUE(routing_map.scalar_type() == at::kBool, "routing_map: dtype ", routing_map.scalar_type(),
                    " must be bool");
  TORCH_CHECK_VALUE(routing_map.dim() == 2, "routing_map: has ", routing_map.dim(), " dimensions, must have 2");
  const int64_t T = routing_map.size(0), E = routing_map.size(1);
  const Tensor map = routing_map.stride(1) == 1 || E <= 1 ? routing_map : routing_map.contiguous();
  const auto options = map.options().dtype(at::kLong);
  Tensor offsets = at::empty({E + 1}, options), token_offsets = at::empty({T + 1}, options);
  const bool* p = map.const_data_ptr<bool>();
  const int64_t A = omni::cpu::count_assignments(p, map.stride(0), T, E, offsets.mutable_data_ptr<int64_t>(),
                                                 token_offsets.mutable_data_ptr<int64_t>());
  TORCH_CHECK_VALUE(!num_assignments || *num_assignments == A, "num_assignments: ", num_assignments.value_or(0),
                    " for a routing_map with ", A, " true entries");
  Tensor row_token = at::empty({A}, options), row_expert = at::empty({A}, options), token_rows = at::empty({A}, options);
  std::vector<int64_t> next_row(E);
  omni::cpu::fill_permutation(p, map.stride(0), T, E, offsets.const_data_ptr<int64_t>(), next_row.data(),
                              row_token.mutable_data_ptr<int64_t>(), row_expert.mutable_data_ptr<int64_t>(),
                              token_rows.mutable_data_ptr<int64_t>());
  return {offsets, row_token, row_expert, token_offsets, token_rows};
}

Tensor permute(const Tensor& x, const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows,
               int64_t num_rows) {
  const DType dtype = dtype_of(x, "x");
  check_matrix(x, "x");
  const int64_t T = x.size(0), H = x.size(1), A = row_token.numel();
  check_permutation(row_token, token_offsets, token_rows, T);
  TORCH_CHECK_VALUE(num_rows >= A, "num_rows: ", num_rows, " output rows cannot hold ", A, " assignments");
  Tensor out = at::empty({num_rows, H}, x.options());
  omni::cpu::permute(x.const_data_ptr(), token_offsets.const_data_ptr<int64_t>(), token_rows.const_data_ptr<int64_t>(), T,
                     A, num_rows, H, dtype, out.mutable_data_ptr(), pool());
  return out;
}

// Checks what unpermute and its backward share; the dtype of rows.
DType check_unpermute(const Tensor& rows, const std::optional<Tensor>& weights, const std::optional<Tensor>& factor,
                      const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows, int64_t T,
                      at::ScalarType sum_dtype, const char* sum_name) {
  const DType dtype = dtype_of(rows, "rows");
  check_matrix(rows, "rows");
  const int64_t A = row_token.numel();
  TORCH_CHECK_VALUE(rows.size(0) >= A, "rows: has ", rows.size(0), " rows for ", A, " assignments");
  TORCH_CHECK_VALUE(T >= 0, "num_tokens: ", T, " must not be negative");
  check_permutation(row_token, token_offsets, token_rows, T);
  const auto accumulator = accumulator_of(dtype);
  if (weights) check_vector(*weights, A, accumulator, "weights");
  if (factor) check_vector(*factor, A, accumulator, "gradient_factor");
  TORCH_CHECK_VALUE(
      dtype == DType::F64 ? sum_dtype == at::kDouble
                          : sum_dtype == at::kFloat || sum_dtype == at::kBFloat16 || sum_dtype == at::kHalf,
      sum_name, ": dtype ", sum_dtype, " does not go with rows of ", rows.scalar_type());
  return dtype;
}

Tensor unpermute(const Tensor& rows, const std::optional<Tensor>& weights, const Tensor& row_token,
                 const Tensor& token_offsets, const Tensor& token_rows, int64_t num_tokens,
                 const std::optional<Tensor>& gradient_factor, at::ScalarType out_dtype) {
  const DType dtype = check_unpermute(rows, weights, gradient_factor, row_token, token_offsets, token_rows, num_tokens,
                                      out_dtype, "out_dtype");
  Tensor out = at::empty({num_tokens, rows.size(1)}, rows.options().dtype(out_dtype));
  omni::cpu::unpermute(rows.const_data_ptr(), data_or_null(weights), token_offsets.const_data_ptr<int64_t>(),
                       token_rows.const_data_ptr<int64_t>(), num_tokens, rows.size(1), dtype, dtype_of(out, "out_dtype"),
                       out.mutable_data_ptr(), pool());
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& rows,
                                              const std::optional<Tensor>& weights,
                                              const std::optional<Tensor>& gradient_factor, const Tensor& row_token,
                                              const Tensor& token_offsets, const Tensor& token_rows, bool needs_rows,
                                              bool needs_weights) {
  check_matrix(grad, "grad");
  const int64_t T = grad.size(0), A = row_token.numel();
  const DType dtype = check_unpermute(rows, weights, gradient_factor, row_token, token_offsets, token_rows, T,
                                      grad.scalar_type(), "grad");
  const int64_t H = rows.size(1);
  TORCH_CHECK_VALUE(grad.size(1) == H, "grad: is ", grad.size(1), " wide, rows are ", H);
  const auto accumulator = accumulator_of(dtype);
  Tensor grad_rows = at::empty({needs_rows ? rows.size(0) : 0, H}, rows.options());
  Tensor grad_weights = at::empty({needs_weights ? A : 0}, rows.options().dtype(accumulator));
  omni::cpu::unpermute_backward(
      grad.const_data_ptr(), rows.const_data_ptr(), data_or_null(weights), data_or_null(gradient_factor),
      token_offsets.const_data_ptr<int64_t>(), token_rows.const_data_ptr<int64_t>(), T, A, rows.size(0), H, dtype,
      dtype_of(grad, "grad"), needs_rows ? grad_rows.mutable_data_ptr() : nullptr,
      needs_weights ? grad_weights.mutable_data_ptr() : nullptr, pool());
  return {grad_rows, grad_weights};
}

// Entries of a matrix [T, E] at the assignments, and back.
Tensor gather_assignments(const Tensor& values, const Tensor& row_token, const Tensor& row_expert) {
  dtype_of(values, "values");
  TORCH_CHECK_VALUE(values.dim() == 2, "values: has ", values.dim(), " dimensions, must have 2");
  const int64_t A = row_token.numel();
  check_vector(row_token, A, at::kLong, "row_token");
  check_vector(row_expert, A, at::kLong, "row_expert");
  check_range(row_token, values.size(0), "row_token");
  check_range(row_expert, values.size(1), "row_expert");
  Tensor out = at::empty({A}, values.options());
  omni::cpu::gather_entries(values.const_data_ptr(), values.stride(0), values.stride(1),
                            row_token.const_data_ptr<int64_t>(), row_expert.const_data_ptr<int64_t>(), A,
                            values.element_size(), out.mutable_data_ptr());
  return out;
}

Tensor scatter_assignments(const Tensor& entries, const Tensor& row_token, const Tensor& row_expert, int64_t num_tokens,
                           int64_t num_experts) {
  dtype_of(entries, "entries");
  TORCH_CHECK_VALUE(num_tokens >= 0 && num_experts >= 0, "num_tokens and num_experts must not be negative");
  const int64_t A = row_token.numel();
  check_vector(entries, A, entries.scalar_type(), "entries");
  check_vector(row_token, A, at::kLong, "row_token");
  check_vector(row_expert, A, at::kLong, "row_expert");
  check_range(row_token, num_tokens, "row_token");
  check_range(row_expert, num_experts, "row_expert");
  Tensor out = at::empty({num_tokens, num_experts}, entries.options());
  omni::cpu::scatter_entries(entries.const_data_ptr(), row_token.const_data_ptr<int64_t>(),
                             row_expert.const_data_ptr<int64_t>(), A, num_tokens, num_experts, entries.element_size(),
                             out.mutable_data_ptr());
  return out;
}

// ---- topp_route ------------------------------------------------------------------------------------------------------

void check_shape(const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  check_matrix(x, name);
  TORCH_CHECK_VALUE(x.size(0) == rows && x.size(1) == columns, name, ": has shape ", x.sizes(), ", must be [", rows, ", ",
                    columns, "]");
}

void check_like_logits(const std::optional<Tensor>& x, const Tensor& z, int64_t slots, const char* name) {
  if (!x) return;
  TORCH_CHECK_VALUE(x->scalar_type() == z.scalar_type(), name, ": dtype ", x->scalar_type(), " must be that of z, ",
                    z.scalar_type());
  check_shape(*x, z.size(0), slots, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topp_route(
    const Tensor& z, int64_t num_routed, int64_t num_null, double top_p, std::optional<int64_t> top_k,
    c10::string_view estimator, const std::optional<Tensor>& gumbel, const std::optional<Tensor>& bernoulli,
    std::optional<int64_t> max_routed, const std::optional<Tensor>& padding, const std::optional<Tensor>& keep) {
  const omni::ToppRoute r = omni::route_of(z, num_routed, num_null, top_p, top_k, omni::estimator_of(estimator), max_routed);
  const int64_t T = r.T, slots = r.num_dynamic, shared = r.num_shared;
  check_like_logits(gumbel, z, slots, "gumbel");
  check_like_logits(bernoulli, z, slots, "bernoulli");
  if (padding) check_vector(*padding, T, at::kBool, "padding");
  if (keep) {
    TORCH_CHECK_VALUE(keep->scalar_type() == at::kBool, "keep: dtype ", keep->scalar_type(), " must be bool");
    check_shape(*keep, T, slots, "keep");
  }
  const auto index = z.options().dtype(at::kLong);
  Tensor mask = at::empty({T, slots}, z.options().dtype(at::kBool)), weights = at::empty({T, slots}, z.options());
  Tensor shared_weights = at::empty({T, shared}, z.options()), scale = at::empty({T, slots}, z.options());
  Tensor k = at::empty({T}, index), draw_rank = at::empty({T, slots}, index);
  omni::cpu::topp_route(r, dtype_of(z, "z"), z.const_data_ptr(), data_or_null(gumbel), data_or_null(bernoulli),
                        omni::bool_or_null(padding), omni::bool_or_null(keep),
                        mask.mutable_data_ptr<bool>(), weights.mutable_data_ptr(), shared_weights.mutable_data_ptr(),
                        scale.mutable_data_ptr(), k.mutable_data_ptr<int64_t>(), draw_rank.mutable_data_ptr<int64_t>(),
                        pool());
  return {weights, shared_weights, mask, scale, k, draw_rank};
}

Tensor topp_route_backward(const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_shared,
                           const Tensor& weights, const Tensor& shared_weights, const Tensor& scale,
                           c10::string_view estimator) {
  TORCH_CHECK_VALUE(weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kDouble, "weights: dtype ",
                    weights.scalar_type(), " must be float32 or float64");
  check_matrix(weights, "weights");
  check_matrix(shared_weights, "shared_weights");
  const int64_t T = weights.size(0), slots = weights.size(1), shared = shared_weights.size(1);
  check_like_logits(scale, weights, slots, "scale");
  check_like_logits(shared_weights, weights, shared, "shared_weights");
  check_like_logits(grad_weights, weights, slots, "grad_weights");
  check_like_logits(grad_shared, weights, shared, "grad_shared");
  const omni::ToppRoute r{T, slots, shared, slots, 0, 0, -1, omni::estimator_of(estimator)};
  Tensor grad_z = at::empty({T, slots + shared}, weights.options());
  omni::cpu::topp_route_backward(r, dtype_of(weights, "weights"), data_or_null(grad_weights), data_or_null(grad_shared),
                                 weights.const_data_ptr(), shared_weights.const_data_ptr(), scale.const_data_ptr(),
                                 grad_z.mutable_data_ptr(), pool());
  return grad_z;
}

// ---- release_route ---------------------------------------------------------------------------------------------------

omni::ReleaseResults release_route(const Tensor& z, int64_t num_routed, int64_t num_null, double top_p,
                                   std::optional<int64_t> top_k, double eps, const std::optional<Tensor>& gumbel,
                                   const std::optional<Tensor>& bernoulli, std::optional<int64_t> max_routed,
                                   const std::optional<Tensor>& padding, const std::optional<Tensor>& keep) {
  return omni::release_route(z, num_routed, num_null, top_p, top_k, eps, gumbel, bernoulli, max_routed, padding, keep,
                             [](auto... arguments) { omni::cpu::release_route(arguments..., pool()); });
}

Tensor release_route_backward(const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_shared,
                              const Tensor& z, const Tensor& mask, const Tensor& draw_rank, const Tensor& multiplier,
                              const std::optional<Tensor>& keep, double eps) {
  return omni::release_route_backward(grad_weights, grad_shared, z, mask, draw_rank, multiplier, keep, eps,
                                      [](auto... arguments) { omni::cpu::release_route_backward(arguments..., pool()); });
}

// ---- grouped_gemm ----------------------------------------------------------------------------------------------------

// Checks rows [A, width] by expert weight w [E, K, N]: dtype, shapes, offsets; `side` is the side of w that meets rows.
DType check_groups(const Tensor& rows, const char* name, const Tensor& w, const char* w_name, int64_t side,
                   const Tensor& offsets) {
  const DType dtype = dtype_of(rows, name);
  check_matrix(rows, name);
  TORCH_CHECK_VALUE(w.dim() == 3, w_name, ": has ", w.dim(), " dimensions, must have 3 (experts, in, out)");
  TORCH_CHECK_VALUE(w.scalar_type() == rows.scalar_type(), w_name, ": dtype ", w.scalar_type(), " differs from ", name,
                    "'s ", rows.scalar_type());
  TORCH_CHECK_VALUE(w.is_contiguous(), w_name, ": must be contiguous; call .contiguous()");
  TORCH_CHECK_VALUE(w.size(side) == rows.size(1), w_name, ": side ", side, " is ", w.size(side), ", ", name, " has ",
                    rows.size(1), " columns");
  check_vector(offsets, w.size(0) + 1, at::kLong, "offsets");
  check_offsets(offsets, rows.size(0), false, "offsets");
  return dtype;
}

// y [A, columns] must go with rows and have this width.
void check_result(const Tensor& y, const char* name, const Tensor& rows, int64_t width) {
  check_matrix(y, name);
  TORCH_CHECK_VALUE(y.scalar_type() == rows.scalar_type(), name, ": dtype ", y.scalar_type(), " must be ",
                    rows.scalar_type());
  TORCH_CHECK_VALUE(y.size(0) == rows.size(0) && y.size(1) == width, name, ": is [", y.size(0), ", ", y.size(1),
                    "], must be [", rows.size(0), ", ", width, "]");
}

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets) {
  const DType dtype = check_groups(x, "x", w, "w", 1, offsets);
  Tensor y = at::empty({x.size(0), w.size(2)}, x.options());
  omni::cpu::grouped_gemm(x.const_data_ptr(), w.const_data_ptr(), offsets.const_data_ptr<int64_t>(), x.size(0), w.size(0),
                          w.size(1), w.size(2), false, dtype, y.mutable_data_ptr(), pool());
  return y;
}

Tensor grouped_gemm_dgrad(const Tensor& dy, const Tensor& w, const Tensor& offsets) {
  const DType dtype = check_groups(dy, "dy", w, "w", 2, offsets);
  Tensor dx = at::empty({dy.size(0), w.size(1)}, dy.options());
  omni::cpu::grouped_gemm(dy.const_data_ptr(), w.const_data_ptr(), offsets.const_data_ptr<int64_t>(), dy.size(0),
                          w.size(0), w.size(1), w.size(2), true, dtype, dx.mutable_data_ptr(), pool());
  return dx;
}

DType check_wgrad(const Tensor& x, const Tensor& dy, const Tensor& offsets) {
  const DType dtype = dtype_of(x, "x");
  check_matrix(x, "x");
  check_matrix(dy, "dy");
  check_result(dy, "dy", x, dy.size(1));
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() > 0, "offsets: must be a vector of at least one entry");
  check_vector(offsets, offsets.numel(), at::kLong, "offsets");
  check_offsets(offsets, x.size(0), false, "offsets");
  return dtype;
}

Tensor grouped_gemm_wgrad(const Tensor& x, const Tensor& dy, const Tensor& offsets) {
  const DType dtype = check_wgrad(x, dy, offsets);
  const int64_t E = offsets.numel() - 1, K = x.size(1), N = dy.size(1);
  Tensor dw = at::empty({E, K, N}, x.options());
  omni::cpu::grouped_wgrad(x.const_data_ptr(), dy.const_data_ptr(), offsets.const_data_ptr<int64_t>(), E, K, N, dtype,
                           dtype, false, dw.mutable_data_ptr(), pool());
  return dw;
}

void grouped_gemm_wgrad_out(const Tensor& x, const Tensor& dy, const Tensor& offsets, const Tensor& out, bool accumulate) {
  const DType dtype = check_wgrad(x, dy, offsets), dtype_out = dtype_of(out, "out");
  const int64_t E = offsets.numel() - 1, K = x.size(1), N = dy.size(1);
  const bool wide = dtype_out == (dtype == DType::F64 ? DType::F64 : DType::F32);
  TORCH_CHECK_VALUE(wide || (dtype_out == dtype && !accumulate), "out: dtype ", out.scalar_type(), " must be float32",
                    accumulate ? " to accumulate" : " or x's", " (float64 for float64 rows)");
  TORCH_CHECK_VALUE(out.dim() == 3 && out.size(0) == E && out.size(1) == K && out.size(2) == N, "out: must be [", E, ", ",
                    K, ", ", N, "]");
  TORCH_CHECK_VALUE(out.is_contiguous(), "out: must be contiguous");
  omni::cpu::grouped_wgrad(x.const_data_ptr(), dy.const_data_ptr(), offsets.const_data_ptr<int64_t>(), E, K, N, dtype,
                           dtype_out, accumulate, out.mutable_data_ptr(), pool());
}

// ---- expert_mlp ------------------------------------------------------------------------------------------------------

DType check_experts(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& offsets,
                    const std::optional<Tensor>& row_weight) {
  const DType dtype = check_groups(x, "x", w1, "w1", 1, offsets);
  TORCH_CHECK_VALUE(w2.dim() == 3 && w2.size(0) == w1.size(0) && 2 * w2.size(1) == w1.size(2) && w2.size(2) == w1.size(1),
                    "w2: must be [E, F, H] for w1 [E, H, 2 F] = ", w1.sizes(), ", is ", w2.sizes());
  TORCH_CHECK_VALUE(w2.scalar_type() == x.scalar_type(), "w2: dtype ", w2.scalar_type(), " differs from x's ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(w2.is_contiguous(), "w2: must be contiguous; call .contiguous()");
  if (row_weight)
    check_vector(*row_weight, x.size(0), accumulator_of(dtype), "row_weight");
  return dtype;
}

// The buffers are the backward's (bindings_autograd.cpp hands them on): here they are only checked.
std::tuple<Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& offsets,
                                      const std::optional<Tensor>& row_weight, const std::optional<Tensor>& main_grad1,
                                      const std::optional<Tensor>& main_grad2) {
  const DType dtype = check_experts(x, w1, w2, offsets, row_weight);
  check_main_grads(main_grad1, main_grad2, w1, w2);
  const int64_t rows = x.size(0), F = w2.size(1);
  Tensor h = at::empty({rows, 2 * F}, x.options()), a = at::empty({rows, F}, x.options()), y = at::empty_like(x);
  omni::cpu::expert_mlp(x.const_data_ptr(), w1.const_data_ptr(), w2.const_data_ptr(), offsets.const_data_ptr<int64_t>(),
                        data_or_null(row_weight), rows, w1.size(0), x.size(1), F, dtype, h.mutable_data_ptr(),
                        a.mutable_data_ptr(), y.mutable_data_ptr(), pool());
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& h,
                                                               const Tensor& w1, const Tensor& w2, const Tensor& offsets,
                                                               const std::optional<Tensor>& row_weight, bool needs_x,
                                                               bool needs_w1, bool needs_w2, bool needs_row_weight,
                                                               const std::optional<Tensor>& main_grad1,
                                                               const std::optional<Tensor>& main_grad2) {
  const DType dtype = check_experts(x, w1, w2, offsets, row_weight);
  check_main_grads(main_grad1, main_grad2, w1, w2);
  const int64_t rows = x.size(0), H = x.size(1), F = w2.size(1);
  check_result(dy, "dy", x, H);
  check_result(h, "h", x, 2 * F);
  const auto options = x.options();
  Tensor dh = at::empty({rows, 2 * F}, options), a = at::empty({rows, F}, options);
  Tensor dx = at::empty({needs_x ? rows : 0, H}, options);
  const bool add = main_grad1.has_value();
  Tensor dw1 = at::empty({needs_w1 && !add ? w1.size(0) : 0, H, 2 * F}, options);
  Tensor dw2 = at::empty({needs_w2 && !add ? w2.size(0) : 0, F, H}, options);
  Tensor drow_weight =
      at::empty({needs_row_weight ? rows : 0}, options.dtype(accumulator_of(dtype)));
  omni::cpu::expert_mlp_backward(
      dy.const_data_ptr(), x.const_data_ptr(), h.const_data_ptr(), w1.const_data_ptr(), w2.const_data_ptr(),
      offsets.const_data_ptr<int64_t>(), data_or_null(row_weight), rows, w1.size(0), H, F, dtype,
      add ? dtype_of(*main_grad1, "main_grad1") : dtype, add, a.mutable_data_ptr(), dh.mutable_data_ptr(),
      needs_x ? dx.mutable_data_ptr() : nullptr, needs_w1 ? (add ? *main_grad1 : dw1).mutable_data_ptr() : nullptr,
      needs_w2 ? (add ? *main_grad2 : dw2).mutable_data_ptr() : nullptr,
      needs_row_weight ? drow_weight.mutable_data_ptr() : nullptr, pool());
  return {dx, dw1, dw2, drow_weight};
}

// ---- cached_attention ------------------------------------------------------------------------------------------------

Tensor cached_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& places,
                        const Tensor& counts, double scale) {
  const DType dtype = dtype_of(query, "query");
  TORCH_CHECK_VALUE(query.dim() == 4, "query: has ", query.dim(), " dimensions, must have 4 (tokens, groups, heads, width)");
  TORCH_CHECK_VALUE(query.stride(3) == 1 || query.size(3) == 1, "query: its rows must be contiguous");
  const int64_t groups = query.size(1), D = query.size(3), known = places.numel();
  const auto check_rows = [&](const Tensor& x, const char* name) {
    TORCH_CHECK_VALUE(x.scalar_type() == query.scalar_type(), name, ": dtype ", x.scalar_type(), " differs from query's ",
                      query.scalar_type());
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) == groups && x.size(2) == D, name, ": is ", x.sizes(), ", must be [N, ",
                      groups, ", ", D, "]");
    TORCH_CHECK_VALUE(x.is_contiguous(), name, ": must be contiguous; call .contiguous()");
  };
  check_rows(keys, "keys");
  check_rows(values, "values");
  TORCH_CHECK_VALUE(values.size(0) == keys.size(0), "values: has ", values.size(0), " positions, keys have ", keys.size(0));
  TORCH_CHECK_VALUE(known <= query.size(0), "places: has ", known, " entries for ", query.size(0), " tokens");
  check_vector(places, known, at::kLong, "places");
  check_vector(counts, known, at::kLong, "counts");
  const int64_t* place = places.const_data_ptr<int64_t>();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  bool good = true;
  for (int64_t i = 0; i < known; ++i)
    good &= count[i] == 0 || (place[i] < keys.size(0) && count[i] > 0 && count[i] <= place[i] + 1);
  TORCH_CHECK_VALUE(good, "counts: of a token that sees positions outside 0..", keys.size(0) - 1);
  Tensor out = at::empty(query.sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
  omni::cpu::cached_attention({query.size(0), known, groups, query.size(2), D, query.stride(0), query.stride(1),
                               query.stride(2), scale, query.const_data_ptr(), keys.const_data_ptr(),
                               values.const_data_ptr(), place, count, out.mutable_data_ptr()},
                              dtype, pool());
  return out;
}

// ---- counter_rng -----------------------------------------------------------------------------------------------------

Tensor counter_uniform(const Tensor& sample_ids, const Tensor& positions, int64_t num_draws, int64_t call) {
  const int64_t T = sample_ids.numel();
  check_vector(sample_ids, T, at::kLong, "sample_ids");
  check_vector(positions, T, at::kLong, "positions");
  TORCH_CHECK_VALUE(num_draws >= 0, "num_draws: ", num_draws, " must not be negative");
  Tensor out = at::empty({T, num_draws}, sample_ids.options().dtype(at::kFloat));
  omni::cpu::counter_uniform(sample_ids.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(), T, num_draws,
                             static_cast<uint64_t>(call), out.mutable_data_ptr<float>(), pool());
  return out;
}

}  // namespace

// One line an op: what follows the arrow is what the fake kernels in megatron_omni/ops describe.
TORCH_LIBRARY(megatron_omni, m) {
  m.def("cpu_engine() -> str", cpu_engine);
  m.def("cpu_engines() -> str", omni::cpu::names_of_engines);
  m.def("cpu_engine_is_forced() -> bool", omni::cpu::engine_is_forced);
  m.def("set_cpu_engine(str name) -> ()", set_cpu_engine);
  m.def("build_permutation(Tensor routing_map, SymInt? num_assignments=None)"
        " -> (Tensor offsets, Tensor row_token, Tensor row_expert, Tensor token_offsets, Tensor token_rows)");
  m.def("permute(Tensor x, Tensor row_token, Tensor token_offsets, Tensor token_rows, SymInt num_rows) -> Tensor");
  m.def("unpermute(Tensor rows, Tensor? weights, Tensor row_token, Tensor token_offsets, Tensor token_rows,"
        " SymInt num_tokens, Tensor? gradient_factor, ScalarType out_dtype) -> Tensor");
  m.def("unpermute_backward(Tensor grad, Tensor rows, Tensor? weights, Tensor? gradient_factor, Tensor row_token,"
        " Tensor token_offsets, Tensor token_rows, bool needs_rows, bool needs_weights) -> (Tensor, Tensor)");
  m.def("gather_assignments(Tensor values, Tensor row_token, Tensor row_expert) -> Tensor");
  m.def("scatter_assignments(Tensor entries, Tensor row_token, Tensor row_expert, SymInt num_tokens, SymInt num_experts)"
        " -> Tensor");
  m.def("topp_route(Tensor z, int num_routed, int num_null, float top_p, int? top_k, str estimator, Tensor? gumbel,"
        " Tensor? bernoulli, int? max_routed, Tensor? padding, Tensor? keep=None)"
        " -> (Tensor weights, Tensor shared_weights, Tensor mask, Tensor scale, Tensor k, Tensor draw_rank)");
  m.def("topp_route_backward(Tensor? grad_weights, Tensor? grad_shared, Tensor weights, Tensor shared_weights,"
        " Tensor scale, str estimator) -> Tensor");
  m.def("release_route(Tensor z, int num_routed, int num_null, float top_p, int? top_k, float eps, Tensor? gumbel,"
        " Tensor? bernoulli, int? max_routed, Tensor? padding, Tensor? keep=None)"
        " -> (Tensor weights, Tensor shared_weights, Tensor mask, Tensor k, Tensor draw_rank, Tensor multiplier)");
  m.def("release_route_backward(Tensor? grad_weights, Tensor? grad_shared, Tensor z, Tensor mask, Tensor draw_rank,"
        " Tensor multiplier, Tensor? keep, float eps) -> Tensor");
  m.def("cached_attention(Tensor query, Tensor keys, Tensor values, Tensor places, Tensor counts, float scale)"
        " -> Tensor");
  m.def("counter_uniform(Tensor sample_ids, Tensor positions, SymInt num_draws, int call) -> Tensor");
  m.def("grouped_gemm(Tensor x, Tensor w, Tensor offsets) -> Tensor");
  m.def("grouped_gemm_dgrad(Tensor dy, Tensor w, Tensor offsets) -> Tensor");
  m.def("grouped_gemm_wgrad(Tensor x, Tensor dy, Tensor offsets) -> Tensor");
  m.def("grouped_gemm_wgrad_out(Tensor x, Tensor dy, Tensor offsets, Tensor(a!) out, bool accumulate) -> ()");
  m.def("expert_mlp(Tensor x, Tensor w1, Tensor w2, Tensor offsets, Tensor? row_weight, Tensor? main_grad1=None,"
        " Tensor? main_grad2=None) -> (Tensor y, Tensor h)");
  m.def("expert_mlp_backward(Tensor dy, Tensor x, Tensor h, Tensor w1, Tensor w2, Tensor offsets, Tensor? row_weight,"
        " bool needs_x, bool needs_w1, bool needs_w2, bool needs_row_weight, Tensor(a!)? main_grad1=None,"
        " Tensor(b!)? main_grad2=None) -> (Tensor dx, Tensor dw1, Tensor dw2, Tensor drow_weight)");
}

TORCH_LIBRARY_IMPL(megatron_omni, CPU, m) {
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
  m.impl("cached_attention", cached_attention);
  m.impl("counter_uniform", counter_uniform);
  m.impl("grouped_gemm", grouped_gemm);
  m.impl("grouped_gemm_dgrad", grouped_gemm_dgrad);
  m.impl("grouped_gemm_wgrad", grouped_gemm_wgrad);
  m.impl("grouped_gemm_wgrad_out", grouped_gemm_wgrad_out);
  m.impl("expert_mlp", expert_mlp);
  m.impl("expert_mlp_backward", expert_mlp_backward);
}
