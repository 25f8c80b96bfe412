// Every engine of the CPU kernels that this machine can run, one after the other.
#pragma once

#include <sstream>
#include <string>

#include "cpu/isa.h"

// f() with each engine; its name is handed in.
template <class F>
void for_each_engine(const F& f) {
  std::istringstream names(omni::cpu::names_of_engines());
  for (std::string name; std::getline(names >> std::ws, name, ',');) {
    omni::cpu::set_engine(name);
    f(name);
  }
}
