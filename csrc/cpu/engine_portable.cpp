// Kernels that have one form for all widths, for one lane in plain C++. Other ops have a plain form of their own.
#include "cpu/vector_portable.h"
// after the vectors
#include "cpu/dit_kernels.h"

namespace omni::cpu {

template void LightKernels<OneLane>::modulated_norm(const ModulatedNorm&, int64_t, int64_t);
template void LightKernels<OneLane>::modulated_norm_backward(const ModulatedNorm&, int64_t, int64_t);
template void LightKernels<OneLane>::rotary_norm(const RotaryNorm&, int64_t, int64_t);
template void LightKernels<OneLane>::rotary_norm_backward(const RotaryNorm&, int64_t, int64_t);
template void LightKernels<OneLane>::swiglu(const SwiGlu&, int64_t, int64_t);
template void LightKernels<OneLane>::swiglu_backward(const SwiGlu&, int64_t, int64_t);
template void LightKernels<OneLane>::joint_attention(const JointAttention&, int64_t, int64_t);
template void LightKernels<OneLane>::joint_attention_backward(const JointAttention&, int64_t, int64_t);

}  // namespace omni::cpu
