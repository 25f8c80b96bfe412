// Attention over a cache on odd sizes against float64 loops. What no token sees is not a number, and the cache ends where
// a protected page begins.
#include "checks.h"

using namespace omni;

namespace {

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double> ? DType::F64 : std::is_same_v<T, float> ? DType::F32
         : std::is_same_v<T, Bf16> ? DType::BF16 : DType::F16;
}

int64_t cases = 0;

// Tokens that see the `counts` positions up to the end of the cache, and one more that sees nothing. Heads of the query lie
// `gap` elements apart.
template <class E>
void attention(const std::vector<int64_t>& lengths, int64_t groups, int64_t heads, int64_t D, int64_t gap) {
  const int64_t known = lengths.size(), T = known + 1, N = *std::max_element(lengths.begin(), lengths.end()) + 2;
  const double u = unit<std::conditional_t<std::is_same_v<E, double>, double, float>>(), scale = 3.0;
  const int64_t head_stride = D + gap, group_stride = heads * head_stride, token_stride = groups * group_stride;
  Guarded<E> query(T * token_stride - gap), keys(N * groups * D), values(N * groups * D), out(T * groups * heads * D);
  Guarded<int64_t> places(known), counts(known);
  fill(query);
  for (int64_t i = 2 * groups * D; i < keys.count; ++i) store(draw(), keys[i]), store(draw(), values[i]);
  for (int64_t t = 0; t < known; ++t) places[t] = N - 1, counts[t] = lengths[t];
  cpu::cached_attention({T, known, groups, heads, D, token_stride, group_stride, head_stride, scale, query.data, keys.data,
                         values.data, places.data, counts.data, out.data},
                        dtype_of<E>(), cases++ % 2 ? one : many);
  std::vector<double> p, sum(D), size(D);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t count = t < known ? lengths[t] : 0, first = N - count;
        const E* q = query.data + t * token_stride + g * group_stride + h * head_stride;
        double top = -1e300, total = 0, off = 0;
        p.assign(count, 0), sum.assign(D, 0), size.assign(D, 0);
        for (int64_t j = 0; j < count; ++j) {
          double sizes = 0;
          for (int64_t d = 0; d < D; ++d) {
            const double term = scale * cpu::to_float(q[d]) * cpu::to_float(keys[((first + j) * groups + g) * D + d]);
            p[j] += term, sizes += std::fabs(term);
          }
          top = std::max(top, p[j]), off = std::max(off, std::sqrt(D + 2.0) * u * sizes);
        }
        for (int64_t j = 0; j < count; ++j) total += p[j] = std::exp(p[j] - top);
        for (int64_t j = 0; j < count; ++j)
          for (int64_t d = 0; d < D; ++d) {
            const double term = p[j] / total * cpu::to_float(values[((first + j) * groups + g) * D + d]);
            sum[d] += term, size[d] += std::fabs(term);
          }
        const double error = 2 * off + (kOps + std::sqrt(count + 2.0)) * u;
        for (int64_t d = 0; d < D; ++d)
          check(out[((t * groups + g) * heads + h) * D + d], sum[d], stored<E>(sum[d], error * size[d]), "out", t, d);
      }
}

template <class E>
void all_sizes(bool quick) {
  std::vector<int64_t> widths = {1, 7, 16, 33, 64};
  if (!quick) widths.insert(widths.end(), {8, 31, 65, 128, 200});
  for (const int64_t D : widths) {
    attention<E>({1, 3, 16, 17, 64, 65, 131, 2, 0}, 1, 3, D, 0);
    attention<E>({15, 1, 33, 200}, 3, 2, D, 5);
    attention<E>({63, 129, 130}, 2, 1, D, 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  for_each_engine([&](const std::string& engine) {
    const int before = failures;
    all_sizes<float>(quick), all_sizes<Bf16>(quick), all_sizes<Half>(quick), all_sizes<double>(quick);
    if (!quick) attention<float>({3000, 2999}, 2, 7, 128, 0);
    if (failures > before) std::printf("engine %s: %d wrong\n", engine.c_str(), failures - before);
  });
  return report(cases);
}
