// The machine's peak rate of multiply-adds, to which the benchmarks compare the kernels.
#pragma once

#include "vec.h"

namespace fused_attn {
namespace {

// Enough chains to hide the latency of two pipes; with both operands they fit 16 registers.
constexpr int kPeakChains = 12;
constexpr int64_t kPeakSteps = 4096;  // about ten microseconds: as short as a task of a kernel

// Multiply-adds from registers to registers, in independent chains. Returns the number of
// floating-point operations, two for each lane. Volatile, so that the compiler neither knows the
// operands nor removes the unused sum.
inline int64_t multiply_adds() {
  const volatile float operands[2] = {0.5f, 1.0f};  // the chains settle at 2
  const Vec<float> factor = splat(float(operands[0])), term = splat(float(operands[1]));
  Vec<float> chain[kPeakChains];
#pragma GCC unroll 16
  for (int i = 0; i < kPeakChains; ++i) chain[i] = term + float(i);
  for (int64_t step = 0; step < kPeakSteps; ++step)
#pragma GCC unroll 16
    for (int i = 0; i < kPeakChains; ++i) chain[i] = chain[i] * factor + term;
  Vec<float> sum{};
#pragma GCC unroll 16
  for (int i = 0; i < kPeakChains; ++i) sum += chain[i];
  volatile float wanted = sum_lanes<float>(sum);
  (void)wanted;
  return 2 * kPeakSteps * kPeakChains * kLanes<float>;
}

}  // namespace
}  // namespace fused_attn
