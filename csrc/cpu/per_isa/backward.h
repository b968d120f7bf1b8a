// One backward task: a segment of one batch row's memory against all its queries. The segment owns
// its rows, so their gradient is written once and without atomics; gradients of the queries are
// summed over segments afterwards (backward_merge.h), in a fixed order. With P, dS and dO of
// score_gradients.h:
//
//   dMemory = P^T dO + dS^T query        dQuery = dS memory          (dot; see concat.h for concat)
#pragma once

#include "pairs.h"
#include "score_gradients.h"

namespace fused_attn {
namespace {

template <class X>
struct BackwardTask : private ScoreGradients<X> {
  using A = Arithmetic<X>;
  using Gradients = ScoreGradients<X>;
  using Gradients::p, Gradients::ld, Gradients::scores, Gradients::grads, Gradients::kept;
  using Gradients::read_queries, Gradients::weights_at_hand, Gradients::through_scores;
  using Gradients::score_gradients, Gradients::take_score_gradients;
  const Plan& plan;
  const Shared& shared;
  const Sums<X> sums;
  int64_t memory_width, score_width;  // padded
  A *query, *memory, *grad_context, *grad_memory;
  int64_t *index, *place;
  uint8_t* spoiled_rows;
  // concat only
  ConcatOperands<X> concat;
  A *query_factors, *grad_proj, *grad_row;
  Extent<A>* extents;
  // Only if bfloat16 is multiplied in pairs; null otherwise.
  static constexpr bool kPairs = kHasPairs && __is_same(X, BFloat16);
  X *stored = nullptr, *packed_memory, *packed_query, *packed_grad;
  A* pairs;  // weights of two queries

  BackwardTask(const AttentionParams& params, const Plan& plan_, const Shared& shared_, Carver& c)
      : Gradients(params, plan_, c), plan(plan_), shared(shared_), sums(params, plan_) {
    const Widths widths = backward_widths<X>(p);
    memory_width = widths.memory;
    score_width = widths.score;
    query = c.take<A>(p.score == Score::dot ? plan.t_block * score_width : 0);
    memory = c.take<A>(plan.chunk * memory_width);
    grad_context = c.take<A>(plan.t_block * memory_width);
    place = c.take<int64_t>(p.bounds ? plan.chunk : 0);
    grad_memory = c.take<A>(plan.chunk * memory_width);
    index = c.take<int64_t>(plan.chunk);
    spoiled_rows = c.take<uint8_t>(plan.chunk);
    if (widths.pairs) {
      stored = c.take<X>(plan.chunk * p.E);
      packed_memory = c.take<X>((plan.chunk + 1) * p.E);
      packed_query = c.take<X>(plan.t_blocks * packed_size());
      packed_grad = c.take<X>(plan.t_blocks * packed_size());
      pairs = c.take<A>((plan.t_block + 1) / 2 * ld);
    }
    if (p.score == Score::dot) return;
    query_factors = c.take<A>(plan.t_blocks * 2 * block_size());
    grad_proj = c.take<A>(plan.chunk * score_width);
    grad_row = c.take<A>(score_width);
    extents = c.take<Extent<A>>(plan.t_blocks);
    concat.query_layout = Layout<A>::blocked(plan.t_block);
    concat.memory_layout = Layout<A>::blocked(plan.chunk);
    concat.carve(c, p, plan);
  }

  int64_t rows_at(int64_t t0) const { return p.T - t0 < plan.t_block ? p.T - t0 : plan.t_block; }

  A* query_sum(int64_t task) const { return sums.query(shared, task); }
  A* center_sum(int64_t task) const { return sums.centers(shared, task); }
  A* v_sum(int64_t task) const { return sums.v(shared, task); }

  void run(int64_t task) {
    const int64_t segment = task % plan.segments, b = task / plan.segments;
    const int64_t begin = segment * plan.segment_rows;
    const int64_t length = length_of(p, b);
    const int64_t rows = p.memory.starts ? length : p.S;  // the next sequence follows directly
    const int64_t end = begin + plan.segment_rows < rows ? begin + plan.segment_rows : rows;
    const int64_t stop = end < length ? end : length;
    const bool scattered = p.mask || p.bounds || p.T == 0;
    clear_gradients(b, scattered || stop < begin ? begin : stop, end);
    if (p.grad_query || sums.concat)
      memset(query_sum(task), 0, size_t(p.T * score_width) * sizeof(A));
    if (p.score == Score::concat) memset(v_sum(task), 0, size_t(score_width) * sizeof(A));
    if (p.grad_centers) memset(center_sum(task), 0, size_t(p.T) * sizeof(A));
    if (begin >= stop || p.T == 0) return;
    prepare(b);
    Picked picked{index};
    for (int64_t s = begin; s < stop; s += plan.chunk) {
      const int64_t last = s + plan.chunk < stop ? s + plan.chunk : stop;
      if (p.bounds) {
        window_chunk(b, task, s, last);
        continue;
      }
      pick(p, b, 0, p.T, s, last, picked);
      if (picked.count) stored ? chunk_pairs(b, task, picked) : chunk(b, task, picked);
    }
  }

  // Rows that no query reads have gradient 0. With a mask they may be anywhere: all are cleared.
  void clear_gradients(int64_t b, int64_t from, int64_t to) const {
    if (from >= to) return;
    if (p.grad_memory) {
      X* memory_rows = static_cast<X*>(p.grad_memory) + (first_row(p, b) + from) * p.E;
      memset(memory_rows, 0, size_t((to - from) * p.E) * sizeof(X));
    }
    if (!p.grad_memory_proj) return;
    X* proj_rows = static_cast<X*>(p.grad_memory_proj) + (first_row(p, b) + from) * p.K;
    memset(proj_rows, 0, size_t((to - from) * p.K) * sizeof(X));
  }

  // Computes what the chunks need from all queries.
  void prepare(int64_t b) {
    read_queries(b);
    if (stored) pack_queries(b);
    if (p.score == Score::dot) return;
    concat.read_v(p);
    for (int64_t block = 0; block < plan.t_blocks; ++block) {
      const int64_t t0 = block * plan.t_block;
      extents[block] = Extent<A>{};
      concat.query_factors(p, b, t0, rows_at(t0), factors_of(block), block_size(), extents[block]);
    }
  }

  int64_t block_size() const { return Layout<A>::size(plan.t_block, score_width); }
  A* factors_of(int64_t block) const { return query_factors + block * 2 * block_size(); }
  void chunk(int64_t b, int64_t task, const Picked& picked) {
    const Block<A> m = read_picked<X, A>(p.memory, b, picked, p.E, memory_width, memory);
    uint8_t* spoiled = nullptr;
    if (mask_per_query(p)) {
      spoiled = spoiled_rows;
      memset(spoiled, 0, size_t(picked.count));
      mark_spoiled(memory, memory_width, picked.count, p.E, spoiled);
      if (p.score == Score::concat) concat.mark_spoiled_rows(p, b, picked, spoiled);
    }
    Extent<A> m_extent;
    Factors<A> m_factors{};
    if (p.score == Score::concat) {
      m_factors = concat.chunk_factors(p, b, picked, m_extent);
      memset(grad_proj, 0, size_t(plan.chunk * score_width) * sizeof(A));
    }
    for (int64_t t0 = 0; t0 < p.T; t0 += plan.t_block) {
      const int64_t rows = rows_at(t0);
      const bool first = t0 == 0;
      const Block<A> grad =
          read_range<X, A>(p.grad_context, b, t0, rows, p.E, memory_width, grad_context);
      if (p.score == Score::dot) {
        const Block<A> q = read_range<X, A>(p.query, b, t0, rows, p.K, score_width, query);
        if (!weights_at_hand())
          rows_dot_rows(q.data, q.stride, rows, m.data, m.stride, picked.count, score_width, scores,
                        ld);
        rows_dot_rows(grad.data, grad.stride, rows, m.data, m.stride, picked.count, memory_width,
                      grads, ld);
        score_gradients(b, t0, rows, picked, spoiled);
        if (p.grad_memory) {
          add_to_memory(rows, picked, grad, first);
          add_scaled_rows<A>({grads, 1, ld}, picked.count, q.data, q.stride, rows, score_width,
                             grad_memory, memory_width, Previous<A>::kept());
        }
        if (p.grad_query)
          add_scaled_rows<A>({grads, ld, 1}, rows, m.data, m.stride, picked.count, memory_width,
                             query_sum(task) + t0 * score_width, score_width, Previous<A>::kept());
      } else {
        concat_block(b, task, t0, rows, picked, spoiled, grad, m, m_factors, m_extent, first);
      }
    }
    write_chunk(b, picked);
  }

  int64_t packed_size() const { return (plan.t_block + 1) * p.E; }

  // Rows with a multiple of 32 elements are used in place: nothing is copied to `stored`.
  void pack_queries([[maybe_unused]] int64_t b) {
    if constexpr (kPairs)
      for (int64_t t0 = 0; t0 < p.T && p.grad_memory; t0 += plan.t_block) {
        const Picked rows{nullptr, t0, rows_at(t0)};
        const int64_t at = t0 / plan.t_block * packed_size();
        pack_pairs(stored_rows(p.query, b, rows, p.E, p.E, stored), rows.count, p.E,
                   packed_query + at);
        pack_pairs(stored_rows(p.grad_context, b, rows, p.E, p.E, stored), rows.count, p.E,
                   packed_grad + at);
      }
  }

  // `chunk` for bfloat16 multiplied in pairs. P and dS are rounded to bfloat16 for their products,
  // as in a chain of torch operations.
  void chunk_pairs([[maybe_unused]] int64_t b, [[maybe_unused]] int64_t task,
                   [[maybe_unused]] const Picked& picked) {
    if constexpr (kPairs) {
      const Block<X> m = stored_rows(p.memory, b, picked, p.E, p.E, stored);
      const int64_t n = picked.count;
      if (p.grad_query) pack_pairs(m, n, p.E, packed_memory);
      for (int64_t t0 = 0; t0 < p.T; t0 += plan.t_block) {
        const Picked block{nullptr, t0, rows_at(t0)};
        const Block<X> q = stored_rows(p.query, b, block, p.E, p.E, stored);
        const Block<X> grad = stored_rows(p.grad_context, b, block, p.E, p.E, stored);
        const int64_t rows = block.count, half = (rows + 1) / 2;
        const int64_t at = t0 / plan.t_block * packed_size();
        rows_dot_rows(q.data, q.stride, rows, m.data, m.stride, n, p.E, scores, ld);
        rows_dot_rows(grad.data, grad.stride, rows, m.data, m.stride, n, p.E, grads, ld);
        score_gradients(b, t0, rows, picked, nullptr);
        if (p.grad_memory) {
          pair_queries(kept, ld, rows, n, pairs);
          add_scaled_pairs({pairs, 1, ld}, n, packed_grad + at, half, p.E, grad_memory,
                           memory_width, {t0 != 0, nullptr});
          pair_queries(grads, ld, rows, n, pairs);
          add_scaled_pairs({pairs, 1, ld}, n, packed_query + at, half, p.E, grad_memory,
                           memory_width, Previous<A>::kept());
        }
        if (!p.grad_query) continue;
        pair_weights(grads, ld, rows, n);
        add_scaled_pairs({grads, ld, 1}, rows, packed_memory, (n + 1) / 2, p.E,
                         query_sum(task) + t0 * score_width, score_width, Previous<A>::kept());
      }
      write_chunk(b, picked);
    }
  }

  // The rows s0 .. s1 - 1 for local attention: those that a window covers are read, and processed
  // query by query, so that the work is that of the windows. A mask cuts a window into runs.
  void window_chunk(int64_t b, int64_t task, int64_t s0, int64_t s1) {
    const Picked picked = pick_windows(b, s0, s1);
    if (picked.count == 0) return;
    const Block<A> m = read_picked<X, A>(p.memory, b, picked, p.E, memory_width, memory);
    memset(grad_memory, 0, size_t(picked.count * memory_width) * sizeof(A));
    Extent<A> m_extent;
    Factors<A> m_factors{};
    if (p.score == Score::concat) {
      m_factors = concat.chunk_factors(p, b, picked, m_extent);
      memset(grad_proj, 0, size_t(plan.chunk * score_width) * sizeof(A));
    }
    for (int64_t t = 0; t < p.T; ++t) {
      int64_t s = p.bounds[2 * (b * p.T + t)], end = p.bounds[2 * (b * p.T + t) + 1];
      s = s > s0 ? s : s0;
      end = end < s1 ? end : s1;
      while (s < end) {
        if (!is_met(b, t, s, s0)) {
          ++s;
          continue;
        }
        int64_t stop = p.mask ? s + 1 : end;
        while (stop < end && is_met(b, t, stop, s0)) ++stop;
        window_run(b, task, t, {nullptr, s, stop - s}, place[s - s0], m, m_factors, m_extent);
        s = stop;
      }
    }
    write_chunk(b, picked);
  }

  // Whether a query attends to a row of its window. The mask alone is not enough: it is read a
  // second time here, and another thread may have changed it since the rows were picked.
  bool is_met(int64_t b, int64_t t, int64_t s, int64_t s0) const {
    return place[s - s0] >= 0 && (!p.mask || allowed(p, b, t, s));
  }

  // The rows that a window covers, and in `place` the number of each row among them.
  Picked pick_windows(int64_t b, int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) place[s - s0] = -1;
    for (int64_t t = 0; t < p.T; ++t) {
      const int64_t* bounds = p.bounds + 2 * (b * p.T + t);
      const int64_t last = bounds[1] < s1 ? bounds[1] : s1;
      for (int64_t s = bounds[0] > s0 ? bounds[0] : s0; s < last; ++s)
        if (!p.mask || allowed(p, b, t, s)) place[s - s0] = 0;
    }
    Picked picked{index};
    picked.dense = false;
    for (int64_t s = s0; s < s1; ++s) {
      if (place[s - s0] < 0) continue;
      place[s - s0] = picked.count;
      index[picked.count++] = s;
    }
    if (picked.count == 0) return picked;
    picked.first = index[0];
    picked.dense = index[picked.count - 1] - index[0] + 1 == picked.count;
    return picked;
  }

  // One query against a run of rows: the chunk's rows from `at` on.
  void window_run(int64_t b, int64_t task, int64_t t, const Picked& run, int64_t at,
                  const Block<A>& chunk, Factors<A> m_factors, const Extent<A>& m_extent) {
    const Block<A> m{chunk.data + at * chunk.stride, chunk.stride};
    const Block<A> grad =
        read_range<X, A>(p.grad_context, b, t, 1, p.E, memory_width, grad_context);
    A* grad_rows = grad_memory + at * memory_width;
    A* moment = p.grad_centers ? center_sum(task) + t : nullptr;
    Block<A> q{};
    Factors<A> q_factors{};
    Range range{};
    if (p.score == Score::dot) {
      q = read_range<X, A>(p.query, b, t, 1, p.K, score_width, query);
      if (!weights_at_hand())
        rows_dot_rows(q.data, q.stride, 1, m.data, m.stride, run.count, score_width, scores, ld);
    } else {
      const int64_t block = t / plan.t_block, i = t % plan.t_block * concat.query_layout.row;
      q_factors = {factors_of(block) + i, factors_of(block) + block_size() + i,
                   concat.query_layout.row, concat.query_layout.step};
      m_factors.data += at * m_factors.row;
      range = range_of(extents[block], m_extent, concat.v_largest);
      if (range == Range::exact) {
        q_factors = concat.exact_queries(p, b, t, 1);
        m_factors = concat.exact_chunk(p, b, run, nullptr);
      }
      if (!weights_at_hand())
        concat_scores_in<kBlocked>(range, q_factors, 1, m_factors, run.count, concat.v, score_width,
                                   concat.v_sum, scores, ld);
    }
    if (through_scores())
      rows_dot_rows(grad.data, grad.stride, 1, m.data, m.stride, run.count, memory_width, grads,
                    ld);
    score_gradients(b, t, 1, run, nullptr, moment);
    if (p.grad_memory)
      add_scaled_rows<A>({kept, 1, ld}, run.count, grad.data, grad.stride, 1, memory_width,
                         grad_rows, memory_width, Previous<A>::kept());
    if (p.score == Score::dot) {
      if (p.grad_memory)
        add_scaled_rows<A>({grads, 1, ld}, run.count, q.data, q.stride, 1, score_width, grad_rows,
                           memory_width, Previous<A>::kept());
      if (p.grad_query)
        add_scaled_rows<A>({grads, ld, 1}, 1, m.data, m.stride, run.count, memory_width,
                           query_sum(task) + t * score_width, score_width, Previous<A>::kept());
    } else if (const int wanted = wanted_sums()) {
      concat_backward_in(range, wanted, q_factors, 1, m_factors, run.count, grads, ld, score_width,
                         query_sum(task) + t * kLanes<A>, p.T * kLanes<A>,
                         grad_proj + at * kLanes<A>, plan.chunk * kLanes<A>, v_sum(task));
      add_v_constant(task, 1, run);
    }
  }

  void concat_block(int64_t b, int64_t task, int64_t t0, int64_t rows, const Picked& picked,
                    const uint8_t* spoiled, const Block<A>& grad, const Block<A>& m,
                    Factors<A> m_factors, const Extent<A>& m_extent, bool first) {
    const int64_t block = t0 / plan.t_block;
    Factors<A> q{factors_of(block), factors_of(block) + block_size(), concat.query_layout.row,
                 concat.query_layout.step};
    const Range range = range_of(extents[block], m_extent, concat.v_largest);
    if (range == Range::exact) {
      q = concat.exact_queries(p, b, t0, rows);
      m_factors = concat.exact_chunk(p, b, picked, spoiled);
    }
    const int wanted = wanted_sums();
    if (p.scores_only) {
      take_score_gradients(b, t0, rows, picked);
    } else {
      if (!weights_at_hand())
        concat_scores_in<kBlocked>(range, q, rows, m_factors, picked.count, concat.v, score_width,
                                   concat.v_sum, scores, ld);
      if (through_scores())
        rows_dot_rows(grad.data, grad.stride, rows, m.data, m.stride, picked.count, memory_width,
                      grads, ld);
      score_gradients(b, t0, rows, picked, spoiled);
      if (p.grad_memory) add_to_memory(rows, picked, grad, first);
    }
    if (!wanted) return;
    concat_backward_in(range, wanted, q, rows, m_factors, picked.count, grads, ld, score_width,
                       query_sum(task) + t0 * kLanes<A>, p.T * kLanes<A>, grad_proj,
                       plan.chunk * kLanes<A>, v_sum(task));
    add_v_constant(task, rows, picked);
  }

  // The sums of concat_backward that are wanted.
  int wanted_sums() const {
    return (p.grad_query ? kOfQuery : 0) | (p.grad_memory_proj ? kOfMemory : 0) |
           (p.grad_v ? kOfV : 0);
  }

  void add_to_memory(int64_t rows, const Picked& picked, const Block<A>& grad, bool first) const {
    add_scaled_rows<A>({kept, 1, ld}, picked.count, grad.data, grad.stride, rows, memory_width,
                       grad_memory, memory_width, {!first, nullptr});
  }

  // dv = sum g (1 - 2r): concat_backward has summed g r; subtracts half the sum of g, and merge_v
  // multiplies by -2.
  void add_v_constant(int64_t task, int64_t rows, const Picked& picked) const {
    if (!p.grad_v) return;
    Vec<A> sum{};
    const int64_t width = round_up(picked.count, kLanes<A>);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; j += kLanes<A>) sum += load(grads + i * ld + j);
    const A half = A(0.5) * sum_lanes<A>(sum);
    A* out = v_sum(task);
    for (int64_t d = 0; d < score_width; d += kLanes<A>) store(out + d, load(out + d) - half);
  }

  void write_chunk(int64_t b, const Picked& picked) const {
    for (int64_t j = 0; j < picked.count; ++j) {
      const int64_t row = first_row(p, b) + picked[j];
      if (p.grad_memory)
        narrow_row(grad_memory + j * memory_width, A(1), p.E,
                   static_cast<X*>(p.grad_memory) + row * p.E);
      if (!p.grad_memory_proj) continue;
      gather(grad_proj + j * kLanes<A>, plan.chunk * kLanes<A>, score_width, grad_row);
      scale_by_v(concat.v, score_width, grad_row);
      narrow_row(grad_row, A(1), p.K, static_cast<X*>(p.grad_memory_proj) + row * p.K);
    }
  }

  // Back from the blocked layout to a row.
  static void gather(const A* blocked, int64_t step, int64_t padded, A* row) {
    for (int64_t d = 0; d < padded; d += kLanes<A>, blocked += step) store(row + d, load(blocked));
  }
  static void scale_by_v(const A* v, int64_t padded, A* row) {
    for (int64_t d = 0; d < padded; d += kLanes<A>)
      store(row + d, load(row + d) * (A(4) * load(v + d)));
  }
};

}  // namespace
}  // namespace fused_attn
