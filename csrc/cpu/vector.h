// Element types of the CPU kernels, and what the vectors of an instruction set must offer: loads convert to fp32 (fp64),
// stores round to nearest even as torch does.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"

#if OMNI_X86
#include <xmmintrin.h>
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

// Vectors of instruction set Isa (isa.h) with accumulators Acc, float or double; vector_<isa>.h has the instances:
//   type, width                  a vector, its number of lanes
//   Part, part(n)                which lanes a partial load or store touches: the first n, none for n <= 0, all from width
//   zero, broadcast, add, sub, mul, fma(a, b, c) = a b + c, sum
//   load(p), load_part(p, part)  from Acc or a 16-bit element; lanes outside of part are zero and are not read
//   store<Stream>(p, x), store_part(p, x, part)   Stream: past the caches, p aligned to the bytes stored
// and for float:
//   div, min, max (a NaN in the second argument is returned), fnma(a, b, c) = c - a b, round (to the nearest integer),
//   scale(x, n) = x 2^n, keep(x, part) (other lanes zero), transpose(type (&rows)[width])
//   Ints: as many 32-bit integers; ints(n) in all lanes, load_ints, store_ints, add_ints,
//   count_less(count, a, b) = count + (a < b ? 1 : 0), sort_key(x): ascends where x descends, of NaN the lowest, above
//   INT32_MIN
template <class Isa, class Acc>
struct Vector;

// exp(x) to 1 ulp or so: 2^n e^r, |r| <= ln 2 / 2, Taylor to r^7. NaN stays NaN; beyond the range 0 or infinity.
template <class V>
OMNI_TARGET inline typename V::type exp_vector(typename V::type x) {
  x = V::min(V::broadcast(89.0f), V::max(V::broadcast(-104.0f), x));
  const typename V::type n = V::round(V::mul(x, V::broadcast(1.44269504f)));
  typename V::type r = V::fnma(n, V::broadcast(0.693359375f), x);
  r = V::fnma(n, V::broadcast(-2.12194440e-4f), r);
  typename V::type p = V::broadcast(1.0f / 5040);
  p = V::fma(p, r, V::broadcast(1.0f / 720));
  p = V::fma(p, r, V::broadcast(1.0f / 120));
  p = V::fma(p, r, V::broadcast(1.0f / 24));
  p = V::fma(p, r, V::broadcast(1.0f / 6));
  p = V::fma(p, r, V::broadcast(0.5f));
  p = V::fma(p, r, V::broadcast(1.0f));
  p = V::fma(p, r, V::broadcast(1.0f));
  return V::scale(p, n);
}

}  // namespace omni::cpu
