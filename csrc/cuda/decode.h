// A decoding step: a few queries, and a memory that is read once.
//
// A warp keeps a few rows of memory in registers, scores them, and adds them to the context from
// the same registers; its softmax is online. The warps of a block are merged in shared memory. If
// the positions of a row are split over blocks, each block writes its sums to the workspace, and
// the last one to arrive merges them in the order of the splits: the bits do not depend on which
// block that is.
#pragma once

#include "concat.h"
#include "merge.h"

namespace fused_attn {
namespace {

// The length of batch row b, clamped to 0..S.
__device__ __forceinline__ int length_of(const AttentionParams& p, int b) {
  if (!p.device_lengths) return int(p.S);
  const int64_t at = b * p.length_stride;
  int64_t length;
  if (p.length_bytes == 8) {
    length = static_cast<const int64_t*>(p.device_lengths)[at];
  } else if (p.length_bytes == 4) {
    length = static_cast<const int32_t*>(p.device_lengths)[at];
  } else if (p.length_bytes == 2) {
    length = static_cast<const int16_t*>(p.device_lengths)[at];
  } else {
    const uint8_t byte = static_cast<const uint8_t*>(p.device_lengths)[at];
    length = p.lengths_are_signed ? int8_t(byte) : byte;
  }
  return int(length < 0 ? 0 : length > p.S ? p.S : length);
}

// Whether query t may attend to position s, which is below the length.
__device__ __forceinline__ bool allows(const AttentionParams& p, int b, int t, int s) {
  return !p.mask || p.mask[b * p.mask_b + t * p.mask_t + s * p.mask_s] != 0;
}

__device__ __forceinline__ bool keeps(const AttentionParams& p, int b, int t, int s) {
  return !p.keep || p.keep[(b * p.T + t) * p.S + s] != 0;
}

// The positions that a block attends to, and the number of blocks that share a batch row.
struct Span {
  int begin, stop, blocks;
};

__device__ __forceinline__ Span span_of(const Decode& d, int b, int split, int step) {
  const int length = length_of(d.p, b);
  int each = (length + d.splits - 1) / d.splits;
  each = (each + step - 1) / step * step;
  if (each < step) each = step;
  const int begin = split * each, blocks = (length + each - 1) / each;
  return {begin, begin + each < length ? begin + each : length, blocks > 1 ? blocks : 1};
}

// Rows whose bit in `needed` is not set are not read, and become zeros.
template <class C>
__device__ __forceinline__ void load_rows(const Decode& d, int b, int s, unsigned needed,
                                          uint4 (&raw)[C::rows][C::pieces]) {
  using X = typename C::Memory;
  const auto* rows = static_cast<const typename X::Storage*>(d.p.memory.data) +
                     b * d.p.memory.batch_stride + s * d.p.memory.row_stride;
  const int lane = threadIdx.x % kLanes, E = int(d.p.E);
  // Two separate loops, so that all loads of one are issued before the first one is waited for.
  if (d.aligned_memory) {
#pragma unroll
    for (int r = 0; r < C::rows; ++r) {
#pragma unroll
      for (int i = 0; i < C::pieces; ++i)
        raw[r][i] = load_aligned<X>(rows + r * d.p.memory.row_stride,
                                    (i * kLanes + lane) * kVector<X>, needed >> r & 1 ? E : 0);
    }
  } else {
#pragma unroll
    for (int r = 0; r < C::rows; ++r) {
#pragma unroll
      for (int i = 0; i < C::pieces; ++i)
        raw[r][i] = load_unaligned<X>(rows + r * d.p.memory.row_stride,
                                      (i * kLanes + lane) * kVector<X>, needed >> r & 1 ? E : 0);
    }
  }
}

// With a per-query mask, a row that is not finite spoils only the queries that attend to it:
// it is zeroed in the sums, and its bit in the result makes their score NaN.
template <class C>
__device__ __forceinline__ unsigned zero_spoiled(uint4 (&raw)[C::rows][C::pieces]) {
  unsigned spoiled = 0;
#pragma unroll
  for (int r = 0; r < C::rows; ++r) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < C::pieces; ++i) finite = finite && is_finite<typename C::Memory>(raw[r][i]);
    if (__all_sync(kAllLanes, finite)) continue;
    spoiled |= 1u << r;
#pragma unroll
    for (int i = 0; i < C::pieces; ++i) raw[r][i] = {0, 0, 0, 0};
  }
  return spoiled;
}

// context[t] += weight of (t, r) x row r. `weight` belongs to the score that the lane owns.
template <class C>
__device__ __forceinline__ void add_rows(const uint4 (&raw)[C::rows][C::pieces], float weight,
                                         Sums<C>& sums) {
#pragma unroll
  for (int r = 0; r < C::rows; ++r) {
    float w[C::queries];
#pragma unroll
    for (int t = 0; t < C::queries; ++t)
      w[t] = __shfl_sync(kAllLanes, weight, Owned<C>::lane_of(r, t));
#pragma unroll
    for (int i = 0; i < C::pieces; ++i) {
#pragma unroll
      for (int part = 0; part < C::parts; ++part) {
        const float4 m = widen_four<typename C::Memory>(raw[r][i], part);
#pragma unroll
        for (int t = 0; t < C::queries; ++t) sums.add(t, i * C::parts + part, w[t], m);
      }
    }
  }
}

// Scores of the rows from s on. Every lane gets the one it owns.
template <class C>
__device__ __forceinline__ float score_rows(const Decode& d, const QueryTile& queries, int s,
                                            unsigned needed, const uint4 (&raw)[C::rows][C::pieces],
                                            const float* operands, float sum_v, unsigned without) {
  float parts[C::values];
  if constexpr (C::kind == Score::dot) {
    dot_parts<C>(raw, operands, parts);
    return float(d.p.scale) * sum_over_lanes<C::values>(parts);
  } else {
    unsigned marks;
    const auto* rows_exp = static_cast<const typename C::Exp::Storage*>(d.p.memory_exp.data) +
                           queries.b * d.p.memory_exp.batch_stride + s * d.p.memory_exp.row_stride;
    concat_parts<C>(d, rows_exp, needed, operands, parts, marks);
    marks = __reduce_or_sync(kAllLanes, marks);
    const float score = sum_v - 2.0f * sum_over_lanes<C::values>(parts);
    if (!(marks | without)) return score;
    return score_with_tanh<C>(d, queries, s, needed, marks, without, score);
  }
}

// Attends to all positions of the span, which the warps of the block share out row by row.
template <class C>
__device__ __forceinline__ void attend(const Decode& d, const QueryTile& queries, const Span& span,
                                       const float* operands, unsigned without, Sums<C>& sums) {
  const AttentionParams& p = d.p;
  const Owned<C> own;
  // The place of a query beyond T uses the mask of the last query.
  const bool is_there = own.query < queries.count;
  const int t = queries.first + (is_there ? own.query : queries.count - 1);
  const int warp = threadIdx.x / kLanes, step = int(blockDim.x) / kLanes * C::rows;
  const float sum_v = C::kind == Score::concat ? sum_of_v<C>(p, operands) : 0.0f;
  int s = span.begin + warp * C::rows;
  bool counts = s + own.row < span.stop && allows(p, queries.b, t, s + own.row);
  for (; s < span.stop; s += step) {
    const unsigned all = __ballot_sync(kAllLanes, counts);
    const bool mine = counts;
    // The mask is read a step ahead; rows that do not count are never read.
    const int next = s + step + own.row;
    counts = next < span.stop && allows(p, queries.b, t, next);
    if (all == 0) continue;
    unsigned needed = 0;
#pragma unroll
    for (int r = 0; r < C::rows; ++r) {
#pragma unroll
      for (int q = 0; q < C::queries; ++q) needed |= (all >> Owned<C>::lane_of(r, q) & 1) << r;
    }
    uint4 raw[C::rows][C::pieces];
    load_rows<C>(d, queries.b, s, needed, raw);
    const float kept = mine && keeps(p, queries.b, t, s + own.row) ? float(p.keep_scale) : 0.0f;
    const unsigned spoiled = mask_per_query(p) ? zero_spoiled<C>(raw) : 0;
    float score = score_rows<C>(d, queries, s, needed, raw, operands, sum_v, without);
    if (spoiled >> own.row & 1) score = NAN;
    if (!mine) score = -INFINITY;
    if (d.scores && mine && own.first && is_there)
      d.scores[(queries.b * p.T + t) * p.S + s + own.row] = score;
    add_rows<C>(raw, sums.weigh(score, mine) * kept, sums);
  }
}

// Writes context, logsumexp and weights of a block's queries from the sums of the first warp.
template <class C>
__device__ void write_results(const Decode& d, const QueryTile& queries, const Sums<C>& sums,
                              float* shared) {
  using X = typename C::Memory;
  const AttentionParams& p = d.p;
  const Owned<C> own;
  float* finals = shared;  // the largest score of each query, and the inverse of the sum
  if (threadIdx.x < kLanes) {
    const float inverse =
        sums.running_sum == 0.0f ? 0.0f : 1.0f / sums.running_sum;  // no position counts: zeros
    if (own.row == 0 && own.first && own.query < queries.count) {
      finals[2 * own.query] = sums.running_max;
      finals[2 * own.query + 1] = inverse;
      const int64_t at = queries.b * p.T + queries.first + own.query;
      if (p.logsumexp)
        static_cast<float*>(p.logsumexp)[at] =
            sums.running_sum == 0.0f ? -INFINITY : sums.running_max + logf(sums.running_sum);
    }
#pragma unroll
    for (int t = 0; t < C::queries; ++t) {
      const float factor = __shfl_sync(kAllLanes, inverse, Owned<C>::lane_of(0, t));
      if (t < queries.count)
        sums.write(t, factor, d.aligned_context, int(p.E),
                   static_cast<typename X::Storage*>(p.context) +
                       (queries.b * p.T + queries.first + t) * p.E);
    }
  }
  if (!p.weights) return;
  __syncthreads();
  const int length = length_of(p, queries.b);
  for (int t = 0; t < queries.count; ++t) {
    const int64_t row = (queries.b * p.T + queries.first + t) * p.S;
    auto* weights = static_cast<typename X::Storage*>(p.weights) + row;
    for (int s = threadIdx.x; s < p.S; s += blockDim.x) {
      float weight = 0.0f;
      if (s < length && allows(p, queries.b, queries.first + t, s))
        weight = expf(__ldcg(d.scores + row + s) - finals[2 * t]) * finals[2 * t + 1];
      weights[s] = X::narrow(weight);
    }
  }
}

template <class X, int Elements, int AtOnce, Score kScore>
__global__ void __launch_bounds__(kMostWarps* kLanes, blocks_per_multiprocessor(Elements, AtOnce))
    decode(const __grid_constant__ Decode d) {
  using C = Shape<X, Elements, AtOnce, kScore>;
  // Query tiles with the same positions are neighbours: the later ones find the rows in L2.
  const int query_tile = int(blockIdx.x % d.query_tiles);
  const int split = int(blockIdx.x / d.query_tiles % d.splits),
            b = int(blockIdx.x / d.query_tiles / d.splits);
  const Span span = span_of(d, b, split, int(blockDim.x) / kLanes * C::rows);
  if (split >= span.blocks) return;
  const int first = query_tile * C::queries, left = int(d.p.T) - first;
  const QueryTile queries = {b, first, left < C::queries ? left : C::queries};
  float *shared = shared_memory(), *operands = shared + kSharedHeader;
  unsigned without = 0;
  if constexpr (C::kind == Score::dot) {
    fill_dot<C>(d.p, queries, operands);
  } else {
    without = fill_concat<C>(d.p, queries, operands);
  }
  __syncthreads();
  Sums<C> sums;
  attend<C>(d, queries, span, operands, without, sums);
  merge_warps<C>(sums, shared);
  if (span.blocks > 1) {
    const int64_t row = int64_t(b) * d.query_tiles + query_tile;
    float* partials = d.partials + row * d.splits * C::partial;
    if (!merge_blocks<C>(sums, partials, split, span.blocks, d.counters + row, shared)) return;
  }
  write_results<C>(d, queries, sums, shared);
}

}  // namespace
}  // namespace fused_attn
