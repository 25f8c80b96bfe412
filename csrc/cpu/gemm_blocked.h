// The blocked matrix product under grouped_gemm.cpp and expert_mlp.cpp: C[m, n] (+)= A[m, l] B[l, n] on one thread.
//
// The contraction is cut into blocks of at most kUnits units. Of each block, B is packed into tiles of kTile columns
// that stay in the second-level cache while all rows pass (where it can, by the first rows' microkernel on its way); A is
// read in place where its layout allows. Sums are accumulated in Acc (fp32; fp64 for fp64) over all blocks and rounded
// once. Engines (gemm_simd.h, gemm_portable.h) bring the packing and the microkernel. One task is one expert's chunk of
// rows times a block of columns, so that threads share nothing; they draw tasks from one counter, which balances skewed
// experts and leaves results unchanged.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/gemm_portable.h"
#include "cpu/gemm_simd.h"
#include "cpu/isa.h"
#include "kernels.h"

namespace omni::cpu {

constexpr int64_t kMaxRows = 384;     // of C in one task
constexpr int64_t kWider = 4;         // times the columns of a task, for few rows
constexpr int64_t kFewRows = 12;      // up to here packing fp32 weights costs more than it brings;
constexpr int64_t kFewRowsOfRun = 64; // if they are one run of memory, to here
constexpr int64_t kNarrow = 8;        // a result of fewer columns is summed up from many short sums: as accurate as the
constexpr int64_t kNarrowUnits = 32;  // dot products that others compute there
constexpr int64_t kRunBytes = int64_t{1} << 18;      // of weights fetched as one run: two fill half a second-level cache
constexpr int64_t kStreamOutput = int64_t{8} << 20;  // bytes of a result that is stored past the caches

// Memory of a thread that grows and stays: no allocation in the steady state.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(256, bytes);
      bytes_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

struct ThreadScratch {
  Scratch a, b, c, d;
  static ThreadScratch& mine() {
    static thread_local ThreadScratch scratch;
    return scratch;
  }
};

template <class E>
struct MatrixA {
  const E* data;
  int64_t ld;
  bool columns;  // A[i][l] at data[l * ld + i], else data[i * ld + l]
  const E* next = nullptr;  // of columns: what the next task will read, fetched meanwhile
};

template <class E>
struct MatrixB {
  const E* data;
  int64_t ld;
  bool transposed;  // B[l][j] at data[j * ld + l], else data[l * ld + j]
  const E* next;    // what the next task will read: fetched meanwhile. Null: nothing
};

template <class Acc>
struct MatrixC {
  void* data;  // Acc, or elements if narrow
  int64_t ld;
  bool narrow;
  bool accumulate;  // onto data (not with narrow)
  bool stream;
};

// Whether a contiguous result [rows, columns] is stored past the caches: if it is large, and of whole aligned tiles.
template <class G>
bool streams(const void* data, int64_t rows, int64_t columns, int64_t element_bytes) {
  return G::kStreams && rows * columns * element_bytes >= kStreamOutput && columns % 64 == 0 &&
         reinterpret_cast<uintptr_t>(data) % 64 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a block of up to 256 bytes' columns (128 of pairs) and all units, from p: the lines that the call-th of two
// microkernels fetches.
template <class G>
Fetch lines(const typename G::Element* p, int64_t ld, int64_t call) {
  const char* at = reinterpret_cast<const char*>(p);
  const int64_t row = ld * static_cast<int64_t>(sizeof(*p));
  if (G::kPair == 2) return {at + call * 64, 2 * row, row};
  return {at + call * 128, row, 64};
}

// C (+)= A B for a short contraction, as of the weights' gradient of an expert with few rows: the result is what moves, so
// it is written row by row, each from end to end, while all of B stays packed.
template <class G>
void multiply_short(const MatrixA<typename G::Element>& a, const MatrixB<typename G::Element>& b,
                    const MatrixC<typename G::Acc>& c, int64_t m, int64_t n, int64_t l) {
  using E = typename G::Element;
  using Acc = typename G::Acc;
  ThreadScratch& scratch = ThreadScratch::mine();
  Acc* packed_a = scratch.a.get<Acc>(ceil_div(m, G::kGroup) * l * G::kGroup);
  Acc* packed_b = scratch.b.get<Acc>(ceil_div(n, G::kTile) * l * G::kTile);
  G::pack_a(a.data, a.ld, l, m, packed_a);
  G::pack_b(b.data, b.ld, l, n, packed_b);
  Tile<Acc> tile{};
  tile.ld_init = tile.ld_out = c.ld;
  tile.narrow = c.narrow;
  tile.stream = c.stream;
  const int64_t item = c.narrow ? sizeof(E) : sizeof(Acc), row_bytes = c.ld * item;
  for (int64_t i = 0; i < m; i += G::kRows) {
    const int64_t height = std::min(G::kRows, m - i);
    const char* ai = reinterpret_cast<const char*>(packed_a + i / G::kGroup * G::kGroup * l + i % G::kGroup);
    for (int64_t j = 0; j < n; j += G::kTile) {
      tile.cols = std::min(G::kTile, n - j);
      tile.fetch = {static_cast<const char*>(c.data) + (i + G::kRows) * row_bytes + j * item, l > 16 ? 0 : 2 * row_bytes,
                    row_bytes};  // what is written next
      tile.out = c.narrow ? static_cast<void*>(static_cast<E*>(c.data) + i * c.ld + j)
                          : static_cast<void*>(static_cast<Acc*>(c.data) + i * c.ld + j);
      tile.init = c.accumulate ? static_cast<const Acc*>(c.data) + i * c.ld + j : nullptr;
      G::micro(true, false, height, tile.cols)(l, ai, sizeof(Acc), G::kGroup * sizeof(Acc), packed_b + j * l, G::kTile,
                                               tile);
    }
  }
}

// C (+)= A B as above, for a task's m rows and n of the result's `width` columns. The width decides how sums are cut: a
// task's own columns depend on the number of threads.
//
// Weights that few rows use come from memory as fast as they are multiplied, so the next ones are fetched meanwhile: as
// one run of memory where they are that (the processor's own prefetcher then runs ahead of ours), else tile by tile.
template <class G>
void multiply(const MatrixA<typename G::Element>& a, const MatrixB<typename G::Element>& b,
              const MatrixC<typename G::Acc>& c, int64_t m, int64_t n, int64_t l, int64_t width) {
  using E = typename G::Element;
  using Acc = typename G::Acc;
  constexpr int64_t kElement = sizeof(E);
  ThreadScratch& scratch = ThreadScratch::mine();
  if constexpr (G::kFewRows > 0) {
    if (m <= G::kFewRows && !a.columns && !b.transposed && !c.accumulate && l > 0 && width >= kNarrow) {
      const int64_t ld_sums = n + 16;  // no power of two: all rows find room in the first-level cache
      float* sums = scratch.c.get<float>(m * ld_sums);
      G::multiply_few(a.data, a.ld, b.data, b.ld, m, n, l, b.next, sums, ld_sums);
      for (int64_t i = 0; i < m; ++i) {
        if (c.narrow)
          G::write_row(sums + i * ld_sums, n, static_cast<E*>(c.data) + i * c.ld);
        else
          std::memcpy(static_cast<float*>(c.data) + i * c.ld, sums + i * ld_sums, n * sizeof(float));
      }
      return;
    }
  }
  if constexpr (G::kResidentB > 0) {
    if (a.columns && ceil_div(n, G::kTile) * G::kTile * l * int64_t{sizeof(Acc)} <= G::kResidentB && l <= G::kUnits &&
        width >= kNarrow)
      return multiply_short<G>(a, b, c, m, n, l);
  }
  const int64_t all_units = ceil_div(l, G::kPair);
  const int64_t blocks = ceil_div(all_units, width < kNarrow ? kNarrowUnits : G::kUnits);
  const int64_t max_units = std::min(ceil_div(ceil_div(all_units, blocks), 4) * 4, all_units);
  const int64_t block = max_units * G::kPair;  // elements
  const bool b_in_place =
      G::kBInPlace && !b.transposed && m <= (b.ld == n ? kFewRowsOfRun : kFewRows) && n % 16 == 0;
  const bool a_in_place = G::kAInPlace && !a.columns && l % G::kPair == 0;
  // With A in place every tile of columns takes the whole contraction at once; packed A is shared by all tiles.
  const int64_t stripe = a_in_place ? G::kTile : n;
  const int64_t ld_rows = max_units + 16;  // of packed rows: no power of two
  Acc* packed_b = b_in_place ? nullptr : scratch.b.get<Acc>(max_units * G::kTile);
  Acc* packed_a = a_in_place ? nullptr
                  : a.columns ? scratch.a.get<Acc>(ceil_div(m, G::kGroup) * max_units * G::kGroup)
                              : scratch.a.get<Acc>(m * ld_rows);
  const bool sums = c.narrow && blocks > 1;
  Acc* partial = sums ? scratch.c.get<Acc>(m * n) : static_cast<Acc*>(c.narrow ? nullptr : c.data);
  const int64_t ld_partial = sums ? n : c.ld;
  const int64_t cuts_of_all = ceil_div(m, G::kRows);
  const int64_t run_bytes = n * (a_in_place ? l : block) * kElement;  // of B, before what follows is due
  const bool one_run = !b.transposed && !a.columns && b.ld == n && run_bytes <= kRunBytes;

  Fetch run{};
  const auto fetch_run = [&](const E* next, int64_t units) {
    run = {reinterpret_cast<const char*>(next), 0, 64};
    if (next) run.step = std::min<int64_t>(128, run_bytes / (ceil_div(n, G::kTile) * cuts_of_all * units));
  };
  if (one_run && a_in_place) fetch_run(b.next, all_units);
  for (int64_t s = 0; s < n; s += stripe) {
    if (b.transposed && a_in_place) {
      const E* next = s + stripe < n ? b.data + (s + stripe) * b.ld : b.next;
      run = {reinterpret_cast<const char*>(next), 0, 64};
      if (next) run.step = std::min<int64_t>(128, G::kTile * l * kElement / (cuts_of_all * all_units));
    }
    for (int64_t l0 = 0; l0 < l; l0 += block) {
      const int64_t length = std::min(block, l - l0), units = ceil_div(length, G::kPair);
      const bool first = l0 == 0, last = l0 + length == l;
      if (one_run && !a_in_place) fetch_run(last ? b.next : b.data + (l0 + block) * b.ld, units);
      if (!a_in_place) {
        if (a.columns)
          G::pack_a(a.data + l0 * a.ld, a.ld, length, m, packed_a);
        else
          G::pack_rows(a.data + l0, a.ld, m, length, packed_a, ld_rows);
      }
      Tile<Acc> tile{};
      tile.ld_init = ld_partial;
      tile.narrow = c.narrow && last;
      tile.ld_out = tile.narrow ? c.ld : ld_partial;
      tile.stream = c.stream && last;
      for (int64_t j = s; j < std::min(n, s + stripe); j += G::kTile) {
        tile.cols = std::min(G::kTile, n - j);
        const Acc* in_place = reinterpret_cast<const Acc*>(b.data + l0 * b.ld + j);
        const bool packs = G::kPacks && !b_in_place && !b.transposed && tile.cols == G::kTile && length % G::kPair == 0;
        tile.pack = packed_b;
        if (b.transposed)
          G::pack_transposed(b.data + j * b.ld + l0, b.ld, length, tile.cols, packed_b);
        else if (!b_in_place && !packs)
          G::pack_b(b.data + l0 * b.ld + j, b.ld, length, tile.cols, packed_b);
        const E* next = last ? (j + G::kTile < n ? b.data + j + G::kTile : b.next) : b.data + (l0 + block) * b.ld + j;
        if (run.step || b.transposed || cuts_of_all > G::kFetchingCuts) next = nullptr;
        const E* next_rows = nullptr;  // of transposed B: a tile's rows, one run of memory if they hold nothing else
        if (b.transposed && !a_in_place && cuts_of_all <= G::kFetchingCuts) {
          next_rows = j + G::kTile < n ? b.data + (j + G::kTile) * b.ld + l0 : last ? b.next : b.data + l0 + block;
          if (next_rows && b.ld == length) {
            run = {reinterpret_cast<const char*>(next_rows), 0, 64};
            run.step = std::min<int64_t>(128, G::kTile * length * kElement / (cuts_of_all * units));
            next_rows = nullptr;
          } else {
            run = {};
          }
        }
        // With many rows the next tile's lines are spread over all microkernels: so many before each.
        const E* ahead = nullptr;
        if (G::kSpreadsFetch && !b_in_place && !b.transposed && !run.step && cuts_of_all > G::kFetchingCuts)
          ahead = j + G::kTile < n ? b.data + l0 * b.ld + j + G::kTile : last ? b.next : b.data + (l0 + block) * b.ld;
        const int64_t lines_at_once = ceil_div(length, cuts_of_all);
        int64_t lines_left = ahead ? length : 0;
        const E* next_a = last ? a.next : a.data + (l0 + block) * a.ld;
        if (!a.columns || j > 0) next_a = nullptr;
        // The rows in groups (one if A is not packed by columns), each cut into tiles of nearly equal height.
        const int64_t group = a.columns ? G::kGroup : m;
        for (int64_t g = 0; g < m; g += group) {
          const int64_t rows = std::min(group, m - g), cuts = ceil_div(rows, G::kRows);
          for (int64_t cut = 0, i = g; cut < cuts; ++cut) {
            const int64_t height = rows / cuts + (cut < rows % cuts);
            const char* ai;
            int64_t row = 0, step = sizeof(Acc);
            if (a.columns) {
              ai = reinterpret_cast<const char*>(packed_a + g * units + (i - g));
              row = sizeof(Acc);
              step = G::kGroup * sizeof(Acc);
            } else if (a_in_place) {
              ai = reinterpret_cast<const char*>(a.data + i * a.ld + l0);
              row = a.ld * kElement;
            } else {
              ai = reinterpret_cast<const char*>(packed_a + i * ld_rows);
              row = ld_rows * sizeof(Acc);
            }
            tile.fetch = {ai, 0, 0};
            if (run.step) {
              tile.fetch = run;
              run.at += run.step * units;
            } else if (next_rows && 2 * cut < G::kTile) {
              tile.fetch = {reinterpret_cast<const char*>(next_rows + 2 * cut * b.ld), kElement * G::kPair, b.ld * kElement};
            } else if (next_a && cut < 2) {
              tile.fetch = lines<G>(next_a + g, a.ld, cut);
            } else if (const int64_t call = a.columns ? cut - 2 : cut; next && g == 0 && call >= 0 && call < 2) {
              tile.fetch = lines<G>(next, b.ld, call);
            }
            for (int64_t k = std::min(lines_left, lines_at_once); k > 0; --k, --lines_left, ahead += b.ld)
              __builtin_prefetch(ahead, 0, 2);
            tile.init = (!first || c.accumulate) ? partial + i * ld_partial + j : nullptr;
            tile.out = tile.narrow ? static_cast<void*>(static_cast<E*>(c.data) + i * c.ld + j)
                                   : static_cast<void*>(partial + i * ld_partial + j);
            const bool is_first = packs && i == 0, from_memory = b_in_place || is_first;
            G::micro(a.columns, is_first, height, tile.cols)(units, ai, row, step, from_memory ? in_place : packed_b,
                                                             from_memory ? b.ld : G::kTile, tile);
            i += height;
          }
        }
      }
    }
  }
}

// A block of one expert's result.
struct Task {
  int64_t expert, row, rows, col, cols;
};

// Cuts [rows, cols] results, rows by expert, into tasks. `rows_of(e)` is the range of expert e. Experts of up to `few`
// rows, whose weights only pass by, are cut wider.
template <class RowsOf>
std::vector<Task> cut_tasks(int64_t E, int64_t cols, int64_t threads, int64_t max_cols, const RowsOf& rows_of,
                            int64_t few = 0) {
  const auto cut = [&](int64_t usual_width, std::vector<Task>* tasks) {
    int64_t count = 0;
    for (int64_t e = 0; e < E; ++e) {
      const auto [begin, end] = rows_of(e);
      const int64_t rows = end - begin, width = rows <= few ? kWider * usual_width : usual_width, chunks = ceil_div(rows, kMaxRows);
      if (rows == 0) continue;
      const int64_t chunk = ceil_div(ceil_div(rows, chunks), 48) * 48;
      count += ceil_div(rows, chunk) * ceil_div(cols, width);
      if (!tasks) continue;
      for (int64_t c = 0; c < cols; c += width)
        for (int64_t r = 0; r < rows; r += chunk)
          tasks->push_back({e, begin + r, std::min(chunk, rows - r), c, std::min(width, cols - c)});
    }
    return count;
  };
  int64_t width = max_cols;
  if (threads > 1)
    while (width > 64 && cut(width, nullptr) < 4 * threads) width /= 2;
  std::vector<Task> tasks;
  tasks.reserve(cut(width, nullptr));
  cut(width, &tasks);
  return tasks;
}

// f(task, next task or null), drawn from one counter by as many threads as the work deserves.
template <class F>
void run_tasks(const Parallel& parallel, const std::vector<Task>& tasks, int64_t flops, const F& f) {
  constexpr int64_t kFlopsPerThread = 1 << 20;
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t workers = std::clamp<int64_t>(std::min<int64_t>(flops / kFlopsPerThread, count), 1, parallel.threads);
  std::atomic<int64_t> drawn{0};
  parallel(workers, [&](int64_t) {
    for (int64_t i; (i = drawn.fetch_add(1, std::memory_order_relaxed)) < count;)
      f(tasks[i], i + 1 < count ? &tasks[i + 1] : nullptr);
  });
}

// f(engine) with the engine that runs (isa.h) for a dtype; fp64 is multiplied in plain C++ only.
template <class F>
void with_engine(DType dtype, const F& f) {
  if (dtype == DType::F64) return f(Portable<double>{});
  const bool done = with_vectors([&](auto isa) {
    using Isa = decltype(isa);
    if (dtype == DType::F32) return f(Simd<Isa, float, false>{});
    if (dtype == DType::F16) return f(Simd<Isa, Half, false>{});
    if constexpr (std::is_same_v<Isa, Avx512>)
      if (has_bf16_products()) return f(Simd<Isa, Bf16, true>{});
    f(Simd<Isa, Bf16, false>{});
  });
  if (done) return;
  if (dtype == DType::F32) f(Portable<float>{});
  if (dtype == DType::BF16) f(Portable<Bf16>{});
  if (dtype == DType::F16) f(Portable<Half>{});
}

}  // namespace omni::cpu
