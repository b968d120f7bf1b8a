// The calls of the native decoder. schedule.h cuts their sentences into blocks, which threads work
// on independently or share.
#pragma once

#include <cstdint>
#include <vector>

#include "interruption.h"
#include "kernels.h"
#include "model.h"
#include "search.h"

namespace fused_attn {

// What the decoder attends to: the symbols of the sources, or their memory and the first states.
struct SourceRows {
  int64_t count = 0;
  std::vector<int64_t> lengths;     // (count)
  std::vector<const int64_t*> ids;  // (count), empty with a memory
  int64_t longest = 0;              // rows of each sentence in `memory`
  const float* memory = nullptr;    // (count, longest, memory width)
  // Contiguous, or null for zeros: (layers, count, hidden) twice, (count, attentional width),
  // (count, longest).
  const float *hidden = nullptr, *cell = nullptr, *attentional = nullptr, *coverage = nullptr;
  int64_t position = 0;
};

struct SearchCall {
  std::vector<const Model*> models;
  SearchOptions options;
  int64_t beams = 1;
  std::vector<int64_t> limits;  // (count)
  const int64_t* prefix = nullptr;
  int64_t prefix_length = 0;
  int threads = 1;
  Check check = nullptr;
};

// The hypotheses of each sentence, in the order of the sources.
std::vector<std::vector<Found>> search_blocks(const SearchCall& call, const SourceRows& sources,
                                              const DecoderKernels& kernels);

// Writes memory (count, longest, width), with zeros in the padding, and the first states of the
// decoder (layers, count, hidden).
void encode_blocks(const Model& model, const SourceRows& sources, int64_t longest, int threads,
                   const DecoderKernels& kernels, float* memory, float* hidden, float* cell);

struct StepsCall {
  const Model* model = nullptr;
  int64_t steps = 0;
  int threads = 1;
  Check check = nullptr;
  const int64_t* symbols = nullptr;  // (count, steps), or
  const float* embedded = nullptr;   // (count, steps, width of the input)
  // Results, each contiguous or null: (count, steps, width), (count, steps, symbols), (count,
  // steps, longest); then the state after the last step.
  float *states = nullptr, *logits = nullptr, *weights = nullptr;
  float *hidden = nullptr, *cell = nullptr, *attentional = nullptr, *coverage = nullptr;
};

void run_blocks(const StepsCall& call, const SourceRows& sources, const DecoderKernels& kernels);

// What greedy search finds for a row, the symbol that ends it included.
struct GreedyRow {
  std::vector<int64_t> symbols;
  std::vector<float> log_probs;  // (symbols)
  std::vector<float> weights;    // (symbols, length of the source), if asked for
};

// Feeds each row its most probable symbol until that is `eos`, at most `steps` times.
struct GreedyCall {
  const Model* model = nullptr;
  int64_t steps = 0;
  int threads = 1;
  Check check = nullptr;
  int32_t bos = 0, eos = 0;
  bool return_weights = false;
};

std::vector<GreedyRow> greedy_blocks(const GreedyCall& call, const SourceRows& sources,
                                     const DecoderKernels& kernels);

}  // namespace fused_attn
