// What the gradients of all ops need: the op that another one's backward calls, and arguments that may be absent.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

namespace omni {

// The op called ``name``, with its dispatch.
template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline std::optional<at::Tensor> if_defined(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

}  // namespace omni
