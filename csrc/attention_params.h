// The only type that crosses into native code: pointers, sizes and strides, and no framework.
//
// B batch, T queries, S source positions, E width of the memory, K width of the scored vectors
// (E for the dot score, A for concat). All strides are in elements. The last dimension of every
// tensor has unit stride unless a stride is given for it. The caller has checked everything.
// A tensor without elements may have a null pointer, so null never tells one kind of call from
// another: it means that there is nothing to read, or that the result is not wanted.
#pragma once

#include <cstdint>

namespace fused_attn {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

enum class Score : int32_t { dot = 0, concat = 1 };

// exp(2x) is used for projections |x| up to this bound, so that it fits in float32; memory_exp is
// -1 beyond it. The bound in fused_attn/prepared.py and kernels/step.py must be the same.
constexpr float kLargestProjection = 43.0f;

// Rows of a (B, rows, width) tensor; or of concatenated sequences, (rows, width): then `starts`
// (B + 1) has the first row of each sequence, and in its last entry the number of rows.
struct Rows {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  const int64_t* starts = nullptr;

  // Elements before the rows of batch row b.
  int64_t before(int64_t b) const { return starts ? starts[b] * row_stride : b * batch_stride; }
};

struct AttentionParams {
  Score score = Score::dot;
  DType dtype = DType::f32;      // of every tensor without a type of its own below
  DType exp_dtype = DType::f32;  // of memory_exp
  int64_t B = 0, T = 0, S = 0, E = 0, K = 0;
  double scale = 1.0;  // of the dot score
  int threads = 1;

  Rows query;               // (B, T, K): the query, or its projection for concat
  Rows memory;              // (B, S, E); with starts S is the longest length, and lengths are set
  Rows memory_proj;         // (B, S, K), concat
  Rows memory_exp;          // (B, S, K), concat, or null: exp(2 memory_proj), -1 where too large
  const void* v = nullptr;  // (K), concat

  const int64_t* lengths = nullptr;  // (B), or null: all S; in the caller's memory, for the CPU
  const uint8_t* mask = nullptr;     // (B, 1 or T, S), non-zero = attend, or null
  int64_t mask_b = 0, mask_t = 0, mask_s = 0;
  const uint8_t* keep = nullptr;  // (B, T, S) contiguous, zero = dropped, or null
  double keep_scale = 1.0;
  const int64_t* bounds = nullptr;  // (B, T, 2), or null: each query's window, its first position
                                    // and the one after its last, within the length
  const void* centers = nullptr;    // (B, T) in the type of logsumexp, or null: weights within a
  double rate = 0.0;                // window are multiplied by exp(-((s - center) rate)^2 / 2)

  // Written by the forward pass, read by the backward one. Contiguous.
  void* context = nullptr;    // (B, T, E)
  void* weights = nullptr;    // (B, T, S), or null
  void* logsumexp = nullptr;  // (B, T), float for everything but f64, which has double; or null

  // Concat scores alone, without a softmax: there is no memory, and E is 0.
  bool scores_only = false;
  void* raw_scores = nullptr;             // (B, T, S) in the type of logsumexp
  const void* raw_grad_scores = nullptr;  // their gradient, contiguous; 0 where nothing counts

  // On a GPU only.
  int device = 0;                        // its number; all other pointers are into its memory
  void* stream = nullptr;                // where the work is enqueued; null is the default stream
  const void* device_lengths = nullptr;  // (B), or null: all S. Clamped to 0..S where they are read
  int64_t length_stride = 1;
  int length_bytes = 8;            // of each length: 1, 2, 4 or 8
  bool lengths_are_signed = true;  // always, unless length_bytes is 1
  float* workspace = nullptr;      // cuda_workspace() floats, uninitialised

  // Backward only.
  Rows grad_context;  // (B, T, E)
  Rows grad_weights;  // (B, T, S), or null; needs weights
  // Gradients are contiguous. One that is not wanted is null, and costs nothing.
  void* grad_query = nullptr;        // (B, T, K)
  void* grad_memory = nullptr;       // (B, S, E), or (rows, E) where memory has starts
  void* grad_memory_proj = nullptr;  // (B, S, K), concat
  void* grad_v = nullptr;            // (K), concat
  void* grad_centers = nullptr;      // (B, T) in the type of centers, if there are any
};

}  // namespace fused_attn
