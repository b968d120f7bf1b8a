// The statistics of a row of logits that a search needs; see DecoderKernels.
#pragma once

#include "parts.h"

namespace fused_attn {
namespace {

float log_sum_exp(const float* x, int64_t n) {
  const float largest = largest_of(x, n);
  if (largest - largest != 0.0f) {  // infinite
    bool finite = false, nan = false;
    for (int64_t i = 0; i < n; ++i) {
      finite |= x[i] - x[i] == 0.0f;
      nan |= x[i] != x[i];
    }
    return finite && !nan ? largest : __builtin_nanf("");
  }
  // Sums of blocks are added in double precision, so that long rows lose no digits.
  constexpr int64_t kBlock = 64 * kLanes<float>;
  double sum = 0.0;
  for (int64_t first = 0; first < n; first += kBlock) {
    Vec<float> sums{};
    for_each_vector(n - first < kBlock ? n - first : kBlock, [&](int64_t i, auto part) {
      const Vec<float> y = load_part(x + first + i, part) - largest;
      sums += exp_of_negative(only(y, part, -kInfinity<float>));
    });
    sum += double(sum_lanes<float>(sums));
  }
  return float(double(largest) + log_of(sum));
}

// The order of logits as that of integers: zeros are equal, and NaN is the largest.
FA_INLINE int32_t rank_of(float x) {
  if (x != x) return INT32_MAX;
  const float y = x + 0.0f;  // -0 becomes 0
  int32_t bits;
  memcpy(&bits, &y, sizeof bits);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

// Bit i: lane i of x is larger than `threshold`, or one of them is NaN.
FA_INLINE uint32_t lanes_above(Vec<float> x, Vec<float> threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)threshold, _CMP_NLE_UQ)));
#elif defined(__SSE__)
  return uint32_t(_mm_movemask_ps(_mm_cmpnle_ps((__m128)x, (__m128)threshold)));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes<float>; ++i) lanes |= uint32_t(!(x[i] <= threshold[i])) << i;
  return lanes;
#endif
}

// Calls offer(place) for the elements from `first` on, in their order, that may be larger than
// threshold(), which offer may raise. (Some may not be larger: NaN is not compared.)
template <class Threshold, class Offer>
FA_INLINE void for_each_above(const float* x, int64_t first, int64_t n, Threshold threshold,
                              Offer offer) {
  constexpr int L = kLanes<float>, U = 4;
  int64_t i = first;
  Vec<float> limit = splat(threshold());
  for (; i + U * L <= n; i += U * L) {
    uint32_t any = 0;
#pragma GCC unroll 4
    for (int k = 0; k < U; ++k) any |= lanes_above(load(x + i + k * L), limit);
    if (__builtin_expect(any == 0, 1)) continue;
    for (int k = 0; k < U; ++k) {
      uint32_t lanes = lanes_above(load(x + i + k * L), limit);
      if (lanes == 0) continue;
      for (; lanes; lanes &= lanes - 1) offer(i + k * L + __builtin_ctz(lanes));
      limit = splat(threshold());
    }
  }
  for (; i < n; ++i) offer(i);
}

// The `count` largest for a small count: a sorted list, into which larger elements are inserted.
constexpr int64_t kListed = 64;
FA_INLINE void top_by_list(const float* x, int64_t n, int64_t count, int32_t* places) {
  int32_t ranks[kListed];
  const auto insert = [&](int64_t place, int64_t k) {  // the list has k elements above the last
    const int32_t rank = rank_of(x[place]);
    for (; k > 0 && rank > ranks[k - 1]; --k) {
      ranks[k] = ranks[k - 1];
      places[k] = places[k - 1];
    }
    ranks[k] = rank;
    places[k] = int32_t(place);
  };
  for (int64_t i = 0; i < count; ++i) insert(i, i);
  for_each_above(
      x, count, n, [&] { return x[places[count - 1]]; },
      [&](int64_t place) {
        if (rank_of(x[place]) > ranks[count - 1]) insert(place, count - 1);
      });
}

// For any count: a heap with the smallest on top, then sorted by taking it off again and again.
FA_INLINE void top_by_heap(const float* x, int64_t n, int64_t count, int32_t* places) {
  const auto before = [&](int32_t a, int32_t b) {  // a comes before b in the result
    const int32_t rank_a = rank_of(x[a]), rank_b = rank_of(x[b]);
    return rank_a > rank_b || (rank_a == rank_b && a < b);
  };
  const auto sink = [&](int64_t k, int64_t size) {
    const int32_t place = places[k];
    for (int64_t child = 2 * k + 1; child < size; child = 2 * k + 1) {
      if (child + 1 < size && before(places[child], places[child + 1])) ++child;
      if (!before(place, places[child])) break;
      places[k] = places[child];
      k = child;
    }
    places[k] = place;
  };
  for (int64_t i = 0; i < count; ++i) places[i] = int32_t(i);
  for (int64_t k = count / 2 - 1; k >= 0; --k) sink(k, count);
  for_each_above(
      x, count, n, [&] { return x[places[0]]; },
      [&](int64_t place) {
        if (!before(int32_t(place), places[0])) return;
        places[0] = int32_t(place);
        sink(0, count);
      });
  for (int64_t size = count - 1; size > 0; --size) {
    const int32_t last = places[0];
    places[0] = places[size];
    places[size] = last;
    sink(0, size);
  }
}

int64_t top(const float* x, int64_t n, int64_t count, int32_t* places) {
  count = count < n ? count : n;
  if (count <= 0) return 0;
  if (count <= kListed)
    top_by_list(x, n, count, places);
  else
    top_by_heap(x, n, count, places);
  return count;
}

int64_t argmax(const float* x, int64_t n) {
  int32_t place = 0;
  top(x, n, 1, &place);
  return place;
}

}  // namespace
}  // namespace fused_attn
