// The online softmax of a warp, and how the sums of several warps and of several blocks are merged.
#pragma once

#include "score.h"

namespace fused_attn {
namespace {

// The factor of sums relative to the maximum `from` when the maximum becomes `to`.
__device__ __forceinline__ float rescale(float from, float to) {
  return expf(from - (to == -INFINITY ? 0.0f : to));
}

// Running sums of a warp: of exp(score - running_max), and of the same times the rows. A lane holds
// columns of the context of every query, and running_max and running_sum of the query whose scores
// it owns; until the warps are merged, running_sum covers the lane's own row only.
template <class C>
struct Sums {
  static constexpr int kFours = C::elements / 4;
  float running_max = -INFINITY, running_sum = 0.0f;
  float4 context[C::queries][kFours];

  __device__ __forceinline__ Sums() { clear(); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < C::queries; ++t) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) context[t][i] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
  }

  __device__ __forceinline__ void add(int t, int i, float factor, const float4& x) {
    float4& sum = context[t][i];
    sum = {fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z),
           fmaf(factor, x.w, sum.w)};
  }

  __device__ __forceinline__ void scale(int t, float factor) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      float4& x = context[t][i];
      x = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
    }
  }

  // Multiplies the context of each query by the factor that its lanes hold.
  __device__ __forceinline__ void scale_all(float factor) {
#pragma unroll
    for (int t = 0; t < C::queries; ++t)
      scale(t, __shfl_sync(kAllLanes, factor, Owned<C>::lane_of(0, t)));
  }

  // The weight of the score that this lane owns, relative to the maximum so far.
  __device__ __forceinline__ float weigh(float score, bool counts) {
    const float new_max = fmaxf(running_max, Owned<C>::largest(score));
    const float factor = rescale(running_max, new_max);
    const float weight = counts ? rescale(score, new_max) : 0.0f;
    // A new maximum is rare after the first rows.
    if (__any_sync(kAllLanes, factor != 1.0f)) scale_all(factor);
    running_sum = running_sum * factor + weight;
    running_max = new_max;
    return weight;
  }

  // Writes the columns of query t, times a factor, to a row of the result.
  __device__ __forceinline__ void write(int t, float factor, bool aligned, int width,
                                        typename C::Memory::Storage* row) const {
    using X = typename C::Memory;
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int piece = 0; piece < C::pieces; ++piece) {
      const int d = (piece * kLanes + lane) * kVector<X>;
      alignas(16) typename X::Storage out[kVector<X>];
#pragma unroll
      for (int part = 0; part < C::parts; ++part) {
        const float4 x = context[t][piece * C::parts + part];
        out[4 * part] = X::narrow(x.x * factor);
        out[4 * part + 1] = X::narrow(x.y * factor);
        out[4 * part + 2] = X::narrow(x.z * factor);
        out[4 * part + 3] = X::narrow(x.w * factor);
      }
      if (aligned) {
        if (d < width) *reinterpret_cast<uint4*>(row + d) = *reinterpret_cast<const uint4*>(out);
      } else {
#pragma unroll
        for (int j = 0; j < kVector<X>; ++j) {
          if (d + j < width) row[d + j] = out[j];
        }
      }
    }
  }
};

// Adds the sums of all warps of a block to its first warp, in a fixed order. Overwrites shared
// memory.
template <class C>
__device__ void merge_warps(Sums<C>& sums, float* shared) {
  const Owned<C> own;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int warps = int(blockDim.x) / kLanes;
  sums.running_sum = Owned<C>::sum(sums.running_sum);
  float* stats = shared;  // running_max and running_sum of each warp and query
  if (own.row == 0 && own.first) {
    stats[2 * (warp * C::queries + own.query)] = sums.running_max;
    stats[2 * (warp * C::queries + own.query) + 1] = sums.running_sum;
  }
  __syncthreads();
  float merged_max = -INFINITY, merged_sum = 0.0f;
  for (int w = 0; w < warps; ++w)
    merged_max = fmaxf(merged_max, stats[2 * (w * C::queries + own.query)]);
  for (int w = 0; w < warps; ++w) {
    const float* stat = stats + 2 * (w * C::queries + own.query);
    merged_sum += stat[1] * rescale(stat[0], merged_max);
  }
  sums.scale_all(rescale(sums.running_max, merged_max));
  sums.running_max = merged_max;
  sums.running_sum = merged_sum;
  float4* buffers = reinterpret_cast<float4*>(shared + kSharedHeader);
  constexpr int kBuffer = C::queries * Sums<C>::kFours * kLanes;
  for (int half = warps / 2; half >= 1; half /= 2) {
    float4* buffer = buffers + (warp >= half ? warp - half : warp) * kBuffer + lane;
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kBuffer / kLanes; ++i)
        buffer[i * kLanes] = sums.context[i / Sums<C>::kFours][i % Sums<C>::kFours];
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < kBuffer / kLanes; ++i)
        sums.add(i / Sums<C>::kFours, i % Sums<C>::kFours, 1.0f, buffer[i * kLanes]);
    }
    __syncthreads();
  }
}

// Stores the sums of a block in the workspace: the context as the lanes hold it, then running_max,
// then running_sum.
template <class C>
__device__ void store_partial(const Sums<C>& sums, float* partial) {
  const Owned<C> own;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int t = 0; t < C::queries; ++t) {
#pragma unroll
    for (int i = 0; i < Sums<C>::kFours; ++i)
      reinterpret_cast<float4*>(partial)[(t * Sums<C>::kFours + i) * kLanes + lane] =
          sums.context[t][i];
  }
  float* stats = partial + C::queries * C::elements * kLanes;
  if (own.row == 0 && own.first) {
    stats[own.query] = sums.running_max;
    stats[C::queries + own.query] = sums.running_sum;
  }
}

// Sums over the partials `warp`, `warp` + warps and so on, relative to the maximum of all.
template <class C>
__device__ void gather_partials(Sums<C>& sums, const float* partials, int count) {
  const Owned<C> own;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int warps = int(blockDim.x) / kLanes;
  const int64_t step = C::partial;
  const float* stats = partials + C::queries * C::elements * kLanes;
  float merged_max[C::queries];
#pragma unroll
  for (int t = 0; t < C::queries; ++t) {
    merged_max[t] = -INFINITY;
    for (int i = lane; i < count; i += kLanes)
      merged_max[t] = fmaxf(merged_max[t], __ldcg(stats + i * step + t));
#pragma unroll
    for (int mask = kLanes / 2; mask >= 1; mask /= 2)
      merged_max[t] = fmaxf(merged_max[t], __shfl_xor_sync(kAllLanes, merged_max[t], mask));
    if (t == own.query) sums.running_max = merged_max[t];
  }
  sums.clear();
  sums.running_sum = 0.0f;
  // Several partials in flight, within 64 registers: only the loads take time here.
  [[maybe_unused]] constexpr int kInFlight =
      C::queries * C::elements <= 16 ? 4 : 64 / (C::queries * C::elements);
#pragma unroll kInFlight
  for (int i = warp; i < count; i += warps) {
    const float* partial = partials + i * step;
#pragma unroll
    for (int t = 0; t < C::queries; ++t) {
      const float factor = rescale(__ldcg(stats + i * step + t), merged_max[t]);
      // In the lane of one row, because merge_warps sums over the rows of a query.
      if (t == own.query && own.row == 0)
        sums.running_sum += factor * __ldcg(stats + i * step + C::queries + t);
#pragma unroll
      for (int k = 0; k < Sums<C>::kFours; ++k)
        sums.add(t, k, factor,
                 __ldcg(reinterpret_cast<const float4*>(partial) +
                        (t * Sums<C>::kFours + k) * kLanes + lane));
    }
  }
}

// Stores this block's sums among the `count` partials of its row. In the last block to do so,
// returns true with the sums of all blocks in the first warp. The counter is then 0 again.
template <class C>
__device__ bool merge_blocks(Sums<C>& sums, float* partials, int split, int count,
                             unsigned* counter, float* shared) {
  int* is_last = reinterpret_cast<int*>(shared + kSharedHeader - 1);
  if (threadIdx.x < kLanes) store_partial<C>(sums, partials + split * C::partial);
  // The way cooperative_groups synchronises a grid: the barriers order the threads of a block, and
  // the fences of one thread, which cover everything it has observed, order the blocks.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = atomicInc(counter, count - 1) == unsigned(count - 1);
    __threadfence();
  }
  __syncthreads();
  if (!*is_last) return false;
  gather_partials<C>(sums, partials, count);
  merge_warps<C>(sums, shared);
  return true;
}

}  // namespace
}  // namespace fused_attn
