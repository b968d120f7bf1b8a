// Weights packed for the products of the native decoder.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace fused_attn {

// The memory of a model's matrices, one after the other in huge pages. A step reads all of them: in
// scattered small pages they would displace one another in the second-level cache long before it is
// full.
class WeightMemory {
 public:
  char* take(int64_t bytes);  // aligned to 64 bytes, valid as long as this lives

 private:
  struct Free {
    void operator()(char* memory) const;
  };
  std::vector<std::unique_ptr<char, Free>> chunks_;
  int64_t used_ = 0, size_ = 0;  // of the last chunk
};

// Owns the memory of a PackedMatrix, or takes it from a WeightMemory.
class PackedWeights {
 public:
  PackedWeights() = default;  // a missing matrix

  // Packs weights (outputs, inputs): element (o, i) is weights[o * output_stride + i *
  // input_stride]. bf16 rounds to nearest, ties to even. i8 takes for each row (output) the scale
  // max |weight| / 127, and the nearest integers, ties to even; a row of zeros has the scale 0, and
  // one with a NaN or an infinity the scale NaN. Throws std::invalid_argument if the integer sums
  // of i8 could overflow, which takes more than kMostInputs inputs.
  PackedWeights(Compute compute, const float* weights, int64_t outputs, int64_t inputs,
                int64_t output_stride, int64_t input_stride, WeightMemory* memory = nullptr);

  static constexpr int64_t kMostInputs = ((int64_t(1) << 31) - 1) / (127 * 127);

  const PackedMatrix& matrix() const { return matrix_; }

 private:
  PackedMatrix matrix_;
  std::unique_ptr<WeightMemory> own_;  // panels, then scales and sums
};

}  // namespace fused_attn
