// The vectors of AVX-512 (vector.h says what each function does), and its bf16 products. For engine_avx512.cpp.
#pragma once

#undef OMNI_TARGET
#define OMNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")))

#include "cpu/gemm_simd.h"
#include "cpu/vector.h"

#pragma GCC diagnostic push  // GCC 12 warns about its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace omni::cpu {

template <>
struct Vector<Avx512, float> {
  using type = __m512;
  using Part = __mmask16;
  static constexpr int64_t width = 16;
  static inline Part part(int64_t n) { return n >= 16 ? Part(0xFFFF) : n <= 0 ? Part(0) : Part((1u << n) - 1); }

  OMNI_TARGET static inline type zero() { return _mm512_setzero_ps(); }
  OMNI_TARGET static inline type broadcast(float x) { return _mm512_set1_ps(x); }
  OMNI_TARGET static inline type add(type a, type b) { return _mm512_add_ps(a, b); }
  OMNI_TARGET static inline type sub(type a, type b) { return _mm512_sub_ps(a, b); }
  OMNI_TARGET static inline type mul(type a, type b) { return _mm512_mul_ps(a, b); }
  OMNI_TARGET static inline type div(type a, type b) { return _mm512_div_ps(a, b); }
  OMNI_TARGET static inline type min(type a, type b) { return _mm512_min_ps(a, b); }
  OMNI_TARGET static inline type max(type a, type b) { return _mm512_max_ps(a, b); }
  OMNI_TARGET static inline type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  OMNI_TARGET static inline type fnma(type a, type b, type c) { return _mm512_fnmadd_ps(a, b, c); }
  OMNI_TARGET static inline float sum(type a) { return _mm512_reduce_add_ps(a); }
  OMNI_TARGET static inline type round(type a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  OMNI_TARGET static inline type scale(type a, type n) { return _mm512_scalef_ps(a, n); }
  OMNI_TARGET static inline type keep(type a, Part part) { return _mm512_maskz_mov_ps(part, a); }

  OMNI_TARGET static inline type widen(Bf16, __m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  OMNI_TARGET static inline type widen(Half, __m256i x) { return _mm512_cvtph_ps(x); }
  OMNI_TARGET static inline __m256i narrow(Bf16, type x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7FC0));
  }
  OMNI_TARGET static inline __m256i narrow(Half, type x) {
    return _mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // maskz: no GCC 12 warning
  }

  OMNI_TARGET static inline type load(const float* p) { return _mm512_loadu_ps(p); }
  OMNI_TARGET static inline type load_part(const float* p, Part part) { return _mm512_maskz_loadu_ps(part, p); }
  template <class T>
  OMNI_TARGET static inline type load(const T* p) {
    return widen(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <class T>
  OMNI_TARGET static inline type load_part(const T* p, Part part) {
    return widen(T{}, _mm256_maskz_loadu_epi16(part, p));
  }

  template <bool Stream>
  OMNI_TARGET static inline void store(float* p, type x) {
    if (Stream) _mm512_stream_ps(p, x); else _mm512_storeu_ps(p, x);
  }
  OMNI_TARGET static inline void store_part(float* p, type x, Part part) { _mm512_mask_storeu_ps(p, part, x); }
  template <bool Stream, class T>
  OMNI_TARGET static inline void store(T* p, type x) {
    __m256i* to = reinterpret_cast<__m256i*>(p);
    if (Stream) _mm256_stream_si256(to, narrow(T{}, x)); else _mm256_storeu_si256(to, narrow(T{}, x));
  }
  template <class T>
  OMNI_TARGET static inline void store_part(T* p, type x, Part part) {
    _mm256_mask_storeu_epi16(p, part, narrow(T{}, x));
  }

  using Ints = __m512i;
  OMNI_TARGET static inline Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
  OMNI_TARGET static inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  OMNI_TARGET static inline void store_ints(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
  OMNI_TARGET static inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  OMNI_TARGET static inline Ints count_less(Ints count, Ints a, Ints b) {
    return _mm512_mask_sub_epi32(count, _mm512_cmplt_epi32_mask(a, b), count, ints(-1));
  }
  OMNI_TARGET static inline Ints sort_key(type x) {
    const Ints bits = _mm512_castps_si512(x);
    const Ints flips = _mm512_or_si512(_mm512_xor_si512(_mm512_srai_epi32(bits, 31), ints(-1)), ints(INT32_MIN));
    return _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flips), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), ints(INT32_MIN + 1));
  }

  OMNI_TARGET static inline void transpose(type (&r)[16]) {
    type t[16];
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
};

template <>
struct Vector<Avx512, double> {
  using type = __m512d;
  using Part = __mmask8;
  static constexpr int64_t width = 8;
  static inline Part part(int64_t n) { return n >= 8 ? Part(0xFF) : n <= 0 ? Part(0) : Part((1u << n) - 1); }
  OMNI_TARGET static inline type zero() { return _mm512_setzero_pd(); }
  OMNI_TARGET static inline type broadcast(double x) { return _mm512_set1_pd(x); }
  OMNI_TARGET static inline type add(type a, type b) { return _mm512_add_pd(a, b); }
  OMNI_TARGET static inline type mul(type a, type b) { return _mm512_mul_pd(a, b); }
  OMNI_TARGET static inline type fma(type a, type b, type c) { return _mm512_fmadd_pd(a, b, c); }
  OMNI_TARGET static inline double sum(type a) { return _mm512_reduce_add_pd(a); }
  OMNI_TARGET static inline type load(const double* p) { return _mm512_loadu_pd(p); }
  OMNI_TARGET static inline type load_part(const double* p, Part part) { return _mm512_maskz_loadu_pd(part, p); }
  template <bool Stream>
  OMNI_TARGET static inline void store(double* p, type x) {
    if (Stream) _mm512_stream_pd(p, x); else _mm512_storeu_pd(p, x);
  }
  OMNI_TARGET static inline void store_part(double* p, type x, Part part) { _mm512_mask_storeu_pd(p, part, x); }
};

struct InterleaveIndex { alignas(64) uint16_t lane[64]; };
constexpr InterleaveIndex interleave_index() {
  InterleaveIndex index{};
  for (int i = 0; i < 32; ++i) {
    index.lane[2 * i] = static_cast<uint16_t>(i);
    index.lane[2 * i + 1] = static_cast<uint16_t>(i + 32);
  }
  return index;
}

// Pairs of bf16 (gemm_simd.h): vdpbf16ps adds both products of a pair.
template <>
struct Units<Avx512, Bf16, true> {
  using V = Vector<Avx512, float>;
  using Part = V::Part;

  OMNI_TARGET static inline __m512 load_columns(const Bf16* p, int64_t ld, bool single, Part part) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p));
    if (single) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p + ld));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  template <int N>
  OMNI_TARGET static inline void load_whole(const Bf16* p, int64_t ld, __m512 (&to)[N]) {
    if constexpr (N % 2 == 0) {
#pragma GCC unroll 4
      for (int j = 0; j < N; j += 2) interleave(p + 16 * j, p + 16 * j + ld, to[j], to[j + 1]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) to[j] = load_columns(p + 16 * j, ld, false, 0xFFFF);
    }
  }

  // 32 columns of two rows: (low[0], high[0], low[1], high[1], ...)
  OMNI_TARGET static inline void interleave(const Bf16* low, const Bf16* high, __m512& first, __m512& second) {
    alignas(64) static constexpr auto index = interleave_index();
    const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
    first = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(index.lane), b));
    second = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(index.lane + 32), b));
  }

  OMNI_TARGET static inline __m512 load_run(const Bf16* p, int64_t u, int64_t l) {
    const int64_t left = l - 2 * u;
    const __mmask32 mask = left >= 32 ? ~__mmask32(0) : left <= 0 ? 0 : (__mmask32(1) << left) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p + 2 * u));
  }

  OMNI_TARGET static inline __m512 add_product(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  OMNI_TARGET static inline void store(Bf16* p, __m512 x, bool stream) {
    const __m256i packed = (__m256i)_mm512_cvtneps_pbh(x);
    __m256i* to = reinterpret_cast<__m256i*>(p);
    if (stream) _mm256_stream_si256(to, packed); else _mm256_storeu_si256(to, packed);
  }
  OMNI_TARGET static inline void store_part(Bf16* p, __m512 x, Part part) {
    _mm256_mask_storeu_epi16(p, part, (__m256i)_mm512_cvtneps_pbh(x));
  }
};

}  // namespace omni::cpu
