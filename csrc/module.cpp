// The Python bindings: the table of functions in fused_attn._C.
//
// The calls take CPython's array of arguments directly (METH_FASTCALL): converting them by pybind11
// would take as long as a whole small problem.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "call.h"
#include "cpu/isa.h"
#include "cuda_build.h"
#include "decoder_checks.h"
#include "fingerprint.h"
#include "packed_model.h"
#include "plain.h"
#include "search_checks.h"

using namespace fused_attn;

namespace {

// Runs `body` as a function of CPython: C++ exceptions become Python's.
template <Py_ssize_t expected, PyObject* (*body)(PyObject* const*)>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return nullptr;
  }
  try {
    return body(arguments);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

bool flag(PyObject* object) { return object == Py_True; }

template <int32_t device>
PyObject* dot_forward(PyObject* const* a) {
  Call call(a[0], a[1], {device, device == kCpu ? 0 : -1});
  call.dot(number(a[2]));
  call.masking(a[3]);
  return call.forward(flag(a[4]), flag(a[5]));
}

PyObject* dot_backward(PyObject* const* a) {
  Call call(a[2], a[3]);
  call.dot(number(a[4]));
  call.masking(a[5]);
  return call.backward(a[0], a[1], a[6], a[7]);
}

template <int32_t device>
PyObject* concat_forward(PyObject* const* a) {
  Call call(a[0], a[4], {device, device == kCpu ? 0 : -1});
  call.concat(a[1], a[2], a[3]);
  call.masking(a[5]);
  return call.forward(flag(a[6]), flag(a[7]));
}

PyObject* concat_backward(PyObject* const* a) {
  Call call(a[2], a[6]);
  call.concat(a[3], a[4], a[5]);
  call.masking(a[7]);
  return call.backward(a[0], a[1], a[8], a[9]);
}

PyObject* concat_scores(PyObject* const* a) {
  Call call(a[0], a[1]);
  call.concat(a[1], a[2], a[3]);
  call.masking(a[4]);
  return call.scores();
}

PyObject* concat_scores_backward(PyObject* const* a) {
  Call call(a[1], a[2]);
  call.concat(a[2], a[3], a[4]);
  call.masking(a[5]);
  return call.scores_backward(a[0], a[6]);
}

PyObject* usual(PyObject* const* a) { return PyBool_FromLong(is_usual(a)); }

PyObject* plain(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    return PyBool_FromLong(are_plain(arguments, count));
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

template <Py_ssize_t count, PyObject* (*body)(PyObject* const*)>
PyMethodDef method(const char* name) {
  const auto function = reinterpret_cast<PyCFunction>(
      reinterpret_cast<void (*)()>(&entry<count, body>));  // as METH_FASTCALL is meant to be set
  return {name, function, METH_FASTCALL, "See fused_attn.backends.Backend."};
}

PyMethodDef kCalls[] = {
    method<4, usual>("is_usual"),
    {"are_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain)),
     METH_FASTCALL, "Whether all are ordinary tensors, or None."},
    method<6, dot_forward<kCpu>>("dot_forward"),
    method<8, dot_backward>("dot_backward"),
    method<8, concat_forward<kCpu>>("concat_forward"),
    method<10, concat_backward>("concat_backward"),
    method<5, concat_scores>("concat_scores"),
    method<7, concat_scores_backward>("concat_scores_backward"),
#ifdef FUSED_ATTN_CUDA
    method<6, dot_forward<kCuda>>("cuda_dot_forward"),
    method<8, concat_forward<kCuda>>("cuda_concat_forward"),
#endif
    {},
};

py::dict cuda_build() {
  py::dict facts;
  facts["missing"] = py::none();
  facts["toolkit"] = py::none();
#ifdef FUSED_ATTN_CUDA
  const int version = cuda_toolkit();
  facts["toolkit"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
#else
  facts["missing"] = kCudaMissing;
#endif
  facts["architectures"] = py::str(kCudaArchitectures).attr("split")();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native attention on torch's tensors; call bind_torch(torch) first.";
  m.def("bind_torch", &bind_torch, py::arg("torch"), "Learn to read the tensors of this torch.");
  m.def("cpu_isa", [] { return cpu_isa(); }, "Name of the instruction set in use.");
  m.def("cpu_isas_supported", &cpu_isas_supported,
        "Instruction sets that this machine can run, best first.");
  m.def("attention_isas_supported", &attention_isas_supported,
        "Those of them that have attention kernels of their own; the others use another's.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Switch to another one (for tests).");
  m.def("multiply_adds", &multiply_adds, py::arg("rounds"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Do multiply-adds in registers, as a reference for the benchmarks; returns the number of\n"
        "floating-point operations.");
  m.def("cuda_build", &cuda_build,
        "The CUDA toolkit and architectures this was compiled with, or what was missing.");
  m.def("identity", &identity, py::arg("parameters"),
        "A hash of the identities, addresses and versions of the tensors in dicts; None unless all "
        "are\n"
        "dense tensors on the CPU.");
  m.def("sample", &sample, py::arg("parameters"),
        "A hash of a few elements of each tensor in dicts; None as for `identity`.");
  bind_decoder(m);
  add_decoder_checks(m);
  bind_search_checks(m);
  if (PyModule_AddFunctions(m.ptr(), kCalls) != 0) throw py::error_already_set();
}
