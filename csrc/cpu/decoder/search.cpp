#include "search.h"

#include <stdexcept>

#include "strategies.h"

namespace fused_attn {

std::vector<std::vector<Found>> search(Stepper& stepper, const DecoderKernels& kernels,
                                       const SearchOptions& options,
                                       const std::vector<SentenceLimits>& limits) {
  if (int64_t(limits.size()) != stepper.sentences())
    throw std::invalid_argument("limits must have one entry for each sentence");
  if (limits.empty()) return {};
  return stepper.beams() > 1 ? beam_search(stepper, kernels, options, limits)
                             : greedy_search(stepper, kernels, options, limits);
}

}  // namespace fused_attn
