// Hashes of the parameters of modules, which show whether they changed.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor_exchange.h"

namespace fused_attn {

class Hash {
 public:
  void add(uint64_t value) {
    value_ = (value_ ^ value) * 1099511628211u;
    value_ ^= value_ >> 29;
  }
  void add(const void* place) { add(uint64_t(reinterpret_cast<uintptr_t>(place))); }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 14695981039346656037u;
};

// Calls see(name, tensor, view) for each parameter in a list of dicts. False, at the first other
// one, unless all are dense tensors on the CPU, not of a subclass, or None.
template <class See>
bool for_each_parameter(const py::list& dicts, See see) {
  for (const py::handle& parameters : dicts) {
    if (!PyDict_CheckExact(parameters.ptr())) return false;
    PyObject *name = nullptr, *tensor = nullptr;
    Py_ssize_t place = 0;
    while (PyDict_Next(parameters.ptr(), &place, &name, &tensor)) {
      if (tensor == Py_None) continue;
      TensorView view;
      if (!is_exact_tensor(tensor) || !look_at(tensor, view)) return false;
      if (view.device_type != kCpu || !view.data) return false;
      see(name, tensor, view);
    }
  }
  return true;
}

// Tensor._version. Tensors made in inference mode have none.
inline uint64_t version_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (version) return py::cast<uint64_t>(version);
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
  PyErr_Clear();
  return 0;
}

// A hash of the parameters in the dicts of modules: their names, which tensors they are, where
// their memory is, and their versions. None unless all are such tensors.
inline py::object identity(const py::list& dicts) {
  Hash hash;
  const bool complete =
      for_each_parameter(dicts, [&](PyObject* name, PyObject* tensor, const TensorView& view) {
        hash.add(name);
        hash.add(tensor);
        hash.add(view.start());
        hash.add(version_of(tensor));
      });
  return complete ? py::object(py::int_(hash.value())) : py::none();
}

// A hash of eight elements of each parameter, spread evenly from its first to its last. A step of a
// training or a copy of other parameters changes it; a change of one element need not. The memory
// of all must be there. None as for `identity`.
inline py::object sample(const py::list& dicts) {
  constexpr int64_t kElements = 8;
  Hash hash;
  const bool complete =
      for_each_parameter(dicts, [&](PyObject*, PyObject*, const TensorView& view) {
        int64_t count = 1;
        for (int dim = 0; dim < view.ndim; ++dim) count *= view.shape[dim];
        const int64_t taken = count < kElements ? count : kElements, bytes = view.bits / 8;
        for (int64_t i = 0; i < taken; ++i) {
          int64_t rest = taken > 1 ? i * (count - 1) / (taken - 1) : 0, at = 0;
          for (int dim = view.ndim; dim-- > 0; rest /= view.shape[dim])
            at += rest % view.shape[dim] * view.strides[dim];
          uint64_t element = 0;
          std::memcpy(&element, static_cast<const char*>(view.start()) + at * bytes,
                      size_t(bytes < 8 ? bytes : 8));
          hash.add(element);
        }
      });
  return complete ? py::object(py::int_(hash.value())) : py::none();
}

}  // namespace fused_attn
