// One attention call on the CPU: plan, shared buffers, tasks over threads, merge.
#pragma once

#include "../attention_params.h"

namespace fused_attn {

// Both throw std::bad_alloc when a buffer cannot be had; the outputs are then undefined.
void cpu_forward(const AttentionParams& params);
void cpu_backward(const AttentionParams& params);

}  // namespace fused_attn
