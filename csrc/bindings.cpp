// The one file of the CPU side that sees torch: schemas of megatron_omni, argument checks, allocation, calls to kernels.h.
//
// Wrong arguments raise ValueError with the argument's name. Index arguments are checked against what they index (a
// pass over int64 metadata, small beside the rows it moves), so that no call reads or writes out of bounds. Gradients and
// fake kernels are registered from Python, in megatron_omni/ops/<op>.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "kernels.h"

namespace {

using at::Tensor;
using omni::DType;

const omni::Parallel pool() {
  return {at::get_num_threads(), [](int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
            at::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return DType::F32;
    case at::kBFloat16: return DType::BF16;
    case at::kHalf: return DType::F16;
    case at::kDouble: return DType::F64;
    default: TORCH_CHECK_VALUE(false, name, ": dtype ", x.scalar_type(), " is not float32, bfloat16, float16 or float64");
  }
}

void check_matrix(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, ": has ", x.dim(), " dimensions, must have 2");
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": must be contiguous; call .contiguous()");
}

void check_index(const Tensor& x, int64_t length, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kLong, name, ": dtype ", x.scalar_type(), " must be int64");
  TORCH_CHECK_VALUE(x.dim() == 1 && x.is_contiguous(), name, ": must be a contiguous vector");
  TORCH_CHECK_VALUE(x.numel() == length, name, ": has ", x.numel(), " entries, must have ", length);
}

void check_range(const Tensor& x, int64_t bound, const char* name) {
  const int64_t* p = x.const_data_ptr<int64_t>();
  bool good = true;
  for (int64_t i = 0, n = x.numel(); i < n; ++i) good &= static_cast<uint64_t>(p[i]) < static_cast<uint64_t>(bound);
  TORCH_CHECK_VALUE(good, name, ": has an entry outside 0..", bound - 1);
}

void check_offsets(const Tensor& x, int64_t last, const char* name) {
  const int64_t* p = x.const_data_ptr<int64_t>();
  bool good = p[0] == 0;
  for (int64_t i = 1, n = x.numel(); i < n; ++i) good &= p[i] >= p[i - 1];
  TORCH_CHECK_VALUE(good, name, ": must ascend from 0");
  TORCH_CHECK_VALUE(p[x.numel() - 1] == last, name, ": ends at ", p[x.numel() - 1], ", must end at ", last);
}

// ---- permute ---------------------------------------------------------------------------------------------------------

Tensor permute(const Tensor& x, const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows,
               int64_t num_rows) {
  const DType dtype = dtype_of(x, "x");
  check_matrix(x, "x");
  const int64_t T = x.size(0), H = x.size(1), A = row_token.numel();
  check_index(row_token, A, "row_token");
  check_index(token_offsets, T + 1, "token_offsets");
  check_index(token_rows, A, "token_rows");
  check_range(row_token, T, "row_token");
  check_range(token_rows, A, "token_rows");
  check_offsets(token_offsets, A, "token_offsets");
  TORCH_CHECK_VALUE(num_rows >= A, "num_rows: ", num_rows, " output rows cannot hold ", A, " assignments");
  Tensor out = at::empty({num_rows, H}, x.options());
  omni::cpu::permute(x.const_data_ptr(), row_token.const_data_ptr<int64_t>(), token_offsets.const_data_ptr<int64_t>(),
                     token_rows.const_data_ptr<int64_t>(), T, A, num_rows, H, dtype, out.mutable_data_ptr(), pool());
  return out;
}

}  // namespace

TORCH_LIBRARY(megatron_omni, m) {
  m.def("permute(Tensor x, Tensor row_token, Tensor token_offsets, Tensor token_rows, SymInt num_rows) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(megatron_omni, CPU, m) {
  m.impl("permute", permute);
}
