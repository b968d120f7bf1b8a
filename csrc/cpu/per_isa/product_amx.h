// Products with packed weights of bfloat16 or int8 on the tiles of AMX.
//
// A tile of a panel, 16 groups of inputs by 16 outputs, lies in memory as the instruction wants it,
// with 256 bytes from row to row. A product runs through all inputs in the tile registers, so an
// output's bits do not depend on the rows beside it.
#pragma once

#include "product_tiles.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define FA_AMX 1

namespace fused_attn {
namespace {

constexpr int kTileRows = 16;                   // rows of x in a tile
constexpr int64_t kTileBytes = 64;              // in a row of any tile
constexpr int64_t kTileStep = 16 * kStepBytes;  // weights of a panel for 64 bytes of a row of x
constexpr int64_t kAmxRowBlock = 8 * 2 * kTileRows;

// The registers: 0 to 3 sums, 4 and 5 rows of x, 6 and 7 weights. `upper` and `lower` are the rows
// of x in 4 and in 5; with one of them, 5 is a third register for weights.
class TileRegisters {
 public:
  ~TileRegisters() { _tile_release(); }

  void set(int upper, int lower) {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper;
    lower_ = lower;
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    static_assert(sizeof config == 64, "as the instruction reads it");
    config.palette = 1;
    const int rows[8] = {upper,
                         upper,
                         lower ? lower : upper,
                         lower ? lower : upper,
                         upper,
                         lower ? lower : kTileRows,
                         kTileRows,
                         kTileRows};
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = uint16_t(kTileBytes);
      config.rows[i] = uint8_t(rows[i]);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }

 private:
  int upper_ = 0, lower_ = 0;
};

template <bool Integers>
struct TileSums {
  typedef float type;
};
template <>
struct TileSums<true> {
  typedef int32_t type;
};

// The operands are numbers of registers, which the instructions hold.
#define FA_TILE_ADD(sum, x, w) \
  if constexpr (Integers)      \
    _tile_dpbssd(sum, x, w);   \
  else                         \
    _tile_dpbf16ps(sum, x, w)

// Up to 16 rows by a panel.
template <bool Integers>
FA_INLINE void tile_row(const char* weights, StepRows x, int64_t steps,
                        typename TileSums<Integers>::type* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* rows = x.data;
  for (int64_t step = 0; step < steps; ++step, rows += kTileBytes, weights += kTileStep) {
    _tile_loadd(4, rows, x.bytes);
    _tile_loadd(6, weights, kStepBytes);
    FA_TILE_ADD(0, 4, 6);
    _tile_loadd(7, weights + kTileBytes, kStepBytes);
    FA_TILE_ADD(1, 4, 7);
    _tile_loadd(5, weights + 2 * kTileBytes, kStepBytes);
    FA_TILE_ADD(2, 4, 5);
    _tile_loadd(6, weights + 3 * kTileBytes, kStepBytes);
    FA_TILE_ADD(3, 4, 6);
  }
  _tile_stored(0, sums, kStepBytes);
  _tile_stored(1, sums + 16, kStepBytes);
  _tile_stored(2, sums + 32, kStepBytes);
  _tile_stored(3, sums + 48, kStepBytes);
}

// 17 to 32 rows by a half of a panel.
template <bool Integers>
FA_INLINE void tile_pair(const char* weights, StepRows x, int64_t steps,
                         typename TileSums<Integers>::type* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char *upper = x.data, *lower = x.data + kTileRows * x.bytes;
  for (int64_t step = 0; step < steps; ++step, weights += kTileStep) {
    _tile_loadd(4, upper + step * kTileBytes, x.bytes);
    _tile_loadd(6, weights, kStepBytes);
    FA_TILE_ADD(0, 4, 6);
    _tile_loadd(7, weights + kTileBytes, kStepBytes);
    FA_TILE_ADD(1, 4, 7);
    _tile_loadd(5, lower + step * kTileBytes, x.bytes);
    FA_TILE_ADD(2, 5, 6);
    FA_TILE_ADD(3, 5, 7);
  }
  _tile_stored(0, sums, kStepBytes);
  _tile_stored(1, sums + 16, kStepBytes);
  _tile_stored(2, sums + kTileRows * kPanel, kStepBytes);
  _tile_stored(3, sums + kTileRows * kPanel + 16, kStepBytes);
}

// Adds sums (rows, 64) to the start, from `column` on.
template <bool Integers>
FA_INLINE void finish_rows(const typename TileSums<Integers>::type* sums, int64_t rows,
                           const Result& result, int64_t column, const Scales& scales) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < kPanel && column + i < result.columns; i += kLanes<float>) {
      const int64_t at = column + i, count = result.columns - at;
      Vec<float> sum;
      if constexpr (Integers)
        sum = scaled(load_words(sums + r * kPanel + i), scales, int(r), int(i));
      else
        sum = load(sums + r * kPanel + i);
      const Vec<float> before = result.start
                                    ? load_part(result.start + r * result.start_stride + at, count)
                                    : Vec<float>{};
      store_part(result.out + r * result.stride + at, before + sum, count);
    }
}

// Rows of a block by one panel. The processor's own prefetching keeps up with the tiles.
template <bool Integers>
FA_INLINE void amx_panel(TileRegisters& registers, const Panel& panel, StepRows x, int64_t rows,
                         int64_t steps, const Result& result) {
  alignas(64) typename TileSums<Integers>::type sums[2 * kTileRows * kPanel];
  for (int64_t first = 0; first < rows; first += 2 * kTileRows) {
    const int64_t count = rows - first < 2 * kTileRows ? rows - first : 2 * kTileRows;
    const StepRows those{x.data + first * x.bytes, x.bytes};
    if (count <= kTileRows) {
      registers.set(int(count), 0);
      tile_row<Integers>(panel.weights, those, steps, sums);
    } else {
      registers.set(kTileRows, int(count) - kTileRows);
      tile_pair<Integers>(panel.weights, those, steps, sums);
      tile_pair<Integers>(panel.weights + 2 * kTileBytes, those, steps, sums + 32);
    }
    __asm__ volatile("" : : : "memory");  // the instructions' stores, before they are read
    Scales scales = panel.scales;
    scales.rows = offset(scales.rows, first);
    finish_rows<Integers>(sums, count, result.row(first), panel.column, scales);
  }
}

template <bool Integers>
void amx_product(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                 const Result& result) {
  const int64_t row_bytes = matrix.padded_inputs * compute_bytes(matrix.compute);
  const int64_t steps = row_bytes / kTileBytes;
  const int64_t stride = x.stride * compute_bytes(matrix.compute);
  TileRegisters registers;
  for (int64_t first = 0; first < rows; first += kAmxRowBlock) {
    const int64_t count = rows - first < kAmxRowBlock ? rows - first : kAmxRowBlock;
    const StepRows those{static_cast<const char*>(x.data) + first * stride, stride};
    for (int64_t p = 0; p < matrix.panel_count(); ++p) {
      const int64_t column = p * kPanel;
      const Panel panel{
          static_cast<const char*>(matrix.panels) + p * panel_bytes(matrix),
          column,
          {offset(matrix.scales, column), offset(matrix.sums, column), offset(x.scales, first)}};
      amx_panel<Integers>(registers, panel, those, count, steps, result.row(first));
    }
  }
}

#undef FA_TILE_ADD

}  // namespace
}  // namespace fused_attn
#endif
