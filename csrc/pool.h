// The threads and the engine that the CPU's bindings hand to kernels.h.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "kernels.h"

namespace omni {

// The engine that runs (csrc/cpu/isa.h), by name; ValueError where OMNI_CPU_KERNELS asks for one that is not there.
inline std::string cpu_engine() {
  try {
    return cpu::name_of(cpu::engine());
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// What every op runs on; asks for the engine first, so that a wrong choice is an error here and not in a thread.
inline Parallel pool() {
  cpu_engine();
  return {at::get_num_threads(), [](int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
            at::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

}  // namespace omni
