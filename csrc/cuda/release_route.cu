// Routing of the published code, a thread a token: the source is the CPU's (release_route.h). A token's slots are a few
// words that stay in the first-level cache; the reference's loop over slots launches some twenty kernels a slot.
#include "../release_route.h"

#include "device.cuh"

namespace omni::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 132 * 16;

template <class Tokens>
__global__ void __launch_bounds__(kThreads) release_route_kernel(ToppRoute r, double eps, Tokens tokens) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < r.T; t += step) {
    release::route(r, eps, tokens[t]);
  }
}

template <class Tokens>
__global__ void __launch_bounds__(kThreads) release_route_backward_kernel(ToppRoute r, double eps, Tokens tokens) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < r.T; t += step) {
    release::route_backward(r, eps, tokens[t]);
  }
}

template <class F>
void with_real(DType dtype, const F& f) {
  if (dtype == DType::F32) return f(float{});
  if (dtype == DType::F64) return f(double{});
  throw std::runtime_error("release_route: logits are float32 or float64");
}

unsigned blocks_for(int64_t tokens) {
  const int64_t blocks = div_up(tokens, kThreads);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace

void release_route(const ToppRoute& r, double eps, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                   const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, int64_t* k,
                   int64_t* draw_rank, void* multiplier, void* stream) {
  if (r.T == 0) return;
  with_real(dtype, [&](auto real) {
    using Tokens = release::Tokens<decltype(real)>;
    const Tokens tokens(r, z, gumbel, bernoulli, padding, keep, mask, weights, shared_weights, k, draw_rank, multiplier);
    OMNI_LAUNCH(release_route_kernel<Tokens>, blocks_for(r.T), kThreads, 0, stream, r, eps, tokens);
  });
  check_launch("release_route");
}

void release_route_backward(const ToppRoute& r, double eps, DType dtype, const void* grad_weights, const void* grad_shared,
                            const void* z, const bool* mask, const bool* keep, const int64_t* draw_rank,
                            const void* multiplier, void* grad_z, void* stream) {
  if (r.T == 0) return;
  with_real(dtype, [&](auto real) {
    using Tokens = release::TokenGradients<decltype(real)>;
    const Tokens tokens(r, grad_weights, grad_shared, z, mask, keep, draw_rank, multiplier, grad_z);
    OMNI_LAUNCH(release_route_backward_kernel<Tokens>, blocks_for(r.T), kThreads, 0, stream, r, eps, tokens);
  });
  check_launch("release_route_backward");
}

}  // namespace omni::cuda
