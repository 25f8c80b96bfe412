// AVX-512 engines of the blocked GEMM (gemm_blocked.h): fp32 by FMA, bf16 by vdpbf16ps with fp32 accumulation.
//
// Both work on 32-bit units along the contraction: one fp32 value, or a pair of neighbouring bf16 values. A microkernel
// holds 6 x 64 accumulators (24 of 32 registers); a step loads four vectors of B and broadcasts six units of A: 10 loads
// for 24 products, so the products are the bound. Its B lies packed as [unit][64], or in place for fp32 weights that few
// rows use; the first rows' microkernel packs B on its way, which hides most of what packing costs. Element types without
// products of their own (fp16; bf16 on older processors) are widened while packed.
#pragma once

#include "cpu/vector.h"

#if OMNI_X86

#include "cpu/gemm_tile.h"

// Every function of an engine may use bf16 instructions: none appears unless Bf16 products are asked for.
#define OMNI_ENGINE OMNI_AVX512_BF16

namespace omni::cpu {

OMNI_ENGINE inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xFFFF) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

OMNI_ENGINE inline __m512 widen_part(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
template <class E>
OMNI_ENGINE inline __m512 widen_part(const E* p, __mmask16 mask) {
  return Vector<float>::widen(E{}, _mm256_maskz_loadu_epi16(mask, p));
}

// Transposes 16 x 16 units in registers.
OMNI_ENGINE inline void transpose16(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#define OMNI_PD(v) _mm512_castps_pd(v)
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(OMNI_PD(t[i]), OMNI_PD(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(OMNI_PD(t[i]), OMNI_PD(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(OMNI_PD(t[i + 1]), OMNI_PD(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(OMNI_PD(t[i + 1]), OMNI_PD(t[i + 3])));
  }
#undef OMNI_PD
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// E: element type in memory; Pairs: bf16 products (E is Bf16), else fp32 products of widened elements.
template <class E, bool Pairs>
struct Avx512 {
  using Element = E;
  using Acc = float;
  static constexpr bool kAvx512 = true;
  static constexpr int64_t kPair = Pairs ? 2 : 1;      // elements in a unit
  static constexpr int64_t kRows = 6, kTile = 64;      // of a microkernel
  static constexpr int64_t kGroup = 8 * kRows;         // rows of A packed side by side
  static constexpr int64_t kUnits = 768;               // of the contraction in one block
  static constexpr bool kAInPlace = Pairs || std::is_same_v<E, float>;
  static constexpr bool kBInPlace = std::is_same_v<E, float>;
  static constexpr bool kPacks = true;  // B in a microkernel

  // 16 columns of units from contraction row p (and, for pairs, the one ld further unless `single`).
  OMNI_ENGINE static inline __m512 load_units(const E* p, int64_t ld, bool single, __mmask16 mask) {
    if constexpr (Pairs) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
      if (single) return _mm512_castsi512_ps(low);
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + ld));
      return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    } else {
      return widen_part(p, mask);
    }
  }

  // one unit of kTile columns from p
  OMNI_ENGINE static inline void load_tile(const E* p, int64_t ld, __m512 (&to)[4]) {
    if constexpr (Pairs) {
      interleave(p, p + ld, to[0], to[1]);
      interleave(p + 32, p + 32 + ld, to[2], to[3]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) to[j] = load_units(p + 16 * j, ld, false, 0xFFFF);
    }
  }

  // columns n of src[l][ld] -> out[group of W columns][unit][W], zero-filled to whole groups and units
  template <int64_t W>
  OMNI_ENGINE static void pack_columns(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
    const int64_t units = (l + kPair - 1) / kPair;
    for (int64_t u = 0; u < units; ++u) {
      const E* p = src + u * kPair * ld;
      const bool single = Pairs && u * kPair + 1 == l;
      float* to = out + u * W;
      for (int64_t c = 0; c < n; c += W, to += units * W) {
        if (Pairs && W % 32 == 0 && !single && n - c >= W) {
#pragma GCC unroll 2
          for (int64_t v = 0; v < W; v += 32) {
            __m512 first, second;
            interleave(p + c + v, p + c + v + ld, first, second);
            _mm512_storeu_ps(to + v, first);
            _mm512_storeu_ps(to + v + 16, second);
          }
          continue;
        }
#pragma GCC unroll 4
        for (int64_t v = 0; v < W; v += 16)
          _mm512_storeu_ps(to + v, load_units(p + c + v, ld, single, first_lanes(n - c - v)));
      }
    }
  }

  // 32 columns of two rows: (low[0], high[0], low[1], high[1], ...)
  OMNI_ENGINE static inline void interleave(const E* low, const E* high, __m512& first, __m512& second) {
    alignas(64) static constexpr auto index = interleave_index();
    const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
    first = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(index.lane), b));
    second = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(index.lane + 32), b));
  }

  struct InterleaveIndex { alignas(64) uint16_t lane[64]; };
  static constexpr InterleaveIndex interleave_index() {
    InterleaveIndex index{};
    for (int i = 0; i < 32; ++i) {
      index.lane[2 * i] = static_cast<uint16_t>(i);
      index.lane[2 * i + 1] = static_cast<uint16_t>(i + 32);
    }
    return index;
  }

  // n rows of src[n][ld], l along the contraction -> out[group of kTile rows][unit][kTile]
  OMNI_ENGINE static void pack_transposed(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
    const int64_t units = (l + kPair - 1) / kPair;
    for (int64_t c = 0; c < n; c += 16) {
      float* to = out + c / kTile * units * kTile + c % kTile;
      for (int64_t u = 0; u < units; u += 16) {
        __m512 r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = c + i < n ? load_run(src + (c + i) * ld, u, l) : _mm512_setzero_ps();
        transpose16(r);
        if (units - u >= 16) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + (u + i) * kTile, r[i]);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i)
            if (u + i < units) _mm512_storeu_ps(to + (u + i) * kTile, r[i]);
        }
      }
    }
    if (n % kTile) {  // the last tile's columns that no group of 16 filled
      const int64_t filled = (n % kTile + 15) / 16 * 16;
      float* to = out + n / kTile * units * kTile;
      for (int64_t u = 0; u < units; ++u)
        for (int64_t c = filled; c < kTile; c += 16) _mm512_storeu_ps(to + u * kTile + c, _mm512_setzero_ps());
    }
  }

  // 16 units from unit u of a contraction of l contiguous elements, zero past its end
  OMNI_ENGINE static inline __m512 load_run(const E* p, int64_t u, int64_t l) {
    if constexpr (Pairs) {
      const int64_t left = l - 2 * u;
      const __mmask32 mask = left >= 32 ? ~__mmask32(0) : left <= 0 ? 0 : (__mmask32(1) << left) - 1;
      return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p + 2 * u));
    } else {
      return widen_part(p + u, first_lanes(l - u));
    }
  }

  // m rows of src[m][ld] -> out[m][ld_out], l elements as whole units
  OMNI_ENGINE static void pack_rows(const E* src, int64_t ld, int64_t m, int64_t l, Acc* out, int64_t ld_out) {
    const int64_t units = (l + kPair - 1) / kPair;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t u = 0; u < units; u += 16)
        _mm512_mask_storeu_ps(out + i * ld_out + u, first_lanes(units - u), load_run(src + i * ld, u, l));
  }

  using Micro = void (*)(int64_t, const char*, int64_t, int64_t, const float*, int64_t, const Tile<float>&);

  // For a tile of so many rows and columns; `packed_a`: A lies packed by columns; `packs`: B does not lie packed yet, and
  // is left so (kTile columns and whole units of it). In gemm_avx512.cpp.
  static Micro micro(bool packed_a, bool packs, int64_t rows, int64_t cols);
};

}  // namespace omni::cpu

#endif  // OMNI_X86
