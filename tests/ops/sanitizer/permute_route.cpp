// Every light CPU kernel on odd sizes, with buffers of exactly the size that the interface promises, so that a sanitizer
// sees each access outside. Prints a checksum; sanitize.py compiles and runs it.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "engines.h"
#include "kernels.h"

using omni::DType;

namespace {

std::mt19937 generator(0);
double checksum = 0;

// A block of its own on the heap, `bytes` long to the byte; not filled, so results that stay unwritten hold garbage.
struct Block {
  explicit Block(int64_t bytes) : data(new unsigned char[bytes]), size(bytes) {}
  template <class T> T* as() { return reinterpret_cast<T*>(data.get()); }
  void fill() {  // small numbers in any of the dtypes: the exponent bits of bf16, fp16, fp32 and fp64 stay low
    for (int64_t i = 0; i < size; ++i) data[i] = static_cast<unsigned char>(i * 7 % 11 < 5 ? 0x3C : 0x3B);
  }
  void use() {
    for (int64_t i = 0; i < size; i += 61) checksum += data[i];
  }
  std::unique_ptr<unsigned char[]> data;
  int64_t size;
};

// Two "threads", one after the other and last first: results must not depend on the order.
const omni::Parallel parallel{2, [](int64_t n, void (*task)(void*, int64_t), void* context) {
                                for (int64_t i = n - 1; i >= 0; --i) task(context, i);
                              }};

void permutation(int64_t T, int64_t E, int64_t H, double density, DType dtype) {
  const int64_t stride = E + 3, item = omni::size_of(dtype), wide = dtype == DType::F64 ? 8 : 4;
  std::unique_ptr<bool[]> map(new bool[T > 0 ? (T - 1) * stride + E : 0]);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t e = 0; e < (t + 1 < T ? stride : E); ++e) map[t * stride + e] = generator() < density * 4294967295.0;
  std::vector<int64_t> offsets(E + 1), token_offsets(T + 1), next_row(E);
  const int64_t A = omni::cpu::count_assignments(map.get(), stride, T, E, offsets.data(), token_offsets.data());
  Block row_token(A * 8), row_expert(A * 8), token_rows(A * 8);
  omni::cpu::fill_permutation(map.get(), stride, T, E, offsets.data(), next_row.data(), row_token.as<int64_t>(),
                              row_expert.as<int64_t>(), token_rows.as<int64_t>());
  const int64_t rows = A + 2;
  const int64_t *to = token_offsets.data(), *tr = token_rows.as<int64_t>();

  Block x(T * H * item), copies(rows * H * item);
  x.fill();
  omni::cpu::permute(x.as<void>(), to, tr, T, A, rows, H, dtype, copies.as<void>(), parallel);
  copies.use();

  Block weights(A * wide), factor(A * wide);
  weights.fill();
  factor.fill();
  for (const DType out : {DType::F32, DType::BF16, DType::F16}) {
    const DType result = dtype == DType::F64 ? DType::F64 : out;
    Block y(T * H * omni::size_of(result));
    omni::cpu::unpermute(copies.as<void>(), A % 2 ? weights.as<void>() : nullptr, to, tr, T, H, dtype, result,
                         y.as<void>(), parallel);
    y.use();
    Block grad_rows(rows * H * item), grad_weights(A * wide);
    for (int wanted = 1; wanted < 4; ++wanted) {
      omni::cpu::unpermute_backward(y.as<void>(), copies.as<void>(), weights.as<void>(),
                                    wanted == 3 ? factor.as<void>() : nullptr, to, tr, T, A, rows, H, dtype, result,
                                    wanted & 1 ? grad_rows.as<void>() : nullptr,
                                    wanted & 2 ? grad_weights.as<void>() : nullptr, parallel);
    }
    grad_rows.use();
    grad_weights.use();
  }

  Block values(T * E * item), entries(A * item), back(T * E * item);
  values.fill();
  omni::cpu::gather_entries(values.as<void>(), E, 1, row_token.as<int64_t>(), row_expert.as<int64_t>(), A, item,
                            entries.as<void>());
  omni::cpu::scatter_entries(entries.as<void>(), row_token.as<int64_t>(), row_expert.as<int64_t>(), A, T, E, item,
                             back.as<void>());
  back.use();
}

template <class Real>
void routing(int64_t T, int64_t routed, int64_t null, int64_t shared, bool wild) {
  const int64_t slots = routed + null, bytes = sizeof(Real);
  std::normal_distribution<Real> normal;
  Block z(T * (slots + shared) * bytes), gumbel(T * slots * bytes), bernoulli(T * slots * bytes), padding(T);
  Block keep(T * slots);
  for (int64_t i = 0; i < T * (slots + shared); ++i) z.as<Real>()[i] = normal(generator);
  for (int64_t i = 0; i < T * slots; ++i) {
    gumbel.as<Real>()[i] = normal(generator);
    bernoulli.as<Real>()[i] = static_cast<Real>(generator() / 4294967296.0);
  }
  for (int64_t t = 0; t < T; ++t) padding.as<bool>()[t] = t % 5 == 4;
  for (int64_t i = 0; i < T * slots; ++i) keep.as<bool>()[i] = i % 3 != 1;
  if (wild && T * slots > 4) {
    z.as<Real>()[1] = std::numeric_limits<Real>::quiet_NaN();
    z.as<Real>()[3] = std::numeric_limits<Real>::infinity();
    z.as<Real>()[4] = -std::numeric_limits<Real>::infinity();
  }
  for (int variant = 0; variant < 8; ++variant) {
    const auto estimator = static_cast<omni::cpu::Estimator>(variant % 3);
    const omni::cpu::ToppRoute r{T, slots, shared, routed, 0.7, variant == 6 ? slots : 0, variant == 7 ? 1 : -1, estimator};
    Block mask(T * slots), weights(T * slots * bytes), shared_weights(T * shared * bytes), scale(T * slots * bytes);
    Block k(T * 8), draw_rank(T * slots * 8), grad_z(T * (slots + shared) * bytes);
    const DType dtype = bytes == 4 ? DType::F32 : DType::F64;
    omni::cpu::topp_route(r, dtype, z.as<void>(), variant & 1 ? gumbel.as<void>() : nullptr,
                          variant & 2 ? bernoulli.as<void>() : nullptr, variant & 4 ? padding.as<bool>() : nullptr,
                          variant == 5 ? keep.as<bool>() : nullptr, mask.as<bool>(), weights.as<void>(), shared_weights.as<void>(), scale.as<void>(),
                          k.as<int64_t>(), draw_rank.as<int64_t>(), parallel);
    omni::cpu::topp_route_backward(r, dtype, variant & 1 ? gumbel.as<void>() : nullptr, nullptr, weights.as<void>(),
                                   shared_weights.as<void>(), scale.as<void>(), grad_z.as<void>(), parallel);
    mask.use(), k.use(), draw_rank.use(), scale.use(), grad_z.use();
  }
}

}  // namespace

int main() {
  for_each_engine([](const std::string&) {
    for (const DType dtype : {DType::F32, DType::BF16, DType::F16, DType::F64})
      for (const int64_t H : {1, 7, 16, 17, 63, 65, 130, 515})
        for (const int64_t T : {0, 1, 2, 33})
          for (const int64_t E : {1, 5, 19}) permutation(T, E, H, T % 2 ? 0.4 : 0.9, dtype);
    permutation(300, 5, 1024, 0.9, DType::F32);  // rows, then sums, past the size that is stored non-temporally
    permutation(1030, 1, 1024, 0.9, DType::F32);
    permutation(300, 5, 2048, 0.9, DType::BF16);
    for (const int64_t T : {0, 1, 9, 70})
      for (const int64_t routed : {1, 4, 24, 25, 129})
        for (const int64_t null : {0, 2})
          for (const int64_t shared : {0, 2}) {
            routing<float>(T, routed, null, shared, T == 9);
            routing<double>(T, routed, null, shared, T == 9);
          }
    for (const int64_t n : {0, 1, 15, 16, 17, 133}) {
      std::vector<int64_t> ids(11, -3), positions(11, 7);
      Block out(11 * n * 4);
      omni::cpu::counter_uniform(ids.data(), positions.data(), 11, n, ~uint64_t{0}, out.as<float>(), parallel);
      out.use();
    }
  });
  std::printf("%.17g\n", checksum);
}
