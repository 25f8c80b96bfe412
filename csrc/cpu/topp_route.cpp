// Dynamic-capacity routing of one token at a time: order, prefix, mask, softmax over what was taken, estimator scale.
//
// The formulas are those of megatron_omni/ops/topp_route.py. A token's logits (a few to a few hundred) stay in registers
// and the first-level cache from the first read to the last write; nothing of size [T, E, E] or [T, E] is made between.
// fp32 logits are ordered and exponentiated with vectors where the engine has them (topp_route_kernels.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/light_kernels.h"
#include "kernels.h"

namespace omni::cpu {
namespace {

constexpr int64_t kSlotsPerTask = 4096;  // less is not worth another thread
constexpr int64_t kFewSlots = 16;        // up to here a sort is as fast as counting

// Sort keys: ascending integers for descending values, ties by index, NaN first (as torch.sort). Always a strict order,
// so no input can lead the sort astray.
struct Key32 {
  uint64_t key;
  Key32() = default;
  Key32(float value, int64_t index) {
    value += 0.0f;  // -0 ties with 0
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t ascending = value != value ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    key = static_cast<uint64_t>(~ascending) << 32 | static_cast<uint64_t>(index);
  }
  int64_t index() const { return static_cast<int64_t>(key & 0xFFFFFFFFu); }
  bool operator<(const Key32& other) const { return key < other.key; }
};

struct Key64 {
  uint64_t key;
  int64_t place;
  Key64() = default;
  Key64(double value, int64_t index) : place(index) {
    value += 0.0;
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    key = ~(value != value ? ~uint64_t{0} : bits >> 63 ? ~bits : bits | uint64_t{1} << 63);
  }
  int64_t index() const { return place; }
  bool operator<(const Key64& other) const { return key != other.key ? key < other.key : place < other.place; }
};

template <class Key>
void sort_keys(Key* keys, int64_t n) {
  if (n > 24) return std::sort(keys, keys + n);
  for (int64_t i = 1; i < n; ++i) {
    const Key key = keys[i];
    int64_t j = i;
    for (; j > 0 && key < keys[j - 1]; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// What a thread needs for one token after another.
template <class Real, class Key>
struct Scratch {
  std::vector<Key> keys;
  std::vector<int64_t> order;  // slot at each place
  std::vector<Real> p;
  bool vectors;  // whether they are ordered and exponentiated with vectors
  std::vector<int32_t> ranked;
  explicit Scratch(int64_t n)
      : keys(n), order(n), p(n), vectors(std::is_same_v<Real, float> && n > kFewSlots && engine() != Engine::Portable),
        ranked(vectors ? (n + 15) / 16 * 16 : 0) {}
};

template <class Real>
struct Token {
  const Real *z, *gumbel, *bernoulli;
  bool padding;
  const bool* keep;
  bool* mask;
  Real *weights, *shared, *scale;
  int64_t *k, *draw_rank;
};

// delta: when a slot was drawn, nothing still left had a larger z (ties: lower index). Walked from the last drawn slot.
template <class Real>
void write_scale(const ToppRoute& r, const Token<Real>& token, const int64_t* order) {
  const Real keep = static_cast<Real>(r.estimator == Estimator::Paper ? 5.0 / 8 : 1.0 / 4);
  int64_t best = order[r.num_dynamic - 1];
  for (int64_t place = r.num_dynamic - 1; place >= 0; --place) {
    const int64_t e = order[place];
    const bool beaten = token.z[best] > token.z[e] || (token.z[best] == token.z[e] && best < e);
    if (!beaten) best = e;
    token.scale[e] = !beaten || token.bernoulli[e] < keep ? Real(1) : static_cast<Real>(1.0 / 3);
  }
}

// order, and token.draw_rank, its inverse
template <class Real, class Key>
void order_slots(const Token<Real>& token, int64_t E, Scratch<Real, Key>& scratch) {
  if constexpr (std::is_same_v<Real, float>) {
    if (scratch.vectors) {
      with_vectors([&](auto isa) {
        LightKernels<decltype(isa)>::rank_slots(token.z, token.gumbel, E, scratch.ranked.data(), token.draw_rank);
      });
      for (int64_t e = 0; e < E; ++e) scratch.order[token.draw_rank[e]] = e;
      return;
    }
  }
  Key* keys = scratch.keys.data();
  for (int64_t e = 0; e < E; ++e) keys[e] = Key(token.gumbel ? token.z[e] + token.gumbel[e] : token.z[e], e);
  sort_keys(keys, E);
  for (int64_t place = 0; place < E; ++place) {
    scratch.order[place] = keys[place].index();
    token.draw_rank[keys[place].index()] = place;
  }
}

// scratch.p[e] = exp(z[e] - top); their sum.
template <class Real, class Key>
Real exponentials(const Real* z, int64_t n, Real top, Scratch<Real, Key>& scratch) {
  Real* p = scratch.p.data();
  Real sum = 0;
  if constexpr (std::is_same_v<Real, float>) {
    const auto vectors = [&](auto isa) { sum = LightKernels<decltype(isa)>::exponentials(z, n, top, p); };
    if (scratch.vectors && with_vectors(vectors)) return sum;
  }
  for (int64_t e = 0; e < n; ++e) sum += p[e] = std::exp(z[e] - top);
  return sum;
}

template <class Real, class Key>
void route_token(const ToppRoute& r, const Token<Real>& token, Scratch<Real, Key>& scratch) {
  const int64_t E = r.num_dynamic;
  order_slots(token, E, scratch);
  const int64_t* order = scratch.order.data();
  const Real* p = scratch.p.data();

  int64_t count = r.top_k;
  if (count == 0) {
    Real top = token.z[0];
    for (int64_t e = 1; e < E; ++e) top = std::max(top, token.z[e]);
    const Real sum = exponentials(token.z, E, top, scratch);
    double taken = 0;
    // The last slot is never asked: sums in finite precision may stay just below 1.
    for (count = 1; count < E; ++count) {
      taken += p[order[count - 1]] / sum;
      if (!(static_cast<Real>(taken) < static_cast<Real>(r.top_p))) break;
    }
  }

  std::fill(token.mask, token.mask + E, false);
  std::fill(token.weights, token.weights + E, Real(0));
  int64_t selected = 0;
  if (!token.padding) {
    int64_t real = 0;
    for (int64_t place = 0; place < count; ++place) {
      const int64_t e = order[place];
      if (e < r.num_routed && r.max_routed >= 0 && real >= r.max_routed) continue;
      real += e < r.num_routed;
      if (token.keep && !token.keep[e]) continue;
      token.mask[e] = true;
      ++selected;
    }
  }
  *token.k = selected;

  Real top = -std::numeric_limits<Real>::infinity(), sum = 0;
  for (int64_t e = 0; e < E; ++e)
    if (token.mask[e]) top = std::max(top, token.z[e]);
  for (int64_t s = 0; s < r.num_shared; ++s) top = std::max(top, token.z[E + s]);
  for (int64_t e = 0; e < E; ++e)
    if (token.mask[e]) sum += token.weights[e] = std::exp(token.z[e] - top);
  for (int64_t s = 0; s < r.num_shared; ++s) sum += token.shared[s] = std::exp(token.z[E + s] - top);
  for (int64_t e = 0; e < E; ++e)
    if (token.mask[e]) token.weights[e] /= sum;
  for (int64_t s = 0; s < r.num_shared; ++s) token.shared[s] /= sum;

  if (r.estimator == Estimator::None || token.bernoulli == nullptr) {
    std::fill(token.scale, token.scale + E, Real(1));
    return;
  }
  write_scale(r, token, order);
  for (int64_t e = 0; e < E; ++e) token.weights[e] *= token.scale[e];
}

template <class Real, class Key>
void route(const ToppRoute& r, const Real* z, const Real* gumbel, const Real* bernoulli, const bool* padding,
           const bool* keep, bool* mask, Real* weights, Real* shared, Real* scale, int64_t* k, int64_t* draw_rank,
           const Parallel& parallel) {
  const int64_t E = r.num_dynamic, width = E + r.num_shared;
  const int64_t tasks = std::clamp<int64_t>(r.T * width / kSlotsPerTask, 1, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    Scratch<Real, Key> scratch(E);
    for (int64_t t = r.T * task / tasks; t < r.T * (task + 1) / tasks; ++t) {
      route_token(r,
                  Token<Real>{z + t * width, gumbel ? gumbel + t * E : nullptr, bernoulli ? bernoulli + t * E : nullptr,
                              padding != nullptr && padding[t], keep ? keep + t * E : nullptr, mask + t * E,
                              weights + t * E, shared + t * r.num_shared, scale + t * E, k + t, draw_rank + t * E},
                  scratch);
    }
  });
}

// w~ = weights / scale is the softmax before the estimator; d w~ is scale dW for `paper` (ordinary autograd through the
// product) and dW itself for `grin`. dz = w~ (d w~ - <w~, d w~>), shared slots included.
template <class Real>
void route_backward(const ToppRoute& r, const Real* grad_weights, const Real* grad_shared, const Real* weights,
                    const Real* shared, const Real* scale, Real* grad_z, const Parallel& parallel) {
  const int64_t E = r.num_dynamic, S = r.num_shared;
  const int64_t tasks = std::clamp<int64_t>(r.T * (E + S) / kSlotsPerTask, 1, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    for (int64_t t = r.T * task / tasks; t < r.T * (task + 1) / tasks; ++t) {
      Real* out = grad_z + t * (E + S);
      double dot = 0;
      for (int64_t e = 0; e < E; ++e) {
        const int64_t i = t * E + e;
        const Real g = grad_weights ? grad_weights[i] : Real(0);
        out[e] = weights[i] == 0 ? Real(0) : r.estimator == Estimator::Paper ? g * scale[i] : g;
        dot += static_cast<double>(weights[i] / scale[i]) * out[e];
      }
      for (int64_t s = 0; s < S; ++s) {
        out[E + s] = grad_shared ? grad_shared[t * S + s] : Real(0);
        dot += static_cast<double>(shared[t * S + s]) * out[E + s];
      }
      for (int64_t e = 0; e < E; ++e) {
        const int64_t i = t * E + e;
        out[e] = weights[i] / scale[i] * static_cast<Real>(out[e] - dot);
      }
      for (int64_t s = 0; s < S; ++s) out[E + s] = shared[t * S + s] * static_cast<Real>(out[E + s] - dot);
    }
  });
}

}  // namespace

void topp_route(const ToppRoute& r, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, void* scale,
                int64_t* k, int64_t* draw_rank, const Parallel& parallel) {
  if (dtype == DType::F32) {
    route<float, Key32>(r, static_cast<const float*>(z), static_cast<const float*>(gumbel),
                        static_cast<const float*>(bernoulli), padding, keep, mask, static_cast<float*>(weights),
                        static_cast<float*>(shared_weights), static_cast<float*>(scale), k, draw_rank, parallel);
  } else {
    route<double, Key64>(r, static_cast<const double*>(z), static_cast<const double*>(gumbel),
                         static_cast<const double*>(bernoulli), padding, keep, mask, static_cast<double*>(weights),
                         static_cast<double*>(shared_weights), static_cast<double*>(scale), k, draw_rank, parallel);
  }
}

void topp_route_backward(const ToppRoute& r, DType dtype, const void* grad_weights, const void* grad_shared,
                         const void* weights, const void* shared_weights, const void* scale, void* grad_z,
                         const Parallel& parallel) {
  const auto run = [&](auto* real) {
    using Real = std::remove_pointer_t<decltype(real)>;
    route_backward(r, static_cast<const Real*>(grad_weights), static_cast<const Real*>(grad_shared),
                   static_cast<const Real*>(weights), static_cast<const Real*>(shared_weights),
                   static_cast<const Real*>(scale), static_cast<Real*>(grad_z), parallel);
  };
  if (dtype == DType::F32) run(static_cast<float*>(nullptr)); else run(static_cast<double*>(nullptr));
}

}  // namespace omni::cpu
