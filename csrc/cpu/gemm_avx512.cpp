// The AVX-512 microkernels: every height, width, element type and layout of A, compiled once for all ops.
#include "cpu/gemm_avx512.h"

#if OMNI_X86

#include <cstring>
#include <type_traits>

namespace omni::cpu {
namespace {

// A (first unit of the tile's first row; `row` bytes to the next row, `step` bytes to the next unit) times B
// (`b_step` units to the next row of 16 Vectors units), over `units`. If it packs, B is elements as they lie in memory,
// `b_step` of them to the next row, and goes to t.pack on the way.
template <class E, bool Pairs, bool PackedA, int Rows, int Vectors, bool Packs>
OMNI_ENGINE void micro_avx512(int64_t units, const char* a, int64_t row, int64_t step, const float* b, int64_t b_step,
                              const Tile<float>& t) {
  __m512 acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) acc[i][j] = _mm512_setzero_ps();
  if (PackedA) row = 4; else step = 4;
  const char* ahead = t.fetch.at;
  [[maybe_unused]] const E* elements = reinterpret_cast<const E*>(b);
  [[maybe_unused]] float* pack = t.pack;
#pragma GCC unroll 2
  for (int64_t u = 0; u < units; ++u) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + t.fetch.gap, 0, 2);
    ahead += t.fetch.step;
    __m512 bv[Vectors];
    if constexpr (Packs) {
      Avx512<E, Pairs>::load_tile(elements, b_step, bv);
      elements += Avx512<E, Pairs>::kPair * b_step;
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(pack + 16 * j, bv[j]);
      pack += 16 * Vectors;
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) bv[j] = _mm512_loadu_ps(b + 16 * j);
      b += b_step;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      float unit;
      std::memcpy(&unit, a + i * row, 4);
      const __m512 av = _mm512_set1_ps(unit);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        if constexpr (Pairs)
          acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)av, (__m512bh)bv[j]);
        else
          acc[i][j] = _mm512_fmadd_ps(av, bv[j], acc[i][j]);
      }
    }
    a += step;
  }
  const __mmask16 last = first_lanes(t.cols - 16 * (Vectors - 1));
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const __mmask16 mask = j == Vectors - 1 ? last : __mmask16(0xFFFF);
      __m512 v = acc[i][j];
      if (t.init) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, t.init + i * t.ld_init + 16 * j));
      if (t.narrow) {
        if constexpr (!std::is_same_v<E, float>) {
          E* p = static_cast<E*>(t.out) + i * t.ld_out + 16 * j;
          __m256i packed;
          if constexpr (Pairs)
            packed = (__m256i)_mm512_cvtneps_pbh(v);
          else
            packed = Vector<float>::narrow(E{}, v);
          if (t.stream)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed);
          else
            _mm256_mask_storeu_epi16(p, mask, packed);
        }
      } else {
        float* p = static_cast<float*>(t.out) + i * t.ld_out + 16 * j;
        if (t.stream)
          _mm512_stream_ps(p, v);
        else
          _mm512_mask_storeu_ps(p, mask, v);
      }
    }
  }
}

}  // namespace

template <class E, bool Pairs>
typename Avx512<E, Pairs>::Micro Avx512<E, Pairs>::micro(bool packed_a, bool packs, int64_t rows, int64_t cols) {
#define OMNI_MICRO(A, R, V, B) micro_avx512<E, Pairs, A, R, V, B>
#define OMNI_WIDTHS(A, R) \
  {OMNI_MICRO(A, R, 1, false), OMNI_MICRO(A, R, 2, false), OMNI_MICRO(A, R, 3, false), OMNI_MICRO(A, R, 4, false), \
   OMNI_MICRO(A, R, 4, true)}
#define OMNI_HEIGHTS(A) \
  {OMNI_WIDTHS(A, 1), OMNI_WIDTHS(A, 2), OMNI_WIDTHS(A, 3), OMNI_WIDTHS(A, 4), OMNI_WIDTHS(A, 5), OMNI_WIDTHS(A, 6)}
  static constexpr Micro table[2][6][5] = {OMNI_HEIGHTS(false), OMNI_HEIGHTS(true)};
#undef OMNI_HEIGHTS
#undef OMNI_WIDTHS
#undef OMNI_MICRO
  return table[packed_a][rows - 1][packs ? 4 : (cols + 15) / 16 - 1];
}

template struct Avx512<float, false>;
template struct Avx512<Half, false>;
template struct Avx512<Bf16, false>;
template struct Avx512<Bf16, true>;

}  // namespace omni::cpu

#endif  // OMNI_X86
