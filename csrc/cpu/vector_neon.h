// The vectors of AArch64's Advanced SIMD (vector.h says what each function does). For engine_neon.cpp.
//
// Compilers for AArch64 use these instructions without being asked, so OMNI_TARGET stays empty. There is no masked
// access: parts go by way of a few bytes on the stack. Nor is there a store past the caches that every compiler offers:
// Stream is an ordinary store.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "cpu/gemm_simd.h"
#include "cpu/vector.h"

namespace omni::cpu {

// The first lanes of a vector of `Width`.
template <int64_t Width>
struct NeonPart {
  int64_t count;
  explicit NeonPart(int64_t n) : count(n >= Width ? Width : n <= 0 ? 0 : n) {}
};

template <>
struct Vector<Neon, float> {
  using type = float32x4_t;
  static constexpr int64_t width = 4;
  using Part = NeonPart<width>;
  static inline Part part(int64_t n) { return Part(n); }

  static inline type zero() { return vdupq_n_f32(0.0f); }
  static inline type broadcast(float x) { return vdupq_n_f32(x); }
  static inline type add(type a, type b) { return vaddq_f32(a, b); }
  static inline type sub(type a, type b) { return vsubq_f32(a, b); }
  static inline type mul(type a, type b) { return vmulq_f32(a, b); }
  static inline type div(type a, type b) { return vdivq_f32(a, b); }
  static inline type min(type a, type b) { return vminq_f32(a, b); }
  static inline type max(type a, type b) { return vmaxq_f32(a, b); }
  static inline type fma(type a, type b, type c) { return vfmaq_f32(c, a, b); }
  static inline type fnma(type a, type b, type c) { return vfmsq_f32(c, a, b); }
  static inline float sum(type a) { return vaddvq_f32(a); }
  static inline type round(type a) { return vrndnq_f32(a); }
  // In two steps, each a power of two that fp32 has: only the last one rounds.
  static inline type scale(type a, type n) {
    const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return mul(mul(a, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
  }
  static inline type power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
  static inline type keep(type a, Part part) {
    const int32_t lanes[width] = {0, 1, 2, 3};
    const uint32x4_t inside = vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(static_cast<int32_t>(part.count)));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), inside));
  }
  static inline void transpose(type (&rows)[width]) {
    const float64x2_t even_top = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1]));
    const float64x2_t odd_top = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
    const float64x2_t even_bottom = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3]));
    const float64x2_t odd_bottom = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
    rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(even_top, even_bottom));
    rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd_top, odd_bottom));
    rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(even_top, even_bottom));
    rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd_top, odd_bottom));
  }

  static inline type widen(Bf16, uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
  static inline type widen(Half, uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
  static inline uint16x4_t narrow(Bf16, type x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd), 16);
    return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), rounded, vdup_n_u16(0x7FC0));  // a NaN differs from itself
  }
  static inline uint16x4_t narrow(Half, type x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }

  static inline type load(const float* p) { return vld1q_f32(p); }
  template <class T>
  static inline type load(const T* p) {
    return widen(T{}, vld1_u16(reinterpret_cast<const uint16_t*>(p)));
  }
  template <class T>
  static inline type load_part(const T* p, Part part) {
    if (part.count == width) return load(p);
    T few[width] = {};
    std::memcpy(few, p, part.count * sizeof(T));
    return load(few);
  }

  template <bool Stream>
  static inline void store(float* p, type x) { vst1q_f32(p, x); }
  template <bool Stream, class T>
  static inline void store(T* p, type x) { vst1_u16(reinterpret_cast<uint16_t*>(p), narrow(T{}, x)); }
  template <class T>
  static inline void store_part(T* p, type x, Part part) {
    if (part.count == width) return store<false>(p, x);
    T few[width];
    store<false>(few, x);
    std::memcpy(p, few, part.count * sizeof(T));
  }

  using Ints = int32x4_t;
  static inline Ints ints(int32_t x) { return vdupq_n_s32(x); }
  static inline Ints load_ints(const int32_t* p) { return vld1q_s32(p); }
  static inline void store_ints(int32_t* p, Ints x) { vst1q_s32(p, x); }
  static inline Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
  static inline Ints count_less(Ints count, Ints a, Ints b) {
    return vsubq_s32(count, vreinterpretq_s32_u32(vcltq_s32(a, b)));
  }
  static inline Ints sort_key(type x) {
    const Ints bits = vreinterpretq_s32_f32(x);
    const Ints flips = vorrq_s32(vmvnq_s32(vshrq_n_s32(bits, 31)), ints(INT32_MIN));
    return vbslq_s32(vceqq_f32(x, x), veorq_s32(bits, flips), ints(INT32_MIN + 1));
  }
};

template <>
struct Vector<Neon, double> {
  using type = float64x2_t;
  static constexpr int64_t width = 2;
  using Part = NeonPart<width>;
  static inline Part part(int64_t n) { return Part(n); }
  static inline type zero() { return vdupq_n_f64(0.0); }
  static inline type broadcast(double x) { return vdupq_n_f64(x); }
  static inline type add(type a, type b) { return vaddq_f64(a, b); }
  static inline type mul(type a, type b) { return vmulq_f64(a, b); }
  static inline type fma(type a, type b, type c) { return vfmaq_f64(c, a, b); }
  static inline double sum(type a) { return vaddvq_f64(a); }
  static inline type load(const double* p) { return vld1q_f64(p); }
  static inline type load_part(const double* p, Part part) {
    if (part.count == width) return load(p);
    double few[width] = {};
    std::memcpy(few, p, part.count * sizeof(double));
    return load(few);
  }
  template <bool Stream>
  static inline void store(double* p, type x) { vst1q_f64(p, x); }
  static inline void store_part(double* p, type x, Part part) {
    if (part.count == width) return store<false>(p, x);
    if (part.count == 1) *p = vgetq_lane_f64(x, 0);
  }
};

}  // namespace omni::cpu
