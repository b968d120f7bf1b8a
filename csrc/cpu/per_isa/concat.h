// The concat score without a tanh: with p = exp(-2q), w = exp(2m) and r = p / (p + w),
//
//   tanh(q + m) = 1 - 2r      and      1 - tanh^2(q + m) = 4 (r - r^2) = 4 p w / (p + w)^2,
//
// so that exponentials are taken of the T + S rows only and the T S K inner loop is an addition, a
// few multiplications and a part of a reciprocal. (With exp(2q) instead of p the denominator would
// be 1 + exp(2q) w, a multiply-add; most processors have separate pipes for additions.)
// The operands are factors p and w; where these would leave the range of the type, the loop takes
// the projections themselves.
#pragma once

#include "chunk.h"
#include "tiles.h"

namespace fused_attn {
namespace {

enum class Range {
  quad,    // products of four denominators are finite: one reciprocal serves four terms
  single,  // p and w are finite, their products may not be: a reciprocal for each term
  exact    // some |q| or |m| too large for exp(2x): operands are q and m themselves
};

template <Range R>
struct In {
  static constexpr Range value = R;
};

template <class A>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float argument = kLargestProjection;  // exp(2 * 43) < 3.4e38
  // Of p + w for a quad; its fourth power, times a weight of up to `weight`, is a normal number.
  static constexpr float low = 1e-6f, high = 1e6f, weight = 1e9f;
};
template <>
struct Limits<double> {
  static constexpr double argument = 340.0;
  static constexpr double low = 1e-60, high = 1e60, weight = 1e60;
};

// The range of a block of factors.
template <class A>
struct Extent {
  A high = A(0), low = kInfinity<A>;
  bool exact = false;  // some argument was out of range (or NaN)
  void join(A above, A below) {
    high = above > high ? above : high;
    low = below < low ? below : low;
    exact = exact || !(below >= A(0)) || !(above <= kInfinity<A>);
  }
};

template <class A>
FA_INLINE Range range_of(const Extent<A>& q, const Extent<A>& m, A largest_weight) {
  if (q.exact || m.exact) return Range::exact;
  const bool quad = q.high + m.high <= Limits<A>::high && q.low + m.low >= Limits<A>::low &&
                    largest_weight <= Limits<A>::weight;
  return quad ? Range::quad : Range::single;
}

// Collects the smallest and the largest of the values it sees.
template <class A>
struct Watch {
  Vec<A> high{}, low = splat(kInfinity<A>);
  void see(Vec<A> x) {
    high = at_least<A>(high, x);
    low = at_most<A>(low, x);
  }
  void tell(Extent<A>& extent) const { extent.join(max_lanes<A>(high), min_lanes<A>(low)); }
};

// out[i] = exp(factor x[i]), factor 2 or -2, or -1 where |x[i]| is out of range or NaN. Vectors are
// written `step` apart in out, so that the same code writes rows (step = lanes) and the blocked
// layout.
template <class A>
FA_INLINE void exponentiate(const A* x, A factor, int64_t padded, A* out, int64_t step,
                            Extent<A>& extent) {
  Watch<A> watch;
  const auto inside = [](Vec<A> arg) {
    return (arg <= Limits<A>::argument) & (arg >= -Limits<A>::argument);
  };
  auto all = inside(Vec<A>{});
  for (int64_t d = 0; d < padded; d += kLanes<A>) {
    const Vec<A> arg = load(x + d), e = exponential_inside(arg * factor);
    all &= inside(arg);
    store(out + d / kLanes<A> * step, e);
    watch.see(e);
  }
  if (min_lanes<A>(all ? splat(A(1)) : Vec<A>{}) == A(0)) {  // rare, so it may do the work again
    for (int64_t d = 0; d < padded; d += kLanes<A>) {
      A* to = out + d / kLanes<A> * step;
      store(to, inside(load(x + d)) ? load(to) : splat(A(-1)));
    }
    watch.low = splat(A(-1));
  }
  watch.tell(extent);
}

// The extent of factors that were computed before; they are copied to out unless it is null.
template <class A>
FA_INLINE void adopt(const A* x, int64_t padded, A* out, int64_t step, Extent<A>& extent) {
  Watch<A> watch;
  for (int64_t d = 0; d < padded; d += kLanes<A>) {
    const Vec<A> e = load(x + d);
    if (out) store(out + d / kLanes<A> * step, e);
    watch.see(e);
  }
  watch.tell(extent);
}

// Whether the operands of concat scores are by rows or blocked; see `Layout` in operands.h.
constexpr bool kByRows = false, kBlocked = true;

// A matrix of factors: row i, vector k at data + i * row + k * step. For queries `weighted` is v p
// in the same layout.
template <class A>
struct Factors {
  const A* data;
  const A* weighted;
  int64_t row, step;
};

// The same with one of the two strides known to the compiler, which saves the inner loop most of
// its address arithmetic: the vectors of a row are adjacent, or (blocked) the rows of a vector are.
template <class A, bool Blocked>
struct Tile {
  const A* data;
  const A* weighted;
  int64_t stride;
  explicit Tile(const Factors<A>& f)
      : data(f.data), weighted(f.weighted), stride(Blocked ? f.step : f.row) {}
  int64_t row() const { return Blocked ? kLanes<A> : stride; }
  int64_t step() const { return Blocked ? stride : kLanes<A>; }
  Tile at(int64_t i) const {
    Tile moved = *this;
    moved.data += i * row();
    if (weighted) moved.weighted += i * row();
    return moved;
  }
};

// r = p / (p + w) from one pair of operands; in the exact range these are q and m. There saturated
// terms must be exactly 0 or 1, because r - r^2 must be 0 for them: the division gives that, the
// estimate of the reciprocal does not.
template <class A, Range R>
FA_INLINE Vec<A> ratio(Vec<A> q, Vec<A> m) {
  if constexpr (R == Range::exact) {
    const A limit = A(2) * Limits<A>::argument;
    return A(1) / (exponential(at_most<A>(A(2) * (q + m), splat(limit))) + A(1));
  } else {
    return q * reciprocal<A>(q + m);
  }
}

// sum + c0/x0 + c1/x1 + c2/x2 + c3/x3 with one reciprocal, from c0/x0 + c1/x1 = (c0 x1 + c1 x0) /
// (x0 x1) twice. Thirteen multiply-add operations for four terms.
template <class A>
FA_INLINE Vec<A> add_quad(Vec<A> sum, Vec<A> x0, Vec<A> x1, Vec<A> x2, Vec<A> x3, Vec<A> c0,
                          Vec<A> c1, Vec<A> c2, Vec<A> c3) {
  const Vec<A> x01 = x0 * x1, x23 = x2 * x3;
  const Vec<A> c01 = c0 * x1 + c1 * x0, c23 = c2 * x3 + c3 * x2;
  return sum + (c01 * x23 + c23 * x01) * reciprocal<A>(x01 * x23);
}

template <class A, Range R, bool Blocked, int M, int N>
FA_INLINE void concat_tile(Tile<A, Blocked> q, Tile<A, Blocked> m, const A* v, int64_t padded,
                           A v_sum, A* out, int64_t ldo) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[M][N] = {};
  int64_t d = 0, qk = 0, mk = 0;
  if constexpr (R == Range::quad) {
    for (; d + 4 * L <= padded; d += 4 * L, qk += 4 * q.step(), mk += 4 * m.step())
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const A* w = m.data + j * m.row() + mk;
        const Vec<A> w0 = load(w), w1 = load(w + m.step()), w2 = load(w + 2 * m.step()),
                     w3 = load(w + 3 * m.step());
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
          const A *p = q.data + i * q.row() + qk, *c = q.weighted + i * q.row() + qk;
          acc[i][j] =
              add_quad<A>(acc[i][j], load(p) + w0, load(p + q.step()) + w1,
                          load(p + 2 * q.step()) + w2, load(p + 3 * q.step()) + w3, load(c),
                          load(c + q.step()), load(c + 2 * q.step()), load(c + 3 * q.step()));
        }
      }
  }
  for (; d < padded; d += L, qk += q.step(), mk += m.step())
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j)
        acc[i][j] += load(v + d) *
                     ratio<A, R>(load(q.data + i * q.row() + qk), load(m.data + j * m.row() + mk));
  for (int i = 0; i < M; ++i) {
    A r[4];
    if constexpr (N == 4) {
      sum_lanes_of_four<A>(acc[i], r);
    } else {
      for (int j = 0; j < N; ++j) r[j] = sum_lanes<A>(acc[i][j]);
    }
    for (int j = 0; j < N; ++j) out[i * ldo + j] = v_sum - A(2) * r[j];
  }
}

template <class A, Range R, bool Blocked, int M>
FA_INLINE void concat_rows(Tile<A, Blocked> q, int64_t rows, Tile<A, Blocked> m, int64_t n,
                           const A* v, int64_t padded, A v_sum, A* out, int64_t ldo) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    for (int64_t i = 0; i < rows; i += M)
      concat_tile<A, R, Blocked, M, 4>(q.at(i), m.at(j), v, padded, v_sum, out + i * ldo + j, ldo);
  for (; j < n; ++j)
    for (int64_t i = 0; i < rows; i += M)
      concat_tile<A, R, Blocked, M, 1>(q.at(i), m.at(j), v, padded, v_sum, out + i * ldo + j, ldo);
}

// out[i][j] = v . tanh(q_i + m_j) for `rows` rows of q and n rows of memory. Four queries, which
// stay in the first-level cache, are scored against all rows of the chunk before the next four.
template <class A, Range R, bool Blocked>
static void concat_scores(Tile<A, Blocked> q, int64_t rows, Tile<A, Blocked> m, int64_t n,
                          const A* v, int64_t padded, A v_sum, A* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 4)
    concat_rows<A, R, Blocked, 2>(q.at(i), rows - i >= 4 ? 4 : 2, m, n, v, padded, v_sum,
                                  out + i * ldo, ldo);
  if (rows % 2)
    concat_rows<A, R, Blocked, 1>(q.at(rows - 1), 1, m, n, v, padded, v_sum, out + (rows - 1) * ldo,
                                  ldo);
}

template <bool Blocked, class A>
FA_INLINE void concat_scores_in(Range range, const Factors<A>& q, int64_t rows, const Factors<A>& m,
                                int64_t n, const A* v, int64_t padded, A v_sum, A* out,
                                int64_t ldo) {
  const Tile<A, Blocked> qt(q), mt(m);
  switch (range) {
    case Range::quad:
      return concat_scores<A, Range::quad>(qt, rows, mt, n, v, padded, v_sum, out, ldo);
    case Range::single:
      return concat_scores<A, Range::single>(qt, rows, mt, n, v, padded, v_sum, out, ldo);
    case Range::exact:
      return concat_scores<A, Range::exact>(qt, rows, mt, n, v, padded, v_sum, out, ldo);
  }
}

// One vector of columns of the backward: with u = r - r^2 and g the gradients of the scores,
//   dq_i += sum_j g_ij u,   dm_j += sum_i g_ij u   (both still without the factor 4 v),
//   dv   += sum_ij g_ij r   (dv itself is sum g - 2 times this).
// Lanes are columns, so nothing is reduced across them and g is a broadcast. In the quad range
// u = p w s^2 and r = p s with s = 1 / (p + w), and p and w are factored out of the sums: seven
// multiply-add operations for a term instead of eight. Only the sums in `Want` are computed.
enum Wanted { kOfQuery = 1, kOfMemory = 2, kOfV = 4 };

template <class A, Range R, int Want, int M>
FA_INLINE void concat_backward_rows(const A* q, const A* m, const A* g, int64_t ldg, int64_t n,
                                    A* dq, A* dm, Vec<A>& dv) {
  constexpr bool factored = R == Range::quad;
  Vec<A> qi[M], dqi[M] = {}, dvi[M] = {};
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) qi[i] = load(q + i * kLanes<A>);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<A> mj = load(m + j * kLanes<A>);
    Vec<A> dmj = {};
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const A gij = g[i * ldg + j];
      if constexpr (factored) {
        const Vec<A> s = reciprocal<A>(qi[i] + mj), gs = gij * s;
        if constexpr (Want & (kOfQuery | kOfMemory)) {
          const Vec<A> gss = gs * s;
          if constexpr (Want & kOfQuery) dqi[i] += gss * mj;
          if constexpr (Want & kOfMemory) dmj += gss * qi[i];
        }
        if constexpr (Want & kOfV) dvi[i] += gs;
      } else {
        const Vec<A> r = ratio<A, R>(qi[i], mj);
        if constexpr (Want & (kOfQuery | kOfMemory)) {
          const Vec<A> gu = gij * (r - r * r);
          if constexpr (Want & kOfQuery) dqi[i] += gu;
          if constexpr (Want & kOfMemory) dmj += gu;
        }
        if constexpr (Want & kOfV) dvi[i] += gij * r;
      }
    }
    if constexpr (Want & kOfMemory) {
      const Vec<A> before = load(dm + j * kLanes<A>);
      store(dm + j * kLanes<A>, factored ? before + mj * dmj : before + dmj);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    if constexpr (Want & kOfQuery) {
      const Vec<A> before = load(dq + i * kLanes<A>);
      store(dq + i * kLanes<A>, factored ? before + qi[i] * dqi[i] : before + dqi[i]);
    }
    if constexpr (Want & kOfV) dv += factored ? qi[i] * dvi[i] : dvi[i];
  }
}

// Blocked layout: vector k of row i at data + k * step + i * lanes. dq and dm are blocked too, with
// their own steps; dv is a row.
template <class A, Range R, int Want>
static void concat_backward(Factors<A> q, int64_t rows, Factors<A> m, int64_t n, const A* g,
                            int64_t ldg, int64_t padded, A* dq, int64_t dq_step, A* dm,
                            int64_t dm_step, A* dv) {
  constexpr int M = kVectorBytes == 64 ? 4 : 2;
  for (int64_t k = 0; k < padded / kLanes<A>; ++k) {
    const A *qk = q.data + k * q.step, *mk = m.data + k * m.step;
    A *dqk = dq + k * dq_step, *dmk = dm + k * dm_step;
    Vec<A> dvk = load(dv + k * kLanes<A>);
    int64_t i = 0;
    for (; i + M <= rows; i += M)
      concat_backward_rows<A, R, Want, M>(qk + i * kLanes<A>, mk, g + i * ldg, ldg, n,
                                          dqk + i * kLanes<A>, dmk, dvk);
    for (; i < rows; ++i)
      concat_backward_rows<A, R, Want, 1>(qk + i * kLanes<A>, mk, g + i * ldg, ldg, n,
                                          dqk + i * kLanes<A>, dmk, dvk);
    store(dv + k * kLanes<A>, dvk);
  }
}

// The loop is compiled for the usual combinations of wanted sums: all, without v, the query alone,
// and v alone. Other combinations compute a sum that is not used.
template <class A, Range R>
FA_INLINE void concat_backward_of(int wanted, Factors<A> q, int64_t rows, Factors<A> m, int64_t n,
                                  const A* g, int64_t ldg, int64_t padded, A* dq, int64_t dq_step,
                                  A* dm, int64_t dm_step, A* dv) {
  const auto sum = [&](auto want) {
    concat_backward<A, R, decltype(want)::value>(q, rows, m, n, g, ldg, padded, dq, dq_step, dm,
                                                 dm_step, dv);
  };
  if (wanted == kOfQuery)
    sum(Count<kOfQuery>{});
  else if (wanted == kOfV)
    sum(Count<kOfV>{});
  else if (!(wanted & kOfV))
    sum(Count<kOfQuery | kOfMemory>{});
  else
    sum(Count<kOfQuery | kOfMemory | kOfV>{});
}

template <class A>
FA_INLINE void concat_backward_in(Range range, int wanted, Factors<A> q, int64_t rows, Factors<A> m,
                                  int64_t n, const A* g, int64_t ldg, int64_t padded, A* dq,
                                  int64_t dq_step, A* dm, int64_t dm_step, A* dv) {
  const auto sum = [&](auto tag) {
    concat_backward_of<A, decltype(tag)::value>(wanted, q, rows, m, n, g, ldg, padded, dq, dq_step,
                                                dm, dm_step, dv);
  };
  switch (range) {
    case Range::quad:
      return sum(In<Range::quad>{});
    case Range::single:
      return sum(In<Range::single>{});
    case Range::exact:
      return sum(In<Range::exact>{});
  }
}

}  // namespace
}  // namespace fused_attn
