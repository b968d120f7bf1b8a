// One translation unit per storage type, so that they compile side by side.
#pragma once

#include "plan.h"

namespace fused_attn {

const void* cuda_kernel_f32(Score score, const Plan& plan);
const void* cuda_kernel_bf16(Score score, const Plan& plan);
const void* cuda_kernel_f16(Score score, const Plan& plan);

}  // namespace fused_attn
