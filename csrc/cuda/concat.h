// The concat score without a tanh. With E = exp(2q) exp(2m), tanh(q + m) = 1 - 2 / (1 + E), so that
//
//   v . tanh(q + m) = sum v - 2 sum v / (1 + E),
//
// and the exponentials of the memory are prepared. A multiprocessor computes 16 reciprocals in a
// clock, against 128 multiplications, so two terms share one:
//
//   v0 / x0 + v1 / x1 = (v0 x1 + v1 x0) / (x0 x1).
//
// An x beyond 2^40 is replaced by 2^40: the product of two stays finite, and a term changes by less
// than 2e-12 of its v. The factors themselves exist for |q| and |m| up to kLargestProjection; a
// query or a row (marked by -1) with a larger one is scored with tanh.
#pragma once

#include "score.h"

namespace fused_attn {
namespace {

constexpr float kLargestTerm = 1.099512e12f;  // 2^40

template <class C>
__device__ __forceinline__ int operand_width(const AttentionParams& p) {
  constexpr int kStep = kLanes * kVector<typename C::Exp>;
  return int((p.K + kStep - 1) / kStep * kStep);
}

// Copies the operands of a concat score to shared memory: v, then exp(2q) of each query. Returns,
// in every thread, a bit for each query that has no such factors. All threads of a block must call
// it.
template <class C>
__device__ unsigned fill_concat(const AttentionParams& p, const QueryTile& queries,
                                float* operands) {
  using X = typename C::Memory;
  constexpr int kVectorExp = kVector<typename C::Exp>;
  const int width = operand_width<C>(p);
  for (int d = threadIdx.x; d < width; d += blockDim.x)
    operands[operand_at<kVectorExp>(d)] = d < p.K ? load_one<X>(p.v, d) : 0.0f;
  unsigned without = 0;
#pragma unroll
  for (int t = 0; t < C::queries; ++t) {
    bool inside = true;
    for (int d = threadIdx.x; d < width; d += blockDim.x) {
      float factor = 0.0f;
      if (t < queries.count && d < p.K) {
        const float q = load_one<X>(p.query.data, queries.b * p.query.batch_stride +
                                                      (queries.first + t) * p.query.row_stride + d);
        inside = inside && fabsf(q) <= kLargestProjection;
        factor = expf(2.0f * q);
      }
      operands[(t + 1) * width + operand_at<kVectorExp>(d)] = factor;
    }
    if (__syncthreads_or(!inside)) without |= 1u << t;
  }
  return without;
}

// The sum of v, computed by every warp in the same order.
template <class C>
__device__ float sum_of_v(const AttentionParams& p, const float* operands) {
  float sum = 0.0f;
  for (int d = threadIdx.x % kLanes; d < operand_width<C>(p); d += kLanes) sum += operands[d];
  return sum_of_warp(sum);
}

// v0 / x0 + v1 / x1 for x = 1 + e w, added to sum.
__device__ __forceinline__ float add_pair(float sum, float e0, float w0, float v0, float e1,
                                          float w1, float v1) {
  const float x0 = fminf(fmaf(e0, w0, 1.0f), kLargestTerm);
  const float x1 = fminf(fmaf(e1, w1, 1.0f), kLargestTerm);
  return sum + __fdividef(fmaf(v1, x0, v0 * x1), x0 * x1);
}

// sums[t * rows + r] = this lane's part of sum v / (1 + E) for query t and row r of `rows_exp`. Bit
// r of `marks` is set if this lane saw the mark in row r. Rows whose bit in `needed` is not set are
// not read.
template <class C>
__device__ __forceinline__ void concat_parts(const Decode& d,
                                             const typename C::Exp::Storage* rows_exp,
                                             unsigned needed, const float* operands,
                                             float (&sums)[C::values], unsigned& marks) {
  using P = typename C::Exp;
  constexpr int kParts = kVector<P> / 4;
  constexpr uint32_t kSigns = sizeof(typename P::Storage) == 2 ? 0x80008000u : 0x80000000u;
  const int lane = threadIdx.x % kLanes, K = int(d.p.K), width = operand_width<C>(d.p);
  uint32_t seen[C::rows] = {};
#pragma unroll
  for (int i = 0; i < C::values; ++i) sums[i] = 0.0f;
#pragma unroll 1
  for (int piece = 0; piece * kLanes * kVector<P> < K; ++piece) {
    const int at = (piece * kLanes + lane) * kVector<P>;
    uint4 raw[C::rows];
    if (d.aligned_exp) {
#pragma unroll
      for (int r = 0; r < C::rows; ++r)
        raw[r] =
            load_aligned<P>(rows_exp + r * d.p.memory_exp.row_stride, at, needed >> r & 1 ? K : 0);
    } else {
#pragma unroll
      for (int r = 0; r < C::rows; ++r)
        raw[r] = load_unaligned<P>(rows_exp + r * d.p.memory_exp.row_stride, at,
                                   needed >> r & 1 ? K : 0);
    }
#pragma unroll
    for (int r = 0; r < C::rows; ++r) seen[r] |= raw[r].x | raw[r].y | raw[r].z | raw[r].w;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int at_part = piece * kParts + part;
      const float4 v = operand(operands, at_part);
#pragma unroll
      for (int t = 0; t < C::queries; ++t) {
        const float4 e = operand(operands + (t + 1) * width, at_part);
#pragma unroll
        for (int r = 0; r < C::rows; ++r) {
          const float4 w = widen_four<P>(raw[r], part);
          float& sum = sums[t * C::rows + r];
          sum = add_pair(sum, e.x, w.x, v.x, e.y, w.y, v.y);
          sum = add_pair(sum, e.z, w.z, v.z, e.w, w.w, v.w);
        }
      }
    }
  }
  marks = 0;
#pragma unroll
  for (int r = 0; r < C::rows; ++r) marks |= (seen[r] & kSigns ? 1u : 0u) << r;
}

// Scores with tanh for what has no factors: rows in `marks`, queries in `without`. Every lane
// passes the score it owns and gets back that or the new one. With a per-query mask a projection
// that is not finite makes the score NaN, as in reference.readable.
template <class C>
__device__ __forceinline__ float score_with_tanh(const Decode& d, const QueryTile& queries, int s,
                                                 unsigned needed, unsigned marks, unsigned without,
                                                 float score) {
  using X = typename C::Memory;
  const AttentionParams& p = d.p;
  const Owned<C> own;
#pragma unroll 1
  for (int i = 0; i < C::values; ++i) {
    const int r = i % C::rows, t = i / C::rows;
    if (t >= queries.count || !(needed >> r & 1)) continue;
    if (!(marks >> r & 1) && !(without >> t & 1)) continue;
    const int64_t q = queries.b * p.query.batch_stride + (queries.first + t) * p.query.row_stride;
    const int64_t m = queries.b * p.memory_proj.batch_stride + (s + r) * p.memory_proj.row_stride;
    float sum = 0.0f;
#pragma unroll 1
    for (int k = threadIdx.x % kLanes; k < p.K; k += kLanes) {
      const float proj = load_one<X>(p.memory_proj.data, m + k);
      sum += load_one<X>(p.v, k) * tanhf(load_one<X>(p.query.data, q + k) + proj);
      if (mask_per_query(p)) sum += proj - proj;  // 0, or NaN where it is not finite
    }
    sum = sum_of_warp(sum);
    if (own.row == r && own.query == t) score = sum;
  }
  return score;
}

}  // namespace
}  // namespace fused_attn
