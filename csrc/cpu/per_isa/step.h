// One query: a decoding step, or one of local attention. A row is used once, so the pass is bound
// by reading memory, and the weighted sum must not delay the reading: while a group of rows is read
// for its scores, the same loop adds the group before it (for the dot score still in the
// first-level cache) to the context. Two separate loops would leave memory idle during the second.
// Rows are read one after the other, because the hardware prefetches one long stream better than
// several that end with every row; and groups are small, so that old and new rows do not evict one
// another.
#pragma once

#include "operands.h"

namespace fused_attn {
namespace {

// Rows in a group: old and new ones of usual width must fit well within the first-level cache.
template <class X>
constexpr int kGroup = sizeof(X) == 2 ? 4 : 2;

// Two vectors of columns, in the cheapest order: for bfloat16 the even elements and the odd ones,
// which a shift and a mask widen in place. Query and context have the same order.
template <class X>
FA_INLINE void load_pair(const X* p, Vec<Arithmetic<X>>& a, Vec<Arithmetic<X>>& b) {
  if constexpr (__is_same(X, BFloat16)) {
    const auto raw = load_bits(p);
    a = (Vec<float>)(raw << 16);
    b = (Vec<float>)(raw & 0xffff0000u);
  } else {
    a = load_widened(p);
    b = load_widened(p + kLanes<Arithmetic<X>>);
  }
}

// From the order of load_pair back to column order, in place.
template <class X, class A>
FA_INLINE void restore_order(A* x, int64_t width) {
  constexpr int L = kLanes<A>;
  if constexpr (__is_same(X, BFloat16))
    for (int64_t d = 0; d < width; d += 2 * L) {
      A pair[2 * L];
      for (int i = 0; i < L; ++i) {
        pair[2 * i] = x[d + i];
        pair[2 * i + 1] = x[d + L + i];
      }
      memcpy(x + d, pair, sizeof pair);
    }
}

// Whether the loop that scores a row also adds the group before it to the context.
constexpr bool kAddBehind = true, kScoreOnly = false;

// The group before the new one, which is added to the context a pair of vectors at a time.
template <class X>
struct Behind {
  using A = Arithmetic<X>;
  static constexpr int64_t kColumns = 2 * kLanes<A>;
  const X* rows = nullptr;  // null: there is none yet
  int64_t stride;
  A rescale;  // of the context so far
  A weights[kGroup<X>];
  A* context;

  // Adds a pair of vectors, from column d on, of N rows. A short group is added row by row.
  template <int N = kGroup<X>>
  FA_INLINE_METHOD void add(int64_t d, int64_t first = 0) const {
    const A factor = first == 0 ? rescale : A(1);
    Vec<A> a = load(context + d) * factor, b = load(context + d + kLanes<A>) * factor;
#pragma GCC unroll 4
    for (int64_t i = first; i < first + N; ++i) {
      Vec<A> x, y;
      load_pair(rows + i * stride + d, x, y);
      a += weights[i] * x;
      b += weights[i] * y;
    }
    store(context + d, a);
    store(context + d + kLanes<A>, b);
  }
};

template <class X>
struct DotStep {
  using A = Arithmetic<X>;
  const X* rows;  // of this batch row's memory
  int64_t stride, width;
  const A* query;  // in the order of load_pair
  A scale;

  template <bool Old>
  FA_INLINE_METHOD A score(int64_t s, const Behind<X>& behind, int64_t from, int64_t to) const {
    constexpr int L = kLanes<A>;
    const X* row = rows + s * stride;
    Vec<A> acc[4] = {};
    int64_t d = 0;
    for (; d + 4 * L <= width; d += 4 * L) {
      Vec<A> x[4];
      load_pair(row + d, x[0], x[1]);
      load_pair(row + d + 2 * L, x[2], x[3]);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) acc[u] += x[u] * load(query + d + u * L);
      if (Old && from < to) {
        behind.add(from);
        from += 2 * L;
      }
    }
    if (d < width) {  // the last pair
      Vec<A> x, y;
      load_pair(row + d, x, y);
      acc[0] += x * load(query + d);
      acc[1] += y * load(query + d + L);
    }
    if (Old)
      for (; from < to; from += 2 * L) behind.add(from);
    return scale * sum_lanes<A>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
};

// Prepared memory with factors of the type P. The range of the factors is determined while they are
// read; a row outside the quad's range is scored again, as chunks are.
template <class X, class P>
struct ConcatStep {
  using A = Arithmetic<X>;
  const AttentionParams& p;
  int64_t b, t;
  const ConcatOperands<X>& operands;
  Factors<A> query;
  const Extent<A>& query_extent;

  template <bool Old>
  FA_INLINE_METHOD A score(int64_t s, const Behind<X>& behind, int64_t from, int64_t to) const {
    constexpr int L = kLanes<A>;
    const P* row = static_cast<const P*>(p.memory_exp.data) + p.memory_exp.before(b) +
                   s * p.memory_exp.row_stride;
    Vec<A> acc{};
    Watch<A> watch;
    for (int64_t d = 0; d < p.K; d += 4 * L) {
      Vec<A> x[4];
      const A *q = query.data + d, *c = query.weighted + d;
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const Vec<A> w = load_widened(row + d + u * L);
        watch.see(w);
        x[u] = load(q + u * L) + w;
      }
      acc = add_quad<A>(acc, x[0], x[1], x[2], x[3], load(c), load(c + L), load(c + 2 * L),
                        load(c + 3 * L));
      if (Old && from < to) {
        behind.add(from);
        from += 2 * L;
      }
    }
    if (Old)
      for (; from < to; from += 2 * L) behind.add(from);
    Extent<A> extent;
    watch.tell(extent);
    if (range_of(query_extent, extent, operands.v_largest) != Range::quad) return again(s);
    return operands.v_sum - A(2) * sum_lanes<A>(acc);
  }

  __attribute__((noinline)) A again(int64_t s) const {
    Extent<A> extent;
    const Picked one{nullptr, s, 1};
    Factors<A> q = query, m = operands.chunk_factors(p, b, one, extent);
    const Range range = range_of(query_extent, extent, operands.v_largest);
    if (range == Range::exact) {
      q = operands.exact_queries(p, b, t, 1);
      m = operands.exact_chunk(p, b, one, nullptr);
    }
    A result;
    concat_scores_in<kByRows>(range, q, 1, m, 1, operands.v, operands.padded, operands.v_sum,
                              &result, 1);
    return result;
  }
};

// The online softmax of one query, group by group.
template <class X>
struct StepSoftmax {
  using A = Arithmetic<X>;
  A running_max = -kInfinity<A>, running_sum = A(0);

  // Turns scores into weights; returns the factor by which the context so far must be multiplied.
  A add(A* scores, int64_t n) {
    A new_max = running_max;
    for (int64_t i = 0; i < n; ++i) new_max = scores[i] > new_max ? scores[i] : new_max;
    const A base = new_max == -kInfinity<A> ? A(0) : new_max;
    A lanes[16];  // the weights and the rescale factor in as few vector exponentials as possible
    for (A& lane : lanes) lane = -kInfinity<A>;
    for (int64_t i = 0; i < n; ++i) lanes[i] = scores[i] - base;
    lanes[kGroup<X>] = running_max - base;
    for (int64_t i = 0; i <= kGroup<X>; i += kLanes<A>)
      store(lanes + i, exponential(load(lanes + i)));
    running_sum *= lanes[kGroup<X>];
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = lanes[i];
      running_sum += lanes[i];
    }
    running_max = new_max;
    return lanes[kGroup<X>];
  }
};

// Rows [begin, stop) of batch row b, all of which count, for query t. The context is not divided by
// the sum.
template <class X, class Step>
FA_INLINE StepSoftmax<X> attend_step(const AttentionParams& p, int64_t b, int64_t t, int64_t begin,
                                     int64_t stop, const Step& step, Arithmetic<X>* context,
                                     Arithmetic<X>* kept) {
  using A = Arithmetic<X>;
  constexpr int64_t kColumns = Behind<X>::kColumns;
  const X* rows = static_cast<const X*>(p.memory.data) + p.memory.before(b);
  const int64_t pair = (b * p.T + t) * p.S;
  const uint8_t* keep = p.keep ? p.keep + pair : nullptr;
  StepSoftmax<X> softmax;
  Behind<X> behind;
  behind.stride = p.memory.row_stride;
  behind.context = context;
  memset(context, 0, size_t(p.E) * sizeof(A));
  int64_t n = 0;
  for (int64_t s = begin; s < stop; s += n) {
    n = stop - s < kGroup<X> ? stop - s : kGroup<X>;
    A scores[kGroup<X>];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t pairs = p.E / kColumns;
      const int64_t from = i * pairs / n * kColumns, to = (i + 1) * pairs / n * kColumns;
      scores[i] = behind.rows ? step.template score<kAddBehind>(s + i, behind, from, to)
                              : step.template score<kScoreOnly>(s + i, behind, 0, 0);
    }
    if (kept)
      for (int64_t i = 0; i < n; ++i) kept[pair + s + i] = scores[i];
    behind.rescale = softmax.add(scores, n);
    if (p.centers) {
      A bells[16];
      bell_factors(p, b * p.T + t, {nullptr, s, n}, bells);
      for (int64_t i = 0; i < n; ++i) scores[i] *= bells[i];
    }
    for (int64_t i = 0; i < n; ++i)
      behind.weights[i] = !keep || keep[s + i] ? scores[i] * (keep ? A(p.keep_scale) : A(1)) : A(0);
    behind.rows = rows + s * behind.stride;
  }
  for (int64_t d = 0; d < p.E; d += kColumns)  // the last group, of n rows
    for (int64_t i = 0; i < n; ++i) behind.template add<1>(d, i);
  restore_order<X>(context, p.E);
  return softmax;
}

}  // namespace
}  // namespace fused_attn
