// The kernels of the native decoder, one by one, for the tests and the benchmarks.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>

#include "cpu/decoder/pack.h"

namespace fused_attn {

namespace py = pybind11;

// Adds the submodule `decoder_checks`.
void add_decoder_checks(py::module_& m);

// Add to that submodule the kernels that are not products (decoder_checks_cells.cpp), and products
// that a team shares (decoder_checks_team.cpp).
void add_decoder_cell_checks(py::module_& checks);
void add_decoder_team_checks(py::module_& checks);

using Product =
    std::function<void(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                       const float* start, int64_t start_stride, float* out, int64_t stride)>;

// Calls `product` without the GIL to write start + x times the transposed weights to `out`, all
// float32 tensors; `start` is a matrix, which may be `out`, a vector or None. The conversion of x
// comes first.
void run_product(const PackedWeights& weights, const py::handle& x, const py::handle& start,
                 const py::handle& out, const Product& product);

}  // namespace fused_attn
