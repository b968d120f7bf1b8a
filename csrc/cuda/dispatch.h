// From a plan to the kernel that was compiled for it.
#pragma once

#include "decode.h"

namespace fused_attn {
namespace {

using Kernel = void (*)(Decode);

template <class X, Score kScore>
Kernel find_kernel(const Plan& plan) {
  const bool one = plan.queries == 1;
  switch (plan.elements) {
    case 8:
      return one ? decode<X, 8, 1, kScore> : decode<X, 8, queries_at_once(8), kScore>;
    case 16:
      return one ? decode<X, 16, 1, kScore> : decode<X, 16, queries_at_once(16), kScore>;
    case 32:
      return one ? decode<X, 32, 1, kScore> : decode<X, 32, queries_at_once(32), kScore>;
    default:
      return decode<X, 64, queries_at_once(64), kScore>;
  }
}

template <class X>
Kernel find_kernel(Score score, const Plan& plan) {
  return score == Score::dot ? find_kernel<X, Score::dot>(plan)
                             : find_kernel<X, Score::concat>(plan);
}

}  // namespace
}  // namespace fused_attn
