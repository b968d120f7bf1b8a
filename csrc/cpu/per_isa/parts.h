// Vectors of rows of any width, and the activations of a recurrent cell.
//
// The last vector of a row may be a part. It is computed by the same code as the others, so that an
// element has the same bits wherever in a row it is.
#pragma once

#include "vec.h"

namespace fused_attn {
namespace {

// The first n elements, 1 <= n <= lanes, and zeros. Nothing behind them is read.
FA_INLINE Vec<float> load_part(const float* p, int64_t n) {
  if (n >= kLanes<float>) return load(p);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Vec<float>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane));
#else
  return n == 1 ? Vec<float>{p[0]} : n == 2 ? Vec<float>{p[0], p[1]} : Vec<float>{p[0], p[1], p[2]};
#endif
}

// Stores the first n elements, 1 <= n <= lanes.
FA_INLINE void store_part(float* p, Vec<float> x, int64_t n) {
  if (n >= kLanes<float>) return store(p, x);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x);
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane), (__m256)x);
#else
  for (int i = 0; i < n; ++i) p[i] = x[i];
#endif
}

// Calls f(first element, elements) for each vector of a row of n elements.
template <class F>
FA_INLINE void for_each_vector(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kLanes<float>)
    f(i, n - i < kLanes<float> ? n - i : int64_t(kLanes<float>));
}

typedef VecOf<float>::bits Bits;
constexpr uint32_t kSign = 0x80000000u;

FA_INLINE Vec<float> magnitude_of(Vec<float> x) { return (Vec<float>)((Bits)x & ~kSign); }
FA_INLINE Vec<float> with_sign_of(Vec<float> x, Vec<float> sign) {
  return (Vec<float>)(((Bits)x & ~kSign) | ((Bits)sign & kSign));
}

// x / y for 1 <= y <= 4, at most one unit in the last place from the exact quotient. The residual
// of a first quotient, which is exact but for a rounding, corrects the 14 bits of the estimate to
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

// 1 / (1 + exp(-x)). The denominator is in [1, 2]. 0 for x < -87, which is 1.6e-38.
FA_INLINE Ratio sigmoid(Vec<float> x) {
  const Vec<float> small = exponential(-magnitude_of(x));
  return {x < Vec<float>{} ? small : splat(1.0f), small + 1.0f};
}

// tanh(x) = -(exp(-2x) - 1) / (exp(-2x) + 1) for x >= 0, with the sign of x. The denominator is in
// [1, 2]. With exp(-2x) = 2^n (1 + p) the numerator is 2^n p + (2^n - 1): for small x n is 0, and
// the relative accuracy is that of p, a polynomial without a constant term.
FA_INLINE Ratio tanh_ratio(Vec<float> x) {
  using V = Vec<float>;
  // At -40 the numerator is already 1.
  const V y = at_least<float>(-2.0f * magnitude_of(x), splat(-40.0f));
  const V shifted = y * 1.44269504088896341f + 12582912.0f;  // as in exponential_inside
  const V n = shifted - 12582912.0f;
  const V r = (y - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  const V power = (V)(((Bits)shifted << 23) + 0x3f800000u);
  const V less_one = power * p + (power - 1.0f);
  return {with_sign_of(less_one, x), less_one + 2.0f};
}

}  // namespace
}  // namespace fused_attn
