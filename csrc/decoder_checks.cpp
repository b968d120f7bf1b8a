#include "decoder_checks.h"

#include <chrono>
#include <string>
#include <vector>

#include "cpu/decoder/pack.h"
#include "cpu/isa.h"
#include "tensor_exchange.h"

namespace fused_attn {
namespace {

Compute compute_of(const std::string& name) {
  if (name == "float32") return Compute::f32;
  if (name == "bfloat16") return Compute::bf16;
  if (name == "int8") return Compute::i8;
  throw py::value_error("compute must be float32, bfloat16 or int8, got " + name);
}

// A float32 matrix, or a vector, of a caller. Any strides.
Argument floats(const char* name, const py::handle& tensor, int dims) {
  Argument view(name, tensor.ptr());
  view.check_dtype(DType::f32);
  if (view.ndim() != dims) throw py::value_error(std::string(name) + " has shape " + view.shape());
  return view;
}

PackedWeights pack(const std::string& compute, const py::handle& weights) {
  const Argument view = floats("weights", weights, 2);
  return PackedWeights(compute_of(compute), static_cast<const float*>(view.data()), view.size(0),
                       view.size(1), view.stride(0), view.stride(1));
}

py::tuple contents(const PackedWeights& weights) {
  const PackedMatrix& matrix = weights.matrix();
  const auto bytes = [](const void* data, int64_t count) {
    return py::bytes(static_cast<const char*>(data), size_t(count));
  };
  const int64_t rows = matrix.scales ? matrix.panel_count() * kPanel : 0;
  return py::make_tuple(bytes(matrix.panels, matrix.bytes()), bytes(matrix.scales, rows * 4),
                        bytes(matrix.sums, rows * 4));
}

// Rows converted for a product, in memory of their own.
struct Converted {
  std::vector<char> data;
  std::vector<float> scales;
  int64_t padded = 0;

  Converted(const DecoderKernels& kernels, Compute compute, const Argument& x) {
    padded = padded_inputs(compute, x.size(1));
    data.resize(size_t(x.size(0) * padded * compute_bytes(compute)));
    scales.resize(compute == Compute::i8 ? size_t(x.size(0)) : 0);
    kernels.convert(compute, static_cast<const float*>(x.data()), x.stride(0), x.size(0), x.size(1),
                    data.data(), scales.data());
  }
};

py::tuple convert(const std::string& compute, const py::handle& rows) {
  Argument x = floats("x", rows, 2);
  x.make_unit_stride();
  const Converted made(decoder_kernels(), compute_of(compute), x);
  return py::make_tuple(
      py::bytes(made.data.data(), made.data.size()),
      py::bytes(reinterpret_cast<const char*>(made.scales.data()), made.scales.size() * 4));
}

// The product by the kernel, `repeat` times. Returns the seconds of one.
double product(const PackedWeights& weights, const py::handle& x, const py::handle& start,
               const py::handle& out, int64_t repeat) {
  std::chrono::duration<double> took{};
  run_product(weights, x, start, out, [&](auto&&... arguments) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeat; ++i) decoder_kernels().product(arguments...);
    took = std::chrono::steady_clock::now() - begin;
  });
  return took.count() / double(repeat > 0 ? repeat : 1);
}

}  // namespace

void run_product(const PackedWeights& weights, const py::handle& rows, const py::handle& start,
                 const py::handle& result, const Product& product) {
  const PackedMatrix& matrix = weights.matrix();
  Argument x = floats("x", rows, 2), out = floats("out", result, 2);
  x.make_unit_stride().check_shape({x.size(0), matrix.inputs});
  out.check_shape({x.size(0), matrix.outputs});
  if (out.size(1) > 1 && out.stride(1) != 1) throw py::value_error("out has strided columns");
  const float* from = nullptr;
  int64_t from_stride = 0;
  if (!start.is_none()) {
    const Argument before("start", start.ptr());
    from = static_cast<const float*>(before.data());
    from_stride = before.ndim() == 2 ? before.stride(0) : 0;
  }
  ConvertedRows converted{x.data(), x.stride(0), nullptr};
  std::vector<Converted> kept;
  if (matrix.compute != Compute::f32) {
    kept.emplace_back(decoder_kernels(), matrix.compute, x);
    converted = {kept[0].data.data(), kept[0].padded, kept[0].scales.data()};
  }
  const py::gil_scoped_release release;
  product(matrix, converted, x.size(0), from, from_stride, static_cast<float*>(out.data()),
          out.stride(0));
}

void add_decoder_checks(py::module_& m) {
  py::module_ checks = m.def_submodule("decoder_checks", "Kernels of the native decoder, alone.");
  py::class_<PackedWeights>(checks, "PackedWeights")
      .def(py::init(&pack), py::arg("compute"), py::arg("weights"))
      .def("contents", &contents, "The bytes of the panels, the scales and the sums.");
  checks.def("convert", &convert, py::arg("compute"), py::arg("x"),
             "The bytes of the converted rows and of their scales.");
  checks.def("product", &product, py::arg("weights"), py::arg("x"), py::arg("start"),
             py::arg("out"), py::arg("repeat") = 1,
             "Writes start + x times the transposed weights to `out`, all float32; `start` is a\n"
             "matrix, which may be `out`, a vector or None. Returns the seconds of one product.");
  add_decoder_cell_checks(checks);
  add_decoder_team_checks(checks);
}

}  // namespace fused_attn
