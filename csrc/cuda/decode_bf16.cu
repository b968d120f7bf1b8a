#include "dispatch.h"
#include "kernels.h"

namespace fused_attn {

const void* cuda_kernel_bf16(Score score, const Plan& plan) {
  return reinterpret_cast<const void*>(find_kernel<BF16>(score, plan));
}

}  // namespace fused_attn
