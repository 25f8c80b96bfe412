// Routing of the published code, a token at a time (release_route.h).
#include "release_route.h"

#include <algorithm>

namespace omni::cpu {
namespace {

constexpr int64_t kSlotsPerTask = 1024;  // less is not worth another thread

// f(t) for every token, cut into a task for each thread that is worth it
template <class F>
void for_each_token(const ToppRoute& r, const Parallel& parallel, const F& f) {
  const int64_t tasks = std::clamp<int64_t>(r.T * (r.num_dynamic + r.num_shared) / kSlotsPerTask, 1, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    for (int64_t t = r.T * task / tasks; t < r.T * (task + 1) / tasks; ++t) f(t);
  });
}

template <class F>
void with_real(DType dtype, const F& f) {
  dtype == DType::F32 ? f(float{}) : f(double{});
}

}  // namespace

void release_route(const ToppRoute& r, double eps, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                   const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, int64_t* k,
                   int64_t* draw_rank, void* multiplier, const Parallel& parallel) {
  with_real(dtype, [&](auto real) {
    const release::Tokens<decltype(real)> tokens(r, z, gumbel, bernoulli, padding, keep, mask, weights, shared_weights, k,
                                                 draw_rank, multiplier);
    for_each_token(r, parallel, [&](int64_t t) { release::route(r, eps, tokens[t]); });
  });
}

void release_route_backward(const ToppRoute& r, double eps, DType dtype, const void* grad_weights, const void* grad_shared,
                            const void* z, const bool* mask, const bool* keep, const int64_t* draw_rank,
                            const void* multiplier, void* grad_z, const Parallel& parallel) {
  with_real(dtype, [&](auto real) {
    const release::TokenGradients<decltype(real)> tokens(r, grad_weights, grad_shared, z, mask, keep, draw_rank, multiplier,
                                                         grad_z);
    for_each_token(r, parallel, [&](int64_t t) { release::route_backward(r, eps, tokens[t]); });
  });
}

}  // namespace omni::cpu
