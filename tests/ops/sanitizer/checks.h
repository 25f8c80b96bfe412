// What the programs of this folder share: arrays that end where a protected page begins, random numbers, and what
// rounding may do to a right result, as tests/ops/rounding.py has it: results are compared with float64 loops, and may
// differ by kEntry times the root of the sum of the squares of all roundings.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/vector.h"
#include "engines.h"
#include "kernels.h"

using omni::DType;
using omni::Parallel;
using omni::cpu::Bf16;
using omni::cpu::Half;

// n elements up to a page without access, so that a read or write past their end stops the program, even one that
// AddressSanitizer does not see. Not a number until written.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n) : count(n) {
    const size_t page = sysconf(_SC_PAGESIZE), bytes = n * sizeof(T), pages = (bytes + page - 1) / page;
    size_ = (pages + 1) * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + pages * page, page, PROT_NONE)) std::abort();
    std::memset(base_, 0xFF, pages * page);
    data = reinterpret_cast<T*>(base_ + pages * page - bytes);
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  T& operator[](int64_t i) { return data[i]; }
  std::vector<double> values() const {
    std::vector<double> all(count);
    for (int64_t i = 0; i < count; ++i) all[i] = omni::cpu::to_float(data[i]);
    return all;
  }
  T* data;
  const int64_t count;

 private:
  char* base_;
  size_t size_;
};

inline uint32_t state = 1;
inline uint32_t draw_bits() { return state = state * 1664525u + 1013904223u; }
inline double draw() { return (draw_bits() >> 8) / double(1 << 24) - 0.5; }

template <class T>
void store(double x, T& to) {
  if constexpr (std::is_same_v<T, double>) to = x; else omni::cpu::from_float(static_cast<float>(x), to);
}

template <class T>
void fill(Guarded<T>& array) {
  for (int64_t i = 0; i < array.count; ++i) store(draw(), array[i]);
}

// One thread, and three "threads" one after the other, last first: results must not depend on the order.
inline const Parallel one{1, nullptr};
inline const Parallel many{3, [](int64_t n, void (*task)(void*, int64_t), void* context) {
                             for (int64_t i = n - 1; i >= 0; --i) task(context, i);
                           }};

constexpr double kEntry = 8;
constexpr double kOps = 16;  // roundings of an elementwise formula, the approximation of exp included

template <class T>
constexpr double unit() {  // largest relative error of one rounding
  return std::is_same_v<T, double> ? 0x1p-53 : std::is_same_v<T, float> ? 0x1p-24
         : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
}

template <class T>
double stored(double value, double error) {
  const double smallest = std::is_same_v<T, Half> ? 0x1p-25 : 0x1p-150;
  return std::hypot(error, std::max(unit<T>() * std::fabs(value), smallest));
}

inline int failures = 0;

template <class T>
void check(const T& got, double value, double error, const char* what, int64_t i, int64_t j = 0) {
  const double difference = std::fabs(omni::cpu::to_float(got) - value);
  if (difference <= kEntry * error) return;
  if (++failures <= 20)
    std::printf("%s[%lld, %lld] = %.9g, expected %.9g, off by %.3g of its rounding error\n", what,
                static_cast<long long>(i), static_cast<long long>(j), double(omni::cpu::to_float(got)), value,
                difference / error);
}

inline void check_true(bool holds, const char* what) {
  if (!holds && ++failures <= 20) std::printf("%s\n", what);
}

template <class T>
void check_zero(Guarded<T>& array, int64_t from, const char* what) {
  for (int64_t i = from; i < array.count; ++i) check(array[i], 0, 0, what, i);
}

// What the tests look for in the last line, and the exit status.
inline int report(int64_t cases) {
  std::printf("engines %s: %lld cases, %d wrong\n", omni::cpu::names_of_engines().c_str(),
              static_cast<long long>(cases), failures);
  return failures != 0;
}
