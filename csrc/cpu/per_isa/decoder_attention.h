// The attention of one sentence in the native decoder; see DecoderKernels.
//
// Rows may have any width. A score is the sum of one vector of sums over the width, and an element
// of a context is a sum over the positions in their order: neither depends on how queries,
// positions and columns are grouped into register tiles.
#pragma once

#include "parts.h"

namespace fused_attn {
namespace {

// Queries that a tile has at most, so that its accumulators and operands fit the registers.
#if defined(__AVX512F__)
constexpr int kTileQueries = 5;
#elif defined(__AVX2__)
constexpr int kTileQueries = 3;
#else
constexpr int kTileQueries = 2;  // without instructions that multiply and add in one
#endif

// Positions whose keys stay in the cache for all groups of queries. A multiple of 8, as are tiles.
constexpr int64_t kKeyBlock = 16;
// Likewise for values, whose sums are added to the result block by block: one sum of some thousands
// of terms would lose digits.
constexpr int64_t kValueBlock = 64;

template <int N>
struct Number {
  static constexpr int value = N;
};

// Calls f(first query, Number<of queries>) for groups of nearly equal size.
template <class F>
FA_INLINE void for_each_query_group(int64_t queries, F f) {
  const int64_t groups = (queries + kTileQueries - 1) / kTileQueries;
  for (int64_t group = 0, first = 0; group < groups; ++group) {
    const int64_t end = (group + 1) * queries / groups;
    switch (end - first) {
      case 1:
        f(first, Number<1>{});
        break;
      case 2:
        f(first, Number<2>{});
        break;
#if defined(__AVX2__)
      case 3:
        f(first, Number<3>{});
        break;
#endif
#if defined(__AVX512F__)
      case 4:
        f(first, Number<4>{});
        break;
      case 5:
        f(first, Number<5>{});
        break;
#endif
    }
    first = end;
  }
}

// Scores of M queries at 4 G positions from `keys` on. If there are fewer, the last is repeated,
// and `count` are written.
template <int M, int G>
FA_INLINE void score_tile(const float* query, int64_t query_stride, const float* keys,
                          int64_t key_stride, int64_t count, int64_t width, const float* bias,
                          float* scores, int64_t stride) {
  Vec<float> sums[G][M][4] = {};
  const float* rows[4 * G];
#pragma GCC unroll 8
  for (int j = 0; j < 4 * G; ++j) rows[j] = keys + (j < count ? j : count - 1) * key_stride;
  for_each_vector(width, [&](int64_t d, auto part) {
    Vec<float> q[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) q[i] = load_part(query + i * query_stride + d, part);
#pragma GCC unroll 8
    for (int j = 0; j < 4 * G; ++j) {
      const Vec<float> key = load_part(rows[j] + d, part);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sums[j / 4][i][j % 4] += q[i] * key;
    }
  });
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    float score[4 * G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) sum_lanes_of_four<float>(sums[g][i], score + 4 * g);
    if (count == 4 * G) {
      for (int j = 0; j < 4 * G; ++j) scores[i * stride + j] = bias ? score[j] + bias[j] : score[j];
    } else {
      for (int64_t j = 0; j < count; ++j)
        scores[i * stride + j] = bias ? score[j] + bias[j] : score[j];
    }
  }
}

void dot_scores(const float* query, int64_t query_stride, int64_t queries, const float* keys,
                int64_t key_stride, int64_t n, int64_t width, const float* bias, float* scores,
                int64_t stride) {
  for (int64_t block = 0; block < n; block += kKeyBlock)
    for_each_query_group(queries, [&](int64_t first, auto group) {
      constexpr int M = decltype(group)::value, G = M * 8 <= 5 * kTileQueries ? 2 : 1;
      const auto tile = [&](int64_t s, int64_t count, auto fours) {
        score_tile<M, decltype(fours)::value>(
            query + first * query_stride, query_stride, keys + s * key_stride, key_stride, count,
            width, bias ? bias + s : nullptr, scores + first * stride + s, stride);
      };
      const int64_t end = n - block < kKeyBlock ? n : block + kKeyBlock;
      int64_t s = block;
      if constexpr (G == 2)
        for (; s + 4 < end; s += 8) tile(s, end - s < 8 ? end - s : 8, Number<2>{});
      for (; s < end; s += 4) tile(s, end - s < 4 ? end - s : 4, Number<1>{});
    });
}

void concat_scores(const float* query, const float* keys, int64_t key_stride, int64_t n,
                   int64_t width, const float* v, const float* coverage, const float* direction,
                   float* scores) {
  for (int64_t s = 0; s < n; ++s, keys += key_stride) {
    Vec<float> sum{};
    if (coverage && direction) {
      const float amount = coverage[s];
      for_each_vector(width, [&](int64_t d, auto part) {
        const Vec<float> x = load_part(query + d, part) + load_part(keys + d, part) +
                             amount * load_part(direction + d, part);
        sum += load_part(v + d, part) * tanh_ratio(x).value();
      });
    } else {
      for_each_vector(width, [&](int64_t d, auto part) {
        const Vec<float> x = load_part(query + d, part) + load_part(keys + d, part);
        sum += load_part(v + d, part) * tanh_ratio(x).value();
      });
    }
    scores[s] = sum_lanes<float>(sum);
  }
}

void softmax_row(float* scores, int64_t n) {
  const float largest = largest_of(scores, n);
  if (largest == -kInfinity<float>) {  // nothing to attend to, unless a score is NaN
    float sum = 0.0f;
    for (int64_t s = 0; s < n; ++s) sum += scores[s] != scores[s] ? scores[s] : 0.0f;
    for (int64_t s = 0; s < n; ++s) scores[s] = sum;
    return;
  }
  Vec<float> sums{};
  for_each_vector(n, [&](int64_t s, auto part) {
    const Vec<float> weight = exp_of_negative(load_part(scores + s, part) - largest);
    store_part(scores + s, weight, part);
    sums += only(weight, part, 0.0f);
  });
  const float sum = sum_lanes<float>(sums);
  for_each_vector(n, [&](int64_t s, auto part) {
    store_part(scores + s, load_part(scores + s, part) / sum, part);
  });
}

void bell_row(float* weights, int64_t n, float first, float center, float rate) {
  Vec<float> position;
  for (int i = 0; i < kLanes<float>; ++i) position[i] = first + float(i);
  for_each_vector(n, [&](int64_t s, auto part) {
    const Vec<float> x = (position + float(s) - center) * rate;
    store_part(weights + s, load_part(weights + s, part) * exp_of_negative(-0.5f * (x * x)), part);
  });
}

// Columns of N vectors of M rows of `out`; a Part is the last of a row, and then N is 1.
template <int M, int N, class P>
FA_INLINE void sum_tile(const float* weights, int64_t weight_stride, int64_t n, const float* values,
                        int64_t value_stride, bool add, float* out, int64_t stride, P part) {
  constexpr int L = kLanes<float>;
  Vec<float> sums[M][N] = {};
  for (int64_t s = 0; s < n; ++s) {
    Vec<float> value[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) value[k] = load_part(values + s * value_stride + k * L, part);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const float weight = weights[i * weight_stride + s];
#pragma GCC unroll 8
      for (int k = 0; k < N; ++k) sums[i][k] += weight * value[k];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) {
      float* to = out + i * stride + k * L;
      store_part(to, add ? load_part(to, part) + sums[i][k] : sums[i][k], part);
    }
}

void weighted_sum(const float* weights, int64_t weight_stride, int64_t queries, int64_t n,
                  const float* values, int64_t value_stride, int64_t width, const float* start,
                  float* out, int64_t stride) {
  constexpr int64_t L = kLanes<float>;
  int64_t s = 0;
  do {  // also without positions: the result is then the start
    const int64_t rows = n - s < kValueBlock ? n - s : kValueBlock;
    for_each_query_group(queries, [&](int64_t first, auto group) {
      constexpr int M = decltype(group)::value;
      constexpr int N = M == 1 ? 8 : kVectorBytes == 32 && M == 3 ? 3 : 4;
      const auto tile = [&](int64_t d, auto vectors, auto part) {
        sum_tile<M, decltype(vectors)::value>(
            weights + first * weight_stride + s, weight_stride, rows, values + s * value_stride + d,
            value_stride, start || s > 0, out + first * stride + d, stride, part);
      };
      int64_t d = 0;
      for (; d + N * L <= width; d += N * L) tile(d, Number<N>{}, Whole{});
      for (; d + 2 * L <= width; d += 2 * L) tile(d, Number<2>{}, Whole{});
      for (; d + L <= width; d += L) tile(d, Number<1>{}, Whole{});
      if (d < width) tile(d, Number<1>{}, Part{width - d});
    });
    s += rows;
  } while (s < n);
}

}  // namespace
}  // namespace fused_attn
