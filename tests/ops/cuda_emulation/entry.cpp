// kernels_cuda.h as C functions for ctypes: dtypes as integers, null for success, else the message.
#include "../../../csrc/cuda/gemm_tiles.cuh"
#include "../../../csrc/kernels_cuda.h"

#include <exception>
#include <string>

using omni::DType;
namespace cuda = omni::cuda;

namespace {
template <class F>
const char* guarded(const F& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
DType dt(int64_t code) { return static_cast<DType>(code); }
omni::ToppRoute route(const int64_t* sizes, double top_p) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], top_p, sizes[4], sizes[5], static_cast<omni::Estimator>(sizes[6])};
}
}  // namespace

extern "C" {
using P = const void*;
using I = const int64_t*;

const char* fill_permutation(const bool* map, I rank_in_expert, I offsets, I token_offsets, int64_t T, int64_t E, int64_t A,
                             int64_t* row_token, int64_t* row_expert, int64_t* token_rows) {
  return guarded([=] {
    cuda::fill_permutation(map, rank_in_expert, offsets, token_offsets, T, E, A, row_token, row_expert, token_rows, nullptr);
  });
}
const char* permute(P x, I row_token, int64_t A, int64_t num_rows, int64_t H, int64_t dtype, void* out) {
  return guarded([=] { cuda::permute(x, row_token, A, num_rows, H, dt(dtype), out, nullptr); });
}
const char* unpermute(P rows, P weights, I token_offsets, I token_rows, int64_t T, int64_t H, int64_t in, int64_t result,
                      void* out) {
  return guarded([=] { cuda::unpermute(rows, weights, token_offsets, token_rows, T, H, dt(in), dt(result), out, nullptr); });
}
const char* unpermute_backward(P grad_y, P rows, P weights, P factor, I row_token, int64_t A, int64_t num_rows, int64_t H,
                               int64_t dtype_rows, int64_t dtype_grad, void* grad_rows, void* grad_weights) {
  return guarded([=] {
    cuda::unpermute_backward(grad_y, rows, weights, factor, row_token, A, num_rows, H, dt(dtype_rows), dt(dtype_grad),
                             grad_rows, grad_weights, nullptr);
  });
}
const char* topp_route(I sizes, double top_p, int64_t dtype, P z, P gumbel, P bernoulli, const bool* padding, const bool* keep,
                       bool* mask, void* weights, void* shared_weights, void* scale, int64_t* k, int64_t* draw_rank) {
  return guarded([=] {
    cuda::topp_route(route(sizes, top_p), dt(dtype), z, gumbel, bernoulli, padding, keep, mask, weights, shared_weights,
                     scale, k, draw_rank, nullptr);
  });
}
const char* topp_route_backward(I sizes, double top_p, int64_t dtype, P grad_weights, P grad_shared, P weights,
                                P shared_weights, P scale, void* grad_z) {
  return guarded([=] {
    cuda::topp_route_backward(route(sizes, top_p), dt(dtype), grad_weights, grad_shared, weights, shared_weights, scale,
                              grad_z, nullptr);
  });
}
const char* release_route(I sizes, double top_p, double eps, int64_t dtype, P z, P gumbel, P bernoulli, const bool* padding,
                          const bool* keep, bool* mask, void* weights, void* shared_weights, int64_t* k, int64_t* draw_rank,
                          void* multiplier) {
  return guarded([=] {
    cuda::release_route(route(sizes, top_p), eps, dt(dtype), z, gumbel, bernoulli, padding, keep, mask, weights,
                        shared_weights, k, draw_rank, multiplier, nullptr);
  });
}
const char* release_route_backward(I sizes, double eps, int64_t dtype, P grad_weights, P grad_shared, P z, const bool* mask,
                                   const bool* keep, const int64_t* draw_rank, P multiplier, void* grad_z) {
  return guarded([=] {
    cuda::release_route_backward(route(sizes, 0), eps, dt(dtype), grad_weights, grad_shared, z, mask, keep, draw_rank,
                                 multiplier, grad_z, nullptr);
  });
}
const char* counter_uniform(I sample_ids, I positions, int64_t T, int64_t num_draws, int64_t call, float* out) {
  return guarded([=] {
    cuda::counter_uniform(sample_ids, positions, T, num_draws, static_cast<uint64_t>(call), out, nullptr);
  });
}
int64_t grouped_gemm_workspace(int64_t rows, int64_t E) { return static_cast<int64_t>(cuda::grouped_gemm_workspace(rows, E)); }
int64_t mma_shared_bytes(int64_t kind, int64_t tile_rows) {
  return static_cast<int64_t>(cuda::mma_shared_bytes(static_cast<cuda::Kind>(kind), static_cast<int>(tile_rows)));
}
const char* grouped_gemm(P x, P w, I offsets, int64_t rows, int64_t E, int64_t K, int64_t N, int64_t dtype,
                         int64_t transpose_w, void* y, void* workspace) {
  return guarded(
      [=] { cuda::grouped_gemm(x, w, offsets, rows, E, K, N, dt(dtype), transpose_w != 0, y, workspace, nullptr); });
}
const char* grouped_wgrad(P x, P dy, I offsets, int64_t rows, int64_t E, int64_t K, int64_t N, int64_t dtype,
                          int64_t dtype_dw, int64_t accumulate, void* dw, void* workspace) {
  return guarded([=] {
    cuda::grouped_wgrad(x, dy, offsets, rows, E, K, N, dt(dtype), dt(dtype_dw), accumulate != 0, dw, workspace, nullptr);
  });
}
const char* expert_mlp(P x, P w1, P w2, I offsets, P row_weight, int64_t rows, int64_t E, int64_t H, int64_t F,
                       int64_t dtype, void* h, void* a, void* y, void* workspace) {
  return guarded([=] {
    cuda::expert_mlp(x, w1, w2, offsets, row_weight, rows, E, H, F, dt(dtype), h, a, y, workspace, nullptr);
  });
}
const char* expert_mlp_backward(P dy, P x, P h, P w1, P w2, I offsets, P row_weight, int64_t rows, int64_t E, int64_t H,
                                int64_t F, int64_t dtype, int64_t dtype_dw, int64_t accumulate, void* a, void* dh, void* dx,
                                void* dw1, void* dw2, void* drow_weight, void* workspace) {
  return guarded([=] {
    cuda::expert_mlp_backward(dy, x, h, w1, w2, offsets, row_weight, rows, E, H, F, dt(dtype), dt(dtype_dw),
                              accumulate != 0, a, dh, dx, dw1, dw2, drow_weight, workspace, nullptr);
  });
}
}
