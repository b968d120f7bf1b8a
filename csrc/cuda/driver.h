// The calls into csrc/cuda. A CUDA error becomes a std::runtime_error that names the failed call.
#pragma once

#include <cstdint>

#include "attention_params.h"

namespace fused_attn {

int cuda_toolkit();  // CUDART_VERSION of the toolkit this was compiled with: 13000 for 13.0

// Floats of workspace that cuda_forward needs for the call.
int64_t cuda_workspace(const AttentionParams& p);

// Enqueues the forward pass on p.stream and returns. T <= 8, widths up to 2048, concat with
// prepared exponentials; any type but f64. The exponentials are bf16 for bf16, else f32.
void cuda_forward(const AttentionParams& p);

}  // namespace fused_attn
