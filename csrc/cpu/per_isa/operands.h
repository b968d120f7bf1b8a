// Operands of the concat score, for forward and backward tasks: factors of the queries and of one
// chunk of memory, and the projections themselves for chunks whose factors are out of range.
#pragma once

#include "concat.h"

namespace fused_attn {
namespace {

// The layout of the factors: by rows, `row` = padded and `step` = lanes, for the forward pass,
// whose inner loop runs along a row; or blocked, `row` = lanes and `step` = (rows + 1) lanes, for
// the backward, which processes one vector of columns of all rows. The extra row keeps the rows of
// a tile out of each other's cache sets.
template <class A>
struct Layout {
  int64_t row, step;
  static Layout by_rows(int64_t padded) { return {padded, kLanes<A>}; }
  static Layout blocked(int64_t rows) { return {kLanes<A>, (rows + 1) * kLanes<A>}; }
  static int64_t size(int64_t rows, int64_t padded) { return (rows + 1) * padded; }
};

// Copies a row of projections into the layout, for the exact range.
template <class A>
FA_INLINE void spread(const A* x, int64_t padded, A* out, int64_t step) {
  for (int64_t d = 0; d < padded; d += kLanes<A>, out += step) store(out, load(x + d));
}

template <class X>
struct ConcatOperands {
  using A = Arithmetic<X>;
  int64_t padded;
  A* v;  // (padded)
  A v_sum, v_largest;
  A* staged;          // one row, on its way to another layout
  A* memory_factors;  // one chunk
  A* exact_query;     // one query tile
  A* exact_memory;    // one chunk
  Layout<A> query_layout, memory_layout;

  void carve(Carver& carver, const AttentionParams& p, const Plan& plan) {
    padded = vector_widths<X>(p).score;
    v = carver.take<A>(padded);
    staged = carver.take<A>(padded);
    memory_factors = carver.take<A>(Layout<A>::size(plan.chunk, padded));
    exact_query = carver.take<A>(Layout<A>::size(plan.t_block, padded));
    exact_memory = carver.take<A>(Layout<A>::size(plan.chunk, padded));
  }

  void read_v(const AttentionParams& p) {
    widen_row(static_cast<const X*>(p.v), p.K, v, padded);
    Vec<A> sum{}, largest{};
    for (int64_t d = 0; d < padded; d += kLanes<A>) {
      const Vec<A> x = load(v + d);
      sum += x;
      largest = at_least<A>(largest, x < A(0) ? -x : x);
    }
    v_sum = sum_lanes<A>(sum);
    v_largest = max_lanes<A>(largest);
  }

  // Factors of the queries t0 .. t0 + n - 1, written to two blocks: p, then v p.
  Factors<A> query_factors(const AttentionParams& p, int64_t b, int64_t t0, int64_t n, A* out,
                           int64_t block, Extent<A>& extent) const {
    for (int64_t i = 0; i < n; ++i) {
      const Block<A> row = read_range<X, A>(p.query, b, t0 + i, 1, p.K, padded, staged);
      A* to = out + i * query_layout.row;
      exponentiate(row.data, A(-2), padded, to, query_layout.step, extent);
      for (int64_t d = 0; d < padded; d += kLanes<A>, to += query_layout.step)
        store(to + block, load(v + d) * load(to));
    }
    return {out, out + block, query_layout.row, query_layout.step};
  }

  Factors<A> exact_queries(const AttentionParams& p, int64_t b, int64_t t0, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      const Block<A> row = read_range<X, A>(p.query, b, t0 + i, 1, p.K, padded, staged);
      spread(row.data, padded, exact_query + i * query_layout.row, query_layout.step);
    }
    return {exact_query, nullptr, query_layout.row, query_layout.step};
  }

  const A* staged_row(const AttentionParams& p, int64_t b, int64_t s) const {
    return read_range<X, A>(p.memory_proj, b, s, 1, p.K, padded, staged).data;
  }

  // Factors of a chunk from prepared exponentials. Rows that need no padding are used in place if
  // the layout is by rows.
  template <class P>
  Factors<A> prepared_factors(const AttentionParams& p, int64_t b, const Picked& picked,
                              Extent<A>& extent) const {
    const bool by_rows = memory_layout.step == kLanes<A>;
    if constexpr (__is_same(P, A)) {
      if (by_rows && picked.dense && p.K == padded) {
        const A* base = static_cast<const A*>(p.memory_exp.data) + p.memory_exp.before(b) +
                        picked.first * p.memory_exp.row_stride;
        for (int64_t i = 0; i < picked.count; ++i)
          adopt<A>(base + i * p.memory_exp.row_stride, padded, nullptr, 0, extent);
        return {base, nullptr, p.memory_exp.row_stride, kLanes<A>};
      }
    }
    for (int64_t i = 0; i < picked.count; ++i) {
      const Block<A> row = read_range<P, A>(p.memory_exp, b, picked[i], 1, p.K, padded, staged);
      A* out = memory_factors + i * memory_layout.row;
      adopt(row.data, padded, out, memory_layout.step, extent);
    }
    return {memory_factors, nullptr, memory_layout.row, memory_layout.step};
  }

  // Factors of a chunk: the prepared exponentials, or those of the projection.
  Factors<A> chunk_factors(const AttentionParams& p, int64_t b, const Picked& picked,
                           Extent<A>& extent) const {
    if (p.memory_exp.data) {
      if constexpr (__is_same(A, double))
        return prepared_factors<double>(p, b, picked, extent);
      else if (p.exp_dtype == DType::bf16)
        return prepared_factors<BFloat16>(p, b, picked, extent);
      else
        return prepared_factors<float>(p, b, picked, extent);
    }
    for (int64_t i = 0; i < picked.count; ++i) {
      A* out = memory_factors + i * memory_layout.row;
      exponentiate(staged_row(p, b, picked[i]), A(2), padded, out, memory_layout.step, extent);
    }
    return {memory_factors, nullptr, memory_layout.row, memory_layout.step};
  }

  // Spoiled rows (null if there are none) become 0, as `mark_spoiled` does in the memory.
  Factors<A> exact_chunk(const AttentionParams& p, int64_t b, const Picked& picked,
                         const uint8_t* spoiled) const {
    for (int64_t i = 0; i < picked.count; ++i) {
      const A* row = staged_row(p, b, picked[i]);
      if (spoiled && spoiled[i]) {
        memset(staged, 0, size_t(padded) * sizeof(A));
        row = staged;
      }
      spread(row, padded, exact_memory + i * memory_layout.row, memory_layout.step);
    }
    return {exact_memory, nullptr, memory_layout.row, memory_layout.step};
  }

  // Marks projection rows that are not finite: see mark_spoiled.
  void mark_spoiled_rows(const AttentionParams& p, int64_t b, const Picked& picked,
                         uint8_t* spoiled) const {
    for (int64_t i = 0; i < picked.count; ++i) {
      const A* row = staged_row(p, b, picked[i]);
      A probe = 0;
      for (int64_t d = 0; d < p.K; ++d) probe += row[d] * A(0);
      if (!(probe == A(0))) spoiled[i] = 1;
    }
  }
};

}  // namespace
}  // namespace fused_attn
