// What the CPU's and the GPU's bindings ask of an argument in the same words: ValueErrors that begin with its name.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

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
