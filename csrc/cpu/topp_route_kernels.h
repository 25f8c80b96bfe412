// The vector forms of topp_route.cpp, for the instruction set whose engine_<isa>.cpp includes this after its vectors.
#pragma once

#include <algorithm>

#include "cpu/light_kernels.h"

namespace omni::cpu {

// Keys are integers that ascend in the order of the places (V::sort_key); of equal ones the lower slot comes first: for a
// slot further on "before" means key <= mine, which is key - 1 < mine.
template <class Isa>
OMNI_TARGET void LightKernels<Isa>::rank_slots(const float* z, const float* gumbel, int64_t n, int32_t* keys,
                                               int64_t* draw_rank) {
  using V = Vector<Isa, float>;
  constexpr int64_t W = V::width;
  int32_t ties[2 * W];  // W zeros, then -1
  for (int64_t i = 0; i < 2 * W; ++i) ties[i] = i < W ? 0 : -1;
  for (int64_t b = 0; b < n; b += W) {
    const typename V::Part part = V::part(n - b);
    typename V::type value = V::load_part(z + b, part);
    if (gumbel) value = V::add(value, V::load_part(gumbel + b, part));
    V::store_ints(keys + b, V::sort_key(V::add(value, V::zero())));  // -0 ties with 0
  }
  for (int64_t b = 0; b < n; b += W) {
    const typename V::Ints mine = V::load_ints(keys + b);
    const int64_t end = std::min(n, b + W);
    typename V::Ints count = V::ints(0);  // of slots before each of these
    for (int64_t j = 0; j < b; ++j) count = V::count_less(count, V::ints(keys[j] - 1), mine);
    for (int64_t j = b; j < end; ++j)
      count = V::count_less(count, V::add_ints(V::ints(keys[j]), V::load_ints(ties + W - 1 - (j - b))), mine);
    for (int64_t j = end; j < n; ++j) count = V::count_less(count, V::ints(keys[j]), mine);
    int32_t places[W];
    V::store_ints(places, count);
    for (int64_t j = b; j < end; ++j) draw_rank[j] = places[j - b];
  }
}

template <class Isa>
OMNI_TARGET float LightKernels<Isa>::exponentials(const float* z, int64_t n, float top, float* p) {
  using V = Vector<Isa, float>;
  typename V::type sum = V::zero();
  for (int64_t b = 0; b < n; b += V::width) {
    const typename V::Part part = V::part(n - b);
    const typename V::type e = exp_vector<V>(V::sub(V::load_part(z + b, part), V::broadcast(top)));
    V::store_part(p + b, e, part);
    sum = V::add(sum, V::keep(e, part));
  }
  return V::sum(sum);
}

}  // namespace omni::cpu
