// The searches that search() chooses from.
#pragma once

#include <vector>

#include "kernels.h"
#include "search.h"
#include "stepper.h"

namespace fused_attn {

// With one row for each sentence: takes the most probable symbol in each step, or draws one.
std::vector<std::vector<Found>> greedy_search(Stepper& stepper, const DecoderKernels& kernels,
                                              const SearchOptions& options,
                                              const std::vector<SentenceLimits>& limits);

// With K > 1 rows for each sentence, which has up to K live hypotheses.
//
// A step extends all of them by one symbol and ranks the extensions. Those among the first K that
// end with EOS are finished; the first K others stay alive. A sentence is done, and leaves the
// block, when K hypotheses are finished or when no live one can still enter the n best. The bound
// for that: a log probability never increases, the length penalty of the longest target helps most,
// and coverage never helps.
std::vector<std::vector<Found>> beam_search(Stepper& stepper, const DecoderKernels& kernels,
                                            const SearchOptions& options,
                                            const std::vector<SentenceLimits>& limits);

}  // namespace fused_attn
