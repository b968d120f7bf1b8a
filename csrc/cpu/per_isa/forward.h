// One forward task: a query tile against a segment of one batch row's memory, chunk by chunk, with
// an online softmax. A chunk is read from memory once, for the scores and the weighted sum.
#pragma once

#include "operands.h"
#include "pairs.h"
#include "step.h"

namespace fused_attn {
namespace {

template <class X>
struct ForwardTask {
  using A = Arithmetic<X>;
  const AttentionParams& p;
  const Plan& plan;
  const Shared& shared;
  int64_t memory_width, score_width, ld;  // padded
  A *query, *memory, *scores, *context, *running_max, *running_sum, *rescale, *factors, *bell;
  int64_t* index;
  uint8_t* spoiled_rows;
  ConcatOperands<X> concat;
  // Only if bfloat16 is multiplied in pairs; null otherwise.
  static constexpr bool kPairs = kHasPairs && __is_same(X, BFloat16);
  X *stored_query = nullptr, *stored = nullptr, *packed = nullptr;

  ForwardTask(const AttentionParams& params, const Plan& plan_, const Shared& shared_, Carver& c)
      : p(params), plan(plan_), shared(shared_) {
    const Widths widths = forward_widths<X>(p);
    memory_width = widths.memory;
    score_width = widths.score;
    ld = padded_chunk<A>(plan);
    if (widths.pairs) {
      stored_query = c.take<X>(plan.t_block * memory_width);
      stored = c.take<X>(plan.chunk * memory_width);
      packed = c.take<X>((plan.chunk + 1) * memory_width);
    }
    query = c.take<A>(p.score == Score::dot ? plan.t_block * score_width : 0);
    memory = c.take<A>(plan.chunk * memory_width);
    scores = c.take<A>(plan.t_block * ld);
    context = c.take<A>(plan.t_block * memory_width);
    running_max = c.take<A>(plan.t_block);
    running_sum = c.take<A>(plan.t_block);
    rescale = c.take<A>(plan.t_block);
    index = c.take<int64_t>(plan.chunk);
    spoiled_rows = c.take<uint8_t>(plan.chunk);
    bell = c.take<A>(p.centers ? ld : 0);
    if (p.score == Score::dot) return;
    factors = c.take<A>(2 * Layout<A>::size(plan.t_block, score_width));
    concat.query_layout = concat.memory_layout = Layout<A>::by_rows(score_width);
    concat.carve(c, p, plan);
  }

  // Where scores are kept for the weights: in the weights themselves if these have the arithmetic
  // type.
  A* kept_scores() const {
    if (p.scores_only) return static_cast<A*>(p.raw_scores);
    if (!p.weights) return nullptr;
    return static_cast<A*>(__is_same(X, A) ? p.weights : shared.scores);
  }

  void run(int64_t task) {
    const int64_t segment = task % plan.segments;
    const int64_t t0 = task / plan.segments % plan.t_blocks * plan.t_block;
    const int64_t b = task / plan.segments / plan.t_blocks;
    const int64_t rows = p.T - t0 < plan.t_block ? p.T - t0 : plan.t_block;
    int64_t begin = segment * plan.segment_rows;
    int64_t end = begin + plan.segment_rows < p.S ? begin + plan.segment_rows : p.S;
    const int64_t length = length_of(p, b);
    int64_t stop = end < length ? end : length;
    if (p.bounds) {
      begin = p.bounds[2 * (b * p.T + t0)];
      end = stop = p.bounds[2 * (b * p.T + t0) + 1];
    }
    if (A* kept = kept_scores())
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t s = begin; s < end; ++s) kept[(b * p.T + t0 + i) * p.S + s] = -kInfinity<A>;
    for (int64_t i = 0; i < rows; ++i) {
      running_max[i] = -kInfinity<A>;
      running_sum[i] = A(0);
    }
    bool fresh = true;
    if (begin < stop && is_step()) {
      step(b, t0, begin, stop);
      fresh = false;
    } else if (begin < stop && stored) {
      attend_pairs(b, t0, rows, begin, stop, fresh);
    } else if (begin < stop) {
      attend(b, t0, rows, begin, stop, fresh);
    }
    if (fresh) memset(context, 0, size_t(rows * memory_width) * sizeof(A));
    if (p.scores_only) return;
    if (plan.segments > 1)
      leave_partial(task, rows);
    else
      for (int64_t i = 0; i < rows; ++i)
        finish_row(p, b * p.T + t0 + i, context + i * memory_width, running_max[i], running_sum[i],
                   kept_scores());
  }

  // Whether `attend_step` supports the task: one query that attends to all rows, and no remainders.
  bool is_step() const {
    if (plan.t_block != 1 || p.mask || p.scores_only || p.E % Behind<X>::kColumns != 0)
      return false;
    return p.score == Score::dot || (p.memory_exp.data && p.K % (4 * kLanes<A>) == 0);
  }

  void step(int64_t b, int64_t t, int64_t begin, int64_t stop) {
    StepSoftmax<X> result;
    if (p.score == Score::dot) {
      const X* q =
          static_cast<const X*>(p.query.data) + b * p.query.batch_stride + t * p.query.row_stride;
      for (int64_t d = 0; d < p.E; d += 2 * kLanes<A>) {
        Vec<A> x, y;
        load_pair(q + d, x, y);
        store(query + d, x);
        store(query + d + kLanes<A>, y);
      }
      const X* memory_rows = static_cast<const X*>(p.memory.data) + p.memory.before(b);
      const DotStep<X> dot{memory_rows, p.memory.row_stride, p.E, query, A(p.scale)};
      result = attend_step<X>(p, b, t, begin, stop, dot, context, kept_scores());
    } else {
      result = short_factors() ? concat_step<ShortFactor>(b, t, begin, stop)
                               : concat_step<A>(b, t, begin, stop);
    }
    running_max[0] = result.running_max;
    running_sum[0] = result.running_sum;
  }

  // With float arithmetic prepared factors may be stored in bfloat16.
  using ShortFactor = PickType<__is_same(A, float), BFloat16, A>;
  bool short_factors() const { return __is_same(A, float) && p.exp_dtype == DType::bf16; }

  template <class P>
  StepSoftmax<X> concat_step(int64_t b, int64_t t, int64_t begin, int64_t stop) {
    Extent<A> extent;
    concat.read_v(p);
    const Factors<A> q = concat.query_factors(p, b, t, 1, factors,
                                              Layout<A>::size(plan.t_block, score_width), extent);
    const ConcatStep<X, P> step{p, b, t, concat, q, extent};
    return attend_step<X>(p, b, t, begin, stop, step, context, kept_scores());
  }

  void attend(int64_t b, int64_t t0, int64_t rows, int64_t begin, int64_t stop, bool& fresh) {
    Block<A> q{};
    Extent<A> q_extent;
    Factors<A> q_factors{};
    if (p.score == Score::dot) {
      q = read_range<X, A>(p.query, b, t0, rows, p.K, score_width, query);
    } else {
      concat.read_v(p);
      q_factors = concat.query_factors(p, b, t0, rows, factors,
                                       Layout<A>::size(plan.t_block, score_width), q_extent);
    }
    Picked picked{index};
    for (int64_t s = begin; s < stop; s += plan.chunk) {
      pick(p, b, t0, t0 + rows, s, s + plan.chunk < stop ? s + plan.chunk : stop, picked);
      if (picked.count == 0) continue;
      const Block<A> m = read_picked<X, A>(p.memory, b, picked, p.E, memory_width, memory);
      uint8_t* spoiled = nullptr;
      if (mask_per_query(p)) {  // the chunk is then in scratch
        spoiled = spoiled_rows;
        memset(spoiled, 0, size_t(picked.count));
        mark_spoiled(memory, memory_width, picked.count, p.E, spoiled);
        if (p.score == Score::concat) concat.mark_spoiled_rows(p, b, picked, spoiled);
      }
      if (p.score == Score::dot) {
        rows_dot_rows(q.data, q.stride, rows, m.data, m.stride, picked.count, score_width, scores,
                      ld);
      } else {
        Extent<A> m_extent;
        Factors<A> m_factors = concat.chunk_factors(p, b, picked, m_extent);
        Factors<A> qf = q_factors;
        const Range range = range_of(q_extent, m_extent, concat.v_largest);
        if (range == Range::exact) {
          qf = concat.exact_queries(p, b, t0, rows);
          m_factors = concat.exact_chunk(p, b, picked, spoiled);
        }
        concat_scores_in<kByRows>(range, qf, rows, m_factors, picked.count, concat.v, score_width,
                                  concat.v_sum, scores, ld);
      }
      if (p.scores_only) {
        finish_scores(p, b, t0, rows, picked, spoiled, scores, ld);
        keep_scores(b, t0, rows, picked);
        continue;
      }
      weigh(b, t0, rows, picked, spoiled);
      add_scaled_rows<A>({scores, ld, 1}, rows, m.data, m.stride, picked.count, memory_width,
                         context, memory_width, {!fresh, rescale});
      fresh = false;
    }
  }

  // `attend` for bfloat16 multiplied in pairs. The weights are rounded to bfloat16 for the weighted
  // sum, as in a chain of torch operations.
  void attend_pairs([[maybe_unused]] int64_t b, [[maybe_unused]] int64_t t0,
                    [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t begin,
                    [[maybe_unused]] int64_t stop, [[maybe_unused]] bool& fresh) {
    if constexpr (kPairs) {
      const Picked queries{nullptr, t0, rows};
      const Block<X> q = stored_rows(p.query, b, queries, p.E, memory_width, stored_query);
      Picked picked{index};
      for (int64_t s = begin; s < stop; s += plan.chunk) {
        pick(p, b, t0, t0 + rows, s, s + plan.chunk < stop ? s + plan.chunk : stop, picked);
        if (picked.count == 0) continue;
        const Block<X> m = stored_rows(p.memory, b, picked, p.E, memory_width, stored);
        rows_dot_rows(q.data, q.stride, rows, m.data, m.stride, picked.count, memory_width, scores,
                      ld);
        weigh(b, t0, rows, picked, nullptr);
        pack_pairs(m, picked.count, memory_width, packed);
        pair_weights(scores, ld, rows, picked.count);
        add_scaled_pairs({scores, ld, 1}, rows, packed, (picked.count + 1) / 2, memory_width,
                         context, memory_width, {!fresh, rescale});
        fresh = false;
      }
    }
  }

  // Turns scores into the weights of the weighted sum.
  void weigh(int64_t b, int64_t t0, int64_t rows, const Picked& picked, const uint8_t* spoiled) {
    finish_scores(p, b, t0, rows, picked, spoiled, scores, ld);
    keep_scores(b, t0, rows, picked);
    soften(b, t0, rows, picked);
  }

  void keep_scores(int64_t b, int64_t t0, int64_t rows, const Picked& picked) const {
    A* kept = kept_scores();
    if (!kept) return;
    for (int64_t i = 0; i < rows; ++i) {
      A* row = kept + (b * p.T + t0 + i) * p.S;
      for (int64_t j = 0; j < picked.count; ++j) row[picked[j]] = scores[i * ld + j];
    }
  }

  // One step of the online softmax: scores become exp(score - running_max), running_max and
  // running_sum are updated, and `rescale` is the factor for the context so far.
  void soften(int64_t b, int64_t t0, int64_t rows, const Picked& picked) const {
    const int64_t width = round_up(picked.count, kLanes<A>);
    for (int64_t i = 0; i < rows; ++i) {
      A* row = scores + i * ld;
      Vec<A> high = splat(running_max[i]);
      for (int64_t j = 0; j < width; j += kLanes<A>) high = at_least<A>(high, load(row + j));
      const A new_max = max_lanes<A>(high);
      const A base = new_max == -kInfinity<A> ? A(0) : new_max;  // 0 if nothing counts so far
      rescale[i] = running_max[i] == new_max ? A(1) : exp_of(running_max[i] - base);
      Vec<A> sum{};
      for (int64_t j = 0; j < width; j += kLanes<A>) {
        const Vec<A> weight = exponential(load(row + j) - base);
        store(row + j, weight);
        sum += weight;
      }
      running_sum[i] = running_sum[i] * rescale[i] + sum_lanes<A>(sum);
      running_max[i] = new_max;
      if (p.centers) {
        bell_factors(p, b * p.T + t0 + i, picked, bell);
        for (int64_t j = 0; j < width; j += kLanes<A>)
          store(row + j, load(row + j) * load(bell + j));
      }
      if (p.keep) {
        const uint8_t* keep = p.keep + (b * p.T + t0 + i) * p.S;
        for (int64_t j = 0; j < picked.count; ++j)
          row[j] = keep[picked[j]] ? row[j] * A(p.keep_scale) : A(0);
      }
    }
  }

  void leave_partial(int64_t task, int64_t rows) const {
    const Partial<X> partial(p, plan);
    memcpy(partial.context(shared, task), context, size_t(rows * partial.width) * sizeof(A));
    memcpy(partial.running_max(shared, task), running_max, size_t(rows) * sizeof(A));
    memcpy(partial.running_sum(shared, task), running_sum, size_t(rows) * sizeof(A));
  }

  // Divides by the sum, and turns kept scores into weights. These are computed from the maximum and
  // the sum: the log-sum-exp has lost digits of the sum if the scores are large. `row` is b T + t.
  static void finish_row(const AttentionParams& p, int64_t row, const A* context, A row_max,
                         A row_sum, const A* kept) {
    const bool empty = row_sum == A(0);
    const A inverse = empty ? A(0) : A(1) / row_sum;
    if (p.logsumexp)
      static_cast<A*>(p.logsumexp)[row] = empty ? -kInfinity<A> : row_max + log_of(row_sum);
    narrow_row(context, inverse, p.E, static_cast<X*>(p.context) + row * p.E);
    if (!kept) return;
    const A* from = kept + row * p.S;
    X* to = static_cast<X*>(p.weights) + row * p.S;
    const A base = empty ? A(0) : row_max;
    int64_t s = 0, end = p.S;
    if (p.bounds) {  // there are no scores outside the window
      s = p.bounds[2 * row];
      end = p.bounds[2 * row + 1] > s ? p.bounds[2 * row + 1] : s;
      memset(to, 0, size_t(s) * sizeof(X));
      memset(to + end, 0, size_t(p.S - end) * sizeof(X));
    }
    A lanes[kLanes<A>], bells[kLanes<A>];
    for (; s + kLanes<A> <= end; s += kLanes<A>) {
      store(lanes, exponential(load(from + s) - base));
      if (p.centers) {
        bell_factors(p, row, {nullptr, s, kLanes<A>}, bells);
        store(lanes, load(lanes) * load(bells));
      }
      narrow_row(lanes, inverse, kLanes<A>, to + s);
    }
    for (; s < end; ++s) {
      A weight = exp_of(from[s] - base) * inverse;
      if (p.centers) {
        bell_factors(p, row, {nullptr, s, 1}, bells);
        weight *= bells[0];
      }
      narrow(weight, to[s]);
    }
  }

  // Merges the segments of one query, in order. `row` is b T + t.
  static void merge(const AttentionParams& p, const Plan& plan, const Shared& shared, int64_t row) {
    const Partial<X> partial(p, plan);
    const int64_t width = partial.width, b = row / p.T, t = row % p.T;
    const int64_t first = (b * plan.t_blocks + t / plan.t_block) * plan.segments;
    const int64_t i = t % plan.t_block;
    const auto split_max = [&](int64_t s) { return partial.running_max(shared, first + s)[i]; };
    const auto split_sum = [&](int64_t s) { return partial.running_sum(shared, first + s)[i]; };
    A row_max = -kInfinity<A>;
    for (int64_t s = 0; s < plan.segments; ++s)
      row_max = split_max(s) > row_max ? split_max(s) : row_max;
    const A base = row_max == -kInfinity<A> ? A(0) : row_max;
    A* merged = partial.context(shared, first) + i * width;  // in place of the first segment's
    A row_sum = A(0);
    for (int64_t s = 0; s < plan.segments; ++s) {
      const A rescale = exp_of(split_max(s) - base);
      const A* part = partial.context(shared, first + s) + i * width;
      for (int64_t d = 0; d < width; d += kLanes<A>)
        store(merged + d,
              s ? load(merged + d) + rescale * load(part + d) : rescale * load(part + d));
      row_sum += rescale * split_sum(s);
    }
    const A* kept =
        !p.weights ? nullptr : static_cast<const A*>(__is_same(X, A) ? p.weights : shared.scores);
    finish_row(p, row, merged, row_max, row_sum, kept);
  }
};

}  // namespace
}  // namespace fused_attn
