// A glance at tensors, to see whether someone changed them.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor_exchange.h"

namespace fused_attn {

// A hash of eight elements of each tensor on the CPU, spread evenly from its first to its last. A
// step of a training or a copy of other parameters changes it; a change of one element need not.
inline uint64_t sample(const py::list& tensors) {
  constexpr int64_t kElements = 8;
  uint64_t hash = 14695981039346656037u;
  for (const py::handle& tensor : tensors) {
    const Argument view("parameter", tensor.ptr());
    int64_t count = 1;
    for (int dim = 0; dim < view.ndim(); ++dim) count *= view.size(dim);
    const int64_t taken = count < kElements ? count : kElements, bytes = view.bits() / 8;
    for (int64_t i = 0; i < taken; ++i) {
      int64_t rest = taken > 1 ? i * (count - 1) / (taken - 1) : 0, at = 0;
      for (int dim = view.ndim(); dim-- > 0; rest /= view.size(dim))
        at += rest % view.size(dim) * view.stride(dim);
      uint64_t element = 0;
      std::memcpy(&element, static_cast<const char*>(view.data()) + at * bytes,
                  size_t(bytes < 8 ? bytes : 8));
      hash = (hash ^ element) * 1099511628211u;
      hash ^= hash >> 29;
    }
  }
  return hash;
}

}  // namespace fused_attn
