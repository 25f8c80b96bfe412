// One lane in plain C++, with the interface of vector.h: for kernels that are written once, for vectors of any width.
#pragma once

#include <cmath>

#include "cpu/vector.h"

namespace omni::cpu {

template <>
struct Vector<OneLane, float> {
  using type = float;
  using Part = bool;
  static constexpr int64_t width = 1;
  static inline Part part(int64_t n) { return n > 0; }
  static inline type zero() { return 0; }
  static inline type broadcast(float x) { return x; }
  static inline type add(type a, type b) { return a + b; }
  static inline type sub(type a, type b) { return a - b; }
  static inline type mul(type a, type b) { return a * b; }
  static inline type div(type a, type b) { return a / b; }
  static inline type min(type a, type b) { return a < b ? a : b; }
  static inline type max(type a, type b) { return a > b ? a : b; }
  static inline type fma(type a, type b, type c) { return a * b + c; }
  static inline type fnma(type a, type b, type c) { return c - a * b; }
  static inline float sum(type a) { return a; }
  static inline type round(type a) { return std::nearbyint(a); }
  static inline type scale(type a, type n) { return n == n ? std::ldexp(a, static_cast<int>(n)) : n; }
  static inline type load(const float* p) { return *p; }
  static inline type load_part(const float* p, Part part) { return part ? *p : 0; }
  template <bool Stream>
  static inline void store(float* p, type x) { *p = x; }
  static inline void store_part(float* p, type x, Part part) { if (part) *p = x; }
  static inline void transpose(type (&)[1]) {}
};

}  // namespace omni::cpu
