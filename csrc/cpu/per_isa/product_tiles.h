// Products with packed weights in register tiles: a few rows by a part of a panel.
//
// An output is the sum over the inputs one after the other, in blocks of a fixed number of steps:
// start + (sum of block 0) + (sum of block 1) + ... Neither the number of rows nor the place of a
// row or an output in its tile changes that order, so it does not change a bit.
#pragma once

#include "product_steps.h"

namespace fused_attn {
namespace {

constexpr int64_t kStepBytes = kPanel * 4;  // weights of a step
constexpr int kPanelVectors = int(kStepBytes) / kVectorBytes;

FA_INLINE int64_t panel_bytes(const PackedMatrix& matrix) {
  return matrix.padded_inputs * kPanel * compute_bytes(matrix.compute);
}

// The start of a product, and where it goes.
struct Result {
  const float* start;  // null: zeros
  int64_t start_stride;
  float* out;
  int64_t stride;
  int64_t columns;  // of the whole product

  Result row(int64_t n) const {
    return {start ? start + n * start_stride : nullptr, start_stride, out + n * stride, stride,
            columns};
  }
};

// The rows of a product as the steps read them.
struct StepRows {
  const char* data;
  int64_t bytes;  // from row to row
};

// Weights that are brought nearer while a tile is computed.
struct Ahead {
  const char* from;
  int64_t step;  // bytes of them at each step
};

FA_INLINE void bring(const char* p) { __builtin_prefetch(p, 0, 2); }

// The lines that M rows of results go to: far apart, and written when the sums are complete.
template <int M>
FA_INLINE void bring_result(const float* out, int64_t stride) {
  for (int r = 0; r < M; ++r)
    for (int i = 0; i < kPanel; i += 16) __builtin_prefetch(out + r * stride + i, 1, 2);
}

// Steps first .. first + steps of M rows times N vectors of weights, added to the sums. `Lines` is
// how many lines are brought nearer at each step.
template <class Step, int M, int N, int Lines>
FA_INLINE void add_steps(const char* weights, StepRows x, int64_t steps, Ahead ahead,
                         typename Step::Sum (&sums)[M][N]) {
  const char* coming = ahead.from;
  const char* rows[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) rows[r] = x.data + r * x.bytes;
  for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
    if constexpr (Lines > 0) {
#pragma GCC unroll 4
      for (int line = 0; line < Lines; ++line) bring(coming + line * 64);
      coming += ahead.step;
    }
    typename Step::Weights w[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) w[n] = Step::weights(weights + n * kVectorBytes);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const typename Step::Row word = Step::row(rows[r] + step * Step::kRowBytes);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[r][n] = Step::add(sums[r][n], w[n], word);
    }
  }
}

// Adds the sums of M rows and N vectors, from `column` on, to the start.
template <class Step, int M, int N>
FA_INLINE void finish(const typename Step::Sum (&sums)[M][N], const Result& result, int64_t column,
                      const Scales& scales) {
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const int64_t at = column + n * kLanes<float>, count = result.columns - at;
      if (count <= 0) break;
      const Vec<float> sum = Step::finish(sums[r][n], scales, r, n * kLanes<float>);
      const Vec<float> before = result.start
                                    ? load_part(result.start + r * result.start_stride + at, count)
                                    : Vec<float>{};
      store_part(result.out + r * result.stride + at, before + sum, count);
    }
}

// Vectors of a panel beside M rows, so that sums and operands fit the registers.
template <class Step, int M>
constexpr int tile_vectors() {
#if defined(__AVX512F__)
  return 4;
#else
  return M == 1 ? 8 : M <= 3 && Step::kRowBytes == 4 ? 4 : 2;
#endif
}

// What a step needs besides its rows.
struct Panel {
  const char* weights;  // of the first step of a chunk
  int64_t column;       // its first output
  Scales scales;
};

template <class X>
FA_INLINE const X* offset(const X* p, int64_t n) {
  return p ? p + n : p;
}

// Subnormals count as zeros from here to `end`, if wanted: for steps with the arithmetic of AMX.
template <bool Wanted>
struct FlushIf {};
#if defined(__AMX_BF16__)
template <>
struct FlushIf<true> {
  unsigned before = _mm_getcsr();
  FA_INLINE_METHOD FlushIf() { _mm_setcsr(before | 0x8040); }
  // The sums pass through here, so that no sum is computed after it.
  template <class Sum, int M, int N>
  FA_INLINE_METHOD void end(Sum (&sums)[M][N]) const {
    for (int r = 0; r < M; ++r)
      for (int n = 0; n < N; ++n) __asm__ volatile("" : "+v"(sums[r][n].total));
    _mm_setcsr(before);
  }
};
#endif

// M rows by a whole panel: adds `steps` steps to the start.
template <class Step, int M, int Lines>
void tile(const Panel& panel, StepRows x, int64_t steps, Ahead ahead, const Result& result) {
  constexpr int N = tile_vectors<Step, M>();
  alignas(64) char prepared[Step::kPrepares ? M * Step::kSteps * Step::kRowBytes : 1];
  bring_result<M>(result.out + panel.column, result.stride);
  constexpr int64_t kRowBytes = Step::kSteps * Step::kRowBytes;
  for (int vector = 0; vector < kPanelVectors; vector += N) {
    const int64_t column = vector * kLanes<float>;
    if (panel.column + column >= result.columns) break;
    typename Step::Sum sums[M][N] = {};
    const FlushIf<Step::kFolds> flushing;
    int64_t step = 0;
    do {
      const int64_t count = steps - step < Step::kSteps ? steps - step : Step::kSteps;
      StepRows rows{x.data + step * 4, x.bytes};
      if constexpr (Step::kPrepares) {
        if (vector == 0 || steps > Step::kSteps)
          for (int r = 0; r < M; ++r)
            Step::prepare(rows.data + r * rows.bytes, count, prepared + r * kRowBytes);
        rows = {prepared, kRowBytes};
      }
      const char* weights = panel.weights + step * kStepBytes + vector * kVectorBytes;
      add_steps<Step, M, N, Lines>(weights, rows, count, ahead, sums);
      ahead.from += count * ahead.step;
      step += count;
      if constexpr (Step::kFolds)
        for (int r = 0; r < M; ++r)
          for (int n = 0; n < N; ++n) Step::fold(sums[r][n]);
    } while (step < steps);
    if constexpr (Step::kFolds) flushing.end(sums);
    ahead.step = 0;  // the other vectors of the panel bring nothing
    const Scales scales{offset(panel.scales.outputs, column), offset(panel.scales.sums, column),
                        panel.scales.rows};
    finish<Step, M, N>(sums, result, panel.column + column, scales);
  }
}

template <class Step, int Lines>
void tile_of_rows(int64_t rows, const Panel& panel, StepRows x, int64_t steps, Ahead ahead,
                  const Result& result) {
  switch (rows) {
    case 1:
      return tile<Step, 1, Lines>(panel, x, steps, ahead, result);
    case 2:
      return tile<Step, 2, Lines>(panel, x, steps, ahead, result);
  }
  if constexpr (Step::kMostRows >= 4) {
    if (rows == 3) return tile<Step, 3, Lines>(panel, x, steps, ahead, result);
    if (rows == 4) return tile<Step, 4, Lines>(panel, x, steps, ahead, result);
  }
  if constexpr (Step::kMostRows == 6) {
    if (rows == 5) return tile<Step, 5, Lines>(panel, x, steps, ahead, result);
    return tile<Step, 6, Lines>(panel, x, steps, ahead, result);
  }
}

// While one chunk of weights is multiplied, the next comes nearer, a part of it with each row tile.
// A single tile is left to the processor's own prefetching, which is faster then.
template <class Step>
void chunk_product(const Panel& panel, StepRows x, int64_t rows, int64_t steps, const char* next,
                   const float* row_scales, const Result& result) {
  const int64_t tiles = (rows + Step::kMostRows - 1) / Step::kMostRows;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t end = (t + 1) * rows / tiles;
    Panel part = panel;
    part.scales.rows = offset(row_scales, first);
    const StepRows those{x.data + first * x.bytes, x.bytes};
    const Result to = result.row(first);
    const int64_t share = (kStepBytes + tiles - 1) / tiles;  // bytes that come nearer at a step
    if (!next || tiles == 1)
      tile_of_rows<Step, 0>(end - first, part, those, steps, {}, to);
    else if (tiles < 4)
      tile_of_rows<Step, 2>(end - first, part, those, steps, {next + t * steps * share, share}, to);
    else
      tile_of_rows<Step, 1>(end - first, part, those, steps, {next + t * steps * share, share}, to);
    first = end;
  }
}

// A panel by a block of rows. `coming` is the panel that is read after it, or null.
template <class Step>
void panel_product(const PackedMatrix& matrix, int64_t p, const char* coming, StepRows x,
                   const float* row_scales, int64_t rows, const Result& result) {
  const int64_t steps = Step::steps(matrix), column = p * kPanel;
  const int64_t chunk = Step::kWhole ? steps : Step::kSteps;
  const char* weights = static_cast<const char*>(matrix.panels) + p * panel_bytes(matrix);
  Result to = result;
  int64_t first = 0;
  do {
    const int64_t count = steps - first < chunk ? steps - first : chunk;
    const bool last = first + count >= steps;
    const char* next = last ? coming : weights + (first + count) * kStepBytes;
    const Panel panel{weights + first * kStepBytes,
                      column,
                      {offset(matrix.scales, column), offset(matrix.sums, column), nullptr}};
    chunk_product<Step>(panel, {x.data + first * 4, x.bytes}, rows, count, next, row_scales, to);
    to.start = to.out;
    to.start_stride = to.stride;
    first += count;
  } while (first < steps);
}

// Rows of a block. A result with a few hundred rows is read and written for each block of inputs,
// and rows of results a fixed stride apart map to the same few cache sets. All blocks use a panel
// before the next one is read, so the weights are read from memory once.
constexpr int64_t kRowBlock = 48;

template <class Step>
void tiled_product(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                   const Result& result) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, panels = matrix.panel_count();
  const int64_t row_bytes = x.stride * compute_bytes(matrix.compute);
  for (int64_t p = 0; p < panels; ++p) {
    const char* own = static_cast<const char*>(matrix.panels) + p * panel_bytes(matrix);
    const char* after = p + 1 < panels ? own + panel_bytes(matrix) : nullptr;
    for (int64_t b = 0, first = 0; b < blocks; ++b) {
      const int64_t end = (b + 1) * rows / blocks;
      const StepRows those{static_cast<const char*>(x.data) + first * row_bytes, row_bytes};
      panel_product<Step>(matrix, p, b + 1 < blocks ? own : after, those, offset(x.scales, first),
                          end - first, result.row(first));
      first = end;
    }
  }
}

}  // namespace
}  // namespace fused_attn
