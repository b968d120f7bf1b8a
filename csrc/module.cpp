// The binding table: integers become AttentionParams, and the call runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "attention_params.h"
#include "cpu/driver.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace fused_attn;

namespace {

using Address = std::uintptr_t;
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // B, T, S, E, K
using RowsArg = std::tuple<Address, int64_t, int64_t>;                  // data, strides of B, rows
// lengths, mask with its three strides, keep, keep_scale
using MaskingArg = std::tuple<Address, Address, int64_t, int64_t, int64_t, Address, double>;
// context, weights, logsumexp
using SavedArg = std::tuple<Address, Address, Address>;
// memory_proj, memory_exp, dtype of memory_exp, v
using ConcatArg = std::tuple<RowsArg, RowsArg, int, Address>;
// grad_context, grad_weights; grad_query, grad_memory, grad_memory_proj, grad_v
using GradsArg = std::tuple<RowsArg, RowsArg, Address, Address, Address, Address>;

template <class X>
X* at(Address address) {
  return reinterpret_cast<X*>(address);
}
Rows rows(const RowsArg& arg) {
  return {at<const void>(std::get<0>(arg)), std::get<1>(arg), std::get<2>(arg)};
}

AttentionParams params(int dtype, const Sizes& sizes, int threads, const RowsArg& query,
                       const RowsArg& memory, const MaskingArg& masking, const SavedArg& saved) {
  AttentionParams p;
  p.dtype = DType(dtype);
  std::tie(p.B, p.T, p.S, p.E, p.K) = sizes;
  p.threads = threads;
  p.query = rows(query);
  p.memory = rows(memory);
  Address lengths, mask, keep;
  std::tie(lengths, mask, p.mask_b, p.mask_t, p.mask_s, keep, p.keep_scale) = masking;
  p.lengths = at<const int64_t>(lengths);
  p.mask = at<const uint8_t>(mask);
  p.keep = at<const uint8_t>(keep);
  p.context = at<void>(std::get<0>(saved));
  p.weights = at<void>(std::get<1>(saved));
  p.logsumexp = at<void>(std::get<2>(saved));
  return p;
}

void add_concat(AttentionParams& p, const ConcatArg& concat) {
  p.score = Score::concat;
  p.memory_proj = rows(std::get<0>(concat));
  p.memory_exp = rows(std::get<1>(concat));
  p.exp_dtype = DType(std::get<2>(concat));
  p.v = at<const void>(std::get<3>(concat));
}

void add_grads(AttentionParams& p, const GradsArg& grads) {
  p.grad_context = rows(std::get<0>(grads));
  p.grad_weights = rows(std::get<1>(grads));
  p.grad_query = at<void>(std::get<2>(grads));
  p.grad_memory = at<void>(std::get<3>(grads));
  p.grad_memory_proj = at<void>(std::get<4>(grads));
  p.grad_v = at<void>(std::get<5>(grads));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native attention on raw addresses; fused_attn.backends.cpu checks and allocates.";
  m.def("cpu_isa", [] { return cpu_isa(); }, "Name of the instruction set in use.");
  m.def("cpu_isas_supported", &cpu_isas_supported, "Those this machine can run, widest first.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Switch to another one (for tests).");
  m.def("multiply_adds", &multiply_adds, py::arg("rounds"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Do multiply-adds in registers, the yardstick of the benchmarks; returns how many\n"
        "floating-point operations that was.");
  m.def("dot_forward",
        [](int dtype, const Sizes& sizes, int threads, const RowsArg& query, const RowsArg& memory,
           const MaskingArg& masking, const SavedArg& saved, double scale) {
          AttentionParams p = params(dtype, sizes, threads, query, memory, masking, saved);
          p.scale = scale;
          py::gil_scoped_release unlocked;
          cpu_forward(p);
        });
  m.def("dot_backward",
        [](int dtype, const Sizes& sizes, int threads, const RowsArg& query, const RowsArg& memory,
           const MaskingArg& masking, const SavedArg& saved, double scale, const GradsArg& grads) {
          AttentionParams p = params(dtype, sizes, threads, query, memory, masking, saved);
          p.scale = scale;
          add_grads(p, grads);
          py::gil_scoped_release unlocked;
          cpu_backward(p);
        });
  m.def("concat_forward",
        [](int dtype, const Sizes& sizes, int threads, const RowsArg& query, const RowsArg& memory,
           const MaskingArg& masking, const SavedArg& saved, const ConcatArg& concat) {
          AttentionParams p = params(dtype, sizes, threads, query, memory, masking, saved);
          add_concat(p, concat);
          py::gil_scoped_release unlocked;
          cpu_forward(p);
        });
  m.def("concat_backward",
        [](int dtype, const Sizes& sizes, int threads, const RowsArg& query, const RowsArg& memory,
           const MaskingArg& masking, const SavedArg& saved, const ConcatArg& concat,
           const GradsArg& grads) {
          AttentionParams p = params(dtype, sizes, threads, query, memory, masking, saved);
          add_concat(p, concat);
          add_grads(p, grads);
          py::gil_scoped_release unlocked;
          cpu_backward(p);
        });
}
