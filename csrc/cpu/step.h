// One query: a decoding step. With nothing to reuse a row for, the pass is bound by reading memory,
// so the weighted sum must not hold up the reading: while a group of rows is read for its scores,
// the same loop adds the group before it (still in the first-level cache) to the context. Two loops
// in turn would leave memory idle during the second. Rows are read one after the other, because
// the hardware prefetches one long stream better than several that end with every row.
#pragma once

#include "chunk.h"
#include "tiles.h"

namespace fused_attn {
namespace {

constexpr int64_t kGroup = 4;

// context[d] = context[d] * rescale + sum of O old rows times their weights, for one vector d.
template <class X, int O>
FA_INLINE void add_old(const X* old, int64_t stride, int64_t d, const Arithmetic<X>* weights,
                       Arithmetic<X> rescale, Arithmetic<X>* context) {
  Vec<Arithmetic<X>> sum = load(context + d) * rescale;
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i) sum += weights[i] * load_wide(old + i * stride + d);
  store(context + d, sum);
}

// The score of one fresh row; meanwhile columns [from, to) of the context take in the old group.
template <class X, bool Old>
FA_INLINE Arithmetic<X> step_row(const Arithmetic<X>* query, const X* fresh, int64_t width,
                                 const X* old, int64_t stride, const Arithmetic<X>* weights,
                                 Arithmetic<X> rescale, Arithmetic<X>* context, int64_t from,
                                 int64_t to) {
  using A = Arithmetic<X>;
  constexpr int L = kLanes<A>;
  Vec<A> acc[4] = {};
  int64_t d = 0;
  for (; d + 4 * L <= width; d += 4 * L) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) acc[u] += load_wide(fresh + d + u * L) * load(query + d + u * L);
    if (Old && from < to) {
      add_old<X, kGroup>(old, stride, from, weights, rescale, context);
      from += L;
    }
  }
  for (; d < width; d += L) acc[0] += load_wide(fresh + d) * load(query + d);
  if (Old)
    for (; from < to; from += L) add_old<X, kGroup>(old, stride, from, weights, rescale, context);
  return sum_lanes<A>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// The online softmax of one query, group by group.
template <class A>
struct StepSoftmax {
  A max = -kInfinity<A>, sum = A(0);
  A rescale = A(1);
  A weights[kGroup] = {};

  void add(const A* scores, int64_t n) {
    A top = max;
    for (int64_t i = 0; i < n; ++i) top = scores[i] > top ? scores[i] : top;
    const A base = top == -kInfinity<A> ? A(0) : top;
    A lanes[16];  // the weights and the rescale factor in as few vector exponentials as possible
    for (A& lane : lanes) lane = -kInfinity<A>;
    for (int64_t i = 0; i < n; ++i) lanes[i] = scores[i] - base;
    lanes[kGroup] = max - base;
    for (int64_t i = 0; i <= kGroup; i += kLanes<A>) store(lanes + i, exponential(load(lanes + i)));
    rescale = lanes[kGroup];
    sum *= rescale;
    for (int64_t i = 0; i < n; ++i) {
      weights[i] = lanes[i];
      sum += lanes[i];
    }
    max = top;
  }
};

// Rows [begin, stop) of batch b, all of which count. context starts at 0 and is left undivided.
template <class X>
FA_INLINE StepSoftmax<Arithmetic<X>> attend_step(const AttentionParams& p, int64_t b, int64_t begin,
                                                 int64_t stop, const Arithmetic<X>* query,
                                                 Arithmetic<X>* context, Arithmetic<X>* kept) {
  using A = Arithmetic<X>;
  const int64_t stride = p.memory.row_stride;
  const X* rows = static_cast<const X*>(p.memory.data) + b * p.memory.batch_stride;
  const uint8_t* keep = p.keep ? p.keep + b * p.S : nullptr;
  StepSoftmax<A> softmax;
  const X* old = nullptr;
  int64_t n = 0;
  for (int64_t s = begin; s < stop; s += n) {
    const X* fresh = rows + s * stride;
    n = stop - s < kGroup ? stop - s : kGroup;
    A scores[kGroup];
    const int64_t vectors = p.E / kLanes<A>;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = i * vectors / n * kLanes<A>, to = (i + 1) * vectors / n * kLanes<A>;
      const X* row = fresh + i * stride;
      const A score =
          old ? step_row<X, true>(query, row, p.E, old, stride, softmax.weights, softmax.rescale,
                                  context, from, to)
              : step_row<X, false>(query, row, p.E, nullptr, 0, nullptr, A(1), nullptr, 0, 0);
      scores[i] = score * A(p.scale);
    }
    if (kept)
      for (int64_t i = 0; i < n; ++i) kept[b * p.S + s + i] = scores[i];
    softmax.add(scores, n);
    if (keep)
      for (int64_t i = 0; i < n; ++i) softmax.weights[i] *= keep[s + i] ? A(p.keep_scale) : A(0);
    old = fresh;
  }
  for (int64_t d = 0; d < p.E; d += kLanes<A>)  // the last group, of n rows
    for (int64_t i = 0; i < n; ++i)
      add_old<X, 1>(old + i * stride, stride, d, softmax.weights + i, i ? A(1) : softmax.rescale,
                    context);
  return softmax;
}

}  // namespace
}  // namespace fused_attn
