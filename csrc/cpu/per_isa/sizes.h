// Every padded width, and the sizes and strides of everything that one function writes and another
// reads. They are computed here and nowhere else: the driver allocates by them, tasks write by
// them, and merges read by them.
#pragma once

#include "chunk.h"

namespace fused_attn {
namespace {

// Whether bfloat16 is multiplied in pairs (pairs.h).
template <class X>
FA_INLINE bool multiplies_pairs(const AttentionParams& p) {
  return kHasPairs && __is_same(X, BFloat16) && p.score == Score::dot && p.T > kFewQueries &&
         !mask_per_query(p) && !p.bounds;
}

// Elements of a row in scratch, rounded up so that the inner loops have no tails.
struct Widths {
  int64_t memory, score;
  bool pairs = false;  // bfloat16 is multiplied in pairs
};

template <class X>
FA_INLINE Widths vector_widths(const AttentionParams& p) {
  constexpr int64_t lanes = kLanes<Arithmetic<X>>;
  return {round_up(p.E, lanes), round_up(p.K, lanes)};
}

template <class X>
FA_INLINE Widths forward_widths(const AttentionParams& p) {
  Widths widths = vector_widths<X>(p);
  if (!multiplies_pairs<X>(p)) return widths;
  widths = {round_up(p.E, kPairWidth), round_up(p.K, kPairWidth)};
  widths.pairs = true;
  return widths;
}

// The backward multiplies in pairs only rows that need no padding for it.
template <class X>
FA_INLINE Widths backward_widths(const AttentionParams& p) {
  Widths widths = vector_widths<X>(p);
  widths.pairs = multiplies_pairs<X>(p) && p.E % kPairWidth == 0;
  return widths;
}

// Bytes of n elements, in whole lines and with the guard of a debug build.
template <class A>
FA_INLINE int64_t piece_bytes(int64_t n) {
  return round_up(n * int64_t(sizeof(A)), 64) + kGuardBytes;
}

template <class A>
FA_INLINE A* piece(void* base, int64_t index, int64_t bytes) {
  return reinterpret_cast<A*>(static_cast<char*>(base) + index * bytes);
}

// What a forward task leaves when the source is split: the context of its queries, not divided by
// the sum, and running_max and running_sum of each query.
template <class X>
struct Partial {
  using A = Arithmetic<X>;
  int64_t t_block, width;

  Partial(const AttentionParams& p, const Plan& plan)
      : t_block(plan.t_block), width(forward_widths<X>(p).memory) {}

  int64_t bytes() const { return piece_bytes<A>(t_block * (width + 2)); }
  A* context(const Shared& shared, int64_t task) const {
    return piece<A>(shared.partial, task, bytes());
  }
  A* running_max(const Shared& shared, int64_t task) const {
    return context(shared, task) + t_block * width;
  }
  A* running_sum(const Shared& shared, int64_t task) const {
    return running_max(shared, task) + t_block;
  }
};

// What a backward task leaves: the gradients of all queries, by rows (T, width) for the dot score
// and blocked (width / lanes, T, lanes) for concat, and those of v and of the centers. A task that
// computes a whole sum, without padding or rounding, does so directly in the result.
template <class X>
struct Sums {
  using A = Arithmetic<X>;
  int64_t queries, width;
  bool concat, query_in_place, centers_in_place;

  Sums(const AttentionParams& p, const Plan& plan)
      : queries(p.T),
        width(backward_widths<X>(p).score),
        concat(p.score == Score::concat),
        query_in_place(plan.segments == 1 && !concat && width == p.K && __is_same(X, A)),
        centers_in_place(plan.segments == 1) {}

  int64_t query_bytes() const {
    const int64_t n = queries * width;
    return query_in_place ? n * int64_t(sizeof(A)) : piece_bytes<A>(n);
  }
  int64_t v_bytes() const { return piece_bytes<A>(width); }
  int64_t center_bytes() const {
    return centers_in_place ? queries * int64_t(sizeof(A)) : piece_bytes<A>(queries);
  }
  A* query(const Shared& shared, int64_t task) const {
    return piece<A>(shared.grad_query, task, query_bytes());
  }
  A* v(const Shared& shared, int64_t task) const {
    return piece<A>(shared.grad_v, task, v_bytes());
  }
  A* centers(const Shared& shared, int64_t task) const {
    return piece<A>(shared.grad_centers, task, center_bytes());
  }
};

}  // namespace
}  // namespace fused_attn
