#include <cmath>
#include <utility>

#include "constraints.h"
#include "draw.h"
#include "log_probs.h"
#include "penalties.h"
#include "strategies.h"

namespace fused_attn {
namespace {

// A target that has not ended.
struct Target {
  int64_t sentence = 0;
  int64_t source = 0;  // length
  float total = 0;     // log probability
  Found found;
  std::vector<float> coverage;  // (source), the sum of the weights; empty if nothing needs it
};

class GreedySearch {
 public:
  GreedySearch(Stepper& stepper, const DecoderKernels& kernels, const SearchOptions& options,
               const std::vector<SentenceLimits>& limits)
      : stepper_(stepper),
        options_(options),
        limits_(limits),
        probs_(stepper, kernels),
        drawer_(options, kernels, stepper.vocabulary()),
        targets_(limits.size()),
        results_(limits.size()) {
    for (int64_t sentence = 0; sentence < int64_t(limits.size()); ++sentence) {
      targets_[sentence].sentence = sentence;
      targets_[sentence].source = stepper.source_length(sentence);
    }
  }

  std::vector<std::vector<Found>> run() {
    std::vector<int32_t> symbols(targets_.size(), kBos), open;
    for (int64_t step = 0; !targets_.empty(); ++step) {
      stepper_.step(symbols.data());
      open.clear();
      for (int32_t row = 0; row < int32_t(targets_.size()); ++row) {
        symbols[row] = extend(targets_[row], row, step);
        if (symbols[row] != kEos) open.push_back(row);
      }
      keep(open, symbols);
    }
    return std::move(results_);
  }

 private:
  Choice choose(const Target& target, int64_t row, int64_t step) {
    const SentenceLimits& limits = limits_[target.sentence];
    probs_.read(row);
    const int64_t only = only_symbol(limits, step);
    if (only >= 0) return {int32_t(only), probs_.of(only)};
    bar_symbols(options_, target.found.tokens, step, probs_);
    return options_.sample ? drawer_.draw(probs_, limits.number, step) : probs_.first();
  }

  // Returns the next symbol of a target, which is then part of it.
  int32_t extend(Target& target, int64_t row, int64_t step) {
    const Choice next = choose(target, row, step);
    if (!std::isfinite(next.log_prob)) throw NotNumbers();
    target.total += next.log_prob;
    const float* weights = stepper_.weights(row);
    if (weights && options_.coverage_penalty > 0) {
      target.coverage.resize(target.source);
      for (int64_t s = 0; s < target.source; ++s) target.coverage[s] += weights[s];
    }
    if (next.symbol == kEos) {
      finish(target, step + 1);
      return kEos;
    }
    Found& found = target.found;
    found.tokens.push_back(next.symbol);
    found.gains.push_back(next.log_prob);
    if (weights && options_.return_weights)
      found.weights.insert(found.weights.end(), weights, weights + target.source);
    return next.symbol;
  }

  void finish(Target& target, int64_t length) {
    Found& found = target.found;
    found.log_prob = target.total;
    found.score = target.total / length_penalty(options_, length);
    if (!target.coverage.empty())
      found.score += coverage_penalty(options_, target.coverage.data(), target.source);
    results_[target.sentence].push_back(std::move(found));
  }

  void keep(const std::vector<int32_t>& open, std::vector<int32_t>& symbols) {
    if (open.size() == targets_.size()) return;
    for (size_t i = 0; i < open.size(); ++i) {
      if (int32_t(i) != open[i]) targets_[i] = std::move(targets_[open[i]]);
      symbols[i] = symbols[open[i]];
    }
    targets_.resize(open.size());
    if (!open.empty()) stepper_.keep(open.data(), int64_t(open.size()));
  }

  Stepper& stepper_;
  const SearchOptions& options_;
  const std::vector<SentenceLimits>& limits_;
  LogProbs probs_;
  Drawer drawer_;
  std::vector<Target> targets_;  // of the rows
  std::vector<std::vector<Found>> results_;
};

}  // namespace

std::vector<std::vector<Found>> greedy_search(Stepper& stepper, const DecoderKernels& kernels,
                                              const SearchOptions& options,
                                              const std::vector<SentenceLimits>& limits) {
  return GreedySearch(stepper, kernels, options, limits).run();
}

}  // namespace fused_attn
