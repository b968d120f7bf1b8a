// A model as the native decoder reads it: sizes, packed matrices and float vectors. Immutable.
//
// Luong, Pham & Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation".
// What no step changes is applied to the memory once: the matrix of the general score makes keys of
// the memory, and the part of W_c for the context makes values of it. A step then reads two rows of
// the decoder's width for each source position, and multiplies two matrices less.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace fused_attn {

// One direction of a recurrent layer. GRU adds its biases at different places; for the other cells
// `bias` is the sum of both, and `state_bias` is null.
struct RecurrentLayer {
  PackedMatrix input;                 // (gates, width of the input); missing with a table alone
  PackedMatrix feed;                  // (gates, attentional width), with input feeding
  PackedMatrix state;                 // (gates, hidden)
  const float* bias = nullptr;        // (gates)
  const float* state_bias = nullptr;  // (gates)
  const float* table = nullptr;       // (symbols, gates): W e + bias for each symbol's embedding e
};

struct Embedding {
  const float* data = nullptr;  // (symbols, width)
  int64_t symbols = 0, width = 0;
};

enum class ScoreKind : int32_t { none = 0, dot = 1, concat = 2, location = 3 };
enum class Local : int32_t { no = 0, monotonic = 1, predictive = 2 };

struct AttentionModel {
  ScoreKind score = ScoreKind::none;  // general is dot, with keys made of the memory
  int64_t memory_width = 0;
  PackedMatrix keys;                  // (key width, memory width); missing: the memory itself
  const float* key_bias = nullptr;    // (memory width): its product with a row is added to a score
  float scale = 1.0f;                 // of dot scores
  PackedMatrix query;                 // concat: (key width, hidden); location: (longest, hidden)
  const float* query_bias = nullptr;  // of `query`
  const float* v = nullptr;           // concat: (key width)
  const float* coverage = nullptr;    // concat: (key width), the direction of the coverage
  Local local = Local::no;
  float window = 0.0f;                // half-width
  PackedMatrix position;              // predictive: W_p (hidden, hidden)
  const float* position_v = nullptr;  // predictive: v_p (hidden)
  PackedMatrix values;                // the part of W_c for the context; missing: the memory
  PackedMatrix combine;               // the part of W_c for the state; missing: h~ is the context
  const float* combine_bias = nullptr;

  int64_t key_width() const { return keys ? keys.outputs : memory_width; }
};

enum class BridgeKind : int32_t { zero = 0, last = 1, mean = 2, dense = 3 };

struct EncoderModel {
  Embedding embedding;
  int64_t hidden = 0;  // of each direction
  int64_t directions = 1;
  bool reverse = false;
  std::vector<RecurrentLayer> layers;  // layer l, direction d is at l * directions + d
  PackedMatrix memory_proj;            // of the memory, before anything else reads it; or missing
  BridgeKind bridge = BridgeKind::zero;
  PackedMatrix maps[2];  // mean, dense: of h, and of c for an LSTM
  const float* map_biases[2] = {nullptr, nullptr};

  int64_t width() const { return hidden * directions; }
  int64_t memory_width() const { return memory_proj ? memory_proj.outputs : width(); }
  int64_t depth() const { return int64_t(layers.size()) / directions; }
};

struct Model {
  Compute compute = Compute::f32;
  Cell cell = Cell::lstm;
  bool residual = false;
  int64_t hidden = 0;
  Embedding embedding;  // of the symbols that are fed in; null: inputs are embedded
  bool input_feeding = false;
  std::vector<RecurrentLayer> layers;
  AttentionModel attention;
  PackedMatrix output_proj, output;  // missing: there are no logits
  const float* output_bias = nullptr;
  bool has_encoder = false;
  EncoderModel encoder;
  int64_t largest_bytes = 0;          // of a matrix
  std::shared_ptr<const void> owner;  // of all that the model points to

  int64_t gates() const { return gate_count(cell) * hidden; }
  int64_t attentional_width() const {
    if (attention.score == ScoreKind::none) return hidden;
    return attention.combine ? attention.combine.outputs : attention.memory_width;
  }
  static int64_t gate_count(Cell cell) {
    return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
  }
};

}  // namespace fused_attn
