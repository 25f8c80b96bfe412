// Top-P routing with its gradient, and the counter-based draws, on odd sizes: orders and draws exactly, what follows
// from them against the formulas of megatron_omni/ops/topp_route.py in float64.
#include <limits>
#include <random>

#include "checks.h"

using namespace omni;

namespace {

constexpr double kTopP = 0.7;
std::mt19937 generator(0);
int64_t cases = 0;

template <class Real>
struct Token {
  const Real *z, *gumbel, *bernoulli;
  bool padding;
  const bool* keep;
  const bool* mask;
  const Real *weights, *shared, *scale;
  const int64_t *k, *draw_rank;
};

// Slots in the order in which they are drawn: largest first, a number that is none before all, ties by index.
template <class Real>
std::vector<int64_t> draw_order(const Token<Real>& t, int64_t n) {
  std::vector<Real> value(n);
  std::vector<int64_t> order(n);
  for (int64_t e = 0; e < n; ++e) value[e] = t.gumbel ? t.z[e] + t.gumbel[e] : t.z[e], order[e] = e;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return value[a] != value[a] ? value[b] == value[b] : value[a] > value[b];
  });
  return order;
}

template <class Real>
void check_token(const ToppRoute& r, const Token<Real>& t) {
  const int64_t n = r.num_dynamic, S = r.num_shared;
  const double u = kOps * unit<Real>();
  const auto order = draw_order(t, n);
  for (int64_t place = 0; place < n; ++place) check_true(t.draw_rank[order[place]] == place, "draw_rank");
  for (int64_t e = 0; e < n + S; ++e)
    if (!std::isfinite(t.z[e])) return;  // weights of infinite logits are no numbers

  double top = t.z[0], sum = 0, taken = 0;
  for (int64_t e = 0; e < n; ++e) top = std::max<double>(top, t.z[e]);
  for (int64_t e = 0; e < n; ++e) sum += std::exp(t.z[e] - top);
  int64_t count = r.top_k;
  for (int64_t place = 0; r.top_k == 0 && place < n; ++place) {
    ++count;
    taken += std::exp(t.z[order[place]] - top) / sum;
    if (std::fabs(taken - kTopP) < n * u && place + 1 < n) return;  // rounding decides whether one more is taken
    if (taken >= kTopP) break;
  }
  std::vector<bool> mask(n, false);
  int64_t real = 0, selected = 0;
  for (int64_t place = 0; place < count && !t.padding; ++place) {
    const int64_t e = order[place];
    if (e < r.num_routed && r.max_routed >= 0 && real++ >= r.max_routed) continue;
    mask[e] = !t.keep || t.keep[e];
    selected += mask[e];
  }
  check_true(*t.k == selected, "k");

  double total = 0;
  for (int64_t e = 0; e < n + S; ++e)
    if (e >= n || mask[e]) total += std::exp(t.z[e] - top);
  for (int64_t e = 0; e < n; ++e) {
    check_true(t.mask[e] == mask[e], "mask");
    bool largest = true;  // of what was left when it was drawn
    for (int64_t other = 0; other < n; ++other) {
      const bool larger = t.z[other] > t.z[e] || (t.z[other] == t.z[e] && other < e);
      if (larger && t.draw_rank[other] > t.draw_rank[e]) largest = false;
    }
    const double keep = r.estimator == Estimator::Paper ? 5.0 / 8 : 1.0 / 4;
    const bool full = r.estimator == Estimator::None || !t.bernoulli || largest || t.bernoulli[e] < keep;
    const double scale = full ? 1 : 1.0 / 3, weight = mask[e] ? scale * std::exp(t.z[e] - top) / total : 0;
    check(t.scale[e], scale, unit<Real>(), "scale", e);
    check(t.weights[e], weight, u * weight, "weights", e);
  }
  for (int64_t s = 0; s < S; ++s) {
    const double weight = std::exp(t.z[n + s] - top) / total;
    check(t.shared[s], weight, u * weight, "shared_weights", s);
  }
}

template <class Real>
void check_gradient(const ToppRoute& r, const Token<Real>& t, const Real* grad, const Real* grad_shared,
                    const Real* grad_z) {
  const int64_t n = r.num_dynamic, S = r.num_shared;
  std::vector<double> w(n + S), d(n + S);
  double dot = 0, size = 0;
  for (int64_t e = 0; e < n + S; ++e) {
    const bool dynamic = e < n;
    w[e] = dynamic ? t.weights[e] / double(t.scale[e]) : t.shared[e - n];
    d[e] = dynamic ? (grad ? grad[e] : 0) : (grad_shared ? grad_shared[e - n] : 0);
    if (dynamic && r.estimator == Estimator::Paper) d[e] *= t.scale[e];
    if (!std::isfinite(w[e])) return;
    dot += w[e] * d[e];
    size += std::fabs(w[e] * d[e]);
  }
  for (int64_t e = 0; e < n + S; ++e)
    check(grad_z[e], w[e] * (d[e] - dot), kOps * unit<Real>() * w[e] * (std::fabs(d[e]) + size), "grad_z", e);
}

template <class Real>
void routing(int64_t T, int64_t routed, int64_t null, int64_t shared, bool wild) {
  const int64_t slots = routed + null, width = slots + shared;
  std::normal_distribution<Real> normal;
  Guarded<Real> z(T * width), gumbel(T * slots), bernoulli(T * slots), grad_shared(T * shared);
  Guarded<bool> padding(T), keep(T * slots);
  for (int64_t i = 0; i < T * width; ++i) z[i] = i % 7 == 3 ? Real(0.5) : normal(generator);  // some are equal
  for (int64_t i = 0; i < T * slots; ++i) {
    gumbel[i] = normal(generator);
    bernoulli[i] = static_cast<Real>(draw() + 0.5);
    keep[i] = i % 3 != 1;
  }
  fill(grad_shared);
  for (int64_t t = 0; t < T; ++t) padding[t] = t % 5 == 4;
  if (wild && T * slots > 4) {
    z[1] = std::numeric_limits<Real>::quiet_NaN();
    z[3] = std::numeric_limits<Real>::infinity();
    z[4] = -std::numeric_limits<Real>::infinity();
    z[width + width / 2] = 0, z[width] = -Real(0);  // equal
  }
  for (int variant = 0; variant < 8; ++variant) {
    const Parallel& parallel = cases++ % 2 ? one : many;
    const auto estimator = static_cast<Estimator>(variant % 3);
    const ToppRoute r{T, slots, shared, routed, kTopP, variant == 6 ? slots : 0, variant == 7 ? 1 : -1, estimator};
    Guarded<bool> mask(T * slots);
    Guarded<Real> weights(T * slots), shared_weights(T * shared), scale(T * slots), grad_z(T * width);
    Guarded<int64_t> k(T), draw_rank(T * slots);
    const DType dtype = sizeof(Real) == 4 ? DType::F32 : DType::F64;
    const bool draws = variant & 1, steps = variant & 2, pads = variant & 4, caps = variant == 5, shares = variant & 2;
    cpu::topp_route(r, dtype, z.data, draws ? gumbel.data : nullptr, steps ? bernoulli.data : nullptr,
                    pads ? padding.data : nullptr, caps ? keep.data : nullptr, mask.data, weights.data,
                    shared_weights.data, scale.data, k.data, draw_rank.data, parallel);
    const Real* grad = draws ? gumbel.data : nullptr;  // any numbers
    const Real* by_shared = shares ? grad_shared.data : nullptr;
    cpu::topp_route_backward(r, dtype, grad, by_shared, weights.data, shared_weights.data, scale.data, grad_z.data,
                             parallel);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t at = t * slots;
      const Token<Real> token{&z[t * width], draws ? &gumbel[at] : nullptr, steps ? &bernoulli[at] : nullptr,
                              pads && padding[t], caps ? &keep[at] : nullptr, &mask[at], &weights[at],
                              &shared_weights[t * shared], &scale[at], &k[t], &draw_rank[at]};
      check_token(r, token);
      check_gradient(r, token, grad ? grad + t * slots : nullptr, by_shared ? by_shared + t * shared : nullptr,
                     &grad_z[t * width]);
    }
  }
}

// The published code's routing and its gradient: nothing beside the results is touched, whatever the logits are, and what
// holds of every result holds. The values are compared with the reference in tests/ops/test_release_route.py.
template <class Real>
void release(int64_t T, int64_t routed, int64_t null, int64_t shared, bool wild) {
  const int64_t slots = routed + null, width = slots + shared;
  std::normal_distribution<Real> normal;
  Guarded<Real> z(T * width), gumbel(T * slots * slots), bernoulli(T * slots), grad(T * slots), grad_shared(T * shared);
  Guarded<bool> padding(T), keep(T * slots);
  for (int64_t i = 0; i < T * width; ++i) z[i] = 1 + (i % 3 ? Real(0.02) : Real(1)) * normal(generator);  // near ties
  for (int64_t i = 0; i < T * slots * slots; ++i) gumbel[i] = normal(generator);
  for (int64_t i = 0; i < T * slots; ++i) bernoulli[i] = static_cast<Real>(draw() + 0.5), keep[i] = i % 3 != 1;
  fill(grad);
  fill(grad_shared);
  for (int64_t t = 0; t < T; ++t) padding[t] = t % 5 == 4;
  if (wild && T * slots > 4) {
    z[1] = std::numeric_limits<Real>::quiet_NaN();
    z[3] = std::numeric_limits<Real>::infinity();
    z[4] = -std::numeric_limits<Real>::infinity();
  }
  for (int variant = 0; variant < 4; ++variant) {
    const Parallel& parallel = cases++ % 2 ? one : many;
    const ToppRoute r{T, slots, shared, routed, kTopP, variant == 2 ? slots : 0, variant == 3 ? 1 : -1, Estimator::None};
    const bool draws = variant & 1, caps = variant & 2;
    Guarded<bool> mask(T * slots);
    Guarded<Real> weights(T * slots), shared_weights(T * shared), multiplier(T * slots), grad_z(T * width);
    Guarded<int64_t> k(T), draw_rank(T * slots);
    const DType dtype = sizeof(Real) == 4 ? DType::F32 : DType::F64;
    cpu::release_route(r, 0.01, dtype, z.data, draws ? gumbel.data : nullptr, draws ? bernoulli.data : nullptr, padding.data,
                       caps ? keep.data : nullptr, mask.data, weights.data, shared_weights.data, k.data, draw_rank.data,
                       multiplier.data, parallel);
    cpu::release_route_backward(r, 0.01, dtype, draws ? grad.data : nullptr, caps ? grad_shared.data : nullptr, z.data,
                                mask.data, caps ? keep.data : nullptr, draw_rank.data, multiplier.data, grad_z.data, parallel);
    for (int64_t t = 0; t < T; ++t) {
      int64_t selected = 0;
      for (int64_t e = t * slots; e < (t + 1) * slots; ++e) {
        selected += mask[e];
        check_true(draw_rank[e] >= 0 && draw_rank[e] <= slots, "draw_rank");
        check_true(mask[e] || weights[e] == 0 || weights[e] != weights[e], "weight of a slot that was not selected");
        check_true(!mask[e] || !(padding[t] || (caps && !keep[e])), "a slot that must not be selected");
      }
      check_true(selected == k[t] && (k[t] > 0 || padding[t] || caps), "k");
    }
  }
}

// megatron_omni/ops/counter_rng.py
void draws(int64_t n) {
  constexpr int64_t kTokens = 11;
  constexpr uint64_t kCall = ~uint64_t{0};
  const auto mix = [](uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
  };
  Guarded<int64_t> ids(kTokens), positions(kTokens);
  Guarded<float> out(kTokens * n);
  for (int64_t t = 0; t < kTokens; ++t) ids[t] = t - 3, positions[t] = 7 * t;
  cpu::counter_uniform(ids.data, positions.data, kTokens, n, kCall, out.data, ++cases % 2 ? one : many);
  for (int64_t t = 0; t < kTokens; ++t) {
    const uint64_t key = mix(mix(uint64_t(ids[t]) + kCall) + uint64_t(positions[t]) * 0x9E3779B97F4A7C15u);
    for (int64_t i = 0; i < n; ++i) {
      uint32_t x = uint32_t(key) + uint32_t(i) * 0x9E3779B9u;
      x = (x ^ x >> 16) * 0x7FEB352Du ^ uint32_t(key >> 32);
      x = (x ^ x >> 15) * 0x846CA68Bu;
      x = (x ^ x >> 16) ^ 0x80000000u;  // of 23 bits, the first one turned
      check(out[t * n + i], ((x >> 9) + 0.5) * 0x1p-23, 0, "draw", t, i);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  for_each_engine([&](const std::string& engine) {
    const int before = failures;
    for (const int64_t T : {0, 1, quick ? 6 : 9, quick ? 9 : 70})
      for (const int64_t routed : {1, 4, 24, 25, 129})
        for (const int64_t null : {0, 2})
          for (const int64_t shared : {0, 2}) {
            routing<float>(T, routed, null, shared, T == 9);
            routing<double>(T, routed, null, shared, T == 9);
            if (routed > 25 || engine != "portable") continue;  // no vectors: the same on every engine
            release<float>(T, routed, null, shared, T == 9);
            release<double>(T, routed, null, shared, T == 9);
          }
    for (const int64_t n : {0, 1, 15, 16, 17, 133}) draws(n);
    if (failures > before) std::printf("engine %s: %d wrong\n", engine.c_str(), failures - before);
  });
  return report(cases);
}
