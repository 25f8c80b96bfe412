// The vectors of AVX2 with FMA and F16C (vector.h says what each function does). For engine_avx2.cpp.
#pragma once

#undef OMNI_TARGET
#define OMNI_TARGET __attribute__((target("avx2,fma,f16c")))

#include <immintrin.h>

#include <cstring>

#include "cpu/gemm_simd.h"
#include "cpu/vector.h"

namespace omni::cpu {

// The first lanes of a vector: how many, and as a mask of 32-bit (64-bit) lanes.
struct Avx2Part {
  int64_t count;
  __m256i mask;
};

template <>
struct Vector<Avx2, float> {
  using type = __m256;
  using Part = Avx2Part;
  static constexpr int64_t width = 8;
  OMNI_TARGET static inline Part part(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int count = n >= 8 ? 8 : n <= 0 ? 0 : static_cast<int>(n);
    return {count, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)};
  }

  OMNI_TARGET static inline type zero() { return _mm256_setzero_ps(); }
  OMNI_TARGET static inline type broadcast(float x) { return _mm256_set1_ps(x); }
  OMNI_TARGET static inline type add(type a, type b) { return _mm256_add_ps(a, b); }
  OMNI_TARGET static inline type sub(type a, type b) { return _mm256_sub_ps(a, b); }
  OMNI_TARGET static inline type mul(type a, type b) { return _mm256_mul_ps(a, b); }
  OMNI_TARGET static inline type div(type a, type b) { return _mm256_div_ps(a, b); }
  OMNI_TARGET static inline type min(type a, type b) { return _mm256_min_ps(a, b); }
  OMNI_TARGET static inline type max(type a, type b) { return _mm256_max_ps(a, b); }
  OMNI_TARGET static inline type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  OMNI_TARGET static inline type fnma(type a, type b, type c) { return _mm256_fnmadd_ps(a, b, c); }
  OMNI_TARGET static inline float sum(type a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  OMNI_TARGET static inline type round(type a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // In two steps, each a power of two that fp32 has: only the last one rounds.
  OMNI_TARGET static inline type scale(type a, type n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }
  OMNI_TARGET static inline type power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  OMNI_TARGET static inline type keep(type a, Part part) { return _mm256_and_ps(a, _mm256_castsi256_ps(part.mask)); }

  OMNI_TARGET static inline type widen(Bf16, __m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  OMNI_TARGET static inline type widen(Half, __m128i x) { return _mm256_cvtph_ps(x); }
  OMNI_TARGET static inline __m128i narrow(Bf16, type x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i all = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  }
  OMNI_TARGET static inline __m128i narrow(Half, type x) {
    const __m128i bits = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return bits;
  }

  OMNI_TARGET static inline type load(const float* p) { return _mm256_loadu_ps(p); }
  OMNI_TARGET static inline type load_part(const float* p, Part part) {
    return part.count == width ? load(p) : _mm256_maskload_ps(p, part.mask);
  }
  template <class T>
  OMNI_TARGET static inline type load(const T* p) {
    return widen(T{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <class T>
  OMNI_TARGET static inline type load_part(const T* p, Part part) {
    if (part.count == width) return load(p);
    T few[width] = {};
    std::memcpy(few, p, part.count * sizeof(T));
    return load(few);
  }

  template <bool Stream>
  OMNI_TARGET static inline void store(float* p, type x) {
    if (Stream) _mm256_stream_ps(p, x); else _mm256_storeu_ps(p, x);
  }
  OMNI_TARGET static inline void store_part(float* p, type x, Part part) {
    if (part.count == width) _mm256_storeu_ps(p, x); else _mm256_maskstore_ps(p, part.mask, x);
  }
  template <bool Stream, class T>
  OMNI_TARGET static inline void store(T* p, type x) {
    __m128i* to = reinterpret_cast<__m128i*>(p);
    if (Stream) _mm_stream_si128(to, narrow(T{}, x)); else _mm_storeu_si128(to, narrow(T{}, x));
  }
  template <class T>
  OMNI_TARGET static inline void store_part(T* p, type x, Part part) {
    if (part.count == width) return store<false>(p, x);
    T few[width];
    store<false>(few, x);
    std::memcpy(p, few, part.count * sizeof(T));
  }

  using Ints = __m256i;
  OMNI_TARGET static inline Ints ints(int32_t x) { return _mm256_set1_epi32(x); }
  OMNI_TARGET static inline Ints load_ints(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  OMNI_TARGET static inline void store_ints(int32_t* p, Ints x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  OMNI_TARGET static inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  OMNI_TARGET static inline Ints count_less(Ints count, Ints a, Ints b) {
    return _mm256_sub_epi32(count, _mm256_cmpgt_epi32(b, a));
  }
  OMNI_TARGET static inline Ints sort_key(type x) {
    const Ints bits = _mm256_castps_si256(x);
    const Ints flips = _mm256_or_si256(_mm256_xor_si256(_mm256_srai_epi32(bits, 31), ints(-1)), ints(INT32_MIN));
    const Ints nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_xor_si256(bits, flips), ints(INT32_MIN + 1), nan);
  }

  OMNI_TARGET static inline void transpose(type (&r)[8]) {
    type t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

template <>
struct Vector<Avx2, double> {
  using type = __m256d;
  using Part = Avx2Part;
  static constexpr int64_t width = 4;
  OMNI_TARGET static inline Part part(int64_t n) {
    const int64_t count = n >= 4 ? 4 : n <= 0 ? 0 : n;
    return {count, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
  OMNI_TARGET static inline type zero() { return _mm256_setzero_pd(); }
  OMNI_TARGET static inline type broadcast(double x) { return _mm256_set1_pd(x); }
  OMNI_TARGET static inline type add(type a, type b) { return _mm256_add_pd(a, b); }
  OMNI_TARGET static inline type mul(type a, type b) { return _mm256_mul_pd(a, b); }
  OMNI_TARGET static inline type fma(type a, type b, type c) { return _mm256_fmadd_pd(a, b, c); }
  OMNI_TARGET static inline double sum(type a) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  OMNI_TARGET static inline type load(const double* p) { return _mm256_loadu_pd(p); }
  OMNI_TARGET static inline type load_part(const double* p, Part part) { return _mm256_maskload_pd(p, part.mask); }
  template <bool Stream>
  OMNI_TARGET static inline void store(double* p, type x) {
    if (Stream) _mm256_stream_pd(p, x); else _mm256_storeu_pd(p, x);
  }
  OMNI_TARGET static inline void store_part(double* p, type x, Part part) { _mm256_maskstore_pd(p, part.mask, x); }
};

}  // namespace omni::cpu
