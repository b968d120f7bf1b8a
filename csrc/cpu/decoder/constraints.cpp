#include "constraints.h"

#include <algorithm>
#include <cmath>

namespace fused_attn {

int64_t only_symbol(const SentenceLimits& limits, int64_t step) {
  if (step >= limits.limit) return kEos;
  if (step >= limits.prefix_length || limits.prefix[step] == kPad) return -1;
  return limits.prefix[step];
}

void bar_symbols(const SearchOptions& options, const std::vector<int32_t>& history, int64_t length,
                 LogProbs& probs) {
  const bool is_short = length < options.min_length;
  probs.bar(kPad);
  probs.bar(kBos);
  if (is_short) probs.bar(kEos);
  if (options.block_ngrams == 0) return;
  const int64_t before = options.block_ngrams - 1;  // symbols of an n-gram before its last
  const int32_t* symbols = history.data();
  for (int64_t start = 0; start + before < length; ++start)
    if (std::equal(symbols + start, symbols + start + before, symbols + length - before))
      probs.bar(symbols[start + before]);
  if (is_short && std::isinf(probs.first().log_prob)) probs.allow_end();
}

}  // namespace fused_attn
