// The log probabilities of the symbols that may follow a row, with one model or several.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"
#include "search.h"
#include "stepper.h"

namespace fused_attn {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Choice {
  int32_t symbol = kPad;
  float log_prob = 0;
};

// Reads one row at a time. With several models a probability is the mean over the models.
//
// A barred symbol has the log probability -inf. The others keep theirs: the sum over all symbols,
// barred ones included, stays the normalizer.
class LogProbs {
 public:
  LogProbs(Stepper& stepper, const DecoderKernels& kernels);

  int64_t size() const { return size_; }

  // Moves to a row of the current step, with no symbol barred. Throws NotNumbers if the logits of a
  // model have no finite normalizer. Each row may be read once a step, because bars overwrite it.
  void read(int64_t row);

  void bar(int32_t symbol);
  void allow_end();  // lifts the bar from kEos

  float of(int64_t symbol);  // -inf for what is no symbol

  // The most probable symbol, the lowest among equals. Its log probability is -inf if none can
  // come.
  Choice first();
  // The `count` most probable symbols, best first, the lowest first among equals. Fewer if fewer
  // can come. Valid until the next call.
  const std::vector<Choice>& best(int64_t count);
  // The log probabilities of all symbols, up to a constant that is the same for all. Valid until
  // the next call.
  const float* all();

 private:
  float joint() const;
  bool best_of_depth(int64_t count, int64_t depth);
  float rank_each(int64_t depth);

  Stepper& stepper_;
  const DecoderKernels& kernels_;
  const int64_t size_;
  const float log_models_;
  std::vector<float*> logits_;      // of each model
  std::vector<float> normalizers_;  // log(sum(exp(logits)))
  std::vector<float> ends_;         // logits of kEos before any bar
  std::vector<float> each_;         // log probabilities of one symbol
  std::vector<Choice> choices_;
  std::vector<int32_t> places_;
  std::vector<float> all_;
};

}  // namespace fused_attn
