// The two matrix products of attention, in register tiles over rows that need no packing.
//
//   rows_dot_rows     out[i][j] = sum_d a[i][d] b[j][d]        scores, dP: both operands by rows
//   add_scaled_rows   c[i][:] (+)= sum_j p[i][j] x[j][:]       context, dMemory, dQuery
//
// Row widths are multiples of the vector length (others are copied and padded with zeros first).
#pragma once

#include "sizes.h"

namespace fused_attn {
namespace {

// A tile of kTileRows x 4 accumulators fills the register file, with room for one row of operands.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
#else
constexpr int kTileRows = 3;
constexpr int kTileVectors = 2;
#endif
#if defined(__AVX512F__)
constexpr int kDotRows = 6;
#else
constexpr int kDotRows = 2;
#endif

template <class A>
constexpr int kLine = 64 / int(sizeof(A));  // elements in a line of the cache

// Whether the rows of the next tile are prefetched while this one is computed: rows that are read
// for the first time come from memory, and a tile's streams are too short for the hardware to see.
enum class Prefetch { none, next_tile };
template <Prefetch P>
struct PrefetchTag {
  static constexpr Prefetch value = P;
};
template <int N>
struct Count {
  static constexpr int value = N;
};

// One step of the dot product of two rows of Z; pairs.h specialises it for bfloat16.
template <class Z>
struct Operand {
  static constexpr int kStep = kLanes<Z>;
  typedef Vec<Z> type;
  FA_INLINE_METHOD static type load(const Z* p) { return fused_attn::load(p); }
  FA_INLINE_METHOD static Vec<Z> add_product(Vec<Z> sum, type x, type y) { return sum + x * y; }
};

template <class Z, int M, int N, Prefetch P>
FA_INLINE void dot_tile(const Z* a, int64_t lda, const Z* b, int64_t ldb, int64_t width,
                        Arithmetic<Z>* out, int64_t ldo) {
  using A = Arithmetic<Z>;
  using Op = Operand<Z>;
  Vec<A> acc[M][N] = {};
  for (int64_t d = 0; d < width; d += Op::kStep) {
    typename Op::type y[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      y[j] = Op::load(b + j * ldb + d);
      if (P == Prefetch::next_tile) __builtin_prefetch(b + (N + j) * ldb + d);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const typename Op::type x = Op::load(a + i * lda + d);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = Op::add_product(acc[i][j], x, y[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    if constexpr (N == 4) {
      sum_lanes_of_four<A>(acc[i], out + i * ldo);
    } else {
      for (int j = 0; j < N; ++j) out[i * ldo + j] = sum_lanes<A>(acc[i][j]);
    }
  }
}

template <class Z, int M, Prefetch P>
FA_INLINE void dot_rows(const Z* a, int64_t lda, const Z* b, int64_t ldb, int64_t n, int64_t width,
                        Arithmetic<Z>* out, int64_t ldo) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    for (int64_t d = j * width / n; d < (j + 4) * width / n; d += kLine<Z>)
      for (int i = 0; i < M; ++i) __builtin_prefetch(a + (M + i) * lda + d);  // of the next block
    dot_tile<Z, M, 4, P>(a, lda, b + j * ldb, ldb, width, out + j, ldo);
  }
  // The last tile overlaps the one before: a full tile costs less than small ones.
  if (j < n && n >= 4)
    return dot_tile<Z, M, 4, Prefetch::none>(a, lda, b + (n - 4) * ldb, ldb, width, out + n - 4,
                                             ldo);
  for (; j < n; ++j)
    dot_tile<Z, M, 1, Prefetch::none>(a, lda, b + j * ldb, ldb, width, out + j, ldo);
}

// The same for few queries: row after row, so that memory is read as one stream, which the
// hardware prefetches at full bandwidth. (Four rows at a time are four streams that end every row:
// half the bandwidth.) A tile has independent sums for its rows, this loop for parts of the width.
template <class A, int M>
FA_INLINE void stream_rows(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t n,
                           int64_t width, A* out, int64_t ldo) {
  constexpr int U = M == 1 ? 8 : M == 2 ? 4 : 2;
  for (int64_t j = 0; j < n; ++j, b += ldb) {
    Vec<A> acc[M][U] = {};
    int64_t d = 0;
    for (; d + U * kLanes<A> <= width; d += U * kLanes<A>)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Vec<A> y = load(b + d + u * kLanes<A>);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) acc[i][u] += load(a + i * lda + d + u * kLanes<A>) * y;
      }
    for (; d < width; d += kLanes<A>)
      for (int i = 0; i < M; ++i) acc[i][0] += load(a + i * lda + d) * load(b + d);
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) acc[i][0] += acc[i][u];
      out[i * ldo + j] = sum_lanes<A>(acc[i][0]);
    }
  }
}

template <class A>
FA_INLINE void rows_dot_stream(const A* a, int64_t lda, int64_t m, const A* b, int64_t ldb,
                               int64_t n, int64_t width, A* out, int64_t ldo) {
  for (; m >= 4; m -= 4, a += 4 * lda, out += 4 * ldo)
    stream_rows<A, 4>(a, lda, b, ldb, n, width, out, ldo);
  if (m >= 2) {
    stream_rows<A, 2>(a, lda, b, ldb, n, width, out, ldo);
    a += 2 * lda;
    out += 2 * ldo;
  }
  if (m % 2) stream_rows<A, 1>(a, lda, b, ldb, n, width, out, ldo);
}

// out (m, n; stride ldo) = a (m, width) times the transpose of b (n, width).
template <class Z>
static void rows_dot_rows(const Z* a, int64_t lda, int64_t m, const Z* b, int64_t ldb, int64_t n,
                          int64_t width, Arithmetic<Z>* out, int64_t ldo) {
  if constexpr (__is_same(Z, Arithmetic<Z>))
    if (m <= kFewQueries) return rows_dot_stream(a, lda, m, b, ldb, n, width, out, ldo);
  if (m < kDotRows) {  // of a type that rows_dot_stream does not take
    for (int64_t i = 0; i < m; ++i)
      dot_rows<Z, 1, Prefetch::none>(a + i * lda, lda, b, ldb, n, width, out + i * ldo, ldo);
    return;
  }
  const auto block = [&](int64_t i, auto prefetch) {
    dot_rows<Z, kDotRows, decltype(prefetch)::value>(a + i * lda, lda, b, ldb, n, width,
                                                     out + i * ldo, ldo);
  };
  block(0, PrefetchTag<Prefetch::next_tile>{});
  int64_t i = kDotRows;
  for (; i + kDotRows <= m; i += kDotRows) block(i, PrefetchTag<Prefetch::none>{});
  if (i < m) block(m - kDotRows, PrefetchTag<Prefetch::none>{});  // overlaps the block before
}

// Coefficients p[i][j] at p + i * p_row + j * p_col, so that a transpose costs nothing.
template <class A>
struct Coefficients {
  const A* p;
  int64_t row, col;
};

// What happens to the old c: overwritten, kept, or multiplied row by row (the rescaling of an
// online softmax).
template <class A>
struct Previous {
  bool keep = true;
  const A* factor = nullptr;  // (m), or null for 1
  FA_INLINE_METHOD static Previous kept() { return {}; }
};

template <class A, int M, int N>
FA_INLINE void scaled_tile(Coefficients<A> p, const A* x, int64_t ldx, int64_t n, A* c, int64_t ldc,
                           Previous<A> previous) {
  Vec<A> acc[M][N] = {};
  if (previous.keep)
    for (int i = 0; i < M; ++i)
      for (int k = 0; k < N; ++k) {
        acc[i][k] = load(c + i * ldc + k * kLanes<A>);
        if (previous.factor) acc[i][k] *= previous.factor[i];
      }
  for (int64_t j = 0; j < n; ++j) {
    Vec<A> y[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) y[k] = load(x + j * ldx + k * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const A coefficient = p.p[i * p.row + j * p.col];
#pragma GCC unroll 8
      for (int k = 0; k < N; ++k) acc[i][k] += coefficient * y[k];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) store(c + i * ldc + k * kLanes<A>, acc[i][k]);
}

template <class A, int M>
FA_INLINE void scaled_rows(Coefficients<A> p, const A* x, int64_t ldx, int64_t n, int64_t width,
                           A* c, int64_t ldc, Previous<A> previous) {
  constexpr int N = M == 1 ? 2 * kTileVectors : kTileVectors;
  int64_t d = 0;
  for (; d + N * kLanes<A> <= width; d += N * kLanes<A>)
    scaled_tile<A, M, N>(p, x + d, ldx, n, c + d, ldc, previous);
  for (; d < width; d += kLanes<A>) scaled_tile<A, M, 1>(p, x + d, ldx, n, c + d, ldc, previous);
}

template <class A>
static void add_scaled_rows(Coefficients<A> p, int64_t m, const A* x, int64_t ldx, int64_t n,
                            int64_t width, A* c, int64_t ldc, Previous<A> previous) {
  int64_t i = 0;
  const auto advance = [&](int rows) {
    p.p += rows * p.row;
    c += rows * ldc;
    if (previous.factor) previous.factor += rows;
    i += rows;
  };
  while (i + kTileRows <= m) {
    scaled_rows<A, kTileRows>(p, x, ldx, n, width, c, ldc, previous);
    advance(kTileRows);
  }
  switch (m - i) {
    case 1:
      scaled_rows<A, 1>(p, x, ldx, n, width, c, ldc, previous);
      break;
    case 2:
      scaled_rows<A, 2>(p, x, ldx, n, width, c, ldc, previous);
      break;
#if defined(__AVX512F__)
    case 3:
      scaled_rows<A, 3>(p, x, ldx, n, width, c, ldc, previous);
      break;
    case 4:
      scaled_rows<A, 4>(p, x, ldx, n, width, c, ldc, previous);
      break;
    case 5:
      scaled_rows<A, 5>(p, x, ldx, n, width, c, ldc, previous);
      break;
#endif
    default:
      break;
  }
}

}  // namespace
}  // namespace fused_attn
