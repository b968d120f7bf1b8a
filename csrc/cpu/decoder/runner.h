// A model on a block of sentences: encodes them, or takes their memory, and runs the decoder step
// by step. Blocks are independent of one another.
#pragma once

#include <cstdint>
#include <vector>

#include "buffers.h"
#include "kernels.h"
#include "model.h"
#include "team.h"

namespace fused_attn {

// The states between two steps, of N rows.
struct DecoderRows {
  std::vector<float*> hidden;    // (N, hidden) of each layer
  std::vector<float*> cell;      // the same, of an LSTM
  float* attentional = nullptr;  // (N, attentional width), of the last step, with input feeding
  float* coverage = nullptr;     // (N, longest source), with coverage
};

// Memory rows of all sentences of a block, one sentence after the other.
struct BlockMemory {
  int64_t count = 0;              // sentences
  int64_t longest = 0;            // source length
  std::vector<int64_t> lengths;   // (count)
  std::vector<int64_t> first;     // (count): the first row of each
  int64_t rows = 0;               // together
  const float* memory = nullptr;  // (rows, memory width)
};

class Runner {
 public:
  // `arena` must not be reset while the runner lives. `beams` rows for each sentence.
  Runner(const Model& model, const DecoderKernels& kernels, Arena& arena, Team& team,
         int64_t beams);

  // Reads the sources of `count` sentences, longest first: the symbols of each. Their final
  // states become the first of the decoder.
  void encode(const int64_t* const* ids, const int64_t* lengths, int64_t count);
  // Takes a memory, and states in the order of its sentences: `hidden` and `cell` (layers) of
  // (count, hidden). `cell` is empty unless the cell is an LSTM; empty `hidden` means zeros.
  void begin(const BlockMemory& memory, const std::vector<const float*>& hidden,
             const std::vector<const float*>& cell, int64_t position = 0);

  // Feeds a symbol to each row, or an embedded one, (rows, embedding width; stride), without
  // symbols.
  void step(const int32_t* symbols, const float* embedded = nullptr, int64_t stride = 0);

  void reorder(const int32_t* from);
  void keep(const int32_t* sentences, int64_t count);

  const Model& model() const { return model_; }
  int64_t sentences() const { return memory_.count; }
  int64_t beams() const { return beams_; }
  int64_t rows() const { return memory_.count * beams_; }
  int64_t source_length(int64_t sentence) const { return memory_.lengths[sentence]; }
  const BlockMemory& memory() const { return memory_; }
  DecoderRows& state() { return state_; }
  // Results of the last step.
  const float* attentional(int64_t row) const { return outputs_ + row * outputs_width_; }
  float* logits(int64_t row) { return logits_ + row * model_.output.outputs; }
  const float* weights(int64_t row) const { return weights_ + row * memory_.longest; }

 private:
  void allocate();
  void prepare_memory();
  void run_layers(const int32_t* symbols, const float* embedded, int64_t stride);
  void run_layer(const RecurrentLayer& layer, const int32_t* symbols, const float* x,
                 int64_t stride, float* h, float* c);
  const float* embed(const int32_t* symbols);
  void attend();
  void score(int64_t sentence, const float* query);
  void find_windows(const ConvertedRows& y);
  void normalise(int64_t sentence, int64_t row);
  void project();
  ConvertedRows converted(const PackedMatrix& matrix, const float* x, int64_t stride, int64_t rows);
  void gather(float* x, int64_t width, const int32_t* from, int64_t count);
  void move_rows(const int32_t* from, int64_t count);

  const Model& model_;
  const DecoderKernels& kernels_;
  Arena& arena_;
  Team& team_;
  int64_t beams_;
  BlockMemory memory_;
  DecoderRows state_;
  int64_t position_ = 0;

  const float* keys_ = nullptr;      // (memory rows, key width)
  const float* values_ = nullptr;    // (memory rows, value width)
  const float* key_bias_ = nullptr;  // (memory rows)
  int64_t outputs_width_ = 0;
  const float* top_ = nullptr;  // (rows, hidden): the output of the last layer
  // Scratch of a step, for all rows.
  float *gates_ = nullptr, *state_gates_ = nullptr, *embedded_ = nullptr, *layer_ = nullptr;
  float *outputs_ = nullptr, *projected_ = nullptr, *logits_ = nullptr, *weights_ = nullptr;
  float *query_ = nullptr, *place_ = nullptr, *gathered_ = nullptr;
  std::vector<int64_t> begin_, end_;  // (rows): the window of each
  std::vector<float> center_;
  void* narrow_ = nullptr;  // of ConvertedRows
  float* narrow_scales_ = nullptr;
};

}  // namespace fused_attn
