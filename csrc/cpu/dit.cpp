// The parts of the picture generator that are not products of matrices: norms with what modulates them, norms that rotate,
// SwiGLU, and the attention of patches to themselves and to the rows of their conditions. fp32.
//
// Torch computes each of these in several passes over memory, and as many again for the gradient; here each is one. A task
// is a range of pictures, of elements, or of (picture, group of heads). Nothing is shared between pictures: sums over them
// (gradients of weights) are left to the caller, from one row a picture, so the bits do not depend on the threads.
#include <algorithm>

#include "cpu/light_kernels.h"
#include "kernels.h"

namespace omni::cpu {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // less is not worth another thread

// f(tag of the engine, begin, end) on parts of 0..n
template <class F>
void in_parts(int64_t n, int64_t elements, const Parallel& parallel, const F& f) {
  const int64_t parts = std::clamp<int64_t>(std::min(elements / kElementsPerTask, n), 1, parallel.threads);
  parallel(parts, [&](int64_t part) {
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    if (!with_vectors([&](auto isa) { f(isa, begin, end); })) f(OneLane{}, begin, end);
  });
}

}  // namespace

void modulated_norm(const ModulatedNorm& a, const Parallel& parallel) {
  in_parts(a.B, a.B * a.T * a.H, parallel, [&](auto isa, int64_t begin, int64_t end) {
    LightKernels<decltype(isa)>::modulated_norm(a, begin, end);
  });
}

void modulated_norm_backward(const ModulatedNorm& a, const Parallel& parallel) {
  in_parts(a.B, a.B * a.T * a.H, parallel, [&](auto isa, int64_t begin, int64_t end) {
    LightKernels<decltype(isa)>::modulated_norm_backward(a, begin, end);
  });
}

void rotary_norm(const RotaryNorm& a, const Parallel& parallel) {
  in_parts(a.B, a.B * a.T * a.heads * a.D, parallel, [&](auto isa, int64_t begin, int64_t end) {
    LightKernels<decltype(isa)>::rotary_norm(a, begin, end);
  });
}

void rotary_norm_backward(const RotaryNorm& a, const Parallel& parallel) {
  in_parts(a.B, a.B * a.T * a.heads * a.D, parallel, [&](auto isa, int64_t begin, int64_t end) {
    LightKernels<decltype(isa)>::rotary_norm_backward(a, begin, end);
  });
}

void swiglu(const SwiGlu& a, const Parallel& parallel) {
  in_parts(a.n, a.n, parallel,
           [&](auto isa, int64_t begin, int64_t end) { LightKernels<decltype(isa)>::swiglu(a, begin, end); });
}

void swiglu_backward(const SwiGlu& a, const Parallel& parallel) {
  in_parts(a.n, a.n, parallel,
           [&](auto isa, int64_t begin, int64_t end) { LightKernels<decltype(isa)>::swiglu_backward(a, begin, end); });
}

void joint_attention(const JointAttention& a, const Parallel& parallel) {
  in_parts(a.B * a.groups, a.B * a.heads * a.T * a.D, parallel, [&](auto isa, int64_t begin, int64_t end) {
    LightKernels<decltype(isa)>::joint_attention(a, begin, end);
  });
}

void joint_attention_backward(const JointAttention& a, const Parallel& parallel) {
  in_parts(a.B * a.groups, a.B * a.heads * a.T * a.D, parallel, [&](auto isa, int64_t begin, int64_t end) {
    LightKernels<decltype(isa)>::joint_attention_backward(a, begin, end);
  });
}

}  // namespace omni::cpu
