// Which symbols may come next; the counterpart of fused_attn/seq2seq/search/constraints.py.
#pragma once

#include <cstdint>
#include <vector>

#include "log_probs.h"
#include "search.h"

namespace fused_attn {

// The only symbol that may follow `step` symbols: kEos at the limit, else that of the prefix.
// Negative if there is no such constraint.
int64_t only_symbol(const SentenceLimits& limits, int64_t step);

// Bars the symbols that may not follow the symbols of `history`, `length` of them: kPad, kBos, kEos
// below the minimum length, and what would repeat an n-gram. If that leaves no symbol and n-grams
// are blocked, kEos may come. `history` is read only if n-grams are blocked.
void bar_symbols(const SearchOptions& options, const std::vector<int32_t>& history, int64_t length,
                 LogProbs& probs);

}  // namespace fused_attn
