// The class PackedModel of Python: a model that is packed once and decodes in one call.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn {

void bind_decoder(pybind11::module_& module);

}  // namespace fused_attn
