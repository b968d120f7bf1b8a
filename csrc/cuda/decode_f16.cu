#include "dispatch.h"
#include "kernels.h"

namespace fused_attn {

const void* cuda_kernel_f16(Score score, const Plan& plan) {
  return reinterpret_cast<const void*>(find_kernel<F16>(score, plan));
}

}  // namespace fused_attn
