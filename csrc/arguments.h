// What the CPU's and the GPU's bindings ask of an argument in the same words: ValueErrors that begin with its name.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"

namespace omni {

inline DType dtype_of(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return DType::F32;
    case at::kBFloat16: return DType::BF16;
    case at::kHalf: return DType::F16;
    case at::kDouble: return DType::F64;
    default: TORCH_CHECK_VALUE(false, name, ": dtype ", x.scalar_type(), " is not float32, bfloat16, float16 or float64");
  }
}

// What sums over values of `dtype` are kept in.
inline at::ScalarType accumulator_of(DType dtype) { return dtype == DType::F64 ? at::kDouble : at::kFloat; }

inline const void* data_or_null(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

// Contiguous, on the device of `like`, of the given sizes (-1: any).
inline void check(const at::Tensor& x, const at::Tensor& like, at::ScalarType dtype, at::IntArrayRef sizes,
                  const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, ": dtype ", x.scalar_type(), " must be ", dtype);
  TORCH_CHECK_VALUE(x.device() == like.device(), name, ": is on ", x.device(), ", must be on ", like.device());
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || x.size(static_cast<int64_t>(i)) == sizes[i];
  TORCH_CHECK_VALUE(fits, name, ": has shape ", x.sizes(), ", must be ", sizes, " (-1: any)");
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": must be contiguous; call .contiguous()");
}

inline void check(const std::optional<at::Tensor>& x, const at::Tensor& like, at::ScalarType dtype, at::IntArrayRef sizes,
                  const char* name) {
  if (x) check(*x, like, dtype, sizes, name);
}

inline Estimator estimator_of(c10::string_view name) {
  if (name == "paper") return Estimator::Paper;
  if (name == "grin") return Estimator::Grin;
  TORCH_CHECK_VALUE(name == "none", "estimator: ", std::string(name), " is not paper, grin or none");
  return Estimator::None;
}

// The rule of a routing op for logits z [T, routed + null + shared].
inline ToppRoute route_of(const at::Tensor& z, int64_t num_routed, int64_t num_null, double top_p,
                          std::optional<int64_t> top_k, Estimator estimator, std::optional<int64_t> max_routed) {
  TORCH_CHECK_VALUE(z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble, "z: dtype ", z.scalar_type(),
                    " must be float32 or float64");
  TORCH_CHECK_VALUE(z.dim() == 2, "z: has ", z.dim(), " dimensions, must have 2");
  TORCH_CHECK_VALUE(z.is_contiguous(), "z: must be contiguous; call .contiguous()");
  TORCH_CHECK_VALUE(num_routed >= 1, "num_routed: ", num_routed, " must be at least 1");
  TORCH_CHECK_VALUE(num_null >= 0, "num_null: ", num_null, " must not be negative");
  const int64_t slots = num_routed + num_null, shared = z.size(1) - slots;
  TORCH_CHECK_VALUE(shared >= 0, "z: has ", z.size(1), " columns for ", slots, " dynamic slots");
  TORCH_CHECK_VALUE(!top_k || (*top_k >= 1 && *top_k <= slots), "top_k: ", top_k.value_or(0), " is not in 1..", slots);
  TORCH_CHECK_VALUE(!max_routed || *max_routed >= 0, "max_routed: ", max_routed.value_or(0), " must not be negative");
  return {z.size(0), slots, shared, num_routed, top_p, top_k.value_or(0), max_routed.value_or(-1), estimator};
}

inline const bool* bool_or_null(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<bool>() : nullptr; }

using ReleaseResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// release_route on either side: `run` is its kernel with all arguments but the last (a pool or a stream).
template <class Run>
ReleaseResults release_route(const at::Tensor& z, int64_t num_routed, int64_t num_null, double top_p,
                             std::optional<int64_t> top_k, double eps, const std::optional<at::Tensor>& gumbel,
                             const std::optional<at::Tensor>& bernoulli, std::optional<int64_t> max_routed,
                             const std::optional<at::Tensor>& padding, const std::optional<at::Tensor>& keep,
                             const Run& run) {
  const ToppRoute r = route_of(z, num_routed, num_null, top_p, top_k, Estimator::None, max_routed);
  const int64_t T = r.T, slots = r.num_dynamic;
  TORCH_CHECK_VALUE(eps >= 0, "eps: ", eps, " must not be negative");
  check(gumbel, z, z.scalar_type(), {T, slots, slots}, "gumbel");
  check(bernoulli, z, z.scalar_type(), {T, slots}, "bernoulli");
  check(padding, z, at::kBool, {T}, "padding");
  check(keep, z, at::kBool, {T, slots}, "keep");
  const auto real = z.options(), integers = real.dtype(at::kLong);
  at::Tensor weights = at::empty({T, slots}, real), shared_weights = at::empty({T, r.num_shared}, real);
  at::Tensor mask = at::empty({T, slots}, real.dtype(at::kBool)), k = at::empty({T}, integers);
  at::Tensor draw_rank = at::empty({T, slots}, integers), multiplier = at::empty({T, slots}, real);
  run(r, eps, dtype_of(z, "z"), z.const_data_ptr(), data_or_null(gumbel), data_or_null(bernoulli), bool_or_null(padding),
      bool_or_null(keep), mask.mutable_data_ptr<bool>(), weights.mutable_data_ptr(), shared_weights.mutable_data_ptr(),
      k.mutable_data_ptr<int64_t>(), draw_rank.mutable_data_ptr<int64_t>(), multiplier.mutable_data_ptr());
  return {weights, shared_weights, mask, k, draw_rank, multiplier};
}

// Its gradient: grad_z.
template <class Run>
at::Tensor release_route_backward(const std::optional<at::Tensor>& grad_weights,
                                  const std::optional<at::Tensor>& grad_shared, const at::Tensor& z, const at::Tensor& mask,
                                  const at::Tensor& draw_rank, const at::Tensor& multiplier,
                                  const std::optional<at::Tensor>& keep, double eps, const Run& run) {
  check(mask, z, at::kBool, {-1, -1}, "mask");
  const int64_t slots = mask.size(1);
  const ToppRoute r = route_of(z, slots, 0, 0, std::nullopt, Estimator::None, std::nullopt);
  check(mask, z, at::kBool, {r.T, slots}, "mask");
  check(draw_rank, z, at::kLong, {r.T, slots}, "draw_rank");
  check(multiplier, z, z.scalar_type(), {r.T, slots}, "multiplier");
  check(keep, z, at::kBool, {r.T, slots}, "keep");
  check(grad_weights, z, z.scalar_type(), {r.T, slots}, "grad_weights");
  check(grad_shared, z, z.scalar_type(), {r.T, r.num_shared}, "grad_shared");
  at::Tensor grad_z = at::empty(z.sizes(), z.options());
  run(r, eps, dtype_of(z, "z"), data_or_null(grad_weights), data_or_null(grad_shared), z.const_data_ptr(),
      mask.const_data_ptr<bool>(), bool_or_null(keep), draw_rank.const_data_ptr<int64_t>(), multiplier.const_data_ptr(),
      grad_z.mutable_data_ptr());
  return grad_z;
}

// The buffers that expert_mlp's backward adds weight gradients to: both or none, of the weights' shapes.
inline void check_main_grads(const std::optional<at::Tensor>& main_grad1, const std::optional<at::Tensor>& main_grad2,
                             const at::Tensor& w1, const at::Tensor& w2) {
  TORCH_CHECK_VALUE(main_grad1.has_value() == main_grad2.has_value(), "main_grad", main_grad1 ? 2 : 1,
                    ": missing; give both buffers or none");
  if (!main_grad1) return;
  const auto wide = accumulator_of(dtype_of(w1, "w1"));
  check(*main_grad1, w1, wide, w1.sizes(), "main_grad1");
  check(*main_grad2, w2, wide, w2.sizes(), "main_grad2");
}

}  // namespace omni
