// Products of rows with packed weights, and the rows converted for them; see DecoderKernels and
// PackedMatrix.
#pragma once

#include "product_amx.h"
#include "product_tiles.h"

namespace fused_attn {
namespace {

FA_INLINE void convert_to_bfloat16(const float* x, int64_t inputs, int64_t padded, BFloat16* out) {
  narrow_row(x, 1.0f, inputs, out);
  for (int64_t i = inputs; i < padded; ++i) out[i].bits = 0;
}

// The bits of the largest |x|: integers compare like magnitudes, and the bits of infinities and
// NaNs are the largest.
FA_INLINE int32_t largest_bits(const float* x, int64_t n) {
  Ints most{};
  for_each_vector(n, [&](int64_t i, int64_t count) {
    const Ints size = (Ints)magnitude_of(load_part(x + i, count));
    most = size > most ? size : most;
  });
  int32_t result = 0;
  for (int i = 0; i < kLanes<float>; ++i) result = most[i] > result ? most[i] : result;
  return result;
}

// Returns the scale.
FA_INLINE float convert_to_integers(const float* x, int64_t inputs, int64_t padded, int8_t* out) {
  const int32_t bits = largest_bits(x, inputs);
  const float largest = as_float(uint32_t(bits));
  if (bits == 0 || bits >= 0x7f800000) {
    if (padded) memset(out, 0, size_t(padded));  // out may be null without inputs
    return bits == 0 ? 0.0f : __builtin_nanf("");
  }
  const float before = largest < 0x1p-64f ? 0x1p64f : 1.0f;  // so that the factor is finite
  const float factor = 127.0f / (largest * before);
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  int64_t i = 0;
  for (; i < inputs; i += kLanes<float>) {
    const int64_t left = inputs - i, count = left < kLanes<float> ? left : kLanes<float>;
    const Vec<float> scaled = rounded(load_part(x + i, count) * before * factor);
    const Bytes bytes = __builtin_convertvector((Ints)(scaled + kShift) - 0x4b400000, Bytes);
    memcpy(out + i, &bytes, sizeof bytes);  // fits: padded is a multiple of 64
  }
  if (i < padded) memset(out + i, 0, size_t(padded - i));
  return largest / 127.0f;
}

void convert(Compute compute, const float* x, int64_t stride, int64_t rows, int64_t inputs,
             void* out, float* scales) {
  const int64_t padded = padded_inputs(compute, inputs);
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    if (compute == Compute::bf16)
      convert_to_bfloat16(x, inputs, padded, static_cast<BFloat16*>(out) + row * padded);
    else
      scales[row] =
          convert_to_integers(x, inputs, padded, static_cast<int8_t*>(out) + row * padded);
  }
}

#ifdef FA_AMX
// Fewer rows are multiplied faster by vectors than by tiles, with the same bits.
constexpr int64_t kIntegerTileRows = 16, kBFloat16TileRows = 3;
#endif

void product(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows, const float* start,
             int64_t start_stride, float* out, int64_t stride) {
  if (rows <= 0) return;
  const Result result{start, start_stride, out, stride, matrix.outputs};
  switch (matrix.compute) {
    case Compute::f32:
      return tiled_product<FloatStep>(matrix, x, rows, result);
#ifdef FA_AMX
    case Compute::bf16:
      if (rows < kBFloat16TileRows) return tiled_product<BFloat16TileStep>(matrix, x, rows, result);
      return amx_product<false>(matrix, x, rows, result);
    case Compute::i8:
      if (rows < kIntegerTileRows) return tiled_product<IntegerStep>(matrix, x, rows, result);
      return amx_product<true>(matrix, x, rows, result);
#else
    case Compute::bf16:
      return tiled_product<BFloat16Step>(matrix, x, rows, result);
    case Compute::i8:
      return tiled_product<IntegerStep>(matrix, x, rows, result);
#endif
  }
}

}  // namespace
}  // namespace fused_attn
