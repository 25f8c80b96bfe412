// The AVX-512 microkernels: every height, width, element type and layout of A, compiled once for all ops.
#include "cpu/gemm_avx512.h"

#if OMNI_X86

#include <cstring>
#include <type_traits>

namespace omni::cpu {
namespace {

// A (first unit of the tile's first row; `row` bytes to the next row, `step` bytes to the next unit) times B
// (`b_step` units to the next row of 16 NV units), over `units`.
template <class E, bool Pairs, bool PackedA, int Rows, int Vectors>
OMNI_ENGINE void micro_avx512(int64_t units, const char* a, int64_t row, int64_t step, const float* b, int64_t b_step,
                              const Tile<float>& t) {
  __m512 acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) acc[i][j] = _mm512_setzero_ps();
  if (PackedA) row = 4; else step = 4;
  const char* ahead = t.fetch.at;
#pragma GCC unroll 2
  for (int64_t u = 0; u < units; ++u) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + t.fetch.gap, 0, 2);
    ahead += t.fetch.step;
    __m512 bv[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) bv[j] = _mm512_loadu_ps(b + 16 * j);
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
    b += b_step;
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
typename Avx512<E, Pairs>::Micro Avx512<E, Pairs>::micro(bool packed, int64_t rows, int64_t cols) {
#define OMNI_ROW(P, R) \
  {micro_avx512<E, Pairs, P, R, 1>, micro_avx512<E, Pairs, P, R, 2>, micro_avx512<E, Pairs, P, R, 3>, micro_avx512<E, Pairs, P, R, 4>}
#define OMNI_ROWS(P) {OMNI_ROW(P, 1), OMNI_ROW(P, 2), OMNI_ROW(P, 3), OMNI_ROW(P, 4), OMNI_ROW(P, 5), OMNI_ROW(P, 6)}
  static constexpr Micro table[2][6][4] = {OMNI_ROWS(false), OMNI_ROWS(true)};
#undef OMNI_ROWS
#undef OMNI_ROW
  return table[packed][rows - 1][(cols + 15) / 16 - 1];
}

template Avx512<float, false>::Micro Avx512<float, false>::micro(bool, int64_t, int64_t);
template Avx512<Half, false>::Micro Avx512<Half, false>::micro(bool, int64_t, int64_t);
template Avx512<Bf16, false>::Micro Avx512<Bf16, false>::micro(bool, int64_t, int64_t);
template Avx512<Bf16, true>::Micro Avx512<Bf16, true>::micro(bool, int64_t, int64_t);

}  // namespace omni::cpu

#endif  // OMNI_X86
