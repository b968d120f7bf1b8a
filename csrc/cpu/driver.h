// One attention call on the CPU: plan, shared buffers, tasks over threads, merge.
#pragma once

#include "../attention_params.h"

namespace fused_attn {

// Both throw std::bad_alloc if a buffer cannot be allocated; the outputs are then undefined.
void cpu_forward(const AttentionParams& params);
void cpu_backward(const AttentionParams& params);

// A reference for the benchmarks: `rounds` runs of multiply-adds in registers, distributed over
// threads like the tasks of a call. Returns the number of floating-point operations.
int64_t multiply_adds(int64_t rounds, int threads);

}  // namespace fused_attn
