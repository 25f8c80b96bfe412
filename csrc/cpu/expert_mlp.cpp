// The experts' MLP over ragged groups of rows: y = (w silu(x Wg) (x Wu)) Wd, w1 = (Wg | Wu), w2 = Wd.
//
// SwiGLU and the routing weight w happen in the epilogues of the products, on tiles of accumulators that never leave the
// caches. Kept for the backward pass: h = x w1, nothing else; a = w silu(g) u is made again from it. With d = dy Wd^T the
// gradient of a row's weight is <d, silu(g) u>, so that y is not needed either. Partial sums of it, one per block of
// columns, are added in order: the same bits for the same number of threads (more threads may cut narrower blocks).
#include <cstring>

#include "cpu/gemm_blocked.h"

namespace omni::cpu {
namespace {

// Tasks over [rows, F], each with so many columns of gate and of up; experts of little width in one piece.
template <class G, class RowsOf>
std::vector<Task> cut_ffn(int64_t E, int64_t F, int64_t threads, const RowsOf& rows_of, int64_t few = 0) {
  return cut_tasks(E, F, threads, F <= G::kMaxCols ? G::kMaxCols : G::kMaxCols / 2, rows_of, few);
}

template <class Acc>
Acc weight_of(const void* row_weight, int64_t row) {
  return row_weight ? static_cast<const Acc*>(row_weight)[row] : Acc(1);
}

void zero_tail(void* rows, int64_t from, int64_t to, int64_t width_bytes) {
  if (to > from && width_bytes > 0)
    std::memset(static_cast<char*>(rows) + from * width_bytes, 0, (to - from) * width_bytes);
}

}  // namespace

void expert_mlp(const void* x, const void* w1, const void* w2, const int64_t* offsets, const void* row_weight, int64_t rows,
                int64_t E, int64_t H, int64_t F, DType dtype, void* h, void* a, void* y, const Parallel& parallel) {
  const int64_t bytes = size_of(dtype);
  zero_tail(h, offsets[E], rows, 2 * F * bytes);
  if (H == 0) zero_tail(h, 0, rows, 2 * F * bytes), zero_tail(a, 0, rows, F * bytes);
  if (H > 0 && F > 0) {
    with_engine(dtype, [&](auto engine) {
      using G = decltype(engine);
      using E_ = typename G::Element;
      using Acc = typename G::Acc;
      const E_* weights = static_cast<const E_*>(w1);
      const auto rows_of = [&](int64_t e) { return std::pair<int64_t, int64_t>(offsets[e], offsets[e + 1]); };
      const auto tasks = cut_ffn<G>(E, F, parallel.threads, rows_of, G::kFewRows);
      run_tasks(parallel, tasks, 4 * offsets[E] * H * F, [&](const Task& t, const Task* next) {
        Acc* tile = ThreadScratch::mine().d.get<Acc>(2 * t.rows * t.cols);
        const MatrixA<E_> a_matrix{static_cast<const E_*>(x) + t.row * H, H, false};
        const E_* gate = weights + t.expert * H * 2 * F + t.col;
        const E_* after = next ? weights + next->expert * H * 2 * F + next->col : nullptr;
        const MatrixC<Acc> out{tile, 2 * t.cols, false, false, false};
        const MatrixC<Acc> up_out{tile + t.cols, 2 * t.cols, false, false, false};
        if (t.cols == F) {  // (gate | up) are whole rows of w1: one product
          multiply<G>(a_matrix, {gate, 2 * F, false, after}, out, t.rows, 2 * F, H, 2 * F);
        } else {
          multiply<G>(a_matrix, {gate, 2 * F, false, gate + F}, out, t.rows, t.cols, H, 2 * F);
          multiply<G>(a_matrix, {gate + F, 2 * F, false, after}, up_out, t.rows, t.cols, H, 2 * F);
        }
        for (int64_t i = 0; i < t.rows; ++i) {
          const int64_t row = t.row + i;
          E_* to = static_cast<E_*>(h) + row * 2 * F + t.col;
          G::swiglu_row(tile + 2 * i * t.cols, tile + (2 * i + 1) * t.cols, t.cols, weight_of<Acc>(row_weight, row), to, to + F,
                         static_cast<E_*>(a) + row * F + t.col);
        }
      });
    });
  }
  grouped_gemm(a, w2, offsets, rows, E, F, H, false, dtype, y, parallel);
}

void expert_mlp_backward(const void* dy, const void* x, const void* h, const void* w1, const void* w2,
                         const int64_t* offsets, const void* row_weight, int64_t rows, int64_t E, int64_t H, int64_t F,
                         DType dtype, DType dtype_dw, bool accumulate, void* a, void* dh, void* dx, void* dw1, void* dw2,
                         void* drow_weight, const Parallel& parallel) {
  if (drow_weight) zero_tail(drow_weight, 0, rows, dtype == DType::F64 ? 8 : 4);
  const auto rows_of = [&](int64_t e) { return std::pair<int64_t, int64_t>(offsets[e], offsets[e + 1]); };
  if (H == 0) zero_tail(dh, 0, rows, 2 * F * size_of(dtype)), zero_tail(a, 0, rows, F * size_of(dtype));
  if (H > 0 && F > 0) {
    with_engine(dtype, [&](auto engine) {
      using G = decltype(engine);
      using E_ = typename G::Element;
      using Acc = typename G::Acc;
      const E_* weights = static_cast<const E_*>(w2);
      const auto tasks = cut_ffn<G>(E, F, parallel.threads, rows_of);
      int64_t width = F;  // of a block of columns: where the second one begins
      for (const Task& t : tasks) width = t.col > 0 ? std::min(width, t.col) : width;
      const int64_t blocks = ceil_div(F, width);
      std::vector<Acc> dots(drow_weight ? blocks * offsets[E] : 0);
      run_tasks(parallel, tasks, 2 * offsets[E] * H * F, [&](const Task& t, const Task* next) {
        Acc* tile = ThreadScratch::mine().d.get<Acc>(t.rows * t.cols);
        multiply<G>({static_cast<const E_*>(dy) + t.row * H, H, false},
                    {weights + (t.expert * F + t.col) * H, H, true,
                     next ? weights + (next->expert * F + next->col) * H : nullptr},
                    MatrixC<Acc>{tile, t.cols, false, false, false}, t.rows, t.cols, H, F);
        for (int64_t i = 0; i < t.rows; ++i) {
          const int64_t row = t.row + i, at = row * 2 * F + t.col;
          const E_* from = static_cast<const E_*>(h) + at;
          E_* to = static_cast<E_*>(dh) + at;
          const Acc dot = G::swiglu_backward_row(tile + i * t.cols, from, from + F, t.cols,
                                                  weight_of<Acc>(row_weight, row), to, to + F,
                                                  static_cast<E_*>(a) + row * F + t.col);
          if (drow_weight) dots[t.col / width * offsets[E] + row] = dot;
        }
      });
      if (drow_weight) {
        Acc* out = static_cast<Acc*>(drow_weight);
        for (int64_t b = 0; b < blocks; ++b)
          for (int64_t row = 0; row < offsets[E]; ++row) out[row] += dots[b * offsets[E] + row];
      }
    });
  }
  if (dw2) grouped_wgrad(a, dy, offsets, E, F, H, dtype, dtype_dw, accumulate, dw2, parallel);
  if (dx) grouped_gemm(dh, w1, offsets, rows, E, H, 2 * F, true, dtype, dx, parallel);
  if (dw1) grouped_wgrad(x, dh, offsets, E, H, 2 * F, dtype, dtype_dw, accumulate, dw1, parallel);
}

}  // namespace omni::cpu
