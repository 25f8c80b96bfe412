// The CPU grouped GEMM and expert MLP on odd sizes: every result against float64 loops, stage by stage (what a stage
// reads is what the one before it wrote). --quick: few sizes.
#include "checks.h"

using namespace omni;

namespace {

// Element (i, j) at data[i * row + j * column].
struct View {
  const double* data;
  int64_t row, column;
};

// The i-th row of the product of a and b [l, n]: values, and the sizes of their terms.
struct Sums {
  std::vector<double> value, size;
  Sums(View a, View b, int64_t i, int64_t n, int64_t l) : value(n), size(n) {
    for (int64_t k = 0; k < l; ++k) {
      const double factor = a.data[i * a.row + k * a.column];
      const double* row = b.data + k * b.row;
      for (int64_t j = 0; j < n; ++j) {
        const double term = factor * row[j * b.column];
        value[j] += term;
        size[j] += std::fabs(term);
      }
    }
  }
};

template <class T, class Acc>
void check_product(const T* got, View a, View b, int64_t m, int64_t n, int64_t l, const char* what,
                   const double* before = nullptr) {
  for (int64_t i = 0; i < m; ++i) {
    const Sums sums(a, b, i, n, l);
    for (int64_t j = 0; j < n; ++j) {
      const double start = before ? before[i * n + j] : 0, value = start + sums.value[j];
      const double error = std::sqrt(l + 1.0) * unit<Acc>() * (sums.size[j] + std::fabs(start));
      check(got[i * n + j], value, stored<T>(value, error), what, i, j);
    }
  }
}

struct Groups {
  Guarded<int64_t> offsets;
  int64_t E, used, rows;
  Groups(const std::vector<int64_t>& counts, int64_t spare) : offsets(counts.size() + 1), E(counts.size()) {
    offsets[0] = 0;
    for (int64_t e = 0; e < E; ++e) offsets[e + 1] = offsets[e] + counts[e];
    used = offsets[E];
    rows = used + spare;
  }
  // f(expert, its first row, how many)
  template <class F>
  void for_each(const F& f) {
    for (int64_t e = 0; e < E; ++e) f(e, offsets[e], offsets[e + 1] - offsets[e]);
  }
};

template <class T, class Acc>
void products(DType dtype, Groups& groups, int64_t K, int64_t N, const Parallel& parallel) {
  const int64_t E = groups.E, rows = groups.rows;
  Guarded<T> x(rows * K), w(E * K * N), dy(rows * N), y(rows * N), dx(rows * K), dw(E * K * N);
  Guarded<Acc> dw_wide(E * K * N);
  fill(x), fill(w), fill(dy), fill(dw_wide);
  const auto before = dw_wide.values(), xs = x.values(), ws = w.values(), dys = dy.values();
  const DType wide = dtype == DType::F64 ? DType::F64 : DType::F32;
  cpu::grouped_gemm(x.data, w.data, groups.offsets.data, rows, E, K, N, false, dtype, y.data, parallel);
  cpu::grouped_gemm(dy.data, w.data, groups.offsets.data, rows, E, K, N, true, dtype, dx.data, parallel);
  cpu::grouped_wgrad(x.data, dy.data, groups.offsets.data, E, K, N, dtype, dtype, false, dw.data, parallel);
  cpu::grouped_wgrad(x.data, dy.data, groups.offsets.data, E, K, N, dtype, wide, true, dw_wide.data, parallel);
  groups.for_each([&](int64_t e, int64_t begin, int64_t count) {
    const int64_t at = e * K * N;
    const View x_e{xs.data() + begin * K, K, 1}, dy_e{dys.data() + begin * N, N, 1}, x_t{x_e.data, 1, K};
    check_product<T, Acc>(y.data + begin * N, x_e, {ws.data() + at, N, 1}, count, N, K, "y");
    check_product<T, Acc>(dx.data + begin * K, dy_e, {ws.data() + at, 1, N}, count, K, N, "dx");
    check_product<T, Acc>(dw.data + at, x_t, dy_e, K, N, count, "dw");
    check_product<Acc, Acc>(dw_wide.data + at, x_t, dy_e, K, N, count, "dw added", before.data() + at);
  });
  check_zero(y, groups.used * N, "y past the rows"), check_zero(dx, groups.used * K, "dx past the rows");
}

// dW: what the gradients of the weights are written or added to
template <class T, class Acc, class dW>
void mlp(DType dtype, DType dtype_dw, bool accumulate, bool weighted, Groups& groups, int64_t H, int64_t F,
         const Parallel& parallel) {
  const int64_t E = groups.E, rows = groups.rows, *offsets = groups.offsets.data;
  const double u = unit<Acc>();
  Guarded<T> x(rows * H), w1(E * H * 2 * F), w2(E * F * H), h(rows * 2 * F), a(rows * F), y(rows * H), grad(rows * H);
  Guarded<T> again(rows * F), dh(rows * 2 * F), dx(rows * H);
  Guarded<dW> dw1(E * H * 2 * F), dw2(E * F * H);
  Guarded<Acc> row_weight(rows), dweight(rows);
  fill(x), fill(w1), fill(w2), fill(grad), fill(row_weight), fill(dw1), fill(dw2);
  const auto before1 = dw1.values(), before2 = dw2.values();
  const void* weights = weighted ? row_weight.data : nullptr;
  cpu::expert_mlp(x.data, w1.data, w2.data, offsets, weights, rows, E, H, F, dtype, h.data, a.data, y.data, parallel);
  cpu::expert_mlp_backward(grad.data, x.data, h.data, w1.data, w2.data, offsets, weights, rows, E, H, F, dtype,
                           dtype_dw, accumulate, again.data, dh.data, dx.data, dw1.data, dw2.data, dweight.data,
                           parallel);
  const auto xs = x.values(), w1s = w1.values(), w2s = w2.values(), hs = h.values(), as = a.values();
  const auto ds = grad.values(), again_s = again.values(), dhs = dh.values();
  groups.for_each([&](int64_t e, int64_t begin, int64_t count) {
    const View x_e{xs.data() + begin * H, H, 1};
    const View w1_e{w1s.data() + e * H * 2 * F, 2 * F, 1}, w2_e{w2s.data() + e * F * H, H, 1};
    const View d_e{ds.data() + begin * H, H, 1}, dh_e{dhs.data() + begin * 2 * F, 2 * F, 1};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = begin + i;
      const double w = weighted ? row_weight[row] : 1;
      const Sums up(x_e, w1_e, i, 2 * F, H), down(d_e, {w2_e.data, 1, H}, i, F, H);
      const double factor = std::sqrt(H + 1.0) * u;
      double dot = 0, dot_size = 0, dot_square = 0;
      for (int64_t f = 0; f < F; ++f) {
        // forward, from sums that are not rounded to T
        const auto sigmoid = [](double g) { return 1 / (1 + std::exp(-g)); };
        double gate = up.value[f], other = up.value[F + f], s = sigmoid(gate), act = w * gate * s * other;
        const double by_gate = w * other * s * (1 + gate * (1 - s)) * factor * up.size[f];
        const double by_other = w * gate * s * factor * up.size[F + f];
        check(a[row * F + f], act, stored<T>(act, std::hypot(kOps * u * act, by_gate, by_other)), "a", row, f);
        // backward, from h as it was stored
        gate = hs[row * 2 * F + f], other = hs[row * 2 * F + F + f], s = sigmoid(gate), act = gate * s * other;
        check(again[row * F + f], w * act, stored<T>(w * act, kOps * u * w * act), "a made again", row, f);
        const double d = down.value[f], d_error = factor * down.size[f];
        const double slope = w * other * s * (1 + gate * (1 - s));
        const double size = w * other * s * (1 + std::fabs(gate) * (1 - s));
        check(dh[row * 2 * F + f], d * slope, stored<T>(d * slope, std::hypot(kOps * u * size * d, slope * d_error)),
              "dgate", row, f);
        const double silu = w * gate * s;
        check(dh[row * 2 * F + F + f], d * silu,
              stored<T>(d * silu, std::hypot(kOps * u * silu * d, silu * d_error)), "dup", row, f);
        dot += d * act;
        dot_size += std::fabs(d * act);
        dot_square += std::pow(act * d_error, 2) + std::pow(kOps * u * act * d, 2);
      }
      check(dweight[row], dot, stored<Acc>(dot, std::hypot(std::sqrt(dot_square), std::sqrt(F + 1.0) * u * dot_size)),
            "drow_weight", row);
    }
    check_product<T, Acc>(h.data + begin * 2 * F, x_e, w1_e, count, 2 * F, H, "h");
    check_product<T, Acc>(y.data + begin * H, {as.data() + begin * F, F, 1}, w2_e, count, H, F, "expert_mlp");
    check_product<T, Acc>(dx.data + begin * H, dh_e, {w1_e.data, 1, 2 * F}, count, H, 2 * F, "dx of the MLP");
    check_product<dW, Acc>(dw1.data + e * H * 2 * F, {x_e.data, 1, H}, dh_e, H, 2 * F, count, "dw1",
                           accumulate ? before1.data() + e * H * 2 * F : nullptr);
    check_product<dW, Acc>(dw2.data + e * F * H, {again_s.data() + begin * F, 1, F}, d_e, F, H, count, "dw2",
                           accumulate ? before2.data() + e * F * H : nullptr);
  });
  check_zero(h, groups.used * 2 * F, "h past the rows"), check_zero(y, groups.used * H, "expert_mlp past the rows");
  check_zero(dx, groups.used * H, "dx of the MLP past the rows");
  check_zero(dweight, groups.used, "drow_weight past the rows");
}

int cases = 0;

template <class T, class Acc>
void run(DType dtype, const std::vector<int64_t>& counts, int64_t K, int64_t N) {
  Groups groups(counts, cases % 3);
  const Parallel& parallel = cases % 2 ? one : many;
  products<T, Acc>(dtype, groups, K, N, parallel);
  if (cases % 2)
    mlp<T, Acc, T>(dtype, dtype, false, cases % 3 > 0, groups, K, N, parallel);
  else
    mlp<T, Acc, Acc>(dtype, dtype == DType::F64 ? DType::F64 : DType::F32, true, cases % 3 > 0, groups, K, N, parallel);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  std::vector<std::vector<int64_t>> groups = {{1}, {0, 7, 0, 2}, {33, 1}, {}, {0, 0}, {65, 0, 13, 6}};
  std::vector<int64_t> sides = {1, 17, 67};
  if (!quick) groups.push_back({401}), sides.insert(sides.end(), {2, 15, 64, 131});
  for_each_engine([&](const std::string& engine) {
    const int before = failures;
    for (const auto& counts : groups)
      for (const int64_t K : sides)
        for (const int64_t N : sides) {
          run<float, float>(DType::F32, counts, K, N);
          run<Bf16, float>(DType::BF16, counts, K, N);
          if (cases % 4 == 0) run<Half, float>(DType::F16, counts, K, N);
          if (cases % 4 == 1) run<double, double>(DType::F64, counts, K, N);
          ++cases;
        }
    run<float, float>(DType::F32, {9, 3}, 1201, 19);  // more contraction than a block
    run<Bf16, float>(DType::BF16, {9, 3}, 1603, 19);
    run<Bf16, float>(DType::BF16, {1601}, 19, 17);      // the same of wgrad; more rows than a task
    run<float, float>(DType::F32, {8, 1, 5}, 37, 301);  // few rows, more columns than a block
    if (failures > before) std::printf("engine %s: %d wrong\n", engine.c_str(), failures - before);
  });
  return report(cases);
}
