// What ranks targets; the counterpart of fused_attn/seq2seq/search/hypothesis.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "search.h"

namespace fused_attn {

// The divisor of the log probability of a target of `length` symbols, EOS included.
inline float length_penalty(const SearchOptions& options, int64_t length) {
  if (options.length_penalty == LengthPenalty::average) return float(length);
  if (options.length_penalty == LengthPenalty::none) return 1.0f;
  return float(std::pow((5.0 + double(length)) / 6.0, options.alpha));
}

// beta sum_s log(min(coverage[s], 1)), over the n positions of the source; a position with less
// than a millionth costs as much as one with a millionth. NaN stays NaN.
inline float coverage_penalty(const SearchOptions& options, const float* coverage, int64_t n) {
  double sum = 0;
  for (int64_t s = 0; s < n; ++s) {
    const float x = coverage[s];
    sum += std::log(x < 1e-6f ? 1e-6f : x > 1.0f ? 1.0f : x);
  }
  return float(options.coverage_penalty) * float(sum);
}

}  // namespace fused_attn
