// Element types of the CPU kernels and, on x86-64, one vector type per accumulator: loads convert to fp32 (fp64), stores
// round to nearest even as torch does. Functions with OMNI_AVX512 may be called where has_avx512() holds, nowhere else.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"

#if OMNI_X86
#pragma GCC diagnostic push  // GCC 12 warns about its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace omni::cpu {

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline double to_float(double x) { return x; }
inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1F, fraction = x.bits & 0x3FF;
  if (exponent == 0) return bits_to_float(sign | float_to_bits(static_cast<float>(fraction) * 0x1p-24f));
  if (exponent == 31) return bits_to_float(sign | 0x7F800000 | (fraction << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

inline void from_float(double x, double& out) { out = x; }
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, Bf16& out) {
  const uint32_t bits = float_to_bits(x);
  out.bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, Half& out) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00;
  } else if (magnitude >= 0x477FF000) {  // 65520 and more round to infinity
    half = 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 2^-1 leaves the rounded multiple of 2^-24 in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

inline void store_fence() {
#if OMNI_X86
  _mm_sfence();
#endif
}

#if OMNI_X86

template <class Acc>
struct Vector;

template <>
struct Vector<float> {
  using type = __m512;
  static constexpr int64_t width = 16;
  OMNI_AVX512 static inline type zero() { return _mm512_setzero_ps(); }
  OMNI_AVX512 static inline type broadcast(float x) { return _mm512_set1_ps(x); }
  OMNI_AVX512 static inline type add(type a, type b) { return _mm512_add_ps(a, b); }
  OMNI_AVX512 static inline type mul(type a, type b) { return _mm512_mul_ps(a, b); }
  OMNI_AVX512 static inline type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  OMNI_AVX512 static inline float sum(type a) { return _mm512_reduce_add_ps(a); }

  OMNI_AVX512 static inline type widen(Bf16, __m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  OMNI_AVX512 static inline type widen(Half, __m256i x) { return _mm512_cvtph_ps(x); }
  OMNI_AVX512 static inline __m256i narrow(Bf16, type x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7FC0));
  }
  OMNI_AVX512 static inline __m256i narrow(Half, type x) {
    return _mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // maskz: no GCC 12 warning
  }
  static inline __mmask16 part(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

  OMNI_AVX512 static inline type load(const float* p) { return _mm512_loadu_ps(p); }
  OMNI_AVX512 static inline type load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(part(n), p); }
  template <class T>
  OMNI_AVX512 static inline type load(const T* p) {
    return widen(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <class T>
  OMNI_AVX512 static inline type load_part(const T* p, int64_t n) {
    return widen(T{}, _mm256_maskz_loadu_epi16(part(n), p));
  }

  template <bool Stream>
  OMNI_AVX512 static inline void store(float* p, type x) {
    if (Stream) _mm512_stream_ps(p, x); else _mm512_storeu_ps(p, x);
  }
  OMNI_AVX512 static inline void store_part(float* p, type x, int64_t n) { _mm512_mask_storeu_ps(p, part(n), x); }
  template <bool Stream, class T>
  OMNI_AVX512 static inline void store(T* p, type x) {
    __m256i* to = reinterpret_cast<__m256i*>(p);
    if (Stream) _mm256_stream_si256(to, narrow(T{}, x)); else _mm256_storeu_si256(to, narrow(T{}, x));
  }
  template <class T>
  OMNI_AVX512 static inline void store_part(T* p, type x, int64_t n) {
    _mm256_mask_storeu_epi16(p, part(n), narrow(T{}, x));
  }
};

template <>
struct Vector<double> {
  using type = __m512d;
  static constexpr int64_t width = 8;
  OMNI_AVX512 static inline type zero() { return _mm512_setzero_pd(); }
  OMNI_AVX512 static inline type broadcast(double x) { return _mm512_set1_pd(x); }
  OMNI_AVX512 static inline type add(type a, type b) { return _mm512_add_pd(a, b); }
  OMNI_AVX512 static inline type mul(type a, type b) { return _mm512_mul_pd(a, b); }
  OMNI_AVX512 static inline type fma(type a, type b, type c) { return _mm512_fmadd_pd(a, b, c); }
  OMNI_AVX512 static inline double sum(type a) { return _mm512_reduce_add_pd(a); }
  static inline __mmask8 part(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
  OMNI_AVX512 static inline type load(const double* p) { return _mm512_loadu_pd(p); }
  OMNI_AVX512 static inline type load_part(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(part(n), p); }
  template <bool Stream>
  OMNI_AVX512 static inline void store(double* p, type x) {
    if (Stream) _mm512_stream_pd(p, x); else _mm512_storeu_pd(p, x);
  }
  OMNI_AVX512 static inline void store_part(double* p, type x, int64_t n) { _mm512_mask_storeu_pd(p, part(n), x); }
};

// exp(x) to 1 ulp or so: 2^n e^r, |r| <= ln 2 / 2, Taylor to r^7. NaN stays NaN; beyond the range 0 or infinity.
OMNI_AVX512 inline __m512 exp_vector(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));  // a NaN in x is returned
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

#endif  // OMNI_X86

}  // namespace omni::cpu
