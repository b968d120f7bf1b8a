// Products of bfloat16 matrices by the instruction that multiplies pairs: two products for each
// lane, with as many lanes as for float32, so twice the rate. Compiled only for instruction sets
// that have it.
#pragma once

#include "chunk.h"
#include "tiles.h"

namespace fused_attn {
namespace {

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  static constexpr int kStep = kPairWidth;
  typedef __m512bh type;
  FA_INLINE_METHOD static type load(const BFloat16* p) { return (__m512bh)_mm512_loadu_ps(p); }
  FA_INLINE_METHOD static Vec<float> add_product(Vec<float> sum, type x, type y) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, x, y);
  }
};

// The rows of a chunk in their storage type: in place, or copied and padded with zeros.
FA_INLINE Block<BFloat16> stored_rows(const Rows& rows, int64_t b, const Picked& picked,
                                      int64_t width, int64_t padded, BFloat16* scratch) {
  const auto* base = static_cast<const BFloat16*>(rows.data) + rows.before(b);
  if (picked.dense && width == padded)
    return {base + picked.first * rows.row_stride, rows.row_stride};
  for (int64_t i = 0; i < picked.count; ++i) {
    BFloat16* to = scratch + i * padded;
    memcpy(to, base + picked[i] * rows.row_stride, size_t(width) * sizeof(BFloat16));
    memset(to + width, 0, size_t(padded - width) * sizeof(BFloat16));
  }
  return {scratch, padded};
}

// Rows two by two, column by column: vector v of 16 columns, pair t at out + (v pairs + t) 32. An
// odd last row is paired with zeros.
FA_INLINE void pack_pairs(const Block<BFloat16>& rows, int64_t n, int64_t width, BFloat16* out) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = uint16_t(i / 2 + i % 2 * 32);
    order[1][i] = uint16_t(16 + i / 2 + i % 2 * 32);
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  const int64_t pairs = (n + 1) / 2;
  for (int64_t t = 0; t < pairs; ++t) {
    const BFloat16* row = rows.data + 2 * t * rows.stride;
    for (int64_t d = 0; d < width; d += kPairWidth) {
      const __m512i a = _mm512_loadu_si512(row + d);
      const __m512i b =
          2 * t + 1 < n ? _mm512_loadu_si512(row + rows.stride + d) : _mm512_setzero_si512();
      BFloat16* to = out + (d / 16 * pairs + t) * kPairWidth;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + pairs * kPairWidth, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Converts the weights of m queries (m, n; stride ldp) to bfloat16 in place, with a zero after an
// odd last one. The result of a row is at its beginning.
FA_INLINE void pair_weights(float* p, int64_t ldp, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = p + i * ldp;
    for (int64_t j = n; j < round_up(n, kLanes<float>); ++j) row[j] = 0.0f;
    for (int64_t j = 0; j < n; j += kLanes<float>) {
      const auto narrow = (__m256i)_mm512_cvtneps_pbh((__m512)load(row + j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<BFloat16*>(row) + j), narrow);
    }
  }
}

// The same for the sums over queries: weights of queries 2t and 2t + 1 for row j at out + t ldp +
// j. After an odd last query comes a zero.
FA_INLINE void pair_queries(const float* p, int64_t ldp, int64_t m, int64_t n, float* out) {
  for (int64_t i = 0; i < m; i += 2, p += 2 * ldp, out += ldp)
    for (int64_t j = 0; j < n; j += kLanes<float>) {
      const auto narrow = [&](const float* row) {
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(row + j)));
      };
      const __m512i second = i + 1 < m ? narrow(p + ldp) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + j, _mm512_or_si512(narrow(p), _mm512_slli_epi32(second, 16)));
    }
}

template <int M, int N>
FA_INLINE void pair_tile(Coefficients<float> p, const BFloat16* x, int64_t pairs, float* c,
                         int64_t ldc, Previous<float> previous) {
  Vec<float> acc[M][N] = {};
  if (previous.keep)
    for (int i = 0; i < M; ++i)
      for (int k = 0; k < N; ++k) {
        acc[i][k] = load(c + i * ldc + k * 16);
        if (previous.factor) acc[i][k] *= previous.factor[i];
      }
  for (int64_t t = 0; t < pairs; ++t) {
    __m512bh y[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) y[k] = Operand<BFloat16>::load(x + (k * pairs + t) * kPairWidth);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const __m512bh both =
          (__m512bh)_mm512_set1_ps(p.p[i * p.row + t * p.col]);  // the bits of two weights
#pragma GCC unroll 8
      for (int k = 0; k < N; ++k) acc[i][k] = Operand<BFloat16>::add_product(acc[i][k], both, y[k]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) store(c + i * ldc + k * 16, acc[i][k]);
}

template <int M>
FA_INLINE void pair_rows(Coefficients<float> p, const BFloat16* x, int64_t pairs, int64_t width,
                         float* c, int64_t ldc, Previous<float> previous) {
  int64_t d = 0;
  for (; d + 64 <= width; d += 64)
    pair_tile<M, 4>(p, x + d * 2 * pairs, pairs, c + d, ldc, previous);
  for (; d < width; d += 32) pair_tile<M, 2>(p, x + d * 2 * pairs, pairs, c + d, ldc, previous);
}

// c (m, width; stride ldc) (+)= weights (m, 2 pairs) times the packed rows. A coefficient is the
// bits of two weights.
static void add_scaled_pairs(Coefficients<float> p, int64_t m, const BFloat16* x, int64_t pairs,
                             int64_t width, float* c, int64_t ldc, Previous<float> previous) {
  int64_t i = 0;
  const auto rows = [&](auto count) {
    constexpr int M = decltype(count)::value;
    pair_rows<M>({p.p + i * p.row, p.row, p.col}, x, pairs, width, c + i * ldc, ldc,
                 {previous.keep, previous.factor ? previous.factor + i : nullptr});
    i += M;
  };
  while (i + 6 <= m) rows(Count<6>{});
  if (i + 4 <= m) rows(Count<4>{});
  if (i + 2 <= m) rows(Count<2>{});
  if (i < m) rows(Count<1>{});
}
#endif

}  // namespace
}  // namespace fused_attn
