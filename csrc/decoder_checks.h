// The kernels of the native decoder, one by one, for the tests and the benchmarks.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn {

// Adds the submodule `decoder_checks`.
void add_decoder_checks(pybind11::module_& m);

// Adds to that submodule the kernels that are not products (decoder_checks_cells.cpp).
void add_decoder_cell_checks(pybind11::module_& checks);

}  // namespace fused_attn
