// Conversion between the storage types of tensors and the arithmetic type.
#pragma once

#include "vec.h"

namespace fused_attn {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Whether there is an instruction that multiplies bfloat16 in pairs, and how many elements it
// takes.
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif
constexpr int64_t kPairWidth = 32;

template <bool First, class X, class Y>
struct Pick {
  typedef X type;
};
template <class X, class Y>
struct Pick<false, X, Y> {
  typedef Y type;
};
template <bool First, class X, class Y>
using PickType = typename Pick<First, X, Y>::type;

// The arithmetic type of a storage type.
template <class X>
struct ArithmeticOf {
  typedef float type;
};
template <>
struct ArithmeticOf<double> {
  typedef double type;
};
template <class X>
using Arithmetic = typename ArithmeticOf<X>::type;

FA_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
FA_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FA_INLINE float widen(float x) { return x; }
FA_INLINE double widen(double x) { return x; }
FA_INLINE float widen(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
FA_INLINE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Shifted into place the exponent is 112 too small; the product also rights subnormals.
  const uint32_t finite = as_bits(as_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return as_float((magnitude >= 0x7c00u ? special : finite) | uint32_t(x.bits & 0x8000u) << 16);
}

FA_INLINE void narrow(float x, float& out) { out = x; }
FA_INLINE void narrow(double x, double& out) { out = x; }
FA_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties even
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
FA_INLINE void narrow(float x, Float16& out) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t round = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  const uint32_t normal = (round >> 13) - (112u << 10);
  // Below 2^-14 adding 0.5 leaves the subnormal half in the low bits, rounded by the addition.
  const uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds past 65504
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  out.bits = uint16_t(half | (bits >> 16 & 0x8000u));
}

// One vector of the arithmetic type from as many stored elements.
FA_INLINE Vec<float> load_widened(const float* p) { return load(p); }
FA_INLINE Vec<double> load_widened(const double* p) { return load(p); }
template <class X>
FA_INLINE Vec<float> load_widened(const X* p) {
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (__is_same(X, Float16))
    return (Vec<float>)_mm512_cvtph_ps(raw);
  else
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (__is_same(X, Float16))
    return (Vec<float>)_mm256_cvtph_ps(raw);
  else
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  float lanes[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
#endif
}

// A full vector of stored 16-bit elements, two to a lane.
template <class X>
FA_INLINE VecOf<float>::bits load_bits(const X* p) {
  VecOf<float>::bits raw;
  memcpy(&raw, p, sizeof raw);  // its address need not be that of a float
  return raw;
}

// dst[0..n) = src[0..n), then zeros up to dst[padded).
template <class X, class A>
FA_INLINE void widen_row(const X* src, int64_t n, A* dst, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(dst + i, load_widened(src + i));
  for (; i < n; ++i) dst[i] = widen(src[i]);
  for (i = n; i < padded; ++i) dst[i] = A(0);
}

// dst[i] = src[i] * factor, rounded to the storage type.
template <class X, class A>
FA_INLINE void narrow_row(const A* src, A factor, int64_t n, X* dst) {
  for (int64_t i = 0; i < n; ++i) narrow(src[i] * factor, dst[i]);
}

}  // namespace
}  // namespace fused_attn
