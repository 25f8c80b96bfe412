// Attention of single tokens over a cache of keys and values: softmax(scale q k^T) v over a run of keys for each token.
//
// A task is a range of (token, group): the n query heads of a group read the same keys and values, so these are read once
// from memory for all of them. Nothing is shared between tokens: a token's bits depend on its own keys and on nothing
// beside it. The form with vectors is in cached_attention_kernels.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/light_kernels.h"
#include "kernels.h"

namespace omni::cpu {
namespace {

constexpr int64_t kElementsPerTask = int64_t{1} << 17;  // of keys and values; less is not worth another thread

template <class E, class Acc = AccumulatorOf<E>>
Acc dot(const E* x, const E* y, int64_t n) {
  Acc part[8] = {};  // eight partial sums: less rounding, and room for the compiler
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t r = 0; r < 8; ++r) part[r] += Acc(to_float(x[i + r])) * Acc(to_float(y[i + r]));
  for (int64_t r = 0; i < n; ++i, ++r) part[r] += Acc(to_float(x[i])) * Acc(to_float(y[i]));
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

template <class E>
void cached_attention_portable(const CachedAttention& a, int64_t begin, int64_t end) {
  using Acc = AccumulatorOf<E>;
  std::vector<Acc> p, sum(a.D);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t t = unit / a.groups, g = unit % a.groups, count = t < a.known ? a.counts[t] : 0;
    const int64_t first = count ? a.places[t] - count + 1 : 0, step = a.groups * a.D;
    const E* keys = static_cast<const E*>(a.keys) + first * step + g * a.D;
    const E* values = static_cast<const E*>(a.values) + first * step + g * a.D;
    p.resize(count);
    for (int64_t h = 0; h < a.heads; ++h) {
      const E* q = static_cast<const E*>(a.query) + t * a.token_stride + g * a.group_stride + h * a.head_stride;
      E* out = static_cast<E*>(a.out) + (unit * a.heads + h) * a.D;
      for (int64_t j = 0; j < count; ++j) {
        p[j] = Acc(a.scale) * dot(q, keys + j * step, a.D);
      }
      const Acc top = count ? *std::max_element(p.begin(), p.end()) : Acc(0);
      Acc total = 0;
      std::fill(sum.begin(), sum.end(), Acc(0));
      for (int64_t j = 0; j < count; ++j) {
        const Acc weight = std::exp(p[j] - top);
        total += weight;
        for (int64_t d = 0; d < a.D; ++d) sum[d] += weight * Acc(to_float(values[j * step + d]));
      }
      for (int64_t d = 0; d < a.D; ++d) from_float(count ? sum[d] / total : Acc(0), out[d]);
    }
  }
}

}  // namespace

void cached_attention(const CachedAttention& a, DType dtype, const Parallel& parallel) {
  int64_t elements = 0;
  for (int64_t t = 0; t < a.known; ++t) elements += a.counts[t] * a.groups * a.D;
  const int64_t units = a.T * a.groups;
  const int64_t parts = std::clamp<int64_t>(std::min(elements / kElementsPerTask, units), 1, parallel.threads);
  parallel(parts, [&](int64_t part) {
    const int64_t begin = units * part / parts, end = units * (part + 1) / parts;
    if (dtype == DType::F64) return cached_attention_portable<double>(a, begin, end);
    if (with_vectors([&](auto isa) { LightKernels<decltype(isa)>::cached_attention(a, dtype, begin, end); })) return;
    with_type(dtype, [&](auto* e) { cached_attention_portable<std::remove_pointer_t<decltype(e)>>(a, begin, end); });
  });
}

}  // namespace omni::cpu
