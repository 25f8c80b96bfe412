// The engines of the blocked GEMM (gemm_blocked.h) that have vectors: one template, an instance per instruction set.
//
// They work on 32-bit units along the contraction: one value widened to fp32, or a pair of neighbouring bf16 values. A
// microkernel holds kRows x kTile accumulators; a step loads kTile units of B and broadcasts kRows units of A, so the
// products are the bound. Its B lies packed as [unit][kTile], or in place for fp32 weights that few rows use; the first
// rows' microkernel packs B on its way, which hides most of what packing costs. Element types without products of their
// own (fp16; bf16 but for AVX-512 BF16) are widened while packed.
//
// Declared here for the drivers; defined in gemm_simd_kernels.h, which engine_<isa>.cpp compiles.
#pragma once

#include <type_traits>

#include "cpu/gemm_tile.h"
#include "cpu/vector.h"

namespace omni::cpu {

// The microkernel's shape and the blocks that suit the caches.
template <class Isa>
struct Shape;

template <>
struct Shape<Avx512> {  // 24 of 32 registers accumulate; 10 loads for 24 products
  static constexpr int64_t kLanes = 16, kRows = 6, kVectors = 4, kGroup = 48;
  static constexpr int64_t kUnits = 768;          // of the contraction in one block
  static constexpr bool kInPlace = true;          // fp32 rows, and fp32 weights that few rows use, are not packed
  static constexpr int64_t kMaxCols = 256;        // of a result in one task
  static constexpr int64_t kResidentB = 0;
  static constexpr int64_t kFetchingCuts = 1 << 30;  // of rows, up to which the next tile of B is fetched meanwhile;
  static constexpr bool kSpreadsFetch = false;       // whether past that it is fetched before each microkernel
  static constexpr int64_t kPackAhead = 0;           // rows of B that a microkernel which packs fetches ahead of itself
  static constexpr bool kStreams = true;          // stores past the caches are fast
  static constexpr bool kFetchesSums = false;     // before a microkernel
  static constexpr int64_t kFewRows = 0;          // for which multiply_few is faster: here the microkernel, B in place
  static constexpr bool kFewByLines = false;      // there, whole cache lines of B at once
};

template <>
struct Shape<Avx2> {  // 12 of 16 registers accumulate; 8 loads for 12 products; packed B takes half of a first-level cache
  static constexpr int64_t kLanes = 8, kRows = 6, kVectors = 2, kGroup = 24;
  static constexpr int64_t kUnits = 256;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kMaxCols = 1024;       // rows are packed once for all of these
  static constexpr int64_t kFetchingCuts = 16;
  static constexpr bool kSpreadsFetch = true;
  static constexpr int64_t kPackAhead = 16;
  static constexpr bool kStreams = false;
  static constexpr int64_t kResidentB = 1 << 18;  // bytes of packed B that stay in the second-level cache beside the rest
  static constexpr bool kFetchesSums = true;
  static constexpr int64_t kFewRows = 8;
  static constexpr bool kFewByLines = true;
};

template <>
struct Shape<Neon> {  // 24 of 32 registers accumulate; 10 loads for 24 products. Not tuned: no such machine was at hand
  static constexpr int64_t kLanes = 4, kRows = 6, kVectors = 4, kGroup = 24;
  static constexpr int64_t kUnits = 256;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kMaxCols = 1024;
  static constexpr int64_t kFetchingCuts = 16;
  static constexpr bool kSpreadsFetch = false;
  static constexpr int64_t kPackAhead = 0;
  static constexpr bool kStreams = false;         // vector_neon.h has no store past the caches
  static constexpr int64_t kResidentB = 1 << 18;
  static constexpr bool kFetchesSums = true;
  static constexpr int64_t kFewRows = 8;
  static constexpr bool kFewByLines = false;
};

// How elements E become units of Isa and are multiplied: widened here, pairs where an instruction set has such products.
//   load_columns(p, ld, single, part)   one unit of a vector's columns from contraction row p (pairs: and the next one, ld
//                                       further, unless `single`)
//   load_whole(p, ld, to)               one unit of all columns of several vectors
//   load_run(p, u, l)                   units u, u + 1, .. of a contraction of l contiguous elements, zero past its end
//   add_product(sum, a, b)
//   store, store_part                   sums rounded to E
template <class Isa, class E, bool Pairs>
struct Units {
  static_assert(!Pairs);
  using V = Vector<Isa, float>;
  using type = typename V::type;
  using Part = typename V::Part;
  OMNI_TARGET static inline type load_columns(const E* p, int64_t, bool, Part part) { return V::load_part(p, part); }
  template <int N>
  OMNI_TARGET static inline void load_whole(const E* p, int64_t, type (&to)[N]) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) to[j] = V::load(p + V::width * j);
  }
  OMNI_TARGET static inline type load_run(const E* p, int64_t u, int64_t l) {
    return V::load_part(p + u, V::part(l - u));
  }
  OMNI_TARGET static inline type add_product(type sum, type a, type b) { return V::fma(a, b, sum); }
  OMNI_TARGET static inline void store(E* p, type x, bool stream) {
    if (stream) V::template store<true>(p, x); else V::template store<false>(p, x);
  }
  OMNI_TARGET static inline void store_part(E* p, type x, Part part) { V::store_part(p, x, part); }
};

// E: element type in memory; Pairs: bf16 products (E is Bf16), else fp32 products of widened elements.
template <class Isa, class E, bool Pairs>
struct Simd {
  using Element = E;
  using Acc = float;
  static constexpr int64_t kPair = Pairs ? 2 : 1;  // elements in a unit
  static constexpr int64_t kRows = Shape<Isa>::kRows, kTile = Shape<Isa>::kLanes * Shape<Isa>::kVectors;
  static constexpr int64_t kGroup = Shape<Isa>::kGroup;  // rows of A packed side by side
  static constexpr int64_t kUnits = Shape<Isa>::kUnits;
  static constexpr int64_t kResidentB = Shape<Isa>::kResidentB;
  static constexpr bool kStreams = Shape<Isa>::kStreams;
  static constexpr int64_t kFetchingCuts = Shape<Isa>::kFetchingCuts;
  static constexpr bool kSpreadsFetch = Shape<Isa>::kSpreadsFetch;
  static constexpr int64_t kMaxCols = Shape<Isa>::kMaxCols, kFewRows = Shape<Isa>::kFewRows;
  static constexpr bool kAInPlace = Pairs || (std::is_same_v<E, float> && Shape<Isa>::kInPlace);
  static constexpr bool kBInPlace = std::is_same_v<E, float> && Shape<Isa>::kInPlace;
  static constexpr bool kPacks = true;  // B in a microkernel

  // columns n of src[l][ld] -> out[group of W columns][unit][W], zero-filled to whole groups and units; W kGroup for A,
  // kTile for B
  OMNI_TARGET static void pack_a(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out);
  OMNI_TARGET static void pack_b(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out);
  // n rows of src[n][ld], l along the contraction -> out[group of kTile rows][unit][kTile]
  OMNI_TARGET static void pack_transposed(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out);
  // m rows of src[m][ld] -> out[m][ld_out], l elements as whole units
  OMNI_TARGET static void pack_rows(const E* src, int64_t ld, int64_t m, int64_t l, Acc* out, int64_t ld_out);

  using Micro = void (*)(int64_t units, const char* a, int64_t row, int64_t step, const float* b, int64_t b_step,
                         const Tile<float>& tile);
  // For a tile of so many rows and columns; `packed_a`: A lies packed by columns; `packs`: B does not lie packed yet, and
  // is left so (kTile columns and whole units of it).
  OMNI_TARGET static Micro micro(bool packed_a, bool packs, int64_t rows, int64_t cols);

  // sums[m][ld_sums] = A B for a few rows: A[m][l], B[l][n] as they lie. B streams by once, unpacked: what memory gives is
  // the bound. `next`: of B, what follows. Sums past n are overwritten, up to ld_sums.
  OMNI_TARGET static void multiply_few(const E* a, int64_t ld_a, const E* b, int64_t ld_b, int64_t m, int64_t n,
                                       int64_t l, const E* next, float* sums, int64_t ld_sums);
  // n sums rounded to E
  OMNI_TARGET static void write_row(const float* sums, int64_t n, E* out);

  // SwiGLU on a row of accumulators; swiglu.h has the formulas.
  OMNI_TARGET static void swiglu_row(const Acc* g, const Acc* u, int64_t n, Acc weight, E* h_gate, E* h_up, E* a);
  OMNI_TARGET static Acc swiglu_backward_row(const Acc* d, const E* h_gate, const E* h_up, int64_t n, Acc weight,
                                             E* d_gate, E* d_up, E* a);
};

}  // namespace omni::cpu
