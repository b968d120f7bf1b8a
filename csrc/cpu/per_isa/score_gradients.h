// The gradients of the scores of some queries against some rows of the memory:
//
//   P = exp(score - logsumexp)      dP = dO . m (+ dW)      dS = P (dP - delta)
//   delta = sum_s P dP = dO . O + sum_s W dW
//
// dO is grad_context, dW is grad_weights. The weight of a query that attends to one position is
// 1 whatever the score, so dS is 0. The difference above would leave a rounding error there, which
// an optimiser like Adam scales up to the size of any other gradient.
//
// The weights P are recomputed from the scores and the log-sum-exp, unless the forward pass was
// asked for them: then they are read.
#pragma once

#include "operands.h"

namespace fused_attn {
namespace {

template <class X>
struct ScoreGradients {
  using A = Arithmetic<X>;
  const AttentionParams& p;
  int64_t ld;  // padded
  A *scores, *grads, *kept, *delta, *base, *bell;
  uint8_t* alone;  // by query: whether it attends to one position only

  ScoreGradients(const AttentionParams& params, const Plan& plan, Carver& c)
      : p(params), ld(padded_chunk<A>(plan)) {
    scores = c.take<A>(plan.t_block * ld);
    grads = c.take<A>(plan.t_block * ld);
    kept = p.keep || p.centers ? c.take<A>(plan.t_block * ld) : scores;
    bell = c.take<A>(p.centers ? ld : 0);
    delta = c.take<A>(p.T);
    base = c.take<A>(p.T);
    alone = c.take<uint8_t>(p.T);
  }

  // Whether a gradient is wanted that needs dS. For concat the gradient of the memory alone does
  // not: it needs the weights.
  bool through_scores() const {
    return p.grad_query || p.grad_memory_proj || p.grad_v || p.grad_centers ||
           (p.score == Score::dot && p.grad_memory);
  }

  // delta and the log-sum-exp of every query.
  void read_queries(int64_t b) {
    for (int64_t t = 0; t < p.T && !p.scores_only; ++t) {
      const int64_t row = b * p.T + t;
      alone[t] = counts_one(b, t);
      const A logsumexp = static_cast<const A*>(p.logsumexp)[row];
      base[t] = logsumexp == -kInfinity<A> ? kInfinity<A> : logsumexp;  // exp(s - inf) is 0
      if (!through_scores()) continue;
      const X* output = static_cast<const X*>(p.context) + row * p.E;
      const X* grad = static_cast<const X*>(p.grad_context.data) + b * p.grad_context.batch_stride +
                      t * p.grad_context.row_stride;
      delta[t] = inner(output, grad, p.E);
      if (p.grad_weights.data) delta[t] += weights_delta(b, t);
    }
  }

  // `scores` become P; `grads`, which are dP, become dS if that is needed; `kept` becomes the
  // weights after dropout.
  void score_gradients(int64_t b, int64_t t0, int64_t rows, const Picked& picked,
                       const uint8_t* spoiled, A* moment = nullptr) const {
    if (!weights_at_hand()) finish_scores(p, b, t0, rows, picked, spoiled, scores, ld);
    for (int64_t i = 0; i < rows; ++i) {
      A *weight = scores + i * ld, *kept_row = kept + i * ld, *g = grads + i * ld;
      weigh(b, t0 + i, picked, weight, kept_row);
      if (through_scores()) differentiate(b, t0 + i, picked, weight, g, moment);
      if (!spoiled) continue;
      // A query that a spoiled row made NaN must contribute nothing to rows that are masked for it.
      for (int64_t j = 0; j < picked.count; ++j)
        if (!allowed(p, b, t0 + i, picked[j])) kept_row[j] = g[j] = A(0);
    }
  }

  void take_score_gradients(int64_t b, int64_t t0, int64_t rows, const Picked& picked) const {
    const int64_t width = round_up(picked.count, kLanes<A>);
    for (int64_t i = 0; i < rows; ++i) {
      const A* row = static_cast<const A*>(p.raw_grad_scores) + (b * p.T + t0 + i) * p.S;
      A* g = grads + i * ld;
      for (int64_t j = 0; j < picked.count; ++j)
        g[j] = mask_per_query(p) && !allowed(p, b, t0 + i, picked[j]) ? A(0) : row[picked[j]];
      for (int64_t j = picked.count; j < width; ++j) g[j] = A(0);
    }
  }

  // Not if they were rounded to a 16-bit type: dS would have that error.
  bool weights_at_hand() const { return __is_same(X, A) && p.weights && !p.centers; }

 private:
  // The scores of a query become P; `kept_row` becomes P after the window's factor and dropout.
  void weigh(int64_t b, int64_t t, const Picked& picked, A* weight, A* kept_row) const {
    const int64_t width = round_up(picked.count, kLanes<A>);
    if (weights_at_hand())
      take_weights(b, t, picked, weight, width);
    else
      for (int64_t j = 0; j < width; j += kLanes<A>)
        store(weight + j, exponential(load(weight + j) - base[t]));
    if (p.centers) {
      bell_factors(p, b * p.T + t, picked, bell);
      for (int64_t j = 0; j < width; j += kLanes<A>)
        store(kept_row + j, load(weight + j) * load(bell + j));
    } else if (p.keep) {
      memcpy(kept_row, weight, size_t(width) * sizeof(A));
    }
    if (p.keep)
      for (int64_t j = 0; j < picked.count; ++j) kept_row[j] *= keep_factor(b, t, picked[j]);
  }

  // dP of a query becomes dS.
  void differentiate(int64_t b, int64_t t, const Picked& picked, const A* weight, A* g,
                     A* moment) const {
    const int64_t width = round_up(picked.count, kLanes<A>);
    const A scale = p.score == Score::dot ? A(p.scale) : A(1);
    if (p.keep)
      for (int64_t j = 0; j < picked.count; ++j) g[j] *= keep_factor(b, t, picked[j]);
    if (p.grad_weights.data) {
      const X* grad_weights = grad_weights_row(b, t);
      for (int64_t j = 0; j < picked.count; ++j) g[j] += widen(grad_weights[picked[j]]);
    }
    if (p.centers) center_gradient(b * p.T + t, picked, weight, g, moment);
    for (int64_t j = 0; j < width; j += kLanes<A>)
      store(g + j, load(weight + j) * (load(g + j) - delta[t]) * scale);
    for (int64_t j = picked.count; j < width; ++j) g[j] = A(0);  // delta may be NaN
    if (alone[t])
      for (int64_t j = 0; j < picked.count; ++j) g[j] *= A(0);  // NaN stays NaN
  }

  A keep_factor(int64_t b, int64_t t, int64_t s) const {
    return p.keep[(b * p.T + t) * p.S + s] ? A(p.keep_scale) : A(0);
  }

  bool counts_one(int64_t b, int64_t t) const {
    const int64_t* bounds = p.bounds ? p.bounds + 2 * (b * p.T + t) : nullptr;
    const int64_t begin = bounds ? bounds[0] : 0, end = bounds ? bounds[1] : length_of(p, b);
    if (!p.mask) return end - begin == 1;
    int64_t count = 0;
    for (int64_t s = begin; s < end && count < 2; ++s) count += allowed(p, b, t, s);
    return count == 1;
  }

  A weights_delta(int64_t b, int64_t t) const {
    const int64_t row = b * p.T + t;
    const X *weights = static_cast<const X*>(p.weights) + row * p.S,
            *grads = grad_weights_row(b, t);
    if (p.mask) return inner_allowed(b, t, weights, grads);
    if (!p.bounds) return inner(weights, grads, length_of(p, b));
    const int64_t first = p.bounds[2 * row], n = p.bounds[2 * row + 1] - first;
    return inner(weights + first, grads + first, n);
  }

  const X* grad_weights_row(int64_t b, int64_t t) const {
    return static_cast<const X*>(p.grad_weights.data) + b * p.grad_weights.batch_stride +
           t * p.grad_weights.row_stride;
  }

  // Where a weight does not count, its gradient may be any number, and 0 times it NaN.
  A inner_allowed(int64_t b, int64_t t, const X* weights, const X* grads) const {
    const int64_t* bounds = p.bounds ? p.bounds + 2 * (b * p.T + t) : nullptr;
    const int64_t begin = bounds ? bounds[0] : 0, end = bounds ? bounds[1] : length_of(p, b);
    A lanes[16] = {};
    for (int64_t s = begin; s < end; ++s)
      if (allowed(p, b, t, s)) lanes[s % 16] += widen(weights[s]) * widen(grads[s]);
    A sum = 0;
    for (A lane : lanes) sum += lane;
    return sum;
  }

  static A inner(const X* x, const X* y, int64_t n) {
    A lanes[16] = {};  // a fixed number of partial sums: the same order whatever the vector length
    for (int64_t i = 0; i < n; ++i) lanes[i % 16] += widen(x[i]) * widen(y[i]);
    A sum = 0;
    for (A lane : lanes) sum += lane;
    return sum;
  }

  // With a Gaussian g after the softmax, dP = g dW; the gradient of the center is
  // sum W dW (s - center) rate^2.
  void center_gradient(int64_t row, const Picked& picked, const A* weight, A* g, A* moment) const {
    const A center = static_cast<const A*>(p.centers)[row];
    A sum = 0;
    for (int64_t j = 0; j < picked.count; ++j) {
      g[j] *= bell[j];
      sum += weight[j] * g[j] * (A(picked[j]) - center);
    }
    if (moment) *moment += sum * A(p.rate * p.rate);
  }

  void take_weights(int64_t b, int64_t t, const Picked& picked, A* out, int64_t width) const {
    const A* row = static_cast<const A*>(p.weights) + (b * p.T + t) * p.S;
    if (picked.dense)
      memcpy(out, row + picked.first, size_t(picked.count) * sizeof(A));
    else
      for (int64_t j = 0; j < picked.count; ++j) out[j] = row[picked.index[j]];
    for (int64_t j = picked.count; j < width; ++j) out[j] = A(0);
  }
};

}  // namespace
}  // namespace fused_attn
