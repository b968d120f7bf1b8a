// Scores of a few rows of memory for a few queries, summed over the lanes of a warp.
//
// Operands of the queries are in shared memory, in float32, in the order in which a lane reads the
// columns of a row: the columns of a 16-byte piece in fours, the same four of all lanes together,
// so that a warp reads them without bank conflicts. Beyond the width there are zeros.
#pragma once

#include <type_traits>

#include "device.h"
#include "plan.h"

namespace fused_attn {
namespace {

// The place of column d in that order, if 16 bytes hold `vector` elements.
template <int vector>
__device__ __forceinline__ int operand_at(int d) {
  const int piece = d / (kLanes * vector), lane = d / vector % kLanes, j = d % vector;
  return piece * kLanes * vector + j / 4 * (4 * kLanes) + lane * 4 + j % 4;
}

__device__ __forceinline__ float4 operand(const float* row, int piece_part) {
  const int lane = threadIdx.x % kLanes;
  return reinterpret_cast<const float4*>(row)[piece_part * kLanes + lane];
}

// The query tile of a block: queries first .. first + count - 1 of batch row b.
struct QueryTile {
  int b, first, count;
};

// Whether each query has a mask of its own. Python sets the stride to 0 where the queries share
// one.
__device__ __forceinline__ bool mask_per_query(const AttentionParams& p) { return p.mask_t != 0; }

template <class X, int Elements, int AtOnce, Score kScore>
struct Shape {
  using Memory = X;
  // The type of the exponentials of the memory's projection.
  using Exp = std::conditional_t<X::kDType == DType::bf16, BF16, F32>;
  static constexpr Score kind = kScore;
  static constexpr int elements = Elements, queries = AtOnce;
  static constexpr int rows = rows_at_once(Elements, int(sizeof(typename X::Storage)));
  static constexpr int pieces = Elements / kVector<X>;  // of 16 bytes, of a row, in a lane
  static constexpr int parts = kVector<X> / 4;
  static constexpr int values = rows * queries;
  static constexpr int64_t partial = partial_floats(Elements, AtOnce);
  static_assert(values <= kLanes, "a lane owns the score of at most one row for one query");
};

// The score that a lane owns: neighbouring lanes hold the scores of a query, one row after the
// other, with as many copies of each as it takes to fill the warp.
template <class C>
struct Owned {
  static constexpr int kCopies = kLanes / C::values;
  int row, query;
  bool first;  // of the copies
  __device__ __forceinline__ Owned() {
    const int lane = threadIdx.x % kLanes, index = lane / kCopies;
    row = index % C::rows;
    query = index / C::rows;
    first = lane % kCopies == 0;
  }
  static __device__ __forceinline__ int lane_of(int row, int query) {
    return (query * C::rows + row) * kCopies;
  }
  // The reductions over the rows of a query.
  static __device__ __forceinline__ float largest(float x) {
#pragma unroll
    for (int mask = kCopies; mask < kCopies * C::rows; mask *= 2)
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
    return x;
  }
  static __device__ __forceinline__ float sum(float x) {
#pragma unroll
    for (int mask = kCopies; mask < kCopies * C::rows; mask *= 2)
      x += __shfl_xor_sync(kAllLanes, x, mask);
    return x;
  }
};

// Copies the operands of a dot score, the queries, to shared memory.
template <class C>
__device__ void fill_dot(const AttentionParams& p, const QueryTile& queries, float* operands) {
  using X = typename C::Memory;
  constexpr int kWidth = C::elements * kLanes;
  for (int i = threadIdx.x; i < C::queries * kWidth; i += blockDim.x) {
    const int t = i / kWidth, d = i % kWidth;
    float value = 0.0f;
    if (t < queries.count && d < p.K)
      value = load_one<X>(p.query.data, queries.b * p.query.batch_stride +
                                            (queries.first + t) * p.query.row_stride + d);
    operands[t * kWidth + operand_at<kVector<X>>(d)] = value;
  }
}

// sums[t * rows + r] = this lane's part of query t . row r.
template <class C>
__device__ __forceinline__ void dot_parts(const uint4 (&raw)[C::rows][C::pieces],
                                          const float* operands, float (&sums)[C::values]) {
  using X = typename C::Memory;
#pragma unroll
  for (int i = 0; i < C::values; ++i) sums[i] = 0.0f;
#pragma unroll
  for (int piece = 0; piece < C::pieces; ++piece) {
#pragma unroll
    for (int part = 0; part < C::parts; ++part) {
      float4 q[C::queries];
#pragma unroll
      for (int t = 0; t < C::queries; ++t)
        q[t] = operand(operands + t * C::elements * kLanes, piece * C::parts + part);
#pragma unroll
      for (int r = 0; r < C::rows; ++r) {
        const float4 m = widen_four<X>(raw[r][piece], part);
#pragma unroll
        for (int t = 0; t < C::queries; ++t) {
          float& sum = sums[t * C::rows + r];
          sum = fmaf(q[t].x, m.x, sum);
          sum = fmaf(q[t].y, m.y, sum);
          sum = fmaf(q[t].z, m.z, sum);
          sum = fmaf(q[t].w, m.w, sum);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fused_attn
