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
#else
constexpr int kTileQueries = 2;
#endif

// Rows of values between two additions to the result: sums of some thousands of terms would lose
// digits, and the rows of a block stay in the cache for all its columns.
constexpr int64_t kValueBlock = 256;

template <int N>
struct Queries {
  static constexpr int value = N;
};

// Calls f(first query, Queries<number>) for groups of nearly equal numbers of queries.
template <class F>
FA_INLINE void for_each_query_group(int64_t queries, F f) {
  const int64_t groups = (queries + kTileQueries - 1) / kTileQueries;
  for (int64_t group = 0, first = 0; group < groups; ++group) {
    const int64_t end = (group + 1) * queries / groups;
    switch (end - first) {
      case 1:
        f(first, Queries<1>{});
        break;
      case 2:
        f(first, Queries<2>{});
        break;
#if defined(__AVX512F__)
      case 3:
        f(first, Queries<3>{});
        break;
      case 4:
        f(first, Queries<4>{});
        break;
      case 5:
        f(first, Queries<5>{});
        break;
#endif
    }
    first = end;
  }
}

// Scores of M queries at 4 G positions from `keys` on, or at fewer: `count` of them are written.
template <int M, int G>
FA_INLINE void score_tile(const float* query, int64_t query_stride, const float* keys,
                          int64_t key_stride, int64_t count, int64_t width, const float* bias,
                          float* scores, int64_t stride) {
  Vec<float> sums[G][M][4] = {};
  const float* rows[4 * G];
#pragma GCC unroll 8
  for (int j = 0; j < 4 * G; ++j) rows[j] = keys + (j < count ? j : count - 1) * key_stride;
  const auto step = [&](int64_t d, auto load_vector) {
    Vec<float> q[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) q[i] = load_vector(query + i * query_stride + d);
#pragma GCC unroll 8
    for (int j = 0; j < 4 * G; ++j) {
      const Vec<float> key = load_vector(rows[j] + d);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sums[j / 4][i][j % 4] += q[i] * key;
    }
  };
  int64_t d = 0;
  for (; d + kLanes<float> <= width; d += kLanes<float>)
    step(d, [](const float* p) { return load(p); });
  if (d < width) step(d, [&](const float* p) { return load_part(p, width - d); });
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    float score[4 * G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) sum_lanes_of_four<float>(sums[g][i], score + 4 * g);
    for (int64_t j = 0; j < count; ++j)
      scores[i * stride + j] = bias ? score[j] + bias[j] : score[j];
  }
}

void dot_scores(const float* query, int64_t query_stride, int64_t queries, const float* keys,
                int64_t key_stride, int64_t n, int64_t width, const float* bias, float* scores,
                int64_t stride) {
  for_each_query_group(queries, [&](int64_t first, auto group) {
    constexpr int M = decltype(group)::value;
    const auto tile = [&](int64_t s, int64_t count, auto fours) {
      score_tile<M, decltype(fours)::value>(
          query + first * query_stride, query_stride, keys + s * key_stride, key_stride, count,
          width, bias ? bias + s : nullptr, scores + first * stride + s, stride);
    };
    int64_t s = 0;
    if constexpr (M == 1)
      for (; s + 4 < n; s += 8) tile(s, n - s < 8 ? n - s : 8, Queries<2>{});
    for (; s < n; s += 4) tile(s, n - s < 4 ? n - s : 4, Queries<1>{});
  });
}

void concat_scores(const float* query, const float* keys, int64_t key_stride, int64_t n,
                   int64_t width, const float* v, const float* coverage, const float* direction,
                   float* scores) {
  for (int64_t s = 0; s < n; ++s, keys += key_stride) {
    Vec<float> sum{};
    const float amount = coverage && direction ? coverage[s] : 0.0f;
    for_each_vector(width, [&](int64_t d, int64_t part) {
      Vec<float> x = load_part(query + d, part) + load_part(keys + d, part);
      if (direction && coverage) x += amount * load_part(direction + d, part);
      sum += load_part(v + d, part) * tanh_ratio(x).value();
    });
    scores[s] = sum_lanes<float>(sum);
  }
}

void softmax_row(float* scores, int64_t n) {
  Vec<float> largest = splat(-kInfinity<float>);
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>)
    largest = at_least<float>(largest, load(scores + i));
  float top = max_lanes<float>(largest);
  for (; i < n; ++i) top = scores[i] > top ? scores[i] : top;
  if (top == -kInfinity<float>) {  // nothing to attend to, unless a score is NaN
    float sum = 0.0f;
    for (i = 0; i < n; ++i) sum += scores[i] != scores[i] ? scores[i] : 0.0f;
    for (i = 0; i < n; ++i) scores[i] = sum;
    return;
  }
  Vec<float> sums{};
  for_each_vector(n, [&](int64_t s, int64_t part) {
    const Vec<float> weight = exponential(load_part(scores + s, part) - top);
    store_part(scores + s, weight, part);
    sums += part < kLanes<float> ? load_part(scores + s, part) : weight;
  });
  const float sum = sum_lanes<float>(sums);
  for_each_vector(n, [&](int64_t s, int64_t part) {
    store_part(scores + s, load_part(scores + s, part) / sum, part);
  });
}

void bell_row(float* weights, int64_t n, float first, float center, float rate) {
  Vec<float> position;
  for (int i = 0; i < kLanes<float>; ++i) position[i] = first + float(i);
  for_each_vector(n, [&](int64_t s, int64_t part) {
    const Vec<float> x = (position + float(s) - center) * rate;
    store_part(weights + s, load_part(weights + s, part) * exponential(-0.5f * (x * x)), part);
  });
}

// Columns of N vectors, the last with `part` elements, of M rows of `out`.
template <int M, int N>
FA_INLINE void sum_tile(const float* weights, int64_t weight_stride, int64_t n, const float* values,
                        int64_t value_stride, bool add, float* out, int64_t stride, int64_t part) {
  constexpr int L = kLanes<float>;
  Vec<float> sums[M][N] = {};
  for (int64_t s = 0; s < n; ++s) {
    Vec<float> value[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k)
      value[k] = N == 1 ? load_part(values + s * value_stride, part)
                        : load(values + s * value_stride + k * L);
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
      const int64_t elements = N == 1 ? part : int64_t(L);
      store_part(to, add ? load_part(to, elements) + sums[i][k] : sums[i][k], elements);
    }
}

void weighted_sum(const float* weights, int64_t weight_stride, int64_t queries, int64_t n,
                  const float* values, int64_t value_stride, int64_t width, const float* start,
                  float* out, int64_t stride) {
  constexpr int64_t L = kLanes<float>;
  for_each_query_group(queries, [&](int64_t first, auto group) {
    constexpr int M = decltype(group)::value, N = M == 1 ? 8 : 4;
    float* to = out + first * stride;
    int64_t s = 0;
    do {  // also with no positions: the result is then the start
      const int64_t rows = n - s < kValueBlock ? n - s : kValueBlock;
      const float* weight = weights + first * weight_stride + s;
      const float* value = values + s * value_stride;
      const bool add = start || s > 0;
      int64_t d = 0;
      for (; d + N * L <= width; d += N * L)
        sum_tile<M, N>(weight, weight_stride, rows, value + d, value_stride, add, to + d, stride,
                       L);
      for (; d < width; d += L)
        sum_tile<M, 1>(weight, weight_stride, rows, value + d, value_stride, add, to + d, stride,
                       width - d < L ? width - d : L);
      s += rows;
    } while (s < n);
  });
}

}  // namespace
}  // namespace fused_attn
