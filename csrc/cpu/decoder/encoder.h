// The encoder of a block of sentences, and the products of many rows.
#pragma once

#include <cstdint>
#include <vector>

#include "buffers.h"
#include "kernels.h"
#include "model.h"
#include "runner.h"
#include "team.h"

namespace fused_attn {

// The rows as products with `matrix` read them; converted to `out` and `scales` unless float32.
inline ConvertedRows convert_rows(const DecoderKernels& kernels, const PackedMatrix& matrix,
                                  const float* x, int64_t stride, int64_t rows, void* out,
                                  float* scales) {
  if (matrix.compute == Compute::f32) return {x, stride, nullptr};
  kernels.convert(matrix.compute, x, stride, rows, matrix.inputs, out, scales);
  return {out, padded_inputs(matrix.compute, matrix.inputs), scales};
}

// Products of any number of rows, a few hundred at a time, so that the converted rows stay small.
class Converter {
 public:
  Converter(Compute compute, const DecoderKernels& kernels, Arena& arena, Team& team)
      : kernels_(kernels), arena_(arena), team_(team), compute_(compute) {}

  void product(const PackedMatrix& matrix, const float* x, int64_t stride, int64_t rows,
               const float* start, int64_t start_stride, float* out, int64_t out_stride);

 private:
  static constexpr int64_t kRows = 256;
  void reserve(int64_t inputs, int64_t rows);

  const DecoderKernels& kernels_;
  Arena& arena_;
  Team& team_;
  Compute compute_;
  void* data_ = nullptr;
  float* scales_ = nullptr;
  int64_t bytes_ = 0;
};

struct Encoded {
  BlockMemory memory;
  std::vector<const float*> hidden, cell;  // (layers of the decoder) of (count, hidden)
};

// Runs the encoder and the bridge. Sentences must be given longest first.
Encoded run_encoder(const Model& model, const DecoderKernels& kernels, Arena& arena, Team& team,
                    const int64_t* const* ids, const int64_t* lengths, int64_t count);

}  // namespace fused_attn
