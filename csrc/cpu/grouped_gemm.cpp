// Grouped matrix product over ragged groups of rows: forward, gradient to the rows, gradient to the weights.
//
// Rows offsets[e]..offsets[e + 1] belong to expert e. Rows past offsets[E] are never read; results there are zero. The
// contraction of the weight gradient runs over an expert's rows.
#include <cstring>

#include "cpu/gemm_blocked.h"

namespace omni::cpu {

void grouped_gemm(const void* x, const void* w, const int64_t* offsets, int64_t rows, int64_t E, int64_t K, int64_t N,
                  bool transpose_w, DType dtype, void* y, const Parallel& parallel) {
  const int64_t length = transpose_w ? N : K, width = transpose_w ? K : N;
  const int64_t bytes = size_of(dtype);
  const int64_t filled = length == 0 ? 0 : offsets[E];  // an empty contraction is zero
  if (rows > filled && width > 0)
    std::memset(static_cast<char*>(y) + filled * width * bytes, 0, (rows - filled) * width * bytes);
  if (filled == 0 || width == 0) return;
  with_engine(dtype, [&](auto engine) {
    using G = decltype(engine);
    using E_ = typename G::Element;
    const auto rows_of = [&](int64_t e) { return std::pair<int64_t, int64_t>(offsets[e], offsets[e + 1]); };
    const auto tasks =
        cut_tasks(E, width, parallel.threads, G::kMaxCols, rows_of, transpose_w ? 0 : G::kFewRows);
    const E_* weights = static_cast<const E_*>(w);
    const auto at = [&](const Task& t) { return weights + t.expert * K * N + (transpose_w ? t.col * N : t.col); };
    const bool stream = streams<G>(y, filled, width, bytes);
    run_tasks(parallel, tasks, 2 * offsets[E] * K * N, [&](const Task& t, const Task* next) {
      const MatrixA<E_> a{static_cast<const E_*>(x) + t.row * length, length, false};
      const MatrixB<E_> b{at(t), N, transpose_w, next ? at(*next) : nullptr};
      const bool narrow = !std::is_same_v<E_, typename G::Acc>;
      const MatrixC<typename G::Acc> c{static_cast<E_*>(y) + t.row * width + t.col, width, narrow, false, stream};
      multiply<G>(a, b, c, t.rows, t.cols, length, width);
      if (stream) store_fence();
    });
  });
}

void grouped_wgrad(const void* x, const void* dy, const int64_t* offsets, int64_t E, int64_t K, int64_t N, DType dtype,
                   DType dtype_out, bool accumulate, void* dw, const Parallel& parallel) {
  const int64_t matrix_bytes = K * N * size_of(dtype_out);
  if (!accumulate && matrix_bytes > 0)
    for (int64_t e = 0; e < E; ++e)
      if (offsets[e] == offsets[e + 1]) std::memset(static_cast<char*>(dw) + e * matrix_bytes, 0, matrix_bytes);
  if (offsets[E] == 0 || K == 0 || N == 0) return;
  with_engine(dtype, [&](auto engine) {
    using G = decltype(engine);
    using E_ = typename G::Element;
    using Acc = typename G::Acc;
    const auto tasks = cut_tasks(E, N, parallel.threads, G::kMaxCols, [&](int64_t e) {
      return std::pair<int64_t, int64_t>(0, offsets[e] == offsets[e + 1] ? 0 : K);
    });
    const bool narrow = dtype_out == dtype && !std::is_same_v<E_, Acc>;
    const int64_t row_bytes = N * size_of(dtype_out);
    const bool stream = !accumulate && streams<G>(dw, E * K, N, size_of(dtype_out));
    const auto rows_at = [&](const Task& t) { return static_cast<const E_*>(x) + offsets[t.expert] * K + t.row; };
    const auto columns_at = [&](const Task& t) { return static_cast<const E_*>(dy) + offsets[t.expert] * N + t.col; };
    run_tasks(parallel, tasks, 2 * offsets[E] * K * N, [&](const Task& t, const Task* next) {
      const int64_t length = offsets[t.expert + 1] - offsets[t.expert];
      const MatrixA<E_> a{rows_at(t), K, true, next ? rows_at(*next) : nullptr};
      const MatrixB<E_> b{columns_at(t), N, false, next ? columns_at(*next) : nullptr};
      char* out = static_cast<char*>(dw) + t.expert * matrix_bytes + t.row * row_bytes + t.col * size_of(dtype_out);
      multiply<G>(a, b, MatrixC<Acc>{out, N, narrow, accumulate, stream}, t.rows, t.cols, length, N);
      if (stream) store_fence();
    });
  });
}

}  // namespace omni::cpu
