// The choice of the memory rows that a task reads, and their conversion to the arithmetic type.
#pragma once

#include "../../attention_params.h"
#include "../guard.h"
#include "../plan.h"
#include "convert.h"

namespace fused_attn {
namespace {

// Hands out aligned pieces of a thread's scratch. With a null base it only counts the bytes; in a
// debug build it also fills the pieces and sets guards after them, or checks the guards that
// another carver set.
class Carver {
 public:
  enum Mode { carve, check };
  explicit Carver(void* base, Mode mode = carve) : base_(static_cast<char*>(base)), mode_(mode) {}
  template <class X>
  X* take(int64_t n) {
    const int64_t bytes = n * int64_t(sizeof(X)), whole = round_up(bytes, 64) + kGuardBytes;
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += whole;
    if (kGuardBytes && piece)
      mode_ == carve ? set_guard(piece, bytes, piece + whole)
                     : check_guard(piece, bytes, piece + whole);
    return reinterpret_cast<X*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  Mode mode_;
  int64_t used_ = 0;
};

template <class A>
FA_INLINE int64_t padded_chunk(const Plan& plan) {
  return round_up(plan.chunk, kLanes<A>);
}

template <class A>
struct Block {
  const A* data;
  int64_t stride;
};

// Positions of one chunk that at least one query of [t0, t1) may read. All later steps work on this
// list: rows that do not count are neither read nor computed.
struct Picked {
  int64_t* index = nullptr;  // room for a chunk; not read if dense
  int64_t first = 0, count = 0;
  bool dense = true;  // the positions are first, first + 1, ...

  int64_t operator[](int64_t i) const { return dense ? first + i : index[i]; }
};

FA_INLINE bool allowed(const AttentionParams& p, int64_t b, int64_t t, int64_t s) {
  return p.mask[b * p.mask_b + t * p.mask_t + s * p.mask_s] != 0;
}
// Whether each query has a mask of its own.
FA_INLINE bool mask_per_query(const AttentionParams& p) {
  return p.mask && p.mask_t != 0 && p.T > 1;
}

FA_INLINE void pick(const AttentionParams& p, int64_t b, int64_t t0, int64_t t1, int64_t s0,
                    int64_t s1, Picked& picked) {
  picked.first = s0;
  picked.count = s1 - s0;
  picked.dense = p.mask == nullptr;
  if (picked.dense) return;
  picked.count = 0;
  const int64_t last = mask_per_query(p) ? t1 : t0 + 1;
  for (int64_t s = s0; s < s1; ++s) {
    bool any = false;
    for (int64_t t = t0; t < last && !any; ++t) any = allowed(p, b, t, s);
    if (any) picked.index[picked.count++] = s;
  }
}

// The Gaussian exp(-((s - center) rate)^2 / 2) at the picked positions of a query, padded.
template <class A>
FA_INLINE void bell_factors(const AttentionParams& p, int64_t row, const Picked& picked, A* out) {
  const A center = static_cast<const A*>(p.centers)[row], rate = A(p.rate);
  const int64_t width = round_up(picked.count, kLanes<A>);
  for (int64_t j = 0; j < picked.count; ++j) out[j] = (A(picked[j]) - center) * rate;
  for (int64_t j = picked.count; j < width; ++j) out[j] = A(0);
  for (int64_t j = 0; j < width; j += kLanes<A>) {
    const Vec<A> x = load(out + j);
    store(out + j, exponential(A(-0.5) * x * x));
  }
}

FA_INLINE int64_t length_of(const AttentionParams& p, int64_t b) {
  return p.lengths ? p.lengths[b] : p.S;
}
// The first row of batch row b in the gradient of the memory.
FA_INLINE int64_t first_row(const AttentionParams& p, int64_t b) {
  return p.memory.starts ? p.memory.starts[b] : b * p.S;
}

// The rows first .. first + n - 1 of batch row b: in place if they need no conversion or padding.
template <class X, class A>
FA_INLINE Block<A> read_range(const Rows& rows, int64_t b, int64_t first, int64_t n, int64_t width,
                              int64_t padded, A* scratch) {
  const X* base = static_cast<const X*>(rows.data) + rows.before(b);
  if constexpr (__is_same(X, A))
    if (width == padded) return {base + first * rows.row_stride, rows.row_stride};
  for (int64_t i = 0; i < n; ++i)
    widen_row(base + (first + i) * rows.row_stride, width, scratch + i * padded, padded);
  return {scratch, padded};
}

template <class X, class A>
FA_INLINE Block<A> read_picked(const Rows& rows, int64_t b, const Picked& picked, int64_t width,
                               int64_t padded, A* scratch) {
  if (picked.dense)
    return read_range<X, A>(rows, b, picked.first, picked.count, width, padded, scratch);
  const X* base = static_cast<const X*>(rows.data) + rows.before(b);
  for (int64_t i = 0; i < picked.count; ++i)
    widen_row(base + picked.index[i] * rows.row_stride, width, scratch + i * padded, padded);
  return {scratch, padded};
}

// With a per-query mask, a row that is not finite may spoil only the queries that attend to
// it: it is marked, and zeroed so that 0 x NaN does not reach the others.
template <class A>
FA_INLINE void mark_spoiled(A* rows, int64_t stride, int64_t n, int64_t width, uint8_t* spoiled) {
  for (int64_t i = 0; i < n; ++i) {
    A* row = rows + i * stride;
    A probe = 0;
    for (int64_t d = 0; d < width; ++d) probe += row[d] * A(0);  // NaN if any is not finite
    if (probe == A(0)) continue;
    spoiled[i] = 1;
    for (int64_t d = 0; d < width; ++d) row[d] = A(0);
  }
}

// Scales the scores, and writes -inf at masked positions and in the padding, and NaN where a query
// attends to a spoiled row.
template <class A>
FA_INLINE void finish_scores(const AttentionParams& p, int64_t b, int64_t t0, int64_t rows,
                             const Picked& picked, const uint8_t* spoiled, A* scores, int64_t ld) {
  const bool scaled = p.score == Score::dot && p.scale != 1.0;
  const A scale = A(p.scale);
  const int64_t width = round_up(picked.count, kLanes<A>);
  for (int64_t i = 0; i < rows; ++i) {
    A* row = scores + i * ld;
    for (int64_t j = picked.count; j < width; ++j) row[j] = -kInfinity<A>;
    if (scaled)
      for (int64_t j = 0; j < picked.count; ++j) row[j] *= scale;
    if (!spoiled) continue;
    for (int64_t j = 0; j < picked.count; ++j) {
      if (!allowed(p, b, t0 + i, picked[j]))
        row[j] = -kInfinity<A>;
      else if (spoiled[j])
        row[j] = A(__builtin_nan(""));
    }
  }
}

}  // namespace
}  // namespace fused_attn
