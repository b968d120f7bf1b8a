// Vectors of rows of any width, and the activations of a recurrent cell.
//
// The last vector of a row may be a part of one. The same arithmetic computes it, so that an
// element has the same bits wherever it is in a row.
#pragma once

#include "vec.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace fused_attn {
namespace {

// How much of a vector belongs to a row: all of it, or the first `count` lanes.
// Both are also the number of these lanes.
struct Whole {
  FA_INLINE_METHOD operator int64_t() const { return kLanes<float>; }
};
struct Part {
  int64_t count;
  FA_INLINE_METHOD operator int64_t() const { return count; }
};

// Loads and stores of these lanes alone; a load has zeros in the others. `only` is x in these lanes
// and `other` in the others.
FA_INLINE Vec<float> load_part(const float* p, Whole) { return load(p); }
FA_INLINE void store_part(float* p, Vec<float> x, Whole) { store(p, x); }
FA_INLINE Vec<float> only(Vec<float> x, Whole, float) { return x; }
#if defined(__AVX512F__)
FA_INLINE __mmask16 lanes_of(Part part) { return __mmask16((1u << part.count) - 1); }
FA_INLINE Vec<float> load_part(const float* p, Part part) {
  return (Vec<float>)_mm512_maskz_loadu_ps(lanes_of(part), p);
}
FA_INLINE void store_part(float* p, Vec<float> x, Part part) {
  _mm512_mask_storeu_ps(p, lanes_of(part), (__m512)x);
}
FA_INLINE Vec<float> only(Vec<float> x, Part part, float other) {
  return (Vec<float>)_mm512_mask_blend_ps(lanes_of(part), (__m512)splat(other), (__m512)x);
}
#elif defined(__AVX2__)
FA_INLINE __m256i lanes_of(Part part) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(part.count)), lane);
}
FA_INLINE Vec<float> load_part(const float* p, Part part) {
  return (Vec<float>)_mm256_maskload_ps(p, lanes_of(part));
}
FA_INLINE void store_part(float* p, Vec<float> x, Part part) {
  _mm256_maskstore_ps(p, lanes_of(part), (__m256)x);
}
FA_INLINE Vec<float> only(Vec<float> x, Part part, float other) {
  return (typename VecOf<float>::ints)lanes_of(part) ? x : splat(other);
}
#else
FA_INLINE Vec<float> load_part(const float* p, Part part) {
  Vec<float> x{};
  for (int i = 0; i < part.count; ++i) x[i] = p[i];
  return x;
}
FA_INLINE void store_part(float* p, Vec<float> x, Part part) {
  for (int i = 0; i < part.count; ++i) p[i] = x[i];
}
FA_INLINE Vec<float> only(Vec<float> x, Part part, float other) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = i < part.count ? x[i] : other;
  return x;
}
#endif

// The same for a number of lanes that may be all of them: a branch, where loops have none.
FA_INLINE Vec<float> load_part(const float* p, int64_t count) {
  return count < kLanes<float> ? load_part(p, Part{count}) : load(p);
}
FA_INLINE void store_part(float* p, Vec<float> x, int64_t count) {
  count < kLanes<float> ? store_part(p, x, Part{count}) : store(p, x);
}

// Calls f(first element, Whole or Part) for each vector of a row of n elements.
template <class F>
FA_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

// The larger of x and y; a NaN in x stays, and one in y does not count. One instruction, which GCC
// does not find in the equivalent at_least.
FA_INLINE Vec<float> larger(Vec<float> x, Vec<float> y) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)y, (__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)y, (__m256)x);
#elif defined(__SSE__)
  return (Vec<float>)_mm_max_ps((__m128)y, (__m128)x);
#else
  return at_least<float>(x, y);
#endif
}

// The largest of n elements, NaNs not counted; -infinity if there is none.
FA_INLINE float largest_of(const float* x, int64_t n) {
  constexpr int L = kLanes<float>;
  Vec<float> best[4];  // the latency of one maximum would be that of the loop
  for (int k = 0; k < 4; ++k) best[k] = splat(-kInfinity<float>);
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) best[k] = larger(best[k], load(x + i + k * L));
  for_each_vector(n - i, [&](int64_t j, auto part) {
    best[0] = larger(best[0], only(load_part(x + i + j, part), part, -kInfinity<float>));
  });
  return max_lanes<float>(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

typedef VecOf<float>::bits Bits;
constexpr uint32_t kSign = 0x80000000u;

FA_INLINE Vec<float> magnitude_of(Vec<float> x) { return (Vec<float>)((Bits)x & ~kSign); }
FA_INLINE Vec<float> negative_magnitude(Vec<float> x) { return (Vec<float>)((Bits)x | kSign); }

// The magnitude of x with the sign of `sign`.
FA_INLINE Vec<float> with_sign_of(Vec<float> x, Vec<float> sign) {
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(int(kSign));
  return (Vec<float>)_mm512_ternarylogic_epi32(mask, (__m512i)sign, (__m512i)x, 0xca);
#else
  return (Vec<float>)(((Bits)x & ~kSign) | ((Bits)sign & kSign));
#endif
}

// x / y for 0.25 <= y <= 4, at most one unit in the last place from the exact quotient. The
// estimate of the reciprocal has 14 bits; the residual of the quotient that it gives corrects it to
// 28, at a quarter of the cost of a division.
FA_INLINE Vec<float> divide(Vec<float> x, Vec<float> y) {
#if defined(__AVX512F__)
  const Vec<float> inverse = (Vec<float>)_mm512_rcp14_ps((__m512)y), quotient = x * inverse;
  return quotient - inverse * (y * quotient - x);  // in this order -0 stays -0
#else
  return x / y;
#endif
}

// A number as a quotient, so that products of quotients are divided once.
struct Ratio {
  Vec<float> numerator, denominator;
  FA_INLINE_METHOD Vec<float> value() const { return divide(numerator, denominator); }
};
FA_INLINE Ratio operator*(Ratio a, Ratio b) {
  return {a.numerator * b.numerator, a.denominator * b.denominator};
}

// Coefficients of (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2: with them exp(r) has an error of a
// fortieth of a unit in the last place. Fitted by Lawson's iteration.
constexpr float kExp2 = 0.4999999345096434f, kExp3 = 0.166665206788604f,
                kExp4 = 0.041668387490976844f, kExp5 = 0.008368711156461874f,
                kExp6 = 0.0013814610507439696f;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: rounds to an integer, in the low bits

// exp(x) for x <= 0, two units in the last place; 0 below -87, so that no result is subnormal,
// which would take a hundred times as long. NaN stays.
FA_INLINE Vec<float> exp_of_negative(Vec<float> x) {
  using V = Vec<float>;
  const V y = larger(x, splat(-87.0f));
  const V shifted = y * kLog2E + kRounder, n = shifted - kRounder;
  const V r = (y - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  V p = kExp6 * r + kExp5;
  p = p * r + kExp4;
  p = p * r + kExp3;
  p = p * r + kExp2;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.0f), _CMP_NLT_UQ);
  return (V)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const V value = p * (V)(((Bits)shifted << 23) + 0x3f800000u);
  return x < -87.0f ? V{} : value;
#endif
}

// 1 / (1 + exp(-x)). The denominator is in [1, 2].
FA_INLINE Ratio sigmoid(Vec<float> x) {
  const Vec<float> small = exp_of_negative(negative_magnitude(x));
  return {x < 0.0f ? small : splat(1.0f), small + 1.0f};
}

// tanh(x) = (1 - exp(-2x)) / (1 + exp(-2x)) for x >= 0, with the sign of x. Both sides are halved:
// the denominator is in [1/2, 1]. With exp(-2x) = 2^n exp(2r), half of exp(-2x) - 1 is
//
//   2^n (exp(2r) - 1) / 2 + (2^n - 1) / 2,
//
// and a polynomial without a constant term gives the first: near 0, where n is 0, the result has
// its relative accuracy. One constant for log(2) / 2 is enough, because exp(-2x) is small beside 1
// where n is large.
FA_INLINE Ratio tanh_ratio(Vec<float> x) {
  using V = Vec<float>;
  const V y = larger(negative_magnitude(x), splat(-20.0f));  // the result is 1 from 9.02 on
  const V shifted = y * (2.0f * kLog2E) + kRounder, n = shifted - kRounder;
  const V r = y - n * 0.34657359027997264f;
  V p = (32.0f * kExp6) * r + 16.0f * kExp5;
  p = p * r + 8.0f * kExp4;
  p = p * r + 4.0f * kExp3;
  p = p * r + 2.0f * kExp2;
  p = p * (r * r) + r;
  const V power = (V)(((Bits)shifted << 23) + 0x3f800000u);
  const V half = power * p + (0.5f * power - 0.5f);
  return {with_sign_of(half, x), half + 1.0f};
}

}  // namespace
}  // namespace fused_attn
