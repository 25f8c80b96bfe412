// The published code's routing of one token and its gradient, for a CPU thread or a CUDA thread: the same source runs on
// both. What is computed: `release_select` and `route_selected` of megatron_omni/ops/topp_route.py.
//
// Nothing but the results is stored: whether a slot was taken before step j is `draw_rank < j`, and the candidates of a
// step are found again from z. A token has few slots (the published model 5), and few of them are drawn.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"

#if defined(__CUDACC__)
#define OMNI_HOST_DEVICE __host__ __device__
#else
#define OMNI_HOST_DEVICE
#endif

namespace omni::release {

inline constexpr double kNormEps = 1e-6, kScaleLow = 0.3333, kScaleRange = 0.6667, kKeep = 0.75;  // of the published code

// Pointers to one token's entries; gumbel [slots, slots] (row j: the noise of step j), bernoulli and keep may be null.
template <class T>
struct Token {
  const T *z, *gumbel, *bernoulli;
  bool padding;
  const bool* keep;
  bool* mask;
  T *weights, *shared_weights;
  int64_t *k, *draw_rank;  // draw_rank: the step that drew a slot, `slots` where none did
  T* multiplier;           // of a selected slot before normalisation, 0 elsewhere
};

template <class T>
struct TokenGradient {
  const T *grad_weights, *grad_shared;  // may be null: zero
  const T* z;
  const bool *mask, *keep;
  const int64_t* draw_rank;
  const T* multiplier;
  T* grad_z;
};

// The arguments of the ops as arrays over tokens.
template <class T>
struct Tokens {
  int64_t slots, shared;
  const bool* padding;
  Token<T> first;

  Tokens(const ToppRoute& r, const void* z, const void* gumbel, const void* bernoulli, const bool* padding, const bool* keep,
         bool* mask, void* weights, void* shared_weights, int64_t* k, int64_t* draw_rank, void* multiplier)
      : slots(r.num_dynamic), shared(r.num_shared), padding(padding),
        first{static_cast<const T*>(z), static_cast<const T*>(gumbel), static_cast<const T*>(bernoulli), false, keep, mask,
              static_cast<T*>(weights), static_cast<T*>(shared_weights), k, draw_rank, static_cast<T*>(multiplier)} {}

  OMNI_HOST_DEVICE Token<T> operator[](int64_t t) const {
    const int64_t at = t * slots;
    return {first.z + t * (slots + shared), first.gumbel == nullptr ? nullptr : first.gumbel + at * slots,
            first.bernoulli == nullptr ? nullptr : first.bernoulli + at, padding != nullptr && padding[t],
            first.keep == nullptr ? nullptr : first.keep + at, first.mask + at, first.weights + at,
            first.shared_weights + t * shared, first.k + t, first.draw_rank + at, first.multiplier + at};
  }
};

template <class T>
struct TokenGradients {
  int64_t slots, shared;
  TokenGradient<T> first;

  TokenGradients(const ToppRoute& r, const void* grad_weights, const void* grad_shared, const void* z, const bool* mask,
                 const bool* keep, const int64_t* draw_rank, const void* multiplier, void* grad_z)
      : slots(r.num_dynamic), shared(r.num_shared),
        first{static_cast<const T*>(grad_weights), static_cast<const T*>(grad_shared), static_cast<const T*>(z), mask, keep,
              draw_rank, static_cast<const T*>(multiplier), static_cast<T*>(grad_z)} {}

  OMNI_HOST_DEVICE TokenGradient<T> operator[](int64_t t) const {
    const int64_t at = t * slots, row = t * (slots + shared);
    return {first.grad_weights == nullptr ? nullptr : first.grad_weights + at,
            first.grad_shared == nullptr ? nullptr : first.grad_shared + t * shared, first.z + row, first.mask + at,
            first.keep == nullptr ? nullptr : first.keep + at, first.draw_rank + at, first.multiplier + at,
            first.grad_z + row};
  }
};

// The largest of z and the sum of exp(z - it) over the slots that are left at step j and nearly tied with the largest.
template <class T>
struct Candidates {
  const T* z;
  const int64_t* draw_rank;
  int64_t slots, step;
  T limit, largest, total;

  OMNI_HOST_DEVICE Candidates(const T* z, const int64_t* draw_rank, int64_t slots, int64_t step, double eps)
      : z(z), draw_rank(draw_rank), slots(slots), step(step), limit(static_cast<T>(2 * eps)), largest(-INFINITY), total(0) {
    using std::exp;
    for (int64_t e = 0; e < slots; ++e) {
      if (draw_rank[e] >= step && z[e] > largest) largest = z[e];
    }
    for (int64_t e = 0; e < slots; ++e) {
      if (holds(e)) total += exp(z[e] - largest);
    }
  }

  // 0 / 0 is NaN and compares false: equal logits of 0 stay in.
  OMNI_HOST_DEVICE bool holds(int64_t e) const {
    using std::fabs;
    if (draw_rank[e] < step) return false;
    const T a = fabs(z[e]), b = fabs(largest);
    return !((largest - z[e]) / (a > b ? a : b) > limit);
  }

  OMNI_HOST_DEVICE T softmax(int64_t e) const {
    using std::exp;
    return exp(z[e] - largest) / total;
  }
};

// Slots that the token takes: the shortest prefix of the logits, largest first, whose softmax reaches top_p.
template <class T>
OMNI_HOST_DEVICE int64_t count_slots(const ToppRoute& r, const T* z) {
  using std::exp;
  const int64_t n = r.num_dynamic;
  if (r.top_k > 0) return r.top_k < n ? r.top_k : n;
  T largest = -INFINITY, total = 0;
  for (int64_t e = 0; e < n; ++e) largest = z[e] > largest ? z[e] : largest;
  for (int64_t e = 0; e < n; ++e) total += exp(z[e] - largest);
  int64_t count = 1, last = -1;
  T taken = 0;
  for (; count < n; ++count) {  // the last slot is never asked: sums in finite precision may stay just below 1
    int64_t next = -1;          // the largest after `last`, ties by index
    for (int64_t e = 0; e < n; ++e) {
      const bool is_after = last < 0 || z[e] < z[last] || (z[e] == z[last] && e > last);
      if (is_after && (next < 0 || z[e] > z[next])) next = e;
    }
    if (next < 0) break;  // logits that are no numbers
    taken += exp(z[next] - largest) / total;
    if (!(taken < static_cast<T>(r.top_p))) break;
    last = next;
  }
  return count;
}

template <class T>
OMNI_HOST_DEVICE void draw_slots(const ToppRoute& r, double eps, const Token<T>& t) {
  const int64_t n = r.num_dynamic, count = count_slots(r, t.z);
  int64_t real_taken = 0;
  for (int64_t e = 0; e < n; ++e) {
    t.draw_rank[e] = n;
    t.multiplier[e] = 0;
    t.mask[e] = false;
  }
  for (int64_t step = 0; step < count; ++step) {
    const Candidates<T> candidates(t.z, t.draw_rank, n, step, eps);
    const T* const noise = t.gumbel == nullptr ? nullptr : t.gumbel + step * n;
    int64_t drawn = -1, best = -1;
    T drawn_key = 0;
    for (int64_t e = 0; e < n; ++e) {
      if (!candidates.holds(e)) continue;
      const T key = noise == nullptr ? t.z[e] : t.z[e] + noise[e];
      if (drawn < 0 || key > drawn_key) {
        drawn = e;
        drawn_key = key;
      }
      if (best < 0 || t.z[e] > t.z[best]) best = e;
    }
    T value = candidates.softmax(drawn);
    if (t.bernoulli != nullptr) {
      const bool is_full = drawn == best || t.bernoulli[drawn] > static_cast<T>(kKeep);
      value *= static_cast<T>(kScaleLow) + static_cast<T>(kScaleRange) * static_cast<T>(is_full);
    }
    t.draw_rank[drawn] = step;
    const bool is_real = drawn < r.num_routed;
    if (is_real && r.max_routed >= 0 && real_taken >= r.max_routed) continue;
    real_taken += is_real;
    if (t.padding) continue;
    t.mask[drawn] = true;
    t.multiplier[drawn] = value;
  }
}

// Softmax over the selected and the shared slots, in two passes of the caller: its largest logit and its sum.
template <class T>
struct Softmax {
  T largest, total;
  OMNI_HOST_DEVICE Softmax(const T* z, const bool* mask, int64_t slots, int64_t columns) : largest(-INFINITY), total(0) {
    using std::exp;
    for (int64_t e = 0; e < columns; ++e) {
      if ((e >= slots || mask[e]) && z[e] > largest) largest = z[e];
    }
    for (int64_t e = 0; e < columns; ++e) {
      if (e >= slots || mask[e]) total += exp(z[e] - largest);
    }
  }
  OMNI_HOST_DEVICE T operator()(T z) const {
    using std::exp;
    return exp(z - largest) / total;
  }
};

template <class T>
OMNI_HOST_DEVICE void route(const ToppRoute& r, double eps, const Token<T>& t) {
  const int64_t n = r.num_dynamic;
  draw_slots(r, eps, t);
  T sum = 0, kept = 0, share = 0;
  for (int64_t e = 0; e < n; ++e) sum += t.multiplier[e];
  sum += static_cast<T>(kNormEps);
  int64_t k = 0;
  for (int64_t e = 0; e < n; ++e) {
    t.weights[e] = t.multiplier[e] / sum;
    if (t.keep != nullptr && !t.keep[e]) {
      t.mask[e] = false;
      t.weights[e] = 0;
    }
    kept += t.weights[e];
    k += t.mask[e];
  }
  *t.k = k;
  const Softmax<T> softmax(t.z, t.mask, n, n + r.num_shared);
  for (int64_t e = 0; e < n; ++e) share += t.mask[e] ? softmax(t.z[e]) : T(0);
  for (int64_t e = 0; e < n; ++e) {
    if (t.keep != nullptr) t.weights[e] /= kept + static_cast<T>(kNormEps);
    t.weights[e] *= share;
  }
  for (int64_t s = 0; s < r.num_shared; ++s) t.shared_weights[s] = softmax(t.z[n + s]);
}

// With m the multipliers, M their sum and e kNormEps: weights = S rho, S the dynamic share of the softmax v, rho = m / (M + e),
// and where capacity denies slots rho = u / (U + e), u = keep m / (M + e), U its sum. A multiplier is the softmax over
// the candidates of its step; the estimator's scale of its value has no gradient.
template <class T>
OMNI_HOST_DEVICE void route_backward(const ToppRoute& r, double eps, const TokenGradient<T>& t) {
  const int64_t n = r.num_dynamic, columns = n + r.num_shared;
  const T e0 = static_cast<T>(kNormEps);
  const auto keeps = [&](int64_t e) { return t.keep == nullptr || t.keep[e] ? T(1) : T(0); };
  const auto grad = [&](int64_t e) { return t.grad_weights == nullptr ? T(0) : t.grad_weights[e]; };
  const auto grad_shared = [&](int64_t s) { return t.grad_shared == nullptr ? T(0) : t.grad_shared[s]; };

  T M = e0, U = e0, share = 0, dot_u = 0;
  const Softmax<T> softmax(t.z, t.mask, n, columns);
  for (int64_t e = 0; e < n; ++e) M += t.multiplier[e];
  for (int64_t e = 0; e < n; ++e) {
    const T u = keeps(e) * t.multiplier[e] / M;
    U += u;
    dot_u += grad(e) * u;  // without the factor S
    share += t.mask[e] ? softmax(t.z[e]) : T(0);
  }
  const bool twice = t.keep != nullptr;  // normalised a second time
  const T grad_share = twice ? dot_u / U : dot_u;
  const auto grad_u = [&](int64_t e) {
    const T g = share * grad(e);
    return twice ? keeps(e) * (g / U - share * dot_u / (U * U)) : g;
  };
  T dot_m = 0;
  for (int64_t e = 0; e < n; ++e) dot_m += grad_u(e) * t.multiplier[e];

  T dot = 0;
  for (int64_t e = 0; e < columns; ++e) {
    const T v = e >= n || t.mask[e] ? softmax(t.z[e]) : T(0);
    dot += v * (e < n ? grad_share : grad_shared(e - n));
  }
  for (int64_t e = 0; e < columns; ++e) {
    const T v = e >= n || t.mask[e] ? softmax(t.z[e]) : T(0);
    t.grad_z[e] = v * ((e < n ? grad_share : grad_shared(e - n)) - dot);
  }
  for (int64_t drawn = 0; drawn < n; ++drawn) {
    if (t.multiplier[drawn] == 0) continue;
    const Candidates<T> candidates(t.z, t.draw_rank, n, t.draw_rank[drawn], eps);
    const T value = candidates.softmax(drawn), g = (grad_u(drawn) / M - dot_m / (M * M)) * value;
    for (int64_t e = 0; e < n; ++e) {
      if (candidates.holds(e)) t.grad_z[e] += g * (T(e == drawn) - candidates.softmax(e));
    }
  }
}

}  // namespace omni::release
