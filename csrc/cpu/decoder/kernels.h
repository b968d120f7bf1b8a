// What an instruction set does for the native decoder: products with packed weights, the pointwise
// part of a recurrent cell, the attention of one sentence, and the statistics of a row of logits.
//
// Every function computes a row from that row alone, in an order that does not depend on the number
// of rows: a sentence has the same bits whatever else is in its batch, and on any number of
// threads. Matrices are row-major, strides are in elements, and nothing may overlap unless a
// comment says so.
#pragma once

#include <cstdint>

namespace fused_attn {

enum class Compute : int32_t { f32 = 0, bf16 = 1, i8 = 2 };
enum class Cell : int32_t { lstm = 0, gru = 1, rnn = 2 };

inline int64_t compute_group(Compute c) {
  return c == Compute::f32 ? 1 : c == Compute::bf16 ? 2 : 4;
}
inline int64_t compute_bytes(Compute c) {
  return c == Compute::f32 ? 4 : c == Compute::bf16 ? 2 : 1;
}
inline int64_t padded_inputs(Compute c, int64_t inputs) {
  const int64_t step = 64 / compute_bytes(c);
  return (inputs + step - 1) / step * step;
}

// A matrix (outputs, inputs) packed for products: panels of 64 outputs, each with the inputs one
// after the other, in groups that one instruction multiplies: 1 float, 2 bfloat16 or 4 int8.
//
//   element (o, i) is at panels[((o / 64) * padded_inputs + i / group * group) * 64
//                               + o % 64 * group + i % group]
//
// Inputs are padded with zeros to 64 bytes, outputs to 64. The layout is the same for every
// instruction set, and tiles of it can be loaded as operands of AMX.
constexpr int64_t kPanel = 64;

struct PackedMatrix {
  Compute compute = Compute::f32;
  int64_t outputs = 0, inputs = 0;
  int64_t padded_inputs = 0;      // a multiple of 16 (f32), 32 (bf16) or 64 (i8)
  const void* panels = nullptr;   // null: the matrix is missing
  const float* scales = nullptr;  // i8: (outputs padded to 64): weight = scale times integer
  const int32_t* sums = nullptr;  // i8: (outputs padded to 64): the sum of a row's integers
  explicit operator bool() const { return panels != nullptr; }
  int64_t panel_count() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t bytes() const {  // of all panels
    return panel_count() * kPanel * padded_inputs * compute_bytes(compute);
  }
};

// Rows as the products with a kind of matrix read them: float (any stride), or (rows, padded)
// bfloat16 or int8, padded with zeros. int8: x = scale times integer, integers in -127..127, with
// scale = max |x| / 127, or 0 for a row of zeros. A NaN or an infinity makes the scale NaN.
struct ConvertedRows {
  const void* data = nullptr;
  int64_t stride = 0;             // elements of the converted type
  const float* scales = nullptr;  // i8: (rows)
};

struct DecoderKernels {
  // Converts rows (rows, inputs; stride) to bf16 or i8 at `out` (rows, padded_inputs(compute,
  // inputs)); `scales` (rows) for i8. Not called for f32.
  void (*convert)(Compute compute, const float* x, int64_t stride, int64_t rows, int64_t inputs,
                  void* out, float* scales);

  // out (rows, outputs; stride) = start + x times the transposed matrix. `start` is out itself
  // (added to), a bias (outputs) that is the same for all rows (start_stride 0), or null for 0.
  // Only `outputs` columns are written.
  void (*product)(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                  const float* start, int64_t start_stride, float* out, int64_t stride);

  // Gates (rows, 4 hidden) in torch's order i, f, g, o before the activations. Updates c, writes h,
  // (rows, hidden; stride). Gates may be overwritten.
  void (*lstm)(float* gates, int64_t gate_stride, int64_t rows, int64_t hidden, float* c,
               int64_t c_stride, float* h, int64_t h_stride);
  // Both (rows, 3 hidden) in torch's order r, z, n: of the input and of the state, biases included.
  // h is read and replaced.
  void (*gru)(const float* from_input, const float* from_state, int64_t gate_stride, int64_t rows,
              int64_t hidden, float* h, int64_t h_stride);
  // out[i] = tanh(x[i]); may be in place.
  void (*tanh)(const float* x, int64_t n, float* out);
  // out[i] = x[i] + y[i]; may be in place.
  void (*add)(const float* x, const float* y, int64_t n, float* out);

  // The attention of one sentence, for its `queries` beams over n positions.
  // scores (queries, n; stride) = query . keys, plus bias (n) unless that is null.
  void (*dot_scores)(const float* query, int64_t query_stride, int64_t queries, const float* keys,
                     int64_t key_stride, int64_t n, int64_t width, const float* bias, float* scores,
                     int64_t stride);
  // scores[s] = v . tanh(query + keys[s] + coverage[s] direction), for one query; `coverage` (n)
  // and `direction` (width) may be null.
  void (*concat_scores)(const float* query, const float* keys, int64_t key_stride, int64_t n,
                        int64_t width, const float* v, const float* coverage,
                        const float* direction, float* scores);
  // In place, over n positions of each query: weights = softmax(scores). With a Gaussian each is
  // then multiplied by exp(-((first + s - center) rate)^2 / 2). NaN stays NaN; n may be 0.
  void (*softmax)(float* scores, int64_t n);
  void (*bell)(float* weights, int64_t n, float first, float center, float rate);
  // out (queries, width; stride) = start + weights (queries, n; stride) times values (n, width).
  // `start` is out itself (added to) or null for 0.
  void (*weighted_sum)(const float* weights, int64_t weight_stride, int64_t queries, int64_t n,
                       const float* values, int64_t value_stride, int64_t width, const float* start,
                       float* out, int64_t stride);

  // A row of n logits, n >= 1.
  // log(sum(exp(x))), NaN if an element is NaN or none is finite.
  float (*log_sum_exp)(const float* x, int64_t n);
  // The first of the largest elements; the first NaN if there is one.
  int64_t (*argmax)(const float* x, int64_t n);
  // The places of the `count` largest elements, largest first, earlier ones first among equals, to
  // `places`; NaN counts as the largest. Returns how many there are: min(count, n).
  int64_t (*top)(const float* x, int64_t n, int64_t count, int32_t* places);
};

}  // namespace fused_attn
