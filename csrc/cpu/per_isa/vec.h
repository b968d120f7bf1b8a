// One vector register of the instruction set that this object is compiled for. The arithmetic uses
// the vector extensions of GCC and Clang, and intrinsics only for what they cannot express.
// Everything has internal linkage: a symbol shared between objects would let the linker mix
// instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FA_INLINE static inline __attribute__((always_inline))
#define FA_INLINE_METHOD inline __attribute__((always_inline))

namespace fused_attn {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t ints __attribute__((vector_size(kVectorBytes)));
};

template <class A>
using Vec = typename VecOf<A>::type;

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
FA_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VecOf<A>::loose*>(p);
}
template <class A>
FA_INLINE void store(A* p, Vec<A> x) {
  *reinterpret_cast<typename VecOf<A>::loose*>(p) = x;
}
template <class A>
FA_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}

// Lane by lane: `b` where b is smaller (larger), else `a`; a NaN in `a` stays.
template <class A>
FA_INLINE Vec<A> at_most(Vec<A> a, Vec<A> b) {
  return a > b ? b : a;
}
template <class A>
FA_INLINE Vec<A> at_least(Vec<A> a, Vec<A> b) {
  return a < b ? b : a;
}

template <class A>
FA_INLINE A sum_lanes(Vec<A> x) {
  for (int half = kLanes<A> / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
template <class A>
FA_INLINE A max_lanes(Vec<A> x) {
  A best = x[0];
  for (int i = 1; i < kLanes<A>; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
template <class A>
FA_INLINE A min_lanes(Vec<A> x) {
  A best = x[0];
  for (int i = 1; i < kLanes<A>; ++i) best = x[i] < best ? x[i] : best;
  return best;
}

#if defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) float sum_lanes<float>(Vec<float> x) {
  return _mm512_reduce_add_ps((__m512)x);
}
template <>
inline __attribute__((always_inline)) float max_lanes<float>(Vec<float> x) {
  return _mm512_reduce_max_ps((__m512)x);
}
template <>
inline __attribute__((always_inline)) float min_lanes<float>(Vec<float> x) {
  return _mm512_reduce_min_ps((__m512)x);
}
#endif

// Sums the lanes of four vectors into out[0..3].
template <class A>
FA_INLINE void sum_lanes_of_four(const Vec<A> (&x)[4], A* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes<A>(x[i]);
}
#if defined(__AVX2__)
// Interleaving adds four registers at once: fewer than four instructions for a sum instead of ten.
template <>
inline __attribute__((always_inline)) void sum_lanes_of_four<float>(const Vec<float> (&x)[4],
                                                                    float* out) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
  const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
  const __m512 all = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
#else
  const __m256 a = (__m256)x[0], b = (__m256)x[1], c = (__m256)x[2], d = (__m256)x[3];
  const __m256d ab = (__m256d)(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
  const __m256d cd = (__m256d)(_mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d));
  const __m256 half = (__m256)_mm256_unpacklo_pd(ab, cd) + (__m256)_mm256_unpackhi_pd(ab, cd);
#endif
  _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
#endif

// 1 / x to a few units in the last place. One Newton step doubles the 12 or 14 bits of the
// instruction's estimate, at a third of the cost of a division. x must be in [1, 1e37].
template <class A>
FA_INLINE Vec<A> reciprocal(Vec<A> x) {
  return A(1) / x;
}
#if defined(__AVX2__)
template <>
inline __attribute__((always_inline)) Vec<float> reciprocal<float>(Vec<float> x) {
#if defined(__AVX512F__)
  Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);
#else
  Vec<float> y = (Vec<float>)_mm256_rcp_ps((__m256)x);
#endif
  return y * (2.0f - x * y);
}
#endif

// exp(x), two units in the last place, for -87 <= x <= 88.
FA_INLINE Vec<float> exponential_inside(Vec<float> x) {
  using V = Vec<float>;
  // Adding 1.5 * 2^23 rounds to an integer in the low bits of the mantissa.
  const V shifted = x * 1.44269504088896341f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Unsigned, because outside the range, where callers discard the result, the sum wraps around.
  const auto power = ((VecOf<float>::bits)shifted << 23) + 0x3f800000u;
  return p * (V)power;
}

// The same for any x <= 88: 0 below the normal range, and exp(NaN) is NaN.
FA_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> low = splat(-87.0f);
  const Vec<float> value = exponential_inside(at_least<float>(x, low));
  return x < low ? Vec<float>{} : value;
}
FA_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

FA_INLINE Vec<double> exponential_inside(Vec<double> x) { return exponential(x); }

FA_INLINE float log_of(float x) { return ::logf(x); }
FA_INLINE double log_of(double x) { return ::log(x); }
FA_INLINE float exp_of(float x) { return ::expf(x); }
FA_INLINE double exp_of(double x) { return ::exp(x); }

template <class A>
constexpr A kInfinity = A(__builtin_inf());

}  // namespace
}  // namespace fused_attn
