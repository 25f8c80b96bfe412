// The permutation of tokens and back, with its gradients, on odd sizes: indices exactly, sums against float64 loops.
// And conversions of 16-bit elements, every one of them, exactly.
#include <memory>

#include "checks.h"

using namespace omni;

namespace {

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double> ? DType::F64 : std::is_same_v<T, float> ? DType::F32
         : std::is_same_v<T, Bf16> ? DType::BF16 : DType::F16;
}

// A routing map with unused columns between its rows, and what the kernels make of it.
struct Routed {
  static constexpr int64_t kUnused = 3;
  int64_t T, E, stride, A;
  std::unique_ptr<bool[]> map;
  Guarded<int64_t> offsets, token_offsets, next_row;
  std::unique_ptr<Guarded<int64_t>> row_token, row_expert, token_rows;
  Routed(int64_t T, int64_t E, double density)
      : T(T), E(E), stride(E + kUnused), map(new bool[T > 0 ? (T - 1) * stride + E : 0]), offsets(E + 1),
        token_offsets(T + 1), next_row(E) {
    for (int64_t t = 0; t < T; ++t)
      for (int64_t e = 0; e < (t + 1 < T ? stride : E); ++e) map[t * stride + e] = draw() + 0.5 < density;
    A = cpu::count_assignments(map.get(), stride, T, E, offsets.data, token_offsets.data);
    row_token = std::make_unique<Guarded<int64_t>>(A);
    row_expert = std::make_unique<Guarded<int64_t>>(A);
    token_rows = std::make_unique<Guarded<int64_t>>(A);
    cpu::fill_permutation(map.get(), stride, T, E, offsets.data, next_row.data, row_token->data, row_expert->data,
                          token_rows->data);
  }
  void check_indices() {
    std::vector<std::vector<int64_t>> rows_of(T);
    int64_t row = 0;
    for (int64_t e = 0; e < E; ++e) {
      check_true(offsets[e] == row, "offsets");
      for (int64_t t = 0; t < T; ++t) {
        if (!map[t * stride + e]) continue;
        rows_of[t].push_back(row);
        check_true(row < A && (*row_token)[row] == t && (*row_expert)[row] == e, "row_token, row_expert");
        ++row;
      }
    }
    check_true(A == row && offsets[E] == row, "number of assignments");
    for (int64_t t = 0; t < T; ++t) {
      check_true(token_offsets[t + 1] - token_offsets[t] == static_cast<int64_t>(rows_of[t].size()), "token_offsets");
      for (size_t j = 0; j < rows_of[t].size(); ++j)
        check_true((*token_rows)[token_offsets[t] + j] == rows_of[t][j], "token_rows");
    }
  }
};

template <class In, class Out>
void sums(Routed& r, Guarded<In>& rows, int64_t H, const Parallel& parallel) {
  using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const double u = unit<Acc>();
  const int64_t *to = r.token_offsets.data, *tr = r.token_rows->data;
  Guarded<Acc> weights(r.A), factor(r.A);
  fill(weights), fill(factor);
  const Acc* weight_or_none = r.A % 2 ? weights.data : nullptr;
  Guarded<Out> y(r.T * H), grad(r.T * H);
  cpu::unpermute(rows.data, weight_or_none, to, tr, r.T, H, dtype_of<In>(), dtype_of<Out>(), y.data, parallel);
  for (int64_t t = 0; t < r.T; ++t)
    for (int64_t i = 0; i < H; ++i) {
      double value = 0, size = 0;
      for (int64_t j = to[t]; j < to[t + 1]; ++j) {
        const double term = (r.A % 2 ? double(weights[tr[j]]) : 1) * cpu::to_float(rows[tr[j] * H + i]);
        value += term;
        size += std::fabs(term);
      }
      check(y[t * H + i], value, stored<Out>(value, std::sqrt(to[t + 1] - to[t] + 1.0) * u * size), "unpermute", t, i);
    }

  fill(grad);
  for (int wanted = 1; wanted < 4; ++wanted) {
    Guarded<In> grad_rows(rows.count);
    Guarded<Acc> grad_weights(r.A);
    const bool by_factor = wanted == 3;
    cpu::unpermute_backward(grad.data, rows.data, weight_or_none, by_factor ? factor.data : nullptr, to, tr, r.T, r.A,
                            rows.count / std::max<int64_t>(H, 1), H, dtype_of<In>(), dtype_of<Out>(),
                            wanted & 1 ? grad_rows.data : nullptr, wanted & 2 ? grad_weights.data : nullptr, parallel);
    if (wanted & 1) check_zero(grad_rows, r.A * H, "grad_rows past the assignments");
    for (int64_t a = 0; a < r.A; ++a) {
      const Out* g = grad.data + (*r.row_token)[a] * H;
      const double f = by_factor ? double(factor[a]) : 1, scale = f * (r.A % 2 ? double(weights[a]) : 1);
      double dot = 0, size = 0;
      for (int64_t i = 0; i < H; ++i) {
        const double grad_y = cpu::to_float(g[i]), value = scale * grad_y;
        const double term = f * cpu::to_float(rows[a * H + i]) * grad_y;
        if (wanted & 1)
          check(grad_rows[a * H + i], value, stored<In>(value, 2 * u * std::fabs(value)), "grad_rows", a, i);
        dot += term;
        size += std::fabs(term);
      }
      if (wanted & 2) check(grad_weights[a], dot, stored<Acc>(dot, std::sqrt(H + 2.0) * u * size), "grad_weights", a);
    }
  }
}

int64_t cases = 0;

template <class In>
void permutation(int64_t T, int64_t E, int64_t H, double density) {
  Routed r(T, E, density);
  r.check_indices();
  const Parallel& parallel = cases++ % 2 ? one : many;
  Guarded<In> x(T * H), rows((r.A + 2) * H);
  fill(x);
  cpu::permute(x.data, r.token_offsets.data, r.token_rows->data, T, r.A, r.A + 2, H, dtype_of<In>(), rows.data,
               parallel);
  for (int64_t a = 0; a < r.A; ++a)
    check_true(!std::memcmp(&rows[a * H], &x[(*r.row_token)[a] * H], H * sizeof(In)), "permute");
  check_zero(rows, r.A * H, "permute past the assignments");
  if constexpr (std::is_same_v<In, double>) {
    sums<In, double>(r, rows, H, parallel);
  } else {
    sums<In, float>(r, rows, H, parallel);
    sums<In, Bf16>(r, rows, H, parallel);
    sums<In, Half>(r, rows, H, parallel);
  }

  Guarded<In> values(T * E), entries(r.A), back(T * E);
  fill(values);
  cpu::gather_entries(values.data, E, 1, r.row_token->data, r.row_expert->data, r.A, sizeof(In), entries.data);
  cpu::scatter_entries(entries.data, r.row_token->data, r.row_expert->data, r.A, T, E, sizeof(In), back.data);
  for (int64_t a = 0; a < r.A; ++a)
    check(entries[a], cpu::to_float(values[(*r.row_token)[a] * E + (*r.row_expert)[a]]), 0, "entries", a);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t e = 0; e < E; ++e)
      check(back[t * E + e], r.map[t * r.stride + e] ? cpu::to_float(values[t * E + e]) : 0, 0, "entries back", t, e);
}

// Elements that pass through sums of one row: to fp32 and from it as vector.h's scalar functions have it.
template <class In, class Out>
void conversion(Guarded<In>& x, int64_t T, int64_t H) {
  Guarded<int64_t> token_offsets(T + 1), token_rows(T);
  for (int64_t t = 0; t <= T; ++t) token_offsets[t] = t;
  for (int64_t t = 0; t < T; ++t) token_rows[t] = t;
  Guarded<Out> y(T * H);
  cpu::unpermute(x.data, nullptr, token_offsets.data, token_rows.data, T, H, dtype_of<In>(), dtype_of<Out>(), y.data,
                 one);
  for (int64_t i = 0; i < T * H; ++i) {
    Out right;
    cpu::from_float(cpu::to_float(x[i]), right);
    const float expected = cpu::to_float(right), got = cpu::to_float(y[i]);
    check_true(got == expected || (got != got && expected != expected), "conversion");
  }
}

void conversions() {
  Guarded<Bf16> bf16(1 << 16);
  Guarded<Half> half(1 << 16);
  for (int64_t i = 0; i < 1 << 16; ++i) bf16[i].bits = half[i].bits = static_cast<uint16_t>(i);
  conversion<Bf16, float>(bf16, 1 << 8, 1 << 8), conversion<Half, float>(half, 1 << 8, 1 << 8);
  // Any bits; numbers that fp16 has, or nearly has; halves between its neighbours, and between those of bf16.
  Guarded<float> wide(300 * 67);
  for (int64_t i = 0; i < wide.count; ++i) {
    const uint32_t bits = draw_bits() ^ draw_bits() >> 16, near = (bits & 0x8FFFFFFF) + 0x30000000 + (bits >> 27 << 23);
    const uint32_t kinds[] = {bits, near, (near & ~0x1FFFu) | 0x1000, (bits & ~0xFFFFu) | 0x8000};
    wide[i] = cpu::bits_to_float(kinds[i % 4]);
  }
  conversion<float, Bf16>(wide, 300, 67), conversion<float, Half>(wide, 300, 67);
}

template <class In>
void all_sizes(bool quick) {
  std::vector<int64_t> widths = {1, 7, 17, 65};
  if (!quick) widths.insert(widths.end(), {16, 63, 130, 515});
  for (const int64_t H : widths)
    for (const int64_t T : {0, 1, 2, 33})
      for (const int64_t E : {1, 5, 19}) permutation<In>(T, E, H, T % 2 ? 0.4 : 0.9);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  for_each_engine([&](const std::string& engine) {
    const int before = failures;
    all_sizes<float>(quick), all_sizes<Bf16>(quick), all_sizes<Half>(quick), all_sizes<double>(quick);
    conversions();
    permutation<float>(1030, 1, 1024, 0.9);  // rows and sums past the size that is stored around the caches
    if (!quick) permutation<Bf16>(300, 5, 2048, 0.9), permutation<float>(300, 5, 1024, 0.9);
    if (failures > before) std::printf("engine %s: %d wrong\n", engine.c_str(), failures - before);
  });
  return report(cases);
}
