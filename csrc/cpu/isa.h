// The engines of the CPU kernels, and the one that runs: chosen here and nowhere else, at run time.
//
// An engine is the kernels compiled for one instruction set, or plain C++. Kernels are templates over a tag (Avx512,
// Avx2, Neon) and the vectors of that tag (vector.h); engine_<tag>.cpp compiles all of them for its instruction set, and
// is empty where the compiler's target has no such processors.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define OMNI_X86 1
#else
#define OMNI_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define OMNI_NEON 1
#else
#define OMNI_NEON 0
#endif

// Before every function that uses vectors: the instruction set's target attribute in engine_<tag>.cpp, nothing elsewhere.
#ifndef OMNI_TARGET
#define OMNI_TARGET
#endif

namespace omni::cpu {

struct Avx512 {};  // F, BW, VL, DQ; its bf16 products where has_bf16_products()
struct Avx2 {};    // with FMA and F16C
struct Neon {};    // AArch64's Advanced SIMD: every such processor has it
struct OneLane {};  // plain C++, for kernels that are written once, for vectors of any width

enum class Engine { Portable, Avx2, Avx512, Neon };

// The engine that runs: the one that OMNI_CPU_KERNELS or set_engine names, else the fastest that this processor has.
// std::invalid_argument where OMNI_CPU_KERNELS names one that it lacks, or none that there is.
Engine engine();

// Names an engine from now on; empty: as at the start. std::invalid_argument as above. For tests and measurements.
void set_engine(const std::string& name);

// "avx512", "avx2", "neon" or "portable".
const char* name_of(Engine engine);

// The names of all that this processor can run, fastest first, with commas.
std::string names_of_engines();

// Whether somebody asked for the engine that runs, by either way.
bool engine_is_forced();

// Whether the processor multiplies bf16 itself (AVX-512 BF16).
bool has_bf16_products();

// f(tag) where an engine with vectors runs, and true; false where plain C++ has to do it.
template <class F>
bool with_vectors(const F& f) {
  switch (engine()) {
#if OMNI_X86
    case Engine::Avx512: f(Avx512{}); return true;
    case Engine::Avx2: f(Avx2{}); return true;
#endif
#if OMNI_NEON
    case Engine::Neon: f(Neon{}); return true;
#endif
    default: return false;
  }
}

}  // namespace omni::cpu
