// Access to the native search for tests.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn {

void bind_search_checks(pybind11::module_& module);

}  // namespace fused_attn
