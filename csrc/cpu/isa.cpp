// What the processor can run, and which of it was asked for.
#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace omni::cpu {
namespace {

constexpr Engine kFastestFirst[] = {Engine::Avx512, Engine::Avx2, Engine::Neon, Engine::Portable};
constexpr int kUnset = -1;

std::atomic<int> chosen{kUnset};
std::atomic<bool> forced{false};

bool can_run(Engine engine) {
  if (engine == Engine::Portable) return true;
  if (engine == Engine::Neon) return OMNI_NEON;
#if OMNI_X86
  if (engine == Engine::Avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // who has both has F16C
#else
  return false;
#endif
}

// The engine of a name that came from `source`; of no name the fastest.
Engine find(const std::string& name, const char* source) {
  for (const Engine engine : kFastestFirst)
    if ((name.empty() || name == name_of(engine)) && can_run(engine)) return engine;
  throw std::invalid_argument(std::string(source) + "=" + name + ": this machine can run " + names_of_engines() +
                              "; name one of these, or none for the fastest");
}

}  // namespace

Engine engine() {
  const int known = chosen.load(std::memory_order_relaxed);
  if (known != kUnset) return static_cast<Engine>(known);
  const char* variable = std::getenv("OMNI_CPU_KERNELS");
  const std::string name = variable ? variable : "";
  const Engine found = find(name, "OMNI_CPU_KERNELS");
  forced = !name.empty();
  chosen = static_cast<int>(found);
  return found;
}

void set_engine(const std::string& name) {
  if (name.empty()) {
    chosen = kUnset;
    forced = false;
    engine();
    return;
  }
  chosen = static_cast<int>(find(name, "engine"));
  forced = true;
}

const char* name_of(Engine engine) {
  switch (engine) {
    case Engine::Avx512: return "avx512";
    case Engine::Avx2: return "avx2";
    case Engine::Neon: return "neon";
    default: return "portable";
  }
}

std::string names_of_engines() {
  std::string names;
  for (const Engine engine : kFastestFirst)
    if (can_run(engine)) names += (names.empty() ? "" : ", ") + std::string(name_of(engine));
  return names;
}

bool engine_is_forced() {
  engine();
  return forced;
}

bool has_bf16_products() {
#if OMNI_X86
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

}  // namespace omni::cpu
