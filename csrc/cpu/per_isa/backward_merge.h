// The gradients of one query, and of v, from what the tasks of the backward pass have left: added
// in the order of the tasks, so that the number of threads does not matter.
#pragma once

#include "operands.h"

namespace fused_attn {
namespace {

// dQuery of one query: the sums of its segments, in order. `row` is b T + t.
template <class X>
void merge_query(const AttentionParams& p, const Plan& plan, const Shared& shared, int64_t row) {
  using A = Arithmetic<X>;
  const Sums<X> sums(p, plan);
  const int64_t b = row / p.T, t = row % p.T, task = b * plan.segments;
  const bool blocked = sums.concat;
  const int64_t step = blocked ? p.T * kLanes<A> : kLanes<A>;
  const int64_t at = t * (blocked ? kLanes<A> : sums.width);
  X* out = static_cast<X*>(p.grad_query) + row * p.K;
  if (p.grad_centers && !sums.centers_in_place) {
    A sum = 0;
    for (int64_t s = 0; s < plan.segments; ++s) sum += sums.centers(shared, task + s)[t];
    static_cast<A*>(p.grad_centers)[row] = sum;
  }
  if (!p.grad_query || sums.query_in_place) return;
  for (int64_t d = 0, k = 0; d < p.K; d += kLanes<A>, ++k) {
    Vec<A> sum = load(sums.query(shared, task) + at + k * step);
    for (int64_t s = 1; s < plan.segments; ++s)
      sum += load(sums.query(shared, task + s) + at + k * step);
    A lanes[kLanes<A>];
    store(lanes, sum);
    const int64_t n = p.K - d < kLanes<A> ? p.K - d : kLanes<A>;
    if (blocked)
      for (int64_t i = 0; i < n; ++i) lanes[i] *= A(4) * widen(static_cast<const X*>(p.v)[d + i]);
    narrow_row(lanes, A(1), n, out + d);
  }
}

template <class X>
void merge_v(const AttentionParams& p, const Plan& plan, const Shared& shared) {
  using A = Arithmetic<X>;
  const Sums<X> sums(p, plan);
  for (int64_t d = 0; d < p.K; ++d) {
    A sum = 0;
    for (int64_t task = 0; task < p.B * plan.segments; ++task) sum += sums.v(shared, task)[d];
    narrow(A(-2) * sum, static_cast<X*>(p.grad_v)[d]);
  }
}

}  // namespace
}  // namespace fused_attn
