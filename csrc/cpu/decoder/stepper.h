// What a search asks of the models: one step for all rows.
#pragma once

#include <cstdint>

namespace fused_attn {

// One or several models on a block of sentences, with `beams` rows for each: those of a sentence
// are next to one another.
class Stepper {
 public:
  virtual ~Stepper() = default;

  virtual int64_t sentences() const = 0;
  virtual int64_t beams() const = 0;
  virtual int64_t models() const = 0;
  virtual int64_t vocabulary() const = 0;
  virtual int64_t source_length(int64_t sentence) const = 0;  // of a sentence still in the block
  virtual bool attends() const = 0;                           // whether any model has attention

  // Feeds a symbol (rows) to each row.
  virtual void step(const int32_t* symbols) = 0;
  // The logits of a model, (vocabulary) floats, until the next step. May be overwritten.
  virtual float* logits(int64_t model, int64_t row) = 0;
  // The mean of the models' alignment weights over the source, `source_length` floats, or null if
  // they were not asked for when the block was made, or if no model has attention.
  virtual const float* weights(int64_t row) const = 0;

  // Gives each row the state of the row `from` (rows) of the same sentence, which it continues.
  virtual void reorder(const int32_t* from) = 0;
  // Keeps only these `count` sentences, ascending.
  virtual void keep(const int32_t* sentences, int64_t count) = 0;
};

}  // namespace fused_attn
