// A glance at parameters, to see whether someone changed them.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor_exchange.h"

namespace fused_attn {

class Fingerprint {
 public:
  void add(const py::handle& tensor) {
    const Argument view("parameter", tensor.ptr());
    mix(uint64_t(reinterpret_cast<uintptr_t>(tensor.ptr())));
    mix(uint64_t(reinterpret_cast<uintptr_t>(view.data())));
    mix(version_of(tensor));
    add_elements(view);
  }
  uint64_t value() const { return hash_; }

 private:
  void mix(uint64_t value) {
    hash_ = (hash_ ^ value) * 1099511628211u;
    hash_ ^= hash_ >> 29;
  }

  // Tensors made in inference mode have no version.
  static uint64_t version_of(const py::handle& tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
    if (version) return py::cast<uint64_t>(version);
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
    PyErr_Clear();
    return 0;
  }

  // Eight elements, spread evenly from the first to the last.
  void add_elements(const Argument& view) {
    constexpr int64_t kElements = 8;
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
      mix(element);
    }
  }

  uint64_t hash_ = 14695981039346656037u;
};

// A hash of the parameters in the dicts of modules: which tensors they are, where their memory is,
// their versions, and eight elements of each. A step of a training or a copy of other parameters
// changes it; a change of one element behind autograd's back need not. All must be on the CPU.
inline uint64_t fingerprint(const py::list& dicts) {
  Fingerprint found;
  for (const py::handle& parameters : dicts) {
    PyObject *key = nullptr, *tensor = nullptr;
    Py_ssize_t place = 0;
    while (PyDict_Next(parameters.ptr(), &place, &key, &tensor))
      if (tensor != Py_None) found.add(tensor);
  }
  return found.value();
}

}  // namespace fused_attn
