// The concat score without a tanh: with E = exp(2q) exp(2m) and r = 1 / (1 + E),
//
//   tanh(q + m) = 1 - 2r      and      1 - tanh^2(q + m) = 4 (r - r^2),
//
// so that exponentials are taken of the T + S rows only and the T S K inner loop is multiplications
// and one reciprocal. Operands come as E-factors, except where these would leave the range of the
// type: there the loop takes the projections themselves.
#pragma once

#include "chunk.h"
#include "tiles.h"

namespace fused_attn {
namespace {

enum class Range {
  paired,   // all products below Limits::pair: one reciprocal serves two terms
  clamped,  // factors finite, products may overflow: clamp them (there r is 0 to rounding anyway)
  exact     // some |q| or |m| too large for exp(2x): operands are q and m themselves
};

template <class A>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float argument = 43.0f;  // exp(2 * 43) < 3.4e38
  static constexpr float pair = 1e18f;      // a product of two is finite
  static constexpr float single = 1e37f;    // its reciprocal is a normal number
};
template <>
struct Limits<double> {
  static constexpr double argument = 340.0;
  static constexpr double pair = 1e150;
  static constexpr double single = 1e300;
};

// What is known of a block of E-factors.
template <class A>
struct Extent {
  A largest = A(0);
  bool exact = false;  // some argument was out of range (or NaN)
  void join(A high, A low) {
    largest = high > largest ? high : largest;
    exact = exact || !(low >= A(0)) || !(high <= kInfinity<A>);
  }
};

template <class A>
FA_INLINE Range range_of(const Extent<A>& q, const Extent<A>& m) {
  if (q.exact || m.exact) return Range::exact;
  return q.largest * m.largest < Limits<A>::pair ? Range::paired : Range::clamped;
}

// out[i] = exp(2 x[i]), or -1 where |x[i]| is out of range or NaN. In groups of one vector that lie
// `step` apart in out, so that the same code writes rows (step = lanes) and the blocked layout.
template <class A>
FA_INLINE void exponentiate(const A* x, int64_t padded, A* out, int64_t step, Extent<A>& extent) {
  Vec<A> high{}, low{};
  for (int64_t d = 0; d < padded; d += kLanes<A>, out += step) {
    const Vec<A> arg = load(x + d);
    const auto inside = (arg <= Limits<A>::argument) & (arg >= -Limits<A>::argument);
    const Vec<A> e = inside ? exponential(inside ? arg * A(2) : Vec<A>{}) : splat(A(-1));
    store(out, e);
    high = at_least<A>(high, e);
    low = at_most<A>(low, e);
  }
  extent.join(max_lanes<A>(high), min_lanes<A>(low));
}

// The extent of factors that were computed before; moved to out if that is not null.
template <class A>
FA_INLINE void adopt(const A* x, int64_t padded, A* out, int64_t step, Extent<A>& extent) {
  Vec<A> high{}, low{};
  for (int64_t d = 0; d < padded; d += kLanes<A>) {
    const Vec<A> e = load(x + d);
    if (out) store(out + d / kLanes<A> * step, e);
    high = at_least<A>(high, e);
    low = at_most<A>(low, e);
  }
  extent.join(max_lanes<A>(high), min_lanes<A>(low));
}

// A matrix of factors: row i, vector k at data + i * row + k * step.
template <class A>
struct Factors {
  const A* data;
  int64_t row, step;
};

// 1 + E, or what stands for it, from one pair of operands.
template <class A, Range R>
FA_INLINE Vec<A> denominator(Vec<A> q, Vec<A> m) {
  if constexpr (R == Range::exact) {
    const A top = A(2) * Limits<A>::argument;
    return exponential(at_most<A>(A(2) * (q + m), splat(top))) + A(1);
  } else if constexpr (R == Range::clamped) {
    return at_most<A>(q * m + A(1), splat(Limits<A>::single));
  } else {
    return q * m + A(1);
  }
}

// 1 / (1 + E). Saturated terms must come out as 0 or 1 to the bit in the exact range, or u = r -
// r^2 would be an error where it ought to be 0: the division is exact there, the estimate is not.
template <class A, Range R>
FA_INLINE Vec<A> inverse(Vec<A> x) {
  if constexpr (R == Range::exact)
    return A(1) / x;
  else
    return reciprocal<A>(x);
}

// v0 / x0 + v1 / x1 with one reciprocal: (v0 x1 + v1 x0) / (x0 x1).
template <class A, Range R>
FA_INLINE Vec<A> weighted_pair(Vec<A> x0, Vec<A> x1, Vec<A> v0, Vec<A> v1) {
  if constexpr (R == Range::paired) {
    return (v0 * x1 + v1 * x0) * reciprocal<A>(x0 * x1);
  } else {
    return v0 * inverse<A, R>(x0) + v1 * inverse<A, R>(x1);
  }
}

template <class A, Range R, int M, int N>
FA_INLINE void concat_tile(Factors<A> q, Factors<A> m, const A* v, int64_t padded, A v_sum, A* out,
                           int64_t ldo) {
  Vec<A> acc[M][N] = {};
  const A *qk = q.data, *mk = m.data;
  for (int64_t d = 0; d < padded; d += 2 * kLanes<A>, qk += 2 * q.step, mk += 2 * m.step) {
    const Vec<A> v0 = load(v + d), v1 = load(v + d + kLanes<A>);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const Vec<A> q0 = load(qk + i * q.row), q1 = load(qk + i * q.row + q.step);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const Vec<A> x0 = denominator<A, R>(q0, load(mk + j * m.row));
        const Vec<A> x1 = denominator<A, R>(q1, load(mk + j * m.row + m.step));
        acc[i][j] += weighted_pair<A, R>(x0, x1, v0, v1);
      }
    }
  }
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

// out[i][j] = v . tanh(q_i + m_j) for m rows of q and n rows of memory.
template <class A, Range R>
static void concat_scores(Factors<A> q, int64_t rows, Factors<A> m, int64_t n, const A* v,
                          int64_t padded, A v_sum, A* out, int64_t ldo) {
  constexpr int M = kVectorBytes == 64 ? 4 : 2;
  const auto advance = [&](Factors<A> f, int64_t by) {
    return Factors<A>{f.data + by * f.row, f.row, f.step};
  };
  for (int64_t j = 0; j < n;) {
    const bool four = j + 4 <= n;
    const Factors<A> mj = advance(m, j);
    int64_t i = 0;
    for (; i + M <= rows; i += M) {
      const Factors<A> qi = advance(q, i);
      if (four)
        concat_tile<A, R, M, 4>(qi, mj, v, padded, v_sum, out + i * ldo + j, ldo);
      else
        concat_tile<A, R, M, 1>(qi, mj, v, padded, v_sum, out + i * ldo + j, ldo);
    }
    for (; i < rows; ++i) {
      const Factors<A> qi = advance(q, i);
      if (four)
        concat_tile<A, R, 1, 4>(qi, mj, v, padded, v_sum, out + i * ldo + j, ldo);
      else
        concat_tile<A, R, 1, 1>(qi, mj, v, padded, v_sum, out + i * ldo + j, ldo);
    }
    j += four ? 4 : 1;
  }
}

template <class A>
FA_INLINE void concat_scores_in(Range range, Factors<A> q, int64_t rows, Factors<A> m, int64_t n,
                                const A* v, int64_t padded, A v_sum, A* out, int64_t ldo) {
  switch (range) {
    case Range::paired:
      return concat_scores<A, Range::paired>(q, rows, m, n, v, padded, v_sum, out, ldo);
    case Range::clamped:
      return concat_scores<A, Range::clamped>(q, rows, m, n, v, padded, v_sum, out, ldo);
    case Range::exact:
      return concat_scores<A, Range::exact>(q, rows, m, n, v, padded, v_sum, out, ldo);
  }
}

// One vector of columns of the backward: with u = r - r^2 and g the gradients of the scores,
//   dq_i += sum_j g_ij u,   dm_j += sum_i g_ij u   (both still without the factor 4 v),
//   dv   += sum_ij g_ij r   (dv itself is sum g - 2 times this).
// Lanes lie along the width, so nothing is reduced across them and g is a broadcast.
template <class A, Range R, int M>
FA_INLINE void concat_backward_rows(const A* q, const A* m, const A* g, int64_t ldg, int64_t n,
                                    A* dq, A* dm, Vec<A>& dv) {
  Vec<A> qi[M], dqi[M], dvi[M] = {};
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    qi[i] = load(q + i * kLanes<A>);
    dqi[i] = load(dq + i * kLanes<A>);
  }
  for (int64_t j = 0; j < n; ++j) {
    const Vec<A> mj = load(m + j * kLanes<A>);
    Vec<A> dmj = load(dm + j * kLanes<A>);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      // A single product may reach Limits::pair here, far below where the reciprocal fails.
      const Vec<A> r = inverse<A, R>(denominator<A, R>(qi[i], mj));
      const A gij = g[i * ldg + j];
      const Vec<A> gu = gij * (r - r * r);
      dqi[i] += gu;
      dmj += gu;
      dvi[i] += gij * r;
    }
    store(dm + j * kLanes<A>, dmj);
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    store(dq + i * kLanes<A>, dqi[i]);
    dv += dvi[i];
  }
}

// Blocked layout: vector k of row i at data + k * step + i * lanes. dq and dm are blocked too,
// with steps of their own; dv is a row.
template <class A, Range R>
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
      concat_backward_rows<A, R, M>(qk + i * kLanes<A>, mk, g + i * ldg, ldg, n,
                                    dqk + i * kLanes<A>, dmk, dvk);
    for (; i < rows; ++i)
      concat_backward_rows<A, R, 1>(qk + i * kLanes<A>, mk, g + i * ldg, ldg, n,
                                    dqk + i * kLanes<A>, dmk, dvk);
    store(dv + k * kLanes<A>, dvk);
  }
}

template <class A>
FA_INLINE void concat_backward_in(Range range, Factors<A> q, int64_t rows, Factors<A> m, int64_t n,
                                  const A* g, int64_t ldg, int64_t padded, A* dq, int64_t dq_step,
                                  A* dm, int64_t dm_step, A* dv) {
  switch (range) {
    case Range::paired:
      return concat_backward<A, Range::paired>(q, rows, m, n, g, ldg, padded, dq, dq_step, dm,
                                               dm_step, dv);
    case Range::clamped:
      return concat_backward<A, Range::clamped>(q, rows, m, n, g, ldg, padded, dq, dq_step, dm,
                                                dm_step, dv);
    case Range::exact:
      return concat_backward<A, Range::exact>(q, rows, m, n, g, ldg, padded, dq, dq_step, dm,
                                              dm_step, dv);
  }
}

}  // namespace
}  // namespace fused_attn
