// Which instructions a CPU kernel may use, decided at run time. OMNI_CPU_KERNELS=portable forces the plain C++ path.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define OMNI_X86 1
#define OMNI_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define OMNI_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")))
#else
#define OMNI_X86 0
#endif

namespace omni::cpu {

inline bool portable_forced() {
  const char* choice = std::getenv("OMNI_CPU_KERNELS");
  return choice != nullptr && std::strcmp(choice, "portable") == 0;
}

inline bool has_avx512() {
#if OMNI_X86
  static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return found && !portable_forced();
#else
  return false;
#endif
}

inline bool has_avx512_bf16() {
#if OMNI_X86
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found && has_avx512();
#else
  return false;
#endif
}

}  // namespace omni::cpu
