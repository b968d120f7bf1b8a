// What the kernels need from a GPU beyond arithmetic: storage types, loads of 16 bytes, and sums
// over the lanes of a warp. tests/native/cuda_on_host.h replaces the CUDA compiler on machines
// without a GPU, so that the tests run these same kernels there.
#pragma once

#include <cstdint>

#include "attention_params.h"

#ifdef __CUDACC__
namespace fused_attn {
namespace {

// The PTX instruction directly: including cuda_fp16.h takes a second to compile.
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float4 shared_bytes[];
  return reinterpret_cast<float*>(shared_bytes);
}

}  // namespace
}  // namespace fused_attn
#endif

namespace fused_attn {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Storage types: how an element lies in memory, and its conversions from and to float.
struct F32 {
  using Storage = uint32_t;
  static constexpr DType kDType = DType::f32;
  static __device__ __forceinline__ float widen(Storage bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Storage narrow(float value) { return __float_as_uint(value); }
};

struct BF16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::bf16;
  static __device__ __forceinline__ float widen(Storage bits) {
    return __uint_as_float(uint32_t(bits) << 16);
  }
  // To nearest even; a NaN stays one.
  static __device__ __forceinline__ Storage narrow(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return Storage((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct F16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::f16;
  static __device__ __forceinline__ float widen(Storage bits) { return half_to_float(bits); }
  static __device__ __forceinline__ Storage narrow(float value) { return float_to_half(value); }
};

template <class X>
__device__ __forceinline__ float load_one(const void* data, int64_t at) {
  return X::widen(static_cast<const typename X::Storage*>(data)[at]);
}

// Elements that 16 bytes hold.
template <class X>
constexpr int kVector = 16 / int(sizeof(typename X::Storage));

// 32-bit word number `word` of the 16 bytes, by a constant index: indexing a register array would
// move it to memory.
__device__ __forceinline__ uint32_t word_of(const uint4& raw, int word) {
  return word == 0 ? raw.x : word == 1 ? raw.y : word == 2 ? raw.z : raw.w;
}

// Elements 4 part .. 4 part + 3 of the 16 bytes.
template <class X>
__device__ __forceinline__ float4 widen_four(const uint4& raw, int part) {
  if constexpr (sizeof(typename X::Storage) == 4) {
    return {X::widen(raw.x), X::widen(raw.y), X::widen(raw.z), X::widen(raw.w)};
  } else {
    using Storage = typename X::Storage;
    const uint32_t low = word_of(raw, 2 * part), high = word_of(raw, 2 * part + 1);
    return {X::widen(Storage(low)), X::widen(Storage(low >> 16)), X::widen(Storage(high)),
            X::widen(Storage(high >> 16))};
  }
}

// 16 bytes of a row from column d on, 0 beyond its width. All rows must be aligned to 16 bytes, and
// their width must be a multiple of 16 bytes.
template <class X>
__device__ __forceinline__ uint4 load_aligned(const typename X::Storage* row, int d, int width) {
  return d < width ? __ldg(reinterpret_cast<const uint4*>(row + d)) : uint4{0, 0, 0, 0};
}

// The same for any row, element by element.
template <class X>
__device__ __forceinline__ uint4 load_unaligned(const typename X::Storage* row, int d, int width) {
  constexpr int kPerWord = 4 / int(sizeof(typename X::Storage));
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < kVector<X>; ++j) {
    if (d + j < width)
      words[j / kPerWord] |= uint32_t(row[d + j]) << (32 / kPerWord * (j % kPerWord));
  }
  return {words[0], words[1], words[2], words[3]};
}

// Whether all elements are finite: neither infinite nor NaN.
template <class X>
__device__ __forceinline__ bool is_finite(const uint4& raw) {
  bool finite = true;
#pragma unroll
  for (int part = 0; part < kVector<X> / 4; ++part) {
    const float4 x = widen_four<X>(raw, part);
    // x - x is 0 for a finite x, NaN for any other.
    finite = finite && (x.x - x.x) + (x.y - x.y) + (x.z - x.z) + (x.w - x.w) == 0.0f;
  }
  return finite;
}

// Sums N values over the lanes whose numbers differ in the bits of 2 Mask - 1. The sum of value i
// ends in the lanes whose upper bits are i: each step passes half of the values to the other half
// of the lanes, so that N values take N - 1 + log2(32 / N) exchanges instead of 5 N. Recursive,
// because a loop that the compiler does not unroll would put the values into memory.
template <int N, int Mask = kLanes / 2, int Size>
__device__ __forceinline__ float sum_over_lanes(float (&values)[Size]) {
  if constexpr (N > 1) {
    const bool upper = threadIdx.x & Mask;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float sent = upper ? values[i] : values[i + N / 2];
      const float kept = upper ? values[i + N / 2] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, Mask);
    }
    return sum_over_lanes<N / 2, Mask / 2>(values);
  } else {
    float total = values[0];
#pragma unroll
    for (int mask = Mask; mask >= 1; mask /= 2) total += __shfl_xor_sync(kAllLanes, total, mask);
    return total;
  }
}

// The sum of one value over the warp, in every lane.
__device__ __forceinline__ float sum_of_warp(float value) {
  float one[1] = {value};
  return sum_over_lanes<1>(one);
}

}  // namespace
}  // namespace fused_attn
