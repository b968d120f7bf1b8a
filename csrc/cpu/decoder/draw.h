// Drawing a symbol at random, with temperature, top-k and top-p.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "log_probs.h"
#include "search.h"

namespace fused_attn {

// A number in [0, 1) with 53 random bits. It depends only on its arguments, so that a draw does
// not depend on the block or the thread of its sentence.
double uniform(uint64_t seed, int64_t sentence, int64_t step);

class Drawer {
 public:
  Drawer(const SearchOptions& options, const DecoderKernels& kernels, int64_t vocabulary);

  // Draws one of the symbols that may come. The log probability is that without temperature, or
  // -inf if no symbol can come.
  Choice draw(LogProbs& probs, int64_t sentence, int64_t step);

 private:
  bool temper(LogProbs& probs);
  int64_t keep(int64_t n);
  int64_t keep_many(int64_t n, int64_t most);

  const SearchOptions& options_;
  const DecoderKernels& kernels_;
  std::vector<float> probabilities_;  // (V), with the temperature; then zeros
  std::vector<int32_t> places_;       // symbols, those that are kept first
  std::vector<float> kept_;           // their probabilities; then zeros
};

}  // namespace fused_attn
