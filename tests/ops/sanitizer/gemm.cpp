// Runs the CPU grouped GEMM and expert MLP on odd sizes for sanitize.py: every array ends where a page without access
// begins, so that a read or write past its end stops the program even from instructions that AddressSanitizer does not
// see, and results are compared with plain loops. Prints the number of cases; exit status 1 on a wrong result.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/vector.h"
#include "engines.h"
#include "kernels.h"

using namespace omni;
using cpu::Bf16;
using cpu::Half;

namespace {

// n elements that end where a protected page begins.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n) {
    const size_t page = sysconf(_SC_PAGESIZE), bytes = n * sizeof(T), pages = (bytes + page - 1) / page;
    size_ = (pages + 1) * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + pages * page, page, PROT_NONE)) std::abort();
    data = reinterpret_cast<T*>(base_ + pages * page - bytes);
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  T* data;

 private:
  char* base_;
  size_t size_;
};

uint32_t state = 1;
double draw() {
  state = state * 1664525u + 1013904223u;
  return (state >> 8) / double(1 << 24) - 0.5;
}

template <class T>
void fill(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, double>) p[i] = draw(); else cpu::from_float(static_cast<float>(draw()), p[i]);
  }
}

int failures = 0;
template <class T>
void compare(const T* got, const std::vector<double>& expected, double tolerance, const char* what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = cpu::to_float(got[i]);
    if (!(std::fabs(value - expected[i]) <= tolerance)) {
      std::printf("%s[%zu] = %g, expected %g\n", what, i, value, expected[i]);
      ++failures;
      return;
    }
  }
}

template <class T, class Acc>
void run(DType dtype, const std::vector<int64_t>& counts, int64_t spare, int64_t K, int64_t N, double tolerance,
         const Parallel& parallel) {
  const int64_t E = counts.size();
  Guarded<int64_t> offsets(E + 1);
  offsets.data[0] = 0;
  for (int64_t e = 0; e < E; ++e) offsets.data[e + 1] = offsets.data[e] + counts[e];
  const int64_t used = offsets.data[E], rows = used + spare, F = N;
  Guarded<T> x(rows * K), w(E * K * N), dy(rows * N), y(rows * N), dx(rows * K), dw(E * K * N);
  Guarded<Acc> dw_wide(E * K * N);
  fill(x.data, rows * K), fill(w.data, E * K * N), fill(dy.data, rows * N);
  std::memset(dw_wide.data, 0, E * K * N * sizeof(Acc));
  const auto value = [](T v) { return double(cpu::to_float(v)); };
  cpu::grouped_gemm(x.data, w.data, offsets.data, rows, E, K, N, false, dtype, y.data, parallel);
  cpu::grouped_gemm(dy.data, w.data, offsets.data, rows, E, K, N, true, dtype, dx.data, parallel);
  cpu::grouped_wgrad(x.data, dy.data, offsets.data, E, K, N, dtype, dtype, false, dw.data, parallel);
  const DType wide = dtype == DType::F64 ? DType::F64 : DType::F32;
  cpu::grouped_wgrad(x.data, dy.data, offsets.data, E, K, N, dtype, wide, true, dw_wide.data, parallel);
  std::vector<double> y_loop(rows * N), dx_loop(rows * K), dw_loop(E * K * N);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t a = offsets.data[e]; a < offsets.data[e + 1]; ++a)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t n = 0; n < N; ++n) {
          const double weight = value(w.data[(e * K + k) * N + n]);
          y_loop[a * N + n] += value(x.data[a * K + k]) * weight;
          dx_loop[a * K + k] += value(dy.data[a * N + n]) * weight;
          dw_loop[(e * K + k) * N + n] += value(x.data[a * K + k]) * value(dy.data[a * N + n]);
        }
  compare(y.data, y_loop, tolerance, "y"), compare(dx.data, dx_loop, tolerance, "dx");
  compare(dw.data, dw_loop, tolerance, "dw"), compare(dw_wide.data, dw_loop, tolerance, "dw_wide");

  Guarded<T> w1(E * K * 2 * F), w2(E * F * K), h(rows * 2 * F), act(rows * F), out(rows * K), dh(rows * 2 * F);
  Guarded<T> grad(rows * K), dw1(E * K * 2 * F), dw2(E * F * K);
  Guarded<Acc> weight(rows), dweight(rows);
  fill(w1.data, E * K * 2 * F), fill(w2.data, E * F * K), fill(grad.data, rows * K);
  for (int64_t a = 0; a < rows; ++a) weight.data[a] = draw() + 1;
  cpu::expert_mlp(x.data, w1.data, w2.data, offsets.data, weight.data, rows, E, K, F, dtype, h.data, act.data, out.data,
                  parallel);
  cpu::expert_mlp_backward(grad.data, x.data, h.data, w1.data, w2.data, offsets.data, weight.data, rows, E, K, F, dtype,
                           dtype, false, act.data, dh.data, dx.data, dw1.data, dw2.data, dweight.data, parallel);
  std::vector<double> out_loop(rows * K), dot(rows);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t a = offsets.data[e]; a < offsets.data[e + 1]; ++a)
      for (int64_t f = 0; f < F; ++f) {
        double gate = 0, up = 0, d = 0;
        for (int64_t k = 0; k < K; ++k) {
          gate += value(x.data[a * K + k]) * value(w1.data[(e * K + k) * 2 * F + f]);
          up += value(x.data[a * K + k]) * value(w1.data[(e * K + k) * 2 * F + F + f]);
          d += value(grad.data[a * K + k]) * value(w2.data[(e * F + f) * K + k]);
        }
        const double a_f = gate / (1 + std::exp(-gate)) * up;
        dot[a] += d * a_f;
        for (int64_t k = 0; k < K; ++k) out_loop[a * K + k] += weight.data[a] * a_f * value(w2.data[(e * F + f) * K + k]);
      }
  compare(out.data, out_loop, 4 * tolerance, "expert_mlp"), compare(dweight.data, dot, 40 * tolerance, "drow_weight");
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  const Parallel one{1, nullptr};
  const Parallel many{3, [](int64_t n, void (*task)(void*, int64_t), void* context) {
                        for (int64_t i = n - 1; i >= 0; --i) task(context, i);
                      }};
  const std::vector<std::vector<int64_t>> groups = {{1}, {0, 7, 0, 2}, {33, 1}, {}, {0, 0}, {65, 0, 13, 6}, {401}};
  const std::vector<int64_t> sides = quick ? std::vector<int64_t>{1, 17, 67} : std::vector<int64_t>{1, 2, 15, 17, 64, 67, 131};
  int cases = 0;
  for_each_engine([&](const std::string& engine) {
    const int before = failures;
    for (const auto& counts : groups)
      for (const int64_t K : sides)
        for (const int64_t N : sides) {
          const int64_t spare = cases % 3;
          const Parallel& parallel = cases % 2 ? one : many;
          run<float, float>(DType::F32, counts, spare, K, N, 1e-3, parallel);
          run<Bf16, float>(DType::BF16, counts, spare, K, N, 0.25, parallel);
          if (cases % 4 == 0) run<Half, float>(DType::F16, counts, spare, K, N, 0.05, parallel);
          if (cases % 4 == 1) run<double, double>(DType::F64, counts, spare, K, N, 1e-10, parallel);
          ++cases;
        }
    run<float, float>(DType::F32, {9, 3}, 1, 1201, 67, 1e-3, one);  // more contraction than a block
    run<Bf16, float>(DType::BF16, {9, 3}, 1, 1603, 67, 0.5, one);
    run<Bf16, float>(DType::BF16, {1601}, 1, 67, 17, 0.5, one);
    if (failures > before) std::printf("engine %s: %d wrong\n", engine.c_str(), failures - before);
  });
  std::printf("%d cases, %d wrong\n", cases, failures);
  return failures != 0;
}
