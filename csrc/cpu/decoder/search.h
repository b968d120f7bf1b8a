// Greedy search, drawing and beam search over a Stepper; the native counterpart of
// fused_attn/seq2seq/search, whose options and results it has.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "stepper.h"

namespace fused_attn {

constexpr int32_t kPad = 0, kBos = 1, kEos = 2;  // as in fused_attn/seq2seq/vocabulary.py

enum class LengthPenalty : int32_t { none = 0, average = 1, gnmt = 2 };

// The fields of fused_attn.seq2seq.SearchConfig.
struct SearchOptions {
  int64_t most = 1;       // hypotheses per sentence
  double nbest_mass = 0;  // 0: no such limit
  LengthPenalty length_penalty = LengthPenalty::average;
  double alpha = 0.6;
  double coverage_penalty = 0.0;
  int64_t min_length = 0;
  int64_t block_ngrams = 0;
  bool sample = false;
  double temperature = 1.0;
  int64_t top_k = 0;
  double top_p = 1.0;
  uint64_t seed = 0;  // of the draws: with the sentence's number and the step it gives each draw
  bool return_weights = false;
};

// What a search is told about each sentence of its block.
struct SentenceLimits {
  int64_t number = 0;               // in the call: for the draws
  int64_t limit = 0;                // at this many symbols a target must end
  const int64_t* prefix = nullptr;  // what the target must begin with, or null
  int64_t prefix_length = 0;        // symbols of it; a kPad in it leaves that step free
};

struct Found {
  std::vector<int32_t> tokens;  // without BOS and EOS
  float log_prob = 0, score = 0;
  std::vector<float> gains;    // log probability of each token, without EOS
  std::vector<float> weights;  // (tokens, source length), if asked for and there is attention
};

// The probabilities of a model cannot rank targets:
// fused_attn.seq2seq.search.hypothesis.not_numbers.
struct NotNumbers : std::runtime_error {
  NotNumbers() : std::runtime_error("the probabilities of the model are not finite numbers") {}
};

// Returns the hypotheses of each sentence, best first. `limits` has one entry for each sentence.
std::vector<std::vector<Found>> search(Stepper& stepper, const DecoderKernels& kernels,
                                       const SearchOptions& options,
                                       const std::vector<SentenceLimits>& limits);

}  // namespace fused_attn
