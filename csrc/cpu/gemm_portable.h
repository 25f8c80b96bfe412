// Plain C++ engine of the blocked GEMM (gemm_blocked.h): any element type, accumulation in fp32 (fp64 for fp64).
//
// The compiler vectorises the tile's columns with whatever the target has; elements are widened while packed.
#pragma once

#include <type_traits>

#include "cpu/gemm_tile.h"
#include "cpu/swiglu.h"
#include "cpu/vector.h"

namespace omni::cpu {

template <class E>
struct Portable {
  using Element = E;
  using Acc = std::conditional_t<std::is_same_v<E, double>, double, float>;
  static constexpr int64_t kPair = 1;
  static constexpr int64_t kRows = 4, kTile = 64 / sizeof(Acc);
  static constexpr int64_t kGroup = 8 * kRows;
  static constexpr int64_t kUnits = 256;
  static constexpr int64_t kMaxCols = 256, kFewRows = 0, kResidentB = 0;
  static constexpr int64_t kFetchingCuts = 1 << 30;
  static constexpr bool kSpreadsFetch = false;
  static constexpr bool kStreams = true;
  static constexpr bool kAInPlace = std::is_same_v<E, Acc>;
  static constexpr bool kBInPlace = false;
  static constexpr bool kPacks = false;

  static void pack_a(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
    pack_columns<kGroup>(src, ld, l, n, out);
  }

  static void pack_b(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
    pack_columns<kTile>(src, ld, l, n, out);
  }

  template <int64_t W>
  static void pack_columns(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
    for (int64_t g = 0; g < n; g += W, out += l * W)
      for (int64_t u = 0; u < l; ++u)
        for (int64_t c = 0; c < W; ++c) out[u * W + c] = g + c < n ? to_float(src[u * ld + g + c]) : Acc(0);
  }

  static void pack_transposed(const E* src, int64_t ld, int64_t l, int64_t n, Acc* out) {
    for (int64_t g = 0; g < n; g += kTile, out += l * kTile)
      for (int64_t c = 0; c < kTile; ++c)
        for (int64_t u = 0; u < l; ++u) out[u * kTile + c] = g + c < n ? to_float(src[(g + c) * ld + u]) : Acc(0);
  }

  static void pack_rows(const E* src, int64_t ld, int64_t m, int64_t l, Acc* out, int64_t ld_out) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t u = 0; u < l; ++u) out[i * ld_out + u] = to_float(src[i * ld + u]);
  }

  template <int Rows>
  static void micro_rows(int64_t units, const char* a, int64_t row, int64_t step, const Acc* b, int64_t b_step,
                         const Tile<Acc>& t) {
    Acc acc[Rows][kTile] = {};
    for (int64_t u = 0; u < units; ++u, a += step, b += b_step) {
      for (int i = 0; i < Rows; ++i) {
        const Acc av = *reinterpret_cast<const Acc*>(a + i * row);
        for (int j = 0; j < kTile; ++j) acc[i][j] += av * b[j];
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int64_t j = 0; j < t.cols; ++j) {
        const Acc value = acc[i][j] + (t.init ? t.init[i * t.ld_init + j] : Acc(0));
        if (t.narrow)
          from_float(value, static_cast<E*>(t.out)[i * t.ld_out + j]);
        else
          static_cast<Acc*>(t.out)[i * t.ld_out + j] = value;
      }
    }
  }

  using Micro = void (*)(int64_t, const char*, int64_t, int64_t, const Acc*, int64_t, const Tile<Acc>&);

  static Micro micro(bool, bool, int64_t rows, int64_t) {
    static constexpr Micro table[kRows] = {micro_rows<1>, micro_rows<2>, micro_rows<3>, micro_rows<4>};
    return table[rows - 1];
  }

  static void swiglu_row(const Acc* g, const Acc* u, int64_t n, Acc weight, E* h_gate, E* h_up, E* a) {
    cpu::swiglu_row(g, u, n, weight, h_gate, h_up, a);
  }

  static Acc swiglu_backward_row(const Acc* d, const E* h_gate, const E* h_up, int64_t n, Acc weight, E* d_gate, E* d_up,
                                 E* a) {
    return cpu::swiglu_backward_row(d, h_gate, h_up, n, weight, d_gate, d_up, a);
  }
};

}  // namespace omni::cpu
