// The statistics of a row of logits that a search needs; see DecoderKernels.
#pragma once

#include "parts.h"

namespace fused_attn {
namespace {

// The order of logits as that of integers: zeros are equal, and NaN is the largest.
FA_INLINE int32_t rank_of(float x) {
  if (x != x) return INT32_MAX;
  int32_t bits;
  const float y = x + 0.0f;  // -0 becomes 0
  memcpy(&bits, &y, sizeof bits);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

float log_sum_exp(const float* x, int64_t n) {
  Vec<float> largest = splat(-kInfinity<float>);
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>)
    largest = at_least<float>(largest, load(x + i));
  float top = max_lanes<float>(largest);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  if (top - top != 0.0f) {  // rare: infinite
    bool finite = false, nan = false;
    for (i = 0; i < n; ++i) {
      finite |= x[i] - x[i] == 0.0f;
      nan |= x[i] != x[i];
    }
    return finite && !nan ? top : __builtin_nanf("");
  }
  // Sums of blocks are added in double precision, so that rows of some ten thousand lose no digits.
  constexpr int64_t kBlock = 64 * kLanes<float>;
  double sum = 0.0;
  for (int64_t block = 0; block < n; block += kBlock) {
    Vec<float> sums{};
    for_each_vector(n - block < kBlock ? n - block : kBlock, [&](int64_t j, auto part) {
      const Vec<float> y = load_part(x + block + j, part) - top;
      sums += exp_of_negative(only(y, part, -kInfinity<float>));
    });
    sum += double(sum_lanes<float>(sums));
  }
  return float(double(top) + log_of(sum));
}

int64_t argmax(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (rank_of(x[i]) > rank_of(x[best])) best = i;
  return best;
}

int64_t top(const float* x, int64_t n, int64_t count, int32_t* places) {
  int64_t found = 0;
  for (int64_t i = 0; i < n && count > 0; ++i) {
    const int32_t rank = rank_of(x[i]);
    if (found == count && rank <= rank_of(x[places[found - 1]])) continue;
    int64_t k = found < count ? found++ : found - 1;
    for (; k > 0 && rank > rank_of(x[places[k - 1]]); --k) places[k] = places[k - 1];
    places[k] = int32_t(i);
  }
  return found;
}

}  // namespace
}  // namespace fused_attn
